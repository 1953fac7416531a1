# SPDX-License-Identifier: Apache-2.0
"""The reference of everything after the parser: whose packet, fragments, connections, policy; what each packet becomes.

One dictionary of established connections, one of unreplied ones, one of first fragments, one function per step, so that it is
right at a glance.  Written from docs/SEMANTICS.md 5.1 to 5.6 and docs/packet-parsing.md.  Invariant: `Machine.step` is
the only thing that changes state.  Must not know of maps, hashes, time stamps or caches: which connections are timed
out is said from outside.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import link_messages
from endpoint import UNSPECIFIED4, Endpoint, Question, Way, is_for_many, is_link_local
from wire import (
    ACK,
    ANSWERS,
    ENCAPSULATION,
    FIN,
    ICMP,
    ICMPV6,
    RST,
    SYN,
    TCP,
    UDP,
    Facts,
    Kind,
    Place,
    icmp_kind,
    parse,
)


class State(enum.Enum):
    """Where a connection stands; each has a time-out of its own."""

    TCP_NEW = 0
    TCP_OPEN = 1
    TCP_CLOSING = 2
    TCP_RESET = 3
    UDP = 4
    ICMP = 5
    OTHER = 6


PASSES = frozenset(
    {"policy-allow", "established", "related", "host", "self", "arp", "neighbour", "dhcp", "host-non-ip"}
)
RULED = frozenset({"policy-allow", "established", "related", "host", "self", "policy-deny", "revoked"})
"""Reasons that are counted for a rule too (0: exempt)."""
NEW_FLOW = frozenset({"policy-allow", "host", "self"})


@dataclass(frozen=True)
class Stimulus:
    """A frame at one of the two hooks. ``entered``: where it entered the node, "host" when the node sent it itself.

    Where the interface has no link headers, the frame begins with the network header.
    """

    out_of_host: bool
    """At the TC egress hook: towards a workload."""
    entered: str
    frame: bytes


@dataclass(frozen=True)
class Outcome:
    """The result of a frame. ``event``: the reported facts, if any."""

    reason: str
    rule: int | None
    event: tuple[object, ...] | None

    @property
    def passed(self) -> bool:
        """Whether the frame goes on."""
        return self.reason in PASSES


Key = tuple[bytes, bytes, int, int, int]
"""Local address, remote address, protocol, local port, remote port."""


@dataclass
class Connection:
    """One that policy allowed."""

    rule: int
    way: Way
    generation: int
    state: State
    icmp: tuple[int, int]
    exempt: bool
    fin: set[bool] = field(default_factory=set)
    """Which sides have sent a FIN: the one that opened the connection (False), the other one (True)."""
    replied: bool = False

    @property
    def is_closed(self) -> bool:
        """Whether it seems over. Anybody who knows the tuple can have sent the RST or the FINs."""
        return self.state in (State.TCP_CLOSING, State.TCP_RESET)


@dataclass
class First:
    """The record of a first fragment that passed."""

    protocol: int
    ports: tuple[int, int]
    icmp: tuple[int, int]
    covered: int


class Machine:
    """One interface and all its connections."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.connections: dict[Key, Connection] = {}
        """With packets of both sides."""
        self.unreplied: dict[Key, Connection] = {}
        """Without an answer yet."""
        self.firsts: dict[tuple[object, ...], First] = {}
        self.generation = 1
        self.timed_out: frozenset[State] = frozenset()
        """Connections in these states are dead. A closed connection is dead when open ones are."""
        self.keep_revoked = False
        self.hairpin = False
        """Packets from outside may have the source of a workload of this node."""
        self.shortened: dict[tuple[object, ...], int] | None = None
        """Rules of packets that may take a fast path, which need not notice changes at once; None: there is none."""

    def renew(self) -> None:
        """Policy has changed: connections are judged again when a packet meets them."""
        self.generation += 1
        if self.shortened is not None:
            self.shortened = {}

    def step(self, stimulus: Stimulus) -> Outcome | None:
        """What becomes of the next frame; None where the fast path may know better than the tables: nothing changes."""
        reason, facts = parse(stimulus.frame, has_link=self.endpoint.has_link)
        way = Way.INGRESS if stimulus.out_of_host is not self.endpoint.is_host else Way.EGRESS
        return _Passage(self, stimulus, facts, way).outcome(reason)


