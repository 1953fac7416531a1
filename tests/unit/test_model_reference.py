# SPDX-License-Identifier: Apache-2.0
"""The reference model's evaluation: tiers, profiles, stages, staged policies, logs, and the exact cause of each ending."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from worlds import ALLOW, DENY, HOST, LOG, PASS, POD, ask, by_rule, packet, policy, world

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import (
    ICMP,
    TCP,
    TUNNELS,
    UDP,
    Action,
    Cause,
    CauseKind,
    ClusterNode,
    Direction,
    EndpointKey,
    Failsafe,
    Outcome,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    ProfileRules,
    Question,
    Rule,
    Stage,
    Staged,
    Tunnel,
    Verdict,
    World,
)
from netpol_ebpf.selector import parse

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
UDP_ONLY = Rule(Action.ALLOW, 0, protocol=UDP)


def decide(held: World, question: Question) -> Verdict:
    return ReferenceModel(held).decide(question)


def both(outcome: Outcome, cause: Cause, logs: tuple[Cause, ...] = ()) -> Verdict:
    """A verdict in which nothing staged differs."""
    return Verdict(outcome, cause, outcome, cause, logs)


def tier_end(owner: Policy, direction: Direction = INGRESS) -> Cause:
    return Cause(CauseKind.TIER_END, direction, owner.tier, owner.key, action=Action.DENY)


NO_MATCH_DENY = Cause(CauseKind.NO_MATCH, INGRESS, action=Action.DENY)
NO_MATCH_CONTINUE = Cause(CauseKind.NO_MATCH, INGRESS, action=Action.PASS)


def test_an_endpoint_without_policy_or_profile_denies() -> None:
    """SEMANTICS 3.3: nothing decides, so it is denied without a rule."""
    assert decide(world(), ask()) == both(Outcome.DENY, NO_MATCH_DENY)


def test_an_unknown_endpoint_denies() -> None:
    """A question about an endpoint that the world lacks fails closed."""
    assert decide(world(), ask(EndpointKey("Pod", "ns", "gone"))) == both(Outcome.DENY, NO_MATCH_DENY)


def test_the_first_matching_rule_decides_and_is_named() -> None:
    """Rules are tried in list order within policies in order."""
    first = policy("first", UDP_ONLY, order=1)
    second = policy("second", Rule(Action.DENY, 0, protocol=UDP), Rule(Action.ALLOW, 1), Rule(Action.DENY, 2), order=2)
    assert decide(world(second, first), ask()) == both(Outcome.ALLOW, by_rule(second, 1, Action.ALLOW))


def test_the_end_of_a_tier_denies_and_names_its_last_policy() -> None:
    """A policy that selects the endpoint isolates it, whatever its rules."""
    first, last = policy("a", UDP_ONLY, order=1), policy("b", order=2)
    assert decide(world(last, first), ask()) == both(Outcome.DENY, tier_end(last))


def test_a_direction_that_no_policy_has_is_not_isolated() -> None:
    """An ingress-only policy leaves egress to later tiers and profiles."""
    held = world(policy("in", types=frozenset({INGRESS})), profiles=("open",))
    held.profiles["open"] = ProfileRules("open", (ALLOW,), (ALLOW,))
    cause = Cause(CauseKind.PROFILE, EGRESS, profile="open", index=0, action=Action.ALLOW)
    assert decide(held, ask(direction=EGRESS)) == both(Outcome.ALLOW, cause)


def test_pass_skips_the_rest_of_its_tier() -> None:
    """Pass goes to the next tier, past a Deny that stands later in its own."""
    early = PolicyTier("early", 1.0)
    held = world(
        policy("pass", PASS, tier="early", order=1),
        policy("deny", DENY, tier="early", order=2),
        allow := policy("allow", ALLOW),
        tiers=(early, PolicyTier("default", 1e6)),
    )
    assert decide(held, ask()) == both(Outcome.ALLOW, by_rule(allow, 0, Action.ALLOW))


def test_a_tier_that_ends_in_pass_goes_on() -> None:
    """The default action Pass hands over to the next tier."""
    soft = PolicyTier("soft", 1.0, Action.PASS)
    held = world(policy("a", tier="soft"), b := policy("b", DENY), tiers=(soft, PolicyTier("default", 1e6)))
    assert decide(held, ask()) == both(Outcome.DENY, by_rule(b, 0, Action.DENY))


def test_pass_in_the_last_tier_leads_to_the_profiles() -> None:
    """SEMANTICS 3.2: and without profiles to the implicit deny."""
    assert decide(world(policy("p", PASS)), ask()) == both(Outcome.DENY, NO_MATCH_DENY)


@pytest.mark.parametrize(
    ("tiers", "winner"),
    [
        ((PolicyTier("x", 2.0), PolicyTier("y", 1.0)), "y"),
        ((PolicyTier("x", 1.0), PolicyTier("y", 1.0)), "x"),
        ((PolicyTier("x", float("inf")), PolicyTier("y", 9e9)), "y"),
    ],
)
def test_tiers_go_by_order_then_name(tiers: tuple[PolicyTier, ...], winner: str) -> None:
    """A lower order goes first, and the name decides a tie."""
    policies = {tier.name: policy(f"p-{tier.name}", ALLOW, tier=tier.name) for tier in tiers}
    assert decide(world(*policies.values(), tiers=tiers), ask()).cause.tier == winner


def test_a_tier_that_does_not_exist_goes_last_and_denies_at_its_end() -> None:
    """SEMANTICS 1.8: policies of a tier without object still act, after all valid tiers."""
    lost = policy("lost", UDP_ONLY, tier="aaa", order=1)
    held = world(lost, pass_on := policy("p", PASS))
    assert decide(held, ask()).cause == tier_end(lost)
    held.policies[pass_on.key] = replace(pass_on, ingress=(DENY,))
    assert decide(held, ask()).cause.tier == "default"


def test_ties_of_policies_compare_name_namespace_kind() -> None:
    """The string name/namespace/kind decides between equal orders."""
    keys = [
        PolicyKey("NetworkPolicy", "ns1", "a"),
        PolicyKey("GlobalNetworkPolicy", "", "a"),
        PolicyKey("GlobalNetworkPolicy", "", "a-"),
        PolicyKey("KubernetesNetworkPolicy", "ns1", "a"),
    ]
    held = world(*(policy("x", ALLOW, key=key) for key in keys))
    order = []
    while held.policies:
        cause = decide(held, ask()).cause
        assert cause.policy is not None
        order.append(cause.policy)
        del held.policies[cause.policy]
    assert order == [keys[2], keys[1], keys[3], keys[0]]


def test_log_notes_and_goes_on() -> None:
    """Log rules that matched before the end are listed in order, the later ones are not."""
    logging = policy(
        "log", LOG, Rule(Action.LOG, 1, protocol=UDP), Rule(Action.LOG, 2), Rule(Action.DENY, 3), Rule(Action.LOG, 4)
    )
    logs = (by_rule(logging, 0, Action.LOG), by_rule(logging, 2, Action.LOG))
    assert decide(world(logging), ask()) == both(Outcome.DENY, by_rule(logging, 3, Action.DENY), logs)


def test_a_log_rule_of_several_internal_rules_is_listed_once() -> None:
    """Internal rules that share an index stem from one rule of the user."""
    logging = policy("log", LOG, LOG, Rule(Action.ALLOW, 1))
    assert decide(world(logging), ask()).logs == (by_rule(logging, 0, Action.LOG),)


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "outcome", "said"),
    [
        (Action.ALLOW, Outcome.ALLOW, Action.ALLOW),
        (Action.DENY, Outcome.DENY, Action.DENY),
        (Action.PASS, Outcome.DENY, Action.DENY),
    ],
)
def test_profiles_end_the_evaluation(action: Action, outcome: Outcome, said: Action) -> None:
    """Pass in a profile is a deny."""
    held = world(profiles=("one", "two"))
    held.profiles["one"] = ProfileRules("one", (Rule(Action.LOG, 0), Rule(Action.ALLOW, 1, protocol=UDP)))
    held.profiles["two"] = ProfileRules("two", (Rule(action, 3),))
    log = Cause(CauseKind.PROFILE, INGRESS, profile="one", index=0, action=Action.LOG)
    cause = Cause(CauseKind.PROFILE, INGRESS, profile="two", index=3, action=said)
    assert decide(held, ask()) == both(outcome, cause, (log,))


def test_a_missing_profile_denies_where_it_stands() -> None:
    """Fail closed, but not before the profiles that come earlier."""
    held = world(profiles=("first", "missing"))
    held.profiles["first"] = ProfileRules("first", (UDP_ONLY,))
    cause = Cause(CauseKind.PROFILE, INGRESS, profile="missing", action=Action.DENY)
    assert decide(held, ask()) == both(Outcome.DENY, cause)
    assert decide(held, ask(about=packet("192.0.2.1", "10.0.0.1", UDP))).outcome is Outcome.ALLOW


# --- stages of hosts --------------------------------------------------------------------------------------------------

FORWARD = policy("forward", UDP_ONLY, apply_on_forward=True, order=2)
LOCAL = policy("local", UDP_ONLY, order=3)
EARLY = policy("early", UDP_ONLY, pre_dnat=True, apply_on_forward=True, order=4)
RAW = policy("raw", UDP_ONLY, do_not_track=True, apply_on_forward=True, order=5)


@pytest.mark.parametrize(
    ("stage", "cause"),
    [
        (Stage.NORMAL, tier_end(LOCAL)),
        (Stage.FORWARD, tier_end(FORWARD)),
        (Stage.PRE_DNAT, NO_MATCH_CONTINUE),
        (Stage.UNTRACKED, NO_MATCH_CONTINUE),
    ],
)
def test_each_stage_of_a_host_has_its_own_policies_and_its_own_end(stage: Stage, cause: Cause) -> None:
    """PreDNAT and untracked tiers end in Pass whatever they say, the other two in deny."""
    held = world(FORWARD, LOCAL, EARLY, RAW)
    about = packet("192.0.2.1", "172.16.0.1")
    outcome = Outcome.CONTINUE if cause == NO_MATCH_CONTINUE else Outcome.DENY
    assert decide(held, ask(HOST, INGRESS, stage, about)) == both(outcome, cause)


@pytest.mark.parametrize(
    ("stage", "owner"),
    [(Stage.NORMAL, FORWARD), (Stage.FORWARD, FORWARD), (Stage.PRE_DNAT, EARLY), (Stage.UNTRACKED, RAW)],
)
def test_the_first_policy_of_a_stage_decides_there(stage: Stage, owner: Policy) -> None:
    """ApplyOnForward policy is local policy too; the special kinds are nowhere else."""
    held = world(FORWARD, LOCAL, EARLY, RAW)
    about = packet("192.0.2.1", "172.16.0.1", UDP)
    assert decide(held, ask(HOST, INGRESS, stage, about)) == both(Outcome.ALLOW, by_rule(owner, 0, Action.ALLOW))


def test_forwarded_traffic_without_forward_policy_goes_on() -> None:
    """Host policy that is not applyOnForward and profiles have no say over what passes through."""
    held = world(LOCAL, profiles=("missing",))
    assert decide(held, ask(HOST, INGRESS, Stage.FORWARD)) == both(Outcome.CONTINUE, NO_MATCH_CONTINUE)


def test_workloads_know_normal_policy_only() -> None:
    """Untracked and preDNAT policies never act on a workload, not even by making a tier visible."""
    held = world(EARLY, RAW)
    assert decide(held, ask()) == both(Outcome.DENY, NO_MATCH_DENY)
    for stage in (Stage.FORWARD, Stage.PRE_DNAT, Stage.UNTRACKED):
        assert decide(world(FORWARD, EARLY, RAW), ask(stage=stage)) == both(Outcome.CONTINUE, NO_MATCH_CONTINUE)


def failsafe(index: int, direction: Direction = INGRESS) -> Cause:
    return Cause(CauseKind.FAILSAFE, direction, index=index, action=Action.ALLOW)


@pytest.mark.parametrize(("stage", "outcome"), [(Stage.NORMAL, Outcome.ALLOW), (Stage.UNTRACKED, Outcome.CONTINUE)])
@pytest.mark.parametrize(
    ("direction", "protocol", "port", "index"), [(INGRESS, TCP, 22, 0), (INGRESS, UDP, 68, 1), (EGRESS, UDP, 53, 0)]
)
def test_failsafes_go_before_policy(
    stage: Stage, outcome: Outcome, direction: Direction, protocol: int, port: int, index: int
) -> None:
    """In NORMAL they allow; in UNTRACKED they keep untracked policy from having a say."""
    held = world(policy("no", DENY), policy("raw", DENY, do_not_track=True))
    about = packet("192.0.2.1", "172.16.0.1", protocol, port)
    assert decide(held, ask(HOST, direction, stage, about)) == both(outcome, failsafe(index, direction))


def test_failsafes_are_of_hosts_and_local_traffic_only() -> None:
    """Neither workloads nor the other stages have them, and ICMP is none."""
    held = world(policy("no", DENY, apply_on_forward=True), policy("pre", DENY, pre_dnat=True))
    ssh = packet("192.0.2.1", "172.16.0.1", TCP, 22)
    assert decide(held, ask(POD, about=ssh)).outcome is Outcome.DENY
    assert decide(held, ask(HOST, stage=Stage.FORWARD, about=ssh)).outcome is Outcome.DENY
    assert decide(held, ask(HOST, stage=Stage.PRE_DNAT, about=ssh)).outcome is Outcome.DENY
    assert decide(held, ask(HOST, about=packet("192.0.2.1", "172.16.0.1", ICMP, 0))).outcome is Outcome.DENY


def test_a_reply_to_a_failsafe_passes_untracked_policy() -> None:
    """Source port of the other direction's list; its index is counted after the direction's own list."""
    held = world(policy("raw", DENY, do_not_track=True))
    reply = packet("192.0.2.1", "172.16.0.1", UDP, 40000, source_port=53)
    own = len(held.settings.failsafe_inbound)
    assert decide(held, ask(HOST, stage=Stage.UNTRACKED, about=reply)) == both(Outcome.CONTINUE, failsafe(own))


def test_a_failsafe_may_be_limited_to_remote_addresses() -> None:
    """The net is the remote side's: the source for ingress, the destination for egress."""
    held = world()
    only = Failsafe(TCP, 22, ip_network("192.0.2.0/24"))
    held.settings = PolicySettings(failsafe_inbound=(only,), failsafe_outbound=(only,))
    inside, outside = packet("192.0.2.1", "172.16.0.1", port=22), packet("198.51.100.1", "172.16.0.1", port=22)
    assert decide(held, ask(HOST, about=inside)).outcome is Outcome.ALLOW
    assert decide(held, ask(HOST, about=outside)).outcome is Outcome.DENY
    assert decide(held, ask(HOST, EGRESS, about=packet("172.16.0.1", "192.0.2.1", port=22))).outcome is Outcome.ALLOW


