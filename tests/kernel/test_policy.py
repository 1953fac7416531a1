# SPDX-License-Identifier: Apache-2.0
"""The four steps from addresses and ports to a verdict with its rule."""

from __future__ import annotations

import struct

import packets as p
import pytest
from rig import (
    ALLOW,
    CONTINUE,
    DENY,
    ENDPOINT,
    LO,
    PEER4,
    PEER6,
    PEER_IDENTITY,
    POD4,
    POD6,
    POD_IDENTITY,
    PolicySet,
    Rig,
    Verdict,
    everything,
)  # fmt: skip

from netpol_loader import abi
from netpol_loader.kernel.hook import Hook

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
INGRESS, EGRESS = 1, 2


@FAMILIES
def test_direction_of_each_hook(rig: Rig, pod: str, peer: str) -> None:
    """A workload's egress set judges what it sends, its ingress set what it receives."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12))
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(40000, 80))).rules == {12: 1}
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(40000, 81))).rules == {11: 1}


@FAMILIES
def test_host_endpoint_directions_agree_with_hooks(rig: Rig, pod: str, peer: str) -> None:
    """On a host's own interface, incoming packets are ingress, and source addresses are not checked."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12), flags=abi.NP_ENDPOINT_HOST)
    rig.local(pod)
    assert rig.send(Hook.TC_INGRESS, p.frame(peer, pod, p.TCP, p.tcp(40000, 80))).rules == {11: 1}
    assert rig.send(Hook.TC_EGRESS, p.frame(pod, peer, p.TCP, p.tcp(40000, 81)), ingress=0).rules == {12: 1}


@FAMILIES
def test_deny_is_counted_under_its_rule(rig: Rig, pod: str, peer: str) -> None:
    """A denied packet counts for the rule that denied it, and for the reason."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    seen = rig.into(p.frame(peer, pod, p.UDP, p.udp(40000, 80)))
    assert (seen.passed, seen.reason, seen.rules) == (False, "policy-deny", {11: 1})


def test_unwritten_verdict_denies(rig: Rig) -> None:
    """A verdict row of zeros denies."""
    rig.pod(PolicySet(INGRESS, []), PolicySet(EGRESS, []))
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))).reason == "verdict-empty"


def test_continue_passes_and_is_remembered(rig: Rig) -> None:
    """Host lists without an opinion pass the packet; its reply then belongs to the connection."""
    rig.pod(everything(INGRESS, CONTINUE, 0), everything(EGRESS, DENY, 12), flags=abi.NP_ENDPOINT_HOST)
    rig.local(POD4)
    assert rig.out(p.frame(PEER4, POD4, p.UDP, p.udp(1, 2))).reason == "continue"
    assert rig.into(p.frame(POD4, PEER4, p.UDP, p.udp(2, 1)), ingress=0).reason == "established"


IDENTITIES = [
    ("an exact address beats the longest prefix", PEER4, 21),
    ("the longest prefix wins", "10.9.1.1", 22),
    ("a shorter prefix where the longer does not match", "10.9.2.1", 23),
    ("no row at all is the world", "192.0.2.1", 24),
    ("an exact IPv6 address", PEER6, 21),
    ("the longest IPv6 prefix", "fd09:1::1", 22),
    ("a shorter IPv6 prefix", "fd09:2::1", 23),
    ("the IPv6 world is another identity", "2001:db8::1", 25),
]


@pytest.mark.parametrize(("peer", "rule"), [case[1:] for case in IDENTITIES], ids=[case[0] for case in IDENTITIES])
@pytest.mark.parametrize("egress", [False, True])
def test_peer_identity_and_class(rig: Rig, peer: str, rule: int, *, egress: bool) -> None:
    """The peer's address selects an identity, and the identity a peer class, otherwise the set's default."""
    number = EGRESS if egress else INGRESS
    verdicts = [Verdict(ALLOW, 20 + index) for index in range(6)]
    chosen = PolicySet(number, verdicts, peer_classes=6, default_class=0)
    other = everything(INGRESS if egress else EGRESS, DENY, 13)
    rig.pod(other if egress else chosen, chosen if egress else other)
    for net, identity in (("10.9.0.0/16", 202), ("10.9.1.0/24", 201), (f"{PEER4}/32", 299),
                          ("fd09::/16", 202), ("fd09:1::/32", 201), (f"{PEER6}/128", 299)):  # fmt: skip
        rig.cidr(net, identity)
    for identity, peer_class in ((PEER_IDENTITY, 1), (201, 2), (202, 3), (1, 4), (2, 5)):
        rig.peer_class(number, identity, peer_class)
    pod = POD4 if "." in peer else POD6
    packet = p.frame(pod, peer, p.UDP, p.udp(1, 2)) if egress else p.frame(peer, pod, p.UDP, p.udp(1, 2))
    assert (rig.out(packet) if egress else rig.into(packet)).rules == {rule: 1}


def test_default_class(rig: Rig) -> None:
    """An identity without a class row is in the set's default class."""
    rig.pod(PolicySet(INGRESS, [Verdict(DENY, 20), Verdict(ALLOW, 21)], peer_classes=2, default_class=1),
            everything(EGRESS, DENY, 12))  # fmt: skip
    assert rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(1, 2))).rules == {21: 1}


