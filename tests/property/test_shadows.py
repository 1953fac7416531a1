# SPDX-License-Identifier: Apache-2.0
"""A rule that is said to be never reached is reached by no packet: held against the reference model on small clusters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from itertools import product

import hypothesis.strategies as st
from hypothesis import event, given, settings

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.shadows import Shadow, Shadows
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Cause,
    CauseKind,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    Packet,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    Ports,
    Question,
    Rule,
    Stage,
    Staged,
    World,
)
from netpol_ebpf.selector import EVERYTHING, equals

SOME = tuple(map(ip_address, ("10.0.0.1", "192.0.2.9", "fd00::1")))
KEYS = (
    PolicyKey("GlobalNetworkPolicy", "", "x"),
    PolicyKey("NetworkPolicy", "n1", "x"),
    PolicyKey("ClusterNetworkPolicy", "", "y"),
    PolicyKey("KubernetesNetworkPolicy", "n1", "y"),
)
ENDPOINTS = {
    endpoint.key: endpoint
    for endpoint in (
        Endpoint(EndpointKey("Pod", "n1", "p"), EndpointKind.WORKLOAD, {}, SOME[:1]),
        Endpoint(EndpointKey("Pod", "n1", "q"), EndpointKind.WORKLOAD, {}, SOME[:1]),  # the address has two owners
        Endpoint(EndpointKey("HostEndpoint", "", "h"), EndpointKind.HOST, {}, SOME[1:2]),
    )
}
TIERS = {
    name: PolicyTier(name, order, action)
    for name, order, action in (
        ("admin", 1.0, Action.DENY), ("zz", 2.0, Action.PASS), ("default", 3.0, Action.DENY),
    )
}  # fmt: skip
PACKETS = tuple(
    Packet(source, destination, protocol, 80, port)
    for source, destination, protocol, port in product(SOME, SOME, (TCP, UDP), (80, 81))
    if source.version == destination.version
)
peers = st.sampled_from(
    (Entity(), Entity(), Entity(selector=EVERYTHING), Entity(selector=equals("app", "a")), Entity(not_selector=equals("app", "a")))
)  # fmt: skip
ports = st.sampled_from((None, None, Ports(((80, 80),)), Ports(((80, 81),)), Ports(((81, 81),))))
rules = st.builds(
    lambda action, protocol, peer, those: Rule(
        action, 0, protocol=protocol if those is None else TCP, source=peer, destination=Entity(ports=those)
    ),
    st.sampled_from(Action),
    st.sampled_from((None, None, TCP, UDP)),
    peers,
    ports,
)
rule_lists = st.lists(rules, max_size=3).map(
    lambda drawn: tuple(replace(rule, index=index) for index, rule in enumerate(drawn))
)
labels = st.sampled_from(({}, {"app": "a"}))
subjects = st.sampled_from((EVERYTHING, EVERYTHING, equals("app", "a")))


@st.composite
def _policies(draw: st.DrawFn, key: PolicyKey) -> Policy:
    """One with a subject and rules that others often cover."""
    types = draw(st.sampled_from((frozenset({Direction.INGRESS}), frozenset(Direction))))
    flags = draw(st.sampled_from(("", "", "", "forward", "untracked")))
    return Policy(
        key,
        draw(st.sampled_from((*TIERS, "ghost"))),
        draw(st.sampled_from((1.0, 2.0))),
        draw(subjects),
        types,
        ingress=draw(rule_lists),
        egress=draw(rule_lists) if Direction.EGRESS in types else (),
        do_not_track=flags == "untracked",
        apply_on_forward=bool(flags),
    )


@st.composite
def _worlds(draw: st.DrawFn) -> World:
    enforced = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
    every = [draw(_policies(key)) for key in enforced]
    for name in draw(st.sampled_from(((), ("s",), ("s", "t")))):
        one = draw(_policies(PolicyKey("StagedGlobalNetworkPolicy", "", name)))
        staged, namesake = draw(st.sampled_from((Staged.SET, Staged.SET, Staged.DELETE))), draw(st.sampled_from(every))
        if draw(st.booleans()):  # behind its namesake, which would come before it
            one = replace(one, tier=namesake.tier, order=3.0)
        every.append(replace(one, staged=staged, replaces=namesake.key))
    return World(
        tiers=TIERS,
        policies={policy.key: policy for policy in every},
        endpoints={key: replace(one, labels=draw(labels)) for key, one in ENDPOINTS.items()},
        settings=PolicySettings(failsafe_inbound=(), failsafe_outbound=()),
    )


def _shadows(world: World) -> Iterator[tuple[Policy, Shadow]]:
    found = Shadows(world)
    for policy in world.policies.values():
        yield from ((policy, shadow) for shadow in found.of(policy))


def _conspicuous(world: World, policy: Policy, shadow: Shadow) -> World:
    """The world in which the rule, if a packet reaches and matches it, is what decides."""
    changed = tuple(
        replace(rule, action=Action.DENY) if rule.index == shadow.rule.index else rule
        for rule in policy.rules(shadow.direction)
    )
    other = replace(policy, **{shadow.direction.value: changed})  # type: ignore[arg-type]
    return replace(world, policies={**world.policies, policy.key: other})


def _questions(world: World, direction: Direction) -> Iterator[Question]:
    for key, stage, packet in product(world.endpoints, Stage, PACKETS):
        yield Question(key, direction, stage, packet)


def _is_by(cause: Cause, policy: Policy, shadow: Shadow) -> bool:
    return (cause.kind, cause.policy, cause.index) == (CauseKind.RULE, policy.key, shadow.rule.index)


@settings(max_examples=10 * settings.default.max_examples)
@given(world=_worlds())
def test_no_packet_reaches_what_is_said_to_be_never_reached(world: World) -> None:
    """Not in the enforced run; for a staged policy, not in the pending one."""
    for policy, shadow in _shadows(world):
        event(f"by {sorted({cause.action.value for _, cause in shadow.causes})}, staged: {policy.staged.value}")
        model = ReferenceModel(_conspicuous(world, policy, shadow))
        for question in _questions(world, shadow.direction):
            verdict = model.decide(question)
            cause = verdict.cause if policy.staged is Staged.NO else verdict.staged_cause
            assert not _is_by(cause, policy, shadow), (shadow, question)
