# SPDX-License-Identifier: Apache-2.0
"""rtnetlink: interfaces, addresses, routes, clsact filters, news about interfaces.

The one module that imports pyroute2.  Invariant: everything is about the network namespace the calling thread is in (for
the other ends of veth pairs there is `netpol_loader.peers`).  Must not know of programs' contents or of policy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Union

from netpol_ebpf.errors import PlatformError
from netpol_loader.hook import Hook

IPAddress = Union[IPv4Address, IPv6Address]
IPNetwork = Union[IPv4Network, IPv6Network]

CLSACT_PARENTS: Mapping[Hook, int] = {Hook.TC_INGRESS: 0xFFFF_FFF2, Hook.TC_EGRESS: 0xFFFF_FFF3}
FILTER_PRIORITY = 1
"""First of all: a filter of others that ends the chain must not come before policy."""
FILTER_HANDLE = 0x4E50
"""Ours among filters of the same priority; arbitrary ("NP")."""

RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE."""
IFLA_IFNAME, IFLA_LINK, IFLA_LINKINFO, IFLA_LINK_NETNSID = 3, 5, 18, 37
IFLA_INFO_KIND = 1
NETLINK_HEADER = struct.Struct("=IHHII")
LINK_HEADER = struct.Struct("=BBHiII")


ETHERNET, NO_REMOTE = 1, -1
GRE_HARDWARE = frozenset({778, 823})
"""ARPHRD_IPGRE and ARPHRD_IP6GRE."""

Encapsulation = tuple[int, int]
"""IP protocol and, of UDP, destination port; else 0."""
UDP, IP_IN_IP, IP6_IN_IP, GRE = 17, 4, 41, 47
TUNNELS: Mapping[str, tuple[int, ...]] = {
    "ipip": (IP_IN_IP,), "sit": (IP6_IN_IP, IP_IN_IP), "ip6tnl": (IP6_IN_IP, IP_IN_IP),
    "gre": (GRE,), "gretap": (GRE,), "ip6gre": (GRE,), "ip6gretap": (GRE,), "erspan": (GRE,), "ip6erspan": (GRE,),
}  # fmt: skip
"""Kinds of devices that unpack an IP protocol, whoever sent it."""
TUNNEL_PORTS: Mapping[str, tuple[str, int]] = {
    "vxlan": ("IFLA_VXLAN_PORT", 8472),
    "geneve": ("IFLA_GENEVE_PORT", 6081),
    "bareudp": ("IFLA_BAREUDP_PORT", 0),
    "gtp": ("", 2152),
}
"""Kinds that unpack a port of UDP: the attribute that names it, and what it is without one."""

EXTERNAL: Mapping[str, str] = {
    "vxlan": "IFLA_VXLAN_COLLECT_METADATA", "geneve": "IFLA_GENEVE_COLLECT_METADATA", "ipip": "IFLA_IPIP_COLLECT_METADATA",
    "ip6tnl": "IFLA_IP6TNL_COLLECT_METADATA", "gre": "IFLA_GRE_COLLECT_METADATA", "gretap": "IFLA_GRE_COLLECT_METADATA",
}  # fmt: skip
"""Kinds that may keep the outer addresses of each packet, by the attribute that says so; bareudp always does.

GRE over IPv6 and ERSPAN may as well, but pyroute2 does not know their attribute: they count as devices that do not.
"""

TABLE_MAIN, TABLE_LOCAL = 254, 255
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. ``peer_ifindex``: the other end's number (of a veth pair, maybe in another namespace), 0: none.

    ``peer_nsid``: that namespace's number in this one, None when it is this one.  ``hardware``: ARPHRD_*, of include/uapi/
    linux/if_arp.h; NO_REMOTE of a GRE device without the one remote end.  ``table``: of a VRF.  ``takes``: encapsulation that
    it takes from anyone.  ``is_external``: it keeps the outer addresses of each packet (``external``, collect_md).
    """

    ifindex: int
    name: str
    kind: str
    is_up: bool
    mac: str
    master: int
    peer_ifindex: int
    peer_nsid: int | None
    hardware: int = ETHERNET
    table: int = 0
    takes: tuple[Encapsulation, ...] = ()
    is_external: bool = False


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """Addresses that the node takes for its own. ``is_many``: broadcast. ``ifindex``: of the interface that has them."""

    net: IPNetwork
    is_many: bool
    ifindex: int


@dataclass(frozen=True, slots=True)
class ClsactFilter:
    """One of our filters. ``prog_id`` as written in its name."""

    hook: Hook
    prog_id: int


@dataclass(frozen=True, slots=True)
class News:
    """Something changed. ``ifindex`` 0 for routes: look again.

    Of interfaces also, as in `Link`: ``link_kind``, ``peer_ifindex``, ``peer_nsid``, ``hardware``.
    """

    kind: str  # link, address, route
    is_gone: bool
    ifindex: int
    name: str
    link_kind: str = ""
    peer_ifindex: int = 0
    peer_nsid: int | None = None
    hardware: int = ETHERNET


@contextlib.contextmanager
def _route() -> Iterator[Any]:
    """An rtnetlink socket of the calling thread's namespace; its errors become PlatformErrors."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise _NetlinkError(error.code) from error


