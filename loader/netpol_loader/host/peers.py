# SPDX-License-Identifier: Apache-2.0
"""Addresses at the other end of a veth pair, read from another network namespace without entering that namespace.

The kernel lists the peer of a veth as (namespace id, interface index). These ids are valid in the reader's namespace.
The kernel answers RTM_GETADDR for one interface of another namespace (IFA_TARGET_NETNSID, strict checking; Linux 4.20).
So this works whichever runtime made the pods' namespaces, and whether or not these have names. Rejected: setns(2) into
each namespace, which needs the namespace's file (a pod's may be invisible in this mount namespace) and moves the
calling thread.

The module must not know pods.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader.host.address import IPAddress
from netpol_loader.host.netlink import NetlinkError, RouteChannel, attribute, attributes

# include/uapi/linux/rtnetlink.h, if_addr.h
_GET_ADDRESS = 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_TARGET_NETNSID = 1, 2, 10
_ADDRESS_HEADER = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index

MOST_ADDRESSES = 256
"""How many addresses of one family are read from an interface at most; a workload can add any number.

The value is arbitrary.
"""


def load_peer_addresses(peers: Iterable[tuple[int, int]]) -> dict[tuple[int, int], tuple[IPAddress, ...]]:
    """Addresses of interfaces in other namespaces.

    ``peers`` and the keys of the result: (namespace id, interface index in that namespace). An interface that is gone
    or has no address is absent from the result. Cost: some 50 microseconds for each interface.

    A workload can add any number of addresses. If an interface has more than MOST_ADDRESSES of one family, the result
    has the oldest ones of IPv4, and none of IPv6, because the kernel lists IPv6 addresses from the newest on.

    Raises PrivilegeError without CAP_NET_ADMIN over a namespace. Raises PlatformError if the kernel cannot list the
    addresses of other namespaces.
    """
    found: dict[tuple[int, int], list[IPAddress]] = {}
    for peer in set(peers):
        for family in (socket.AF_INET, socket.AF_INET6):
            listed = _listed(peer, family)
            if len(listed) > MOST_ADDRESSES:
                listed = listed[:MOST_ADDRESSES] if family == socket.AF_INET else []
            addresses = [one for one in map(_parse_address, listed) if one is not None]
            if addresses:
                found.setdefault(peer, []).extend(addresses)
    return {peer: tuple(addresses) for peer, addresses in found.items()}


def _listed(peer: tuple[int, int], family: int) -> list[bytes]:
    """The address messages of an interface, at most MOST_ADDRESSES + 1. Empty if the interface is gone."""
    namespace_id, ifindex = peer
    target = attribute(_IFA_TARGET_NETNSID, struct.pack("=i", namespace_id))
    try:
        with RouteChannel() as channel:
            return channel.first(
                _GET_ADDRESS, _ADDRESS_HEADER.pack(family, 0, 0, 0, ifindex) + target, MOST_ADDRESSES
            )  # fmt: skip
    except NetlinkError as error:
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV):  # EINVAL: "Invalid target network namespace id"
            return []
        message = f"the kernel does not list the addresses of another network namespace: {os.strerror(error.code)}"
        if error.code in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(message) from error
        raise PlatformError(message) from error


def _parse_address(payload: bytes) -> IPAddress | None:
    """Decode the address of a message: on a point-to-point link the local one (IFA_LOCAL). None if there is none."""
    family = _ADDRESS_HEADER.unpack_from(payload)[0]
    found = attributes(payload, _ADDRESS_HEADER.size)
    raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    if raw is None:
        return None
    return IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
