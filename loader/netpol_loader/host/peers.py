# SPDX-License-Identifier: Apache-2.0
"""Addresses at the other end of a veth pair: read from another network namespace without entering it.

The kernel lists a veth's peer as (namespace id, interface index), ids being relative to the asking namespace, and answers
RTM_GETADDR for one interface there (IFA_TARGET_NETNSID, strict checking; Linux 4.20).  So pods are found whatever made their namespaces, named or not.
Entering each namespace with setns(2) was rejected: it needs the file of a namespace, which a pod's may not have in this mount
namespace, and it moves the calling thread.

The module must know nothing of pods.
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
"""The most addresses of one family that are read from an interface: its workload may add any number; arbitrary."""


def load_peer_addresses(peers: Iterable[tuple[int, int]]) -> dict[tuple[int, int], tuple[IPAddress, ...]]:
    """Addresses of these interfaces, by (namespace id, interface index there); what is no more has none.

    Raises PrivilegeError without CAP_NET_ADMIN over a namespace, PlatformError for a kernel that cannot tell.  Cost: some 50
    microseconds for each interface, and no more than MOST_ADDRESSES of each family make it, whoever owns the namespace: of more,
    the first that were added count in IPv4, none in IPv6, which the kernel lists from the newest on.
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
    """The addresses of an interface, at most MOST_ADDRESSES and one more; none if it is gone."""
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
    """The address of a message; the local one where the link is point-to-point."""
    family = _ADDRESS_HEADER.unpack_from(payload)[0]
    found = attributes(payload, _ADDRESS_HEADER.size)
    raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    if raw is None:
        return None
    return IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
