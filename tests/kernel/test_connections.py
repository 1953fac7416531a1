# SPDX-License-Identifier: Apache-2.0
"""Connections: replies, states, time-outs, generations, ICMP queries and errors, fragments."""

from __future__ import annotations

import socket

import packets as p
import pytest
from rig import ALLOW, DENY, ELSEWHERE, PEER4, PEER6, POD4, POD6, POD_IDENTITY, Rig, Seen, everything

from netpol_ebpf.agent.timeouts import LONGEST_S, SHORTEST_S, set_timeouts
from netpol_loader import abi

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
INGRESS, EGRESS = 1, 2
SYNACK = p.SYN | p.ACK
OPENERS = [(p.TCP, p.tcp(1000, 80), p.tcp(80, 1000, SYNACK)), (p.UDP, p.udp(1000, 53), p.udp(53, 1000)),
           (p.SCTP, p.sctp(1000, 9), p.sctp(9, 1000)), (47, b"x" * 8, b"y" * 8)]  # fmt: skip


def family(pod: str) -> str:
    return "4" if pod == POD4 else "6"


def egress_only(rig: Rig) -> None:
    """Policy that lets the workload open connections, and nobody open one to it."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 12))


def only_entry(rig: Rig, name: str) -> abi.np_conn:
    (entry,) = rig.connections(name).values()
    return entry


@pytest.mark.parametrize(("protocol", "first", "reply"), OPENERS)
@FAMILIES
def test_replies_pass(rig: Rig, pod: str, peer: str, protocol: int, first: bytes, reply: bytes) -> None:
    """A reply passes without policy, counts for the rule that allowed the flow, and establishes the connection."""
    egress_only(rig)
    assert rig.into(p.frame(peer, pod, protocol, reply)).reason == "policy-deny"
    assert rig.out(p.frame(pod, peer, protocol, first)).reason == "policy-allow"
    assert only_entry(rig, f"np_unreplied{family(pod)}").direction == abi.NP_DIRECTION_EGRESS
    seen = rig.into(p.frame(peer, pod, protocol, reply))
    assert (seen.reason, seen.rules) == ("established", {12: 1})
    assert not rig.connections(f"np_unreplied{family(pod)}")
    assert only_entry(rig, f"np_conn{family(pod)}").rule == 12
    assert rig.into(p.frame(peer, pod, protocol, reply)).reason == "established"


@FAMILIES
def test_incoming_connection(rig: Rig, pod: str, peer: str) -> None:
    """A connection to the workload, as a server, behaves in the same way."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 12))
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(1000, 80))).rules == {11: 1}
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(80, 1000, SYNACK))).rules == {11: 1}
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(1000, 80, p.ACK))).rules == {11: 1}
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(81, 1000, p.ACK))).reason == "policy-deny"


@FAMILIES
def test_retransmissions_do_not_make_a_connection_open(rig: Rig, pod: str, peer: str) -> None:
    """Only packets of the other side establish a connection, so a flood stays among the unreplied ones."""
    egress_only(rig)
    for flags in (p.SYN, p.SYN, p.ACK):
        assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, flags))).passed
    assert not rig.connections(f"np_conn{family(pod)}")
    assert only_entry(rig, f"np_unreplied{family(pod)}").state == abi.NP_CONN_TCP_NEW


@FAMILIES
def test_initial_syn_is_always_decided_by_policy(rig: Rig, pod: str, peer: str) -> None:
    """A SYN on the tuple of an established connection is a new flow; if it is denied, the established one lives on."""
    egress_only(rig)
    rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80)))
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK)))
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.SYN))).reason == "policy-deny"
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).reason == "established"
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80))).reason == "policy-allow"
    table = f"np_conn{family(pod)}"
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.FIN | p.ACK)))
    (older,) = rig.connections(table).values()
    assert older.flags == abi.NP_CONN_FIN_REPLY, "no answer seen yet: this is still about the older one"
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK))).reason == "established"
    (newer,) = rig.connections(table).values()
    assert (newer.flags, newer.state) == (0, abi.NP_CONN_TCP_OPEN), "the ports are used again"
    assert not rig.connections(f"np_unreplied{family(pod)}")