@pytest.mark.parametrize(("peer", "pod", "rule"), [(PEER4, POD4, 21), (PEER6, POD6, 22)])
def test_default_class_of_each_family(rig: Rig, peer: str, pod: str, rule: int) -> None:
    """An identity without a class row is in the set's default class for the family of the packet."""
    verdicts = [Verdict(DENY, 20), Verdict(ALLOW, 21), Verdict(ALLOW, 22)]
    rig.pod(
        PolicySet(INGRESS, verdicts, peer_classes=3, default_class=1, default_class6=2), everything(EGRESS, DENY, 12)
    )
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(1, 2))).rules == {rule: 1}


def test_class_out_of_range_denies(rig: Rig) -> None:
    """A class beyond the set's verdicts never reads another set's verdict."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12))
    rig.peer_class(EGRESS, PEER_IDENTITY, 1)
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))).reason == "class-range"


L4 = [
    ("TCP by destination port", p.TCP, p.tcp(9, 8443), abi.NP_SLOT_TCP * 256 + 0x20, 0xFB),
    ("UDP by destination port", p.UDP, p.udp(9, 53), abi.NP_SLOT_UDP * 256, 53),
    ("SCTP by destination port", p.SCTP, p.sctp(9, 65535), abi.NP_SLOT_SCTP * 256 + 255, 255),
    ("a protocol by number", 47, bytes(8), abi.NP_OTHER_BLOCK, 47),
    ("UDPLite by number, not by port", 136, p.udp(9, 53), abi.NP_OTHER_BLOCK, 136),
]


@pytest.mark.parametrize(
    ("protocol", "l4", "block", "index"), [case[1:] for case in L4], ids=[case[0] for case in L4]
)  # fmt: skip
@FAMILIES
def test_l4_class(rig: Rig, pod: str, peer: str, protocol: int, l4: bytes, block: int, index: int) -> None:
    """Protocol and destination port select an atom, and the atom an L4 class in the set's column; in both directions."""
    for number in (INGRESS, EGRESS):
        rig.l4_class(number, 40, number)
    rig.atom(block, index, 40)
    verdicts = [Verdict(DENY, 20), Verdict(ALLOW, 21), Verdict(ALLOW, 22)]
    rig.pod(PolicySet(INGRESS, verdicts, l4_classes=3), PolicySet(EGRESS, verdicts, l4_classes=3))
    assert rig.into(p.frame(peer, pod, protocol, l4)).rules == {21: 1}
    rig.map("np_unreplied4").delete_many([key for key, _ in rig.map("np_unreplied4").items()])
    rig.map("np_unreplied6").delete_many([key for key, _ in rig.map("np_unreplied6").items()])
    rig.peer_class(EGRESS, PEER_IDENTITY, 0)
    assert rig.out(p.frame(pod, peer, protocol, l4)).passed


