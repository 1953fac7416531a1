# SPDX-License-Identifier: Apache-2.0
"""rtnetlink: interfaces, multicast groups, clsact filters; each call is a question of its own.

What changes all the time is followed by `netpol_loader.host.follow`.  Invariant: everything is about the network namespace the
calling thread is in (for the other ends of veth pairs there is `netpol_loader.host.peers`).  Must not know of programs' contents
or of policy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Union

from netpol_ebpf.errors import PlatformError
from netpol_loader.host import routes
from netpol_loader.host.rtnetlink import (
    CREATE,
    EXCLUSIVE,
    REPLACE,
    Rtnetlink,
    RtnetlinkError,
    attribute,
    attributes,
    nested,
)
from netpol_loader.kernel.hook import Hook

IPAddress = Union[IPv4Address, IPv6Address]
IPNetwork = Union[IPv4Network, IPv6Network]

CLSACT_PARENTS: Mapping[Hook, int] = {Hook.TC_INGRESS: 0xFFFF_FFF2, Hook.TC_EGRESS: 0xFFFF_FFF3}
FILTER_PRIORITY = 1
"""First of all: a filter of others that ends the chain must not come before policy."""
FILTER_HANDLE = 0x4E50
"""Ours among filters of the same priority; arbitrary ("NP")."""

# include/uapi/linux/rtnetlink.h, if_link.h, if_tunnel.h
NEW_LINK, DELETE_LINK, GET_LINK = 16, 17, 18
_NEW_QDISC, _DELETE_QDISC, _GET_QDISC = 36, 37, 38
_NEW_FILTER, _DELETE_FILTER, _GET_FILTER = 44, 45, 46
_LINK_HEADER = struct.Struct("=BBHiII")  # family, -, ARPHRD_*, index, flags, change mask
_IFNAME, _LINK, _MASTER, _LINKINFO, _EXT_MASK, _LINK_NETNSID, _XDP = 3, 5, 10, 18, 29, 37, 43
_XDP_ATTACHED, _XDP_NUMBERS = 2, (4, 5, 6, 7)
"""IFLA_XDP_ATTACHED; IFLA_XDP_PROG_ID, and those of the driver, of the stack (generic) and of the hardware."""
_INFO_KIND, _INFO_DATA = 1, 2
_VRF_TABLE = 1
_GRE_REMOTE, _GRE_COLLECT_METADATA = 7, 18
_SKIP_STATISTICS = attribute(_EXT_MASK, struct.pack("=I", 1 << 3))
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
# include/uapi/linux/pkt_sched.h, pkt_cls.h
_TC_HEADER = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID, _BPF_DIRECT_ACTION = 6, 7, 8, 11, 1
_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFF_FFF1, 0xFFFF_0000
_ALL_PROTOCOLS = 0x0003

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
TUNNEL_PORTS: Mapping[str, tuple[int, int]] = {
    "vxlan": (15, 8472),  # IFLA_VXLAN_PORT
    "geneve": (5, 6081),  # IFLA_GENEVE_PORT
    "bareudp": (1, 0),  # IFLA_BAREUDP_PORT
    "gtp": (0, 2152),
}
"""Kinds that unpack a port of UDP: the attribute that holds it (0: none does), and what it is without one."""

EXTERNAL: Mapping[str, int] = {
    "vxlan": 25, "geneve": 6, "ipip": 19, "ip6tnl": 19,
    "gre": 18, "gretap": 18, "ip6gre": 18, "ip6gretap": 18, "erspan": 18, "ip6erspan": 18,
}  # fmt: skip
"""Kinds that may keep the outer addresses of each packet, by the attribute that says so (IFLA_*_COLLECT_METADATA); bareudp always does."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. ``peer_ifindex``: the other end's number (of a veth pair, maybe in another namespace), 0: none.

    ``peer_nsid``: that namespace's number in this one, None when it is this one.  ``hardware``: ARPHRD_*, of include/uapi/
    linux/if_arp.h; NO_REMOTE of a GRE device without the one remote end.  ``table``: of a VRF.  ``takes``: encapsulation that
    it takes from anyone.  ``is_up``: it is switched on; ``is_running``: and so is what is at its other end.
    ``is_external``: it keeps the outer addresses of each packet (``external``, collect_md).
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


