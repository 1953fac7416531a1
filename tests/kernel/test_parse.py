# SPDX-License-Identifier: Apache-2.0
"""Which frames the program can parse, and what happens to all others."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import packets as p
import pytest
from rig import ALLOW, DENY, LO, PEER4, PEER6, PEER_IDENTITY, POD4, POD6, Rig, everything

from netpol_loader import abi
from netpol_loader.kernel.hook import Hook

pytestmark = pytest.mark.kernel

SYN = p.tcp(40000, 80)
OUT4 = p.ip4(POD4, PEER4, p.TCP, SYN)
OUT6 = p.ip6(POD6, PEER6, p.TCP, SYN)


def many_extensions(count: int) -> bytes:
    """A number of destination options headers before a TCP segment."""
    payload = SYN
    for index in range(count):
        payload = p.extension(60 if index else p.TCP, payload)
    return payload


OPEN_POLICY = [
    ("a plain IPv4 packet", p.eth(OUT4, p.IP4), "policy-allow"),
    ("a plain IPv6 packet", p.eth(OUT6, p.IP6), "policy-allow"),
    ("one VLAN tag", p.eth(OUT4, p.IP4, tags=(5,)), "policy-allow"),
    ("two VLAN tags", p.eth(OUT6, p.IP6, tags=(5, 6)), "policy-allow"),
    ("three VLAN tags are not IP", p.eth(OUT4, p.IP4, tags=(5, 6, 7)), "non-ip"),
    ("IPv4 options", p.eth(p.ip4(POD4, PEER4, p.TCP, SYN, options=bytes(40)), p.IP4), "policy-allow"),
    ("an unknown EtherType", p.eth(bytes(46), 0x88CC), "non-ip"),
    ("an IPv4 header cut short", p.eth(OUT4[:19], p.IP4, tags=(5,)), "short"),
    ("an IPv6 header cut short", p.eth(OUT6[:39], p.IP6, tags=(5,)), "short"),
    ("an IPv4 header of four words", p.eth(p.ip4(POD4, PEER4, p.TCP, SYN, words=4), p.IP4), "bad-ip"),
    ("IPv4 that says version 6", p.eth(p.ip4(POD4, PEER4, p.TCP, SYN, version=6), p.IP4), "bad-ip"),
    ("IPv6 that says version 4", p.eth(p.ip6(POD6, PEER6, p.TCP, SYN, version=4), p.IP6), "bad-ip"),
    ("a total length inside the header", p.eth(p.ip4(POD4, PEER4, p.TCP, SYN, total=19), p.IP4), "bad-ip"),
    ("a total length of 0 (larger than 64 kB)", p.eth(p.ip4(POD4, PEER4, p.TCP, SYN, total=0), p.IP4), "policy-allow"),
    ("TCP cut short", p.frame(POD4, PEER4, p.TCP, SYN[:19]), "bad-l4"),
    ("TCP with a header of four words", p.frame(POD4, PEER4, p.TCP, p.tcp(1, 2, words=4)), "bad-l4"),
    ("UDP cut short", p.frame(POD4, PEER4, p.UDP, p.udp(1, 2)[:7]), "bad-l4"),
    ("SCTP cut short", p.frame(POD6, PEER6, p.SCTP, p.sctp(1, 2)[:7]), "bad-l4"),
    ("ICMP cut short", p.frame(POD4, PEER4, p.ICMP, p.icmp(8)[:7]), "bad-l4"),
    ("options that reach beyond the frame", p.eth(p.ip4(POD4, PEER4, p.TCP, SYN, words=15, total=0), p.IP4), "bad-ip"),
    ("UDP", p.frame(POD6, PEER6, p.UDP, p.udp(1, 2)), "policy-allow"),
    ("SCTP", p.frame(POD4, PEER4, p.SCTP, p.sctp(1, 2)), "policy-allow"),
    ("an echo request", p.frame(POD4, PEER4, p.ICMP, p.icmp(8)), "policy-allow"),
    ("a protocol by number without payload", p.frame(POD4, PEER4, 47, b""), "policy-allow"),
    ("ESP over IPv6", p.frame(POD6, PEER6, 50, bytes(8)), "policy-allow"),
    ("hop-by-hop options", p.frame(POD6, PEER6, 0, p.extension(p.TCP, SYN, length=3)), "policy-allow"),
    ("an authentication header", p.frame(POD6, PEER6, 51, p.authentication(p.UDP, p.udp(1, 2))), "policy-allow"),
    ("an atomic fragment", p.frame(POD6, PEER6, 44, p.fragment6(p.TCP, SYN)), "policy-allow"),
    ("eight extension headers", p.frame(POD6, PEER6, 60, many_extensions(8)), "policy-allow"),
    ("nine extension headers", p.frame(POD6, PEER6, 60, many_extensions(9)), "ip6-headers"),
    ("an extension header beyond the frame", p.frame(POD6, PEER6, 60, p.extension(p.TCP, b"", length=200)), "short"),
    ("no next header", p.frame(POD6, PEER6, 59, b""), "no-next-header"),
    ("no next header after options", p.frame(POD6, PEER6, 60, p.extension(59, b"")), "no-next-header"),
    ("a later fragment of nothing", p.eth(p.ip4(POD4, PEER4, p.UDP, b"x" * 16, offset=64), p.IP4), "fragment"),
    (
        "a later IPv6 fragment of nothing",
        p.frame(POD6, PEER6, 44, p.fragment6(p.UDP, b"x" * 16, offset=64)),
        "fragment",
    ),
]


@pytest.mark.parametrize(("frame", "reason"), [case[1:] for case in OPEN_POLICY], ids=[case[0] for case in OPEN_POLICY])
def test_frames_from_a_workload(rig: Rig, frame: bytes, reason: str) -> None:
    """Under a policy that allows everything, a frame passes exactly if the program can parse it."""
    rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
    seen = rig.out(frame)
    assert seen.reason == reason
    number = next(one.number for one in abi.REASONS.values() if one.slug == reason)
    assert seen.passed == (not abi.REASONS[number].dropped)
    assert len(seen.events) == (not seen.passed), "a drop makes one event, a pass none"
    if seen.events:
        assert (seen.events[0].reason, seen.events[0].ifindex, seen.events[0].frame_bytes) == (number, LO, len(frame))


MAC, OTHER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000099")
"""The sender's hardware address in all frames, and another one."""
GROUP, NODE_LINK = "ff02::1:ff00:9", "fe80::1"
GATEWAY6 = "fd00:0:0:9::1"
ALERT = bytes.fromhex("050200000100")
"""A router alert for listener discovery, and padding."""