class _NetlinkError(PlatformError):
    """An answer of the kernel; ``code`` is its errno."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rtnetlink: {os.strerror(code)}")
        self.code = code


def _name(raw: str | bytes) -> str:
    """An interface's name for people and JSON: the kernel takes any bytes, pyroute2 gives those that are no UTF-8 as they are."""
    return raw if isinstance(raw, str) else raw.split(b"\0")[0].decode(errors="backslashreplace")


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    return Link(
        ifindex=message["index"],
        name=_name(message.get_attr("IFLA_IFNAME")),
        kind=kind,
        hardware=_hardware(message["ifi_type"], data),
        table=(data.get_attr("IFLA_VRF_TABLE") if kind == "vrf" and data else None) or 0,
        takes=_takes(kind, data),
        is_external=_is_external(kind, data),
        is_up=bool(message["flags"] & 1),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        master=message.get_attr("IFLA_MASTER") or 0,
        peer_ifindex=message.get_attr("IFLA_LINK") or 0,
        peer_nsid=message.get_attr("IFLA_LINK_NETNSID"),
    )


def _hardware(hardware: int, data: Any) -> int:
    """A GRE device that has no remote end puts its outer header before packets that go out by it."""
    if hardware not in GRE_HARDWARE or data is None or data.get_attr("IFLA_GRE_COLLECT_METADATA") is not None:
        return hardware
    remote = data.get_attr("IFLA_GRE_REMOTE") or data.get_attr("IFLA_IP6GRE_REMOTE") or "0.0.0.0"  # noqa: S104
    return NO_REMOTE if ip_address(remote).is_unspecified or ip_address(remote).is_multicast else hardware


def _takes(kind: str, data: Any) -> tuple[Encapsulation, ...]:
    if kind in TUNNEL_PORTS:
        attribute, usual = TUNNEL_PORTS[kind]
        port = data.get_attr(attribute) if data is not None and attribute else None
        return ((UDP, port or usual),)
    return tuple((protocol, 0) for protocol in TUNNELS.get(kind, ()))


def _is_external(kind: str, data: Any) -> bool:
    if kind in EXTERNAL and data is not None:
        return bool(data.get_attr(EXTERNAL[kind]))  # of some kinds a number that may be 0
    return kind == "bareudp"


def links() -> list[Link]:
    """All interfaces."""
    with _route() as route:
        return [_link(message) for message in route.get_links()]


def link(name_or_ifindex: str | int) -> Link | None:
    """One interface by name or number, or None."""
    return next((one for one in links() if name_or_ifindex in (one.name, one.ifindex)), None)


def addresses() -> dict[IPAddress, int]:
    """The addresses of this namespace and the interface each is on."""
    with _route() as route:
        return dict(_addresses(route))


def local_routes(tables: Collection[int] = ()) -> list[LocalRoute]:
    """What the node takes for its own: own addresses, prefixes, broadcast and anycast addresses of the table `local`.

    ``tables``: those of VRFs, whose local routes are there.  Other tables do not count: what stands there (a transparent
    proxy's ``local 0.0.0.0/0``) is for chosen packets.
    """
    found = []
    wanted = {TABLE_LOCAL, *tables}
    with _route() as route:
        for family, bits in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
            for message in route.get_routes(family=family):
                kind = message["type"]
                if kind not in (RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST):
                    continue
                if (message.get_attr("RTA_TABLE") or message["table"]) not in wanted:
                    continue
                destination = message.get_attr("RTA_DST") or ("0.0.0.0" if bits == 32 else "::")  # noqa: PLR2004, S104
                net = ip_network(f"{destination}/{message['dst_len']}")
                found.append(LocalRoute(net, kind == RTN_BROADCAST, message.get_attr("RTA_OIF") or 0))
    return found


