# SPDX-License-Identifier: Apache-2.0
"""The reference for all steps after the parser: ownership, fragments, connections, policy, and the outcome.

There is one dictionary of established connections, one of unreplied ones, one of first fragments, and one function for
each step, so that the code is simple to check. Written from docs/SEMANTICS.md 5.1 to 5.6 and docs/packet-parsing.md.
Invariant: only `Machine.step` changes state. This module must not know maps, hashes, time stamps or caches: the caller
says which connections have expired.
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
    """The state of a connection. Each state has its own time-out."""

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
"""Reasons that are also counted for a rule (0: exempt)."""
NEW_FLOW = frozenset({"policy-allow", "host", "self"})


@dataclass(frozen=True)
class Stimulus:
    """A frame at one of the two hooks. ``entered``: where it entered the node; "host": the node itself sends it.

    If the interface has no link headers, the frame begins with the network header.
    """

    out_of_host: bool
    """The frame is at TC egress, towards a workload."""
    entered: str
    frame: bytes


@dataclass(frozen=True)
class Outcome:
    """The result of a frame. ``event``: the facts in its event, if there is one."""

    reason: str
    rule: int | None
    event: tuple[object, ...] | None

    @property
    def passed(self) -> bool:
        """Whether the frame passes."""
        return self.reason in PASSES


Key = tuple[bytes, bytes, int, int, int]
"""(local address, remote address, protocol, local port, remote port)."""


@dataclass
class Connection:
    """A connection that policy allowed."""

    rule: int
    way: Way
    generation: int
    state: State
    icmp: tuple[int, int]
    exempt: bool
    fin: set[bool] = field(default_factory=set)
    """The sides that have sent a FIN: the side that opened the connection (False), the other one (True)."""
    replied: bool = False

    @property
    def is_closed(self) -> bool:
        """Whether the connection seems closed. Any host that knows the tuple can have sent the RST or the FINs."""
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
        """Established connections: with packets of both sides."""
        self.unreplied: dict[Key, Connection] = {}
        """Unreplied connections."""
        self.firsts: dict[tuple[object, ...], First] = {}
        self.generation = 1
        self.timed_out: frozenset[State] = frozenset()
        """Connections in these states have expired. A closed connection expires together with open ones."""
        self.keep_revoked = False
        self.hairpin = False
        """Whether packets from outside may have the source of a workload of this node."""
        self.shortened: dict[tuple[object, ...], int] | None = None
        """The rules of packets that may take the fast path, which may notice a change late; None: there is no fast
        path."""

    def renew(self) -> None:
        """Policy has changed: each connection is judged again at its next packet."""
        self.generation += 1
        if self.shortened is not None:
            self.shortened = {}

    def step(self, stimulus: Stimulus) -> Outcome | None:
        """The outcome of the next frame. None if the fast path may decide by an older state; then nothing changes."""
        reason, facts = parse(stimulus.frame, has_link=self.endpoint.has_link)
        way = Way.INGRESS if stimulus.out_of_host is not self.endpoint.is_host else Way.EGRESS
        return _Passage(self, stimulus, facts, way).outcome(reason)


class _Passage:
    """The passage of one frame through the machine."""

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
        if facts.kind is Kind.ERROR:  # an event about the error or about its flow; either is correct
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
        """The reason of a link-local message, or of one that this sender may not send; "": the packet continues."""
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
        """Whether the packet is no fragment and changes no TCP connection. Other packets never take the fast path."""
        return self.facts.place is Place.WHOLE and not self.facts.tcp_flags & (SYN | FIN | RST)

    def _may_be_shortened(self) -> bool:
        """Whether such a packet passed as established under this generation, although the tables now say otherwise."""
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
        """The facts that all fragments of a packet share. In IPv6 a later fragment may name another protocol."""
        facts = self.facts
        return (
            facts.source, facts.destination, facts.identification, facts.protocol if facts.version == 4 else None,
        )  # fmt: skip

    def _recall(self) -> bool:
        """Give a later fragment the ports of its first fragment. Returns False if there is none before it."""
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
        """Whether a packet at a workload's interface is for another receiver, such as the servers of its link.

        A bridge floods packets to unknown destinations.
        """
        endpoint = self.machine.endpoint
        if self.way is Way.EGRESS or endpoint.is_host or endpoint.routes:
            return False
        return self.facts.is_dhcp_request or not endpoint.may_receive(self.facts.destination)

    def _is_tunnelled(self) -> bool:
        """Whether a workload sends a node a packet that a tunnel device of the node would decapsulate."""
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
        """Whether a packet from outside has a source of this node.

        Link-local addresses do not count: many nodes have them.
        """
        endpoint, source = self.machine.endpoint, self.facts.source
        return (
            endpoint.is_host and endpoint.is_outside and not self.machine.hairpin
            and (source in endpoint.node.workloads or (endpoint.node.is_own(source) and not is_link_local(source)))
        )  # fmt: skip

    def _is_sent_by_another(self) -> bool:
        """Whether a packet from a tunnel has a source on another node that did not send it."""
        endpoint = self.machine.endpoint
        return endpoint.is_external and not self.machine.hairpin and self.facts.source in endpoint.node.elsewhere

    # --- connections

    def _key(self) -> Key:
        facts = self.facts
        if self.way is Way.EGRESS:
            return facts.source, facts.destination, facts.protocol, facts.source_port, facts.destination_port
        return facts.destination, facts.source, facts.protocol, facts.destination_port, facts.source_port

    def _find(self, key: Key) -> Connection | None:
        """The connection of a packet.

        A packet that may answer a SYN belongs to the unreplied connection, if there is one.
        """
        tables = [self.machine.connections, self.machine.unreplied]
        if self.facts.tcp_flags & (SYN | RST):
            tables.reverse()
        for table in tables:
            one = table.get(key)
            if one is not None and self._is_alive(one) and self._covers(one):
                return one
        return None

    def _is_alive(self, connection: Connection) -> bool:
        """Whether a connection has not expired. A closed one lives as long as an open one, because it may continue."""
        state = State.TCP_OPEN if connection.is_closed else connection.state
        return state not in self.machine.timed_out

    def _passes_at_once(self, key: Key) -> bool:
        """Whether a packet is in the middle of an open connection, so that no further check is made."""
        facts = self.facts
        one = self.machine.connections.get(key)
        return (
            one is not None and self._is_plain() and facts.protocol not in (ICMP, ICMPV6) and not one.is_closed
            and self._is_alive(one) and one.generation == self.machine.generation
        )  # fmt: skip

    def _covers(self, connection: Connection) -> bool:
        """Whether the connection decides the packet. An initial SYN is always judged anew, and ICMP types must fit."""
        facts = self.facts
        if facts.kind is Kind.QUERY:
            return (facts.icmp_type, facts.icmp_code) == connection.icmp
        if facts.kind is Kind.ERROR and facts.invoking is not None:
            return True
        if facts.kind is Kind.ANSWER:
            return facts.icmp_type == ANSWERS[facts.version].get(connection.icmp[0])
        if facts.protocol in (ICMP, ICMPV6):
            return False  # belongs to no connection
        return not facts.is_initial_syn

    def _ask(self, way: Way, key: Key, icmp: tuple[int, int]) -> str:
        local, remote, protocol, local_port, remote_port = key
        endpoint = self.machine.endpoint
        if way is Way.EGRESS and remote in endpoint.addresses and not endpoint.is_host:
            self.rule = 0  # with its own address from elsewhere, the sender is another host, so policy decides
            return "self"
        ports = (local_port, remote_port) if way is Way.EGRESS else (remote_port, local_port)
        allowed, self.rule = endpoint.policy(Question(way, remote, protocol, *ports, icmp))
        return "policy-allow" if allowed else "policy-deny"

    def _still_allowed(self, key: Key, connection: Connection) -> bool:
        """Judge a connection of an earlier generation by its first packet.

        If it is denied, it stays in the table, and is cut.
        """
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
        """An ICMP error about a packet in the other direction, to the sender of that packet."""
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
            if self.machine.shortened is not None:  # from now on, in both directions
                self.machine.shortened |= {self._as_sent(): self.rule, self._as_answered(): self.rule}
        return "established"

    def _revives(self, connection: Connection) -> bool:
        """Whether data shows that a connection that seemed closed continues. One that never was open stays closed."""
        goes_on = self.facts.payload_bytes > 0 and not self.facts.tcp_flags & (SYN | FIN | RST)
        return connection.is_closed and connection.replied and goes_on

    def _new(self, key: Key) -> str:
        facts, endpoint = self.facts, self.machine.endpoint
        if self.stimulus.out_of_host and not endpoint.is_host and self.stimulus.entered != "elsewhere":
            reason = self.stimulus.entered  # "host" or "self"
        else:
            reason = self._ask(self.way, key, (facts.icmp_type, facts.icmp_code))
        if reason in PASSES and self._opens(reason):
            if not facts.is_initial_syn:  # an initial SYN does not look for an older connection
                self.machine.connections.pop(key, None)
            self.machine.unreplied[key] = Connection(
                self.rule, self.way, self.machine.generation, _first_state(facts.protocol),
                (facts.icmp_type, facts.icmp_code), exempt=reason != "policy-allow",
            )  # fmt: skip
        return reason

    def _opens(self, reason: str) -> bool:
        """Whether an allowed packet opens a connection.

        A SYN with ACK, an RST, ICMP other than queries, and packets from borrowed addresses open none. Nor does a
        packet of a listening process of the node in the middle of a TCP connection, because the workload may have
        opened it.
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
