# SPDX-License-Identifier: Apache-2.0
"""The path of a packet through the cluster: at which endpoints it is judged, in which direction and stage.

`Topology.plan` turns a `Flow` (the first packet of a connection) into a `Journey`: the hops where the packet is judged,
in the order in which the packet passes them.  A hop has *questions*. A question is one endpoint, direction, stage and
packet, which an engine must decide.  `walk` gets the engine's verdicts and combines them.  All engines use the same
journeys.

The rules are from SEMANTICS 3.3 (no policy at all), 4.2 to 4.5 (which policy of a host applies where), 4.6 and 4.7
(failsafes, tunnels), 4.8 (untracked), 5.4 (services and hairpins), 5.6 (neighbour discovery), and from docs/adr (DHCP,
forged packets).

Invariants: a hop denies if the verdict on one of its questions is DENY, or if its reason denies; otherwise it allows.
The journey allows if every hop allows.  This module evaluates no rule.

Manifests do not state which interface a packet uses.  The module assumes that a node has one interface for each of its
workloads, and one interface to everything outside the node.  It assumes that a workload without a node is on a node of
its own that has no host endpoint.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address

from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    UDP,
    Action,
    Cause,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Failsafe,
    IPAddress,
    Outcome,
    Packet,
    Question,
    Stage,
    Verdict,
    World,
)

WILDCARD = "*"

ROUTER_SOLICITATION = 133
NEIGHBOUR_TYPES = frozenset({ROUTER_SOLICITATION, 135, 136})
LISTENER_TYPES = frozenset({130, 131, 132, 143})
"""ICMPv6 types of neighbour discovery (`NEIGHBOUR_TYPES`) and of listener discovery (RFC 4861, 2710, 3810).

These messages pass without policy if they stay on the link.  They are assumed to be well-formed.
"""
ROUTER_TYPES = frozenset({134, 137})
"""ICMPv6 types that only routers send: advertisement and redirect."""
REDIRECT = 5
"""The ICMP type that only routers send."""

LINK_SCOPE = 2
"""Scope of a link-local multicast address (RFC 4291)."""

_DHCP = {
    4: (68, 67, ip_address("255.255.255.255")),
    6: (546, 547, ip_address("ff02::1:2")),
}
"""Source port, destination port and destination of a DHCP client's packet to all servers on its link, by IP version."""

_DHCP_SERVER = {4: (67, 68), 6: (547, 546)}
"""Source port and destination port of a DHCP server's packet, by IP version."""


def is_link_message(packet: Packet) -> bool:
    """Whether a packet is a message of neighbour or listener discovery with link scope, which no router forwards."""
    source, destination = packet.source, packet.destination
    if packet.protocol != ICMPV6 or not isinstance(destination, IPv6Address) or packet.icmp_code:
        return False
    if packet.icmp_type in LISTENER_TYPES:
        return destination.is_multicast and (source.is_link_local or source.is_unspecified)
    is_group = destination.is_multicast and destination.packed[1] & 0xF == LINK_SCOPE
    return packet.icmp_type in NEIGHBOUR_TYPES and (is_group or destination.is_link_local)


def is_forged(packet: Packet) -> bool:
    """Whether the packet is of a kind that only routers and DHCP servers send, so that a workload must not send it."""
    if packet.protocol == UDP:
        return (packet.source_port, packet.destination_port) == _DHCP_SERVER[packet.source.version]
    if packet.protocol == ICMPV6:
        return packet.source.version == 6 and packet.icmp_type in ROUTER_TYPES  # noqa: PLR2004 - the IP version
    return packet.protocol == ICMP and packet.source.version == 4 and packet.icmp_type == REDIRECT  # noqa: PLR2004