def discovery(
    kind: int,
    source: str,
    destination: str,
    target: str | None,
    options: bytes = b"",
    *,
    hops: int = 255,
    code: int = 0,
) -> bytes:
    """A neighbour discovery message; ``target`` None: a router solicitation, which has none."""
    body = bytes(4) + (b"" if target is None else ip_address(target).packed) + options
    return p.eth(p.ip6(source, destination, p.ICMPV6, struct.pack("!BBH", kind, code, 0) + body, hops=hops), p.IP6)


def listener(
    kind: int, source: str, destination: str, *, hops: int = 1, code: int = 0, body: bytes = b"", alert: bytes = ALERT
) -> bytes:
    """A listener discovery message behind a router alert, as the kernel sends it.

    ``body``: after the group or the records.
    """
    group = ip_address("ff02::1:ff00:7").packed
    rest = struct.pack("!HH", 0, 1) + struct.pack("!BBH", 4, 0, 0) + group if kind == 143 else bytes(4) + group
    message = struct.pack("!BBH", kind, code, 0) + rest + body
    options = bytes((p.ICMPV6, 0)) + alert
    return p.eth(p.ip6(source, destination, 0, options + message, hops=hops), p.IP6)


def mac_option(kind: int, mac: bytes = MAC) -> bytes:
    """A link-layer address option."""
    return bytes((kind, 1)) + mac


