# SPDX-License-Identifier: Apache-2.0
"""The internal policy model: tiers of ordered policies with ordered rules, and the endpoints they act on.

Every policy kind a user can write (Kubernetes, Calico, SIG-network, staged) is translated into these types by
`netpol_ebpf.policy.translate`; the reference model and the compiler read nothing else.

Invariants: values are immutable and hashable; selectors are *effective* (namespace confinement, prefixes and inherited
labels are already folded in, SEMANTICS 2.6), so a selector is evaluated on an owner's labels and needs no context.
This module knows nothing of files, kinds' schemas, tables or the kernel.
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
"""Protocols with ports that the dataplane parses and rules may match."""
IPV6_HEADERS = frozenset({0, 43, 44, 51, 59, 60})
"""Numbers that over IPv6 are no packet's protocol: hop-by-hop, routing, fragment, AH and destination options headers precede
what the packet carries (docs/packet-parsing.md), and 59 says that it carries nothing.  Over IPv4 they are like any other."""


class Direction(enum.Enum):
    """Direction in the policy's view: from the endpoint's side. The *hook* of a program is a different type."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Action(enum.Enum):
    """The action of a rule, or of the end of a tier."""

    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"
    LOG = "log"


class Stage(enum.Enum):
    """The list of an endpoint's policies that is evaluated. Workloads have NORMAL only; hosts have all four."""

    NORMAL = "normal"  # a workload's policy; a host's policy for local traffic (failsafes first)
    FORWARD = "forward"  # applyOnForward policies, for traffic through the host
    PRE_DNAT = "pre-dnat"  # host ingress before service DNAT; no match: continue
    UNTRACKED = "untracked"  # doNotTrack, stateless; no match: continue


@dataclass(frozen=True, slots=True)
class Ports:
    """Numeric inclusive ranges OR names. Names resolve through the named ports of the entity's own side."""

    ranges: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IcmpType:
    """ICMP (or ICMPv6, by the rule's protocol) type; ``code`` None: any."""

    type: int
    code: int | None = None


@dataclass(frozen=True, slots=True)
class BackendMatch:
    """Backends of a service; with ``match_ports`` the (address, protocol, port) triple must match, else the address."""

    namespace: str
    name: str
    match_ports: bool


@dataclass(frozen=True, slots=True)
class Entity:
    """One side (source or destination) of a rule; all given parts are ANDed. None or () means no constraint.

    An address *matches a selector* when some endpoint or network set that owns or contains it has labels that match
    (SEMANTICS 2.6 e); it matches ``not_selector`` when no owner's labels match it.  An entity never has both: beside a
    selector, the negated part belongs to the selector's expression (2.6 c).  ``nodes`` is evaluated on the labels of
    Node objects that own the address, and only on those.  ``impossible`` marks an entity that nothing matches (an
    Accept rule with an unknown peer, an ipBlock that cannot be read).
    """

    nets: tuple[IPNetwork, ...] = ()
    not_nets: tuple[IPNetwork, ...] = ()
    selector: Selector | None = None
    not_selector: Selector | None = None
    nodes: Selector | None = None
    ports: Ports | None = None
    not_ports: Ports | None = None
    service: BackendMatch | None = None
    impossible: bool = False

    def __post_init__(self) -> None:
        if self.selector is not None and self.not_selector is not None:
            raise ValueError("an entity has a selector or a not_selector; join them to one selector")


ANY_ENTITY = Entity()


