# SPDX-License-Identifier: Apache-2.0
"""Rules with domain names: the verdict for an address that an endpoint learned from a DNS answer."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import packets as p
import pytest
from rig import (
    ALLOW,
    CONTINUE,
    DENY,
    ENDPOINT,
    IN,
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

SITE4, SITE6 = "192.0.2.80", "2001:db8::80"
"""An address of a name outside the cluster."""
INGRESS, EGRESS = 1, 2
LIST, CLASS, OTHER_CLASS = 5, 40, 41
RULE, LATER_RULE, END = 30, 31, 12
"""Rules: two with names, and the end of the tier."""
VALID, EXPIRED = 100, -1
"""In units of NP_LEARNED_JIFFIES."""
ANOTHER = ENDPOINT + 1

FAMILIES = pytest.mark.parametrize(("pod", "site"), [(POD4, SITE4), (POD6, SITE6)], ids=["ipv4", "ipv6"])


def own(action: int = DENY, **fields: int) -> PolicySet:
    """A policy set for egress whose one verdict has the domain list."""
    return PolicySet(EGRESS, [Verdict(action, END, domain_list=LIST, **fields)])


@pytest.fixture
def scene(rig: Rig) -> Rig:
    """A pod that may send only to names of CLASS, by RULE."""
    rig.pod(everything(INGRESS, DENY, 11), own())
    rig.domain(LIST, CLASS, RULE)
    return rig


def syn(pod: str, site: str, port: int = 443, source: int = 40000) -> bytes:
    return p.frame(pod, site, p.TCP, p.tcp(source, port))


@FAMILIES
def test_address_without_a_name_has_the_verdict_of_the_list(scene: Rig, pod: str, site: str) -> None:
    """An address that the endpoint never learned is denied by the rule after the rules with names."""
    seen = scene.out(syn(pod, site))
    assert (seen.passed, seen.reason, seen.rules) == (False, "policy-deny", {END: 1})


@FAMILIES
def test_learned_address_is_allowed_by_the_rule_of_its_name(scene: Rig, pod: str, site: str) -> None:
    """A learned address is allowed at its first packet, and the rule with the name counts it, staged as enforced."""
    before = scene.staged_packets(RULE)
    scene.learned(site, {CLASS: VALID})
    seen = scene.out(syn(pod, site))
    assert (seen.passed, seen.reason, seen.rules) == (True, "policy-allow", {RULE: 1})
    assert scene.staged_packets(RULE) == before + 1
    assert scene.name_classes() == {CLASS}


@FAMILIES
def test_name_holds_only_for_the_ports_of_its_rule(rig: Rig, pod: str, site: str) -> None:
    """A verdict of another port has no domain list, so the name does not count."""
    rig.atom(abi.NP_SLOT_TCP * 256 + 1, 443 - 256, 9)
    rig.l4_class(EGRESS, 9, 1)
    verdicts = [Verdict(DENY, END), Verdict(DENY, END, domain_list=LIST)]
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, verdicts, l4_classes=2))
    rig.domain(LIST, CLASS, RULE)
    rig.learned(site, {CLASS: VALID})
    assert rig.out(syn(pod, site, 80)).rules == {END: 1}
    assert rig.out(syn(pod, site, 443)).rules == {RULE: 1}


@pytest.mark.parametrize(
    ("left", "allowed"), [(VALID, True), (1 << 30, True), (EXPIRED, False), (-(1 << 30), False), (0, False)]
)
def test_class_counts_until_it_expires(scene: Rig, left: int, *, allowed: bool) -> None:
    """A class counts until its time, also if the 32-bit clock wraps between now and then."""
    scene.learned(SITE4, {CLASS: left})
    assert scene.out(syn(POD4, SITE4)).rules == {RULE if allowed else END: 1}


def test_names_of_another_endpoint_do_not_count(scene: Rig) -> None:
    """An endpoint that did not ask is denied what only another endpoint learned."""
    scene.learned(SITE4, {CLASS: VALID}, endpoint=ANOTHER)
    assert scene.out(syn(POD4, SITE4)).rules == {END: 1}


def test_names_of_no_rule_of_the_list_do_not_count(scene: Rig) -> None:
    """A class without a rule in the list changes nothing, and class 0 stands for no name at all."""
    scene.domain(LIST, 0, RULE)
    scene.domain(LIST + 1, OTHER_CLASS, RULE)
    assert scene.out(syn(POD4, SITE4)).rules == {END: 1}
    scene.learned(SITE4, {OTHER_CLASS: VALID})
    assert scene.out(syn(POD4, SITE4)).rules == {END: 1}


@FAMILIES
@pytest.mark.parametrize("order", [(CLASS, OTHER_CLASS), (OTHER_CLASS, CLASS)])
def test_least_rank_of_all_names_decides(scene: Rig, pod: str, site: str, order: tuple[int, int]) -> None:
    """If an address has several names, the first rule in the order of evaluation decides, whichever name was learned first."""
    scene.domain(LIST, CLASS, LATER_RULE, rank=7)
    scene.domain(LIST, OTHER_CLASS, RULE, rank=3)
    scene.learned(site, dict.fromkeys(order, VALID))
    assert scene.out(syn(pod, site)).rules == {RULE: 1}
    assert scene.name_classes() == {OTHER_CLASS}
    scene.learned(site, {CLASS: VALID, OTHER_CLASS: EXPIRED})
    assert scene.out(syn(pod, site, source=40001)).rules == {LATER_RULE: 1}


def test_every_class_of_an_address_counts(scene: Rig) -> None:
    """The rule may belong to any of the classes for which a row has room."""
    for slot in range(abi.NP_LEARNED_CLASSES):
        classes = [100 + one for one in range(abi.NP_LEARNED_CLASSES)]
        classes[slot] = CLASS
        scene.learned(SITE4, dict.fromkeys(classes, VALID))
        assert scene.out(syn(POD4, SITE4, source=40000 + slot)).rules == {RULE: 1}


def test_address_that_became_a_workloads_is_denied(rig: Rig) -> None:
    """Names count only for addresses outside the cluster: an address row selects a peer class without the list."""
    verdicts = [Verdict(DENY, END, domain_list=LIST), Verdict(DENY, END)]
    rig.pod(everything(INGRESS, DENY, 11), PolicySet(EGRESS, verdicts, peer_classes=2))
    rig.domain(LIST, CLASS, RULE)
    rig.peer_class(EGRESS, PEER_IDENTITY, 1)
    rig.learned(SITE4, {CLASS: VALID})
    assert rig.out(syn(POD4, SITE4)).rules == {RULE: 1}
    rig.address(SITE4, PEER_IDENTITY, ANOTHER)
    rig.epoch()
    assert rig.out(syn(POD4, SITE4, source=40001)).rules == {END: 1}


@pytest.fixture
def without_program(scene: Rig) -> Iterator[Rig]:
    """The scene without np_tc_names."""
    assert scene.dataplane.programs.calls.delete(struct.pack("=I", abi.NP_CALL_NAMES))
    yield scene
    assert scene.dataplane.programs.mend_calls() == ["np_tc_names"]


@FAMILIES
def test_missing_program_drops_what_may_have_a_name(without_program: Rig, pod: str, site: str) -> None:
    """Without np_tc_names a packet whose verdict has a domain list is dropped and counted; any other is judged as before."""
    without_program.learned(site, {CLASS: VALID})
    seen = without_program.out(syn(pod, site))
    assert (seen.passed, seen.reason) == (False, "call-missing")
    without_program.pod(everything(INGRESS, DENY, 11), everything(3, ALLOW, 13))
    without_program.epoch()
    assert without_program.out(syn(pod, site)).rules == {13: 1}


@FAMILIES
def test_name_may_decide_what_the_list_allows_anyway(rig: Rig, pod: str, site: str) -> None:
    """If a rule with a name comes before the rule that allows the packet, the rule with the name counts it."""
    rig.pod(everything(INGRESS, DENY, 11), own(ALLOW))
    rig.domain(LIST, CLASS, RULE)
    assert rig.out(syn(pod, site)).rules == {END: 1}
    assert rig.name_classes() == set()
    rig.learned(site, {CLASS: VALID})
    assert rig.out(syn(pod, site, source=40001)).rules == {RULE: 1}


def test_staged_rule_with_a_name_changes_the_pending_evaluation_alone(rig: Rig) -> None:
    """Enforced and pending evaluation have ranks of their own: a staged rule allows nothing."""
    rig.pod(everything(INGRESS, DENY, 11), own())
    rig.domain(LIST, CLASS, 0, rank=abi.NP_RANK_LAST, staged_rank=0, staged_rule=RULE)
    rig.learned(SITE4, {CLASS: VALID})
    before = rig.staged_packets(RULE)
    seen = rig.out(syn(POD4, SITE4))
    assert (seen.reason, seen.rules, rig.staged_packets(RULE)) == ("policy-deny", {END: 1}, before + 1)
    assert [(one.action, one.staged_action) for one in seen.events] == [(DENY, ALLOW)]


def test_staged_policy_may_take_a_name_away(rig: Rig) -> None:
    """If the pending evaluation has no rule for the name, it keeps the verdict of the list."""
    rig.pod(everything(INGRESS, DENY, 11), own())
    rig.flags(abi.NP_CONFIG_ALLOW_EVENTS)
    rig.domain(LIST, CLASS, RULE, rank=4, staged_rank=abi.NP_RANK_LAST, staged_rule=0)
    rig.learned(SITE4, {CLASS: VALID})
    before = rig.staged_packets(END)
    seen = rig.out(syn(POD4, SITE4))
    assert (seen.reason, seen.rules, rig.staged_packets(END)) == ("policy-allow", {RULE: 1}, before + 1)
    assert [(one.action, one.staged_action) for one in seen.events] == [(ALLOW, DENY)]


def test_least_ranks_of_both_evaluations_may_be_of_two_names(scene: Rig) -> None:
    """The enforced rule may belong to one name of the address, and the pending one to another."""
    scene.domain(LIST, CLASS, RULE, rank=1, staged_rank=8, staged_rule=50)
    scene.domain(LIST, OTHER_CLASS, LATER_RULE, rank=2, staged_rank=7, staged_rule=51)
    scene.learned(SITE4, {OTHER_CLASS: VALID, CLASS: VALID})
    before = scene.staged_packets(51)
    assert scene.out(syn(POD4, SITE4)).rules == {RULE: 1}
    assert scene.staged_packets(51) == before + 1


def test_log_rules_before_the_rule_with_the_name(rig: Rig) -> None:
    """The list of Log rules is that of the rule which decides, and not that of the verdict."""
    rig.pod(everything(INGRESS, DENY, 11), own(log_list=70))
    rig.domain(LIST, CLASS, RULE, log_list=71)
    rig.domain(LIST, OTHER_CLASS, RULE)
    for port, (classes, log_list) in enumerate((({}, 70), ({CLASS: VALID}, 71), ({OTHER_CLASS: VALID}, 0))):
        rig.learned(SITE4, classes)
        logged = [
            one.log_list for one in rig.out(syn(POD4, SITE4, source=port + 1)).events if one.kind == abi.NP_EVENT_LOG
        ]
        assert logged == ([log_list] if log_list else [])


@FAMILIES
def test_open_connection_outlives_its_name_but_not_its_rule(scene: Rig, pod: str, site: str) -> None:
    """After changes of policy an open connection goes on although its name has expired, and ends when the rule is gone."""
    scene.learned(site, {CLASS: VALID})
    opening, answer = syn(pod, site), p.frame(site, pod, p.TCP, p.tcp(443, 40000, p.SYN | p.ACK))
    data = p.frame(pod, site, p.TCP, p.tcp(40000, 443, p.ACK))
    assert scene.out(opening).reason == "policy-allow"
    assert scene.into(answer).reason == "established"
    scene.learned(site, {CLASS: EXPIRED})
    for _ in range(2):
        scene.dataplane.bump_generation()
        assert scene.out(data).rules == {RULE: 1}
    assert scene.out(syn(pod, site, source=40001)).rules == {END: 1}, "a new connection needs a valid name"
    scene.domain(LIST, CLASS, LATER_RULE)
    scene.dataplane.bump_generation()
    assert scene.out(data).rules == {LATER_RULE: 1}
    assert scene.map("np_domain").delete(bytes(abi.np_domain_key(list=LIST, name_class=CLASS)))
    scene.dataplane.bump_generation()
    assert scene.out(data).reason == "revoked"


@FAMILIES
def test_connection_that_needed_no_name_has_none_later(rig: Rig, pod: str, site: str) -> None:
    """A connection that was allowed without a name is cut when only a rule with an expired name is left."""
    rig.pod(everything(INGRESS, DENY, 11), everything(EGRESS, ALLOW, END))
    rig.domain(LIST, CLASS, RULE)
    rig.learned(site, {CLASS: EXPIRED})
    assert rig.out(p.frame(pod, site, p.UDP, p.udp(1, 443))).reason == "policy-allow"
    rig.pod(everything(INGRESS, DENY, 11), own())
    rig.dataplane.bump_generation()
    rig.epoch()
    assert rig.out(p.frame(pod, site, p.UDP, p.udp(1, 443))).reason == "revoked"


def test_slot_of_a_connection_does_not_keep_the_class_of_an_earlier_one(rig: Rig) -> None:
    """A connection in the slot of an earlier one has the class of its own verdict: here none."""
    rig.pod(everything(INGRESS, DENY, 11), own())
    rig.domain(LIST, CLASS, RULE)
    rig.learned(SITE4, {CLASS: VALID})
    packet = p.frame(POD4, SITE4, p.UDP, p.udp(1, 443))
    assert rig.out(packet).reason == "policy-allow"
    assert rig.name_classes() == {CLASS}
    rig.map("np_unreplied4").delete_many([key for key, _ in rig.map("np_unreplied4").items()])
    rig.pod(everything(INGRESS, DENY, 11), everything(3, ALLOW, END))
    rig.epoch()
    assert rig.out(packet).reason == "policy-allow"
    assert rig.name_classes() == set()


@FAMILIES
def test_host_endpoint_has_names_of_its_own(rig: Rig, pod: str, site: str) -> None:
    """A process of the node may send to the names of its host endpoint's rules, by the addresses that the host learned."""
    rig.pod(everything(INGRESS, DENY, 11), own(), flags=abi.NP_ENDPOINT_HOST)
    rig.local(pod)
    rig.domain(LIST, CLASS, RULE)
    rig.learned(site, {CLASS: VALID}, endpoint=ANOTHER)
    assert rig.send(Hook.TC_EGRESS, syn(pod, site), ingress=0).rules == {END: 1}
    rig.learned(site, {CLASS: VALID})
    assert rig.send(Hook.TC_EGRESS, syn(pod, site), ingress=0).rules == {RULE: 1}
    rig.learned(site, {CLASS: EXPIRED})
    rig.dataplane.bump_generation()
    assert rig.into(p.frame(pod, site, p.TCP, p.tcp(40000, 443, p.ACK)), ingress=0).rules == {RULE: 1}


