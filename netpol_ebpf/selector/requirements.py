# SPDX-License-Identifier: Apache-2.0
"""Necessary conditions of a selector, for its index and for the detection of contradictions.

Invariant: both answers err to one side only.  A cover never excludes labels that match; `is_contradiction` is True only
when no labels at all can match.  Negative terms never narrow anything (SEMANTICS 2.4), since absent labels satisfy
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Union

from netpol_ebpf.selector.tree import (
    And,
    Contains,
    EndsWith,
    Equals,
    Has,
    In,
    Not,
    NotEquals,
    NotIn,
    Or,
    SelectorNode,
    StartsWith,
)

MAX_CONJUNCTIONS = 256
"""Largest number of arms of the disjunctive form that are tested for a contradiction; arbitrary."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """``key`` must be present and, unless ``one_of`` is None, have one of those values."""

    key: str
    one_of: frozenset[str] | None = None

    def matches_value(self, value: str | None) -> bool:
        """Whether a label with that value (None: absent) satisfies the restriction."""
        return value is not None and (self.one_of is None or value in self.one_of)


Cover = tuple[Restriction, ...]
"""A list of restrictions: matching labels satisfy at least one; () means that nothing can match.

At most one restriction for each key.
"""


def covers(node: SelectorNode) -> tuple[Cover, ...]:
    """Every cover found; matching labels satisfy all of them. Empty: nothing that an index could use."""
    if isinstance(node, Equals):
        return ((Restriction(node.key, frozenset((node.value,))),),)
    if isinstance(node, In):
        return ((Restriction(node.key, node.members),) if node.members else (),)
    if isinstance(node, (Has, Contains, StartsWith, EndsWith)):
        return ((Restriction(node.key),),)
    if isinstance(node, And):
        return _covers_of_all([covers(operand) for operand in node.operands])
    if isinstance(node, Or):
        return _covers_of_any([covers(operand) for operand in node.operands])
    if isinstance(node, Not):
        return _covers_of_not(node.operand)
    return ()


def cheapest_cover(candidates: tuple[Cover, ...]) -> Cover | None:
    """The cover that looks most selective without knowledge of any labels: the one with the fewest values."""
    return min(candidates, key=_cost) if candidates else None


_PRESENCE_COST = 1000
"""The number of values that a presence test counts as; arbitrary, above any set of usual length."""


def _cost(cover: Cover) -> int:
    return sum(_PRESENCE_COST if part.one_of is None else len(part.one_of) for part in cover)


def _covers_of_not(operand: SelectorNode) -> tuple[Cover, ...]:
    """The covers of a negation: De Morgan, and the two negative comparisons, which have positive negations."""
    if isinstance(operand, NotEquals):
        return covers(Equals(operand.key, operand.value))
    if isinstance(operand, NotIn):
        return covers(In(operand.key, operand.values))
    if isinstance(operand, Or):
        return _covers_of_all([covers(_complement(part)) for part in operand.operands])
    if isinstance(operand, And):
        return _covers_of_any([covers(_complement(part)) for part in operand.operands])
    return ()


def _complement(node: SelectorNode) -> SelectorNode:
    return node.operand if isinstance(node, Not) else Not(node)


def _covers_of_all(arms: list[tuple[Cover, ...]]) -> tuple[Cover, ...]:
    """The covers of an AND: those of each arm; single restrictions on one key are intersected."""
    by_key: dict[str, frozenset[str] | None] = {}
    others: list[Cover] = []
    for cover in (cover for arm in arms for cover in arm):
        if not cover:
            return ((),)
        if len(cover) > 1:
            others.append(cover)
            continue
        (part,) = cover
        known = by_key.get(part.key)
        by_key[part.key] = part.one_of if known is None else known if part.one_of is None else known & part.one_of
    if any(values is not None and not values for values in by_key.values()):
        return ((),)
    return (*((Restriction(key, values),) for key, values in by_key.items()), *others)


def _covers_of_any(arms: list[tuple[Cover, ...]]) -> tuple[Cover, ...]:
    """The covers of an OR: the union of each arm's cheapest; where all arms restrict one key, that union alone as well."""
    if not all(arms):
        return ()
    result = [_union([part for arm in arms for part in min(arm, key=_cost)])]
    singles = [{cover[0].key: cover[0] for cover in arm if len(cover) == 1} for arm in arms]
    for key in singles[0]:
        if all(key in single for single in singles[1:]):
            shared = _union([single[key] for single in singles])
            if shared not in result:
                result.append(shared)
    return tuple(result)


