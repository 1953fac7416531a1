# SPDX-License-Identifier: Apache-2.0
"""What is at the other end of a veth pair: addresses of interfaces in other network namespaces, without entering them.

The kernel lists a veth's peer as (namespace id, interface index), ids being relative to the asking namespace, and answers
RTM_GETADDR for such an id (IFA_TARGET_NETNSID, Linux 4.20).  So pods are found whatever made their namespaces, named or not.
Entering each namespace with setns(2) was rejected: it needs the file of a namespace, which a pod's may not have in this mount
namespace, and it moves the calling thread.

Must know nothing of pods.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Union

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader.rtnetlink import Rtnetlink, RtnetlinkError, attribute, attributes

IPAddress = Union[IPv4Address, IPv6Address]

# include/uapi/linux/rtnetlink.h, if_addr.h
_GET_ADDRESS = 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_TARGET_NETNSID = 1, 2, 10
_ADDRESS_HEADER = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index


def load_peer_addresses(namespace_ids: Iterable[int]) -> dict[tuple[int, int], tuple[IPAddress, ...]]:
    """Addresses by (namespace id, interface index there), for these ids; an id that is no more has none.

    Raises PrivilegeError without CAP_NET_ADMIN over a namespace, PlatformError for a kernel that cannot tell.  Cost: some 50
    microseconds for each namespace.
    """
    found: dict[tuple[int, int], list[IPAddress]] = {}
    with Rtnetlink() as channel:
        for namespace_id in set(namespace_ids):
            for family in (socket.AF_INET, socket.AF_INET6):
                for payload in _listed(channel, namespace_id, family):
                    address = _parse_address(payload)
                    if address is not None:
                        found.setdefault((namespace_id, address[0]), []).append(address[1])
    return {key: tuple(addresses) for key, addresses in found.items()}


def _listed(channel: Rtnetlink, namespace_id: int, family: int) -> list[bytes]:
    """The addresses of a namespace; none when it is gone."""
    target = attribute(_IFA_TARGET_NETNSID, struct.pack("=i", namespace_id))
    try:
        return channel.dump(_GET_ADDRESS, _ADDRESS_HEADER.pack(family, 0, 0, 0, 0) + target, is_of_another=True)
    except RtnetlinkError as error:
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV):  # EINVAL: "Invalid target network namespace id"
            return []
        message = f"the kernel does not list the addresses of another network namespace: {os.strerror(error.code)}"
        if error.code in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(message) from error
        raise PlatformError(message) from error


def _parse_address(payload: bytes) -> tuple[int, IPAddress] | None:
    """Interface and address of a message; the local one where the link is point-to-point."""
    family, _, _, _, ifindex = _ADDRESS_HEADER.unpack_from(payload)
    found = attributes(payload, _ADDRESS_HEADER.size)
    raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    if raw is None:
        return None
    return ifindex, IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