@dataclass(frozen=True, slots=True)
class ClsactFilter:
    """One of our filters. ``prog_id`` as written in its name."""

    hook: Hook
    prog_id: int


def _text(raw: bytes) -> str:
    """A name for people and JSON: the kernel takes any bytes."""
    return raw.split(b"\0")[0].decode(errors="backslashreplace")


def _number(raw: bytes | None) -> int:
    return 0 if raw is None else int(struct.unpack("=I", raw)[0])


# --- interfaces -----------------------------------------------------------------------------------------------------


def parse_link(payload: bytes) -> Link | None:
    """The interface of a message; None: it is of a family, and says what that knows of the interface.

    Raises struct.error and ValueError for what is no such message.
    """
    family, hardware_type, ifindex, flags = link_header(payload)
    if family != socket.AF_UNSPEC:
        return None
    if ifindex <= 0:
        raise ValueError(f"an interface with the number {ifindex}")
    found = attributes(payload, _LINK_HEADER.size)
    info = attributes(found.get(_LINKINFO, b""))
    kind = _text(info.get(_INFO_KIND, b""))
    data = info.get(_INFO_DATA, b"")
    nsid = found.get(_LINK_NETNSID)
    return Link(
        ifindex=ifindex,
        name=_text(found.get(_IFNAME, b"")),
        kind=kind,
        is_up=bool(flags & _IFF_UP),
        is_running=bool(flags & _IFF_RUNNING),
        master=_number(found.get(_MASTER)),
        peer_ifindex=_number(found.get(_LINK)),
        peer_nsid=None if nsid is None else struct.unpack("=i", nsid)[0],
        hardware=_hardware(hardware_type, data),
        table=_number(attributes(data).get(_VRF_TABLE)) if kind == "vrf" else 0,
        takes=_takes(kind, data),
        is_external=_is_external(kind, data),
    )


def link_header(payload: bytes) -> tuple[int, int, int, int]:
    """Family, ARPHRD_*, number and flags of the interface of a message."""
    family, _, hardware_type, ifindex, flags, _ = _LINK_HEADER.unpack_from(payload)
    return family, hardware_type, ifindex, flags


def _hardware(hardware: int, data: bytes) -> int:
    """A GRE device that has no remote end puts its outer header before packets that go out by it."""
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
    """Of some kinds the attribute is a flag, of some a number that may be 0."""
    if kind not in EXTERNAL:
        return kind == "bareudp"
    raw = attributes(data).get(EXTERNAL[kind])
    return raw is not None and (not raw or any(raw))


def dump_links(channel: Rtnetlink) -> list[Link]:
    """All interfaces of the socket's namespace."""
    found = map(parse_link, channel.dump(GET_LINK, _LINK_HEADER.pack(0, 0, 0, 0, 0, 0) + _SKIP_STATISTICS))
    return [link for link in found if link is not None]


def xdp_programs() -> dict[int, tuple[int, ...]]:
    """Numbers of the XDP programs on interfaces that have any, in whatever mode and however attached.

    Asked, not followed: a program that comes by a BPF link is not told of.
    """
    found = {}
    with Rtnetlink() as channel:
        for one in channel.dump(GET_LINK, _LINK_HEADER.pack(0, 0, 0, 0, 0, 0) + _SKIP_STATISTICS):
            xdp = attributes(attributes(one, _LINK_HEADER.size).get(_XDP, b""))
            if any(xdp.get(_XDP_ATTACHED, b"")):
                numbers = {_number(xdp[kind]) for kind in _XDP_NUMBERS if kind in xdp}
                found[link_header(one)[2]] = tuple(sorted(numbers))
    return found


