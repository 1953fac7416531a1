# SPDX-License-Identifier: Apache-2.0
"""Packets about which the program and the reference once differed, or would if either forgot a rule of docs/packet-parsing.md.

Each is a short episode and the reasons that its frames end with, so that neither side can change its mind unnoticed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

import packets as p
from harness import Episode
from machine import Stimulus

POD4, POD6, FRIEND4, FRIEND6 = "10.0.0.7", "fd00::7", "10.0.0.9", "fd00::9"
FOE4, FOE6 = "10.0.0.66", "fd00::66"
"""Under the first variant: nobody may open anything to the pod at UDP 53, all else the friend may, and the pod to it."""


@dataclass(frozen=True)
class Regression:
    """Frames, and why each passes or is dropped."""

    name: str
    frames: tuple[tuple[Callable[[bytes], Stimulus], bytes], ...]
    reasons: tuple[str, ...]

    def episode(self) -> Episode:
        """As the harness runs it."""
        return Episode(tuple(where(frame) for where, frame in self.frames))


def out(frame: bytes) -> Stimulus:
    """From the workload."""
    return Stimulus(out_of_host=False, entered="elsewhere", frame=frame)


def into(frame: bytes) -> Stimulus:
    """Towards the workload, from elsewhere."""
    return Stimulus(out_of_host=True, entered="elsewhere", frame=frame)


def case(name: str, *steps: tuple[Callable[[bytes], Stimulus], bytes, str]) -> Regression:
    """A regression from (where, frame, reason) in order."""
    return Regression(name, tuple((where, frame) for where, frame, _ in steps), tuple(reason for *_, reason in steps))


def says4(total: int | None, protocol: int, body: bytes, *, source: str = POD4, destination: str = FRIEND4,
          **more: int) -> bytes:  # fmt: skip
    """An IPv4 frame that states a total length of its own."""
    packet = p.ip4(source, destination, protocol, body, total=total, **more)  # type: ignore[arg-type]  # ints only
    return p.eth(packet, p.IP4)


def says6(payload: int, protocol: int, body: bytes, *, source: str = POD6, destination: str = FRIEND6) -> bytes:
    """An IPv6 frame that states a payload length of its own."""
    packet = bytearray(p.ip6(source, destination, protocol, body))
    struct.pack_into("!H", packet, 4, payload)
    return p.eth(bytes(packet), p.IP6)


def option8(following: int) -> bytes:
    """The smallest destination options header."""
    return p.extension(following, b"")


def inner(source: str, destination: str, protocol: int, l4: bytes) -> bytes:
    """A packet as an ICMP error carries it."""
    return (p.ip4 if ip_address(source).version == 4 else p.ip6)(source, destination, protocol, l4)


UDP = p.udp(40000, 1000)
TCP = p.tcp(40000, 1000, p.ACK)
ERROR4 = p.icmp(3, 1, payload=inner(FRIEND4, POD4, p.UDP, p.udp(1000, 40000)))
OPEN4 = (into, p.frame(FRIEND4, POD4, p.UDP, p.udp(1000, 40000)), "policy-allow")
PING4 = (out, p.frame(POD4, FRIEND4, p.ICMP, p.icmp(8, 0, 0)), "policy-allow")
HIDDEN = p.fragment6(60, option8(p.UDP) + UDP, more=True)

REGRESSIONS = [
    # Lengths: nothing beyond the packet's own length counts.
    case("an IPv4 total length beyond the frame", (out, says4(60, p.UDP, UDP), "bad-ip")),
    case("an IPv4 total length before the ports", (out, says4(23, p.UDP, UDP), "bad-l4")),
    case("an IPv4 total length inside the TCP header", (out, says4(39, p.TCP, TCP), "bad-l4")),
    case("an IPv4 total length that leaves padding", (out, says4(40, p.TCP, TCP + bytes(6)), "policy-allow")),
    case("IPv4 options beyond the frame", (out, says4(0, 47, bytes(8), words=15), "bad-ip")),
    case("a fragment without a length", (out, says4(0, p.UDP, UDP, more=True), "bad-ip")),
    case("an IPv6 payload length beyond the frame", (out, says6(60, p.UDP, UDP), "bad-ip")),
    case("an IPv6 payload length before the ports", (out, says6(3, p.UDP, UDP), "bad-l4")),
    case("an IPv6 payload length of 0 (larger than 64 kB)", (out, says6(0, p.UDP, UDP), "policy-allow")),
    case("an IPv6 fragment without a length", (out, says6(0, 44, p.fragment6(p.UDP, UDP, more=True)), "bad-ip")),
    case("an extension header beyond the payload", (out, says6(12, 60, option8(60) + option8(47)), "short")),
    case(
        "an extension header that ends beyond the frame before a protocol without header",
        (out, says6(8, 60, struct.pack("!BB", 47, 3) + bytes(6)), "short"),
    ),
    case("a TCP header that ends beyond the packet", (out, says4(None, p.TCP, p.tcp(1, 2, words=6)), "bad-l4")),
    case("an SCTP header of eight bytes", (out, says4(None, p.SCTP, p.sctp(1, 2)[:8]), "bad-l4")),
    case("a UDP length that lies", (out, says4(None, p.UDP, struct.pack("!HHHH", 1, 2, 999, 0)), "policy-allow")),
    # Fragments: the ports that policy sees are those that the receiver will see.
    case(
        "ports in the padding of a first IPv6 fragment, others in the next one",
        (into, says6(16, 44, HIDDEN, source=FRIEND6, destination=POD6), "bad-l4"),
        (
            into,
            p.frame(FRIEND6, POD6, 44, p.fragment6(60, p.udp(40000, 53), offset=8)),
            "fragment",
        ),
    ),
    case(
        "a later IPv4 fragment over the TCP flags of the first",
        (out, says4(None, p.TCP, TCP + bytes(4), more=True), "policy-allow"),
        (out, says4(None, p.TCP, bytes(16), offset=8), "fragment"),
        (out, says4(None, p.TCP, bytes(16), offset=16), "fragment"),
        (out, says4(None, p.TCP, bytes(16), offset=24), "established"),
    ),
    case(
        "a later IPv6 fragment over the ports of the first",
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(60, option8(p.UDP) + UDP + bytes(7), more=True)), "policy-allow"),
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(60, p.udp(40000, 53), offset=8)), "fragment"),
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(60, bytes(8), offset=16)), "established"),
    ),
    case(
        "a fragment of a fragment",
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(44, p.fragment6(p.UDP, UDP), more=True)), "ip6-headers"),
    ),
    case(
        "the rest of a fragmented ICMP error is no error of its own",
        OPEN4,
        (out, says4(None, p.ICMP, ERROR4, more=True), "related"),
        (out, says4(None, p.ICMP, bytes(8) + ERROR4[8:], offset=48), "fragment"),
    ),
    # ICMP errors: about a connection, and to the one who sent what they are about.
    case(
        "an ICMP error to somebody else",
        OPEN4,
        (out, p.frame(POD4, FOE4, p.ICMP, ERROR4), "icmp-unrelated"),
        (out, p.frame(POD4, FRIEND4, p.ICMP, ERROR4), "related"),
    ),
    case(
        "an ICMPv6 error to somebody else",
        (into, p.frame(FRIEND6, POD6, p.UDP, p.udp(1000, 40000)), "policy-allow"),
        (
            out,
            p.frame(POD6, FOE6, p.ICMPV6, p.icmp(1, 4, payload=inner(FRIEND6, POD6, p.UDP, p.udp(1000, 40000)))),
            "icmp-unrelated",
        ),
    ),
    case(
        "an inner header of three words is not readable",
        OPEN4,
        (
            out,
            p.frame(POD4, FOE4, p.ICMP, p.icmp(3, 1, payload=p.ip4(FRIEND4, POD4, p.UDP, UDP, words=3))),
            "policy-deny",
        ),
    ),
    case(
        "an inner header in the padding is not readable",
        OPEN4,
        (out, says4(28, p.ICMP, ERROR4, destination=FOE4), "policy-deny"),
    ),
    # ICMP messages that are no answers ride on no query.
    case(
        "a router advertisement after an echo request with the identifier 0",
        PING4,
        (into, p.frame(FRIEND4, POD4, p.ICMP, p.icmp(9)), "policy-allow"),
    ),
    case(
        "an echo's connection answers with an echo reply only",
        (out, p.frame(POD4, FRIEND4, p.ICMP, p.icmp(8, 0, 77)), "policy-allow"),
        (into, p.frame(FRIEND4, POD4, p.ICMP, p.icmp(14, 0, 77)), "policy-allow"),
        (into, p.frame(FRIEND4, POD4, p.ICMP, p.icmp(0, 0, 77)), "established"),
    ),
]
