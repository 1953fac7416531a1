# SPDX-License-Identifier: Apache-2.0
"""The reference parser alone, without a kernel."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_address

import packets as p
import pytest
import world
from endpoint import Node, is_for_many, is_link_group, is_link_local, is_multicast
from generate import Generator, runnable
from wire import IP4, IP6, Facts, Kind, Place, parse, u16

POD4, POD6, PEER4, PEER6 = "10.0.0.7", "fd00::7", "10.0.0.9", "fd00::9"
FRAMES = 4000


def generated(seed: str) -> list[bytes]:
    generator = Generator(seed)
    return [generator.stimulus().frame for _ in range(FRAMES)]


def test_any_bytes_are_parsed() -> None:
    """No frame raises an error, and a parsed frame has addresses of its family."""
    chance = random.Random(3)
    for frame in [*generated("any"), *(chance.randbytes(chance.randrange(120)) for _ in range(FRAMES))]:
        reason, facts = parse(frame)
        assert reason or len(facts.source) == len(facts.destination) == {4: 4, 6: 16}[facts.version], frame.hex()


def test_padding_says_nothing() -> None:
    """Bytes after the packet's stated length change neither the reason nor the facts, except their number."""
    chance = random.Random(4)
    compared = 0
    for frame in generated("padding"):
        reason, facts = parse(frame)
        at = 14 + 4 * sum(u16(frame, at) in (0x8100, 0x88A8) for at in (12, 16) if len(frame) > at + 1)
        if reason or not u16(frame, at + (2 if facts.version == 4 else 4)):
            continue
        longer = parse(frame + chance.randbytes(60))
        assert longer == (reason, replace(facts, padding=facts.padding + 60)), frame.hex()
        compared += 1
    assert compared > FRAMES // 2


def test_the_same_seed_gives_the_same_frames() -> None:
    """A failure can be repeated by its seed and number."""
    assert generated("1/2") == generated("1/2")
    assert generated("1/2") != generated("1/3")


@pytest.mark.parametrize("kind", [IP4, IP6])
def test_frames_that_the_kernel_would_refuse_get_a_tag(kind: int) -> None:
    """An IP frame without a whole header is also tested, after a VLAN tag."""
    frame = runnable(bytes(12) + kind.to_bytes(2, "big") + bytes(10))
    assert frame[12:14] == b"\x81\x00"
    assert parse(frame)[0] == "short"


BOUNDS = (
    "fe7f:ffff::", "fe80::", "febf:ffff::", "fec0::", "ff02::1", "ff12::1", "ff22::1", "ff05::1", "ff00::", "::", "::1",
    "223.255.255.255", "224.0.0.0", "239.255.255.255", "240.0.0.0", "255.255.255.255", "126.255.255.255", "127.0.0.0",
    "127.255.255.255", "128.0.0.0",
)  # fmt: skip
MAC = bytes.fromhex("020000000001")
TCP = p.tcp(1000, 80, p.SYN)
UNDERSTOOD: list[tuple[str, bytes, dict[str, object]]] = [
    ("TCP", p.frame(POD4, PEER4, p.TCP, TCP), {"source_port": 1000, "destination_port": 80, "is_initial_syn": True}),
    ("two tags", p.eth(p.ip6(POD6, PEER6, p.TCP, TCP), p.IP6, tags=(1, 2)), {"destination_port": 80, "version": 6}),
    ("options", p.eth(p.ip4(POD4, PEER4, p.TCP, TCP, options=bytes(40)), p.IP4), {"destination_port": 80}),
    ("AH", p.frame(POD6, PEER6, 51, p.authentication(p.UDP, p.udp(5, 6))), {"protocol": 17, "destination_port": 6}),
    ("routing", p.frame(POD6, PEER6, 43, p.extension(p.TCP, TCP, length=2)), {"protocol": 6, "source_port": 1000}),
    ("an atomic fragment", p.frame(POD6, PEER6, 44, p.fragment6(p.TCP, TCP)), {"place": Place.WHOLE, "protocol": 6}),
    (
        "a first fragment",
        p.eth(p.ip4(POD4, PEER4, p.UDP, p.udp(5, 6, bytes(16)), more=True, identification=9), p.IP4),
        {"place": Place.FIRST, "identification": 9, "covered": 8, "destination_port": 6},
    ),
    (
        "a later fragment",
        p.frame(POD6, PEER6, 44, p.fragment6(p.UDP, bytes(16), offset=64, identification=9)),
        {"place": Place.LATER, "identification": 9, "offset": 64, "destination_port": 0},
    ),
    ("an echo request", p.frame(POD4, PEER4, p.ICMP, p.icmp(8, 0, 77)), {"kind": Kind.QUERY, "source_port": 77}),
    (
        "an echo reply",
        p.frame(POD6, PEER6, p.ICMPV6, p.icmp(129, 0, 77)),
        {"kind": Kind.ANSWER, "destination_port": 77},
    ),
    ("another family's ICMP", p.frame(POD6, PEER6, p.ICMP, p.icmp(8, 0, 77)), {"kind": Kind.NONE, "source_port": 0}),
    ("an error about nothing", p.frame(POD4, PEER4, p.ICMP, p.icmp(3)), {"kind": Kind.ERROR, "invoking": None}),
    ("IPv4 in IPv6", p.frame(POD6, PEER6, 4, p.ip4(POD4, PEER4, p.TCP, TCP)), {"protocol": 4, "destination_port": 0}),
    (
        "a mobility header is a protocol",
        p.frame(POD6, PEER6, 135, p.extension(p.UDP, p.udp(5, 6))),
        {"protocol": 135, "destination_port": 0},
    ),
    (
        "a first fragment covers TCP's options",
        p.eth(p.ip4(POD4, PEER4, p.TCP, p.tcp(5, 6, payload=bytes(24), words=10), more=True), p.IP4),
        {"covered": 40, "payload_bytes": 4},
    ),
    (
        "a first fragment covers SCTP's common header",
        p.eth(p.ip4(POD4, PEER4, p.SCTP, p.sctp(5, 6), more=True), p.IP4),
        {"covered": 12, "payload_bytes": 20},
    ),
    (
        "a first fragment covers headers behind the fragment header",
        p.frame(POD6, PEER6, 44, p.fragment6(60, p.extension(p.TCP, p.tcp(5, 6, words=6) + bytes(4)), more=True)),
        {"covered": 32, "payload_bytes": 0},
    ),
    ("an acknowledgement brings no data", p.frame(POD4, PEER4, p.TCP, p.tcp(5, 6, p.ACK)), {"payload_bytes": 0}),
    (
        "padding is no data",
        p.eth(p.ip4(POD4, PEER4, p.TCP, p.tcp(5, 6, p.ACK)) + bytes(6), p.IP4),
        {"payload_bytes": 0},
    ),
    (
        "a later fragment is all data",
        p.eth(p.ip4(POD4, PEER4, p.TCP, bytes(16), offset=24), p.IP4),
        {"payload_bytes": 16, "tcp_flags": 0, "covered": 0},
    ),
    (
        "neighbour discovery",
        p.eth(p.ip6("fe80::1", "ff02::1", p.ICMPV6, p.icmp(135, payload=b"target"), hops=255) + b"padding", p.IP6),
        {"hop_limit": 255, "icmp_type": 135, "message": p.icmp(135, payload=b"target"), "hardware_source": MAC},
    ),
    (
        "neighbour discovery in a fragment",
        p.frame("fe80::1", "ff02::1", 44, p.fragment6(p.ICMPV6, p.icmp(135), more=True)),
        {"place": Place.FIRST, "icmp_type": 135},
    ),
]