def report(*groups: str, head: tuple[int, int, int] = (4, 0, 0)) -> bytes:
    """An MLDv2 report. ``head``: type, auxiliary data length and number of sources in each record."""
    records = b"".join(struct.pack("!BBH", *head) + ip_address(group).packed for group in groups)
    message = struct.pack("!BBHHH", 143, 0, 0, 0, len(groups)) + records
    return p.eth(p.ip6("fe80::7", "ff02::16", 0, bytes((p.ICMPV6, 0)) + ALERT + message, hops=1), p.IP6)


NONCE = bytes((14, 1)) + b"random"
LINK = [
    ("asks for a neighbour", discovery(135, POD6, GROUP, NODE_LINK, mac_option(1)), "neighbour"),
    ("asks for its own address", discovery(135, "::", "ff02::1:ff00:7", POD6, NONCE), "neighbour"),
    ("asks for a link-local address that is nobody's", discovery(135, "::", GROUP, "fe80::9"), "neighbour"),
    ("asks from a link-local address", discovery(135, "fe80::7", NODE_LINK, NODE_LINK, mac_option(1)), "neighbour"),
    ("answers for itself", discovery(136, POD6, NODE_LINK, POD6, mac_option(2)), "neighbour"),
    ("answers for its link-local address", discovery(136, "fe80::7", "ff02::1", "fe80::7", mac_option(2)), "neighbour"),
    ("answers for a borrowed address", discovery(136, POD6, "ff02::1", "fd20::1", mac_option(2)), "neighbour"),
    ("seeks routers", discovery(133, "fe80::7", "ff02::2", None, mac_option(1)), "neighbour"),
    ("seeks routers from nowhere", discovery(133, "::", "ff02::2", None), "neighbour"),
    ("reports groups", listener(143, "fe80::7", "ff02::16"), "neighbour"),
    ("reports a group", listener(131, "::", "ff02::1:ff00:7"), "neighbour"),
    ("leaves a group", listener(132, "fe80::7", "ff02::2"), "neighbour"),
    ("was routed", discovery(135, POD6, GROUP, NODE_LINK, hops=254), "policy-deny"),
    ("to an address that is routed", discovery(135, POD6, "2001:db8::1", NODE_LINK), "policy-deny"),
    ("to a group that is routed", discovery(135, POD6, "ff05::1", NODE_LINK), "policy-deny"),
    ("with a code", discovery(135, POD6, GROUP, NODE_LINK, code=1), "policy-deny"),
    ("asks for a gateway that is elsewhere as well", discovery(135, POD6, GROUP, GATEWAY6, mac_option(1)), "neighbour"),
    ("answers a gateway that is elsewhere as well", discovery(136, POD6, GATEWAY6, POD6, mac_option(2)), "neighbour"),
    ("asks for an address that is routed", discovery(135, POD6, GROUP, "2001:db8::1"), "policy-deny"),
    (
        "with another's hardware address",
        discovery(135, POD6, GROUP, NODE_LINK, mac_option(1, OTHER_MAC)),
        "policy-deny",
    ),
    (
        "with an option that is not known",
        discovery(135, POD6, GROUP, NODE_LINK, bytes((9, 1)) + b"secret"),
        "policy-deny",
    ),
    ("with a long option", discovery(135, POD6, GROUP, NODE_LINK, bytes((14, 2)) + bytes(14)), "policy-deny"),
    ("with more options than are read", discovery(135, POD6, GROUP, NODE_LINK, NONCE * 4), "policy-deny"),
    ("with bytes that are no option", discovery(135, POD6, GROUP, NODE_LINK, b"secret"), "policy-deny"),
    ("from nowhere with a hardware address", discovery(133, "::", "ff02::2", None, mac_option(1)), "spoofed"),
    ("from another's address", discovery(135, PEER6, GROUP, NODE_LINK), "spoofed"),
    ("from the node's link-local address", discovery(136, NODE_LINK, "ff02::1", NODE_LINK), "link-forged"),
    ("for another", discovery(136, POD6, "ff02::1", PEER6, mac_option(2)), "link-forged"),
    ("for the node", discovery(136, POD6, "ff02::1", NODE_LINK, mac_option(2)), "link-forged"),
    ("claims another's address", discovery(135, "::", GROUP, PEER6), "link-forged"),
    ("is a router", discovery(134, POD6, "ff02::1", None), "link-forged"),
    ("redirects", discovery(137, "fe80::7", "ff02::1", PEER6), "link-forged"),
    ("reports to one", listener(131, "fe80::7", PEER6), "policy-deny"),
    ("reports as routed", listener(131, POD6, "ff02::16", hops=64), "policy-deny"),
    ("reports from its own address", listener(143, POD6, "ff02::16"), "policy-deny"),
    ("reports with a code", listener(143, POD6, "ff02::16", code=1), "policy-deny"),
    ("reports and more", listener(131, "fe80::7", "ff02::16", body=b"secret"), "policy-deny"),
    ("reports groups and more", listener(143, "fe80::7", "ff02::16", body=b"secret"), "policy-deny"),
    ("reports 32 groups", report(*[GROUP] * 32), "neighbour"),
    ("reports 33 groups", report(*[GROUP] * 33), "policy-deny"),
    ("reports what is no group", report(GROUP, POD6), "policy-deny"),
    ("reports with auxiliary data", report(GROUP, head=(4, 1, 0)), "policy-deny"),
    ("reports with sources", report(GROUP, head=(4, 0, 1)), "policy-deny"),
    ("reports behind other options", listener(131, "fe80::7", "ff02::16", alert=b"secret"), "policy-deny"),
    (
        "behind options",
        p.eth(
            p.ip6(POD6, GROUP, 60, p.extension(p.ICMPV6, discovery(135, POD6, GROUP, NODE_LINK)[54:]), hops=255), p.IP6
        ),
        "policy-deny",
    ),
    ("before a trailer", discovery(135, POD6, GROUP, NODE_LINK) + b"secret", "policy-deny"),
]