def test_a_node_may_have_failsafes_of_its_own() -> None:
    """The list of the endpoint's node, also for replies; an empty one is a list."""
    held = world(policy("raw", DENY, do_not_track=True))
    held.settings = PolicySettings(node_failsafes={("n1", INGRESS): (Failsafe(TCP, 80),), ("n1", EGRESS): ()})
    ssh, web = packet("192.0.2.1", "172.16.0.1", TCP, 22), packet("192.0.2.1", "172.16.0.1", TCP, 80)
    assert decide(held, ask(HOST, about=ssh)).outcome is Outcome.DENY
    assert decide(held, ask(HOST, about=web)) == both(Outcome.ALLOW, failsafe(0))
    reply = packet("192.0.2.1", "172.16.0.1", UDP, 40000, source_port=53)
    assert decide(held, ask(HOST, stage=Stage.UNTRACKED, about=reply)).outcome is Outcome.DENY
    held.settings = PolicySettings(node_failsafes={("n2", INGRESS): ()})
    assert decide(held, ask(HOST, about=ssh)) == both(Outcome.ALLOW, failsafe(0))


KNOWN = "172.16.0.2"


@pytest.mark.parametrize(("stage", "outcome"), [(Stage.NORMAL, Outcome.ALLOW), (Stage.UNTRACKED, Outcome.CONTINUE)])
@pytest.mark.parametrize("tunnel", sorted(TUNNELS), ids=str)
def test_tunnels_between_known_nodes_go_before_policy(stage: Stage, outcome: Outcome, tunnel: Tunnel) -> None:
    """To and from the address of a Node; with anybody else's address policy decides, as on any other port."""
    held = world(policy("no", DENY), policy("raw", DENY, do_not_track=True))
    held.nodes = {"n2": ClusterNode("n2", {}, (ip_address(KNOWN),))}
    cause = {
        direction: Cause(CauseKind.TUNNEL, direction, index=tunnel.number, action=Action.ALLOW)
        for direction in Direction
    }
    ports = {"port": tunnel.port, "source_port": 40000 if tunnel.port else 0}
    inwards = packet(KNOWN, "172.16.0.1", tunnel.protocol, **ports)
    outwards = packet("172.16.0.1", KNOWN, tunnel.protocol, **ports)
    assert decide(held, ask(HOST, INGRESS, stage, inwards)) == both(outcome, cause[INGRESS])
    assert decide(held, ask(HOST, EGRESS, stage, outwards)) == both(outcome, cause[EGRESS])
    for direction, about in ((INGRESS, outwards), (EGRESS, inwards)):  # the known address is not the remote one
        assert decide(held, ask(HOST, direction, stage, about)).outcome is Outcome.DENY
    stranger = packet("192.0.2.1", "172.16.0.1", tunnel.protocol, **ports)
    assert decide(held, ask(HOST, INGRESS, stage, stranger)).outcome is Outcome.DENY
    assert decide(held, ask(HOST, INGRESS, stage, packet(KNOWN, "172.16.0.1", UDP, 4790))).outcome is Outcome.DENY
    held.settings = PolicySettings(tunnels=frozenset())
    assert decide(held, ask(HOST, INGRESS, stage, inwards)).outcome is Outcome.DENY