@FAMILIES
def test_tcp_states(rig: Rig, pod: str, peer: str) -> None:
    """New, established, FIN from one side, FIN from both: each state has its own time-out."""
    egress_only(rig)
    conn = f"np_conn{family(pod)}"
    rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80)))
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK)))
    assert only_entry(rig, conn).state == abi.NP_CONN_TCP_OPEN
    rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.FIN | p.ACK)))
    entry = only_entry(rig, conn)
    assert (entry.state, entry.flags) == (abi.NP_CONN_TCP_OPEN, abi.NP_CONN_FIN_ORIGINAL)
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.FIN | p.ACK)))
    assert only_entry(rig, conn).state == abi.NP_CONN_TCP_CLOSING
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.ACK))).reason == "established"


@pytest.mark.parametrize("table", ["np_unreplied", "np_conn"])
@FAMILIES
def test_reset(rig: Rig, pod: str, peer: str, table: str) -> None:
    """A RST from either side passes and shortens the connection's life; it never establishes one."""
    egress_only(rig)
    rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80)))
    if table == "np_conn":
        rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK)))
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.RST | p.ACK))).reason == "established"
    assert only_entry(rig, table + family(pod)).state == abi.NP_CONN_TCP_RESET


def test_reset_of_nothing_opens_nothing(rig: Rig) -> None:
    """A RST that policy allows passes without a connection."""
    egress_only(rig)
    assert rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80, p.RST))).reason == "policy-allow"
    assert not rig.connections("np_unreplied4")


TIMEOUTS = [
    ("TCP without a reply", [p.tcp(1000, 80)], [], p.TCP, 20),
    ("TCP open", [p.tcp(1000, 80)], [p.tcp(80, 1000, SYNACK)], p.TCP, 8100),
    ("TCP closed by both", [p.tcp(1000, 80)], [p.tcp(80, 1000, SYNACK), p.tcp(80, 1000, p.FIN)], p.TCP, 8100),
    ("TCP reset", [p.tcp(1000, 80)], [p.tcp(80, 1000, SYNACK), p.tcp(80, 1000, p.RST)], p.TCP, 8100),
    ("UDP", [p.udp(1000, 80)], [p.udp(80, 1000)], p.UDP, 60),
    ("ICMP", [p.icmp(8, 0, 7)], [p.icmp(0, 0, 7)], p.ICMP, 5),
    ("another protocol", [bytes(8)], [bytes(8)], 47, 600),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "protocol", "seconds"), [case[1:] for case in TIMEOUTS], ids=[case[0] for case in TIMEOUTS]
)  # fmt: skip
def test_timeouts(rig: Rig, ours: list[bytes], theirs: list[bytes], protocol: int, seconds: int) -> None:
    """A reply passes just before the state's time-out; after it, policy judges the reply."""
    reply = p.frame(PEER4, POD4, protocol, p.tcp(80, 1000, p.ACK) if protocol == p.TCP else (theirs or [b""])[0])

    def start() -> None:
        rig.reset()
        egress_only(rig)
        for packet in ours:
            assert rig.out(p.frame(POD4, PEER4, protocol, packet)).passed
        for packet in theirs:
            assert rig.into(p.frame(PEER4, POD4, protocol, packet)).passed
            if protocol == p.TCP and packet[13] == p.FIN:
                assert rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80, p.FIN))).passed

    table = "np_conn4" if theirs else "np_unreplied4"
    start()
    rig.age(table, seconds - 2)
    assert rig.into(reply).reason == "established"
    start()
    rig.age(table, seconds + 5)
    assert rig.into(reply).reason == "policy-deny"


