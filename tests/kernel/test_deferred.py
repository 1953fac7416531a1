# SPDX-License-Identifier: Apache-2.0
"""Packets to services: the deferred verdict, the sender tag, and what never passes without that verdict."""

from __future__ import annotations

from dataclasses import dataclass

import packets as p
import pytest
from rig import (
    ALLOW,
    DENY,
    ENDPOINT,
    IN,
    MARK_SHIFT,
    OUT,
    PEER4,
    PEER6,
    PEER_IDENTITY,
    POD4,
    POD6,
    PolicySet,
    Rig,
    Verdict,
    everything,
)  # fmt: skip

from netpol_loader import abi
from netpol_loader.kernel.hook import Hook

pytestmark = pytest.mark.kernel

VIP4, VIP6 = "10.96.0.1", "fd00:96::1"
NODE4, NODE6 = "192.0.2.9", "2001:db8::9"


@dataclass(frozen=True)
class Addresses:
    """The addresses and protocol numbers of one family."""

    pod: str
    peer: str
    vip: str
    node: str


FAMILIES = pytest.mark.parametrize(
    "at", [Addresses(POD4, PEER4, VIP4, NODE4), Addresses(POD6, PEER6, VIP6, NODE6)], ids=["ipv4", "ipv6"]
)
INGRESS, EGRESS = 1, 2
OTHER = 8
"""Number of another endpoint, as a sender tag."""


def only_peer(number: int) -> PolicySet:
    """Allow the peer by rule 21, and deny the rest by rule 20."""
    return PolicySet(number, [Verdict(DENY, 20), Verdict(ALLOW, 21)], peer_classes=2)


def to_service(rig: Rig, ingress: PolicySet | None = None, egress: PolicySet | None = None, flags: int = 0) -> None:
    """The pod, a service at port 80, and a carrier for the sender tag."""
    rig.pod(ingress or everything(INGRESS, ALLOW, 11), egress or only_peer(EGRESS), flags=flags)
    rig.peer_class(EGRESS, PEER_IDENTITY, 1)
    rig.vip(VIP4, p.TCP, 80)
    rig.vip(VIP6, p.TCP, 80)
    rig.local(NODE4, NODE6)
    rig.defer()


def uplink(rig: Rig) -> None:
    """Make the interface an uplink, without policy."""
    rig.endpoint(
        everything(3, DENY, 31), everything(4, DENY, 32), number=0, flags=abi.NP_ENDPOINT_HOST | abi.NP_ENDPOINT_UPLINK
    )
    rig.dataplane.bump_generation()


@FAMILIES
def test_verdict_is_deferred_and_the_number_carried(rig: Rig, at: Addresses) -> None:
    """All packets of a connection to a service pass unjudged with their endpoint's number; replies have no tag."""
    to_service(rig)
    seen = rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(40000, 80)))
    assert (seen.reason, seen.rules, seen.carries) == ("deferred", {}, ENDPOINT)
    answer = rig.into(p.frame(at.vip, at.pod, p.TCP, p.tcp(80, 40000, p.SYN | p.ACK)))
    assert (answer.reason, answer.carries) == ("established", 0)
    for _ in range(3):  # the table, then the fast path
        assert rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(40000, 80, p.ACK))).carries == ENDPOINT
    assert rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(40000, 80, p.ACK | p.FIN))).carries == ENDPOINT
    assert rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 81))).rules == {20: 1}
    assert rig.out(p.frame(at.pod, at.peer, p.TCP, p.tcp(1, 81))).rules == {21: 1}


@FAMILIES
def test_verdict_is_given_where_the_packet_leaves(rig: Rig, at: Addresses) -> None:
    """At an uplink a sender tag makes the sender's egress policy judge the packet, by its translated address."""
    to_service(rig)
    uplink(rig)
    # Both rows are at the one interface there is: the place leads to the uplink's row, so the number does not fit.
    seen = rig.into(p.frame(at.pod, at.peer, p.TCP, p.tcp(1, 8080)), carries=ENDPOINT)
    assert (seen.passed, seen.reason) == (False, "lost-sender")
    assert rig.into(p.frame(at.pod, at.peer, p.TCP, p.tcp(1, 8080))).reason == "uplink"


