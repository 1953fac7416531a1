# SPDX-License-Identifier: Apache-2.0
"""Frames for questions, parsed field by field, with checksums verified as receivers do."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from netpol_ebpf.apply.frames import ETHERNET_BYTES, render_frame
from netpol_ebpf.policy.types import ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE, Packet

V4 = (ip_address("10.0.0.1"), ip_address("192.0.2.9"))
V6 = (ip_address("fd00::1"), ip_address("2001:db8::9"))
OTHER = 47
EVERY = [
    Packet(*pair, protocol, source_port=port, destination_port=port and 443, icmp_type=kind, icmp_code=kind and 1)
    for pair in (V4, V6)
    for protocol, port, kind in (
        (TCP, 40000, 0), (UDP, 40000, 0), (UDPLITE, 40000, 0), (SCTP, 40000, 0), (OTHER, 0, 0),
        (ICMP if pair is V4 else ICMPV6, 0, 13),
    )
]  # fmt: skip


def ones_sum(data: bytes) -> int:
    """The receiver's sum: 0xFFFF if the checksum in the packet is correct."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def transport(packet: Packet, frame: bytes) -> bytes:
    return frame[ETHERNET_BYTES + (20 if packet.source.version == 4 else 40) :]


@pytest.mark.parametrize("packet", EVERY, ids=lambda packet: f"v{packet.source.version}-{packet.protocol}")
def test_headers_say_what_the_packet_says(packet: Packet) -> None:
    """Addresses, protocol and lengths are in the fields of the headers, and the IPv4 checksum is correct."""
    frame = render_frame(packet)
    network = frame[ETHERNET_BYTES:]
    if packet.source.version == 4:
        assert frame[12:14] == b"\x08\x00"
        assert (network[0], network[9], int.from_bytes(network[2:4], "big")) == (0x45, packet.protocol, len(network))
        assert (network[12:16], network[16:20]) == (packet.source.packed, packet.destination.packed)
        assert ones_sum(network[:20]) == 0xFFFF
    else:
        assert frame[12:14] == b"\x86\xdd"
        assert (network[0] >> 4, network[6]) == (6, packet.protocol)
        assert int.from_bytes(network[4:6], "big") == len(network) - 40
        assert (network[8:24], network[24:40]) == (packet.source.packed, packet.destination.packed)


SUMMED = [packet for packet in EVERY if packet.protocol not in (SCTP, OTHER)]


@pytest.mark.parametrize("packet", SUMMED, ids=lambda packet: f"v{packet.source.version}-{packet.protocol}")
def test_transport_checksums_are_right(packet: Packet) -> None:
    """The checksums of TCP, UDP, UDPLite, ICMP and ICMPv6 are correct with their pseudo-headers."""
    segment = transport(packet, render_frame(packet))
    pseudo = packet.source.packed + packet.destination.packed
    pseudo += struct.pack("!II", len(segment), packet.protocol)
    covered = segment[:8] if packet.protocol == UDPLITE else segment
    assert ones_sum((b"" if packet.protocol == ICMP else pseudo) + covered) == 0xFFFF


@pytest.mark.parametrize("pair", [V4, V6])
@pytest.mark.parametrize("protocol", [TCP, UDP, SCTP])
def test_ports_stand_first(protocol: int, pair: tuple[object, object]) -> None:
    """Source and destination port come first, in network order. TCP is an initial SYN."""
    packet = Packet(pair[0], pair[1], protocol, 1024, 65535)  # type: ignore[arg-type]  # one of V4, V6
    segment = transport(packet, render_frame(packet))
    assert segment[:4] == b"\x04\x00\xff\xff"
    if protocol == TCP:
        assert (segment[12] >> 4, segment[13]) == (5, 2)


def test_icmp_error_carries_no_packet() -> None:
    """An error message ends after its header, so it belongs to no connection."""
    segment = transport(EVERY[0], render_frame(Packet(*V4, ICMP, icmp_type=3, icmp_code=1)))
    assert (segment[:2], len(segment)) == (b"\x03\x01", 8)


def test_udp_checksum_is_never_zero() -> None:
    """A computed UDP checksum of zero is sent as all ones, because zero means that there is none."""
    for port in range(65536):
        segment = transport(EVERY[0], render_frame(Packet(*V4, UDP, port, 0)))
        assert segment[6:8] != b"\0\0"
        if segment[6:8] == b"\xff\xff":
            break
    else:
        pytest.fail("no port makes the sum zero: the rule was not exercised")