def joined_groups() -> frozenset[IPAddress]:
    """The multicast groups that this namespace's interfaces have joined. Nothing announces a change of these."""
    groups: set[IPAddress] = set()
    with contextlib.suppress(FileNotFoundError):  # a kernel without that family
        for line in Path("/proc/thread-self/net/igmp").read_text().splitlines():
            if line.startswith("\t\t\t\t"):
                groups.add(IPv4Address(struct.pack("=I", int(line.split()[0], 16))))
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/thread-self/net/igmp6").read_text().splitlines():
            groups.add(IPv6Address(bytes.fromhex(line.split()[2])))
    return frozenset(groups)


def _addresses(route: Any) -> Iterator[tuple[IPAddress, int]]:
    for message in route.get_addr():
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if text:
            yield ip_address(text), message["index"]


def host_routes() -> dict[IPAddress, int]:
    """Directly connected single addresses (/32, /128) and their interface, of the main table; no gateway in between."""
    found: dict[IPAddress, int] = {}
    with _route() as route:
        for family, bits in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
            for message in route.get_routes(family=family):
                destination, interface = message.get_attr("RTA_DST"), message.get_attr("RTA_OIF")
                is_main = message["table"] == TABLE_MAIN and message["type"] == RTN_UNICAST
                is_direct = not message.get_attr("RTA_GATEWAY") and not message.get_attr("RTA_VIA")
                if message["dst_len"] == bits and destination and interface and is_main and is_direct:
                    found[ip_address(destination)] = interface
    return found


def node_interfaces() -> set[int]:
    """Interfaces of the node's own traffic: with a default route, or an address on a subnet that others share.

    Link-local addresses and single ones (/32, /128), which container networks give to a pod's gateway, do not count.
    """
    found: set[int] = set()
    with _route() as route:
        for message in route.get_addr():
            bits = 32 if message["family"] == socket.AF_INET else 128
            if message["scope"] == 0 and message["prefixlen"] < bits:  # RT_SCOPE_UNIVERSE
                found.add(message["index"])
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in route.get_routes(family=family):
                if message["dst_len"] == 0 and message["type"] == RTN_UNICAST:
                    hops = message.get_attr("RTA_MULTIPATH") or ()
                    found |= {message.get_attr("RTA_OIF"), *(hop["oif"] for hop in hops)} - {None}
    return found


# --- clsact ---------------------------------------------------------------------------------------------------------


def add_clsact(ifindex: int) -> bool:
    """Give an interface the clsact discipline; False when it has one. Raises PlatformError, also where another is in its place.

    To the older *ingress* discipline the kernel would let filters of both hooks be added, and run all of them at ingress.
    """
    try:
        with _route() as route:
            route.tc("add", "clsact", index=ifindex)
    except _NetlinkError as error:
        if error.code == errno.EEXIST and has_clsact(ifindex):
            return False
        if error.code == errno.EEXIST:
            raise PlatformError(
                f"interface {ifindex} has an ingress queueing discipline of somebody else, beside which there can be no clsact",
                hint="Exchange it for clsact, which has the same ingress hook, or use a kernel with tcx (6.6 and newer).",
            ) from error
        raise PlatformError(f"cannot add clsact to interface {ifindex}: {os.strerror(error.code)}") from error
    return True


def has_clsact(ifindex: int) -> bool:
    """Whether an interface exists and has the discipline."""
    try:
        with _route() as route:
            return any(message.get_attr("TCA_KIND") == "clsact" for message in route.get_qdiscs(index=ifindex))
    except _NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise


def delete_clsact_if_unused(ifindex: int) -> None:
    """Remove the clsact discipline of an interface, unless somebody else's filters are on it."""
    with contextlib.suppress(_NetlinkError), _route() as route:  # no interface, no discipline
        if any(list(route.get_filters(index=ifindex, parent=parent)) for parent in CLSACT_PARENTS.values()):
            return
        route.tc("del", "clsact", index=ifindex)


def put_clsact_filter(ifindex: int, hook: Hook, prog_fd: int, prog_id: int) -> None:
    """Put a program on a hook, in the place of one that we put there before; in one step, no packet sees neither."""
    try:
        with _route() as route:
            route.tc(
                "replace-filter", "bpf", index=ifindex, parent=CLSACT_PARENTS[hook], prio=FILTER_PRIORITY,
                handle=FILTER_HANDLE, fd=prog_fd, name=f"{hook.value}#{prog_id}", direct_action=True,
            )  # fmt: skip
    except _NetlinkError as error:
        raise PlatformError(
            f"cannot put {hook.value} on clsact of interface {ifindex}: {os.strerror(error.code)}"
        ) from error


def delete_clsact_filter(ifindex: int, hook: Hook) -> None:
    """Take our filter off a hook."""
    with _route() as route:
        route.tc(
            "del-filter", "bpf", index=ifindex, parent=CLSACT_PARENTS[hook], prio=FILTER_PRIORITY, handle=FILTER_HANDLE
        )


