# SPDX-License-Identifier: Apache-2.0
"""Adoption of connections that are older than enforcement, so that policy evaluates them in the right direction.

If the connection tables have no entry for a connection, the program treats its next packet as the first packet of a new
flow: policy would judge a reply as if it were a request. So before an interface gets the programs for the first time,
the agent writes the node's connections into the tables, with a generation that is never in force. At the next packet of
such a connection, policy judges the tuple of the connection's first packet. If policy allows that packet, the
connection goes on; otherwise the program drops its packets.

The agent reads the kernel's connection tracking and, for TCP without connection tracking, sockets. A workload's sockets
are evidence only of that workload's own connections.

Invariants: a connection continues only if policy allows its first packet. The exception is a connection for which a
workload's own sockets misrepresent which end opened it. The agent replaces an entry of the program only if the program
took a reply for a request. If the agent cannot read connection tracking or sockets, it reports a warning and adopts the
other connections. ICMP is left out, because an echo request and its replies end within seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.errors import Location, MapFullError, PlatformError, Problem
from netpol_ebpf.policy.types import ICMP, ICMPV6, TCP, UDP, IPAddress, VipKey
from netpol_loader import abi
from netpol_loader.host.conntrack import Ends, Tracked, tracked
from netpol_loader.host.sockets import Opened, look_for_sockets
from netpol_loader.kernel.clock import read_jiffies

log = logging.getLogger(__name__)

NO_GENERATION = 0
"""The generation of the connections that the agent writes.

It is never the generation in force, so policy judges such a connection at its next packet."""
SHARE = 2
"""Adopted connections fill at most one part in SHARE of a connection table. The number is arbitrary."""


@dataclass(frozen=True, slots=True)
class LiveConnections:
    """The connections that the node's kernel reports.

    ``tracked``: the connections from connection tracking. ``opened``: the connections from sockets. ``now_jiffies``:
    the time of the read. ``unknown``: for sources that could not be read, the reasons as texts.
    """

    tracked: Collection[Tracked] = ()
    opened: Collection[Opened] = ()
    now_jiffies: int = 0
    unknown: Collection[str] = ()


class ConnectionAccess(Protocol):
    """Access to the node's connections and to the program's connection tables."""

    @property
    def maps(self) -> Mapping[str, KernelMap]: ...  # noqa: D102 - see `KernelNode`

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        """Read the connections of this node, from connection tracking and from sockets.

        ``namespaces``: ids of the network namespaces whose sockets must be read.
        """


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """The node's addresses and services: they show which connections are the node's own, and which are to services.

    ``addresses``: the node's own. ``services``: those whose packets get a deferred verdict.
    """

    addresses: Collection[IPAddress]
    services: Collection[VipKey] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload that may have old connections: connections that are older than enforcement.

    ``number``: the number of its endpoint. ``namespace``: the id of the network namespace at the other end of its
    interface; None: unknown.
    """

    number: int
    addresses: Collection[IPAddress]
    namespace: int | None = None


@dataclass(frozen=True, slots=True)
class OldConnection:
    """A connection that is older than enforcement, as one of its workloads sees it.

    ``number``: the number of the workload's endpoint. ``ends``: source and destination of the connection's first
    packet. ``direction``: the direction of that packet. ``flags``: enum np_conn_flag.
    """

    number: int
    protocol: int
    ends: Ends
    direction: int
    is_replied: bool
    flags: int = 0

    @property
    def version(self) -> int:
        """IP version of the connection: 4 or 6."""
        return self.ends.source.version

    def key(self) -> bytes:
        """The connection's key in the connection tables."""
        seen = self.ends if self.direction == abi.NP_DIRECTION_EGRESS else self.ends.reversed()
        kind = abi.np_conn4_key if self.version == 4 else abi.np_conn6_key  # noqa: PLR2004 - the IP version
        key = kind(
            endpoint=self.number, local_port=seen.source_port, remote_port=seen.destination_port, protocol=self.protocol
        )
        key.local[:] = list(seen.source.packed)
        key.remote[:] = list(seen.destination.packed)
        return bytes(key)

    def row(self, now_jiffies: int) -> bytes:
        """The connection's row in the connection tables. ``now_jiffies``: when the connection was read."""
        if self.protocol == TCP:
            state = abi.NP_CONN_TCP_OPEN if self.is_replied else abi.NP_CONN_TCP_NEW
        else:
            state = abi.NP_CONN_UDP if self.protocol == UDP else abi.NP_CONN_OTHER
        return bytes(
            abi.np_conn(
                seen_jiffies=now_jiffies,
                generation=NO_GENERATION,
                direction=self.direction,
                state=state,
                flags=self.flags,
            )
        )