@pytest.mark.parametrize(
    ("state", "ours", "theirs", "protocol"),
    [
        ("tcp-new", [p.tcp(1000, 80)], [], p.TCP),
        ("tcp-open", [p.tcp(1000, 80)], [p.tcp(80, 1000, SYNACK)], p.TCP),
        ("udp", [p.udp(1000, 80)], [p.udp(80, 1000)], p.UDP),
        ("icmp", [p.icmp(8, 0, 7)], [p.icmp(0, 0, 7)], p.ICMP),
        ("other", [bytes(8)], [bytes(8)], 47),
    ],
)
@pytest.mark.parametrize("asked_s", [SHORTEST_S + 10, LONGEST_S // 1000])
def test_timeouts_that_were_asked_for(
    rig: Rig, state: str, ours: list[bytes], theirs: list[bytes], protocol: int, asked_s: int
) -> None:
    """A time-out from the agent's options replaces the default, also for existing connections."""
    reply = p.frame(PEER4, POD4, protocol, p.tcp(80, 1000, p.ACK) if protocol == p.TCP else theirs[0])
    for idle_s, reason in ((asked_s - 5, "established"), (asked_s + 5, "policy-deny")):
        rig.reset()
        egress_only(rig)
        for packet in ours:
            assert rig.out(p.frame(POD4, PEER4, protocol, packet)).passed
        for packet in theirs:
            assert rig.into(p.frame(PEER4, POD4, protocol, packet)).passed
        config = rig.dataplane.config()
        set_timeouts(config, {state: asked_s})
        rig.dataplane.set_config(config)
        rig.age("np_conn4" if theirs else "np_unreplied4", idle_s)
        assert rig.into(reply).reason == reason


def test_last_seen_is_written_at_most_once_a_second(rig: Rig) -> None:
    """A packet refreshes its connection only if the time stamp is older than a second."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1000, 80)))
    rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(80, 1000)))
    rig.age("np_conn4", 0.5)
    before = only_entry(rig, "np_conn4").seen_jiffies
    rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(80, 1000)))
    assert only_entry(rig, "np_conn4").seen_jiffies == before
    rig.age("np_conn4", 0.6)
    rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(80, 1000)))
    assert only_entry(rig, "np_conn4").seen_jiffies > before


@pytest.mark.parametrize("reply_seen", [False, True])
@pytest.mark.parametrize("by_reply", [False, True])
@FAMILIES
def test_revoked_connection(rig: Rig, pod: str, peer: str, *, reply_seen: bool, by_reply: bool) -> None:
    """After a new generation policy judges a flow again by its first packet's tuple, whatever the packet's direction."""
    egress_only(rig)
    rig.out(p.frame(pod, peer, p.UDP, p.udp(1000, 80)))
    if reply_seen:
        rig.into(p.frame(peer, pod, p.UDP, p.udp(80, 1000)))
    rig.pod(everything(INGRESS, ALLOW, 13), everything(EGRESS, DENY, 14))
    rig.dataplane.bump_generation()
    seen = rig.into(p.frame(peer, pod, p.UDP, p.udp(80, 1000))) if by_reply else rig.out(
        p.frame(pod, peer, p.UDP, p.udp(1000, 80)))  # fmt: skip
    assert (seen.passed, seen.reason, seen.rules) == (False, "revoked", {14: 1})
    (event,) = seen.events
    assert (event.direction, event.source_port, event.destination_port) == (abi.NP_DIRECTION_EGRESS, 1000, 80)


@pytest.mark.parametrize(("protocol", "answer"), [(p.TCP, SYNACK), (p.TCP, p.RST | p.ACK), (p.UDP, 0)])
@pytest.mark.parametrize("reply_seen", [False, True])
@FAMILIES
def test_answers_do_not_reopen_what_was_revoked(
    rig: Rig, pod: str, peer: str, protocol: int, answer: int, *, reply_seen: bool
) -> None:
    """A revoked connection stays cut both ways, although the other side may open flows, until policy changes or it times out."""

    def segment(source: int, destination: int, flags: int = p.ACK) -> bytes:
        return p.udp(source, destination) if protocol == p.UDP else p.tcp(source, destination, flags)

    outwards, inwards = p.frame(pod, peer, protocol, segment(1000, 80)), p.frame(peer, pod, protocol, segment(80, 1000))
    egress_only(rig)
    rig.out(p.frame(pod, peer, protocol, segment(1000, 80, p.SYN)))
    if reply_seen:
        rig.into(p.frame(peer, pod, protocol, segment(80, 1000, SYNACK)))
    table = f"np_{'conn' if reply_seen else 'unreplied'}{family(pod)}"
    before = {key: bytes(entry) for key, entry in rig.connections(table).items()}
    rig.pod(everything(INGRESS, ALLOW, 13), everything(EGRESS, DENY, 14))
    rig.dataplane.bump_generation()
    for _ in range(2):
        assert rig.into(inwards).reason == "revoked"
        assert rig.out(outwards).reason == "revoked"
    assert {key: bytes(entry) for key, entry in rig.connections(table).items()} == before, "neither touched nor moved"
    if protocol == p.TCP:
        assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000))).reason == "policy-allow", "a flow of its own"
        assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, answer))).reason == "established"
        if answer == SYNACK:
            assert rig.into(inwards).reason == "established"
            assert rig.out(outwards).reason == "established"
    else:
        rig.age(table, 100_000)
        assert rig.into(inwards).reason == "policy-allow", "a flow of its own, after a time"


@FAMILIES
def test_revoked_connection_that_is_allowed_again(rig: Rig, pod: str, peer: str) -> None:
    """If policy allows a revoked connection again, it continues in its old state."""
    egress_only(rig)
    rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80)))
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK)))
    rig.pod(everything(INGRESS, DENY, 13), everything(EGRESS, DENY, 14))
    rig.dataplane.bump_generation()
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).reason == "revoked"
    egress_only(rig)
    rig.dataplane.bump_generation()
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, p.ACK))).reason == "established"


@FAMILIES
def test_syn_with_ack_opens_nothing(rig: Rig, pod: str, peer: str) -> None:
    """A SYN with ACK without a connection passes if policy allows it, and opens none."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 12))
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, 1000, SYNACK))).reason == "policy-allow"
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, 80, p.ACK))).reason == "policy-deny"


