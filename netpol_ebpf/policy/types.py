# SPDX-License-Identifier: Apache-2.0
"""The internal policy model: tiers of ordered policies with ordered rules, and the endpoints to which they apply.

`netpol_ebpf.policy.translate` translates every kind of policy (Kubernetes, Calico, SIG-network, staged) into these
types.  The reference model and the compiler read only these types.

Invariants: values are immutable and hashable.  Selectors are *effective* (SEMANTICS 2.6): namespace confinement,
prefixes and inherited labels are part of the selector, so that an owner's labels alone decide whether it matches.  This
module must not depend on files, the schemas of kinds, tables or the kernel.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, TypeVar, Union

from netpol_ebpf.errors import Location
from netpol_ebpf.selector import Selector

IPAddress = Union[IPv4Address, IPv6Address]
IPNetwork = Union[IPv4Network, IPv6Network]

K = TypeVar("K")
V = TypeVar("V")

TCP, UDP, SCTP, UDPLITE, ICMP, ICMPV6, IPIP = 6, 17, 132, 136, 1, 58, 4
PORT_PROTOCOLS = frozenset({TCP, UDP, SCTP})
"""Protocols with ports that the dataplane parses and that rules may match."""
IPV6_HEADERS = frozenset({0, 43, 44, 51, 59, 60})
"""Header numbers that are never the protocol of an IPv6 packet.

They are the extension headers, which precede the protocol's header (docs/packet-parsing.md), and 59, "no next header".
Over IPv4 these numbers are protocols like any other.
"""


class Direction(enum.Enum):
    """Direction of a packet from the endpoint's view. The *hook* of a program is another type."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Action(enum.Enum):
    """The action of a rule, or the default action of a tier."""

    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"
    LOG = "log"


class Stage(enum.Enum):
    """One of the policy lists of an endpoint. Workloads have NORMAL only; hosts have all four."""

    NORMAL = "normal"  # a workload's policy; a host's policy for its own processes, after the failsafes
    FORWARD = "forward"  # applyOnForward policies, for traffic through the host
    PRE_DNAT = "pre-dnat"  # host ingress before service DNAT; if no rule matches, the outcome is CONTINUE
    UNTRACKED = "untracked"  # doNotTrack policies, stateless; if no rule matches, the outcome is CONTINUE


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports on one side of a rule.

    A port matches if it is in one of ``ranges``, or if one of ``names`` stands for it.
    ``ranges``: (first, last), both included.
    ``names``: a name stands for the ports that owners of this side's address declare by this name.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IcmpType:
    """A type of ICMP or ICMPv6; the rule's protocol determines which of these. ``code``: None if any code matches."""

    type: int
    code: int | None = None


@dataclass(frozen=True, slots=True)
class BackendMatch:
    """Matches the backends of a service.

    ``match_ports``: True if address, protocol and port must be those of a backend, False if only the address must be.
    """

    namespace: str
    name: str
    match_ports: bool


@dataclass(frozen=True, slots=True)
class Entity:
    """One side (source or destination) of a rule.

    All given fields must match; a field that is None or () has no effect.
    ``selector``: must match the labels of some endpoint or network set that has or contains the address (SEMANTICS 2.6
    e).
    ``not_selector``: must match the labels of no such endpoint or network set.  An entity has at most one of
    ``selector`` and ``not_selector``: if a rule has both, the negation is part of ``selector`` (2.6 c).
    ``nodes``: must match the labels of a Node that has the address.
    ``domains``: patterns of domain names.  A name that the endpoint learned for the address (`Question.names`) must
    match one of them.  Only destinations of Allow rules have patterns.
    ``impossible``: no address matches, because the peer of an Accept rule is unknown or an ipBlock is invalid.
    """

    nets: tuple[IPNetwork, ...] = ()
    not_nets: tuple[IPNetwork, ...] = ()
    selector: Selector | None = None
    not_selector: Selector | None = None
    nodes: Selector | None = None
    ports: Ports | None = None
    not_ports: Ports | None = None
    service: BackendMatch | None = None
    domains: frozenset[str] = frozenset()
    impossible: bool = False

    def __post_init__(self) -> None:
        if self.selector is not None and self.not_selector is not None:
            raise ValueError("an entity has a selector or a not_selector; join them to one selector")


