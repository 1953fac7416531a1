# SPDX-License-Identifier: Apache-2.0
"""The kernel's conntrack table: live connections of a namespace, each with its original and its reply tuple.

Invariant: the module only reads. The module must not know endpoints or policy.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader.host.address import IPAddress
from netpol_loader.host.netlink import NETFILTER, Channel, NetlinkError, attributes

TCP = 6

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_common.h, nf_conntrack_tcp.h
_CT_NEW, _CT_GET = 0x100, 0x101
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _PROTOINFO = 1, 2, 3, 4
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_PROTOINFO_TCP, _TCP_STATE = 1, 1
_SEEN_REPLY, _DYING = 1 << 1, 1 << 9
_TIME_WAIT, _CLOSE = 7, 8
_GENERIC_BYTES = 4  # struct nfgenmsg


class Ends(NamedTuple):
    """Source and destination of a packet. Both ports are 0 in a protocol without ports."""

    source: IPAddress
    destination: IPAddress
    source_port: int
    destination_port: int

    def reversed(self) -> Ends:
        """The same addresses and ports for a packet in the other direction."""
        return Ends(self.destination, self.source, self.destination_port, self.source_port)


@dataclass(frozen=True, slots=True)
class Tracked:
    """A live connection.

    ``original``: tuple of the connection's first packet, as its sender sent it. ``reply``: tuple of a reply, as its
    sender sends it; if addresses are translated, it is not the reverse of ``original``. ``is_replied``: both sides have
    sent packets.
    """

    protocol: int
    original: Ends
    reply: Ends
    is_replied: bool


def tracked() -> Iterator[Tracked]:
    """The live connections of the calling thread's namespace. Empty if the kernel tracks none.

    Raises PrivilegeError without CAP_NET_ADMIN. Raises PlatformError if the kernel has no connection tracking, or
    cannot list the connections.
    """
    for message in _dump():
        try:
            found = parse(message)
        except (ValueError, struct.error) as error:
            raise PlatformError(f"the kernel lists a tracked connection that makes no sense: {error}") from error
        if found is not None:
            yield found


def parse(message: bytes) -> Tracked | None:
    """Decode a conntrack entry, without its headers. Returns None if the connection has ended or is not IP.

    Raises ValueError and struct.error if the bytes are not an entry.
    """
    found = attributes(message)
    status = struct.unpack("!I", found.get(_STATUS, bytes(4)))[0]
    original, reply = _ends(found.get(_TUPLE_ORIGINAL)), _ends(found.get(_TUPLE_REPLY))
    if original is None or reply is None or status & _DYING or _tcp_state(found) in (_TIME_WAIT, _CLOSE):
        return None
    return Tracked(original[0], original[1], reply[1], bool(status & _SEEN_REPLY))


def _dump() -> Iterator[bytes]:
    try:
        with Channel(NETFILTER, "conntrack") as channel:
            for kind, _, body in channel.stream(_CT_GET, bytes(_GENERIC_BYTES)):
                if kind == _CT_NEW:
                    yield body[_GENERIC_BYTES:]
    except NetlinkError as error:
        message = f"the kernel does not list the connections that it tracks: {os.strerror(error.code)}"
        raise (PrivilegeError if error.code in (errno.EPERM, errno.EACCES) else PlatformError)(message) from error


def _ends(data: bytes | None) -> tuple[int, Ends] | None:
    """Decode a tuple into its protocol, and its addresses and ports. Returns None if the tuple is incomplete."""
    found = attributes(data or b"")
    addresses, protocol = attributes(found.get(_TUPLE_IP, b"")), attributes(found.get(_TUPLE_PROTO, b""))
    source, destination = addresses.get(1, addresses.get(3)), addresses.get(2, addresses.get(4))
    if source is None or destination is None or _PROTO_NUMBER not in protocol:
        return None
    kind = IPv4Address if len(source) == 4 else IPv6Address  # noqa: PLR2004 - bytes of an IPv4 address
    ports = (int.from_bytes(protocol.get(one, b""), "big") for one in (_PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT))
    return protocol[_PROTO_NUMBER][0], Ends(kind(source), kind(destination), *ports)


def _tcp_state(found: dict[int, bytes]) -> int | None:
    tcp = attributes(attributes(found.get(_PROTOINFO, b"")).get(_PROTOINFO_TCP, b""))
    return tcp[_TCP_STATE][0] if _TCP_STATE in tcp else None