@FAMILIES
def test_verdict_is_given_before_the_receivers_own(rig: Rig, at: Addresses) -> None:
    """At a workload the sender's policy judges first, then the workload's; each rule counts, both legs are recorded."""
    to_service(rig)
    # The sender is the endpoint itself, the one that the rig has: a hairpin whose source the at.node put in place.
    packet = p.frame(at.node, at.pod, p.TCP, p.tcp(40000, 8080))
    seen = rig.into(packet, carries=ENDPOINT)
    assert (seen.passed, seen.rules) == (False, {20: 1})
    (event,) = seen.events
    assert (event.endpoint, event.direction, event.rule) == (ENDPOINT, OUT, 20)
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, 22))
    rig.dataplane.bump_generation()
    seen = rig.into(packet, carries=ENDPOINT)
    assert (seen.passed, seen.rules, seen.carries) == (True, {22: 1, 0: 1}, 0)
    assert seen.reasons == {"policy-allow": 1, "self": 1}
    assert rig.into(p.frame(at.node, at.pod, p.TCP, p.tcp(40000, 8080, p.ACK)), carries=ENDPOINT).rules == {22: 1, 0: 1}


@FAMILIES
def test_revoked_where_it_leaves(rig: Rig, at: Addresses) -> None:
    """A change of policy reaches the sender's leg of an established connection."""
    to_service(rig, egress=everything(EGRESS, ALLOW, 22))
    packet = p.frame(at.node, at.pod, p.TCP, p.tcp(40000, 8080))
    assert rig.into(packet, carries=ENDPOINT).passed
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 23))
    rig.dataplane.bump_generation()
    seen = rig.into(p.frame(at.node, at.pod, p.TCP, p.tcp(40000, 8080, p.ACK)), carries=ENDPOINT)
    assert (seen.passed, seen.reason, seen.rules) == (False, "revoked", {23: 1})


@FAMILIES
def test_initial_syn_is_decided_again_where_it_leaves(rig: Rig, at: Addresses) -> None:
    """The sender's current policy judges a SYN on the tuple of its leg; a denied SYN leaves the old leg alone."""
    to_service(rig, egress=everything(EGRESS, ALLOW, 22))
    syn, later = (p.frame(at.node, at.pod, p.TCP, p.tcp(40000, 8080, flags)) for flags in (p.SYN, p.ACK))
    assert rig.into(syn, carries=ENDPOINT).rules == {22: 1, 0: 1}
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, DENY, 23))
    seen = rig.into(syn, carries=ENDPOINT)
    assert (seen.passed, seen.reason, seen.rules) == (False, "policy-deny", {23: 1})
    assert rig.into(later, carries=ENDPOINT).rules == {22: 1, 0: 1}


@FAMILIES
def test_number_of_nobody_is_dropped(rig: Rig, at: Addresses) -> None:
    """A packet with the tag of a missing endpoint is dropped."""
    to_service(rig)
    seen = rig.into(p.frame(at.peer, at.pod, p.TCP, p.tcp(1, 2)), carries=OTHER)
    assert (seen.passed, seen.reason) == (False, "unknown-endpoint")


@FAMILIES
def test_number_that_a_workload_wrote_is_taken_away(rig: Rig, at: Addresses) -> None:
    """A workload cannot pass for another sender, because the program overwrites the tag of its packets."""
    to_service(rig)
    seen = rig.send(Hook.TC_INGRESS, p.frame(at.pod, at.peer, p.TCP, p.tcp(1, 2)), carries=OTHER)
    assert (seen.reason, seen.carries) == ("policy-allow", 0)
    seen = rig.send(Hook.TC_INGRESS, p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 80)), carries=OTHER)
    assert (seen.reason, seen.carries) == ("deferred", ENDPOINT)


@FAMILIES
def test_carrier_leaves_the_rest_of_the_mark(rig: Rig, at: Addresses) -> None:
    """Only the mark's bits that belong to the program change."""
    to_service(rig)
    run = rig.dataplane.test_run(Hook.TC_INGRESS, p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 80)), mark=0x4001)
    assert (run.verdict, run.mark) == (-1, ENDPOINT << MARK_SHIFT | 0x4001)