@pytest.mark.parametrize(("frame", "reason"), [case[1:] for case in LINK], ids=[case[0] for case in LINK])
def test_messages_of_the_link(rig: Rig, frame: bytes, reason: str) -> None:
    """A workload's link message passes before policy if it is well-formed and about the workload itself."""
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12), flags=abi.NP_ENDPOINT_SOURCES)
    rig.local(NODE_LINK)
    rig.local(GATEWAY6, ifindex=9998)  # the last of the interfaces that have it
    rig.source("fd20::/32")
    rig.endpoint(everything(3, DENY, 13), everything(4, DENY, 14), number=8, ifindex=9999)
    rig.address(PEER6, PEER_IDENTITY, 8)
    assert rig.out(frame).reason == reason


def test_a_workload_that_routes_may_speak_for_others(rig: Rig) -> None:
    """Policy judges the announcements of a workload that is a router, like everybody's."""
    rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12), flags=abi.NP_ENDPOINT_ROUTES)
    assert rig.out(discovery(134, POD6, "ff02::1", None)).reason == "policy-allow"
    assert rig.out(p.frame(POD4, "255.255.255.255", p.UDP, p.udp(67, 68))).reason == "policy-allow"
    assert rig.into(p.frame(PEER4, "192.0.2.1", p.UDP, p.udp(1, 2))).reason == "policy-deny"


TOWARDS = [
    (discovery(135, PEER6, "ff02::1:ff00:7", POD6), "neighbour"),
    (discovery(136, "fe80::1", POD6, "fe80::1"), "neighbour"),
    (listener(130, "fe80::1", "ff02::1"), "neighbour"),
    (discovery(135, PEER6, POD6, POD6, hops=64), "policy-deny"),
    (discovery(134, "fe80::1", "ff02::1", None), "policy-deny"),
]


@pytest.mark.parametrize(("frame", "reason"), TOWARDS)
def test_messages_of_the_link_towards_a_workload(rig: Rig, frame: bytes, reason: str) -> None:
    """Link messages with their required hop limit pass towards a workload; policy judges a router advertisement."""
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12))
    assert rig.into(frame).reason == reason


