# SPDX-License-Identifier: Apache-2.0
"""The fast path for packets of established connections: it repeats the connection table, for a limited time."""

from __future__ import annotations

from collections.abc import Callable

import packets as p
import pytest
from rig import ALLOW, DENY, PEER4, PEER6, POD4, POD6, Rig, everything

from netpol_loader import abi

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
INGRESS, EGRESS = 1, 2
SYNACK = p.SYN | p.ACK


def opened(rig: Rig, pod: str, peer: str) -> None:
    """An established TCP connection of the workload, in the flow cache in both directions."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80)))
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK)))
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.ACK))).reason == "established"
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).reason == "established"


TABLES = {"np_flow_cache4": abi.np_flow_cache4, "np_flow_cache6": abi.np_flow_cache6}


def rows(rig: Rig) -> list[abi.np_flow_cache_fact]:
    """The facts of all used slots, on all CPUs."""
    generation = rig.dataplane.config().generation
    facts = [kind.from_buffer_copy(value).fact for name, kind in TABLES.items() for _, value in rig.map(name).items()]
    return [fact for fact in facts if fact.generation == generation]


@FAMILIES
def test_it_needs_no_table(rig: Rig, pod: str, peer: str) -> None:
    """For a second a packet passes by the flow cache alone, and is counted for the rule that allowed the connection."""
    opened(rig, pod, peer)
    assert {(row.hook, row.rule) for row in rows(rig)} == {(0, 12), (1, 12)}
    for name in ("np_conn4", "np_conn6", "np_endpoint"):
        rig.map(name).delete_many([key for key, _ in rig.map(name).items()])
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.ACK))).rules == {12: 1}
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).rules == {12: 1}
    rig.forget_flow_cache()
    rig.dataplane.bump_generation()
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.ACK))).reason == "unknown-endpoint"


def other(pod: str) -> str:
    return "10.0.0.10" if pod == POD4 else "fd00::10"


DIFFERENCES: dict[str, Callable[[str, str], bytes]] = {
    "source port": lambda pod, peer: p.frame(pod, peer, p.TCP, p.tcp(1001, 80, p.ACK)),
    "destination port": lambda pod, peer: p.frame(pod, peer, p.TCP, p.tcp(1000, 81, p.ACK)),
    "destination": lambda pod, _: p.frame(pod, other(pod), p.TCP, p.tcp(1000, 80, p.ACK)),
    "source": lambda pod, peer: p.frame(other(pod), peer, p.TCP, p.tcp(1000, 80, p.ACK)),
    "protocol": lambda pod, peer: p.frame(pod, peer, p.UDP, p.udp(1000, 80)),
    "SYN": lambda pod, peer: p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.SYN)),
}


@pytest.mark.parametrize("make", DIFFERENCES.values(), ids=DIFFERENCES.keys())
@FAMILIES
def test_it_is_exact(rig: Rig, pod: str, peer: str, make: Callable[[str, str], bytes]) -> None:
    """A packet that differs in any part of the tuple goes the slow path."""
    opened(rig, pod, peer)
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 13))
    seen = rig.out(make(pod, peer))
    assert not seen.passed
    assert seen.reason in {"policy-deny", "spoofed"}


def test_every_word_of_an_ipv6_address_counts(rig: Rig) -> None:
    """Addresses that differ in only one 32-bit word hit different entries."""
    opened(rig, POD6, PEER6)
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 13))
    for peer in ("fd01::9", "fd00:0:1::9", "fd00::1:0:9", "fd00::1:9"):
        assert rig.out(p.frame(POD6, peer, p.TCP, p.tcp(1000, 80, p.ACK))).reason == "policy-deny", peer


@FAMILIES
def test_it_ends_with_the_generation(rig: Rig, pod: str, peer: str) -> None:
    """After a new generation policy judges the next packet of the flow."""
    opened(rig, pod, peer)
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 13))
    rig.dataplane.bump_generation()
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).reason == "revoked"


@FAMILIES
def test_it_ends_after_a_second(rig: Rig, pod: str, peer: str) -> None:
    """After a second the program reads the connection table again, which refreshes the connection there."""
    opened(rig, pod, peer)
    for name, kind in TABLES.items():
        recent, until = rig.map(name), kind.fact.offset + abi.np_flow_cache_fact.until_jiffies.offset
        old = [(key, value[:until] + bytes(4) + value[until + 4 :]) for key, value in recent.items() if any(value)]
        recent.put_many(old)
    name = "np_conn4" if pod == POD4 else "np_conn6"
    rig.map(name).delete_many([key for key, _ in rig.map(name).items()])
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).reason == "policy-deny"


def test_what_changes_a_connection_goes_to_the_table(rig: Rig) -> None:
    """FIN and RST change the connection's state although the flow cache has the flow."""
    opened(rig, POD4, PEER4)
    rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80, p.FIN | p.ACK)))
    (entry,) = rig.connections("np_conn4").values()
    assert entry.flags == abi.NP_CONN_FIN_ORIGINAL
    rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(80, 1000, p.RST)))
    (entry,) = rig.connections("np_conn4").values()
    assert entry.state == abi.NP_CONN_TCP_RESET


