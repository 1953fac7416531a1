# SPDX-License-Identifier: Apache-2.0
"""Builds frames as a station on a link sends them, with checksums that real receivers verify; and parses frames."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from netpol_ebpf.lab.topology import ICMPV6, UDP, IPAddress

IP4, ARP, IP6 = 0x0800, 0x0806, 0x86DD
BROADCAST_MAC = b"\xff" * 6
FRAGMENT = 44  # the extension header of IPv6
SOLICITATION, ADVERTISEMENT = 135, 136
ARP_REQUEST, ARP_REPLY = 1, 2
ETHERNET_BYTES, IP4_BYTES, IP6_BYTES, UDP_BYTES = 14, 20, 40, 8


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def mac(text: str) -> bytes:
    """``02:00:...`` as bytes."""
    return bytes.fromhex(text.replace(":", ""))


def ethernet(source: bytes, destination: bytes, kind: int, payload: bytes) -> bytes:
    """An Ethernet frame."""
    return destination + source + struct.pack("!H", kind) + payload


def _pseudo(source: IPAddress, destination: IPAddress, protocol: int, size: int) -> bytes:
    ends = source.packed + destination.packed
    return ends + (
        struct.pack("!BBH", 0, protocol, size) if source.version == 4 else struct.pack("!II", size, protocol)
    )


def ip(source: IPAddress, destination: IPAddress, protocol: int, payload: bytes, *, hops: int = 64) -> bytes:
    """An IP packet of the addresses' family."""
    ends = source.packed + destination.packed
    if source.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops) + ends + payload
    head = struct.pack("!BBHHHBB", 0x45, 0, IP4_BYTES + len(payload), 1, 0, hops, protocol)
    return head + struct.pack("!H", checksum(head + bytes(2) + ends)) + ends + payload


def udp(source: IPAddress, destination: IPAddress, ports: tuple[int, int], payload: bytes) -> bytes:
    """An IP packet with a datagram. ``ports``: source, destination."""
    size = UDP_BYTES + len(payload)
    body = struct.pack("!HHHH", *ports, size, 0) + payload
    found = checksum(_pseudo(source, destination, UDP, size) + body) or 0xFFFF
    return ip(source, destination, UDP, struct.pack("!HHHH", *ports, size, found) + payload)


def fragments(
    source: IPAddress, destination: IPAddress, ports: tuple[int, int], payload: bytes, identification: int
) -> tuple[bytes, bytes]:
    """A datagram in two packets: the first one has the first eight bytes of its payload."""
    whole = udp(source, destination, ports, payload)
    base = IP4_BYTES if source.version == 4 else IP6_BYTES
    cut = UDP_BYTES + 8
    parts = []
    for offset, part in ((0, whole[base:][:cut]), (cut, whole[base:][cut:])):
        more = offset == 0
        if source.version == 6:
            head = struct.pack("!BBHI", UDP, 0, offset | more, identification)
            parts.append(ip(source, destination, FRAGMENT, head + part))
            continue
        fields = struct.pack("!HHHBB", IP4_BYTES + len(part), identification, offset // 8 | more << 13, 64, UDP)
        head = bytes([0x45, 0]) + fields
        ends = source.packed + destination.packed
        parts.append(head + struct.pack("!H", checksum(head + bytes(2) + ends)) + ends + part)
    return parts[0], parts[1]


def frame_of(packet: bytes, source: bytes, destination: bytes) -> bytes:
    """The packet in an Ethernet frame with the ethertype of its family."""
    return ethernet(source, destination, IP4 if packet[0] >> 4 == 4 else IP6, packet)


def arp(operation: int, source: tuple[bytes, IPv4Address], target: tuple[bytes, IPv4Address]) -> bytes:
    """An ARP frame from one station to another. A request is a broadcast."""
    body = struct.pack("!HHBBH", 1, IP4, 6, 4, operation) + source[0] + source[1].packed + target[0] + target[1].packed
    return ethernet(source[0], BROADCAST_MAC if operation == ARP_REQUEST else target[0], ARP, body)


def advertisement(hardware: bytes, address: IPv6Address, asker: tuple[bytes, IPv6Address]) -> bytes:
    """The answer to a neighbour solicitation, with the flags solicited and override, and the link-layer address."""
    body = struct.pack("!BBHI", ADVERTISEMENT, 0, 0, 0x60000000) + address.packed + b"\x02\x01" + hardware
    found = checksum(_pseudo(address, asker[1], ICMPV6, len(body)) + body)
    body = body[:2] + struct.pack("!H", found) + body[4:]
    return frame_of(ip(address, asker[1], ICMPV6, body, hops=255), hardware, asker[0])


@dataclass(frozen=True, slots=True)
class Datagram:
    """A parsed UDP datagram."""

    source: IPAddress
    destination: IPAddress
    source_port: int
    destination_port: int
    payload: bytes


def read_udp(frame: bytes) -> Datagram | None:
    """The datagram in a frame; None for anything else. IPv4 options are not parsed, because no test here sends any."""
    kind = int.from_bytes(frame[12:14], "big")
    packet = frame[ETHERNET_BYTES:]
    if kind == IP4 and packet[9] == UDP:
        ends, body = (packet[12:16], packet[16:20]), packet[IP4_BYTES:]
    elif kind == IP6 and packet[6] == UDP:
        ends, body = (packet[8:24], packet[24:40]), packet[IP6_BYTES:]
    else:
        return None
    source_port, destination_port, size = struct.unpack_from("!HHH", body)
    return Datagram(ip_address(ends[0]), ip_address(ends[1]), source_port, destination_port, body[UDP_BYTES:size])


def asks_for(frame: bytes) -> tuple[IPAddress, bytes, IPAddress] | None:
    """Of an ARP request or a neighbour solicitation: the wanted address, and the asker's hardware and IP address."""
    kind = int.from_bytes(frame[12:14], "big")
    body = frame[ETHERNET_BYTES:]
    if kind == ARP and int.from_bytes(body[6:8], "big") == ARP_REQUEST:
        return IPv4Address(body[24:28]), body[8:14], IPv4Address(body[14:18])
    if kind == IP6 and body[6] == ICMPV6 and body[IP6_BYTES] == SOLICITATION:
        return IPv6Address(body[IP6_BYTES + 8 : IP6_BYTES + 24]), frame[6:12], IPv6Address(body[8:24])
    return None
