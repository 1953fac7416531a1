# SPDX-License-Identifier: Apache-2.0
"""The clsact queueing discipline of an interface, and the filters on it.

On kernels without tcx, programs are attached as such filters.

Invariant: every call acts in the network namespace of the calling thread. The module must not know the contents of
programs, and must not choose interfaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from netpol_ebpf.errors import PlatformError
from netpol_loader.host.netlink import (
    CREATE,
    EXCLUSIVE,
    REPLACE,
    NetlinkError,
    RouteChannel,
    attribute,
    attributes,
    nested,
    read_number,
    read_text,
)
from netpol_loader.kernel.hook import Hook

PARENTS: Mapping[Hook, int] = {Hook.TC_INGRESS: 0xFFFF_FFF2, Hook.TC_EGRESS: 0xFFFF_FFF3}
FILTER_PRIORITY = 1
"""Priority of our filter: the first. Policy must run before a filter of another program that ends the chain."""
FILTER_HANDLE = 0x4E50
"""Handle of our filter among the filters of its priority. The value is arbitrary ("NP")."""
# include/uapi/linux/rtnetlink.h
_NEW_QDISC, _DELETE_QDISC, _GET_QDISC = 36, 37, 38
_NEW_FILTER, _DELETE_FILTER, _GET_FILTER = 44, 45, 46
# include/uapi/linux/pkt_sched.h, pkt_cls.h
_TC_HEADER = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID, _BPF_DIRECT_ACTION = 6, 7, 8, 11, 1
_PARENT, _HANDLE = 0xFFFF_FFF1, 0xFFFF_0000
_ALL_PROTOCOLS = 0x0003


@dataclass(frozen=True, slots=True)
class ClsactFilter:
    """One of our filters.

    ``prog_id``: id of the BPF program that the filter had when it was attached; the id is part of the filter's name.
    """

    hook: Hook
    prog_id: int


def add(ifindex: int) -> bool:
    """Add the clsact discipline to an interface. Returns False if the interface has it already.

    Raises PlatformError if the kernel refuses, or if the interface has the older discipline *ingress* in the place of
    clsact. The kernel accepts filters of both hooks on *ingress*, but runs all of them at ingress.
    """
    try:
        with RouteChannel() as channel:
            channel.ask(_NEW_QDISC, _clsact(ifindex), CREATE | EXCLUSIVE)
    except NetlinkError as error:
        if error.code == errno.EEXIST and is_on(ifindex):
            return False
        if error.code == errno.EEXIST:
            raise PlatformError(
                f"interface {ifindex} has an ingress queueing discipline of somebody else, beside which there can be no clsact",
                hint="Exchange it for clsact, which has the same ingress hook, or use a kernel with tcx (6.6 and newer).",
            ) from error
        raise PlatformError(f"cannot add clsact to interface {ifindex}: {os.strerror(error.code)}") from error
    return True


def _clsact(ifindex: int) -> bytes:
    header = _TC_HEADER.pack(socket.AF_UNSPEC, ifindex, _HANDLE, _PARENT, 0)
    return header + attribute(_TCA_KIND, b"clsact\0")


def interfaces() -> set[int]:
    """Indices of the interfaces with a clsact discipline."""
    with RouteChannel() as channel:
        found = channel.dump(_GET_QDISC, _TC_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    disciplines = ((_TC_HEADER.unpack_from(one)[1], attributes(one, _TC_HEADER.size)) for one in found)
    return {ifindex for ifindex, one in disciplines if read_text(one.get(_TCA_KIND, b"")) == "clsact"}


def is_on(ifindex: int) -> bool:
    """Whether an interface exists and has the clsact discipline."""
    try:
        with RouteChannel() as channel:
            channel.ask(_GET_QDISC, _clsact(ifindex))
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT, errno.EINVAL):  # no interface; no discipline; another discipline
            return False
        raise
    return True


def delete_if_unused(ifindex: int) -> None:
    """Remove an interface's clsact discipline, unless other programs have filters on it."""
    with contextlib.suppress(NetlinkError), RouteChannel() as channel:  # no interface, no discipline
        if not any(_filters(channel, ifindex, hook) for hook in PARENTS):
            channel.ask(_DELETE_QDISC, _clsact(ifindex))