def clsact_filters(ifindex: int) -> list[ClsactFilter]:
    """Filters on an interface that bear our programs' names; none when the interface has no clsact, or is gone."""
    found = []
    for hook, parent in CLSACT_PARENTS.items():
        try:
            with _route() as route:
                messages = list(route.get_filters(index=ifindex, parent=parent))
        except _NetlinkError:  # ENODEV, or no such parent
            continue
        for message in messages:
            options = message.get_attr("TCA_OPTIONS")
            name, _, number = ((options.get_attr("TCA_BPF_NAME") if options else None) or "").partition("#")
            if name == hook.value and number.isdecimal():
                found.append(ClsactFilter(hook, int(number)))
    return found


def foreign_filters(ifindex: int, hook: Hook) -> list[str]:
    """Filters of others on a hook of clsact, for people; none when the interface is gone."""
    try:
        with _route() as route:
            messages = list(route.get_filters(index=ifindex, parent=CLSACT_PARENTS[hook]))
    except _NetlinkError:  # ENODEV, or no such parent
        return []
    found = []
    for message in messages:
        options = message.get_attr("TCA_OPTIONS")
        name = (options.get_attr("TCA_BPF_NAME") if hasattr(options, "get_attr") else None) or message.get_attr(
            "TCA_KIND"
        )
        if options is not None and not str(name).startswith(f"{hook.value}#"):
            found.append(str(name))
    return found


# --- news -----------------------------------------------------------------------------------------------------------


class Monitor:
    """News about interfaces, addresses and routes of this namespace, from the moment it is made.

    A plain netlink socket: it has to live in a select loop, and losing messages must be noticed.
    """

    KINDS: Mapping[int, tuple[str, bool]] = {
        RTM_NEWLINK: ("link", False), RTM_DELLINK: ("link", True),
        RTM_NEWADDR: ("address", False), RTM_DELADDR: ("address", True),
        RTM_NEWROUTE: ("route", False), RTM_DELROUTE: ("route", True),
    }  # fmt: skip

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, GROUPS))
        self._socket.settimeout(0)

    def fileno(self) -> int:
        """For select: readable when there is news."""
        return self._socket.fileno()

    def wait(self, timeout_s: float) -> list[News] | None:
        """News, waiting at most ``timeout_s`` for the first. None: some were lost, look at everything again."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return []
        news: list[News] = []
        while True:
            try:
                datagram = self._socket.recv(1 << 16)
            except BlockingIOError:
                return news
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return None
                raise
            news += self._parse(datagram)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def __enter__(self) -> Monitor:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parse(self, datagram: bytes) -> Iterator[News]:
        at = 0
        while at + NETLINK_HEADER.size <= len(datagram):
            length, kind, *_ = NETLINK_HEADER.unpack_from(datagram, at)
            if kind in self.KINDS:
                what, is_gone = self.KINDS[kind]
                yield self._news(what, is_gone, datagram[at + NETLINK_HEADER.size : at + length])
            at += max((length + 3) & ~3, NETLINK_HEADER.size)

    @staticmethod
    def _news(what: str, is_gone: bool, body: bytes) -> News:  # noqa: FBT001  # private
        if what == "route":
            return News(what, is_gone, ifindex=0, name="")
        if what == "address":
            return News(what, is_gone, struct.unpack_from("=I", body, 4)[0], "")
        family, _, hardware, ifindex, _, _ = LINK_HEADER.unpack_from(body)
        is_gone = is_gone and family != socket.AF_BRIDGE  # that one says that it left a bridge
        found = _attributes(body[LINK_HEADER.size :])
        nsid = found.get(IFLA_LINK_NETNSID)
        return News(
            what,
            is_gone,
            ifindex,
            name=_name(found.get(IFLA_IFNAME, b"")),
            link_kind=_name(_attributes(found.get(IFLA_LINKINFO, b"")).get(IFLA_INFO_KIND, b"")),
            peer_ifindex=struct.unpack("=I", found.get(IFLA_LINK, bytes(4)))[0],
            peer_nsid=None if nsid is None else struct.unpack("=i", nsid)[0],
            hardware=hardware,
        )


def _attributes(body: bytes) -> dict[int, bytes]:
    """Attributes by type."""
    found, at = {}, 0
    while at + 4 <= len(body):
        size, kind = struct.unpack_from("=HH", body, at)
        found[kind & 0x3FFF] = body[at + 4 : at + size]  # without NLA_F_NESTED, NLA_F_NET_BYTEORDER
        at += max((size + 3) & ~3, 4)
    return found
