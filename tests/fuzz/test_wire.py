# SPDX-License-Identifier: Apache-2.0
"""The reference parser by itself; needs no kernel."""

from __future__ import annotations

import random

import packets as p
import pytest
from generate import Generator, runnable
from wire import IP4, IP6, Facts, Kind, Place, parse, u16

POD4, POD6, PEER4, PEER6 = "10.0.0.7", "fd00::7", "10.0.0.9", "fd00::9"
FRAMES = 4000


def generated(seed: str) -> list[bytes]:
    generator = Generator(seed)
    return [generator.stimulus().frame for _ in range(FRAMES)]


def test_any_bytes_are_parsed() -> None:
    """No frame raises, and one that is understood has addresses of its family."""
    chance = random.Random(3)
    for frame in [*generated("any"), *(chance.randbytes(chance.randrange(120)) for _ in range(FRAMES))]:
        reason, facts = parse(frame)
        assert reason or len(facts.source) == len(facts.destination) == {4: 4, 6: 16}[facts.version], frame.hex()


def test_padding_says_nothing() -> None:
    """Bytes after a packet that states its length change neither reason nor facts, whatever they are."""
    chance = random.Random(4)
    compared = 0
    for frame in generated("padding"):
        reason, facts = parse(frame)
        at = 14 + 4 * sum(u16(frame, at) in (0x8100, 0x88A8) for at in (12, 16) if len(frame) > at + 1)
        if reason or not u16(frame, at + (2 if facts.version == 4 else 4)):
            continue
        assert parse(frame + chance.randbytes(60)) == (reason, facts), frame.hex()
        compared += 1
    assert compared > FRAMES // 2


def test_the_same_seed_gives_the_same_frames() -> None:
    """A failure can be repeated by its numbers."""
    assert generated("1/2") == generated("1/2")
    assert generated("1/2") != generated("1/3")


@pytest.mark.parametrize("kind", [IP4, IP6])
def test_frames_that_the_kernel_would_refuse_get_a_tag(kind: int) -> None:
    """An IP frame without a whole header is still tried, behind a VLAN tag."""
    frame = runnable(bytes(12) + kind.to_bytes(2, "big") + bytes(10))
    assert frame[12:14] == b"\x81\x00"
    assert parse(frame)[0] == "short"


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
    ("neighbour discovery", p.frame("fe80::1", "ff02::1", p.ICMPV6, p.icmp(135)), {"is_neighbour": True}),
    (
        "neighbour discovery in a fragment",
        p.frame("fe80::1", "ff02::1", 44, p.fragment6(p.ICMPV6, p.icmp(135), more=True)),
        {"is_neighbour": False},
    ),
]


@pytest.mark.parametrize(("frame", "wanted"), [case[1:] for case in UNDERSTOOD], ids=[case[0] for case in UNDERSTOOD])
def test_facts(frame: bytes, wanted: dict[str, object]) -> None:
    """What is read from a packet."""
    reason, facts = parse(frame)
    assert reason == ""
    assert {name: getattr(facts, name) for name in wanted} == wanted


def test_the_packet_that_an_error_is_about() -> None:
    """Addresses, protocol and ports of the inner packet, of which eight bytes suffice."""
    inner = p.ip4(POD4, PEER4, p.TCP, TCP)[:28]
    _, facts = parse(p.frame("192.0.2.1", POD4, p.ICMP, p.icmp(3, 4, payload=inner)))
    assert facts.invoking is not None
    assert facts.invoking.tuple == (bytes([10, 0, 0, 7]), bytes([10, 0, 0, 9]), 6, 1000, 80)
    _, facts = parse(p.frame("192.0.2.1", POD4, p.ICMP, p.icmp(3, 4, payload=inner[:27])))
    assert facts.invoking is None


def test_nothing_is_known_of_what_is_not_understood() -> None:
    """A frame that is no IP packet has no facts but its EtherType."""
    assert parse(p.eth(bytes(46), 0x88CC)) == ("non-ip", Facts(ethertype=0x88CC))
