# SPDX-License-Identifier: Apache-2.0
"""Ethernet frames for the packets that policy judges: the first packet of a connection, with correct checksums.

Invariant: a frame has the header fields of its `Packet`.  All other fields are constant, so equal packets give equal
frames.  A TCP frame is a SYN.  An ICMP error has no inner packet, so it belongs to no connection and policy judges it.
Messages of neighbour and listener discovery are well-formed if source and destination are on the link; otherwise they
look as if a router had forwarded them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address

from netpol_ebpf.policy.journey import LISTENER_TYPES, ROUTER_SOLICITATION, is_link_message
from netpol_ebpf.policy.types import ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE, Packet

ETHERNET_BYTES = 14
ICMP_IDENTIFIER = 0x4E50
"""The identifier of ICMP queries; arbitrary."""

_ETHERNET: Mapping[int, bytes] = {
    4: bytes.fromhex("020000000001 020000000002 0800"),
    6: bytes.fromhex("020000000001 020000000002 86dd"),
}
"""The Ethernet header by IP version: locally administered addresses and the ethertype."""
_HOP_LIMIT, _LINK_HOP_LIMIT, _LISTENER_HOP_LIMIT = 64, 255, 1
_NEIGHBOUR_SOLICITATION = 135
_LINK_ADDRESS = ip_address("fe80::1")
"""The target address of neighbour solicitations; arbitrary."""
_SYN = 2
_PAYLOAD = b"netpol-ebpf"


def render_frame(packet: Packet) -> bytes:
    """Render the Ethernet frame of ``packet``."""
    payload = _transport(packet)
    if isinstance(packet.source, IPv4Address):
        header = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, _HOP_LIMIT, packet.protocol, 0,
            packet.source.packed, packet.destination.packed,
        )  # fmt: skip
        header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    else:
        header = struct.pack("!IHBB", 6 << 28, len(payload), packet.protocol, _hop_limit(packet))
        header += packet.source.packed + packet.destination.packed
    return _ETHERNET[packet.source.version] + header + payload


def _hop_limit(packet: Packet) -> int:
    if not is_link_message(packet):
        return _HOP_LIMIT
    return _LISTENER_HOP_LIMIT if packet.icmp_type in LISTENER_TYPES else _LINK_HOP_LIMIT


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of ``data``."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:  # noqa: PLR2004 - carries of a 16-bit sum
        total = (total >> 16) + (total & 0xFFFF)
    return ~total & 0xFFFF


def _transport(packet: Packet) -> bytes:
    """The transport header and payload of ``packet``, with correct checksums."""
    ports = struct.pack("!HH", packet.source_port, packet.destination_port)
    protocol = packet.protocol
    if protocol == TCP:
        return _with_checksum(packet, ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, _SYN, 0xFFFF, 0, 0), 16)
    if protocol in (UDP, UDPLITE):
        length = 8 + len(_PAYLOAD) if protocol == UDP else 8  # in UDPLite: bytes that the checksum covers
        segment = _with_checksum(packet, ports + struct.pack("!HH", length, 0) + _PAYLOAD, 6, covered=length)
        return segment if segment[6:8] != b"\0\0" else segment[:6] + b"\xff\xff" + segment[8:]
    if protocol == SCTP:
        # The CRC is zero, because only a receiver checks the CRC; the program does not.
        return ports + struct.pack("!II", 0, 0) + struct.pack("!BBHIIHHI", 1, 0, 20, 1, 0xFFFF, 1, 1, 1)
    if protocol in (ICMP, ICMPV6):
        message = struct.pack("!BBHHH", packet.icmp_type, packet.icmp_code, 0, ICMP_IDENTIFIER, 1)
        if protocol == ICMP:
            return message[:2] + struct.pack("!H", checksum(message)) + message[4:]
        if is_link_message(packet):
            is_asked = packet.icmp_type == _NEIGHBOUR_SOLICITATION
            about = _LINK_ADDRESS if is_asked and not packet.source.is_unspecified else packet.source
            message = message[:4] + bytes(4) + (b"" if packet.icmp_type == ROUTER_SOLICITATION else about.packed)
        return _with_checksum(packet, message, 2)
    return _PAYLOAD


def _with_checksum(packet: Packet, segment: bytes, offset: int, *, covered: int | None = None) -> bytes:
    """``segment`` with its checksum filled in at ``offset``.

    ``covered``: how many bytes of the segment the checksum covers besides the pseudo header; None: all bytes.
    """
    length = len(segment)
    addresses = packet.source.packed + packet.destination.packed
    if isinstance(packet.source, IPv4Address):
        pseudo = addresses + struct.pack("!BBH", 0, packet.protocol, length)
    else:
        pseudo = addresses + struct.pack("!II", length, packet.protocol)
    value = checksum(pseudo + segment[:covered])
    return segment[:offset] + struct.pack("!H", value) + segment[offset + 2 :]