def test_atoms_beyond_one_block(rig: Rig) -> None:
    """Atom 70 is in the second row of a column."""
    rig.atom(abi.NP_SLOT_TCP * 256, 80, 70)
    rig.l4_class(EGRESS, 6, 0)
    rig._element("np_l4_col", EGRESS * 2 + 1, 6, 1)
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, [Verdict(DENY, 20), Verdict(ALLOW, 21)], l4_classes=2))
    assert rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1, 80))).rules == {21: 1}


def test_l4_class_out_of_range_denies(rig: Rig) -> None:
    """An L4 class beyond the set's never reads a neighbour's verdict."""
    rig.atom(abi.NP_SLOT_TCP * 256, 80, 1)
    rig.l4_class(EGRESS, 1, 2)
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, [Verdict(ALLOW, 20), Verdict(ALLOW, 21)], l4_classes=2))
    assert rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1, 80))).reason == "l4-range"


@pytest.mark.parametrize(("version", "kind", "code"), [(4, 8, 0), (4, 42, 3), (6, 128, 0), (6, 140, 7)])
def test_icmp_class(rig: Rig, version: int, kind: int, code: int) -> None:
    """ICMP type and code select the atom; the identifier does not matter."""
    slot = abi.NP_SLOT_ICMP if version == 4 else abi.NP_SLOT_ICMPV6
    rig.atom(slot * 256 + kind, code, 9)
    rig.l4_class(EGRESS, 9, 1)
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, [Verdict(DENY, 20), Verdict(ALLOW, 21)], l4_classes=2))
    pod, peer, protocol = (POD4, PEER4, p.ICMP) if version == 4 else (POD6, PEER6, p.ICMPV6)
    assert rig.out(p.frame(pod, peer, protocol, p.icmp(kind, code, 77))).rules == {21: 1}
    assert rig.out(p.frame(pod, peer, protocol, p.icmp(kind, code + 1, 77))).rules == {20: 1}


@FAMILIES
def test_source_port_class(rig: Rig, pod: str, peer: str) -> None:
    """If a set has a source dimension, the source port's atom selects the class, whatever the protocol."""
    rig.atom(abi.NP_SLOT_SOURCE * 256 + 0x13, 0x88, 5)  # 5000
    for number in (INGRESS, EGRESS):
        rig.l4_class(number, 5, 1, source=True)
    verdicts = [Verdict(DENY, 20), Verdict(ALLOW, 21)]
    rig.pod(PolicySet(INGRESS, verdicts, source_classes=2), PolicySet(EGRESS, verdicts, source_classes=2))
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(5000, 80))).rules == {21: 1}
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(80, 5000))).rules == {20: 1}
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(5000, 81))).rules == {21: 1}
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(81, 5000))).rules == {20: 1}


@FAMILIES
def test_own_class(rig: Rig, pod: str, peer: str) -> None:
    """If a rule's own side is not constant, the endpoint's address selects a class too."""
    verdicts = [Verdict(DENY, 20), Verdict(ALLOW, 21)]
    chosen = PolicySet(INGRESS, verdicts, own_set=9, own_classes=2)
    rig.pod(chosen, everything(EGRESS, DENY, 12))
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(1, 2))).rules == {20: 1}
    rig.peer_class(9, POD_IDENTITY, 1)
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(1, 2))).rules == {21: 1}


def test_index_of_all_dimensions(rig: Rig) -> None:
    """The verdict index is ((peer * own_classes + own) * l4_classes + l4) * source_classes + source."""
    verdicts = [Verdict(ALLOW, index + 1) for index in range(2 * 2 * 3 * 2)]
    chosen = PolicySet(INGRESS, verdicts, peer_classes=2, own_set=9, own_classes=2, l4_classes=3, source_classes=2)
    rig.pod(chosen, everything(EGRESS, DENY, 12))
    rig.peer_class(INGRESS, PEER_IDENTITY, 1)
    rig.peer_class(9, POD_IDENTITY, 1)
    rig.atom(abi.NP_SLOT_TCP * 256, 80, 3)
    rig.l4_class(INGRESS, 3, 2)
    rig.atom(abi.NP_SLOT_SOURCE * 256, 99, 4)
    rig.l4_class(INGRESS, 4, 1, source=True)
    assert rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(99, 80))).rules == {((1 * 2 + 1) * 3 + 2) * 2 + 1 + 1: 1}
    assert rig.into(p.frame("192.0.2.1", POD4, p.TCP, p.tcp(98, 80))).rules == {((0 * 2 + 1) * 3 + 2) * 2 + 0 + 1: 1}


