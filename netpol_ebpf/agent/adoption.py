# SPDX-License-Identifier: Apache-2.0
"""Connections that are older than enforcement: policy judges each of them in the direction in which it was opened.

If the connection tables have no entry for a connection, the program treats its next packet as the first packet of a new
flow: policy would judge a reply as a request.  So before an interface gets the programs for the first time, the agent
writes the node's connections into the tables, with a generation that is never in force.  At the next packet of such a connection, policy
judges the connection's first packet: an allowed connection goes on, any other is cut.

The agent reads the kernel's connection tracking and, for untracked TCP, sockets; a workload's sockets are evidence of
its own connections only.  Invariants: only connections that policy allows to be opened continue, except if a workload's
own sockets misrepresent who opened a connection; an entry that a program made is not replaced, unless the program
mistook a reply for a request.  A failure to read is a warning and stops nothing.

ICMP is left out: a query ends within seconds.
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
"""Generation of old connections that the agent writes.

The configuration never has this generation, so policy judges the connection at its next packet.
"""
SHARE = 2
"""Old connections fill at most 1/SHARE of a connection table; arbitrary."""


@dataclass(frozen=True, slots=True)
class LiveConnections:
    """The connections that the node's kernel reports.

    ``now_jiffies``: the time of the reading; ``unknown``: reasons why some could not be read, as text.
    """

    tracked: Collection[Tracked] = ()
    opened: Collection[Opened] = ()
    now_jiffies: int = 0
    unknown: Collection[str] = ()


class ConnectionAccess(Protocol):
    """Access to the node's connections and to the connection tables of the program."""

    @property
    def maps(self) -> Mapping[str, KernelMap]: ...  # noqa: D102 - see `KernelNode`

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        """Read the connections of this node, and those of sockets in the network namespaces with these ids."""


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """The node's own addresses, and the services for which policy evaluates the backend where packets leave."""

    addresses: Collection[IPAddress]
    services: Collection[VipKey] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload that may have old connections.

    ``namespace``: number of the network namespace at the other end of its interface, None: unknown.
    """

    number: int
    addresses: Collection[IPAddress]
    namespace: int | None = None


@dataclass(frozen=True, slots=True)
class OldConnection:
    """An old connection, as one workload sees it.

    ``ends``: source and destination of its first packet; ``direction``: the direction of that packet.
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
        """Key of the connection in the connection tables."""
        seen = self.ends if self.direction == abi.NP_DIRECTION_EGRESS else self.ends.reversed()
        kind = abi.np_conn4_key if self.version == 4 else abi.np_conn6_key  # noqa: PLR2004 - the IP version
        key = kind(
            endpoint=self.number, local_port=seen.source_port, remote_port=seen.destination_port, protocol=self.protocol
        )
        key.local[:] = list(seen.source.packed)
        key.remote[:] = list(seen.destination.packed)
        return bytes(key)

    def row(self, now_jiffies: int) -> bytes:
        """Row of the connection in the connection tables."""
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
    """Writes old connections for interfaces that had no programs when the agent started.

    It writes twice.  The first time is before the programs are attached, so that no packet of an old connection meets
    an empty table.  The second time is when rows and programs are in force: for connections opened in between, and for
    connections to services, which are written only then.
    """

    interfaces: set[int] = field(default_factory=set)
    warnings: dict[str, Problem] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)

    @property
    def concerned(self) -> set[int]:
        """Interfaces whose old connections are not all written yet."""
        return self.interfaces | self._begun

    def expect(self, interfaces: Iterable[int]) -> None:
        """Add interfaces that may have connections from before the agent's start; the agent then searches for them."""
        self.interfaces |= set(interfaces)

    def forget(self, interfaces: Iterable[int]) -> None:
        """Forget interfaces that are gone."""
        self.interfaces -= set(interfaces)
        self._begun -= set(interfaces)

    def go_ahead(self, node: ConnectionAccess, workloads: Mapping[int, Workload], place: NodeAddresses) -> None:
        """Write old connections before the workloads have both their rows and the programs.

        ``workloads``: by interface; only those in `concerned` count.
        """
        begun = {ifindex: one for ifindex, one in workloads.items() if ifindex in self.interfaces}
        if begun:
            self.interfaces -= begun.keys()
            self._begun |= begun.keys()
            self._adopt(node, begun, place, with_services=False)

    def go_behind(self, node: ConnectionAccess, workloads: Mapping[int, Workload], place: NodeAddresses) -> None:
        """Write old connections again when rows and programs are in force."""
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
        """Write rows that the tables lack or have wrong; returns the number of rows written. ``wanted``: by key."""
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
    """The connections as these workloads see them, most certain evidence first.

    An end is omitted if the only evidence is a socket of another workload.
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
    """Flags (enum np_conn_flag) of a workload's connection.

    NP_CONN_DEFERRED and NP_CONN_TAGGED if the destination is a service; otherwise 0.
    """
    keys = [VipKey(ends.destination, protocol, ends.destination_port)]
    if ends.destination in place.addresses:
        keys.append(VipKey(None, protocol, ends.destination_port))
    is_service = any(key in place.services for key in keys)
    return abi.NP_CONN_DEFERRED | abi.NP_CONN_TAGGED if is_service else 0


def _place_of(maps: Mapping[str, KernelMap], key: bytes, one: OldConnection) -> str | None:
    """Name of the table in which a connection's row must be written; None: the row exists already."""
    for table in (f"np_conn{one.version}", f"np_unreplied{one.version}"):  # the order in which the program asks
        value = maps[table].get(key)
        if value is not None:
            present = abi.np_conn.from_buffer_copy(value)
            is_same = present.direction == one.direction and not (present.flags ^ one.flags) & abi.NP_CONN_DEFERRED
            return None if is_same else table
    return f"np_conn{one.version}" if one.is_replied else f"np_unreplied{one.version}"


def look_at_connections(namespaces: Collection[int]) -> LiveConnections:
    """Read the connections that the kernel reports.

    Unreadable sockets are not reported if the kernel tracks connections.
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