@pytest.mark.parametrize(("frame", "wanted"), [case[1:] for case in UNDERSTOOD], ids=[case[0] for case in UNDERSTOOD])
def test_facts(frame: bytes, wanted: dict[str, object]) -> None:
    """The fields that are parsed from a packet."""
    reason, facts = parse(frame)
    assert reason == ""
    assert {name: getattr(facts, name) for name in wanted} == wanted


def test_the_packet_that_an_error_is_about() -> None:
    """Addresses, protocol and ports of the inner packet are known; eight bytes of its payload suffice."""
    inner = p.ip4(POD4, PEER4, p.TCP, TCP)[:28]
    _, facts = parse(p.frame("192.0.2.1", POD4, p.ICMP, p.icmp(3, 4, payload=inner)))
    assert facts.invoking is not None
    assert facts.invoking.tuple == (bytes([10, 0, 0, 7]), bytes([10, 0, 0, 9]), 6, 1000, 80)
    _, facts = parse(p.frame("192.0.2.1", POD4, p.ICMP, p.icmp(3, 4, payload=inner[:27])))
    assert facts.invoking is None


def test_nothing_is_known_of_what_is_not_understood() -> None:
    """A frame that is no IP packet has no facts except its EtherType."""
    assert parse(p.eth(bytes(46), 0x88CC)) == ("non-ip", Facts(ethertype=0x88CC, hardware_source=MAC))


def test_a_frame_of_arp_is_kept_whole() -> None:
    """The parser keeps the bytes of the frame; another module judges its fields."""
    assert parse(p.eth(b"fields", p.ARP, tags=(5,)))[1].message == b"fields"


def test_packets_without_a_link_header() -> None:
    """A packet is parsed as after an Ethernet header, if its source address contains its protocol."""
    source = str(ip_address(world.POD[6]))
    packet = p.ip6(source, PEER6, p.UDP, p.udp(5, 6))
    reason, facts = parse(packet, has_link=False)
    assert (reason, facts) == (
        parse(p.eth(packet, p.IP6))[0],
        replace(parse(p.eth(packet, p.IP6))[1], hardware_source=b""),
    )
    assert parse(p.ip6("fd00::7", PEER6, p.UDP, p.udp(5, 6)), has_link=False)[0] == "non-ip"


@pytest.mark.parametrize("has_link", [True, False])
def test_generated_frames_are_mostly_understood(*, has_link: bool) -> None:
    """With and without link headers, the parser accepts most frames, so that the later rules are tested."""
    generator = Generator("understood", has_link=has_link)
    understood = sum(parse(generator.stimulus().frame, has_link=has_link)[0] in ("", "arp") for _ in range(FRAMES))
    assert understood > FRAMES // 2


def test_what_addresses_say_by_themselves() -> None:
    """The functions are right on each side of each bound."""
    packed = {text: ip_address(text).packed for text in BOUNDS}
    assert [text for text in BOUNDS if is_link_local(packed[text])] == ["fe80::", "febf:ffff::"]
    assert [text for text in BOUNDS if is_multicast(packed[text])] == [
        "ff02::1",
        "ff12::1",
        "ff22::1",
        "ff05::1",
        "ff00::",
        "224.0.0.0",
        "239.255.255.255",
    ]
    assert [text for text in BOUNDS if is_link_group(packed[text])] == ["ff02::1", "ff12::1", "ff22::1"]
    assert is_for_many(packed["255.255.255.255"])
    assert not is_for_many(packed["240.0.0.0"])
    assert [text for text in BOUNDS if Node().is_own(packed[text])] == ["127.0.0.0", "127.255.255.255"]