@FAMILIES
def test_confirmed_connection_takes_its_new_rule(rig: Rig, pod: str, peer: str) -> None:
    """A flow that is still allowed continues under the new generation and its new rule, without an event."""
    egress_only(rig)
    rig.flags(abi.NP_CONFIG_ALLOW_EVENTS)
    rig.out(p.frame(pod, peer, p.UDP, p.udp(1000, 80)))
    rig.into(p.frame(peer, pod, p.UDP, p.udp(80, 1000)))
    rig.pod(everything(INGRESS, DENY, 13), everything(EGRESS, ALLOW, 14))
    generation = rig.dataplane.bump_generation()
    seen = rig.into(p.frame(peer, pod, p.UDP, p.udp(80, 1000)))
    assert (seen.reason, seen.rules, seen.events) == ("established", {14: 1}, [])
    entry = only_entry(rig, f"np_conn{family(pod)}")
    assert (entry.generation, entry.rule) == (generation, 14)


def test_revoked_connections_may_be_kept(rig: Rig) -> None:
    """With the flag, established connections survive a policy that would deny them; new ones are denied."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1000, 80)))
    rig.flags(abi.NP_CONFIG_KEEP_REVOKED)
    rig.pod(everything(INGRESS, DENY, 13), everything(EGRESS, DENY, 14))
    generation = rig.dataplane.bump_generation()
    assert rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(80, 1000))).rules == {12: 1}
    assert only_entry(rig, "np_conn4").generation == generation, "judged once, not for each packet"
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1001, 80))).reason == "policy-deny"


def test_exempt_connections_follow_the_generation(rig: Rig) -> None:
    """A connection of the node takes the fast path again after a new generation, still without a rule."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, DENY, 12))
    rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(1, 2)), ingress=0)
    rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(2, 1)))
    generation = rig.dataplane.bump_generation()
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(2, 1))).rules == {0: 1}
    entry = only_entry(rig, "np_conn4")
    assert (entry.generation, entry.flags) == (generation, abi.NP_CONN_EXEMPT)