def test_endpoint_row_that_does_not_check_is_not_used(rig: Rig) -> None:
    """A row with a wrong check word (as if read during a replacement) denies after a few tries."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12))
    key = LO.to_bytes(4, "little")
    row = abi.np_endpoint.from_buffer_copy(rig.map("np_endpoint").get(key) or b"")
    row.egress.verdict_base ^= 64
    rig.map("np_endpoint").put(key, bytes(row))
    seen = rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2)))
    assert (seen.passed, seen.reason) == (False, "torn-endpoint")


SPOOFS = [
    ("its own address", POD4, PEER4, True),
    ("its own IPv6 address", POD6, PEER6, True),
    ("another pod's address", PEER4, POD4, False),
    ("an unknown address", "192.0.2.1", PEER4, False),
    ("no address", "0.0.0.0", "255.255.255.255", False),
    ("another pod's IPv6 address", PEER6, POD6, False),
    ("a link-local address", "fe80::7", PEER6, True),
    ("its own link-local address", "febf::7", PEER6, True),
    ("a site-local address", "fec0::7", PEER6, False),
    ("the unspecified address", "::", "ff02::1", False),
    ("a borrowed address", "10.20.1.1", PEER4, True),
    ("a neighbour of the borrowed ones", "10.21.1.1", PEER4, False),
    ("a borrowed IPv6 address", "fd20::1", PEER6, True),
    ("a neighbour of the borrowed IPv6 ones", "fd21::1", PEER6, False),
]


@pytest.mark.parametrize(
    ("source", "destination", "passes"), [case[1:] for case in SPOOFS], ids=[case[0] for case in SPOOFS]
)  # fmt: skip
def test_anti_spoofing(rig: Rig, source: str, destination: str, *, passes: bool) -> None:
    """Before any policy, a workload may send only from addresses that it owns or may borrow."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12), flags=abi.NP_ENDPOINT_SOURCES)
    rig.address("febf::7", POD_IDENTITY, ENDPOINT)
    rig.source("10.20.0.0/16")
    rig.source("fd20::/32")
    rig.source("10.21.0.0/16", endpoint=ENDPOINT + 1)
    rig.source("fd21::/32", endpoint=ENDPOINT + 1)
    seen = rig.out(p.frame(source, destination, p.UDP, p.udp(1000, 67)))
    assert (seen.passed, seen.reason) == (passes, "policy-allow" if passes else "spoofed")