def test_tunnels_are_of_hosts_and_local_traffic_only() -> None:
    """What passes through, and what is for a workload, is judged."""
    held = world(policy("no", DENY, apply_on_forward=True), policy("pre", DENY, pre_dnat=True))
    held.nodes = {"n2": ClusterNode("n2", {}, (ip_address(KNOWN),))}
    vxlan = packet(KNOWN, "172.16.0.1", UDP, 4789)
    assert decide(held, ask(POD, about=vxlan)).outcome is Outcome.DENY
    for stage in (Stage.FORWARD, Stage.PRE_DNAT):
        assert decide(held, ask(HOST, stage=stage, about=vxlan)).outcome is Outcome.DENY


# --- staged policies --------------------------------------------------------------------------------------------------


def staged(of: Policy, *rules: Rule, action: Staged = Staged.SET, **more: object) -> Policy:
    """A staged policy that stands for ``of``."""
    key = PolicyKey("Staged" + of.key.kind, of.key.namespace, of.key.name)
    return replace(of, key=key, staged=action, replaces=of.key, ingress=rules, egress=rules, **more)  # type: ignore[arg-type]


def test_staged_policies_change_the_pending_verdict_only() -> None:
    """A staged Deny shows in the pending evaluation and nowhere else."""
    old = policy("p", ALLOW)
    new = staged(old, DENY)
    verdict = decide(world(old, new), ask())
    assert (verdict.outcome, verdict.cause) == (Outcome.ALLOW, by_rule(old, 0, Action.ALLOW))
    assert (verdict.staged_outcome, verdict.staged_cause) == (Outcome.DENY, by_rule(new, 0, Action.DENY))


