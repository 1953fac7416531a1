# SPDX-License-Identifier: Apache-2.0
"""A copy of the interfaces, addresses and routes of a network namespace: dumped once, then updated by notifications.

A new pod causes about thirty notifications on a node with some hundred pods. A dump of all state after each of them
would be too slow. The follower dumps all state again only if notifications were lost or cannot be parsed
(`Follower.listed_again` counts these dumps).

The kernel sends no notification of some changes, or sends it before or after the change takes effect. In these cases
the follower dumps:

- Routes of an interface. IPv4 routes vanish without a notification when their interface is switched off, changes its
  VRF or loses its last address, and when their preferred source address is removed.  The notification of the
  interface's change comes before the routes vanish, and newer kernels answer a dump before the change has ended. So
  the follower dumps the interface's routes twice, at once and after SETTLE_S.
- Addresses of an interface. The notification of an IPv6 address comes only after duplicate address detection. The
  notification of the address's route comes earlier, so the follower then dumps the interface's addresses.
- The other end of a veth pair. When one end moves to or from another namespace, the kernel sends no notification about
  the other end. If an end moves from one pod to another, this namespace only gets a notification when the pair becomes
  operational, which is before any packet.
- All routes, when a next hop object changes, or an interface of a route that uses such an object. The sysctl
  net.ipv4.nexthop_compat_mode decides whether the kernel sends notifications of these routes. The kernel sends no
  notification of a next hop object that vanishes because its interface lost its carrier.

Two dumps of one interface are at least SETTLE_S apart, so a workload that switches its end of a pair on and off again
and again delays no other interface. The last dump is after the interface's last change.

Invariant: SETTLE_S after the last change the copy equals what a new follower would dump. The module must not know of
policy.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from netpol_ebpf.errors import PlatformError
from netpol_loader.host.address import IPAddress, IPNetwork
from netpol_loader.host.links import (
    DELETE_LINK,
    NEW_LINK,
    Link,
    link_header,
    parse_link,
    read_link,
    read_links,
)
from netpol_loader.host.netlink import ROUTE, NetlinkError, Notifications, RouteChannel, attributes, messages
from netpol_loader.host.routes import (
    BITS,
    DELETE_ROUTE,
    GET_ROUTE,
    NEW_ROUTE,
    LocalRoute,
    RouteTable,
    interface_of,
    is_kernel_s_own,
    request,
)

log = logging.getLogger(__name__)

# include/uapi/linux/rtnetlink.h, if_addr.h
_GROUPS = (1, 5, 7, 9, 11, 32)
"""The multicast groups RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE and _NEXTHOP."""
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_NEW_NEXT_HOP, _DELETE_NEXT_HOP = 104, 105
_ADDRESS_HEADER = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_UNIVERSE, _PERMANENT = 0, 0x80  # RT_SCOPE_UNIVERSE, IFA_F_PERMANENT

SETTLE_S = 0.2
"""Time after a notified change at which the routes that vanish with the change are gone.

The kernel removes them at once, so the value is arbitrary.
"""
DATAGRAMS_A_LOOK = 20_000
"""How many datagrams one `poll` reads at most, so that the call ends even if the node changes constantly.

The value is arbitrary.
"""
DOUBTS = 200
"""If at most so many interfaces need a dump of routes, each gets one of its own; otherwise all routes are dumped.