@dataclass(slots=True)
class Adoption:
    """Writes the connections that are older than enforcement into the connection tables.

    It does so for interfaces that had no programs when the agent started, twice for each. The first time is before the
    programs are attached, so that no packet of an old connection finds an empty table. The second time is when rows and
    programs are in force; it adds connections that were opened in between, and connections to services.
    """

    interfaces: set[int] = field(default_factory=set)
    warnings: dict[str, Problem] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)

    @property
    def concerned(self) -> set[int]:
        """The interfaces whose old connections must still be written, for the first or for the second time."""
        return self.interfaces | self._begun

    def expect(self, interfaces: Iterable[int]) -> None:
        """Add interfaces that may have connections from before the agent's start.

        These connections are then adopted.
        """
        self.interfaces |= set(interfaces)

    def forget(self, interfaces: Iterable[int]) -> None:
        """Remove interfaces that no longer exist."""
        self.interfaces -= set(interfaces)
        self._begun -= set(interfaces)

    def go_ahead(self, node: ConnectionAccess, workloads: Mapping[int, Workload], place: NodeAddresses) -> None:
        """Write old connections for the first time, before the workloads have both their rows and the programs.

        ``workloads``: by interface index; only those in `concerned` count. ``place``: the node's addresses and
        services.
        """
        begun = {ifindex: one for ifindex, one in workloads.items() if ifindex in self.interfaces}
        if begun:
            self.interfaces -= begun.keys()
            self._begun |= begun.keys()
            self._adopt(node, begun, place, with_services=False)

    def go_behind(self, node: ConnectionAccess, workloads: Mapping[int, Workload], place: NodeAddresses) -> None:
        """Write old connections for the second time, when rows and programs are in force."""
        begun = {ifindex: one for ifindex, one in workloads.items() if ifindex in self._begun}
        if begun:
            self._begun -= begun.keys()
            self._adopt(node, begun, place, with_services=True)

    def _adopt(
        self, node: ConnectionAccess, workloads: Mapping[int, Workload], place: NodeAddresses, *, with_services: bool
    ) -> None:
        namespaces = {one.namespace for one in workloads.values() if one.namespace is not None}
        live = node.live_connections(namespaces)
        for message in live.unknown:
            self._warn(f"some connections that are older than enforcement may be cut: {message}")
        found = {one.key(): one for one in reversed(list(old_connections(live, workloads.values(), place)))}
        wanted = {key: one for key, one in found.items() if with_services or not one.flags & abi.NP_CONN_DEFERRED}
        count = self._write(node.maps, wanted, live.now_jiffies)
        if count:
            log.info(
                "adopted %d ends of connections that are older than enforcement; policy evaluates each at its next packet",
                count,
            )

    def _write(self, maps: Mapping[str, KernelMap], wanted: Mapping[bytes, OldConnection], now_jiffies: int) -> int:
        """Write the rows that the tables lack, or have with a wrong direction. Returns the number of written rows.

        ``wanted``: the old connections by their keys.
        """
        rows: dict[str, list[tuple[bytes, bytes]]] = {}
        for key, one in wanted.items():
            place = _place_of(maps, key, one)
            if place is not None:
                rows.setdefault(place, []).append((key, one.row(now_jiffies)))
        written = 0
        for place, pairs in rows.items():
            chosen = pairs[: maps[place].max_entries // SHARE]
            written += len(chosen)
            if len(chosen) < len(pairs):
                self._warn(
                    f"{len(pairs) - len(chosen)} connections that are older than enforcement had no room, and may be cut"
                )
            try:
                maps[place].put_many(chosen)
            except MapFullError as error:
                self._warn(f"some connections that are older than enforcement may be cut: {error.message}")
        return written

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            log.warning("%s", message)
            self.warnings[message] = Problem(Location(""), "", message, severity="warning", slug="adoption")


def old_connections(
    live: LiveConnections, workloads: Iterable[Workload], place: NodeAddresses
) -> Iterator[OldConnection]:
    """The connections of these workloads, as each workload sees them.

    Connections that connection tracking reports come before those that only a socket shows. A workload's side of a
    connection is left out if the only evidence is a socket of another workload.
    """
    owners = {address: one for one in workloads for address in one.addresses}
    for one in live.tracked:
        if one.protocol in (ICMP, ICMPV6):
            continue
        ours = owners.get(one.original.source)
        theirs = owners.get(one.reply.source)
        if ours is not None:
            flags = _deferred(one.protocol, one.original, place)
            yield OldConnection(ours.number, one.protocol, one.original, abi.NP_DIRECTION_EGRESS, one.is_replied, flags)
        if theirs is not None:  # the other workload sees translated addresses
            is_exempt = one.original.source in place.addresses or ours is theirs
            flags = abi.NP_CONN_EXEMPT if is_exempt else 0
            ends = one.reply.reversed()
            yield OldConnection(theirs.number, one.protocol, ends, abi.NP_DIRECTION_INGRESS, one.is_replied, flags)
    for opened in live.opened:
        ends = opened.ends
        ours, theirs = owners.get(ends.source), owners.get(ends.destination)
        if ours is not None and opened.namespace in (None, ours.namespace):
            flags = _deferred(TCP, ends, place)
            yield OldConnection(ours.number, TCP, ends, abi.NP_DIRECTION_EGRESS, is_replied=True, flags=flags)
        if theirs is not None and opened.namespace in (None, theirs.namespace):
            flags = abi.NP_CONN_EXEMPT if ends.source in place.addresses or ours is theirs else 0
            yield OldConnection(theirs.number, TCP, ends, abi.NP_DIRECTION_INGRESS, is_replied=True, flags=flags)


def _deferred(protocol: int, ends: Ends, place: NodeAddresses) -> int:
    """The flags (enum np_conn_flag) of a connection that a workload opened.

    They are NP_CONN_DEFERRED and NP_CONN_TAGGED if the destination is a service; otherwise 0.
    """
    keys = [VipKey(ends.destination, protocol, ends.destination_port)]
    if ends.destination in place.addresses:
        keys.append(VipKey(None, protocol, ends.destination_port))
    is_service = any(key in place.services for key in keys)
    return abi.NP_CONN_DEFERRED | abi.NP_CONN_TAGGED if is_service else 0


def _place_of(maps: Mapping[str, KernelMap], key: bytes, one: OldConnection) -> str | None:
    """The name of the table in which a connection's row must be written.

    None if a table already has a row with the right direction and flags.
    """
    for table in (f"np_conn{one.version}", f"np_unreplied{one.version}"):  # the program's order of lookup
        value = maps[table].get(key)
        if value is not None:
            present = abi.np_conn.from_buffer_copy(value)
            is_same = present.direction == one.direction and not (present.flags ^ one.flags) & abi.NP_CONN_DEFERRED
            return None if is_same else table
    return f"np_conn{one.version}" if one.is_replied else f"np_unreplied{one.version}"


def look_at_connections(namespaces: Collection[int]) -> LiveConnections:
    """Read the connections that the kernel reports.

    The field ``unknown`` names unreadable sockets only if connection tracking has no connections.
    """
    unknown = []
    found: list[Tracked] = []
    try:
        found += tracked()
    except PlatformError as error:
        unknown.append(error.message)
    sockets = look_for_sockets(namespaces)
    if not found:
        unknown += sockets.unseen
    return LiveConnections(found, sockets.opened, read_jiffies(), unknown)