def test_a_staged_policy_replaces_its_namesake() -> None:
    """Although it sorts after it, the namesake has no say in the pending evaluation."""
    old = policy("p", ALLOW)
    verdict = decide(world(old, staged(old, UDP_ONLY)), ask())
    assert verdict.staged_outcome is Outcome.DENY
    assert verdict.staged_cause.kind is CauseKind.TIER_END


def test_a_staged_delete_removes_its_namesake() -> None:
    """Pending, the tier is then invisible."""
    old = policy("p", DENY)
    held = world(old, staged(old, action=Staged.DELETE), profiles=("open",))
    held.profiles["open"] = ProfileRules("open", (ALLOW,))
    verdict = decide(held, ask())
    assert (verdict.outcome, verdict.staged_outcome) == (Outcome.DENY, Outcome.ALLOW)


def test_a_tier_with_staged_policies_only_is_invisible_when_enforced() -> None:
    """SEMANTICS 1.12: its end does not deny; pending it does."""
    other = staged(policy("p", ALLOW), UDP_ONLY, tier="t")
    held = world(other, profiles=("open",), tiers=(PolicyTier("t", 1.0), PolicyTier("default", 1e6)))
    held.profiles["open"] = ProfileRules("open", (ALLOW,))
    verdict = decide(held, ask())
    assert verdict.outcome is Outcome.ALLOW
    assert (verdict.staged_outcome, verdict.staged_cause) == (Outcome.DENY, tier_end(other))


def test_logs_are_those_of_the_enforced_evaluation() -> None:
    """A staged Log rule writes nothing."""
    old = policy("p", ALLOW)
    assert decide(world(old, staged(old, LOG, ALLOW)), ask()).logs == ()


def test_a_policy_acts_on_the_endpoints_it_selects() -> None:
    """The subject is matched against the endpoint's effective labels."""
    held = world(policy("p", ALLOW, subject=parse("app == 'other'")))
    assert decide(held, ask()).cause == NO_MATCH_DENY


def test_an_ipv6_packet_is_judged_as_well() -> None:
    """Nothing in the evaluation depends on the family."""
    about = packet("fd00::1", "fd00::2")
    assert decide(world(policy("p", ALLOW)), ask(about=about)).outcome is Outcome.ALLOW
