# SPDX-License-Identifier: Apache-2.0
"""Events: their content, when they are written, and what happens without a reader."""

from __future__ import annotations

import ctypes
from ipaddress import ip_address

import packets as p
import pytest
from rig import (
    ALLOW,
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

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
INGRESS, EGRESS = 1, 2


@FAMILIES
def test_deny_event_carries_everything(rig: Rig, pod: str, peer: str) -> None:
    """A denied packet's event names rule, staged rule, endpoint, identities, class, tuple and length."""
    verdicts = [Verdict(ALLOW, 20), Verdict(DENY, 21, staged=ALLOW, staged_rule=22)]
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, verdicts, peer_classes=2))
    rig.peer_class(EGRESS, PEER_IDENTITY, 1)
    frame = p.frame(pod, peer, p.TCP, p.tcp(40000, 443))
    (event,) = rig.out(frame).events
    assert (event.kind, event.reason) == (abi.NP_EVENT_DENY, abi.NP_REASON_POLICY_DENY)
    assert (event.action, event.rule, event.staged_action, event.staged_rule) == (DENY, 21, ALLOW, 22)
    assert (event.endpoint, event.ifindex, event.direction) == (ENDPOINT, LO, abi.NP_DIRECTION_EGRESS)
    assert (event.own_identity, event.peer_identity) == (POD_IDENTITY, PEER_IDENTITY)
    assert (event.set, event.peer_class) == (EGRESS, 1)
    size = len(ip_address(pod).packed)
    assert (bytes(event.source)[:size], bytes(event.destination)[:size]) == (
        ip_address(pod).packed, ip_address(peer).packed)  # fmt: skip
    assert bytes(event.source)[size:] == bytes(16 - size)
    assert (event.source_port, event.destination_port, event.protocol) == (40000, 443, p.TCP)
    assert (event.ip_version, event.frame_bytes) == (ip_address(pod).version, len(frame))
    assert event.ethertype == (p.IP4 if size == 4 else p.IP6)
    assert event.time_jiffies > 0


def test_rules_are_counted_for_both_evaluations(rig: Rig) -> None:
    """A judged packet counts for the rule that decided and for the one that staged policies would let decide."""
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, [Verdict(ALLOW, 20, staged=DENY, staged_rule=21)]))
    before = [rig.staged_packets(number) for number in (20, 21)]
    opened = rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(40000, 443)))
    assert opened.rules == {20: 1}
    assert [rig.staged_packets(number) for number in (20, 21)] == [before[0], before[1] + 1]
    followed = rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(40000, 443, flags=p.ACK)))
    assert followed.rules == {20: 1}
    assert rig.staged_packets(21) == before[1] + 1, "policy is not asked about packets of open connections"


def test_icmp_event(rig: Rig) -> None:
    """Type and code are in the event."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    (event,) = rig.out(p.frame(POD4, PEER4, p.ICMP, p.icmp(8, 3, 77))).events
    assert (event.protocol, event.icmp_type, event.icmp_code) == (p.ICMP, 8, 3)


def test_drop_that_is_not_policy(rig: Rig) -> None:
    """A spoofed packet counts for no rule, enforced or staged."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12))
    (event,) = rig.out(p.frame("192.0.2.1", PEER4, p.UDP, p.udp(1, 2))).events
    assert (event.reason, event.rule, event.staged_rule) == (abi.NP_REASON_SPOOFED, 0, 0)
    assert (event.action, event.staged_action) == (DENY, DENY)