class HopReason(enum.Enum):
    """The reason for which a hop is decided without policy. Reasons in `_REFUSALS` deny; all others allow."""

    NEIGHBOUR_DISCOVERY = "IPv6 neighbour discovery always passes"
    FORGED = "a workload does not speak for a router or a DHCP server"
    TUNNELLED = "a workload sends nothing to nodes in an encapsulation that they take from anyone"
    DHCP = "a workload may always ask its link for an address"
    TO_ITSELF = "traffic of a workload to itself is never policed"
    LOOPBACK = "traffic of a host to itself is never policed"
    HOST_TO_LOCAL_WORKLOAD = "a host always reaches its own workloads"
    HAIRPIN = "a workload that reaches itself through a service looks like its host"
    WORKLOAD_TO_HOST_ACCEPTED = "traffic of a workload to its own host is allowed by the setting workload_to_host"
    WORKLOAD_TO_HOST_DROPPED = "traffic of a workload to its own host is dropped by the setting workload_to_host"
    LOCAL_BACKENDS = (
        "no hook stands before the several processes of the node behind this service, so nothing of it is reached"
    )
    NO_HOST_ENDPOINT = "the interface has no host endpoint, so nothing is policed there"
    NOT_OURS = "neither end is known, so nothing is policed"

    @property
    def allows(self) -> bool:
        """Whether the hop allows the packet."""
        return self not in _REFUSALS


_REFUSALS = frozenset(
    {HopReason.WORKLOAD_TO_HOST_DROPPED, HopReason.FORGED, HopReason.TUNNELLED, HopReason.LOCAL_BACKENDS}
)


class FlowEndKind(enum.Enum):
    """Whether an end of a flow is a workload, a host, or outside the cluster."""

    WORKLOAD = "workload"
    HOST = "host"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class FlowEnd:
    """The source or the destination of a flow.

    ``endpoint``: the key of a workload's endpoint; None for other kinds.
    ``node``: the name of the node; None outside the cluster, and for a workload without a node.
    """

    kind: FlowEndKind
    endpoint: EndpointKey | None = None
    node: str | None = None


OUTSIDE = FlowEnd(FlowEndKind.OUTSIDE)


@dataclass(frozen=True, slots=True)
class Flow:
    """The first packet of a connection, as its sender sent it.

    ``dnat_to``: the address and port to which a node on the path translates the destination; None if no node does.
    ``source``: the sender; None: the owner of the source address.  ``destination``: the final receiver; None: the owner
    of the destination address after translation.  A caller must give a pod in the host's network, because the host owns
    the address of that pod.
    """

    packet: Packet
    dnat_to: tuple[IPAddress, int] | None = None
    source: FlowEnd | None = None
    destination: FlowEnd | None = None


@dataclass(frozen=True, slots=True)
class JourneyHop:
    """A point at which a packet is judged: by the policy of one endpoint, or without policy.

    ``questions``: evaluated in order, up to the first outcome other than CONTINUE.  If all outcomes are CONTINUE, the
    hop allows.
    ``reply``: questions about the first reply packet.  They are evaluated only if an UNTRACKED question allowed: then
    the connection has no conntrack state, so the reply needs a verdict of its own and must be allowed too.
    ``reason``: if not None, it decides the hop instead of the questions.
    """

    endpoint: EndpointKey | None = None
    direction: Direction | None = None
    questions: tuple[Question, ...] = ()
    reply: tuple[Question, ...] = ()
    reason: HopReason | None = None


