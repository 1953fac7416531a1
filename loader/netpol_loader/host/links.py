# SPDX-License-Identifier: Apache-2.0
"""Interfaces, their XDP programs, and the multicast groups that interfaces have joined. Each call reads anew.

Another module, `netpol_loader.host.follow`, has a copy of the interfaces that notifications keep up to date.

Invariant: every call reads the network namespace of the calling thread (`netpol_loader.host.peers` reads the other ends
of veth pairs). The module must not know the contents of programs, or policy.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from netpol_loader.host import routes
from netpol_loader.host.address import IPAddress
from netpol_loader.host.netlink import (
    NetlinkError,
    RouteChannel,
    attribute,
    attributes,
    read_number,
    read_text,
)

# include/uapi/linux/rtnetlink.h, if_link.h, if_tunnel.h
NEW_LINK, DELETE_LINK, GET_LINK = 16, 17, 18
_LINK_HEADER = struct.Struct("=BBHiII")  # family, -, ARPHRD_*, index, flags, change mask
_IFNAME, _LINK, _MASTER, _LINKINFO, _EXT_MASK, _LINK_NETNSID, _XDP = 3, 5, 10, 18, 29, 37, 43
_XDP_ATTACHED, _XDP_NUMBERS = 2, (4, 5, 6, 7)
"""IFLA_XDP_ATTACHED; and IFLA_XDP_PROG_ID, IFLA_XDP_DRV_PROG_ID, IFLA_XDP_SKB_PROG_ID, IFLA_XDP_HW_PROG_ID."""
_INFO_KIND, _INFO_DATA = 1, 2
_VRF_TABLE = 1
_GRE_REMOTE, _GRE_COLLECT_METADATA = 7, 18
_SKIP_STATISTICS = attribute(_EXT_MASK, struct.pack("=I", 1 << 3))
_IFF_UP, _IFF_RUNNING = 0x1, 0x40

ETHERNET, NO_REMOTE = 1, -1
GRE_HARDWARE = frozenset({778, 823})
"""The hardware types ARPHRD_IPGRE and ARPHRD_IP6GRE."""

Encapsulation = tuple[int, int]
"""IP protocol, and destination port of UDP. The port is 0 for other protocols."""
UDP, IP_IN_IP, IP6_IN_IP, GRE = 17, 4, 41, 47
TUNNELS: Mapping[str, tuple[int, ...]] = {
    "ipip": (IP_IN_IP,), "sit": (IP6_IN_IP, IP_IN_IP), "ip6tnl": (IP6_IN_IP, IP_IN_IP),
    "gre": (GRE,), "gretap": (GRE,), "ip6gre": (GRE,), "ip6gretap": (GRE,), "erspan": (GRE,), "ip6erspan": (GRE,),
}  # fmt: skip
"""By kind of tunnel device: the IP protocols that such a device decapsulates from any outer source address."""
TUNNEL_PORTS: Mapping[str, tuple[int, int]] = {
    "vxlan": (15, 8472),  # IFLA_VXLAN_PORT
    "geneve": (5, 6081),  # IFLA_GENEVE_PORT
    "bareudp": (1, 0),  # IFLA_BAREUDP_PORT
    "gtp": (0, 2152),
}
"""By kind of tunnel device: the UDP port that such a device decapsulates from any outer source address.

Each value is the number of the netlink attribute with the port (0: none), and the default port.
"""

EXTERNAL: Mapping[str, int] = {
    "vxlan": 25, "geneve": 6, "ipip": 19, "ip6tnl": 19,
    "gre": 18, "gretap": 18, "ip6gre": 18, "ip6gretap": 18, "erspan": 18, "ip6erspan": 18,
}  # fmt: skip
"""By kind of device with a metadata mode (``external``): the number of the attribute IFLA_*_COLLECT_METADATA.