def test_carrier_that_others_could_overwrite_ends_the_chain(rig: Rig) -> None:
    """If the tag is not in the mark, and only then, no program behind this one sees the packet."""
    to_service(rig)
    config = rig.dataplane.config()
    config.mark_shift = 0
    rig.dataplane.set_config(config)
    assert rig.dataplane.test_run(Hook.TC_INGRESS, p.frame(POD4, VIP4, p.TCP, p.tcp(1, 80))).verdict == 0
    assert rig.dataplane.test_run(Hook.TC_INGRESS, p.frame(POD4, PEER4, p.TCP, p.tcp(1, 80))).verdict == -1


@FAMILIES
def test_denied_while_an_exit_has_no_hook(rig: Rig, at: Addresses) -> None:
    """A packet that could leave without its sender's verdict is denied at ingress."""
    to_service(rig, egress=everything(EGRESS, ALLOW, 22))
    config = rig.dataplane.config()
    config.flags &= ~abi.NP_CONFIG_DEFER
    rig.dataplane.set_config(config)
    seen = rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 80)))
    assert (seen.passed, seen.reason, seen.carries) == (False, "no-exit", 0)


@FAMILIES
def test_process_of_the_node_behind_a_service(rig: Rig, at: Addresses) -> None:
    """A process of the node as backend is judged at once, because no hook follows; several of them are denied."""
    to_service(rig)
    rig.vip(at.vip, p.TCP, 443, local=(at.node, 6443))
    seen = rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 443)))
    assert (seen.passed, seen.rules) == (False, {20: 1})
    rig.vip(at.vip, p.TCP, 444, local=(at.peer, 6443))
    seen = rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 444)))
    assert (seen.reason, seen.carries) == ("deferred", ENDPOINT)
    rig.vip(at.vip, p.TCP, 445, flags=abi.NP_VIP_MANY)
    assert rig.out(p.frame(at.pod, at.vip, p.TCP, p.tcp(1, 445))).reason == "local-backends"


@FAMILIES
def test_node_ports_are_services_at_the_nodes_addresses_only(rig: Rig, at: Addresses) -> None:
    """A node port is deferred at each of the node's addresses; the same port elsewhere is an ordinary one."""
    to_service(rig)
    rig.vip("0.0.0.0" if "." in at.pod else "::", p.TCP, 30080)
    assert rig.out(p.frame(at.pod, at.node, p.TCP, p.tcp(1, 30080))).reason == "deferred"
    assert rig.out(p.frame(at.pod, at.peer, p.TCP, p.tcp(1, 30080))).reason == "policy-allow"


@FAMILIES
def test_translated_source_denies_where_policy_depends_on_it(rig: Rig, at: Addresses) -> None:
    """If a rule asks for the source and the node has replaced it, the packet is denied."""
    to_service(rig, egress=PolicySet(EGRESS, [Verdict(ALLOW, 24), Verdict(ALLOW, 25)], source_classes=2, asks_source=1))
    seen = rig.into(p.frame(at.node, at.pod, p.TCP, p.tcp(1, 2)), carries=ENDPOINT)
    assert (seen.passed, seen.reason) == (False, "hidden-source")
    assert rig.into(p.frame(at.pod, at.pod, p.TCP, p.tcp(1, 2)), carries=ENDPOINT).passed


@FAMILIES
def test_fragments_to_a_service(rig: Rig, at: Addresses) -> None:
    """A later fragment is deferred like its first one, with the tag."""
    to_service(rig)
    rig.vip(at.vip, p.UDP, 53)
    head, tail = p.udp(1, 53, b"x" * 8), b"y" * 8
    if "." in at.pod:
        first = p.eth(p.ip4(at.pod, at.vip, p.UDP, head, more=True), p.IP4)
        later = p.eth(p.ip4(at.pod, at.vip, p.UDP, tail, offset=16), p.IP4)
    else:
        first = p.eth(p.ip6(at.pod, at.vip, 44, p.fragment6(p.UDP, head, more=True)), p.IP6)
        later = p.eth(p.ip6(at.pod, at.vip, 44, p.fragment6(p.UDP, tail, offset=16)), p.IP6)
    assert rig.out(first).carries == ENDPOINT
    assert rig.out(later).carries == ENDPOINT