@pytest.mark.parametrize(("pod", "peer", "anywhere"), [(POD4, PEER4, "0.0.0.0"), (POD6, PEER6, "::")])
def test_host_packets_revive_what_the_host_opened(rig: Rig, pod: str, peer: str, anywhere: str) -> None:
    """A middle packet from the node records a connection, unless a process listens on its port: the workload opened it."""
    rig.pod(everything(INGRESS, DENY, 13), everything(EGRESS, DENY, 14))
    with socket.create_server((anywhere, 0), family=socket.AF_INET6 if ":" in anywhere else socket.AF_INET) as server:
        port = server.getsockname()[1]
        assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(port, 1000, SYNACK)), ingress=0).reason == "host"
        assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(port, 1000, p.ACK)), ingress=0).reason == "host"
        assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, port, p.ACK))).reason == "policy-deny"
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(port, 1000, p.ACK)), ingress=0).reason == "host"
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(1000, port, p.ACK))).reason == "established"


@pytest.mark.parametrize("end", [[p.RST], [p.FIN, p.FIN | p.ACK]], ids=["reset", "closed"])
def test_a_connection_that_goes_on_is_open_again(rig: Rig, end: list[int]) -> None:
    """A closed connection with new data passes long afterwards and counts as established: FIN and RST may be forged."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80)))
    rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(80, 1000, SYNACK)))
    rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(80, 1000, end[0])))
    for flags in end[1:]:
        rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80, flags)))
    assert only_entry(rig, "np_conn4").state in (abi.NP_CONN_TCP_RESET, abi.NP_CONN_TCP_CLOSING)
    rig.age("np_conn4", 7200)
    assert rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1000, 80, p.ACK))).reason == "established"
    assert only_entry(rig, "np_conn4").state != abi.NP_CONN_TCP_OPEN, "nothing but data shows that it lives"
    rig.age("np_conn4", 60)
    assert rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(80, 1000, p.ACK) + b"data")).reason == "established"
    entry = only_entry(rig, "np_conn4")
    assert (entry.state, entry.flags) == (abi.NP_CONN_TCP_OPEN, 0)


def test_endpoint_number_is_part_of_the_key(rig: Rig) -> None:
    """Another endpoint on the same interface does not inherit connections."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1000, 80)))
    rig.endpoint(everything(INGRESS, DENY, 13), everything(EGRESS, DENY, 14), number=8)
    rig.address(POD4, POD_IDENTITY, 8)
    rig.dataplane.bump_generation()
    assert rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(80, 1000))).reason == "policy-deny"


def test_deleted_endpoint_is_unknown_after_a_new_generation(rig: Rig) -> None:
    """After a new generation the program no longer knows a deleted endpoint."""
    egress_only(rig)
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1000, 80))).passed
    rig.map("np_endpoint").delete((1).to_bytes(4, "little"))
    rig.dataplane.bump_generation()
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1000, 80))).reason == "unknown-endpoint"


# --- ICMP -------------------------------------------------------------------------------------------------------------

ECHO = [(POD4, PEER4, p.ICMP, 8, 0), (POD6, PEER6, p.ICMPV6, 128, 129)]


@pytest.mark.parametrize(("pod", "peer", "protocol", "ask", "answer"), ECHO, ids=["ipv4", "ipv6"])
def test_echo(rig: Rig, pod: str, peer: str, protocol: int, ask: int, answer: int) -> None:
    """An echo reply passes by its identifier; another identifier, or an echo request back, is judged by policy."""
    egress_only(rig)
    assert rig.out(p.frame(pod, peer, protocol, p.icmp(ask, 0, 77))).reason == "policy-allow"
    assert rig.into(p.frame(peer, pod, protocol, p.icmp(answer, 0, 78))).reason == "policy-deny"
    assert rig.into(p.frame(peer, pod, protocol, p.icmp(ask, 0, 77))).reason == "policy-deny"
    assert rig.into(p.frame(peer, pod, protocol, p.icmp(answer, 0, 77))).reason == "established"
    rig.age(f"np_conn{family(pod)}", 6)
    assert rig.into(p.frame(peer, pod, protocol, p.icmp(answer, 0, 77))).reason == "policy-deny"