ANY_ENTITY = Entity()


@dataclass(frozen=True, slots=True)
class Rule:
    """One internal rule.

    A user rule with several ports or peers may become several internal rules.
    ``index``: the position of the user rule in its policy's list for the direction, from 0.
    ``protocol``, ``not_protocol``: IANA numbers.
    ``unsupported``: the field of the user rule that is not supported ("http"), or "".  A rule with an unsupported field
    matches nothing.  Only Allow rules can have it, so this never widens access.
    """

    action: Action
    index: int
    ip_version: int | None = None
    protocol: int | None = None
    not_protocol: int | None = None
    icmp: IcmpType | None = None
    not_icmp: IcmpType | None = None
    source: Entity = ANY_ENTITY
    destination: Entity = ANY_ENTITY
    unsupported: str = ""
    name: str = ""
    location: Location | None = field(default=None, compare=False)


class ResourceKey(NamedTuple):
    """Identifies an object by kind, namespace ("" for cluster scope) and name.

    It is a tuple, because tables with thousands of objects use it as key.
    """

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}" if self.namespace else f"{self.kind}/{self.name}"


class PolicyKey(ResourceKey):
    """Identifies a policy.

    Kinds: KubernetesNetworkPolicy, StagedKubernetesNetworkPolicy, NetworkPolicy (Calico's), StagedNetworkPolicy,
    GlobalNetworkPolicy, StagedGlobalNetworkPolicy, ClusterNetworkPolicy, AdminNetworkPolicy,
    BaselineAdminNetworkPolicy.
    """

    __slots__ = ()


class Staged(enum.Enum):
    """Whether a policy is enforced, or takes part only in the pending evaluation."""

    NO = "enforced"
    SET = "set"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy of any kind.

    ``order``: +inf if the user gave none.  `sort_key` orders policies with the same order.
    ``subject``: selects the endpoints (workloads and hosts) by their effective labels.
    ``types``: the directions in which the policy applies.
    ``replaces``: for a staged policy, the key of the enforced policy that it replaces in the pending evaluation.
    """

    key: PolicyKey
    tier: str
    order: float
    subject: Selector
    types: frozenset[Direction]
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    staged: Staged = Staged.NO
    replaces: PolicyKey | None = None
    do_not_track: bool = False
    pre_dnat: bool = False
    apply_on_forward: bool = False
    location: Location | None = field(default=None, compare=False)

    @property
    def sort_key(self) -> tuple[float, str]:
        """Sort key of the policy in its tier: order, then ``name/namespace/kind`` compared as a string."""
        return (self.order, f"{self.key.name}/{self.key.namespace}/{self.key.kind}")

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """The policy's ingress or egress rules, in order."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class PolicyTier:
    """A tier.

    ``exists``: False for a tier that policies name but that has no Tier object.  Such a tier is evaluated last and ends
    in deny.
    ``follows``: the name of a tier of the same order, directly after which this tier is evaluated; "" if there is none.
    """

    name: str
    order: float = math.inf
    default_action: Action = Action.DENY
    exists: bool = True
    follows: str = ""

    @property
    def sort_key(self) -> tuple[bool, float, str, bool]:
        """Position among the tiers: existing tiers first, then by order (a tier without order last), then by name.

        A tier with ``follows`` has the position directly after that tier.
        """
        return (not self.exists, self.order, self.follows or self.name, bool(self.follows))


