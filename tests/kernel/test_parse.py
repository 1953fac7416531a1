# SPDX-License-Identifier: Apache-2.0
"""Which frames are understood, and what becomes of those that are not."""

from __future__ import annotations

import packets as p
import pytest
from rig import ALLOW, DENY, LO, PEER4, PEER6, POD4, POD6, Rig, everything

from netpol_loader import abi
from netpol_loader.hook import Hook

pytestmark = pytest.mark.kernel

SYN = p.tcp(40000, 80)
OUT4 = p.ip4(POD4, PEER4, p.TCP, SYN)
OUT6 = p.ip6(POD6, PEER6, p.TCP, SYN)


def many_extensions(count: int) -> bytes:
    """That many destination-options headers before a TCP segment."""
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
    ("ARP", p.eth(bytes(28), p.ARP), "arp"),
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
    """Under a policy that allows everything, a frame passes exactly if it is understood."""
    rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
    seen = rig.out(frame)
    assert seen.reason == reason
    number = next(one.number for one in abi.REASONS.values() if one.slug == reason)
    assert seen.passed == (not abi.REASONS[number].dropped)
    assert len(seen.events) == (not seen.passed), "a drop makes one event, a pass none"
    if seen.events:
        assert (seen.events[0].reason, seen.events[0].ifindex, seen.events[0].frame_bytes) == (number, LO, len(frame))


NEIGHBOUR = [(kind, kind in {130, 131, 132, 133, 135, 136}) for kind in range(126, 140)]


@pytest.mark.parametrize(("kind", "passes"), NEIGHBOUR)
@pytest.mark.parametrize("hook", list(Hook))
def test_neighbour_discovery(rig: Rig, hook: Hook, kind: int, *, passes: bool) -> None:
    """Neighbour and listener discovery pass whatever policy says and whoever sends them; other ICMPv6 does not."""
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12))
    seen = rig.send(hook, p.frame("fe80::1", "ff02::1", p.ICMPV6, p.icmp(kind, payload=bytes(16))))
    assert seen.passed == passes
    assert (seen.reason == "neighbour") == passes


DHCP = [
    ("0.0.0.0", "255.255.255.255", 68, 67, "dhcp"),
    (POD4, "255.255.255.255", 68, 67, "dhcp"),
    (PEER4, "255.255.255.255", 68, 67, "spoofed"),
    ("0.0.0.0", "255.255.255.255", 67, 68, "spoofed"),
    (POD4, "255.255.255.255", 67, 68, "policy-deny"),
    (POD4, "255.255.255.255", 68, 69, "policy-deny"),
    (POD4, PEER4, 68, 67, "policy-deny"),
    ("fe80::1", "ff02::1:2", 546, 547, "dhcp"),
    (POD6, "ff02::1:2", 546, 547, "dhcp"),
    ("::", "ff02::1:2", 546, 547, "spoofed"),
    (PEER6, "ff02::1:2", 546, 547, "spoofed"),
    ("fe80::1", "ff02::1:2", 547, 546, "policy-deny"),
    ("fe80::1", "ff02::1:3", 546, 547, "policy-deny"),
    ("fe80::1", PEER6, 546, 547, "policy-deny"),
]


@pytest.mark.parametrize(("source", "destination", "source_port", "destination_port", "reason"), DHCP)
def test_dhcp_of_a_workload(
    rig: Rig, source: str, destination: str, source_port: int, destination_port: int, reason: str
) -> None:
    """A workload may ask all servers on its link for an address, whatever policy says, and be no server itself."""
    rig.pod(everything(1, ALLOW, 11), everything(2, DENY, 12))
    assert rig.out(p.frame(source, destination, p.UDP, p.udp(source_port, destination_port))).reason == reason
    assert not rig.connections("np_young4") | rig.connections("np_young6")


def test_dhcp_fragment_is_no_request(rig: Rig) -> None:
    """What follows a first fragment could be anything."""
    rig.pod(everything(1, ALLOW, 11), everything(2, DENY, 12))
    first = p.eth(p.ip4("0.0.0.0", "255.255.255.255", p.UDP, p.udp(68, 67), more=True), p.IP4)
    assert rig.out(first).reason == "spoofed"


def test_neighbour_discovery_before_there_is_an_endpoint(rig: Rig) -> None:
    """A closed interface lets discovery and ARP through, so that it works the moment it opens; nothing else."""
    assert rig.out(p.frame("::", "ff02::1:ff00:7", p.ICMPV6, p.icmp(135, payload=bytes(16)))).reason == "neighbour"
    assert rig.out(p.eth(bytes(28), p.ARP)).reason == "arp"
    for hook in Hook:
        for packet in (p.eth(OUT4, p.IP4), p.eth(OUT6, p.IP6), p.eth(bytes(46), 0x88CC)):
            assert rig.send(hook, packet, ingress=0).reason == "unknown-endpoint"


def test_host_interface_passes_what_is_not_ip(rig: Rig) -> None:
    """On a host endpoint's interface frames that are not IP pass."""
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12), flags=abi.NP_ENDPOINT_HOST)
    assert rig.out(p.eth(bytes(46), 0x88CC)).reason == "host-non-ip"


@pytest.mark.parametrize("packet", [(OUT4, p.IP4), (OUT6, p.IP6)], ids=["ipv4", "ipv6"])
def test_every_truncation_is_dropped(rig: Rig, packet: tuple[bytes, int]) -> None:
    """A TCP packet cut at any byte of its headers is dropped and counted as short or, by its stated length, bad.

    Behind a VLAN tag, because newer kernels refuse to test-run a frame that says IP and has no whole IP header.
    """
    rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    whole = p.eth(*packet, tags=(5,))
    assert rig.out(whole).passed
    for length in range(15, len(whole)):
        seen = rig.out(whole[:length])
        assert not seen.passed, length
        assert seen.reason in {"short", "bad-ip"}, length
