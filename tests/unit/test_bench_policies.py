# SPDX-License-Identifier: Apache-2.0
"""The policies of the benchmark's contenders: the flat rules mean the same as the policy model."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, ip_network

import pytest

from bench import netfilter
from bench.policies import LOAD_PORTS, MEASURED, FlatRule, flat_rules, fold, make_world, peer_addresses, questions
from netpol_ebpf.errors import UsageError
from netpol_ebpf.model.reference import ReferenceModel
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Direction,
    Entity,
    Outcome,
    Packet,
    Question,
    Stage,
    World,
)

OWN, PEER = IPv4Address("10.0.0.2"), IPv4Address("10.0.0.1")
BOTH = pytest.mark.parametrize("direction", list(Direction))


def small_world(direction: Direction, count: int = 60) -> World:
    return make_world(count, [OWN], [PEER], direction=direction, pods=200)


def asked(world: World, direction: Direction) -> dict[Packet, bool]:
    rules = flat_rules(world, MEASURED, direction)
    model = ReferenceModel(world)
    packets = questions(rules, OWN, peer_addresses(rules, PEER), direction, 200)
    return {
        packet: model.decide(Question(MEASURED, direction, Stage.NORMAL, packet)).outcome is Outcome.ALLOW
        for packet in packets
    }


def says(rules: list[FlatRule], packet: Packet, direction: Direction) -> bool:
    peer = packet.source if direction is Direction.INGRESS else packet.destination
    return any(
        rule.protocol == packet.protocol
        and any(peer in net for net in rule.peers)
        and any(first <= packet.destination_port <= last for first, last in rule.ports)
        for rule in rules
    )


@BOTH
def test_flat_rules_say_what_the_model_says(direction: Direction) -> None:
    """The flat rules give the model's verdicts for sampled packets, of which many are allowed and many denied."""
    world = small_world(direction)
    answers = asked(world, direction)
    rules = flat_rules(world, MEASURED, direction)
    assert {packet: says(rules, packet, direction) for packet in answers} == answers
    assert min(sum(answers.values()), len(answers) - sum(answers.values())) > len(answers) // 10


@BOTH
def test_the_folded_form_says_the_same(direction: Direction) -> None:
    """A mapping from (net, protocol) to ports gives the same answer for every sampled packet as the rules do."""
    world = small_world(direction)
    folded = [
        FlatRule("", "", (net,), protocol, tuple(ports))
        for (net, protocol), ports in fold(flat_rules(world, MEASURED, direction)).items()
    ]
    answers = asked(world, direction)
    assert {packet: says(folded, packet, direction) for packet in answers} == answers


@BOTH
def test_the_measured_traffic_is_allowed_by_the_middle_policy(direction: Direction) -> None:
    """The only policy that allows the measured traffic is in the middle of the order."""
    rules = flat_rules(small_world(direction), MEASURED, direction)
    ends = (PEER, OWN) if direction is Direction.INGRESS else (OWN, PEER)
    for protocol in (TCP, UDP):
        packet = Packet(*ends, protocol, 40_000, LOAD_PORTS[0])
        assert {rule.policy for rule in rules if says([rule], packet, direction)} == {"policy-00030"}


@pytest.mark.parametrize(
    "change",
    [
        {"action": Action.DENY},
        {"protocol": None},
        {"source": Entity(nets=(ip_network("10.9.0.0/16"),), not_nets=(ip_network("10.9.1.0/24"),))},
        {"source": Entity()},
        {"source": Entity(nets=(ip_network("fd00::/64"),))},
        {"destination": Entity()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_not_every_contender_can_say_is_refused(change: dict[str, object]) -> None:
    """A rule outside the subset is an error, because the contenders would get different policies."""
    world = small_world(Direction.INGRESS, 3)
    key, policy = next(iter(world.policies.items()))
    world.policies[key] = replace(policy, ingress=(replace(policy.ingress[0], **change),))  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        flat_rules(world, MEASURED, Direction.INGRESS)


def test_overlapping_nets_are_not_folded() -> None:
    """One set cannot have both a net and a part of it."""
    rules = [FlatRule("a", "", (ip_network(net),), TCP, ((80, 80),)) for net in ("10.0.0.0/8", "10.1.0.0/16")]
    with pytest.raises(UsageError, match="overlap"):
        fold(rules)


def test_folding_merges_ports() -> None:
    """Adjacent and overlapping ranges are merged."""
    net = ip_network("10.0.0.0/8")
    rules = [FlatRule("a", "", (net,), TCP, ((80, 90), (91, 95))), FlatRule("b", "", (net,), TCP, ((85, 88), (99, 99)))]
    assert fold(rules) == {(net, TCP): [(80, 95), (99, 99)]}


@BOTH
def test_each_rule_is_a_rule_for_netfilter(direction: Direction) -> None:
    """In the unfolded forms the endpoint's chain has as many accepting rules as there are flat rules."""
    rules = flat_rules(small_world(direction), MEASURED, direction)
    nft = netfilter.nft_rules(rules, OWN, direction)
    _, table = netfilter.iptables_rules(rules, OWN, direction)
    assert nft.count(" accept\n") - nft.count("related accept\n") == len(rules)
    assert table.count(f"-A {netfilter.POD_CHAIN} ") - 1 == len(rules)
    assert {rule.protocol for rule in rules} == {TCP, UDP}
