# SPDX-License-Identifier: Apache-2.0
"""The order of policies in a tier and of tiers among each other, ties included."""

from __future__ import annotations

import math

import pytest

from netpol_ebpf.policy.types import Policy, PolicyKey, PolicyTier, World
from netpol_ebpf.selector import EVERYTHING


def _policy(order: float, kind: str, namespace: str, name: str) -> Policy:
    return Policy(PolicyKey(kind, namespace, name), "default", order, EVERYTHING, frozenset())


IN_ORDER = (
    _policy(-1.5, "GlobalNetworkPolicy", "", "z"),
    _policy(0, "GlobalNetworkPolicy", "", "z"),
    # One order: the name decides, whatever the namespace or the kind ...
    _policy(1000, "NetworkPolicy", "z", "a"),
    # ... as one text, in which "b-c/" comes before "b/", though the name b comes before b-c.
    _policy(1000, "ClusterNetworkPolicy", "", "b-c"),
    _policy(1000, "GlobalNetworkPolicy", "", "b"),
    _policy(1000.5, "GlobalNetworkPolicy", "", "a"),
    # One order and name: the namespace, then the kind.
    _policy(2000, "StagedGlobalNetworkPolicy", "", "n"),
    _policy(2000, "NetworkPolicy", "m", "n"),
    _policy(2000, "KubernetesNetworkPolicy", "n", "n"),
    _policy(2000, "NetworkPolicy", "n", "n"),
    _policy(2000, "StagedNetworkPolicy", "n", "n"),
    _policy(math.inf, "GlobalNetworkPolicy", "", "a"),
    _policy(math.inf, "NetworkPolicy", "a", "b"),
)


@pytest.mark.parametrize("step", [1, 5, 7])
def test_policies_of_a_tier(step: int) -> None:
    """By order, none last; then by the text name/namespace/kind."""
    shuffled = [IN_ORDER[index * step % len(IN_ORDER)] for index in range(len(IN_ORDER))]
    ordered = sorted(shuffled, key=lambda policy: policy.sort_key)
    assert [str(policy.key) for policy in ordered] == [str(policy.key) for policy in IN_ORDER]


def test_tiers() -> None:
    """Existing ones by order, none last, then by name; tiers that only policies name come after all of them."""
    world = World(
        tiers={
            name: PolicyTier(name, order)
            for name, order in (("zz", 1.0), ("b", 1e6), ("default", 1e6), ("x", math.inf), ("a", math.inf))
        }
    )
    for tier in ("gone", "away"):
        key = PolicyKey("GlobalNetworkPolicy", "", tier)
        world.policies[key] = Policy(key, tier, 0.0, EVERYTHING, frozenset())
    tiers = list(world.sorted_tiers())
    assert [tier.name for tier in tiers] == ["zz", "b", "default", "a", "x", "away", "gone"]
    assert [tier.exists for tier in tiers] == [True] * 5 + [False] * 2


def test_a_tier_that_follows_another_one_has_none_in_between() -> None:
    """Whatever order and name a third tier has; the order of both is that of the first."""
    first, second = PolicyTier("kube", 1000.0), PolicyTier("admin", 1000.0, follows="kube")
    others = [
        PolicyTier(name, order)
        for order in (1000.0, math.nextafter(1000.0, 0), math.nextafter(1000.0, math.inf))
        for name in ("a", "kube-", "kubf", "z")
    ]
    tiers = {tier.name + str(tier.order): tier for tier in (second, *others, first)}
    ordered = list(World(tiers=tiers).sorted_tiers())
    assert ordered.index(second) == ordered.index(first) + 1