The value is arbitrary.
"""


@dataclass(frozen=True, slots=True)
class LinkChange:
    """An interface that appeared, changed, or vanished. ``is_gone``: it vanished."""

    link: Link
    is_gone: bool


@dataclass(frozen=True, slots=True)
class _Address:
    """An address on an interface. ``is_shared``: see `Follower.shared`."""

    address: IPAddress
    ifindex: int
    is_shared: bool


@dataclass(slots=True)
class _Doubts:
    """The dumps that are needed after the queued notifications are read.

    ``routes``, ``addresses``: indices of the interfaces whose routes or addresses must be dumped. ``links``: indices of
    the interfaces that must be dumped themselves. ``all_routes``: the reason to dump all routes; "": there is none.
    """

    routes: set[int] = field(default_factory=set)
    addresses: set[int] = field(default_factory=set)
    links: set[int] = field(default_factory=set)
    all_routes: str = ""


class Follower:
    """A copy of the state of the network namespace in which the follower was created. Any thread may use the copy.

    `poll` updates the copy. The class is a context manager. ``links``: interfaces by index. ``listed_again``: numbers
    of dumps of all state or of all routes, by the reason for the dump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: returns seconds, as `time.monotonic` does. Raises PlatformError."""
        self._clock = clock
        self._news = Notifications(ROUTE, _GROUPS)
        self._channel = RouteChannel()
        self._routes = RouteTable()
        self._by_key: dict[tuple[object, ...], _Address] = {}
        self._keys_of: dict[int, set[tuple[object, ...]]] = {}
        self._addresses: dict[IPAddress, int] | None = None
        self._shared: frozenset[int] = frozenset()
        self._version = 0
        self._doubts = _Doubts()
        self._again: dict[int, float] = {}
        self._quiet_s: dict[int, float] = {}  # no dump for an interface before this time
        self._objects_again_s = math.inf
        self._objects_quiet_s = -math.inf
        self._lost = ""
        self.links: dict[int, Link] = {}
        self.listed_again: Counter[str] = Counter()
        try:
            self._list_all()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the sockets. The copy is then no longer updated."""
        self._news.close()
        self._channel.close()

    def __enter__(self) -> Follower:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor for select, readable if notifications are queued."""
        return self._news.fileno()

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int]:
        """A value that changes whenever something in the copy may have changed."""
        return self._version, self._routes.version

    @property
    def addresses(self) -> Mapping[IPAddress, int]:
        """The interface of each address of this namespace.

        If several interfaces have the address, the one with the lowest index.
        """
        return self._derived()[0]

    @property
    def host_routes(self) -> Mapping[IPAddress, int]:
        """The interface of each directly connected single address (/32, /128).

        Like `subnets`, `uplinks` and `next_hops`, this comes from the main table, without routes that router
        advertisements announced.
        """
        return self._routes.host_routes

    @property
    def subnets(self) -> Mapping[IPNetwork, frozenset[int]]:
        """The interfaces of each directly connected prefix."""
        return self._routes.subnets

    @property
    def uplinks(self) -> frozenset[int]:
        """The interfaces of all default routes."""
        return self._routes.uplinks

    @property
    def next_hops(self) -> frozenset[int]:
        """The interfaces of all routes by a router, except default routes."""
        return frozenset(self._routes.next_hops)

    @property
    def shared(self) -> frozenset[int]:
        """The interfaces with a lasting address whose prefix may contain addresses of other hosts.

        Three kinds of addresses do not count: link-local ones; single ones (/32, /128), which container networks give
        to a pod's gateway; and IPv6 addresses that expire unless they are announced again.
        """
        return self._derived()[1]

    @property
    def local_routes(self) -> Iterable[LocalRoute]:
        """The local routes of the node and its VRFs: for own addresses and prefixes, broadcast, and anycast."""
        return self._routes.local.values()

    def _derived(self) -> tuple[dict[IPAddress, int], frozenset[int]]:
        if self._addresses is None:
            found: dict[IPAddress, int] = {}
            for one in self._by_key.values():
                found[one.address] = min(one.ifindex, found.get(one.address, one.ifindex))
            self._addresses = found
            self._shared = frozenset(one.ifindex for one in self._by_key.values() if one.is_shared)
        return self._addresses, self._shared

    # --- keeping in step --------------------------------------------------------------------------------------------

    def poll(self, *, is_brief: bool = False) -> list[LinkChange] | None:
        """Read queued notifications, then dump the state that they leave unknown. Returns the links' changes in order.

        Returns None if notifications were lost: then all state was dumped, and the single changes are unknown.
        ``is_brief``: leave the dumps of routes and addresses to the next call, so that a new interface does not wait
        for the dumps of other interfaces. Raises PlatformError if the kernel does not answer; then the copy stays as it
        is, and the next call tries again.
        """
        found: list[LinkChange] = []
        for _ in range(DATAGRAMS_A_LOOK):
            data = self._news.take()
            if data == b"":
                break
            if self._lost:
                continue
            try:
                if data is None:
                    self._lost = "messages were lost"
                else:
                    found += self._take(data)
            except (struct.error, ValueError) as error:
                self._lost = f"a message makes no sense: {error}"
        if self._lost:
            self._list_all(self._lost)
            return None
        found += self._ask_links()
        return found if is_brief else found + self._settle_doubts()

    def _take(self, data: bytes) -> list[LinkChange]:
        found: list[LinkChange] = []
        for kind, flags, payload in messages(data):
            if kind in (NEW_LINK, DELETE_LINK):
                news = self._take_link(payload, is_gone=kind == DELETE_LINK)
                found += [] if news is None else [news]
            elif kind in (_NEW_ADDRESS, _DELETE_ADDRESS):
                self._take_address(payload, is_gone=kind == _DELETE_ADDRESS)
            elif kind in (NEW_ROUTE, DELETE_ROUTE):
                self._doubts.routes |= self._routes.apply(kind, flags, payload)
                if kind == NEW_ROUTE and payload[0] == socket.AF_INET6 and is_kernel_s_own(payload):
                    self._doubts.addresses.add(interface_of(payload))
            elif kind in (_NEW_NEXT_HOP, _DELETE_NEXT_HOP) and self._routes.uses_objects():
                self._doubt_objects()
        return found

    def _take_link(self, payload: bytes, *, is_gone: bool) -> LinkChange | None:
        if (
            link_header(payload)[0] != socket.AF_UNSPEC
        ):  # about a bridge port: when the port is removed, its interface still exists
            return None
        link = parse_link(payload)
        if link is None:
            return None
        self._doubt_ends(link, is_gone=is_gone)
        if is_gone:
            self._drop_link(link.ifindex)
            return LinkChange(link, is_gone=True)
        return LinkChange(link, is_gone=False) if self._put_link(link) else None

    def _put_link(self, link: Link) -> bool:
        """Update an interface in the copy. Returns whether the interface changed."""
        before = self.links.get(link.ifindex)
        if before == link:
            return False
        self.links[link.ifindex] = link
        self._version += 1
        if before is not None and (before.master != link.master or _is_less(before, link)):
            self._doubt_routes(link.ifindex)
        if link.table or (before is not None and before.table):
            self._name_tables()
        return True

    def _drop_link(self, ifindex: int) -> None:
        link = self.links.pop(ifindex, None)
        self._version += 1
        if self._routes.uses_objects(ifindex):
            self._doubt_objects()
        self._routes.drop_interface(ifindex)
        for key in self._keys_of.pop(ifindex, ()):
            del self._by_key[key]
            self._addresses = None
        self._again.pop(ifindex, None)
        if link is not None and link.table:
            self._name_tables()

    def _doubt_ends(self, link: Link, *, is_gone: bool) -> None:
        """Mark the other end of a veth pair for a dump, after ``link`` (one end) appeared, changed or vanished."""
        other = self.links.get(link.peer_ifindex) if link.peer_nsid is None and link.peer_ifindex else None
        if other is None:
            return
        is_known = (other.peer_nsid, other.peer_ifindex) == (None, link.ifindex)
        if is_gone == is_known and other.kind == link.kind == "veth":
            self._doubts.links.add(other.ifindex)
            self._again[other.ifindex] = self._clock() + SETTLE_S

    def _name_tables(self) -> None:
        self._routes.set_local_tables({one.table for one in self.links.values() if one.table})

    def _take_address(self, payload: bytes, *, is_gone: bool) -> None:
        key, one = _parse_address(payload)
        if one is None:
            return
        if not is_gone:
            self._put_address(key, one)
            return
        if self._by_key.pop(key, None) is not None:
            self._keys_of[one.ifindex].discard(key)
            self._note_addresses()
        if one.address.version == 4:  # noqa: PLR2004 - the IP version
            for ifindex in {one.ifindex, *self._routes.interfaces_sending_from(one.address.packed)}:
                self._doubt_routes(ifindex)

    def _doubt_routes(self, ifindex: int) -> None:
        self._doubts.routes.add(ifindex)
        self._again[ifindex] = self._clock() + SETTLE_S
        if self._routes.uses_objects(ifindex):
            self._doubt_objects()

    def _doubt_objects(self) -> None:
        self._doubts.all_routes = "a next hop object changed"
        self._objects_again_s = self._clock() + SETTLE_S

    def _put_address(self, key: tuple[object, ...], one: _Address) -> None:
        if self._by_key.get(key) != one:
            self._by_key[key] = one
            self._keys_of.setdefault(one.ifindex, set()).add(key)
            self._note_addresses()

    def _note_addresses(self) -> None:
        self._addresses = None
        self._version += 1

    # --- asking -----------------------------------------------------------------------------------------------------

    def _ask_links(self) -> list[LinkChange]:
        """Dump the interfaces that are marked for a dump. Returns those that changed."""
        doubted, self._doubts.links = self._doubts.links, set()
        found: list[LinkChange] = []
        try:
            for ifindex in doubted & self.links.keys():
                link = read_link(self._channel, ifindex)
                if link is not None and self._put_link(link):
                    found.append(LinkChange(link, is_gone=False))
        except (PlatformError, struct.error, ValueError) as error:
            self._lost = f"the kernel does not answer: {error}"
            raise
        return found

    def _settle_doubts(self) -> list[LinkChange]:
        """Make the dumps that were marked, and those that are due SETTLE_S after a change.

        Returns the changes of interfaces.
        """
        now_s = self._clock()
        doubts, self._doubts = self._doubts, _Doubts()
        self._put_off(doubts, now_s)
        due = {ifindex for ifindex, at_s in self._again.items() if at_s <= now_s}
        doubts.routes |= due
        if self._objects_again_s <= now_s:
            doubts.all_routes, self._objects_again_s = "a next hop object changed", math.inf
        self._quiet_s.update(dict.fromkeys(doubts.routes | doubts.addresses, now_s + SETTLE_S))
        if doubts.all_routes:
            self._objects_quiet_s = now_s + SETTLE_S
        try:
            if len(doubts.routes & self.links.keys()) > DOUBTS:
                doubts.all_routes = doubts.all_routes or "too many interfaces changed at a time"
            if doubts.all_routes:
                self._count(doubts.all_routes)
                self._list_routes()
                doubts.routes.clear()
            for ifindex in doubts.routes & self.links.keys():
                for family in BITS:
                    self._routes.replace_interface(family, ifindex, self._listed(GET_ROUTE, request(family, ifindex)))
            for ifindex in doubts.addresses & self.links.keys():
                self._list_addresses_of(ifindex)
        except (PlatformError, struct.error, ValueError) as error:
            self._lost = f"the kernel does not answer: {error}"
            raise
        for ifindex in due:
            self._again.pop(ifindex, None)
        self._doubts.links |= due
        return self._ask_links()

    def _put_off(self, doubts: _Doubts, now_s: float) -> None:
        """Postpone dumps for interfaces whose last dump is less than SETTLE_S ago.

        ``_again``: when the next dump of each interface is due.
        """
        self._quiet_s = {ifindex: at_s for ifindex, at_s in self._quiet_s.items() if at_s > now_s}
        self._doubts.addresses = doubts.addresses & self._quiet_s.keys()
        doubts.addresses -= self._doubts.addresses
        doubts.routes -= self._quiet_s.keys() & self._again.keys()
        if now_s < self._objects_quiet_s and self._objects_again_s < math.inf:
            doubts.all_routes = ""

    def _listed(self, kind: int, body: bytes) -> list[bytes]:
        """A dump about one interface. Empty if the interface is gone or does not have the address family."""
        try:
            return self._channel.dump(kind, body)
        except NetlinkError as error:
            if error.code in (errno.ENODEV, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
                return []
            raise

    def _list_addresses_of(self, ifindex: int) -> None:
        """Dump the IPv6 addresses of an interface."""
        body = _ADDRESS_HEADER.pack(socket.AF_INET6, 0, 0, 0, ifindex)
        listed = dict(_parse_address(one) for one in self._listed(_GET_ADDRESS, body))
        for key in [key for key in self._keys_of.get(ifindex, ()) if key[0] == socket.AF_INET6 and key not in listed]:
            del self._by_key[key]
            self._keys_of[ifindex].discard(key)
            self._note_addresses()
        for key, one in listed.items():
            if one is not None and one.ifindex == ifindex:
                self._put_address(key, one)

    def _list_all(self, reason: str = "") -> None:
        """Dump all links, addresses and routes. ``reason``: why they are dumped again; "": this is the first dump."""
        if reason:
            self._count(reason)
        self._doubts, self._again, self._objects_again_s = _Doubts(), {}, math.inf
        links = read_links(self._channel)
        self.links = {link.ifindex: link for link in links}
        self._by_key, self._keys_of = {}, {}
        for family in BITS:
            for payload in self._listed(_GET_ADDRESS, _ADDRESS_HEADER.pack(family, 0, 0, 0, 0)):
                key, one = _parse_address(payload)
                if one is not None:
                    self._put_address(key, one)
        self._note_addresses()
        self._name_tables()
        self._list_routes()
        self._lost = ""

    def _list_routes(self) -> None:
        for family in BITS:
            self._routes.replace_family(family, self._listed(GET_ROUTE, request(family)))

    def _count(self, reason: str) -> None:
        self.listed_again[reason.partition(":")[0]] += 1
        log.warning("listing interfaces and routes again: %s", reason)


def _is_less(before: Link, link: Link) -> bool:
    """Whether an interface changed from up or operational to down."""
    return (before.is_up and not link.is_up) or (before.is_running and not link.is_running)


def _parse_address(payload: bytes) -> tuple[tuple[object, ...], _Address | None]:
    """The key of an address in the copy, and the address.

    The address is None if the message has none, or is of another family.
    """
    family, bits, flags, scope, ifindex = _ADDRESS_HEADER.unpack_from(payload)
    if family not in BITS:
        return (), None
    found = attributes(payload, _ADDRESS_HEADER.size)
    remote = found.get(_IFA_ADDRESS, b"")
    raw = found.get(_IFA_LOCAL, remote)
    if not raw:
        return (), None
    address = IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
    # An interface has an IPv6 address at most once, with one prefix length.
    rest = (remote, bits) if family == socket.AF_INET else ()
    is_lasting = family == socket.AF_INET or bool(flags & _PERMANENT)
    is_shared = scope == _UNIVERSE and bits < BITS[family] and is_lasting
    return (family, ifindex, raw, *rest), _Address(address, ifindex, is_shared)