def put_filter(ifindex: int, hook: Hook, prog_fd: int, prog_id: int) -> None:
    """Attach a program to a hook. If one of ours is attached, the kernel replaces that one atomically.

    Each packet meets either the old program or the new one.
    """
    options = nested(
        _TCA_OPTIONS,
        attribute(_BPF_FD, struct.pack("=I", prog_fd)),
        attribute(_BPF_NAME, f"{hook.value}#{prog_id}\0".encode()),
        attribute(_BPF_FLAGS, struct.pack("=I", _BPF_DIRECT_ACTION)),
    )
    try:
        with RouteChannel() as channel:
            channel.ask(_NEW_FILTER, _our_filter(ifindex, hook) + options, CREATE | REPLACE)
    except NetlinkError as error:
        raise PlatformError(
            f"cannot put {hook.value} on clsact of interface {ifindex}: {os.strerror(error.code)}"
        ) from error


def delete_filter(ifindex: int, hook: Hook) -> None:
    """Remove our filter from a hook."""
    with RouteChannel() as channel:
        channel.ask(_DELETE_FILTER, _our_filter(ifindex, hook))


def _our_filter(ifindex: int, hook: Hook) -> bytes:
    info = FILTER_PRIORITY << 16 | socket.htons(_ALL_PROTOCOLS)
    header = _TC_HEADER.pack(socket.AF_UNSPEC, ifindex, FILTER_HANDLE, PARENTS[hook], info)
    return header + attribute(_TCA_KIND, b"bpf\0")


def our_filters(ifindex: int) -> list[ClsactFilter]:
    """Our filters on an interface, recognised by their names. Empty if the interface is gone or has no clsact."""
    found = []
    with RouteChannel() as channel:
        for hook in PARENTS:
            for name in _filter_names(channel, ifindex, hook):
                ours, _, number = name.partition("#")
                if ours == hook.value and number.isdecimal():
                    found.append(ClsactFilter(hook, int(number)))
    return found


def foreign_filters(ifindex: int, hook: Hook) -> list[str]:
    """Names of the filters on a clsact hook that are not ours, for messages. Empty if the interface is gone."""
    with RouteChannel() as channel:
        return [name for name in _filter_names(channel, ifindex, hook) if not is_our_filter(name, hook)]


def is_our_filter(name: str, hook: Hook) -> bool:
    """Whether a filter's name is that of one of our programs."""
    return name.startswith(f"{hook.value}#")


def filter_programs(ifindex: int, hook: Hook) -> list[tuple[str, int]]:
    """The BPF filters on a clsact hook, in the order in which they run, each as (name, program id).

    The id is 0 if the kernel reports none. Empty if the interface is gone or has no clsact.
    """
    with RouteChannel() as channel:
        try:
            filters = _filters(channel, ifindex, hook)
        except NetlinkError:  # ENODEV, or the interface has no clsact
            return []
    kept = [attributes(one[_TCA_OPTIONS]) for one in filters if one.get(_TCA_KIND) == b"bpf\0" and _TCA_OPTIONS in one]
    return [(read_text(one.get(_BPF_NAME, b"")), read_number(one.get(_BPF_ID))) for one in kept]


def _filter_names(channel: RouteChannel, ifindex: int, hook: Hook) -> list[str]:
    """Names of the filters on a hook.

    A filter without a name, or of a kind other than bpf, is listed by its kind.
    """
    try:
        filters = _filters(channel, ifindex, hook)
    except NetlinkError:  # ENODEV, or the interface has no clsact
        return []
    names = []
    for one in filters:
        kind = read_text(one.get(_TCA_KIND, b""))
        if _TCA_OPTIONS in one:  # an entry without options describes a priority, not a filter
            options = attributes(one[_TCA_OPTIONS]) if kind == "bpf" else {}
            names.append(read_text(options.get(_BPF_NAME, b"")) or kind)
    return names


def _filters(channel: RouteChannel, ifindex: int, hook: Hook) -> list[dict[int, bytes]]:
    body = _TC_HEADER.pack(socket.AF_UNSPEC, ifindex, 0, PARENTS[hook], 0)
    return [attributes(one, _TC_HEADER.size) for one in channel.dump(_GET_FILTER, body)]