def test_malformed_packets_are_no_matter_of_an_interface_without_policy(rig: Rig) -> None:
    """An uplink passes malformed packets, because it has the program only for services."""
    uplink(rig)
    rig.defer()
    for frame in (b"\0" * 16, p.eth(p.ip4(POD4, PEER4, p.TCP, b"", words=4), p.IP4), p.eth(b"\0" * 40, 0x9999)):
        for hook in Hook:
            assert rig.send(hook, frame).reason == "uplink"
    assert not rig.into(p.eth(p.ip4(POD4, PEER4, p.TCP, b"", words=4), p.IP4), carries=ENDPOINT).passed


def host(rig: Rig, sets: dict[tuple[int, int], PolicySet]) -> None:
    """A host endpoint on the interface, with its node's addresses."""
    rig.endpoint(everything(3, DENY, 31), everything(4, DENY, 32), flags=abi.NP_ENDPOINT_HOST)
    rig.host(sets)
    rig.local(NODE4, NODE6)


UNTRACKED, PRE_DNAT, FORWARD, NORMAL = (
    abi.NP_STAGE_UNTRACKED, abi.NP_STAGE_PRE_DNAT, abi.NP_STAGE_FORWARD, abi.NP_STAGE_NORMAL,
)  # fmt: skip
CONTINUE = abi.NP_ACTION_CONTINUE

LISTS = [
    ("untracked before all", {UNTRACKED: ALLOW, PRE_DNAT: DENY, NORMAL: DENY, FORWARD: DENY}, 41, 41),
    ("pre-DNAT before the rest", {UNTRACKED: CONTINUE, PRE_DNAT: ALLOW, NORMAL: DENY, FORWARD: DENY}, 42, 42),
    ("pre-DNAT denies", {UNTRACKED: CONTINUE, PRE_DNAT: DENY, NORMAL: ALLOW, FORWARD: ALLOW}, -42, -42),
    ("normal or forward policy", {PRE_DNAT: CONTINUE, NORMAL: ALLOW, FORWARD: DENY}, 43, -44),
    ("none has an opinion", {PRE_DNAT: CONTINUE, NORMAL: DENY, FORWARD: CONTINUE}, -43, 44),
    ("no forward policy", {NORMAL: DENY}, -43, 0),
]


@pytest.mark.parametrize(("lists", "local", "forwarded"), [one[1:] for one in LISTS], ids=[one[0] for one in LISTS])
@pytest.mark.parametrize("version", [4, 6])
def test_order_of_a_hosts_lists(rig: Rig, lists: dict[int, int], local: int, forwarded: int, version: int) -> None:
    """Each list judges in its turn, by the packet's destination; the number is the deciding rule, negative for a deny."""
    numbers = {UNTRACKED: 41, PRE_DNAT: 42, NORMAL: 43, FORWARD: 44}
    host(rig, {(stage, IN): everything(10 + stage, action, numbers[stage]) for stage, action in lists.items()})
    world, node, pod = (PEER4, NODE4, POD4) if version == 4 else (PEER6, NODE6, POD6)
    for destination, expected in ((node, local), (pod, forwarded)):
        (event,) = (seen := rig.send(Hook.TC_INGRESS, p.frame(world, destination, p.UDP, p.udp(1, 2)))).events or [None]
        if event is None:
            assert (seen.passed, seen.rules) == (expected >= 0, {expected: 1} if expected else {0: 1})
        else:
            assert (seen.passed, event.rule) == (expected >= 0, abs(expected))


