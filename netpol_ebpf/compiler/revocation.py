# SPDX-License-Identifier: Apache-2.0
"""Whether a change takes anything away: a packet that was allowed is not allowed any more.

Answered by comparing classes, which is exact; where the comparison would take too long the answer is yes.

Invariant: "no" is only said when every packet is allowed at least as far as before, so open connections need not be looked
at again.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from itertools import product

from netpol_ebpf.compiler.classes import ClassMap
from netpol_ebpf.compiler.sets import LiveSet
from netpol_ebpf.policy.types import Outcome

BUDGET = 50_000
"""Verdicts compared in one commit before the answer is yes; arbitrary, some tens of milliseconds."""
_REMEMBERED = 4096
"""Answers kept for each set; arbitrary."""


class Revocation:
    """The comparisons of one commit. ``late``: identities that sets which go have no classes for any more."""

    def __init__(self, identities: AbstractSet[int], late: Iterable[int]) -> None:
        self._late = frozenset(late)
        self._identities = identities
        self._left = BUDGET
        self._compared: dict[tuple[LiveSet | None, LiveSet | None], bool] = {}

    def by_relabelling(self, pairs: set[tuple[int, int]], sets: Iterable[LiveSet]) -> bool:
        """Whether addresses that turn from one identity into the other lose something in any of the sets."""
        if not pairs:
            return False
        for live in sets:
            for before, after in pairs:
                if self._loses(live, live.peer, before, after):
                    return True
                if live.own is not None and self._loses(live, live.own, before, after):
                    return True
        return False

    def _loses(self, live: LiveSet, side: ClassMap, before: int, after: int) -> bool:
        old, new = side.vector_of(before), side.vector_of(after)
        if old == new:
            return False
        known = live.losses.get((side.number, old, new))
        if known is None:
            if side is live.peer:
                others = [-1] if live.own is None else list(live.own.vectors.values())
            else:
                others = list(live.peer.vectors.values())
            rest = [other & l4 & source for other, l4, source in product(others, *live.port_vectors())]
            self._left -= len(rest)
            if self._left < 0:
                return True
            if len(live.losses) > _REMEMBERED:
                live.losses.clear()
            known = any(_loses(live.outcome(old & each), live.outcome(new & each)) for each in rest)
            live.losses[(side.number, old, new)] = known
        return known

    def by_replacement(self, old: LiveSet | None, new: LiveSet | None) -> bool:
        """Whether an endpoint loses something that gets one set in place of the other. None: everything continues."""
        if old is new:
            return False
        known = self._compared.get((old, new))
        if known is None:
            known = self._compared[(old, new)] = self._compare(old, new)
        return known

    def _compare(self, old: LiveSet | None, new: LiveSet | None) -> bool:
        if new is None:  # all continues: less only than what was allowed outright
            return old is not None and old.may(Outcome.ALLOW)
        if old is None:  # continued so far
            return new.may(Outcome.DENY)
        judged = self._identities - self._late
        peers = {(old.peer.vector_of(each), new.peer.vector_of(each)) for each in judged}
        if old.own is None and new.own is None:
            owns = {(-1, -1)}
        else:
            owns = {
                (-1 if old.own is None else old.own.vector_of(each), -1 if new.own is None else new.own.vector_of(each))
                for each in judged
            }
        l4 = set(zip(old.atom_vectors(), new.atom_vectors(), strict=True))
        sources = set(zip(old.source_vectors(), new.source_vectors(), strict=True))
        self._left -= len(peers) * len(owns) * len(l4) * len(sources)
        if self._left < 0:
            return True
        return any(
            _loses(old.outcome(peer[0] & own[0] & one[0] & two[0]), new.outcome(peer[1] & own[1] & one[1] & two[1]))
            for peer, own, one, two in product(peers, owns, l4, sources)
        )


def _loses(old: Outcome, new: Outcome) -> bool:
    """Less than before: allow is more than continue, continue more than deny."""
    return new is not old and (old is Outcome.ALLOW or new is Outcome.DENY)