@FAMILIES
@pytest.mark.parametrize("protocol", [p.TCP, p.UDP])
def test_both_directions_are_at_hand_once_a_connection_is_open(rig: Rig, pod: str, peer: str, protocol: int) -> None:
    """After the first reply the next packets of both directions need no connection table."""

    def segment(source: int, destination: int, flags: int) -> bytes:
        return p.tcp(source, destination, flags) if protocol == p.TCP else p.udp(source, destination)

    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    rig.out(p.frame(pod, peer, protocol, segment(1000, 80, p.SYN)))
    assert not rows(rig)
    rig.into(p.frame(peer, pod, protocol, segment(80, 1000, SYNACK)))
    assert {(row.hook, row.rule) for row in rows(rig)} == {(0, 12), (1, 12)}
    name = "np_conn4" if pod == POD4 else "np_conn6"
    rig.map(name).delete_many([key for key, _ in rig.map(name).items()])
    assert rig.out(p.frame(pod, peer, protocol, segment(1000, 80, p.ACK) + bytes(16))).rules == {12: 1}
    assert rig.into(p.frame(peer, pod, protocol, segment(80, 1000, p.ACK) + bytes(16))).rules == {12: 1}


@FAMILIES
def test_two_hooks_remember_one_packet(rig: Rig, pod: str, peer: str) -> None:
    """A packet between two workloads of the node passes two hooks on one CPU; neither takes the other's slot."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12), flags=abi.NP_ENDPOINT_ROUTES)
    packet = p.frame(pod, peer, p.UDP, p.udp(1000, 53) + bytes(16))
    for _ in range(2):
        rig.out(packet)
        rig.into(packet)
    assert {(row.hook, row.rule) for row in rows(rig)} == {(0, 12), (1, 11)}


def test_reset_is_no_answer_that_opens(rig: Rig) -> None:
    """A refused connection is not in the flow cache."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80)))
    assert rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(80, 1000, p.RST | p.ACK))).reason == "established"
    assert not rows(rig)


LONG: dict[str, Callable[[str, str, bytes], bytes]] = {
    "VLAN": lambda pod, peer, rest: vlan(p.frame(pod, peer, p.TCP, rest)),
    "length beyond the frame": lambda pod, peer, rest: longer(p.frame(pod, peer, p.TCP, rest)),
    "short TCP header": lambda pod, peer, rest: p.frame(pod, peer, p.TCP, rest[:12] + b"\x40" + rest[13:]),
    "TCP header beyond the packet": lambda pod, peer, rest: p.frame(pod, peer, p.TCP, rest[:12] + b"\xf0" + rest[13:]),
    "cut": lambda pod, peer, rest: p.frame(pod, peer, p.TCP, rest)[:-4],
}


def vlan(frame: bytes) -> bytes:
    return frame[:12] + b"\x81\0\0\5" + frame[12:]


def longer(frame: bytes) -> bytes:
    """One byte more in the IP header than there is."""
    at = 16 if frame[12:14] == b"\x08\0" else 18
    return frame[:at] + (int.from_bytes(frame[at : at + 2], "big") + 1).to_bytes(2, "big") + frame[at + 2 :]


@pytest.mark.parametrize("what", LONG)
@FAMILIES
def test_what_is_not_plain_goes_the_long_way(rig: Rig, pod: str, peer: str, what: str) -> None:
    """A malformed or unusual packet of a cached connection takes the slow path, which decides."""
    opened(rig, pod, peer)
    seen = rig.out(LONG[what](pod, peer, p.tcp(1000, 80, p.ACK)))
    if what == "VLAN":
        assert seen.rules == {12: 1}
    else:
        assert (seen.passed, seen.rules) == (False, {})
        assert seen.reason in {"bad-ip", "bad-l4", "short"}


@FAMILIES
def test_streams_that_nobody_answers_are_at_hand_too(rig: Rig, pod: str, peer: str) -> None:
    """The second packet of an unreplied UDP flow hits the cache, in its own direction only; unreplied TCP has no data."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    for _ in range(2):
        rig.out(p.frame(pod, peer, p.UDP, p.udp(1000, 80)))
    assert [(row.hook, row.rule) for row in rows(rig)] == [(0, 12)]
    for _ in range(2):
        rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.ACK)))
    assert len(rows(rig)) == 1
    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(80, 1000))).reason == "established"
    assert rig.connections("np_conn4" if pod == POD4 else "np_conn6")
