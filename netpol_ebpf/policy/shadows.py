# SPDX-License-Identifier: Apache-2.0
"""Rules that no packet can reach, because an earlier rule matches every packet that they match.

The analysis is sound and not complete, as in `netpol_ebpf.policy.coverage`.  A reported rule is not reached in any
state of the cluster's endpoints, whatever names they learn, so its removal changes no verdict.  A rule that is not reported may still be
unreachable.

A rule is reported if another rule *covers* it.  The covering rule matches all packets that the covered rule matches,
and comes before the covered rule at every endpoint of the covered rule's policy.  The covering rule ends the
evaluation, or is a Pass rule of the same tier, after which the rest of the tier is skipped. The covering rule may be in
an earlier tier, after a Pass rule of that tier. Packets that match the Pass rule skip the covering rule and may reach
the covered rule. Then nothing is reported, unless the Pass rule matches no packet that the covered rule matches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from netpol_ebpf.policy.coverage import covers, excludes, implies, is_dead
from netpol_ebpf.policy.types import Action, Direction, LabelledNets, Policy, Rule, Staged, World
from netpol_ebpf.selector import all_of

KUBERNETES = ("KubernetesNetworkPolicy", "StagedKubernetesNetworkPolicy")


@dataclass(frozen=True, slots=True)
class Shadow:
    """An unreachable user rule.

    ``rule``: the first of its internal rules.
    ``causes``: for each of its internal rules, an earlier rule that covers it, with the policy of the earlier rule.
    """

    direction: Direction
    rule: Rule
    causes: tuple[tuple[Policy, Rule], ...]


@dataclass(frozen=True, slots=True)
class _Before:
    """A rule that every packet meets before the rules of a later policy, unless one of ``passes`` matches the packet.

    ``passes``: Pass rules before ``rule`` in the same tier, if that tier is earlier than the later policy's tier.
    """

    policy: Policy
    rule: Rule
    passes: tuple[Rule, ...] = ()


class Shadows:
    """Finds the unreachable rules of a world's policies."""

    def __init__(self, world: World) -> None:
        by_tier: dict[str, list[Policy]] = defaultdict(list)
        for policy in world.policies.values():
            if policy.staged is not Staged.DELETE:
                by_tier[policy.tier].append(policy)
        self._in_order = [
            policy
            for tier in world.sorted_tiers()
            for policy in sorted(by_tier[tier.name], key=lambda policy: policy.sort_key)
        ]
        self._named_sets = [held for held in world.network_sets.values() if held.domains]
        self._replaced = {policy.replaces for policy in world.policies.values() if policy.staged is not Staged.NO}

    def of(self, policy: Policy) -> Iterator[Shadow]:
        """The unreachable user rules of a policy. A user rule is unreachable if all its internal rules are unreachable.

        The evaluation is the enforced one; for a staged policy it is the pending one.  Cost: linear in the rules of all
        policies.
        """
        for direction in policy.types:
            rules = policy.rules(direction)
            if not rules or policy.staged is Staged.DELETE:
                continue
            earlier = list(self._earlier(policy, direction))
            by_index: dict[int, list[Rule]] = defaultdict(list)
            for rule in rules:
                by_index[rule.index].append(rule)
            for index, parts in by_index.items():
                if any(map(is_dead, parts)):
                    continue
                own = [_Before(policy, rule) for rule in rules if rule.index < index and rule.action is not Action.LOG]
                named_sets = self._named_sets if direction is Direction.EGRESS else []
                causes = [_first_cover((*own, *earlier), part, named_sets) for part in parts]
                found = [(cause.policy, cause.rule) for cause in causes if cause is not None]
                if len(found) == len(parts):
                    yield Shadow(direction, parts[0], tuple(found))

    def _earlier(self, policy: Policy, direction: Direction) -> Iterator[_Before]:
        """Rules of other policies that precede the rules of ``policy`` at every endpoint that ``policy`` selects."""
        tier, passes = "", list[Rule]()
        for other in self._in_order:
            if other.key == policy.key:
                return
            if other.tier != tier:
                tier, passes = other.tier, []
            if direction not in other.types or not self._are_together(policy, other):
                continue
            precedes = _precedes(policy, other)
            for rule in other.rules(direction):
                if rule.action is Action.PASS and tier != policy.tier:
                    passes.append(rule)
                elif precedes and rule.action is not Action.LOG:
                    yield _Before(other, rule, tuple(passes))

    def _are_together(self, policy: Policy, other: Policy) -> bool:
        """Whether some endpoint may evaluate both policies, one after the other.

        The evaluation is the enforced one; for a staged ``policy`` it is the pending one.
        """
        if (other.do_not_track, other.pre_dnat) != (policy.do_not_track, policy.pre_dnat):
            return False
        if (other.staged is not Staged.NO) if policy.staged is Staged.NO else (other.key in self._replaced):
            return False
        return not all_of(policy.subject, other.subject).is_unsatisfiable()


def _precedes(policy: Policy, other: Policy) -> bool:
    """Whether ``other``, which is earlier in order, applies wherever ``policy`` applies.

    False for staged policies, and for Kubernetes policies, whose order among each other is not defined.  So such a
    policy is never reported as the reason why a rule is unreachable.
    """
    return (
        other.staged is Staged.NO
        and other.key.kind not in KUBERNETES
        and (other.apply_on_forward or not policy.apply_on_forward)
        and implies(policy.subject, other.subject)
    )


def _first_cover(earlier: Iterable[_Before], rule: Rule, named_sets: list[LabelledNets]) -> _Before | None:
    found = (
        one
        for one in earlier
        if covers(one.rule, rule, named_sets) and all(excludes(passing, rule) for passing in one.passes)
    )
    return next(found, None)