def arp(sender: str, target: str, *, mac: bytes = MAC, kind: int = 1, hardware: int = 1) -> bytes:
    """An ARP frame."""
    body = struct.pack("!HHBBH", hardware, p.IP4, 6, 4, kind) + mac + ip_address(sender).packed
    return p.eth(body + bytes(6) + ip_address(target).packed, p.ARP)


ARP = [
    ("asks", arp(POD4, PEER4), "arp"),
    ("asks whether its address is taken", arp("0.0.0.0", POD4), "arp"),
    ("answers", arp(POD4, PEER4, kind=2), "arp"),
    ("tells that it is there", arp(POD4, POD4), "arp"),
    ("for a borrowed address", arp("10.20.0.9", PEER4), "arp"),
    ("for another", arp(PEER4, POD4, kind=2), "link-forged"),
    ("asks for another", arp("0.0.0.0", PEER4), "link-forged"),
    ("with another's hardware address", arp(POD4, PEER4, mac=OTHER_MAC), "link-forged"),
    ("of other hardware", arp(POD4, PEER4, hardware=6), "link-forged"),
    ("cut short", arp(POD4, PEER4)[:40], "link-forged"),
    ("with padding", arp(POD4, PEER4) + bytes(18), "arp"),
    ("with something in it", arp(POD4, PEER4) + bytes(12) + b"secret", "link-forged"),
    ("with more", arp(POD4, PEER4) + bytes(100), "link-forged"),
]


@pytest.mark.parametrize(("frame", "reason"), [case[1:] for case in ARP], ids=[case[0] for case in ARP])
def test_arp_of_a_workload(rig: Rig, frame: bytes, reason: str) -> None:
    """A workload's ARP passes if its addresses are its own."""
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12), flags=abi.NP_ENDPOINT_SOURCES)
    rig.source("10.20.0.0/16")
    assert rig.out(frame).reason == reason
    assert rig.into(frame).reason == "arp"


MISDELIVERED = [
    (POD4, "policy-allow"), ("10.0.0.8", "misdelivered"), ("224.0.0.251", "policy-allow"), ("10.0.0.255", "policy-allow"),
    ("255.255.255.255", "policy-allow"), ("10.20.0.9", "policy-allow"), (POD6, "policy-allow"), ("fd00::8", "misdelivered"),
    ("ff02::fb", "policy-allow"), ("fd20::9", "policy-allow"), ("fe80::9", "policy-allow"),
]  # fmt: skip


@pytest.mark.parametrize(("destination", "reason"), MISDELIVERED)
def test_what_is_delivered_is_for_the_workload(rig: Rig, destination: str, reason: str) -> None:
    """A workload receives packets to its own and borrowed addresses, multicast and broadcast; others are dropped."""
    rig.pod(everything(1, ALLOW, 11), everything(2, DENY, 12), flags=abi.NP_ENDPOINT_SOURCES)
    rig.source("10.20.0.0/16")
    rig.source("fd20::/32")
    rig.local("10.0.0.255", flags=abi.NP_LOCAL_MANY)
    peer = PEER4 if "." in destination else PEER6
    assert rig.into(p.frame(peer, destination, p.UDP, p.udp(1, 2))).reason == reason


DHCP = [
    ("0.0.0.0", "255.255.255.255", 68, 67, "dhcp"),
    (POD4, "255.255.255.255", 68, 67, "dhcp"),
    (PEER4, "255.255.255.255", 68, 67, "spoofed"),
    ("0.0.0.0", "255.255.255.255", 67, 68, "link-forged"),
    (POD4, "255.255.255.255", 67, 68, "link-forged"),
    (POD4, "255.255.255.255", 68, 69, "policy-deny"),
    (POD4, PEER4, 68, 67, "policy-deny"),
    ("fe80::1", "ff02::1:2", 546, 547, "dhcp"),
    (POD6, "ff02::1:2", 546, 547, "dhcp"),
    ("::", "ff02::1:2", 546, 547, "spoofed"),
    (PEER6, "ff02::1:2", 546, 547, "spoofed"),
    ("fe80::1", "ff02::1:2", 547, 546, "link-forged"),
    ("fe80::1", "ff02::1:3", 546, 547, "policy-deny"),
    (POD6, "ff02::1:3", 546, 547, "policy-deny"),
    (POD6, PEER6, 546, 547, "policy-deny"),
]


