# SPDX-License-Identifier: Apache-2.0
"""The routes that show which endpoint an interface leads to, and which addresses are the node's own.

`RouteTable` is a copy of the main table's routes and of the local routes of the node and its VRFs; it ignores all other
routes. The kernel's notifications keep the copy up to date, with two gaps. IPv4 routes vanish without a notification
when their interface is switched off or loses its last address; the caller, which sees the change of the interface, must
list its routes again. If one of several routes with the same metric is replaced, the notification does not say which
one; `RouteTable.apply` returns the interfaces whose routes must be listed again.

Invariant: the derived tables (`host_routes`, `subnets`, `uplinks`, `next_hops`, `local`) depend on the routes alone,
not on the order of their notifications. The module sends no request to the kernel.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import TypeVar

from netpol_loader.host.address import IPAddress, IPNetwork
from netpol_loader.host.netlink import REPLACE, attribute, attributes

K = TypeVar("K")
V = TypeVar("V")

# include/uapi/linux/rtnetlink.h
NEW_ROUTE, DELETE_ROUTE, GET_ROUTE = 24, 25, 26
_ROUTE_HEADER = struct.Struct("=BBBBBBBBI")  # family, prefix lengths, TOS, table, protocol, scope, type, flags
_NEXT_HOP = struct.Struct("=HBBi")  # length, flags, weight, interface
_DST, _SRC, _OIF, _GATEWAY, _PRIORITY, _PREFSRC = 1, 2, 4, 5, 6, 7
_MULTIPATH, _CACHEINFO, _TABLE, _STATISTICS, _VIA, _EXPIRES, _NH_ID = 9, 12, 15, 17, 18, 23, 30
_TOLD_APART = frozenset({
    _DST, _SRC, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _MULTIPATH, _CACHEINFO, _TABLE, _STATISTICS, _VIA, _EXPIRES,
})  # fmt: skip
"""Attributes that `Route.rest` leaves out: they are other fields of `Route`, or do not distinguish two routes."""
_CLONED = 0x200
_UNICAST, LOCAL, BROADCAST, ANYCAST = 1, 2, 3, 4
_OF_THE_NODE = frozenset({LOCAL, BROADCAST, ANYCAST})
TABLE_MAIN, TABLE_LOCAL = 254, 255
REDIRECT, KERNEL, ROUTER_ADVERTISEMENT = 1, 2, 9
"""Origins of routes (RTPROT_*)."""
ANNOUNCED = frozenset({REDIRECT, ROUTER_ADVERTISEMENT})
"""Origins of routes that came from router advertisements or redirects."""
BITS: Mapping[int, int] = {socket.AF_INET: 32, socket.AF_INET6: 128}
"""The length of an address in bits, by address family."""

Destination = tuple[int, bytes, int]
"""The destination of a route: family, packed address, and prefix length in bits."""
NextHop = tuple[int, bytes]
"""The next hop of a route: interface index, and packed gateway address.

An empty gateway means that the destination is directly connected.
"""


@dataclass(frozen=True, slots=True)
class Route:
    """A route.

    ``order``: (TOS, metric); the kernel prefers the route with the lower value. ``hops``: an IPv4 multipath route is
    one `Route` with all its next hops; an IPv6 one is a `Route` for each next hop, as in the kernel. ``source``: the
    preferred source address (RTA_PREFSRC), packed. ``rest``: other attributes, which only serve to distinguish routes
    of equal table and order. ``uses_object``: its next hop is a next hop object.
    """

    destination: Destination
    table: int
    order: tuple[int, int]
    kind: int
    protocol: int
    hops: tuple[NextHop, ...]
    source: bytes = b""
    rest: tuple[object, ...] = ()
    uses_object: bool = False

    @property
    def interfaces(self) -> set[int]:
        """Indices of the interfaces of its next hops."""
        return {ifindex for ifindex, _ in self.hops if ifindex}

    @property
    def place(self) -> tuple[int, tuple[int, int]]:
        """The table and the order. A route can replace another one to the same destination only if both are equal."""
        return self.table, self.order

    @property
    def is_indirect(self) -> bool:
        """Whether a next hop is a router, or there are several next hops."""
        return len(self.hops) > 1 or self.has_gateway

    @property
    def has_gateway(self) -> bool:
        """Whether a next hop is a router."""
        return any(gateway for _, gateway in self.hops)


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """Addresses that the node accepts as its own: a route of type local, broadcast or anycast.

    ``address`` and ``bits``: the first address and the length of the prefix. ``is_many``: whether the type is
    broadcast. ``ifindex``: the interface that has the addresses.
    """

    address: IPAddress
    bits: int
    is_many: bool
    ifindex: int

    @property
    def is_single(self) -> bool:
        """Whether the route is for one address, and not for a prefix."""
        return self.bits == self.address.max_prefixlen

    @property
    def net(self) -> IPNetwork:
        """The prefix of the route."""
        return ip_network((self.address, self.bits))


def is_kernel_s_own(payload: bytes) -> bool:
    """Whether the kernel itself made the route of this message (RTPROT_KERNEL), as it does for each address."""
    return bool(_ROUTE_HEADER.unpack_from(payload)[5] == KERNEL)


def interface_of(payload: bytes) -> int:
    """The interface index of this message's route, if the route has a single next hop; 0: it has none or several."""
    raw = attributes(payload, _ROUTE_HEADER.size).get(_OIF)
    return 0 if raw is None else int(struct.unpack("=i", raw)[0])