@dataclass(frozen=True, slots=True)
class ProfileRules:
    """The rules of a profile, which are evaluated if no tier decided.

    The profile ``kns.<namespace>`` allows everything.  If an endpoint names a profile that does not exist, everything
    is denied.
    """

    name: str
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """The profile's ingress or egress rules, in order."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True, order=True)
class NamedPort:
    """A port that an endpoint declares by name. ``protocol``: IANA number."""

    name: str
    protocol: int
    port: int


class EndpointKind(enum.Enum):
    """Whether an endpoint is a workload or a host."""

    WORKLOAD = "workload"
    HOST = "host"


class EndpointKey(ResourceKey):
    """Identifies an endpoint. ``kind``: "Pod", "WorkloadEndpoint" or "HostEndpoint". ``namespace``: "" for a host."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A workload or host endpoint with its *effective* labels: its own, and those inherited from its profiles.

    ``addresses``: the addresses by which rules of other endpoints match this endpoint.  A host without expectedIPs has
    none.
    ``node``: the name of the endpoint's node; None if it is unknown.
    ``interface``: the name of the interface, or "*" for a wildcard host endpoint; None if it is not stated.
    ``allowed_sources``: prefixes from which a workload may send although the addresses are not its own.
    """

    key: EndpointKey
    kind: EndpointKind
    labels: Mapping[str, str] = field(hash=False)
    addresses: tuple[IPAddress, ...]
    ports: tuple[NamedPort, ...] = ()
    profiles: tuple[str, ...] = ()
    node: str | None = None
    interface: str | None = None
    allowed_sources: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledNets:
    """A network set: nets and domain names with labels.

    ``key``: ``namespace/name``, or ``name`` for a GlobalNetworkSet.
    ``domains``: patterns of domain names.  In the destination of an Allow rule without patterns of its own, a selector
    that matches the labels also matches an address for which the endpoint learned a name that matches one of the patterns.
    """

    key: str
    labels: Mapping[str, str] = field(hash=False)
    nets: tuple[IPNetwork, ...] = ()
    domains: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node: its addresses, and its labels, which `Entity.nodes` selects."""

    name: str
    labels: Mapping[str, str] = field(hash=False)
    addresses: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """One backend of a service. ``port``: 0 if its EndpointSlice gives no port; then only the address can match."""

    address: IPAddress
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class ServiceBackends:
    """The backends of a service, from all its EndpointSlices."""

    namespace: str
    name: str
    backends: frozenset[Backend] = frozenset()