@pytest.mark.parametrize(("source", "destination", "source_port", "destination_port", "reason"), DHCP)
def test_dhcp_of_a_workload(
    rig: Rig, source: str, destination: str, source_port: int, destination_port: int, reason: str
) -> None:
    """A workload may ask all DHCP servers on its link for an address, whatever policy says, and may not be a server."""
    rig.pod(everything(1, ALLOW, 11), everything(2, DENY, 12))
    assert rig.out(p.frame(source, destination, p.UDP, p.udp(source_port, destination_port))).reason == reason
    assert not rig.connections("np_unreplied4") | rig.connections("np_unreplied6")


def test_dhcp_fragment_is_no_request(rig: Rig) -> None:
    """A fragmented DHCP request does not pass, because later fragments could have any content."""
    rig.pod(everything(1, ALLOW, 11), everything(2, DENY, 12))
    first = p.eth(p.ip4("0.0.0.0", "255.255.255.255", p.UDP, p.udp(68, 67), more=True), p.IP4)
    assert rig.out(first).reason == "spoofed"


def test_messages_of_the_link_before_there_is_an_endpoint(rig: Rig) -> None:
    """Without an endpoint only an ARP probe passes, or a message in the name of a link-local address."""
    rig.endpoint(everything(3, DENY, 13), everything(4, DENY, 14), number=8, ifindex=9999)
    rig.address(PEER4, PEER_IDENTITY, 8)
    rig.local("10.0.0.1", NODE_LINK)
    for frame in (
        discovery(135, "::", "ff02::1:ff00:7", "fe80::7"),
        discovery(135, "fe80::7", GROUP, PEER6, mac_option(1)),
        discovery(133, "::", "ff02::2", None),
        listener(143, "::", "ff02::16"),
    ):
        assert rig.out(frame).reason == "neighbour"
    assert rig.out(arp("0.0.0.0", POD4)).reason == "arp"
    for frame in (
        discovery(135, POD6, GROUP, PEER6),
        discovery(136, POD6, "ff02::1", POD6),
        discovery(136, "fe80::7", "ff02::1", POD6),
        discovery(135, "fe80::7", "2001:db8::1", PEER6),
        arp(POD4, PEER4),
        *(arp("0.0.0.0", other) for other in (PEER4, "10.0.0.1")),
    ):
        assert rig.out(frame).reason == "unknown-endpoint"
    for hook in Hook:
        for packet in (p.eth(OUT4, p.IP4), p.eth(OUT6, p.IP6), p.eth(bytes(46), 0x88CC)):
            assert rig.send(hook, packet, ingress=0).reason == "unknown-endpoint"


def test_host_interface_passes_what_is_not_ip(rig: Rig) -> None:
    """A host endpoint's interface passes frames that are not IP."""
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12), flags=abi.NP_ENDPOINT_HOST)
    assert rig.out(p.eth(bytes(46), 0x88CC)).reason == "host-non-ip"


@pytest.mark.parametrize("packet", [(OUT4, p.IP4), (OUT6, p.IP6)], ids=["ipv4", "ipv6"])
def test_every_truncation_is_dropped(rig: Rig, packet: tuple[bytes, int]) -> None:
    """A TCP packet cut at any byte of its headers is dropped, as short or by its stated length as malformed.

    It is behind a VLAN tag, because newer kernels refuse to test-run a frame that says IP and has no whole IP header.
    """
    rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    whole = p.eth(*packet, tags=(5,))
    assert rig.out(whole).passed
    for length in range(15, len(whole)):
        seen = rig.out(whole[:length])
        assert not seen.passed, length
        assert seen.reason in {"short", "bad-ip"}, length
