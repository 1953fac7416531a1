# SPDX-License-Identifier: Apache-2.0
"""Cases about the allowed senders and receivers of packets, for both sides of each rule of docs/packet-parsing.md.

Unless a case says otherwise: under the first variant, policy allows packets between the pod and its friend, except UDP
port 53 to the pod, and denies packets for others that arrive here.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address

import packets as p
import world
from case_frames import (
    FOE4,
    FOE6,
    FRIEND4,
    FRIEND6,
    OTHER_MAC,
    POD4,
    POD6,
    Regression,
    Where,
    arp,
    by_host,
    case,
    discovery,
    into,
    listener,
    mac_option,
    out,
)  # fmt: skip
from episodes import Hairpin, Moves, Routes, TimedOut
from machine import State

SECOND4, SECOND6 = world.texts(world.SECOND)
BORROWED4, BORROWED6 = world.texts(world.BORROWED)
SIBLING4, SIBLING6 = world.texts(world.SIBLING)
OTHER4, OTHER6 = world.texts(world.OTHER)
GONE4, _ = world.texts(world.GONE)
NODE4, NODE6 = world.texts(world.NODE)
NODE_PORT4, NODE_PORT6 = world.texts(world.NODE_PORT)
RANGE4, RANGE6 = world.texts(world.NODE_RANGE)
OTHER_NODE4, OTHER_NODE6 = world.texts(world.OTHER_NODE)
BROADCAST = str(ip_address(world.BROADCAST))
POD_LINK, SIBLING_LINK, GONE_LINK, FREE_LINK, NODE_LINK, NODE_PORT_LINK = (
    str(ip_address(address))
    for address in (
        world.POD_LINK, world.SIBLING_LINK, world.GONE_LINK, world.FREE_LINK, world.NODE_LINK, world.NODE_PORT_LINK,
    )
)  # fmt: skip
ALL, GROUP, ROUTED = "ff02::1", "ff02::1:ff00:9", "2a00:1:86dd::9"
NONCE = bytes((14, 1)) + b"random"
OWN1, OWN2 = mac_option(1), mac_option(2)


def single(name: str, frame: bytes, reason: str, where: Where = out, **scene: bool) -> Regression:
    """A case of one frame, from a workload at a bridge unless another hook or scene is given."""
    return case(name, (where, frame, reason), **{"is_bridged": not scene.get("is_host"), **scene})


def first6(source: str, destination: str, following: int, body: bytes, *, more: bool = True) -> bytes:
    """A first fragment. ``more`` False: an atomic fragment."""
    return p.eth(p.ip6(source, destination, 44, p.fragment6(following, body, more=more), hops=255), p.IP6)


def behind(first: int, frame: bytes) -> bytes:
    """The IPv6 packet of a frame, with an extension header of 8 bytes before its payload."""
    header = bytes((frame[20], 0, 1, 4, 0, 0, 0, 0))
    size = len(frame) - 54 + len(header)
    return frame[:18] + size.to_bytes(2, "big") + bytes((first,)) + frame[21:54] + header + frame[54:]


def shortened(frame: bytes, size: int) -> bytes:
    """The IPv6 packet of a frame, without ``size`` bytes at its end."""
    return frame[:18] + (len(frame) - 54 - size).to_bytes(2, "big") + frame[20:-size]


def without_alert(frame: bytes) -> bytes:
    """A listener discovery message directly after the IPv6 header."""
    return frame[:18] + (len(frame) - 62).to_bytes(2, "big") + bytes((p.ICMPV6,)) + frame[21:54] + frame[62:]


def bare(frame: bytes) -> bytes:
    """The packet without its link header."""
    return frame[14:]


def udp(source: str, destination: str, source_port: int = 40000, destination_port: int = 1000) -> bytes:
    """A datagram that is long enough for a run without a link header."""
    return p.frame(source, destination, p.UDP, p.udp(source_port, destination_port, bytes(8)))


ROUTER = struct.pack("!BBHI", 134, 0, 0, 0) + bytes(8)
DISCOVERY = [
    single("asks for a neighbour", discovery(135, POD6, GROUP, NODE_LINK, OWN1), "neighbour"),
    single("asks for a workload beside it", discovery(135, POD6, GROUP, SIBLING6, OWN1), "neighbour"),
    single("asks for the node", discovery(135, POD6, GROUP, NODE6), "neighbour"),
    single("asks for the node, at no bridge", discovery(135, POD6, GROUP, NODE_PORT6), "neighbour", is_bridged=False),
    single("asks for the node elsewhere", discovery(135, POD6, GROUP, NODE_PORT6), "neighbour"),
    single("asks for the bridge, at none", discovery(135, POD6, GROUP, NODE6), "neighbour", is_bridged=False),
    single("asks for a workload elsewhere", discovery(135, POD6, GROUP, OTHER6), "policy-deny"),
    single(
        "asks for a workload at a bridge, at none",
        discovery(135, POD6, GROUP, SIBLING6),
        "policy-deny",
        is_bridged=False,
    ),
    single("asks for what is routed", discovery(135, POD6, GROUP, ROUTED), "policy-deny"),
    single("asks for its own address", discovery(135, "::", "ff02::1:ff00:7", POD6, NONCE), "neighbour"),
    single("asks for a link-local address of nobody", discovery(135, "::", GROUP, FREE_LINK), "neighbour"),
    single("asks for one of a workload that is gone", discovery(135, "::", GROUP, GONE_LINK), "neighbour"),
    single("claims another's address", discovery(135, "::", GROUP, FRIEND6), "link-forged"),
    single("claims another's link-local address", discovery(135, "::", GROUP, SIBLING_LINK), "link-forged"),
    single("claims the node's link-local address", discovery(135, "::", GROUP, NODE_PORT_LINK), "link-forged"),
    single("asks a neighbour itself", discovery(135, FREE_LINK, NODE_LINK, NODE_LINK, OWN1), "neighbour"),
    single("asks the node itself", discovery(135, POD6, NODE6, NODE6), "neighbour"),
    single("asks a group with flags", discovery(135, POD6, "ff12::9", NODE_LINK), "neighbour"),
    single("asks a group that is routed", discovery(135, POD6, "ff05::1", NODE_LINK), "policy-deny"),
    single("asks a group of the interface", discovery(135, POD6, "ff01::1", NODE_LINK), "policy-deny"),
    single("asks where it is routed", discovery(135, POD6, ROUTED, NODE_LINK), "policy-deny"),
    single("asks a friend who is not on the link", discovery(135, POD6, FRIEND6, NODE_LINK), "policy-allow"),
    single("was routed", discovery(135, POD6, GROUP, NODE_LINK, hops=254), "policy-deny"),
    single("with a code", discovery(135, POD6, GROUP, NODE_LINK, code=1), "policy-deny"),
    single("answers for itself", discovery(136, POD6, NODE_LINK, POD6, OWN2), "neighbour"),
    single("answers for its link-local address", discovery(136, POD_LINK, ALL, POD_LINK, OWN2), "neighbour"),
    single("answers for a borrowed address", discovery(136, BORROWED6, ALL, BORROWED6), "neighbour"),
    single("answers for another", discovery(136, POD6, ALL, SIBLING6, OWN2), "link-forged"),
    single("answers for the node", discovery(136, POD6, ALL, NODE_LINK, OWN2), "link-forged"),
    single("answers for nobody", discovery(136, "::", ALL, "::"), "link-forged"),
    single("answers for another where it is routed", discovery(136, POD6, ROUTED, SIBLING6, OWN2), "link-forged"),
    single("answers for another behind a header", behind(60, discovery(136, POD6, ALL, SIBLING6)), "link-forged"),
    single("answers for another before a trailer", discovery(136, POD6, ALL, SIBLING6) + b"trailer", "link-forged"),
    single("answers for another as if routed", discovery(136, POD6, ALL, SIBLING6, hops=64), "policy-deny"),
    single("answers for itself where it is routed", discovery(136, POD6, ROUTED, POD6, OWN2), "policy-deny"),
    single("answers for itself behind a header", behind(60, discovery(136, POD6, ALL, POD6)), "policy-deny"),
    single("answers without a target", discovery(136, POD6, ALL, None, bytes(15)), "policy-deny"),
    single("answers as another", discovery(136, SIBLING6, ALL, SIBLING6), "link-forged"),
    single("answers from another's address", discovery(136, SIBLING6, ALL, POD6), "spoofed"),
    single("asks from another's address", discovery(135, SIBLING6, GROUP, NODE_LINK), "spoofed"),
    single("asks from another's link-local address", discovery(135, SIBLING_LINK, GROUP, NODE_LINK), "spoofed"),
    single("seeks routers", discovery(133, FREE_LINK, "ff02::2", None, OWN1), "neighbour"),
    single("seeks routers from nowhere", discovery(133, "::", "ff02::2"), "neighbour"),
    single("seeks routers from nowhere with an address", discovery(133, "::", "ff02::2", None, OWN1), "spoofed"),
    single("three options", discovery(135, POD6, GROUP, NODE_LINK, OWN1 + NONCE + OWN2), "neighbour"),
    single("four options", discovery(135, POD6, GROUP, NODE_LINK, NONCE * 4), "policy-deny"),
    single(
        "another's hardware address", discovery(135, POD6, GROUP, NODE_LINK, mac_option(1, OTHER_MAC)), "policy-deny"
    ),
    single(
        "an option that nobody knows", discovery(135, POD6, GROUP, NODE_LINK, bytes((9, 1)) + bytes(6)), "policy-deny"
    ),
    single("an option of 16 bytes", discovery(135, POD6, GROUP, NODE_LINK, bytes((14, 2)) + bytes(14)), "policy-deny"),
    single("an option of no bytes", discovery(135, POD6, GROUP, NODE_LINK, bytes(8)), "policy-deny"),
    single("bytes that are no option", discovery(135, POD6, GROUP, NODE_LINK, b"secret"), "policy-deny"),
    single("bytes behind the packet's own end", discovery(135, POD6, GROUP, NODE_LINK) + b"secret", "policy-deny"),
    single("behind an extension header", behind(0, discovery(135, POD6, GROUP, NODE_LINK)), "policy-deny"),
    single("in a first fragment", first6(POD6, ALL, p.ICMPV6, discovery(136, POD6, ALL, POD6)[54:]), "policy-deny"),
    single(
        "in an atomic fragment",
        first6(POD6, ALL, p.ICMPV6, discovery(136, POD6, ALL, POD6)[54:], more=False),
        "policy-deny",
    ),
    single("reports groups", listener(143, FREE_LINK), "neighbour"),
    single("reports a group from nowhere", listener(131, "::", GROUP), "neighbour"),
    single("leaves a group", listener(132, POD_LINK, "ff02::2"), "neighbour"),
    single("asks for groups", listener(130, POD_LINK, ALL), "neighbour"),
    single("reports from another's link-local address", listener(143, SIBLING_LINK), "spoofed"),
    single("reports from its own address", listener(143, POD6), "policy-deny"),
    single("reports to one", listener(143, POD_LINK, NODE_LINK), "policy-deny"),
    single("reports as if routed", listener(143, POD_LINK, hops=2), "policy-deny"),
    single("reports with a code", listener(143, POD_LINK, code=1), "policy-deny"),
    single("reports no groups", shortened(listener(143, POD_LINK, records=0), 20), "neighbour"),
    single("reports more groups than it counts", listener(143, POD_LINK, records=0), "policy-deny"),
    single("reports fewer groups than it counts", listener(143, POD_LINK, records=2), "policy-deny"),
    single("a report with bytes at its end", listener(131, POD_LINK, rest=b"more"), "policy-deny"),
    single("a query of version 2", listener(130, POD_LINK, rest=bytes(4)), "neighbour"),
    single("a query of version 2 with a source", listener(130, POD_LINK, rest=bytes(20)), "policy-deny"),
    single("a report with another alert", listener(143, POD_LINK, alert=b"\5\2\0\1\1\0"), "policy-deny"),
    single("a report with an option of its own", listener(143, POD_LINK, alert=b"\x1e\4text"), "policy-deny"),
    single("a report with an alert to the destination", listener(143, POD_LINK, first=60), "policy-deny"),
    single("a report without an alert", without_alert(listener(143, POD_LINK)), "neighbour"),
    single("a report with padding", listener(143, POD_LINK) + bytes(2), "policy-deny"),
    single("a report towards a workload, with more", listener(131, POD_LINK, rest=b"more"), "neighbour", into),
    single("towards a workload", discovery(136, FREE_LINK, POD6, NODE_LINK), "neighbour", into),
    single("towards a workload, routed", discovery(136, FRIEND6, POD6, POD6, hops=64), "policy-allow", into),
    single("a report towards a workload", listener(143, SIBLING_LINK), "neighbour", into),
    single("a report towards a workload from an address", listener(143, SIBLING6), "policy-allow", into),
    single("a router towards a workload", discovery(134, NODE_LINK, ALL), "policy-allow", into),
    single("from the wire to the node", discovery(135, FRIEND6, NODE6, NODE6), "neighbour", is_host=True),
    single("from the wire through the node", discovery(135, FRIEND6, SIBLING6, NODE6), "policy-allow", is_host=True),
    single("from the wire, routed", discovery(135, FRIEND6, NODE6, NODE6, hops=64), "policy-allow", is_host=True),
    single("to the wire", discovery(136, NODE6, ROUTED, SIBLING6), "neighbour", into, is_host=True),
]
FORGED = [
    single("is a router", discovery(134, POD6, ALL), "link-forged"),
    single("is a router, of any hop limit and code", discovery(134, FREE_LINK, ALL, hops=1, code=3), "link-forged"),
    single("is a router in the name of another", discovery(134, NODE_LINK, ALL), "link-forged"),
    single("is a router in a first fragment", first6(POD6, FRIEND6, p.ICMPV6, ROUTER), "link-forged"),
    single("redirects", discovery(137, FREE_LINK, ALL, SIBLING6), "link-forged"),
    single("redirects IPv4", p.frame(POD4, FRIEND4, p.ICMP, p.icmp(5, 1)), "link-forged"),
    single("redirects IPv6 with the type of IPv4", discovery(5, POD6, FRIEND6), "policy-allow"),
    single("serves addresses", udp(POD4, "255.255.255.255", 67, 68), "link-forged"),
    single("serves one address", udp(POD4, FRIEND4, 67, 68), "link-forged"),
    single("serves addresses in the name of another", udp(FOE4, POD4, 67, 68), "link-forged"),
    single("serves IPv6 addresses", udp(FREE_LINK, ALL, 547, 546), "link-forged"),
    single("serves IPv6 addresses from the ports of IPv4", udp(POD6, FRIEND6, 67, 68), "policy-allow"),
    case(
        "serves addresses in fragments",
        (out, p.eth(p.ip4(POD4, FRIEND4, p.UDP, p.udp(67, 68, bytes(16)), more=True), p.IP4), "link-forged"),
        (out, p.eth(p.ip4(POD4, FRIEND4, p.UDP, bytes(16), offset=24), p.IP4), "fragment"),
    ),
    case("is served", (into, udp(FRIEND4, POD4, 67, 68), "policy-allow")),
    case(
        "is a router that is known as one",
        Routes(on=True),
        (out, discovery(134, POD6, ALL), "policy-deny"),
        (out, discovery(137, POD6, FRIEND6, SIBLING6), "policy-allow"),
        (out, discovery(136, POD6, ALL, SIBLING6), "policy-deny"),
        (out, udp(POD4, FRIEND4, 67, 68), "policy-allow"),
        (out, p.frame(POD4, FRIEND4, p.ICMP, p.icmp(5, 1)), "policy-allow"),
        (out, arp(SIBLING4, FRIEND4, mac=OTHER_MAC), "arp"),
        (out, discovery(134, SIBLING6, ALL), "spoofed"),
        (into, udp(FRIEND4, OTHER4), "policy-allow"),
        is_bridged=True,
    ),
]
ARP = [
    single("ARP asks", arp(POD4, NODE4), "arp"),
    single("ARP answers", arp(POD4, NODE4, kind=2), "arp"),
    single("ARP asks whether its address is taken", arp("0.0.0.0", POD4), "arp"),
    single("ARP for a borrowed address", arp(BORROWED4, NODE4), "arp"),
    single("ARP behind a tag", p.eth(arp(POD4, NODE4)[14:], p.ARP, tags=(5,)), "arp"),
    single("ARP in the name of another", arp(SIBLING4, POD4, kind=2), "link-forged"),
    single("ARP asks for another", arp("0.0.0.0", SIBLING4), "link-forged"),
    single("ARP with another's hardware address", arp(POD4, NODE4, mac=OTHER_MAC), "link-forged"),
    single("ARP of other hardware", arp(POD4, NODE4, hardware=6), "link-forged"),
    single("ARP of another protocol", arp(POD4, NODE4, protocol=p.IP6), "link-forged"),
    single("ARP with other lengths", arp(POD4, NODE4, sizes=b"\4\6"), "link-forged"),
    single("ARP cut short", arp(POD4, NODE4)[:-1], "link-forged"),
    single("ARP with padding", arp(POD4, NODE4) + bytes(18), "arp"),
    single("ARP with more padding than a frame needs", arp(POD4, NODE4) + bytes(19), "link-forged"),
    single("ARP with less padding than a frame needs", arp(POD4, NODE4) + bytes(17), "link-forged"),
    single("ARP with padding that says something", arp(POD4, NODE4) + bytes(17) + b"!", "link-forged"),
    single("ARP towards a workload", arp(SIBLING4, POD4, mac=OTHER_MAC), "arp", into),
    single("ARP from the wire", arp(SIBLING4, POD4, mac=OTHER_MAC), "arp", is_host=True),
]
WHOSE = [
    case("a link-local source that the node alone gets", (out, udp(FREE_LINK, FRIEND6), "policy-allow")),
    case(
        "a link-local source at a bridge",
        (out, udp(FREE_LINK, FRIEND6), "spoofed"),
        (out, udp(FREE_LINK, NODE_PORT_LINK), "spoofed"),
        (out, udp(FREE_LINK, ALL), "spoofed"),
        (out, udp(FREE_LINK, NODE_LINK), "policy-deny"),
        (out, udp(FREE_LINK, NODE6), "policy-deny"),
        (out, udp(POD_LINK, FRIEND6), "policy-allow"),
        (out, udp(FREE_LINK, "ff02::1:2", 546, 547), "dhcp"),
        (out, udp(FREE_LINK, "ff02::1:3", 546, 547), "spoofed"),
        (out, udp("::", "ff02::1:2", 546, 547), "spoofed"),
        is_bridged=True,
    ),
    case(
        "what is delivered to a workload",
        (into, udp(FRIEND4, BORROWED4), "policy-allow"),
        (into, udp(FRIEND4, BROADCAST), "policy-allow"),
        (into, udp(FRIEND4, "255.255.255.255"), "policy-allow"),
        (into, udp(FRIEND4, "224.0.0.251"), "policy-allow"),
        (into, udp(FRIEND6, "ff05::fb"), "policy-allow"),
        (into, udp(FRIEND6, SIBLING_LINK), "policy-allow"),
        (into, udp(FRIEND4, SIBLING4), "misdelivered"),
        (into, udp(FRIEND6, FOE6), "misdelivered"),
        (into, udp(FRIEND4, NODE4), "misdelivered"),
        (into, udp(FRIEND6, RANGE6), "misdelivered"),
        (into, udp(FRIEND4, "127.0.0.1"), "misdelivered"),
        (by_host, udp(NODE4, SIBLING4), "misdelivered"),
        (into, udp(SIBLING4, "255.255.255.255", 68, 67), "misdelivered"),
        (into, udp(SIBLING_LINK, "ff02::1:2", 546, 547), "misdelivered"),
        (into, udp(SIBLING_LINK, "ff02::1:3", 546, 547), "policy-allow"),
        (into, p.frame(FRIEND4, SIBLING4, p.ICMP, p.icmp(3, 1, payload=udp(SIBLING4, FRIEND4)[14:])), "misdelivered"),
    ),
    case(
        "an address that moves away takes no open connection with it, until something ends",
        Moves(here=True),
        (into, udp(FRIEND4, SECOND4), "policy-allow"),
        (out, udp(SECOND4, FRIEND4, 1000, 40000), "established"),
        Moves(here=False),
        (into, udp(FRIEND4, SECOND4), "established"),
        (out, udp(SECOND4, FRIEND4, 1000, 40000), "established"),
        (out, udp(SECOND4, FRIEND4, 1000, 40001), "spoofed"),
        (into, udp(FRIEND4, SECOND4, 40001), "misdelivered"),
        Moves(here=True),
        (out, udp(SECOND4, FRIEND4, 1000, 40001), "policy-allow"),
    ),
    *[
        case(
            f"{name} to a node",
            *[(out, p.frame(POD4, to, protocol, body), "tunnel") for to in (NODE4, NODE_PORT4, RANGE4, OTHER_NODE4)],
            *[(out, p.frame(POD4, to, protocol, body), "tunnel") for to in (BROADCAST, "224.0.0.1", "255.255.255.255")],
            (out, p.frame(POD4, "127.0.0.2", protocol, body), "tunnel"),
            (out, p.frame(POD4, FRIEND4, protocol, body), "policy-allow"),
            (out, p.frame(POD6, OTHER_NODE6, protocol, body), "tunnel"),
            (out, p.frame(FOE4, NODE4, protocol, body), "spoofed"),
            (into, p.frame(FRIEND4, "224.0.0.1", protocol, body), "policy-allow"),
        )
        for name, protocol, body in (
            ("VXLAN", p.UDP, p.udp(40000, 4789)),
            ("IPIP", 4, p.ip4(POD4, FRIEND4, p.UDP, p.udp(1, 2))),
            ("GRE", 47, bytes(8)),
        )
    ],
    case("6in4, which no device here takes, to a node", (out, p.frame(POD4, NODE4, 41, bytes(40)), "policy-deny")),
    case("a tunnel from the wire", (out, udp(FRIEND4, NODE4, 1, 4789), "policy-allow"), is_host=True),
    case(
        "VXLAN in fragments",
        (out, p.eth(p.ip4(POD4, NODE4, p.UDP, p.udp(1, 4789, bytes(16)), more=True), p.IP4), "tunnel"),
        (out, p.eth(p.ip4(POD4, NODE4, p.UDP, bytes(16), offset=24), p.IP4), "fragment"),
    ),
    case(
        "the source of this node or a workload of it, from outside",
        (out, udp(SIBLING4, FRIEND4), "foreign-source"),
        (out, udp(OTHER6, FRIEND6), "foreign-source"),
        (out, p.eth(p.ip4(OTHER4, FRIEND4, p.UDP, bytes(16), offset=24), p.IP4), "foreign-source"),
        (out, discovery(135, OTHER6, NODE6, NODE6), "neighbour"),
        (out, udp(GONE4, FRIEND4), "policy-allow"),
        (out, udp(NODE4, FRIEND4), "foreign-source"),
        (out, udp(RANGE6, FRIEND6), "foreign-source"),
        (out, udp("127.0.0.1", FRIEND4), "foreign-source"),
        (out, udp(NODE_LINK, FRIEND6), "policy-allow"),
        (out, udp(OTHER_NODE4, FRIEND4), "policy-allow"),
        (out, udp(SIBLING_LINK, FRIEND6), "foreign-source"),
        (out, udp(FRIEND4, SIBLING4), "policy-allow"),
        (into, udp(SIBLING4, FRIEND4, 3), "policy-allow"),
        Hairpin(on=True),
        (out, udp(SIBLING4, FRIEND4), "policy-allow"),
        is_host=True,
        is_outside=True,
    ),
    case(
        "the source of a workload of another node, out of a tunnel that tells who sent it",
        (out, udp(FOE4, FRIEND4), "tunnel-source"),
        (out, udp(FOE6, FRIEND6), "tunnel-source"),
        (out, p.eth(p.ip4(FOE4, FRIEND4, p.UDP, bytes(16), offset=24), p.IP4), "tunnel-source"),
        (out, udp(SIBLING4, FRIEND4), "foreign-source"),
        (out, udp(FRIEND4, SIBLING4), "policy-allow"),
        (into, udp(FOE4, FRIEND4, 3), "policy-allow"),
        Hairpin(on=True),
        (out, udp(FOE4, FRIEND4), "policy-deny"),
        is_host=True,
        is_outside=True,
        is_external=True,
    ),
    case(
        "the source of a workload of this node, from inside",
        (out, udp(SIBLING4, FRIEND4), "policy-allow"),
        is_host=True,
    ),
]
CLOSED = frozenset({State.TCP_CLOSING, State.TCP_RESET})


def tcp(where: Where, flags: int, *, to: int = 80, data: bytes = b"", own: str = POD4) -> tuple[Where, bytes]:
    """A segment between port 1000 of the pod and the friend."""
    if where is out:
        return where, p.frame(own, FRIEND4, p.TCP, p.tcp(1000, to, flags, data))
    return where, p.frame(FRIEND4, own, p.TCP, p.tcp(to, 1000, flags, data))


ENDS = {
    "reset": [(*tcp(into, p.RST), "established")],
    "closed by both": [(*tcp(into, p.FIN | p.ACK), "established"), (*tcp(out, p.FIN | p.ACK), "established")],
}
CLOSINGS = [
    one
    for name, end in ENDS.items()
    for one in (
        case(
            f"a connection that seems {name} lives as long as an open one",
            (*tcp(out, p.SYN), "policy-allow"),
            (*tcp(into, p.SYN | p.ACK), "established"),
            *end,
            TimedOut(CLOSED),
            (*tcp(into, p.ACK), "established"),
            TimedOut(frozenset({State.TCP_OPEN})),
            (*tcp(into, p.ACK, to=81), "policy-allow"),
            (*tcp(into, p.ACK), "policy-allow"),
        ),
        *(
            case(
                f"{what} in a connection that seems {name}",
                Moves(here=True),
                (*tcp(out, p.SYN, own=SECOND4), "policy-allow"),
                (*tcp(into, p.SYN | p.ACK, own=SECOND4), "established"),
                *[(where, frame.replace(world.POD[4], world.SECOND[4]), reason) for where, frame, reason in end],
                (*tcp(into, p.ACK, own=SECOND4, data=data), "established"),
                Moves(here=False),
                (*tcp(out, p.ACK, own=SECOND4), after),
            )
            for what, data, after in (("data", b"data", "established"), ("no data", b"", "spoofed"))
        ),
    )
]
TAILS = [
    case(
        "a packet of the node in the middle of a connection opens the way back, unless a process listens",
        (by_host, p.frame(FOE4, POD4, p.TCP, p.tcp(world.LISTENING_PORT, 1000, p.ACK)), "host"),
        (out, p.frame(POD4, FOE4, p.TCP, p.tcp(1000, world.LISTENING_PORT, p.ACK)), "policy-deny"),
        (by_host, p.frame(FOE4, POD4, p.TCP, p.tcp(81, 1000, p.ACK)), "host"),
        (out, p.frame(POD4, FOE4, p.TCP, p.tcp(1000, 81, p.ACK)), "established"),
        (by_host, p.frame(FOE4, POD4, p.TCP, p.tcp(world.LISTENING_PORT, 1001, p.SYN)), "host"),
        (out, p.frame(POD4, FOE4, p.TCP, p.tcp(1001, world.LISTENING_PORT, p.SYN | p.ACK)), "established"),
    ),
]
AT_6 = bare(discovery(135, POD6, GROUP, POD_LINK, OWN1))[6:12]
"""The bytes of that packet at the place of the source address in an Ethernet header."""
BARE = [
    case(
        "packets without a link header",
        (out, bare(udp(POD4, FRIEND4)), "policy-allow"),
        (into, bare(udp(FRIEND4, POD4, 1000, 40000)), "established"),
        (out, bare(udp(POD6, FRIEND6)), "policy-allow"),
        (out, bare(udp(FOE4, FRIEND4)), "spoofed"),
        (out, bare(udp("203.0.113.9", FRIEND4)), "non-ip"),
        (out, bare(discovery(135, POD6, GROUP, POD_LINK)), "neighbour"),
        (out, bare(discovery(135, POD6, GROUP, POD_LINK, NONCE)), "neighbour"),
        (out, bare(discovery(135, POD6, GROUP, POD_LINK, OWN1)), "policy-deny"),
        (out, bare(discovery(135, POD6, GROUP, POD_LINK, mac_option(1, AT_6))), "policy-deny"),
        (out, bare(discovery(136, POD6, GROUP, SIBLING6)), "link-forged"),
        has_link=False,
    ),
    case(
        "ARP without a link header has no sender that it could name",
        (out, struct.pack("!HH2s", 1, p.IP4, b"\6\4") + b"\x08\x06" * 4 + world.POD[4] + bytes(28), "link-forged"),
        has_link=False,
    ),
]  # fmt: skip
BORDER = [*DISCOVERY, *FORGED, *ARP, *WHOSE, *CLOSINGS, *TAILS, *BARE]