def test_query_of_another_type_is_judged(rig: Rig) -> None:
    """A timestamp request does not pass by an echo's connection."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.ICMP, p.icmp(8, 0, 77)))
    assert rig.out(p.frame(POD4, PEER4, p.ICMP, p.icmp(8, 0, 77))).reason == "established"
    assert rig.out(p.frame(POD4, PEER4, p.ICMP, p.icmp(13, 0, 77))).reason == "policy-allow"


def test_unsolicited_answers_and_other_types_open_nothing(rig: Rig) -> None:
    """Only ICMP queries have replies, so only they open connections."""
    egress_only(rig)
    for kind in (0, 9, 14, 42):
        assert rig.out(p.frame(POD4, PEER4, p.ICMP, p.icmp(kind, 0, 77))).reason == "policy-allow"
    assert not rig.connections("np_unreplied4")


def inner(pod: str, peer: str, protocol: int, l4: bytes) -> bytes:
    """A packet as an ICMP error carries it: its IP header and eight more bytes."""
    return (p.ip4 if "." in pod else p.ip6)(pod, peer, protocol, l4[:8])


ERRORS = [(POD4, PEER4, "10.200.0.1", p.ICMP, kind) for kind in (3, 4, 5, 11, 12)] + [
    (POD6, PEER6, "fd02::1", p.ICMPV6, kind) for kind in (1, 2, 3, 4)
]


@pytest.mark.parametrize("open_", [False, True])
@pytest.mark.parametrize("l4", [(p.TCP, p.tcp(1000, 80), p.tcp(80, 1000, SYNACK)), (p.UDP, p.udp(5, 6), p.udp(6, 5))])
@pytest.mark.parametrize(("pod", "peer", "router", "icmp", "kind"), ERRORS)
def test_icmp_error_about_a_connection(
    rig: Rig, pod: str, peer: str, router: str, icmp: int, kind: int, l4: tuple[int, bytes, bytes], *, open_: bool
) -> None:
    """An error from anywhere about a packet that the workload sent passes; about any other packet it is dropped."""
    egress_only(rig)
    protocol, first, reply = l4
    error = p.frame(router, pod, icmp, p.icmp(kind, 0, payload=inner(pod, peer, protocol, first)))
    assert rig.into(error).reason == "icmp-unrelated"
    rig.out(p.frame(pod, peer, protocol, first))
    if open_:
        rig.into(p.frame(peer, pod, protocol, reply))
    seen = rig.into(error)
    assert (seen.passed, seen.reason, seen.rules) == (True, "related", {12: 1})
    backwards = p.frame(router, pod, icmp, p.icmp(kind, 0, payload=inner(peer, pod, protocol, reply)))
    assert rig.into(backwards).reason == "icmp-unrelated", "such a packet went to the workload, not from it"


@pytest.mark.parametrize(("pod", "peer", "router", "icmp", "kind"), [ERRORS[0], ERRORS[-1]])
def test_icmp_error_of_the_workload(rig: Rig, pod: str, peer: str, router: str, icmp: int, kind: int) -> None:
    """A workload may answer an incoming packet with an error, from its own address only."""
    del router
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 12))
    error = p.icmp(kind, 3, payload=(p.ip4 if pod == POD4 else p.ip6)(peer, pod, p.UDP, p.udp(5, 6)))
    assert rig.out(p.frame(pod, peer, icmp, error)).reason == "icmp-unrelated"
    rig.into(p.frame(peer, pod, p.UDP, p.udp(5, 6)))
    assert rig.out(p.frame(pod, peer, icmp, error)).reason == "related"
    other = "10.0.0.99" if pod == POD4 else "fd00::99"
    assert rig.out(p.frame(other, peer, icmp, error)).reason == "spoofed"


def test_icmp_error_about_an_echo(rig: Rig) -> None:
    """An error about an echo request is related by the identifier."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.ICMP, p.icmp(8, 0, 77)))
    for identifier, reason in ((77, "related"), (78, "icmp-unrelated")):
        error = p.icmp(3, 1, payload=p.ip4(POD4, PEER4, p.ICMP, p.icmp(8, 0, identifier)))
        assert rig.into(p.frame("10.200.0.1", POD4, p.ICMP, error)).reason == reason


