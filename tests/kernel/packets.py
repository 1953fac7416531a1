# SPDX-License-Identifier: Apache-2.0
"""A small packet builder: each function puts one header around bytes.

Checksums are 0, because the program checks none.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address

IP4, ARP, VLAN, IP6, QINQ = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88A8
ICMP, TCP, UDP, ICMPV6, SCTP = 1, 6, 17, 58, 132
FIN, SYN, RST, ACK = 1, 2, 4, 16


def eth(payload: bytes, kind: int, *, tags: tuple[int, ...] = ()) -> bytes:
    """An Ethernet frame; ``tags``: VLAN ids, outermost first."""
    outer = [QINQ] * (len(tags) - 1) + [VLAN] if tags else []
    types = [*outer, kind]
    head = bytes(6) + bytes.fromhex("020000000001") + struct.pack("!H", types[0])
    for tag, following in zip(tags, types[1:], strict=True):
        head += struct.pack("!HH", tag, following)
    return head + payload


def ip4(source: str, destination: str, protocol: int, payload: bytes, *, options: bytes = b"", identification: int = 1,
        offset: int = 0, more: bool = False, version: int = 4, words: int | None = None,
        total: int | None = None) -> bytes:  # fmt: skip
    """An IPv4 packet. ``offset``: of the fragment, in bytes."""
    header_words = 5 + len(options) // 4 if words is None else words
    return (
        struct.pack(
            "!BBHHHBBH4s4s", version << 4 | header_words, 0, 20 + len(options) + len(payload) if total is None else total,
            identification, offset // 8 | (0x2000 if more else 0), 64, protocol, 0,
            ip_address(source).packed, ip_address(destination).packed,
        ) + options + payload
    )  # fmt: skip


def ip6(source: str, destination: str, protocol: int, payload: bytes, *, version: int = 6, hops: int = 64) -> bytes:
    """An IPv6 packet; ``protocol`` is that of the first header in ``payload``."""
    return (
        struct.pack("!IHBB", version << 28, len(payload), protocol, hops)
        + ip_address(source).packed + ip_address(destination).packed + payload
    )  # fmt: skip


def extension(following: int, payload: bytes, *, length: int = 0) -> bytes:
    """A hop-by-hop, routing or destination header of 8 * (length + 1) bytes."""
    return struct.pack("!BB", following, length) + bytes(6 + 8 * length) + payload


def authentication(following: int, payload: bytes) -> bytes:
    """An authentication header of 24 bytes."""
    return struct.pack("!BB", following, 4) + bytes(22) + payload


def fragment6(following: int, payload: bytes, *, offset: int = 0, more: bool = False, identification: int = 1) -> bytes:
    """An IPv6 fragment header."""
    return struct.pack("!BBHI", following, 0, offset | more, identification) + payload


def tcp(source: int, destination: int, flags: int = SYN, payload: bytes = b"", *, words: int = 5) -> bytes:
    """A TCP segment."""
    return struct.pack("!HHIIBBHHH", source, destination, 1, 1, words << 4, flags, 1024, 0, 0) + payload


def udp(source: int, destination: int, payload: bytes = b"x") -> bytes:
    """A UDP datagram."""
    return struct.pack("!HHHH", source, destination, 8 + len(payload), 0) + payload


def sctp(source: int, destination: int) -> bytes:
    """An SCTP packet with an INIT chunk."""
    return struct.pack("!HHII", source, destination, 0, 0) + struct.pack("!BBH", 1, 0, 20) + bytes(16)


def icmp(kind: int, code: int = 0, identification: int = 0, payload: bytes = b"") -> bytes:
    """An ICMP or ICMPv6 message."""
    return struct.pack("!BBHHH", kind, code, 0, identification, 1) + payload


def frame(source: str, destination: str, protocol: int, l4: bytes) -> bytes:
    """A whole frame of either family with an unfragmented packet."""
    if ip_address(source).version == 4:
        return eth(ip4(source, destination, protocol, l4), IP4)
    return eth(ip6(source, destination, protocol, l4), IP6)