@dataclass(frozen=True, slots=True, order=True)
class VipKey:
    """A destination that nodes translate: a service's address and port, or a port of the nodes.

    ``address``: None for every address of the node, as for node ports and host ports.
    ``node``: the name of the only node that translates this destination; "" if every node does.
    """

    address: IPAddress | None
    protocol: int
    port: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class Vip:
    """A destination that nodes translate, with the backends of all services that have this address and port."""

    key: VipKey
    backends: frozenset[tuple[IPAddress, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Failsafe:
    """A port that host policy never blocks for the host's own processes. ``net`` None: for any remote address."""

    protocol: int
    port: int
    net: IPNetwork | None = None


FAILSAFE_INBOUND = (
    Failsafe(TCP, 22), Failsafe(UDP, 68), Failsafe(TCP, 179), Failsafe(TCP, 2379), Failsafe(TCP, 2380),
    Failsafe(TCP, 5473), Failsafe(TCP, 6443), Failsafe(TCP, 6666), Failsafe(TCP, 6667),
)  # fmt: skip
FAILSAFE_OUTBOUND = (
    Failsafe(UDP, 53), Failsafe(UDP, 67), Failsafe(TCP, 179), Failsafe(TCP, 2379), Failsafe(TCP, 2380),
    Failsafe(TCP, 5473), Failsafe(TCP, 6443), Failsafe(TCP, 6666), Failsafe(TCP, 6667),
)  # fmt: skip


class Tunnel(NamedTuple):
    """An encapsulation in which nodes send packets to each other.

    ``port``: the UDP port; 0 if ``protocol`` is not UDP.
    """

    protocol: int
    port: int = 0

    @property
    def number(self) -> int:
        """Protocol and port in one number: the ``index`` of a `Cause` of kind TUNNEL."""
        return self.protocol << 16 | self.port

    @classmethod
    def of_number(cls, number: int) -> Tunnel:
        """The tunnel with this ``number``, as the property `number` encodes it."""
        return cls(number >> 16, number & 0xFFFF)

    def carries(self, packet: Packet) -> bool:
        """Whether ``packet``, by its protocol and destination port, has this encapsulation."""
        port = packet.destination_port if packet.protocol in PORT_PROTOCOLS else 0
        return (self.protocol, self.port) == (packet.protocol, port)


TUNNELS = frozenset({Tunnel(IPIP), Tunnel(UDP, 4789), Tunnel(UDP, 51820), Tunnel(UDP, 51821)})
"""IPIP, VXLAN, WireGuard over IPv4 and WireGuard over IPv6, with their default ports (SEMANTICS 4.7)."""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Cluster-wide settings that change verdicts (SEMANTICS 4.5 to 4.7).

    ``node_failsafes``: by node and direction, a list that replaces the cluster's list on this node.
    ``tunnels``: encapsulations that host endpoint policy never blocks between the addresses of known nodes.
    """

    failsafe_inbound: tuple[Failsafe, ...] = FAILSAFE_INBOUND
    failsafe_outbound: tuple[Failsafe, ...] = FAILSAFE_OUTBOUND
    workload_to_host: Action = Action.ALLOW  # DENY, ALLOW, or PASS: the host's policy decides
    node_failsafes: Mapping[tuple[str, Direction], tuple[Failsafe, ...]] = field(default_factory=dict, hash=False)
    tunnels: frozenset[Tunnel] = TUNNELS

    def failsafes(self, node: str | None, direction: Direction) -> tuple[Failsafe, ...]:
        """The failsafe list of a node in one direction."""
        of_all = self.failsafe_inbound if direction is Direction.INGRESS else self.failsafe_outbound
        return self.node_failsafes.get((node or "", direction), of_all)


@dataclass(slots=True)
class World:
    """The input of the engines: the internal objects of one cluster state.

    Only the creator of a world may change it.
    """

    tiers: dict[str, PolicyTier] = field(default_factory=dict)
    policies: dict[PolicyKey, Policy] = field(default_factory=dict)
    profiles: dict[str, ProfileRules] = field(default_factory=dict)
    endpoints: dict[EndpointKey, Endpoint] = field(default_factory=dict)
    network_sets: dict[str, LabelledNets] = field(default_factory=dict)
    nodes: dict[str, ClusterNode] = field(default_factory=dict)
    services: dict[tuple[str, str], ServiceBackends] = field(default_factory=dict)
    vips: dict[VipKey, Vip] = field(default_factory=dict)
    settings: PolicySettings = field(default_factory=PolicySettings)

    def sorted_tiers(self) -> Iterator[PolicyTier]:
        """The tiers in evaluation order. Tiers that policies name but that do not exist are at the end."""
        missing = {policy.tier for policy in self.policies.values()} - self.tiers.keys()
        tiers = [*self.tiers.values(), *(PolicyTier(name, exists=False) for name in missing)]
        return iter(sorted(tiers, key=lambda tier: tier.sort_key))


@dataclass(slots=True)
class Changes:
    """Changes of a `World`: by key the new object, or None for a removed object.

    The fields are named as in `World`.
    ``settings``: None if the settings did not change.
    """

    tiers: dict[str, PolicyTier | None] = field(default_factory=dict)
    policies: dict[PolicyKey, Policy | None] = field(default_factory=dict)
    profiles: dict[str, ProfileRules | None] = field(default_factory=dict)
    endpoints: dict[EndpointKey, Endpoint | None] = field(default_factory=dict)
    network_sets: dict[str, LabelledNets | None] = field(default_factory=dict)
    nodes: dict[str, ClusterNode | None] = field(default_factory=dict)
    services: dict[tuple[str, str], ServiceBackends | None] = field(default_factory=dict)
    vips: dict[VipKey, Vip | None] = field(default_factory=dict)
    settings: PolicySettings | None = None

    def __bool__(self) -> bool:
        return self.settings is not None or any((
            self.tiers, self.policies, self.profiles, self.endpoints, self.network_sets, self.nodes, self.services,
            self.vips,
        ))  # fmt: skip

    def apply_to(self, world: World) -> None:
        """Apply these changes to ``world``. Cost: linear in the changes."""
        _apply(self.tiers, world.tiers)
        _apply(self.policies, world.policies)
        _apply(self.profiles, world.profiles)
        _apply(self.endpoints, world.endpoints)
        _apply(self.network_sets, world.network_sets)
        _apply(self.nodes, world.nodes)
        _apply(self.services, world.services)
        _apply(self.vips, world.vips)
        if self.settings is not None:
            world.settings = self.settings


def _apply(changes: Mapping[K, V | None], table: dict[K, V]) -> None:
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


# --- packets and verdicts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection: the fields that policy can match.

    Both addresses have the same family.
    ``protocol``: the IANA number; over IPv6 none of `IPV6_HEADERS`.
    ``source_port``, ``destination_port``: 0 for protocols without ports.
    ``icmp_type``, ``icmp_code``: 0 except for ICMP over IPv4 and ICMPv6 over IPv6.  The kernel does not treat ICMP over
    IPv6, or ICMPv6 over IPv4, as ICMP.
    """

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    icmp_type: int = 0
    icmp_code: int = 0


class Outcome(enum.Enum):
    """A verdict without its cause.

    CONTINUE: the stage decides nothing.  Only stages without default drop have this outcome.
    """

    ALLOW = "allow"
    DENY = "deny"
    CONTINUE = "continue"


class CauseKind(enum.Enum):
    """The kind of object that made a verdict."""

    RULE = "rule"  # its fields: tier, policy, index
    TIER_END = "end of tier"  # its fields: tier, and as policy the last policy of the tier that applied
    PROFILE = "profile"  # its fields: profile, index
    NO_MATCH = "no match"  # nothing decided, so the implicit deny (or CONTINUE) after the profiles applies
    FAILSAFE = "failsafe"  # its field: index in the failsafe list
    TUNNEL = "tunnel"  # a tunnel between known nodes; its field: the tunnel's number as index


@dataclass(frozen=True, slots=True)
class Cause:
    """The rule or other object that made a verdict.

    ``policy``: for an end of tier, the last policy of the tier that applies, in evaluation order.
    ``index``: -1 if no rule made the verdict (end of tier, no match).

    MATCHING.md in this directory defines the fields for each kind of cause, because engines must produce identical
    causes.
    """

    kind: CauseKind
    direction: Direction
    tier: str = ""
    policy: PolicyKey | None = None
    profile: str = ""
    index: int = -1
    action: Action = Action.DENY

    def __str__(self) -> str:
        if self.kind is CauseKind.RULE:
            return f"{self.tier}|{self.policy}|{self.direction.value}|{self.index}|{self.action.value}"
        if self.kind is CauseKind.TIER_END:
            return f"{self.tier}|end of tier|{self.direction.value}|{self.policy}|{self.action.value}"
        if self.kind is CauseKind.PROFILE:
            return f"profile|{self.profile}|{self.direction.value}|{self.index}|{self.action.value}"
        return f"{self.kind.value}|{self.direction.value}|{self.index}|{self.action.value}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An engine's decision on one `Question`: the results of the enforced and of the pending evaluation.

    ``staged_outcome``, ``staged_cause``: the result of the pending evaluation, in which staged policies take part.
    Without staged policies they are the same as ``outcome`` and ``cause``.
    ``logs``: the causes of Log rules that matched before the enforced verdict, in order.
    """

    outcome: Outcome
    cause: Cause
    staged_outcome: Outcome
    staged_cause: Cause
    logs: tuple[Cause, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """What an engine decides with a `Verdict`: one packet at one endpoint, in one direction and stage.

    ``names``: the domain names for which the endpoint has learned the packet's destination, in lower case and without a
    dot at the end.  They count only for egress, and not if an endpoint or a node has the destination address.
    """

    endpoint: EndpointKey
    direction: Direction
    stage: Stage
    packet: Packet
    names: frozenset[str] = frozenset()
