# SPDX-License-Identifier: Apache-2.0
"""Whether a change revokes anything, so that policy must evaluate open connections again.

A change revokes if the verdict on some packet is stricter than before: allow became continue or deny, or continue
became deny.  The comparison covers all classes and is exact.  If it would take too long, the change counts as revoking.

Invariant: the result is "no" only if no verdict is stricter than before.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from netpol_ebpf.compiler.classes import EntryVectors
from netpol_ebpf.compiler.identities import IdentityIndex
from netpol_ebpf.compiler.sets import LiveSet
from netpol_ebpf.compiler.setstore import SetStore
from netpol_ebpf.policy.types import Outcome

BUDGET = 50_000
"""How many verdicts one commit compares. A change that needs more comparisons counts as revoking.

The number is arbitrary; the comparisons take some tens of milliseconds.
"""
_REMEMBERED = 4096
"""How many results are cached for each policy set; arbitrary."""


class Revocation:
    """Compares the policy after one commit with the policy before it.

    ``late``: the new identities that have no class in the policy sets that this commit replaces.
    """

    def __init__(self, identities: IdentityIndex, late: Iterable[int]) -> None:
        self._late = frozenset(late)
        self._identities = identities
        self._left = BUDGET
        self._compared: dict[tuple[LiveSet | None, LiveSet | None], bool] = {}

    def by_relabelling(self, pairs: set[tuple[int, int]], sets: SetStore) -> bool:
        """Whether some policy set is stricter for an address's new identity than for its old identity.

        ``pairs``: (old identity, new identity) of the addresses with a changed identity.
        ``sets``: the policy sets.  Sets without references are not compared.
        """
        for before, after in pairs:
            for class_table, users in sets.distinguishing(before, after):
                old, new = class_table.vector_of(before), class_table.vector_of(after)
                if old != new:
                    for live in users:
                        if live.references and any(
                            side.table is class_table and self._loses(live, side, side.vector(old), side.vector(new))
                            for side in live.sides
                        ):
                            return True
        return False

    def _loses(self, live: LiveSet, side: EntryVectors, old: int, new: int) -> bool:
        is_peer = side is live.peer
        known = live.losses.get((is_peer, old, new))
        if known is None:
            if is_peer:
                others = [-1] if live.own is None else list(live.own.vectors.values())
            else:
                others = list(live.peer.vectors.values())
            rest = [other & l4 & source for other, l4, source in product(others, *live.port_vectors())]
            self._left -= len(rest)
            if self._left < 0:
                return True
            if len(live.losses) > _REMEMBERED:
                live.losses.clear()
            known = any(_loses(live, old & each, live, new & each) for each in rest)
            live.losses[(is_peer, old, new)] = known
        return known

    def by_replacement(self, old: LiveSet | None, new: LiveSet | None) -> bool:
        """Whether policy set ``new`` is stricter than ``old`` for some packet.

        None: a set whose outcome is always CONTINUE.
        """
        if old is new:
            return False
        known = self._compared.get((old, new))
        if known is None:
            known = self._compared[(old, new)] = self._compare(old, new)
        return known

    def _compare(self, old: LiveSet | None, new: LiveSet | None) -> bool:
        if new is None:  # CONTINUE is stricter than ALLOW only
            return old is not None and old.may(Outcome.ALLOW)
        if old is None:  # DENY alone is stricter than CONTINUE
            return new.may(Outcome.DENY)
        peers, owns = self._pairs(old.peer, new.peer), self._pairs(old.own, new.own)
        l4 = set(zip(old.atom_vectors(), new.atom_vectors(), strict=True))
        sources = set(zip(old.source_vectors(), new.source_vectors(), strict=True))
        self._left -= len(peers) * len(owns) * len(l4) * len(sources)
        if self._left < 0:
            return True
        return any(
            _loses(old, peer[0] & own[0] & one[0] & two[0], new, peer[1] & own[1] & one[1] & two[1])
            for peer, own, one, two in product(peers, owns, l4, sources)
        )

    def _pairs(self, old: EntryVectors | None, new: EntryVectors | None) -> set[tuple[int, int]]:
        """For each identity, the entries that match it on one side, as a pair (old vector, new vector).

        Each pair occurs once.
        ``old``, ``new``: the side of the old and of the new policy set.  None: the policy set does not have this side,
        and the vector has all bits.
        """
        if old is None or new is None:
            return {(before, after) for before in _all(old) for after in _all(new)}
        if old.table is new.table:
            return {(old.vector(each), new.vector(each)) for each in old.table.vectors.values()}
        numbers = (old.table.rows.keys() | new.table.rows.keys()) - self._late
        pairs = {(old.table.class_of(number), new.table.class_of(number)) for number in numbers}
        v6 = len(numbers & self._identities.v6)
        for family, told in ((4, len(numbers) - v6), (6, v6)):
            if len(self._identities.family_members(family) - self._late) > told:  # some identities have no rows
                pairs.add((old.table.defaults[family], new.table.defaults[family]))
        before, after = old.vectors, new.vectors
        return {(before[one], after[other]) for one, other in pairs}


def _all(side: EntryVectors | None) -> Iterable[int]:
    return (-1,) if side is None else side.vectors.values()


def _loses(old: LiveSet, before: int, new: LiveSet, after: int) -> bool:
    """Whether ``new`` is stricter than ``old``: allow became continue or deny, or continue became deny.

    Also if a domain name that allowed no longer does.
    ``before``, ``after``: the packets, by the entries that they match in the old and in the new policy set.
    """
    was, is_now = old.outcome(before), new.outcome(after)
    if is_now is not was and (was is Outcome.ALLOW or is_now is Outcome.DENY):
        return True
    return is_now is not Outcome.ALLOW and not old.allowed_names(before) <= new.allowed_names(after)
