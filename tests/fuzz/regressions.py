# SPDX-License-Identifier: Apache-2.0
"""Packets at which the program and the reference once differed, or would if one of them ignored docs/packet-parsing.md.

Each case is a short episode with the reasons for its frames, so that neither side can change unnoticed. The cases about
senders and receivers are in regressions_border.py.
"""

from __future__ import annotations

import struct

import packets as p
from case_frames import (
    FOE4,
    FOE6,
    FRIEND4,
    FRIEND6,
    POD4,
    POD6,
    case,
    inner,
    into,
    option8,
    out,
    says4,
    says6,
)  # fmt: skip

UDP = p.udp(40000, 1000)
TCP = p.tcp(40000, 1000, p.ACK)
ERROR4 = p.icmp(3, 1, payload=inner(FRIEND4, POD4, p.UDP, p.udp(1000, 40000)))
OPEN4 = (into, p.frame(FRIEND4, POD4, p.UDP, p.udp(1000, 40000)), "policy-allow")
PING4 = (out, p.frame(POD4, FRIEND4, p.ICMP, p.icmp(8, 0, 0)), "policy-allow")
OPTIONS = p.tcp(40000, 1000, p.ACK, bytes(16), words=8)
HIDDEN = p.fragment6(60, option8(p.UDP) + UDP, more=True)

REGRESSIONS = [
    # Lengths: bytes beyond the packet's own length do not count.
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
    # Fragments: policy sees the same ports as the receiver.
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
    # ICMP errors: only about a connection, and only to the sender of the inner packet.
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
    # An ICMP message that is no answer does not belong to a query.
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
    # Headers that the receiver does not parse, and headers that it parses to their end.
    case(
        "ports behind a mobility header are none",
        (into, p.frame(FRIEND6, POD6, 135, p.extension(p.UDP, p.udp(40000, 53))), "policy-allow"),
    ),
    case(
        "an ICMP error about a packet with a mobility header",
        (into, p.frame(FRIEND6, POD6, 135, p.extension(p.UDP, UDP)), "policy-allow"),
        (
            out,
            p.frame(POD6, FRIEND6, p.ICMPV6, p.icmp(1, 4, payload=inner(FRIEND6, POD6, 135, p.extension(p.UDP, UDP)))),
            "related",
        ),
    ),
    case(
        "a later IPv4 fragment over the TCP options of the first",
        (out, says4(None, p.TCP, p.tcp(40000, 1000, p.ACK, bytes(24), words=10), more=True), "policy-allow"),
        *[(out, says4(None, p.TCP, bytes(16), offset=offset), "fragment") for offset in (24, 32)],
        (out, says4(None, p.TCP, bytes(16), offset=40), "established"),
    ),
    case(
        "a later IPv6 fragment over the TCP options of the first",
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(60, option8(p.TCP) + OPTIONS, more=True)), "policy-allow"),
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(60, bytes(8), offset=32)), "fragment"),
        (out, p.frame(POD6, FRIEND6, 44, p.fragment6(60, bytes(8), offset=40)), "established"),
    ),
]