def request(family: int, ifindex: int = 0) -> bytes:
    """The body of a dump request for a family's routes. ``ifindex``: only routes through this interface; 0: all."""
    body = _ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
    return body + struct.pack("=HHi", 8, _OIF, ifindex) if ifindex else body


def question(address: IPAddress) -> bytes:
    """The body of a request for the route to ``address``."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - the IP version
    return _ROUTE_HEADER.pack(family, BITS[family], 0, 0, 0, 0, 0, 0, 0) + attribute(_DST, address.packed)


def parse_routes(payload: bytes) -> list[Route]:
    """The routes in this message that `RouteTable` keeps. Empty if it keeps none of them.

    Raises struct.error and ValueError if the message is malformed.
    """
    family, bits, source_bits, tos, small_table, protocol, scope, kind, flags = _ROUTE_HEADER.unpack_from(payload)
    if family not in BITS or flags & _CLONED or (small_table != TABLE_MAIN and kind not in _OF_THE_NODE):
        return []
    found = attributes(payload, _ROUTE_HEADER.size)
    size = BITS[family] // 8
    metric = struct.unpack("=I", found[_PRIORITY])[0] if _PRIORITY in found else 0
    hops = tuple(_hops(found))
    table = struct.unpack("=I", found[_TABLE])[0] if _TABLE in found else small_table
    destination = (family, found.get(_DST, b"").ljust(size, b"\0"), bits)
    others = tuple((number, raw) for number, raw in sorted(found.items()) if number not in _TOLD_APART)

    def route(hops: tuple[NextHop, ...], source: bytes, rest: tuple[object, ...]) -> Route:
        return Route(destination, table, (tos, metric), kind, protocol, hops, source, rest, _NH_ID in found)

    if family == socket.AF_INET6:
        rest = (source_bits, found.get(_SRC, b""))
        return [route((hop,), b"", rest) for hop in hops] or [route((), b"", rest)]
    return [route(hops, found.get(_PREFSRC, b""), (scope, *others))]


def _hops(found: dict[int, bytes]) -> Iterator[NextHop]:
    if _MULTIPATH not in found:
        if _OIF in found or _GATEWAY in found or _VIA in found:
            yield _next_hop(struct.unpack("=i", found[_OIF])[0] if _OIF in found else 0, found)
        return
    raw, at = found[_MULTIPATH], 0
    while at + _NEXT_HOP.size <= len(raw):
        length, _, _, ifindex = _NEXT_HOP.unpack_from(raw, at)
        if length < _NEXT_HOP.size or at + length > len(raw):
            raise ValueError(f"a next hop of {length} bytes where {len(raw) - at} are left")
        yield _next_hop(ifindex, attributes(raw[at : at + length], _NEXT_HOP.size))
        at += (length + 3) & ~3


def _next_hop(ifindex: int, found: dict[int, bytes]) -> NextHop:
    return ifindex, found.get(_GATEWAY, b"") or found.get(_VIA, b"")


def _address(destination: Destination) -> IPAddress:
    family, packed, _ = destination
    return IPv4Address(packed) if family == socket.AF_INET else IPv6Address(packed)


class RouteTable:
    """A copy of the relevant routes, and tables derived from them. Each message updates both.

    Four tables come from the main table, without routes that router advertisements announced. ``host_routes``: the
    interface of each directly connected single address (/32, /128). ``subnets``: the interfaces of each directly
    connected prefix. ``uplinks``: the interfaces of default routes. ``next_hops``: for each interface, the number of
    destinations that it leads to by a router. A fifth table is ``local``: the destinations that the node accepts as its
    own. Callers must only read these tables. ``version`` changes whenever one of them may have changed.
    """

    def __init__(self) -> None:
        self.host_routes: dict[IPAddress, int] = {}
        self.subnets: dict[IPNetwork, frozenset[int]] = {}
        self.uplinks: frozenset[int] = frozenset()
        self.next_hops: Counter[int] = Counter()
        self.local: dict[Destination, LocalRoute] = {}
        self.version = 0
        self._routes: dict[Destination, list[Route]] = {}
        self._by_interface: dict[int, set[Destination]] = {}
        self._behind: dict[Destination, frozenset[int]] = {}  # interfaces that lead to the destination by a router
        self._local_tables = frozenset({TABLE_LOCAL})

    def uses_objects(self, ifindex: int = 0) -> bool:
        """Whether any route uses a next hop object.

        ``ifindex``: ask only for routes through this interface; 0: for all.
        """
        routes = self._leading_by(ifindex) if ifindex else (one for some in self._routes.values() for one in some)
        return any(route.uses_object for route in routes)

    # --- from messages ----------------------------------------------------------------------------------------------

    def apply(self, kind: int, flags: int, payload: bytes) -> set[int]:
        """Apply a notification. Returns the indices of the interfaces whose routes must be listed again."""
        routes = parse_routes(payload)
        if kind == DELETE_ROUTE:
            return self._delete(routes)
        if not routes:
            # A route that this table ignores may have replaced one of its routes.
            return self._in_the_place_of(payload) if flags & REPLACE else set()
        doubtful = self._make_room(routes) if flags & REPLACE else set()
        for route in routes:
            self._add(route)
        return doubtful

    def _delete(self, routes: Iterable[Route]) -> set[int]:
        doubtful = set()
        for route in routes:
            present = self._routes.get(route.destination, [])
            if route in present:
                self._remove(route)
            elif any(one.place == route.place for one in present):
                doubtful |= route.interfaces  # the route is gone already, or the message does not identify it
        return doubtful

    def _make_room(self, routes: list[Route]) -> set[int]:
        """Remove the known routes that ``routes`` replace.

        If the message does not say which routes these are, remove none, and return the interfaces whose routes must be
        listed again.
        """
        route = routes[0]
        replaced = [one for one in self._routes.get(route.destination, ()) if one.place == route.place]
        is_partial = route.destination[2] not in (
            0,
            BITS[route.destination[0]],
        )  # ignored routes may have the same destination and order
        are_hops_of_one = route.destination[0] == socket.AF_INET6 and all(
            one.has_gateway and one.protocol != ROUTER_ADVERTISEMENT for one in (*replaced, *routes)
        )
        if replaced and (is_partial or (len(replaced) > 1 and not are_hops_of_one)):
            return {ifindex for one in (*replaced, *routes) for ifindex in one.interfaces}
        for one in replaced:
            self._remove(one)
        return set()

    def _in_the_place_of(self, payload: bytes) -> set[int]:
        family, bits, _, _, _, _, _, _, _ = _ROUTE_HEADER.unpack_from(payload)
        if family not in BITS:
            return set()
        packed = attributes(payload, _ROUTE_HEADER.size).get(_DST, b"").ljust(BITS[family] // 8, b"\0")
        return {ifindex for one in self._routes.get((family, packed, bits), ()) for ifindex in one.interfaces}

    # --- from dumps -------------------------------------------------------------------------------------------------

    def replace_family(self, family: int, payloads: Iterable[bytes]) -> None:
        """Replace all routes of a family by the routes in a dump."""
        for route in [one for routes in self._routes.values() for one in routes if one.destination[0] == family]:
            self._remove(route)
        for payload in payloads:
            for route in parse_routes(payload):
                self._add(route)

    def replace_interface(self, family: int, ifindex: int, payloads: Iterable[bytes]) -> None:
        """Replace a family's routes through one interface by the routes in a dump."""
        listed = [route for payload in payloads for route in parse_routes(payload) if ifindex in route.interfaces]
        for route in self._leading_by(ifindex):
            if route.destination[0] == family and route not in listed:
                self._remove(route)
        for route in listed:
            self._add(route)

    def drop_interface(self, ifindex: int) -> None:
        """Remove all routes through an interface that is gone.

        An IPv4 multipath route is removed with all its next hops.
        """
        for route in self._leading_by(ifindex):
            self._remove(route)

    def interfaces_sending_from(self, source: bytes) -> set[int]:
        """The interfaces of the routes whose preferred source address is ``source`` (packed)."""
        found = (one for routes in self._routes.values() for one in routes if one.source == source)
        return {ifindex for one in found for ifindex in one.interfaces}

    def set_local_tables(self, tables: Collection[int]) -> None:
        """Set the tables that have local routes of the node, besides the table `local`: those of VRFs.

        Local routes of other tables do not count, because they are for chosen packets (``local 0.0.0.0/0`` of a
        transparent proxy).
        """
        wanted = frozenset({TABLE_LOCAL, *tables})
        if wanted != self._local_tables:
            self._local_tables = wanted
            for destination in list(self._routes):
                self._derive(destination)

    # --- the routes -------------------------------------------------------------------------------------------------

    def _leading_by(self, ifindex: int) -> list[Route]:
        places = self._by_interface.get(ifindex, ())
        return [one for place in places for one in self._routes[place] if ifindex in one.interfaces]

    def _add(self, route: Route) -> None:
        routes = self._routes.setdefault(route.destination, [])
        if route not in routes:
            routes.append(route)
            for ifindex in route.interfaces:
                self._by_interface.setdefault(ifindex, set()).add(route.destination)
            self._derive(route.destination)

    def _remove(self, route: Route) -> None:
        routes = self._routes[route.destination]
        routes.remove(route)
        left = {ifindex for one in routes for ifindex in one.interfaces}
        for ifindex in route.interfaces - left:
            places = self._by_interface[ifindex]
            places.discard(route.destination)
            if not places:
                del self._by_interface[ifindex]
        if not routes:
            del self._routes[route.destination]
        self._derive(route.destination)

    # --- what follows -----------------------------------------------------------------------------------------------

    def _derive(self, destination: Destination) -> None:
        """Derive again all table entries that depend on the routes to one destination."""
        family, _, bits = destination
        routes = self._routes.get(destination, ())
        local = _local(destination, [one for one in routes if one.table in self._local_tables])
        is_changed = _put(self.local, destination, local)
        main = [one for one in routes if one.table == TABLE_MAIN and one.kind == _UNICAST]
        stated = [one for one in main if one.protocol not in ANNOUNCED]
        if bits == 0:
            is_changed |= self._derive_uplinks()
        else:
            is_changed |= self._derive_next_hops(destination, stated)
            direct = [one for one in stated if not one.is_indirect]
            if bits == BITS[family]:
                is_changed |= _put(self.host_routes, _address(destination), _first(direct))
            else:
                is_changed |= self._derive_subnet(destination, direct)
        if is_changed:
            self.version += 1

    def _derive_uplinks(self) -> bool:
        found: set[int] = set()
        for family, size in BITS.items():
            for route in self._routes.get((family, bytes(size // 8), 0), ()):
                if route.table == TABLE_MAIN and route.kind == _UNICAST and route.protocol not in ANNOUNCED:
                    found |= route.interfaces
        before, self.uplinks = self.uplinks, frozenset(found)
        return self.uplinks != before

    def _derive_next_hops(self, destination: Destination, routes: Iterable[Route]) -> bool:
        found = frozenset(ifindex for one in routes if one.is_indirect for ifindex in one.interfaces)
        before = self._behind.get(destination, frozenset())
        if not _put(self._behind, destination, found or None):
            return False
        known = self.next_hops.keys() - ()
        self.next_hops.update(found)
        self.next_hops.subtract(before)
        for ifindex in before - found:
            if not self.next_hops[ifindex]:
                del self.next_hops[ifindex]
        return self.next_hops.keys() != known

    def _derive_subnet(self, destination: Destination, routes: Iterable[Route]) -> bool:
        found = frozenset(ifindex for one in routes for ifindex in one.interfaces)
        net = ip_network((_address(destination), destination[2]))
        return not (net.is_link_local or net.is_multicast) and _put(self.subnets, net, found or None)


def _first(routes: Collection[Route]) -> int | None:
    """The interface of the most preferred of these direct routes. None if several interfaces are equally preferred."""
    first = min((one.order for one in routes), default=None)
    found = {ifindex for one in routes if one.order == first for ifindex in one.interfaces}
    return found.pop() if len(found) == 1 else None


def _local(destination: Destination, routes: Iterable[Route]) -> LocalRoute | None:
    """The local route to a destination. None if there is none.

    If several interfaces have such a route, the one of the interface with the lowest index counts, because that
    interface is the oldest. A broadcast route counts only if there is no other kind.
    """
    found = [(one.kind == BROADCAST, min(one.interfaces, default=0)) for one in routes if one.kind in _OF_THE_NODE]
    if not found:
        return None
    is_many, ifindex = min(found)
    return LocalRoute(_address(destination), destination[2], is_many, ifindex)


def _put(table: dict[K, V], key: K, value: V | None) -> bool:
    """Set an entry, or delete the entry if ``value`` is None. Returns whether the table changed."""
    if table.get(key) == value:
        return False
    if value is None:
        del table[key]
    else:
        table[key] = value
    return True