def test_failsafe_port_comes_before_every_list(rig: Rig) -> None:
    """A failsafe verdict holds for the node's processes, whatever untracked and pre-DNAT policy say."""
    deny = {(stage, IN): everything(10 + stage, DENY, 40 + stage) for stage in (UNTRACKED, PRE_DNAT, FORWARD)}
    host(rig, {**deny, (NORMAL, IN): PolicySet(20, [Verdict(ALLOW, 50, failsafe=True)])})
    assert rig.send(Hook.TC_INGRESS, p.frame(PEER4, NODE4, p.TCP, p.tcp(1, 22))).rules == {50: 1}
    assert not rig.send(Hook.TC_INGRESS, p.frame(PEER4, POD4, p.TCP, p.tcp(1, 22))).passed


def test_untracked_allow_leaves_no_connection(rig: Rig) -> None:
    """What untracked policy allows records no connection, so its reply is judged by itself."""
    host(rig, {(UNTRACKED, IN): everything(10, ALLOW, 41), (NORMAL, OUT): everything(11, DENY, 43)})
    assert rig.send(Hook.TC_INGRESS, p.frame(PEER4, NODE4, p.UDP, p.udp(1, 2))).passed
    assert not rig.connections("np_unreplied4")
    assert not rig.into(p.frame(NODE4, PEER4, p.UDP, p.udp(2, 1)), ingress=0).passed


def test_multicast_is_for_the_node(rig: Rig) -> None:
    """Multicast is judged as for the node's processes."""
    host(rig, {(NORMAL, IN): everything(10, DENY, 43), (FORWARD, IN): everything(11, ALLOW, 44)})
    for destination in ("224.0.0.1", "255.255.255.255", "ff02::1"):
        source = PEER4 if "." in destination else PEER6
        assert rig.send(Hook.TC_INGRESS, p.frame(source, destination, p.UDP, p.udp(1, 2))).rules == {43: 1}


def test_wildcard_judges_workloads_too(rig: Rig) -> None:
    """With a wildcard host endpoint, what leaves a workload also enters the host, and the reverse."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(EGRESS, ALLOW, 12))
    rig.local(NODE4)
    config = rig.dataplane.config()
    config.wildcard = OTHER
    rig.dataplane.set_config(config)
    rig.host({(PRE_DNAT, IN): everything(10, CONTINUE, 42), (FORWARD, IN): everything(11, ALLOW, 44),
              (FORWARD, OUT): everything(12, DENY, 45), (NORMAL, IN): everything(13, DENY, 43)}, number=OTHER)  # fmt: skip
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(1, 2))).rules == {12: 1}
    seen = rig.into(p.frame(PEER4, POD4, p.UDP, p.udp(3, 4)))
    assert (seen.passed, seen.rules, seen.events[0].endpoint, seen.events[0].direction) == (False, {45: 1}, OTHER, OUT)
    assert rig.out(p.frame(POD4, NODE4, p.UDP, p.udp(5, 6))).rules == {12: 1}
    rig.flags(abi.NP_CONFIG_TO_HOST_PASS)
    assert rig.out(p.frame(POD4, NODE4, p.UDP, p.udp(7, 8))).rules == {43: 1}
    rig.flags(abi.NP_CONFIG_TO_HOST_DENY)
    assert rig.out(p.frame(POD4, NODE4, p.UDP, p.udp(9, 10))).reason == "to-host"
    rig.host({(PRE_DNAT, IN): everything(10, DENY, 42)}, number=OTHER, version=2)
    assert rig.out(p.frame(POD4, PEER4, p.UDP, p.udp(11, 12))).rules == {42: 1}


def test_host_row_that_does_not_check_is_not_used(rig: Rig) -> None:
    """A row with wrong check words (as if read during a replacement) is read again until the budget of calls is spent."""
    host(rig, {(NORMAL, IN): everything(10, ALLOW, 43)})
    ((key, _),) = rig.map("np_host").items()
    row = abi.np_host.from_buffer_copy(rig.map("np_host").get(key) or b"")
    row.sets[0].verdict_base ^= 64
    rig.map("np_host").put(key, bytes(row))
    seen = rig.send(Hook.TC_INGRESS, p.frame(PEER4, NODE4, p.UDP, p.udp(1, 2)))
    assert (seen.passed, seen.reason) == (False, "call-budget")