def ask_link(channel: Rtnetlink, name_or_ifindex: str | int) -> Link | None:
    """One interface of the socket's namespace by name or number, or None."""
    number = name_or_ifindex if isinstance(name_or_ifindex, int) else 0
    body = _LINK_HEADER.pack(0, 0, 0, number, 0, 0) + _SKIP_STATISTICS
    if isinstance(name_or_ifindex, str):
        body += attribute(_IFNAME, name_or_ifindex.encode() + b"\0")
    try:
        ((_, _, payload),) = channel.ask(GET_LINK, body)
    except RtnetlinkError as error:
        if error.code in (errno.ENODEV, errno.EINVAL, errno.ERANGE):  # no such number; no name that one could have
            return None
        raise
    return parse_link(payload)


def links() -> list[Link]:
    """All interfaces."""
    with Rtnetlink() as channel:
        return dump_links(channel)


def link(name_or_ifindex: str | int) -> Link | None:
    """One interface by name or number, or None."""
    with Rtnetlink() as channel:
        return ask_link(channel, name_or_ifindex)


def interface_towards(address: IPAddress) -> int | None:
    """The number of the interface by which the node itself would send to an address, None where there is no way."""
    with Rtnetlink() as channel:
        try:
            ((_, _, payload),) = channel.ask(routes.GET_ROUTE, routes.question(address))
        except RtnetlinkError as error:
            if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAGAIN):
                return None  # no route, or one of a kind that leads nowhere
            raise
    return routes.interface_of(payload) or None


# --- multicast groups -----------------------------------------------------------------------------------------------

_GROUP4 = re.compile(rb"\t\t\t\t([0-9A-F]{8}) ")
_IGMP6_COLUMNS, _IGMP6_GROUP = 6, 2


def joined_groups() -> frozenset[IPAddress]:
    """The multicast groups that this namespace's interfaces have joined. Nothing announces a change of these."""
    groups: set[IPAddress] = set()
    with contextlib.suppress(FileNotFoundError):  # a kernel without that family
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


# --- clsact ---------------------------------------------------------------------------------------------------------


def add_clsact(ifindex: int) -> bool:
    """Give an interface the clsact discipline; False when it has one. Raises PlatformError, also where another is in its place.

    To the older *ingress* discipline the kernel would let filters of both hooks be added, and run all of them at ingress.
    """
    try:
        with Rtnetlink() as channel:
            channel.ask(_NEW_QDISC, _clsact(ifindex), CREATE | EXCLUSIVE)
    except RtnetlinkError as error:
        if error.code == errno.EEXIST and has_clsact(ifindex):
            return False
        if error.code == errno.EEXIST:
            raise PlatformError(
                f"interface {ifindex} has an ingress queueing discipline of somebody else, beside which there can be no clsact",
                hint="Exchange it for clsact, which has the same ingress hook, or use a kernel with tcx (6.6 and newer).",
            ) from error
        raise PlatformError(f"cannot add clsact to interface {ifindex}: {os.strerror(error.code)}") from error
    return True


def _clsact(ifindex: int) -> bytes:
    header = _TC_HEADER.pack(socket.AF_UNSPEC, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0)
    return header + attribute(_TCA_KIND, b"clsact\0")


def clsact_interfaces() -> set[int]:
    """The interfaces that have the discipline."""
    with Rtnetlink() as channel:
        found = channel.dump(_GET_QDISC, _TC_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    disciplines = ((_TC_HEADER.unpack_from(one)[1], attributes(one, _TC_HEADER.size)) for one in found)
    return {ifindex for ifindex, one in disciplines if _text(one.get(_TCA_KIND, b"")) == "clsact"}


def has_clsact(ifindex: int) -> bool:
    """Whether an interface exists and has the discipline."""
    try:
        with Rtnetlink() as channel:
            channel.ask(_GET_QDISC, _clsact(ifindex))
    except RtnetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT, errno.EINVAL):  # no interface; none; another in its place
            return False
        raise
    return True


def delete_clsact_if_unused(ifindex: int) -> None:
    """Remove the clsact discipline of an interface, unless somebody else's filters are on it."""
    with contextlib.suppress(RtnetlinkError), Rtnetlink() as channel:  # no interface, no discipline
        if not any(_filters(channel, ifindex, hook) for hook in CLSACT_PARENTS):
            channel.ask(_DELETE_QDISC, _clsact(ifindex))