A bareudp device is always in that mode.
"""


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface.

    ``master``: index of the bridge, VRF or bond that the interface is part of; 0: none. ``peer_ifindex``: index of the
    other end of a veth pair, which may be in another namespace; 0: none. ``peer_nsid``: id of that namespace; None: the
    other end is in this namespace. ``hardware``: ARPHRD_* (include/uapi/linux/if_arp.h), or NO_REMOTE for a GRE device
    without a remote end. ``table``: routing table of a VRF device; 0 for other devices. ``takes``: encapsulations that
    the device decapsulates from any outer source address. ``is_up``: administratively up (IFF_UP); ``is_running``:
    operationally up (IFF_RUNNING). ``is_external``: a tunnel device in metadata mode (``external``, collect_md), which
    has outer addresses for each packet.
    """

    ifindex: int
    name: str
    kind: str
    is_up: bool
    is_running: bool
    master: int
    peer_ifindex: int
    peer_nsid: int | None
    hardware: int = ETHERNET
    table: int = 0
    takes: tuple[Encapsulation, ...] = ()
    is_external: bool = False


# --- interfaces -----------------------------------------------------------------------------------------------------


def parse_link(payload: bytes) -> Link | None:
    """Decode the interface of a link message. Returns None for a message about one family's settings of an interface.

    Bridge ports have such messages (family AF_BRIDGE). Raises struct.error and ValueError if the bytes are not a link
    message.
    """
    family, hardware_type, ifindex, flags = link_header(payload)
    if family != socket.AF_UNSPEC:
        return None
    if ifindex <= 0:
        raise ValueError(f"an interface with the number {ifindex}")
    found = attributes(payload, _LINK_HEADER.size)
    info = attributes(found.get(_LINKINFO, b""))
    kind = read_text(info.get(_INFO_KIND, b""))
    data = info.get(_INFO_DATA, b"")
    nsid = found.get(_LINK_NETNSID)
    return Link(
        ifindex=ifindex,
        name=read_text(found.get(_IFNAME, b"")),
        kind=kind,
        is_up=bool(flags & _IFF_UP),
        is_running=bool(flags & _IFF_RUNNING),
        master=read_number(found.get(_MASTER)),
        peer_ifindex=read_number(found.get(_LINK)),
        peer_nsid=None if nsid is None else struct.unpack("=i", nsid)[0],
        hardware=_hardware(hardware_type, data),
        table=read_number(attributes(data).get(_VRF_TABLE)) if kind == "vrf" else 0,
        takes=_takes(kind, data),
        is_external=_is_external(kind, data),
    )


def link_header(payload: bytes) -> tuple[int, int, int, int]:
    """The header of a link message, as (family, ARPHRD_*, index, flags)."""
    family, _, hardware_type, ifindex, flags, _ = _LINK_HEADER.unpack_from(payload)
    return family, hardware_type, ifindex, flags


def _hardware(hardware: int, data: bytes) -> int:
    """The hardware type ARPHRD_* of a device, or NO_REMOTE for a GRE device without a remote end.

    Packets of such a device begin with an outer header.
    """
    if hardware not in GRE_HARDWARE:
        return hardware
    found = attributes(data)
    if not found or _GRE_COLLECT_METADATA in found:
        return hardware
    raw = found.get(_GRE_REMOTE, bytes(4))
    remote = IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)  # noqa: PLR2004 - bytes of an IPv4 address
    return NO_REMOTE if remote.is_unspecified or remote.is_multicast else hardware


def _takes(kind: str, data: bytes) -> tuple[Encapsulation, ...]:
    if kind in TUNNEL_PORTS:
        number, usual = TUNNEL_PORTS[kind]
        raw = attributes(data).get(number) if number else None
        return ((UDP, (0 if raw is None else int.from_bytes(raw, "big")) or usual),)
    return tuple((protocol, 0) for protocol in TUNNELS.get(kind, ()))


def _is_external(kind: str, data: bytes) -> bool:
    """Whether a tunnel device is in metadata mode (``external``, collect_md).

    Depending on the kind of device, the netlink attribute is a flag (its presence means yes), or a number (0 means no).
    """
    if kind not in EXTERNAL:
        return kind == "bareudp"
    raw = attributes(data).get(EXTERNAL[kind])
    return raw is not None and (not raw or any(raw))