HOP_BY_HOP, FRAGMENT, AUTHENTICATION, OPTIONS = 0, 44, 51, 60


@pytest.mark.parametrize(
    ("first", "headers", "reason"),
    [
        (HOP_BY_HOP, p.extension(p.UDP, b"", length=2), "related"),
        (HOP_BY_HOP, p.extension(OPTIONS, p.extension(FRAGMENT, p.fragment6(p.UDP, b"", more=True))), "related"),
        (AUTHENTICATION, p.authentication(p.UDP, b""), "related"),
        (OPTIONS, 7 * p.extension(OPTIONS, b"") + p.extension(p.UDP, b""), "related"),
        (OPTIONS, 8 * p.extension(OPTIONS, b"") + p.extension(p.UDP, b""), "policy-deny"),
        (FRAGMENT, p.fragment6(p.UDP, b"", offset=8), "policy-deny"),
        (OPTIONS, p.extension(p.UDP, b"")[:6], "policy-deny"),
        (OPTIONS, p.extension(p.TCP, b""), "icmp-unrelated"),
    ],
)
def test_icmp_error_about_a_packet_with_extension_headers(rig: Rig, first: int, headers: bytes, reason: str) -> None:
    """The inner extension headers are parsed like the outer ones; policy judges an error that cannot be read."""
    egress_only(rig)
    rig.out(p.frame(POD6, PEER6, p.UDP, p.udp(5, 6)))
    about = p.ip6(
        POD6, PEER6, first, headers + (p.udp(5, 6) if len(headers) % 8 == 0 or first == AUTHENTICATION else b"")
    )
    assert rig.into(p.frame("fd02::1", POD6, p.ICMPV6, p.icmp(2, 0, payload=about))).reason == reason


def test_icmp_error_about_a_packet_with_options(rig: Rig) -> None:
    """Inner ports are found behind IPv4 options; if those are cut off, policy judges the error."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(5, 6)))
    about = p.ip4(POD4, PEER4, p.UDP, p.udp(5, 6), options=bytes(12))
    for size, reason in ((len(about), "related"), (20 + 12 + 7, "policy-deny"), (20 + 8, "policy-deny")):
        error = p.frame("10.200.0.1", POD4, p.ICMP, p.icmp(3, 1, payload=about[:size]))
        assert rig.into(error).reason == reason


def test_icmp_error_about_nothing_readable_is_for_policy(rig: Rig) -> None:
    """An error without an inner header is a message like any other, so that rules by ICMP type apply."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 12))
    assert rig.into(p.frame(PEER4, POD4, p.ICMP, p.icmp(3, 1))).reason == "policy-allow"
    assert not rig.connections("np_unreplied4")


def test_icmp_error_of_a_revoked_connection(rig: Rig) -> None:
    """An error about a revoked flow is dropped like the flow."""
    egress_only(rig)
    rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(5, 6)))
    rig.pod(everything(INGRESS, DENY, 13), everything(EGRESS, DENY, 14))
    rig.dataplane.bump_generation()
    error = p.icmp(3, 1, payload=p.ip4(POD4, PEER4, p.UDP, p.udp(5, 6)))
    assert rig.into(p.frame("10.200.0.1", POD4, p.ICMP, error)).reason == "revoked"


# --- fragments --------------------------------------------------------------------------------------------------------