def test_lists_of_a_host_endpoint_go_on_after_a_name(rig: Rig) -> None:
    """After a list with names the next list follows, and both may have names; failsafe ports need none."""
    rig.pod(everything(INGRESS, DENY, 11), own(), flags=abi.NP_ENDPOINT_HOST)
    rig.local(POD4)
    lists = {
        (abi.NP_STAGE_UNTRACKED, OUT): PolicySet(3, [Verdict(CONTINUE, 0, domain_list=LIST + 1)]),
        (abi.NP_STAGE_NORMAL, OUT): own(),
        (abi.NP_STAGE_NORMAL, IN): everything(INGRESS, DENY, 11),
    }
    rig.host(lists)
    rig.domain(LIST, CLASS, RULE)
    rig.domain(LIST + 1, OTHER_CLASS, LATER_RULE)

    def sent(source: int) -> tuple[str, dict[int, int]]:
        seen = rig.send(Hook.TC_EGRESS, syn(POD4, SITE4, source=source), ingress=0)
        return seen.reason, dict(seen.rules)

    assert sent(1) == ("policy-deny", {END: 1})
    rig.learned(SITE4, {CLASS: VALID})
    assert sent(2) == ("policy-allow", {RULE: 1})
    assert rig.connections("np_unreplied4")
    rig.learned(SITE4, {OTHER_CLASS: VALID})
    before = len(rig.connections("np_unreplied4"))
    assert sent(3) == ("policy-allow", {LATER_RULE: 1})
    assert len(rig.connections("np_unreplied4")) == before, "untracked policy allowed it"


@pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
def test_sender_of_a_packet_to_a_service_has_its_own_names(rig: Rig, pod: str, peer: str) -> None:
    """A verdict that was deferred to the receiver's interface counts the names that the sender learned."""
    rig.pod(everything(INGRESS, ALLOW, 11), everything(3, DENY, 13))
    rig.endpoint(everything(4, DENY, 14), own(), number=ANOTHER, ifindex=2)
    rig.address(peer, PEER_IDENTITY, ANOTHER)
    rig.defer()
    rig.domain(LIST, CLASS, RULE)
    packet = p.frame(peer, pod, p.TCP, p.tcp(40000, 443))
    rig.learned(pod, {CLASS: VALID})
    assert rig.into(packet, carries=ANOTHER).rules == {END: 1}
    rig.learned(pod, {CLASS: VALID}, endpoint=ANOTHER)
    assert rig.into(packet, carries=ANOTHER).rules == {RULE: 1, 11: 1}
    rig.learned(pod, {CLASS: EXPIRED}, endpoint=ANOTHER)
    rig.dataplane.bump_generation()
    later = p.frame(peer, pod, p.TCP, p.tcp(40000, 443, p.ACK))
    assert rig.into(later, carries=ANOTHER).rules == {RULE: 1, 11: 1}