def put_clsact_filter(ifindex: int, hook: Hook, prog_fd: int, prog_id: int) -> None:
    """Put a program on a hook, in the place of one that we put there before; in one step, no packet sees neither."""
    options = nested(
        _TCA_OPTIONS,
        attribute(_BPF_FD, struct.pack("=I", prog_fd)),
        attribute(_BPF_NAME, f"{hook.value}#{prog_id}\0".encode()),
        attribute(_BPF_FLAGS, struct.pack("=I", _BPF_DIRECT_ACTION)),
    )
    try:
        with Rtnetlink() as channel:
            channel.ask(_NEW_FILTER, _our_filter(ifindex, hook) + options, CREATE | REPLACE)
    except RtnetlinkError as error:
        raise PlatformError(
            f"cannot put {hook.value} on clsact of interface {ifindex}: {os.strerror(error.code)}"
        ) from error


def delete_clsact_filter(ifindex: int, hook: Hook) -> None:
    """Take our filter off a hook."""
    with Rtnetlink() as channel:
        channel.ask(_DELETE_FILTER, _our_filter(ifindex, hook))


def _our_filter(ifindex: int, hook: Hook) -> bytes:
    info = FILTER_PRIORITY << 16 | socket.htons(_ALL_PROTOCOLS)
    header = _TC_HEADER.pack(socket.AF_UNSPEC, ifindex, FILTER_HANDLE, CLSACT_PARENTS[hook], info)
    return header + attribute(_TCA_KIND, b"bpf\0")


def clsact_filters(ifindex: int) -> list[ClsactFilter]:
    """Filters on an interface that bear our programs' names; none when the interface has no clsact, or is gone."""
    found = []
    with Rtnetlink() as channel:
        for hook in CLSACT_PARENTS:
            for name in _filter_names(channel, ifindex, hook):
                ours, _, number = name.partition("#")
                if ours == hook.value and number.isdecimal():
                    found.append(ClsactFilter(hook, int(number)))
    return found


def foreign_filters(ifindex: int, hook: Hook) -> list[str]:
    """Filters of others on a hook of clsact, for people; none when the interface is gone."""
    with Rtnetlink() as channel:
        return [name for name in _filter_names(channel, ifindex, hook) if not is_our_filter(name, hook)]


def is_our_filter(name: str, hook: Hook) -> bool:
    """Whether a filter bears the name of a program of ours."""
    return name.startswith(f"{hook.value}#")


def filter_programs(ifindex: int, hook: Hook) -> list[tuple[str, int]]:
    """Name and program of the filters on a hook of clsact, in the order in which they run; 0: it is none of a BPF program.

    None when the interface is gone.
    """
    with Rtnetlink() as channel:
        try:
            filters = _filters(channel, ifindex, hook)
        except RtnetlinkError:  # ENODEV, or no such parent
            return []
    kept = [attributes(one[_TCA_OPTIONS]) for one in filters if one.get(_TCA_KIND) == b"bpf\0" and _TCA_OPTIONS in one]
    return [(_text(one.get(_BPF_NAME, b"")), _number(one.get(_BPF_ID))) for one in kept]


def _filter_names(channel: Rtnetlink, ifindex: int, hook: Hook) -> list[str]:
    """Names of the filters on a hook; of those without a name, and of other kinds than bpf, the kind."""
    try:
        filters = _filters(channel, ifindex, hook)
    except RtnetlinkError:  # ENODEV, or no such parent
        return []
    names = []
    for one in filters:
        kind = _text(one.get(_TCA_KIND, b""))
        if _TCA_OPTIONS in one:  # else it stands for the whole of its priority
            options = attributes(one[_TCA_OPTIONS]) if kind == "bpf" else {}
            names.append(_text(options.get(_BPF_NAME, b"")) or kind)
    return names


def _filters(channel: Rtnetlink, ifindex: int, hook: Hook) -> list[dict[int, bytes]]:
    body = _TC_HEADER.pack(socket.AF_UNSPEC, ifindex, 0, CLSACT_PARENTS[hook], 0)
    return [attributes(one, _TC_HEADER.size) for one in channel.dump(_GET_FILTER, body)]