def fragment(
    source: str, destination: str, payload: bytes, offset: int, *, more: bool, identification: int = 1
) -> bytes:
    """One fragment of a UDP datagram, of either family."""
    if "." in source:
        return p.eth(
            p.ip4(source, destination, p.UDP, payload, offset=offset, more=more, identification=identification), p.IP4
        )
    part = p.fragment6(p.UDP, payload, offset=offset, more=more, identification=identification)
    return p.frame(source, destination, 44, part)


@FAMILIES
def test_fragments_follow_their_first(rig: Rig, pod: str, peer: str) -> None:
    """Later fragments pass with an allowed first one, in both directions, and only with its identification."""
    egress_only(rig)
    datagram = p.udp(1000, 80, bytes(40))
    assert rig.out(fragment(pod, peer, datagram[24:], 24, more=False)).reason == "fragment"
    assert rig.out(fragment(pod, peer, datagram[:24], 0, more=True)).reason == "policy-allow"
    assert rig.out(fragment(pod, peer, datagram[24:], 24, more=False)).reason == "established"
    assert rig.out(fragment(pod, peer, datagram[24:], 24, more=False, identification=2)).reason == "fragment"
    answer = p.udp(80, 1000, bytes(40))
    assert rig.into(fragment(peer, pod, answer[24:], 24, more=False)).reason == "fragment"
    assert rig.into(fragment(peer, pod, answer[:24], 0, more=True)).reason == "established"
    assert rig.into(fragment(peer, pod, answer[24:], 24, more=False)).reason == "established"


@FAMILIES
def test_fragments_of_a_denied_datagram(rig: Rig, pod: str, peer: str) -> None:
    """A denied first fragment is not recorded, so the rest is dropped too."""
    egress_only(rig)
    datagram = p.udp(1000, 80, bytes(40))
    assert rig.into(fragment(peer, pod, datagram[:24], 0, more=True)).reason == "policy-deny"
    assert rig.into(fragment(peer, pod, datagram[24:], 24, more=False)).reason == "fragment"


@FAMILIES
def test_fragment_memory_times_out(rig: Rig, pod: str, peer: str) -> None:
    """An identification may be reused after the time-out."""
    egress_only(rig)
    datagram = p.udp(1000, 80, bytes(40))
    rig.out(fragment(pod, peer, datagram[:24], 0, more=True))
    rig.age(f"np_frag{family(pod)}", 31)
    assert rig.out(fragment(pod, peer, datagram[24:], 24, more=False)).reason == "fragment"


def test_first_fragment_without_a_whole_header(rig: Rig) -> None:
    """A first fragment without its ports is dropped."""
    egress_only(rig)
    assert rig.out(fragment(POD4, PEER4, p.udp(1, 2)[:4], 0, more=True)).reason == "bad-l4"


def test_ipv6_fragments_behind_options(rig: Rig) -> None:
    """A later fragment takes its protocol from the first if another extension header follows the fragment header."""
    egress_only(rig)
    whole = p.extension(p.UDP, p.udp(1000, 80, bytes(40)))
    first = p.fragment6(60, whole[:32], more=True)
    later = p.fragment6(60, whole[32:], offset=32)
    assert rig.out(p.frame(POD6, PEER6, 44, first)).reason == "policy-allow"
    assert rig.out(p.frame(POD6, PEER6, 44, later)).reason == "established"


def test_fragmented_echo(rig: Rig) -> None:
    """Fragments of an ICMP query, and of its reply, pass like their first fragment."""
    egress_only(rig)

    def part(source: str, destination: str, kind: int, offset: int) -> Seen:
        message = p.icmp(kind, 0, 77, bytes(40))
        piece = message[:24] if offset == 0 else message[24:]
        packet = p.eth(p.ip4(source, destination, p.ICMP, piece, offset=offset, more=offset == 0), p.IP4)
        return rig.out(packet) if source == POD4 else rig.into(packet, ingress=ELSEWHERE)

    assert part(POD4, PEER4, 8, 0).reason == "policy-allow"
    assert part(POD4, PEER4, 8, 24).reason == "established"
    assert part(PEER4, POD4, 0, 0).reason == "established"
    assert part(PEER4, POD4, 0, 24).reason == "established"