@dataclass(frozen=True, slots=True)
class Journey:
    """All points at which the packets of a flow are judged, in the order in which the packets pass them."""

    flow: Flow
    hops: tuple[JourneyHop, ...]

    def questions(self) -> Iterator[Question]:
        """Every question that `walk` may evaluate."""
        for hop in self.hops:
            yield from hop.questions
            yield from hop.reply


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a flow is allowed, and why.

    ``question``, ``cause``: those of the deciding verdict.  For a denied flow this is the first denial, for an allowed
    flow the last verdict.  ``question`` is None if a `HopReason` decided.
    ``staged_allowed``: whether the flow would be allowed if all staged policies were enforced.
    ``answers``: all evaluated questions with their verdicts, in order.
    """

    allowed: bool
    question: Question | None
    cause: Cause | HopReason
    staged_allowed: bool
    answers: tuple[tuple[Question, Verdict], ...]

    def __str__(self) -> str:
        where = f"{self.question.endpoint}: " if self.question is not None else ""
        return where + (self.cause.value if isinstance(self.cause, HopReason) else str(self.cause))


Decide = Callable[[Question], Verdict]


def walk(journey: Journey, decide: Decide) -> Finding:
    """Evaluate the hops in order, up to the first hop that denies the flow.

    The function makes the enforced and the pending evaluation.  It calls ``decide`` (an engine) at most once for each
    question.
    """
    known: dict[Question, Verdict] = {}

    def ask(question: Question) -> Verdict:
        if question not in known:
            known[question] = decide(question)
        return known[question]

    allowed, question, cause = _walk(journey, lambda asked: (ask(asked).outcome, ask(asked).cause))
    answers = tuple(known.items())
    staged_allowed, _, _ = _walk(journey, lambda asked: (ask(asked).staged_outcome, ask(asked).staged_cause))
    return Finding(allowed, question, cause, staged_allowed, answers)


_Ask = Callable[[Question], "tuple[Outcome, Cause]"]


def _walk(journey: Journey, ask: _Ask) -> tuple[bool, Question | None, Cause | HopReason]:
    question: Question | None = None
    cause: Cause | HopReason = HopReason.NOT_OURS
    for hop in journey.hops:
        if hop.reason is not None:
            question, cause = None, hop.reason
            if not hop.reason.allows:
                return False, question, cause
            continue
        outcome, question, cause = _first_word(hop.questions, ask)
        if outcome is Outcome.ALLOW and question.stage is Stage.UNTRACKED:
            outcome, question, cause = _first_word(hop.reply, ask)
        if outcome is Outcome.DENY:
            return False, question, cause
    return True, question, cause


def _first_word(questions: tuple[Question, ...], ask: _Ask) -> tuple[Outcome, Question, Cause]:
    """The first outcome other than CONTINUE, with its question and cause. If all are CONTINUE, the last outcome."""
    for question in questions:
        outcome, cause = ask(question)
        if outcome is not Outcome.CONTINUE:
            break
    return outcome, question, cause


def claim_order(endpoint: Endpoint) -> tuple[int, EndpointKey]:
    """Sort key of a node's host endpoints that match the same interface. The first one applies to the interface.

    A host endpoint that names the interface comes first, then one with an address of the interface, then the wildcard.
    Among equals, the name decides.
    """
    rank = 1 if endpoint.interface is None else 2 if endpoint.interface == WILDCARD else 0
    return rank, endpoint.key


class Topology:
    """The owner (endpoint or node) of each address of a world, as far as the planning of journeys needs it.

    A topology is a snapshot of the world when the topology is created.  Cost to create: linear in endpoints and nodes.
    """

    def __init__(self, world: World) -> None:
        self._settings = world.settings
        self._workloads: dict[IPAddress, FlowEnd] = {}
        self._hosts: dict[IPAddress, FlowEnd] = {}
        self._node_addresses: dict[str, tuple[IPAddress, ...]] = {}
        self._host_endpoints: dict[str, list[Endpoint]] = {}
        for node in world.nodes.values():
            self._node_addresses[node.name] = node.addresses
            for address in node.addresses:
                self._hosts.setdefault(address, FlowEnd(FlowEndKind.HOST, node=node.name))
        self._of_nodes = frozenset(self._hosts)
        for endpoint in sorted(world.endpoints.values(), key=lambda endpoint: endpoint.key):
            if endpoint.kind is EndpointKind.WORKLOAD:
                place = FlowEnd(FlowEndKind.WORKLOAD, endpoint.key, endpoint.node)
                known = self._workloads
            else:
                place = FlowEnd(FlowEndKind.HOST, node=endpoint.node)
                known = self._hosts
                self._host_endpoints.setdefault(endpoint.node or "", []).append(endpoint)
            for address in endpoint.addresses:
                known.setdefault(address, place)
        for endpoints in self._host_endpoints.values():
            endpoints.sort(key=claim_order)

    def locate(self, address: IPAddress) -> FlowEnd:
        """The owner of an address: a workload, else a host (by its Node or a host endpoint), else `OUTSIDE`."""
        return self._workloads.get(address) or self._hosts.get(address) or OUTSIDE

    def is_bound(self, flow: Flow) -> bool:  # noqa: ARG002 - a world has no sockets
        """Whether a process of the sender's node has bound the destination, so that the node does not translate it."""
        return False

    def plan(self, flow: Flow) -> Journey:
        """The hops at which the packets of a flow are judged, in the order in which the packets pass them."""
        return Journey(flow, tuple(_Planner(self, flow).hops()))

    def translation(self, flow: Flow) -> tuple[str | None, FlowEnd]:
        """The node that translates a flow's destination, and the destination's owner after translation.

        The node is None if no node translates the destination, or if it is unknown which node does.
        """
        planner = _Planner(self, flow)
        return planner.translating_node, planner.destination

    def wildcard(self, node: str | None) -> Endpoint | None:
        """The wildcard host endpoint of a node, or None. It has all interfaces of the node, also those of workloads."""
        found = (one for one in self._host_endpoints.get(node or "", ()) if one.interface == WILDCARD)
        return next(found, None)

    def uplink(self, node: str, address: IPAddress | None, version: int) -> Endpoint | None:
        """The host endpoint of a node's interface to the outside; of several, the first in the order of `claim_order`.

        ``address``: the node's address in the packet.  None for a forwarded packet; then the node's first address of
        family ``version`` identifies the interface.

        The interface is assumed to belong to the host endpoint that has the address, else to a host endpoint without
        any address.  If the node has no such host endpoint and no wildcard, any of its host endpoints is returned.
        """
        if address is None:
            own = self._node_addresses.get(node, ())
            address = next((one for one in own if one.version == version), None)
        candidates = self._host_endpoints.get(node, [])
        if address is None:
            return next(iter(candidates), None)
        named = [one for one in candidates if one.interface not in (None, WILDCARD)]
        places = [one.interface for one in named if address in one.addresses]
        places += [one.interface for one in named if not one.addresses]
        claims = [one for one in named if one.interface == places[0]] if places else []
        claims += [one for one in candidates if one.interface is None and address in one.addresses]
        claims += [one for one in candidates if one.interface == WILDCARD]
        return next(iter((*claims, *candidates)), None)

    def uplink_of(self, node: str, direction: Direction, wire: Packet, *, is_local: bool) -> Endpoint | None:
        """The host endpoint of the interface by which a packet enters (ingress) or leaves (egress) a node.

        ``wire``: the packet as it is on that interface.
        ``is_local``: whether a process of the node sends or receives the packet.
        """
        own = wire.destination if direction is Direction.INGRESS else wire.source
        return self.uplink(node, own if is_local else None, wire.source.version)

    def is_tunnelled(self, packet: Packet) -> bool:
        """Whether nodes decapsulate a packet from any sender, workloads included.

        Manifests do not state this, so the answer here is False.  A subclass may override the method.
        """
        del packet
        return False

    def is_excepted(self, node: str, packet: Packet, direction: Direction) -> bool:
        """Whether a failsafe port or a tunnel protects a packet to (ingress) or from (egress) a process of the host."""
        remote = packet.source if direction is Direction.INGRESS else packet.destination
        if remote in self._of_nodes and any(tunnel.carries(packet) for tunnel in self._settings.tunnels):
            return True
        return any(_is_covered(packet, one, remote) for one in self._settings.failsafes(node, direction))

    @property
    def workload_to_host(self) -> Action:
        """The action on packets from a workload to its own node: `PolicySettings.workload_to_host`."""
        return self._settings.workload_to_host