def test_allowed_flows_make_events_only_when_asked_for(rig: Rig) -> None:
    """With the flag, each new flow has one event; further packets have none."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))).events == []
    rig.flags(abi.NP_CONFIG_ALLOW_EVENTS)
    (event,) = rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(3, 4))).events
    assert (event.kind, event.reason, event.rule) == (abi.NP_EVENT_ALLOW, abi.NP_REASON_POLICY_ALLOW, 12)
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(3, 4))).events == []
    assert rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(4, 3))).events == []


@pytest.mark.parametrize(("staged", "expected"), [(DENY, 1), (ALLOW, 0)])
def test_flows_that_staged_policy_would_change(rig: Rig, staged: int, expected: int) -> None:
    """With the flag, an allowed flow has an event exactly if the staged verdict differs."""
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, [Verdict(ALLOW, 12, staged=staged, staged_rule=13)]))
    rig.flags(abi.NP_CONFIG_STAGED_EVENTS)
    events = rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))).events
    assert len(events) == expected
    assert all((event.staged_action, event.staged_rule) == (DENY, 13) for event in events)


@pytest.mark.parametrize("action", [ALLOW, DENY])
def test_log_rules(rig: Rig, action: int) -> None:
    """A verdict with a log list has a log event, at most one a second for each list; the others are counted."""
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, [Verdict(action, 12, log_list=5)]))
    frame = p.frame(POD4, PEER4, p.TCP, p.tcp(1, 2))
    first, second = rig.out(frame), rig.out(frame)
    (event,) = [event for event in first.events if event.kind == abi.NP_EVENT_LOG]
    assert (event.log_list, event.action, event.rule) == (5, action, 12)
    assert not [event for event in second.events if event.kind == abi.NP_EVENT_LOG]
    assert second.reasons["log-limited"] == 1
    limits = rig.map("np_log_limit")
    limits.put((5).to_bytes(4, "little"), bytes(8))
    assert [event.kind for event in rig.out(frame).events].count(abi.NP_EVENT_LOG) == 1


def test_lists_have_limits_of_their_own(rig: Rig) -> None:
    """A busy list does not silence another."""
    verdicts = [Verdict(ALLOW, 12, log_list=1), Verdict(ALLOW, 13, log_list=2)]
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, verdicts, peer_classes=2))
    rig.peer_class(EGRESS, PEER_IDENTITY, 1)
    for destination, log_list in ((PEER4, 2), ("192.0.2.1", 1)):
        (event,) = rig.out(p.frame(POD4, destination, p.UDP, p.udp(1, 2))).events
        assert event.log_list == log_list


def test_lost_events_are_counted_and_change_no_verdict(rig: Rig) -> None:
    """Without a reader, drops continue and each lost event is counted."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    frame = p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))
    room = rig.map("np_event").max_entries // (ctypes.sizeof(abi.np_event) + 8)
    from netpol_loader.kernel.hook import Hook

    rig.dataplane.test_run(Hook.TC_INGRESS, frame, repeat=room + 10)
    seen = rig.out(frame)
    assert not seen.passed
    assert seen.reasons["event-lost"] == 1
    assert len(seen.events) == room
    assert rig.out(frame).reasons == {"policy-deny": 1}, "there is room again"


def test_reader_of_a_flood_comes_to_an_end(rig: Rig) -> None:
    """Events that arrive as fast as they are read wait for the next call; none is lost or delivered twice."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    from netpol_loader.kernel.hook import Hook

    read: list[int] = []

    def deny(port: int) -> None:
        rig.dataplane.test_run(Hook.TC_INGRESS, p.frame(POD4, PEER4, p.UDP, p.udp(1, port)))

    def flood(event: abi.np_event) -> None:
        read.append(event.destination_port)
        if len(read) < 100:
            deny(len(read))

    rig.reader.close()
    with rig.dataplane.events(flood) as reader:
        deny(0)
        assert [reader.consume(10) for _ in range(3)] == [10, 10, 10]
        assert reader.consume() == 70
        assert reader.consume(10) == 0
    assert read == list(range(100))
    rig.reader = rig.dataplane.events(rig.events.append)


def test_what_the_callback_raises_is_raised(rig: Rig) -> None:
    """An error in the reader's callback does not vanish in the C library."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))

    class OopsError(Exception):
        pass

    def fail(_event: abi.np_event) -> None:
        raise OopsError

    rig.reader.close()
    from netpol_loader.kernel.hook import Hook

    rig.dataplane.test_run(Hook.TC_INGRESS, p.frame(POD4, PEER4, p.UDP, p.udp(1, 2)))
    with rig.dataplane.events(fail) as reader, pytest.raises(OopsError):
        reader.consume()
    rig.reader = rig.dataplane.events(rig.events.append)


def test_poll_sees_events_without_a_wake_up(rig: Rig) -> None:
    """poll() hands over the ring's content, although the program wakes nobody up."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    from netpol_loader.kernel.hook import Hook

    rig.dataplane.test_run(Hook.TC_INGRESS, p.frame(POD4, PEER4, p.UDP, p.udp(1, 2)))
    assert rig.reader.poll(1) == 1
    assert rig.reader.poll(1) == 0