@dataclass(frozen=True, slots=True)
class Rule:
    """One internal rule.

    Several internal rules may come from one user rule (a port list, a peer list): they share ``index``. ``index``:
    position in the user's own list for that direction, from 0.  ``protocol``/``not_protocol``: IANA numbers.
    ``unsupported``: names the fields of the rule that this build does not support ("http", "domains"); such a rule
    matches nothing (only Allow rules can have it, so this never widens access).
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
    """Identifies an object by its kind; ``namespace`` is "" for cluster scope.

    A tuple, since tables of thousands of objects use it as key.
    """

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}" if self.namespace else f"{self.kind}/{self.name}"


class PolicyKey(ResourceKey):
    """Identifies a policy. ``kind`` disambiguates: KubernetesNetworkPolicy, NetworkPolicy (Calico), ...

    Kinds: KubernetesNetworkPolicy, StagedKubernetesNetworkPolicy, NetworkPolicy, StagedNetworkPolicy,
    GlobalNetworkPolicy, StagedGlobalNetworkPolicy, ClusterNetworkPolicy, AdminNetworkPolicy,
    BaselineAdminNetworkPolicy.
    """

    __slots__ = ()


class Staged(enum.Enum):
    """How a policy takes part in evaluation: enforced, or only pending."""

    NO = "enforced"
    SET = "set"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy of any kind. ``order`` is +inf when the user gave none; ties: the string ``name/namespace/kind``.

    ``subject`` selects endpoints (workloads and hosts) by effective labels.  ``replaces``: for a staged policy, the key
    of the enforced policy that it replaces in the pending evaluation.
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
        """Position in the tier: order, then ``name/namespace/kind`` compared as a string."""
        return (self.order, f"{self.key.name}/{self.key.namespace}/{self.key.kind}")

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """The rule list of one direction."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class PolicyTier:
    """A tier. ``exists`` is False for a tier that policies name but nobody created: sorted last, ends in deny.

    ``follows``: the name of a tier of the same order; this tier comes directly after it, with no other tier in between.
    """

    name: str
    order: float = math.inf
    default_action: Action = Action.DENY
    exists: bool = True
    follows: str = ""

    @property
    def sort_key(self) -> tuple[bool, float, str, bool]:
        """Existing tiers first, then order (nil last), then name.

        A tier that follows another one uses the other's order and name.
        """
        return (not self.exists, self.order, self.follows or self.name, bool(self.follows))


@dataclass(frozen=True, slots=True)
class ProfileRules:
    """Rules that are evaluated when no tier decided; ``kns.<namespace>`` allows everything. A missing profile denies."""

    name: str
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """The rule list of one direction."""
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
    """Identifies an endpoint: ``kind`` is "Pod", "WorkloadEndpoint" or "HostEndpoint"; namespace "" for a host."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A workload or host endpoint with its *effective* labels (own, then inherited from its profiles).

    ``addresses``: the addresses by which rules of other endpoints select it (a host without expectedIPs has none).
    ``interface``: "*" for a wildcard host endpoint.  ``allowed_sources``: prefixes it may use as a source although it
    does not own them.
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
    """Nets with labels (a network set). ``key`` is ``namespace/name`` or ``name``."""

    key: str
    labels: Mapping[str, str] = field(hash=False)
    nets: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node: its addresses, and its labels for ``Entity.nodes``."""

    name: str
    labels: Mapping[str, str] = field(hash=False)
    addresses: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """One backend of a service; ``port`` 0 when the slice names none (matches as an address only)."""

    address: IPAddress
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class ServiceBackends:
    """Backends of a service, from all its slices."""

    namespace: str
    name: str
    backends: frozenset[Backend] = frozenset()


