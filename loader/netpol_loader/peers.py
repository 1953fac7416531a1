# SPDX-License-Identifier: Apache-2.0
"""What is at the other end of a veth pair: addresses of interfaces in other network namespaces, without entering them.

The kernel lists a veth's peer as (namespace id, interface index), ids being relative to the asking namespace, and answers
RTM_GETADDR for such an id (IFA_TARGET_NETNSID, Linux 4.20).  So pods are found whatever made their namespaces, named or not.
Entering each namespace with setns(2) was rejected: it needs the file of a namespace, which a pod's may not have in this mount
namespace, and it moves the calling thread.

Raw netlink, because the request needs a socket option (strict checking) and an attribute together.  Must know nothing of pods.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Union

from netpol_ebpf.errors import PlatformError, PrivilegeError

IPAddress = Union[IPv4Address, IPv6Address]

# include/uapi/linux/netlink.h, rtnetlink.h, if_addr.h
_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_TARGET_NETNSID = 1, 2, 10

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_RECEIVE_BYTES = 1 << 17


def load_peer_addresses(namespace_ids: Iterable[int]) -> dict[tuple[int, int], tuple[IPAddress, ...]]:
    """Addresses by (namespace id, interface index there), for these ids; an id that is no more has none.

    Raises PrivilegeError without CAP_NET_ADMIN over a namespace, PlatformError for a kernel that cannot tell.
    """
    found: dict[tuple[int, int], list[IPAddress]] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as channel:
        channel.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        channel.bind((0, 0))
        for namespace_id in set(namespace_ids):
            for family in (socket.AF_INET, socket.AF_INET6):
                for ifindex, address in _dump(channel, namespace_id, family):
                    found.setdefault((namespace_id, ifindex), []).append(address)
    return {key: tuple(addresses) for key, addresses in found.items()}


def _dump(channel: socket.socket, namespace_id: int, family: int) -> Iterator[tuple[int, IPAddress]]:
    body = (
        _IFADDRMSG.pack(family, 0, 0, 0, 0) + _ATTRIBUTE.pack(8, _IFA_TARGET_NETNSID) + struct.pack("=i", namespace_id)
    )
    channel.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
    while True:
        data = channel.recv(_RECEIVE_BYTES)
        at = 0
        while at < len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            message = data[at + _HEADER.size : at + length]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                _raise_error(-struct.unpack_from("=i", message)[0])
                return
            if kind == _RTM_NEWADDR:
                address = _parse_address(message)
                if address is not None:
                    yield address
            at += (length + 3) & ~3


def _raise_error(number: int) -> None:
    """Raise for what a netlink error says, unless it says that the namespace is gone."""
    if number in (errno.EINVAL, errno.ENOENT, errno.ENODEV):  # EINVAL: "Invalid target network namespace id"
        return
    message = f"the kernel does not list the addresses of another network namespace: {os.strerror(number)}"
    if number in (errno.EPERM, errno.EACCES):
        raise PrivilegeError(message)
    raise PlatformError(message)


def _parse_address(message: bytes) -> tuple[int, IPAddress] | None:
    """Interface and address of a RTM_NEWADDR; the local one where the link is point-to-point."""
    family, _, _, _, ifindex = _IFADDRMSG.unpack_from(message)
    found: dict[int, bytes] = {}
    at = _IFADDRMSG.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = message[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    if raw is None:
        return None
    return ifindex, IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