def _union(parts: list[Restriction]) -> Cover:
    by_key: dict[str, frozenset[str] | None] = {}
    for part in parts:
        known = by_key.get(part.key, frozenset())
        by_key[part.key] = None if known is None or part.one_of is None else known | part.one_of
    return tuple(Restriction(key, values) for key, values in by_key.items())


# --- contradictions -------------------------------------------------------------------------------------------------

_Positive = Union[Has, Equals, In, Contains, StartsWith, EndsWith]
_Literal = tuple[_Positive, bool]
"""A comparison and whether it must be true; all these comparisons are false on an absent label."""


def is_contradiction(node: SelectorNode) -> bool:
    """True when no labels can match: each arm of the disjunctive form contradicts itself for at least one key.

    Best effort: False where that form has more than MAX_CONJUNCTIONS arms.  Operands of several `contains` are not
    combined, so some contradictions among them are not found.
    """
    arms = list(islice(_conjunctions(node, wanted=True), MAX_CONJUNCTIONS + 1))
    return len(arms) <= MAX_CONJUNCTIONS and all(map(_is_impossible, arms))


def _conjunctions(node: SelectorNode, *, wanted: bool) -> Iterator[tuple[_Literal, ...]]:
    """The arms of the disjunctive normal form of ``node`` (or of its negation, without ``wanted``), lazily."""
    if isinstance(node, Not):
        yield from _conjunctions(node.operand, wanted=not wanted)
    elif isinstance(node, (And, Or)):
        if isinstance(node, And) is wanted:
            yield from _product(node.operands, wanted=wanted)
        else:
            for operand in node.operands:
                yield from _conjunctions(operand, wanted=wanted)
    elif isinstance(node, NotEquals):
        yield ((Equals(node.key, node.value), not wanted),)
    elif isinstance(node, NotIn):
        yield ((In(node.key, node.values), not wanted),)
    elif isinstance(node, (Has, Equals, In, Contains, StartsWith, EndsWith)):
        yield ((node, wanted),)
    elif wanted:  # all() and global() are true
        yield ()


def _product(operands: tuple[SelectorNode, ...], *, wanted: bool) -> Iterator[tuple[_Literal, ...]]:
    """Every combination of one arm of each operand."""
    if not operands:
        yield ()
        return
    for first in _conjunctions(operands[0], wanted=wanted):
        for rest in _product(operands[1:], wanted=wanted):
            yield first + rest


def _is_impossible(literals: tuple[_Literal, ...]) -> bool:
    by_key: dict[str, tuple[list[_Positive], list[_Positive]]] = {}
    for comparison, wanted in literals:
        by_key.setdefault(comparison.key, ([], []))[not wanted].append(comparison)
    return any(_is_key_impossible(required, refused) for required, refused in by_key.values())


def _is_key_impossible(required: list[_Positive], refused: list[_Positive]) -> bool:
    """Whether no value of one label satisfies all of ``required`` and none of ``refused``."""
    if not required:
        return False  # an absent label does
    key = required[0].key
    candidates = [
        frozenset((part.value,)) if isinstance(part, Equals) else part.members
        for part in required
        if isinstance(part, (Equals, In))
    ]
    if candidates:
        return not any(
            all(part.matches({key: value}) for part in required)
            and not any(part.matches({key: value}) for part in refused)
            for value in frozenset.intersection(*candidates)
        )
    if any(_is_implied(part, required) for part in refused):
        return True
    starts = sorted((part.value for part in required if isinstance(part, StartsWith)), key=len)
    ends = sorted((part.value for part in required if isinstance(part, EndsWith)), key=len)
    return not (
        all(starts[-1].startswith(value) for value in starts) and all(ends[-1].endswith(value) for value in ends)
    )


def _is_implied(comparison: _Positive, required: list[_Positive]) -> bool:
    """Whether values that satisfy ``required`` (none of them a finite set) certainly satisfy ``comparison``."""
    if isinstance(comparison, Has):
        return True
    if isinstance(comparison, (Equals, In)):
        return False
    if not comparison.value:
        return True
    return any(
        comparison.matches({comparison.key: part.value})
        for part in required
        if isinstance(part, (StartsWith, EndsWith, Contains))
        and (type(part) is type(comparison) or isinstance(comparison, Contains))
    )
