# SPDX-License-Identifier: Apache-2.0
"""Necessary conditions of a selector, for its index and for the detection of contradictions.

A *cover* of a selector is a list of restrictions, each on one label. Labels that the selector matches satisfy at least
one restriction of each cover.

Invariants: covers and `is_contradiction` are sound, not complete.  All labels that match a selector satisfy its covers;
other labels may satisfy the covers, too.  `is_contradiction` is True only if no labels at all can match.  Negative
comparisons add nothing to a cover, because absent labels satisfy them (SEMANTICS 2.4).
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
"""The largest number of conjunctions of the disjunctive normal form that are tested for a contradiction; arbitrary."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """A condition on one label: ``key`` must be present.

    ``one_of``: if not None, the label's value must be one of these values.
    """

    key: str
    one_of: frozenset[str] | None = None

    def matches_value(self, value: str | None) -> bool:
        """Whether the label with this ``value`` satisfies the restriction. ``value`` None: the label is absent."""
        return value is not None and (self.one_of is None or value in self.one_of)


Cover = tuple[Restriction, ...]
"""A necessary condition for a selector to match.

Labels that the selector matches satisfy at least one of these restrictions.  An empty cover means that the selector
matches nothing.  No two restrictions have the same key.
"""


def covers(node: SelectorNode) -> tuple[Cover, ...]:
    """All covers of a selector's tree that were found. Matching labels satisfy every cover.

    The result is empty if no cover is known.
    """
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
    """The cover with the fewest values, which is probably the most selective one. None if there are no covers."""
    return min(candidates, key=_cost) if candidates else None


_PRESENCE_COST = 1000
"""`_cost` counts a restriction without values as this number of values; arbitrary, more than sets usually have."""


def _cost(cover: Cover) -> int:
    return sum(_PRESENCE_COST if part.one_of is None else len(part.one_of) for part in cover)


def _covers_of_not(operand: SelectorNode) -> tuple[Cover, ...]:
    """The covers of the negation of ``operand``.

    AND and OR are negated by De Morgan's laws.  The negation of ``!=`` or of ``not in`` is a positive comparison, which
    has covers.
    """
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
    """The covers of an AND: all covers of all its operands. ``arms``: the covers of each operand.

    Covers that have a single restriction with the same key are merged: the result has the intersection of their values.
    """
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
    """The covers of an OR. ``arms``: the covers of each operand.

    One cover is the union of the cheapest cover of each operand.  For each key that all operands restrict, another
    cover is the union of the operands' values for that key.
    """
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
"""(comparison, whether the comparison must be true). All these comparisons are false if the label is absent."""


def is_contradiction(node: SelectorNode) -> bool:
    """True if no labels can match: each conjunction of the disjunctive normal form contradicts itself for some key.

    The result may be False although no labels can match: a form with more than MAX_CONJUNCTIONS conjunctions is not
    tested, and contradictions between several `contains` are not found.
    """
    arms = list(islice(_conjunctions(node, wanted=True), MAX_CONJUNCTIONS + 1))
    return len(arms) <= MAX_CONJUNCTIONS and all(map(_is_impossible, arms))


def _conjunctions(node: SelectorNode, *, wanted: bool) -> Iterator[tuple[_Literal, ...]]:
    """The conjunctions of the disjunctive normal form of ``node``, computed one by one.

    ``wanted``: False for the form of the negation of ``node``.
    """
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
    """The conjunctions of the disjunctive normal form of an AND of ``operands``.

    One conjunction is taken from each operand, in every combination, and these are joined. ``wanted`` False: the
    operands are negated first.
    """
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
        return False  # an absent label is possible
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
    """Whether all values that satisfy ``required`` satisfy ``comparison``. False if that is not certain.

    No comparison of ``required`` is `Equals` or `In`.
    """
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