class _Passage:
    """One frame's way through the machine."""

    def __init__(self, machine: Machine, stimulus: Stimulus, facts: Facts, way: Way) -> None:
        self.machine = machine
        self.stimulus = stimulus
        self.facts = facts
        self.way = way
        self.rule = 0
        self.is_reply = False
        self.untracked = False

    def outcome(self, parsed: str) -> Outcome | None:
        if not parsed and self._may_be_shortened():
            return None
        endpoint, out_of_host = self.machine.endpoint, self.stimulus.out_of_host
        if parsed == "arp":
            reason = link_messages.arp(self.facts, endpoint, out_of_host=out_of_host)
        elif parsed == "non-ip" and endpoint.is_host:
            reason = "host-non-ip"
        else:
            reason = parsed or self._before_connections() or self._ip()
        if reason == "established" and self.machine.shortened is not None and self._is_plain():
            self.machine.shortened[self._as_sent()] = self.rule
        event: tuple[object, ...] | None = None
        if reason not in PASSES or reason in NEW_FLOW:
            event = (reason, len(self.stimulus.frame)) if parsed else self._event(reason)
        return Outcome(reason, self.rule if reason in RULED else None, event)

    def _event(self, reason: str) -> tuple[object, ...]:
        facts = self.facts
        if facts.kind is Kind.ERROR:  # tells of the error or of the flow it is about; either is fine
            return (reason, self.rule if reason in RULED else 0, len(self.stimulus.frame))
        ends = [(facts.source, facts.source_port), (facts.destination, facts.destination_port)]
        way = self.way
        if self.is_reply:
            ends.reverse()
            way = Way(1 - way.value)
        return (
            reason, self.rule if reason in RULED else 0, len(self.stimulus.frame), way, facts.version, facts.protocol,
            ends[0], ends[1], facts.icmp_type, facts.icmp_code,
        )  # fmt: skip

    def _before_connections(self) -> str:
        """The reason for a link message, or for a message that this sender may not send; "": the packet goes on."""
        machine, out_of_host = self.machine, self.stimulus.out_of_host
        reason = link_messages.discovery(self.facts, machine.endpoint, out_of_host=out_of_host)
        if not reason and link_messages.is_forged(self.facts, machine.endpoint, out_of_host=out_of_host):
            reason = "link-forged"
        if not reason and not out_of_host and self._is_foreign():
            reason = "foreign-source"
        if not reason and not out_of_host and self._is_sent_by_another():
            reason = "tunnel-source"
        return reason

    def _ip(self) -> str:
        facts, machine = self.facts, self.machine
        if facts.place is Place.LATER and not self._recall():
            return "fragment"
        key = self._key()
        if self._passes_at_once(key):
            self.rule = machine.connections[key].rule
            return "established"
        may_ask = self.way is Way.EGRESS and not machine.endpoint.is_host and facts.is_dhcp_request
        if self._is_spoofed():
            has_none = facts.source == UNSPECIFIED4 or is_link_local(facts.source)
            return "dhcp" if may_ask and has_none else "spoofed"
        if self._is_misdelivered():
            return "misdelivered"
        if self._is_tunnelled():
            return "tunnel"
        if facts.kind is Kind.ERROR and facts.invoking is not None:
            return self._related()
        connection = self._find(key)
        if connection is None and may_ask:
            reason = "dhcp"
        else:
            reason = self._new(key) if connection is None else self._known(key, connection)
        if facts.place is Place.FIRST and reason in PASSES and facts.kind is not Kind.ERROR:
            machine.firsts[self._fragments()] = First(
                facts.protocol, (facts.source_port, facts.destination_port), (facts.icmp_type, facts.icmp_code),
                facts.covered,
            )  # fmt: skip
        return reason

    # --- the fast path

    def _as_sent(self) -> tuple[object, ...]:
        facts = self.facts
        return (
            self.stimulus.out_of_host, facts.source, facts.destination, facts.protocol, facts.source_port,
            facts.destination_port,
        )  # fmt: skip

    def _as_answered(self) -> tuple[object, ...]:
        facts = self.facts
        return (
            not self.stimulus.out_of_host, facts.destination, facts.source, facts.protocol, facts.destination_port,
            facts.source_port,
        )  # fmt: skip

    def _is_plain(self) -> bool:
        """Neither a fragment nor a packet that changes a TCP connection: those never take the fast path."""
        return self.facts.place is Place.WHOLE and not self.facts.tcp_flags & (SYN | FIN | RST)

    def _may_be_shortened(self) -> bool:
        """Whether a packet like this one passed as established under this generation and the tables say more today."""
        remembered = self.machine.shortened
        if not remembered or not self._is_plain():
            return False
        rule = remembered.get(self._as_sent())
        if rule is None:
            return False
        key = self._key()
        agrees = self._passes_at_once(key) and self.machine.connections[key].rule == rule
        return not agrees or bool(self._before_connections())

    # --- fragments

    def _fragments(self) -> tuple[object, ...]:
        """What all fragments of one packet have in common. In IPv6 a later one need not name the same protocol."""
        facts = self.facts
        return (
            facts.source, facts.destination, facts.identification, facts.protocol if facts.version == 4 else None,
        )  # fmt: skip

    def _recall(self) -> bool:
        """Give a later fragment its first one's ports. False: none that it could follow."""
        facts = self.facts
        first = self.machine.firsts.get(self._fragments())
        if first is None or facts.offset < first.covered:
            return False
        facts.protocol = first.protocol
        facts.source_port, facts.destination_port = first.ports
        facts.icmp_type, facts.icmp_code = first.icmp
        if facts.protocol == (ICMP if facts.version == 4 else ICMPV6):
            facts.kind = icmp_kind(facts.icmp_type, facts.version)
        return True

    # --- whose

    def _is_spoofed(self) -> bool:
        endpoint, source = self.machine.endpoint, self.facts.source
        if self.way is Way.INGRESS or endpoint.is_host or endpoint.may_send(source, self.facts.destination):
            return False
        self.untracked = endpoint.borrowed(source)
        return not self.untracked

    def _is_misdelivered(self) -> bool:
        """Whether a packet at a workload's interface is for somebody else, as the servers of its link.

        A bridge floods what it does not know.
        """
        endpoint = self.machine.endpoint
        if self.way is Way.EGRESS or endpoint.is_host or endpoint.routes:
            return False
        return self.facts.is_dhcp_request or not endpoint.may_receive(self.facts.destination)

    def _is_tunnelled(self) -> bool:
        """Whether a workload sends to a node what a tunnel device there would unpack."""
        facts, endpoint = self.facts, self.machine.endpoint
        if not link_messages.is_from_workload(endpoint, out_of_host=self.stimulus.out_of_host):
            return False
        if facts.protocol != UDP and facts.protocol not in ENCAPSULATION:
            return False
        port = facts.destination_port if facts.protocol == UDP else 0
        if (facts.protocol, port) not in endpoint.node.tunnels:
            return False
        return is_for_many(facts.destination) or endpoint.node.reaches_nodes(facts.destination)

    def _is_foreign(self) -> bool:
        """Whether a packet from outside has a source of this node. Link-local addresses are those of many nodes."""
        endpoint, source = self.machine.endpoint, self.facts.source
        return (
            endpoint.is_host and endpoint.is_outside and not self.machine.hairpin
            and (source in endpoint.node.workloads or (endpoint.node.is_own(source) and not is_link_local(source)))
        )  # fmt: skip

    def _is_sent_by_another(self) -> bool:
        """Whether a packet out of a tunnel has a source that is on another node, which did not send it."""
        endpoint = self.machine.endpoint
        return endpoint.is_external and not self.machine.hairpin and self.facts.source in endpoint.node.elsewhere

    # --- connections

    def _key(self) -> Key:
        facts = self.facts
        if self.way is Way.EGRESS:
            return facts.source, facts.destination, facts.protocol, facts.source_port, facts.destination_port
        return facts.destination, facts.source, facts.protocol, facts.destination_port, facts.source_port

    def _find(self, key: Key) -> Connection | None:
        """The connection that speaks for the packet. What may answer a SYN belongs to the unreplied one, if there is one."""
        tables = [self.machine.connections, self.machine.unreplied]
        if self.facts.tcp_flags & (SYN | RST):
            tables.reverse()
        for table in tables:
            one = table.get(key)
            if one is not None and self._is_alive(one) and self._covers(one):
                return one
        return None

    def _is_alive(self, connection: Connection) -> bool:
        """A closed connection lives as long as an open one: it may not be over after all."""
        state = State.TCP_OPEN if connection.is_closed else connection.state
        return state not in self.machine.timed_out

    def _passes_at_once(self, key: Key) -> bool:
        """Whether a packet is in the middle of an open connection, so that nothing else is checked."""
        facts = self.facts
        one = self.machine.connections.get(key)
        return (
            one is not None and self._is_plain() and facts.protocol not in (ICMP, ICMPV6) and not one.is_closed
            and self._is_alive(one) and one.generation == self.machine.generation
        )  # fmt: skip

    def _covers(self, connection: Connection) -> bool:
        """Whether the connection speaks for the packet: an initial SYN is always decided, ICMP types must fit."""
        facts = self.facts
        if facts.kind is Kind.QUERY:
            return (facts.icmp_type, facts.icmp_code) == connection.icmp
        if facts.kind is Kind.ERROR and facts.invoking is not None:
            return True
        if facts.kind is Kind.ANSWER:
            return facts.icmp_type == ANSWERS[facts.version].get(connection.icmp[0])
        if facts.protocol in (ICMP, ICMPV6):
            return False  # stands alone
        return not facts.is_initial_syn

    def _ask(self, way: Way, key: Key, icmp: tuple[int, int]) -> str:
        local, remote, protocol, local_port, remote_port = key
        endpoint = self.machine.endpoint
        if way is Way.EGRESS and remote in endpoint.addresses and not endpoint.is_host:
            self.rule = 0  # whoever sends *to* it with its own address from elsewhere is somebody else: policy decides
            return "self"
        ports = (local_port, remote_port) if way is Way.EGRESS else (remote_port, local_port)
        allowed, self.rule = endpoint.policy(Question(way, remote, protocol, *ports, icmp))
        return "policy-allow" if allowed else "policy-deny"

    def _still_allowed(self, key: Key, connection: Connection) -> bool:
        """Judge a connection of an earlier generation by its first packet; one that is not allowed stays, and cut."""
        self.is_reply = connection.way is not self.way
        if connection.generation != self.machine.generation and not connection.exempt:
            answer = self._ask(connection.way, key, connection.icmp)
            if answer in PASSES:
                connection.rule = self.rule
            elif not self.machine.keep_revoked:
                return False
        connection.generation = self.machine.generation
        self.rule = connection.rule
        return True

    def _related(self) -> str:
        """An ICMP error about a packet that went the other way, sent to whoever sent that packet."""
        assert self.facts.invoking is not None
        source, destination, protocol, source_port, destination_port = self.facts.invoking.tuple
        if source != self.facts.destination:
            return "icmp-unrelated"
        if self.way is Way.INGRESS:
            key = source, destination, protocol, source_port, destination_port
        else:
            key = destination, source, protocol, destination_port, source_port
        connection = self._find(key)
        if connection is None:
            return "icmp-unrelated"
        return "related" if self._still_allowed(key, connection) else "revoked"

    def _known(self, key: Key, connection: Connection) -> str:
        facts = self.facts
        if not self._still_allowed(key, connection):
            return "revoked"
        if facts.tcp_flags & RST:
            connection.state = State.TCP_RESET
            return "established"
        if self._revives(connection):
            connection.state = State.TCP_OPEN
            connection.fin.clear()
        if facts.tcp_flags & FIN:
            connection.fin.add(self.is_reply)
            if len(connection.fin) == 2:
                connection.state = State.TCP_CLOSING
        if self.is_reply and not connection.replied:
            connection.replied = True
            if connection.state is State.TCP_NEW:
                connection.state = State.TCP_OPEN
            self.machine.connections[key] = self.machine.unreplied.pop(key)
            if self.machine.shortened is not None:  # from now on, for packets of both directions
                self.machine.shortened |= {self._as_sent(): self.rule, self._as_answered(): self.rule}
        return "established"

    def _revives(self, connection: Connection) -> bool:
        """Whether data shows that a connection which seemed closed goes on. One that never was open stays closed."""
        goes_on = self.facts.payload_bytes > 0 and not self.facts.tcp_flags & (SYN | FIN | RST)
        return connection.is_closed and connection.replied and goes_on

    def _new(self, key: Key) -> str:
        facts, endpoint = self.facts, self.machine.endpoint
        if self.stimulus.out_of_host and not endpoint.is_host and self.stimulus.entered != "elsewhere":
            reason = self.stimulus.entered  # "host" or "self"
        else:
            reason = self._ask(self.way, key, (facts.icmp_type, facts.icmp_code))
        if reason in PASSES and self._opens(reason):
            if not facts.is_initial_syn:  # that does not look for an older one
                self.machine.connections.pop(key, None)
            self.machine.unreplied[key] = Connection(
                self.rule, self.way, self.machine.generation, _first_state(facts.protocol),
                (facts.icmp_type, facts.icmp_code), exempt=reason != "policy-allow",
            )  # fmt: skip
        return reason

    def _opens(self, reason: str) -> bool:
        """Whether an allowed packet begins something.

        A SYN with ACK, an RST, ICMP other than queries, and packets from borrowed addresses open nothing.  Nor does a
        packet from a listening process of the node in the middle of a TCP connection: the workload may have opened it.
        """
        facts = self.facts
        if self.untracked or facts.tcp_flags & RST or facts.tcp_flags & (SYN | ACK) == SYN | ACK:
            return False
        if facts.protocol in (ICMP, ICMPV6):
            return facts.kind is Kind.QUERY
        is_middle = facts.protocol == TCP and not facts.tcp_flags & SYN
        return not (reason == "host" and is_middle and facts.source_port in self.machine.endpoint.node.listening)


def _first_state(protocol: int) -> State:
    return {TCP: State.TCP_NEW, UDP: State.UDP, ICMP: State.ICMP, ICMPV6: State.ICMP}.get(protocol, State.OTHER)