@dataclass(frozen=True, slots=True, order=True)
class VipKey:
    """The address of a service, or for node ports each address of a node (``address`` None).

    ``node``: the node that translates it, "": every node.
    """

    address: IPAddress | None
    protocol: int
    port: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class Vip:
    """An address and port that a node translates, with the backends of all services that have it."""

    key: VipKey
    backends: frozenset[tuple[IPAddress, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Failsafe:
    """A port that host policy never blocks for local traffic; ``net`` None: any remote address."""

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
    """Encapsulation by which the nodes carry each other's packets. ``port``: of UDP, 0 for a protocol without ports."""

    protocol: int
    port: int = 0

    @property
    def number(self) -> int:
        """Protocol and port as one number, by which a `Cause` names the tunnel."""
        return self.protocol << 16 | self.port

    @classmethod
    def of_number(cls, number: int) -> Tunnel:
        """The tunnel with a number."""
        return cls(number >> 16, number & 0xFFFF)

    def carries(self, packet: Packet) -> bool:
        """Whether a packet has this encapsulation."""
        port = packet.destination_port if packet.protocol in PORT_PROTOCOLS else 0
        return (self.protocol, self.port) == (packet.protocol, port)


TUNNELS = frozenset({Tunnel(IPIP), Tunnel(UDP, 4789), Tunnel(UDP, 51820), Tunnel(UDP, 51821)})
"""IPIP, VXLAN, WireGuard and WireGuard of IPv6 with the ports that they have by default (SEMANTICS 4.7)."""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Cluster-wide settings that change verdicts (SEMANTICS 4.5 to 4.7).

    ``node_failsafes``: by node and direction, a list that replaces the cluster's on that node.  ``tunnels``:
    encapsulations that host endpoint policy never blocks between the addresses of known nodes.
    """

    failsafe_inbound: tuple[Failsafe, ...] = FAILSAFE_INBOUND
    failsafe_outbound: tuple[Failsafe, ...] = FAILSAFE_OUTBOUND
    workload_to_host: Action = Action.ALLOW  # DENY (drop), PASS (host policy decides), ALLOW
    node_failsafes: Mapping[tuple[str, Direction], tuple[Failsafe, ...]] = field(default_factory=dict, hash=False)
    tunnels: frozenset[Tunnel] = TUNNELS

    def failsafes(self, node: str | None, direction: Direction) -> tuple[Failsafe, ...]:
        """The failsafe list of a node in one direction."""
        of_all = self.failsafe_inbound if direction is Direction.INGRESS else self.failsafe_outbound
        return self.node_failsafes.get((node or "", direction), of_all)


@dataclass(slots=True)
class World:
    """The input of the engines: the internal objects of one cluster state. Mutable; owned by its maker."""

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
        """Tiers in evaluation order, missing ones (named by a policy only) last."""
        missing = {policy.tier for policy in self.policies.values()} - self.tiers.keys()
        tiers = [*self.tiers.values(), *(PolicyTier(name, exists=False) for name in missing)]
        return iter(sorted(tiers, key=lambda tier: tier.sort_key))


@dataclass(slots=True)
class Changes:
    """Changes of internal objects: the new object, or None for a removed one. The tables have `World`'s names and keys.

    ``settings``: None when they did not change.
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
    """The first packet of a connection, as policy sees it. For ICMP, ports are 0 and type/code are given.

    Addresses are of one family.  ``protocol``: IANA number, over IPv6 none of `IPV6_HEADERS`.  Ports are 0 for protocols without ports; type and code are 0
    for all but ICMP over IPv4 and ICMPv6 over IPv6 (the other two combinations are not ICMP to the kernel).
    """

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    icmp_type: int = 0
    icmp_code: int = 0


class Outcome(enum.Enum):
    """The decision of policy on a packet. CONTINUE comes only from stages that never drop by default."""

    ALLOW = "allow"
    DENY = "deny"
    CONTINUE = "continue"


class CauseKind(enum.Enum):
    """The kind of object that decided."""

    RULE = "rule"  # tier, policy, index
    TIER_END = "end of tier"  # tier (policy: the last policy of the tier that applied)
    PROFILE = "profile"  # profile name in ``tier``-less ``profile``, index
    NO_MATCH = "no match"  # nothing decided: the implicit deny (or continue) after the profiles
    FAILSAFE = "failsafe"  # index into the failsafe list
    TUNNEL = "tunnel"  # between known nodes; index: the tunnel's number


@dataclass(frozen=True, slots=True)
class Cause:
    """The rule or other object that made a verdict. ``index`` is -1 where no rule did (end of tier, no match).

    At the end of a tier ``policy`` is the last applying policy of that tier in evaluation order.  MATCHING.md beside
    this module defines the fields of each kind of cause exactly: engines must produce identical causes.
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
    """An engine's answer for one endpoint, direction, stage and packet.

    ``logs``: the causes of Log rules that matched before the verdict, in order (of the enforced evaluation).
    ``staged_outcome``/``staged_cause``: the pending evaluation, in which staged policies take part; equal to the
    enforced pair where nothing is staged.
    """

    outcome: Outcome
    cause: Cause
    staged_outcome: Outcome
    staged_cause: Cause
    logs: tuple[Cause, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """The input of an engine: one endpoint, direction, stage and packet."""

    endpoint: EndpointKey
    direction: Direction
    stage: Stage
    packet: Packet