def test_link_local_sources_reach_nobody_but_the_node(rig: Rig) -> None:
    """A link-local source passes only to the node itself, because others at a bridge know no such peer; an own one passes."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    rig.endpoint(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12), link=77)
    rig.epoch()
    rig.local("fe80::1", ifindex=77)
    rig.local("fe80::2", ifindex=78)
    rig.address("fe80::7", POD_IDENTITY, ENDPOINT)
    to = {"fe80::1": "policy-allow", "fe80::2": "spoofed", PEER6: "spoofed", "ff02::1": "spoofed"}
    for port, (destination, reason) in enumerate(to.items()):
        assert rig.out(p.frame("fe80::8", destination, p.UDP, p.udp(port, 2))).reason == reason
        assert rig.out(p.frame("fe80::7", destination, p.UDP, p.udp(port, 2))).reason == "policy-allow"


TUNNELS = [
    (p.UDP, p.udp(1000, 4789), True), (p.UDP, p.udp(4789, 4790), False), (4, bytes(20), True), (41, bytes(40), True),
    (47, bytes(8), True), (50, bytes(8), False), (p.TCP, p.tcp(1000, 4789), False),
]  # fmt: skip


@FAMILIES
@pytest.mark.parametrize(("protocol", "payload", "is_tunnel"), TUNNELS)
def test_no_tunnel_ends_at_a_node(
    rig: Rig, pod: str, peer: str, protocol: int, payload: bytes, *, is_tunnel: bool
) -> None:
    """A workload cannot send to a node what its tunnel devices accept from any sender; other destinations are policy's."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12))
    for key in ((4789, p.UDP), (0, 4), (0, 41), (0, 47)):
        rig.map("np_tunnel").put(struct.pack("=HBx", *key), struct.pack("=I", 1))
    ours, theirs, group = ("192.0.2.1", "192.0.2.2", "224.0.0.9") if pod == POD4 else ("fd02::1", "fd02::2", "ff02::9")
    rig.local(ours)
    rig.local(theirs, flags=abi.NP_LOCAL_NODE)
    for node in (ours, theirs, group):
        assert rig.out(p.frame(pod, node, protocol, payload)).reason == ("tunnel" if is_tunnel else "policy-allow")
    assert rig.out(p.frame(pod, peer, protocol, payload)).reason == "policy-allow"


@FAMILIES
def test_nobody_speaks_for_another_node_out_of_a_tunnel(rig: Rig, pod: str, peer: str) -> None:
    """A packet from a tunnel needs the outer source of the node that has its inner source; other packets are as before."""
    outside = abi.NP_ENDPOINT_HOST | abi.NP_ENDPOINT_OUTSIDE
    packet = p.frame(peer, pod, p.UDP, p.udp(1, 2))
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12), flags=outside | abi.NP_ENDPOINT_EXTERNAL)
    assert rig.out(packet).reason == "policy-allow", "on no node that is known"
    for holder, reason in ((abi.NP_NODE_FIRST, "tunnel-source"), (abi.NP_NODE_FIRST - 1, "established")):
        rig.address(peer, PEER_IDENTITY, holder)
        assert rig.out(packet).reason == reason
    rig.address(peer, PEER_IDENTITY, abi.NP_NODE_FIRST)
    rig.flags(abi.NP_CONFIG_HAIRPIN)
    assert rig.out(packet).reason == "established"
    rig.flags(0)
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12), flags=outside)
    rig.address(peer, PEER_IDENTITY, abi.NP_NODE_FIRST)
    rig.epoch()
    assert rig.out(packet).reason == "established", "no device that tells"


@FAMILIES
def test_what_comes_out_of_a_tunnel_takes_no_fast_path(rig: Rig, pod: str, peer: str) -> None:
    """A packet from a tunnel takes the slow path, because any node may have sent it; one into the tunnel may be cached."""
    flags = abi.NP_ENDPOINT_HOST | abi.NP_ENDPOINT_OUTSIDE | abi.NP_ENDPOINT_EXTERNAL
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12), flags=flags)
    asks, answers = p.frame(peer, pod, p.UDP, p.udp(1, 2)), p.frame(pod, peer, p.UDP, p.udp(2, 1))
    for packet, send in ((asks, rig.out), (answers, rig.into), (asks, rig.out), (answers, rig.into)):
        assert send(packet).passed
    rig.address(peer, PEER_IDENTITY, abi.NP_NODE_FIRST)
    assert rig.out(asks).reason == "tunnel-source"
    assert rig.into(answers).reason == "established"