def _is_covered(packet: Packet, failsafe: Failsafe, remote: IPAddress) -> bool:
    return (failsafe.protocol, failsafe.port) == (packet.protocol, packet.destination_port) and (
        failsafe.net is None or remote in failsafe.net
    )


class _Planner:
    """Plans one journey.

    ``original``: the packet before destination translation.
    ``final``: the packet after destination translation.
    ``sent``: the packet as it leaves the sender's node.  That node translates every destination except addresses of
    other nodes.
    """

    def __init__(self, topology: Topology, flow: Flow) -> None:
        self.topology = topology
        self.original = flow.packet
        self.final = flow.packet
        self.is_translated = flow.dnat_to is not None
        if flow.dnat_to is not None:
            address, port = flow.dnat_to
            self.final = replace(flow.packet, destination=address, destination_port=port)
        self.source = flow.source or topology.locate(self.original.source)
        self.destination = flow.destination or topology.locate(self.final.destination)
        written = topology.locate(self.original.destination)
        self.translating_node = self._translating_node(written)
        is_sent_on = self.is_translated and written.kind is FlowEndKind.HOST and written.node != self.source.node
        self.sent = self.original if is_sent_on else self.final

    def _translating_node(self, written: FlowEnd) -> str | None:
        """The node that translates the destination; None if no node does.

        The node with the destination address translates it.  If no node has the address, the sender's node does, or the
        receiver's node if the sender is on no known node.
        ``written``: the owner of the destination address in the packet as sent, before translation.
        """
        if not self.is_translated:
            return None
        if written.kind is FlowEndKind.HOST:
            return written.node
        return self.source.node or self.destination.node

    def hops(self) -> Iterator[JourneyHop]:
        """The hops of the journey, in the order in which the packet passes them."""
        reason = self._whole()
        if reason is not None:
            yield JourneyHop(reason=reason)
            return
        yield from self._leave_workload()
        yield from self._cross_nodes()
        yield from self._enter_workload()

    def _whole(self) -> HopReason | None:
        """The reason that decides the whole flow without policy. None if policy is evaluated."""
        packet = self.original
        if is_link_message(packet):
            return HopReason.NEIGHBOUR_DISCOVERY
        if self.source.kind is FlowEndKind.WORKLOAD and is_forged(packet):
            return HopReason.FORGED
        asks = (packet.source_port, packet.destination_port, packet.destination)
        if (
            self.source.kind is FlowEndKind.WORKLOAD
            and packet.protocol == UDP
            and asks == _DHCP[packet.destination.version]
        ):
            return HopReason.DHCP
        if self._is_to_itself() and not self.is_translated:
            return HopReason.TO_ITSELF
        kinds = {self.source.kind, self.destination.kind}
        if kinds == {FlowEndKind.HOST} and self.source.node == self.destination.node:
            return HopReason.LOOPBACK
        if kinds == {FlowEndKind.OUTSIDE} and self.translating_node is None:
            return HopReason.NOT_OURS
        return None

    def _is_to_itself(self) -> bool:
        return self.source.kind is FlowEndKind.WORKLOAD and self.source.endpoint == self.destination.endpoint

    def _is_local(self) -> bool:
        """Whether both ends are on one node and the packet does not leave that node on its path."""
        if self._is_to_itself():
            return True
        return self.source.node is not None and self._nodes() == [self.source.node] == [self.destination.node]

    # --- the sender's own interface ---------------------------------------------------------------------------------------

    def _leave_workload(self) -> Iterator[JourneyHop]:
        source = self.source
        if source.kind is not FlowEndKind.WORKLOAD or source.endpoint is None:
            return
        if self.topology.is_tunnelled(self.sent):
            yield JourneyHop(reason=HopReason.TUNNELLED)
        yield _ask(source.endpoint, Direction.EGRESS, ((Stage.NORMAL, self.sent),))
        to_own_host = self._is_local() and self.destination.kind is FlowEndKind.HOST
        wildcard = self.topology.wildcard(source.node)
        action = self.topology.workload_to_host
        if wildcard is not None:
            # A packet that leaves the workload enters the host, so the host's policy for ingress applies.
            stages = [(Stage.PRE_DNAT, self.original)]
            if not to_own_host:
                stages.append((Stage.FORWARD, self.sent))
            elif action is Action.PASS:
                stages.append((Stage.NORMAL, self.final))
            yield _ask(wildcard.key, Direction.INGRESS, tuple(stages))
        if to_own_host and action is Action.DENY:
            yield JourneyHop(reason=HopReason.WORKLOAD_TO_HOST_DROPPED)
        elif to_own_host and action is not Action.PASS:
            yield JourneyHop(reason=HopReason.WORKLOAD_TO_HOST_ACCEPTED)
        elif to_own_host and wildcard is None:
            yield JourneyHop(reason=HopReason.NO_HOST_ENDPOINT)

    # --- the nodes' interfaces to each other and the world ------------------------------------------------------------------

    def _nodes(self) -> list[str]:
        """The nodes on the packet's path, in order."""
        nodes = [self.source.node, self.translating_node, self.destination.node]
        visited: list[str] = []
        for node in nodes:
            if node is not None and visited[-1:] != [node]:
                visited.append(node)
        return visited

    def _cross_nodes(self) -> Iterator[JourneyHop]:
        nodes = self._nodes()
        translated = False
        for position, node in enumerate(nodes):
            starts = position == 0 and self.source.node is not None
            ends = position == len(nodes) - 1 and self.destination.node is not None
            if not starts:
                is_local = ends and self.destination.kind is FlowEndKind.HOST
                arriving = self.final if translated else self.original
                yield from self._interface(node, Direction.INGRESS, arriving, self.final, is_local=is_local)
            translated = translated or node == self.translating_node
            if not ends:
                is_local = starts and self.source.kind is FlowEndKind.HOST
                leaving = self.final if translated else self.original
                yield from self._interface(node, Direction.EGRESS, leaving, leaving, is_local=is_local)

    def _interface(
        self, node: str, direction: Direction, wire: Packet, final: Packet, *, is_local: bool
    ) -> Iterator[JourneyHop]:
        """The hop at a node's interface to the outside, if policy applies there.

        ``wire``: the packet on that interface.
        ``final``: the packet when it leaves the node, or when a process of the node gets it.
        ``is_local``: whether a process of the node sends or receives the packet.
        """
        host = self.topology.uplink_of(node, direction, wire, is_local=is_local)
        if host is None:
            if is_local:
                yield JourneyHop(direction=direction, reason=HopReason.NO_HOST_ENDPOINT)
            return
        if is_local and self.topology.is_excepted(node, final, direction):
            yield _ask(host.key, direction, ((Stage.NORMAL, final),))
            return
        stages = _stages(host, direction, wire, final, is_local=is_local)
        other = Direction.EGRESS if direction is Direction.INGRESS else Direction.INGRESS
        back = _reversed(wire)
        reply = _stages(host, other, back, back, is_local=is_local)
        hop = _ask(host.key, direction, stages)
        if stages[0][0] is Stage.UNTRACKED:
            hop = replace(hop, reply=_ask(host.key, other, reply).questions)
        yield hop

    # --- the receiver's own interface -----------------------------------------------------------------------------------------

    def _enter_workload(self) -> Iterator[JourneyHop]:
        destination = self.destination
        if destination.kind is not FlowEndKind.WORKLOAD or destination.endpoint is None:
            return
        if self._is_to_itself() and self.sent == self.final:
            yield JourneyHop(reason=HopReason.HAIRPIN)
            return
        if self.source.kind is FlowEndKind.HOST and self._is_local():
            yield JourneyHop(reason=HopReason.HOST_TO_LOCAL_WORKLOAD)
            return
        wildcard = self.topology.wildcard(destination.node)
        if wildcard is not None:
            yield _ask(wildcard.key, Direction.EGRESS, ((Stage.FORWARD, self.final),))
        yield _ask(destination.endpoint, Direction.INGRESS, ((Stage.NORMAL, self.final),))