def read_links(channel: RouteChannel) -> list[Link]:
    """All interfaces of the channel's namespace."""
    found = map(parse_link, channel.dump(GET_LINK, _LINK_HEADER.pack(0, 0, 0, 0, 0, 0) + _SKIP_STATISTICS))
    return [link for link in found if link is not None]


def xdp_programs() -> dict[int, tuple[int, ...]]:
    """The ids of XDP programs by interface index, in every mode, and whichever way they were attached.

    Interfaces without programs are absent. The ids must be read on demand, because the kernel sends no notification
    when a BPF link attaches a program.
    """
    found = {}
    with RouteChannel() as channel:
        for one in channel.dump(GET_LINK, _LINK_HEADER.pack(0, 0, 0, 0, 0, 0) + _SKIP_STATISTICS):
            xdp = attributes(attributes(one, _LINK_HEADER.size).get(_XDP, b""))
            if any(xdp.get(_XDP_ATTACHED, b"")):
                numbers = {read_number(xdp[kind]) for kind in _XDP_NUMBERS if kind in xdp}
                found[link_header(one)[2]] = tuple(sorted(numbers))
    return found


def read_link(channel: RouteChannel, name_or_ifindex: str | int) -> Link | None:
    """One interface of the channel's namespace, by name or index. None if it does not exist."""
    number = name_or_ifindex if isinstance(name_or_ifindex, int) else 0
    body = _LINK_HEADER.pack(0, 0, 0, number, 0, 0) + _SKIP_STATISTICS
    if isinstance(name_or_ifindex, str):
        body += attribute(_IFNAME, name_or_ifindex.encode() + b"\0")
    try:
        ((_, _, payload),) = channel.ask(GET_LINK, body)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.EINVAL, errno.ERANGE):  # no such index; no valid name of an interface
            return None
        raise
    return parse_link(payload)


def list_links() -> list[Link]:
    """All interfaces of the calling thread's namespace."""
    with RouteChannel() as channel:
        return read_links(channel)


def find_link(name_or_ifindex: str | int) -> Link | None:
    """One interface of the calling thread's namespace, by name or index. None if it does not exist."""
    with RouteChannel() as channel:
        return read_link(channel, name_or_ifindex)


def interface_towards(address: IPAddress) -> int | None:
    """The index of the interface by which the node sends to ``address``. None if there is no route."""
    with RouteChannel() as channel:
        try:
            ((_, _, payload),) = channel.ask(routes.GET_ROUTE, routes.question(address))
        except NetlinkError as error:
            if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAGAIN):
                return None  # no route, or one of type unreachable, prohibit, blackhole or throw
            raise
    return routes.interface_of(payload) or None


# --- multicast groups -----------------------------------------------------------------------------------------------

_GROUP4 = re.compile(rb"\t\t\t\t([0-9A-F]{8}) ")
_IGMP6_COLUMNS, _IGMP6_GROUP = 6, 2


def joined_groups() -> frozenset[IPAddress]:
    """The multicast groups that interfaces of the calling thread's namespace have joined.

    The groups are read from /proc on demand, because the kernel sends no notification of changes.
    """
    groups: set[IPAddress] = set()
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv4 multicast
        raw = Path("/proc/thread-self/net/igmp").read_bytes()
        groups.update(map(_group4, set(_GROUP4.findall(raw))))
    with contextlib.suppress(FileNotFoundError):  # an interface's name has no white space
        columns = Path("/proc/thread-self/net/igmp6").read_bytes().split()
        groups.update(map(_group6, set(columns[_IGMP6_GROUP::_IGMP6_COLUMNS])))
    return frozenset(groups)


@lru_cache(maxsize=4096)
def _group4(text: bytes) -> IPv4Address:
    return IPv4Address(struct.pack("=I", int(text, 16)))


@lru_cache(maxsize=4096)
def _group6(text: bytes) -> IPv6Address:
    return IPv6Address(bytes.fromhex(text.decode()))