def test_borrowed_sources_need_the_flag_and_leave_no_connection(rig: Rig) -> None:
    """A workload that may borrow addresses cannot fill the connection table with them."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12), flags=abi.NP_ENDPOINT_SOURCES)
    rig.source("10.20.0.0/16")
    assert rig.out(p.frame("10.20.1.1", PEER4, p.UDP, p.udp(1, 2))).reason == "policy-allow"
    assert not rig.connections("np_unreplied4")
    rig.dataplane.bump_generation()
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    assert rig.out(p.frame("10.20.1.1", PEER4, p.UDP, p.udp(1, 2))).reason == "spoofed"


@FAMILIES
def test_spoofed_reply_is_dropped(rig: Rig, pod: str, peer: str) -> None:
    """A workload cannot reply on a connection that came in for an address that it does not own."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 12), flags=abi.NP_ENDPOINT_ROUTES)
    other = "10.0.0.200" if pod == POD4 else "fd00::200"
    assert rig.into(p.frame(peer, other, p.UDP, p.udp(1, 2))).passed
    assert rig.out(p.frame(other, peer, p.UDP, p.udp(2, 1))).reason == "spoofed"


@FAMILIES
def test_host_to_workload_is_always_allowed(rig: Rig, pod: str, peer: str) -> None:
    """A packet from the node to its workload passes whatever policy says, and so does the reply."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    seen = rig.into(p.frame(peer, pod, p.TCP, p.tcp(1, 2)), ingress=0)
    assert (seen.passed, seen.reason, seen.rules) == (True, "host", {0: 1})
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(2, 1, p.SYN | p.ACK))).reason == "established"
    rig.dataplane.bump_generation()
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(2, 1, p.ACK))).reason == "established"
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(2, 3))).reason == "policy-deny"


@FAMILIES
def test_workload_to_itself_is_always_allowed(rig: Rig, pod: str, peer: str) -> None:
    """A workload reaches itself through the node, with its own source or one that the node put in its place."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    assert rig.out(p.frame(pod, pod, p.UDP, p.udp(1, 2))).reason == "self"
    assert rig.into(p.frame(pod, pod, p.UDP, p.udp(3, 4)), ingress=LO).reason == "self"
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(5, 6)), ingress=LO).reason == "self"
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(7, 8))).reason == "policy-deny"


def test_rule_number_beyond_its_counters(rig: Rig) -> None:
    """A rule number without a counter still decides; each missing counter, enforced and staged, is counted."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 1 << 20))
    seen = rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2)))
    assert (seen.passed, seen.reasons) == (True, {"policy-allow": 1, "rule-range": 2})


@FAMILIES
def test_endpoint_row_is_remembered_for_an_epoch(rig: Rig, pod: str, peer: str) -> None:
    """A CPU reads a cached row again only after a new epoch, so each change of the row needs one."""
    rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
    assert rig.out(p.frame(pod, peer, p.UDP, p.udp(1, 2))).rules == {12: 1}
    rig.pod(everything(1, DENY, 11), everything(3, DENY, 13))
    assert rig.out(p.frame(pod, peer, p.UDP, p.udp(3, 4))).rules == {12: 1}
    rig.epoch()
    assert rig.out(p.frame(pod, peer, p.UDP, p.udp(5, 6))).rules == {13: 1}


@FAMILIES
def test_own_address_is_remembered_for_an_epoch(rig: Rig, pod: str, peer: str) -> None:
    """After a new epoch an address that the workload lost belongs to its new owner."""
    rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
    assert rig.out(p.frame(pod, peer, p.UDP, p.udp(1, 2))).rules == {12: 1}
    rig.address(pod, 100, holder=8)
    rig.epoch()
    assert rig.out(p.frame(pod, peer, p.UDP, p.udp(3, 4))).reason == "spoofed"
    rig.address(pod, 100, holder=7)
    assert rig.out(p.frame(pod, peer, p.UDP, p.udp(3, 4))).rules == {12: 1}, "what is not its own is not remembered"


def test_interfaces_of_one_slot_do_not_mix(rig: Rig) -> None:
    """Two interfaces that share a slot of the endpoint cache each keep their own endpoint."""
    rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
    near = rig.map("np_ep_cache")
    other = abi.np_ep_cache(ifindex=1 + near.max_entries, epoch=rig.dataplane.config().epoch, number=99)
    cells = bytes(other) * (near.cell_bytes // len(bytes(other)))
    near.put(struct.pack("=I", 1), cells)
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))).rules == {12: 1}