def _stages(
    host: Endpoint, direction: Direction, wire: Packet, final: Packet, *, is_local: bool
) -> tuple[tuple[Stage, Packet], ...]:
    """The stages of a host endpoint's policy that a packet meets, each with the packet as that stage sees it.

    A wildcard host endpoint has no untracked policy.  Pre-DNAT policy applies to ingress only.
    """
    stages = []
    if host.interface != WILDCARD:
        stages.append((Stage.UNTRACKED, wire))
    if direction is Direction.INGRESS:
        stages.append((Stage.PRE_DNAT, wire))
    stages.append((Stage.NORMAL if is_local else Stage.FORWARD, final))
    return tuple(stages)


def _ask(endpoint: EndpointKey, direction: Direction, stages: tuple[tuple[Stage, Packet], ...]) -> JourneyHop:
    questions = tuple(Question(endpoint, direction, stage, packet) for stage, packet in stages)
    return JourneyHop(endpoint, direction, questions)


def _reversed(packet: Packet) -> Packet:
    """The first reply to ``packet``: source and destination are exchanged.

    An ICMP reply is assumed to have the request's type, because the verdict on a reply does not depend on its type.
    """
    return replace(
        packet,
        source=packet.destination,
        destination=packet.source,
        source_port=packet.destination_port,
        destination_port=packet.source_port,
    )
