# SPDX-License-Identifier: Apache-2.0
"""Classes of identities as one policy set sees them: identities with the same bit vector of matching entries.

Invariants: every identity in use has its class, through a row of ``peer_classes`` or as the default class; a class number
keeps its vector as long as it is in use, so verdicts of a published set stay right when identities come and go.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.identities import IdentityIndex, MatchRecord
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import exceeded


class ClassMap:
    """One side of one policy set.

    ``number``: ``set`` in the keys of ``peer_classes``.  ``masks``: match -> bits of the entries that have it; ``always``:
    bits of entries that match any address.  ``vectors``: class -> vector.
    """

    def __init__(self, number: int, masks: Mapping[MatchRecord, int], always: int, limit: int, what: str) -> None:
        self.number = number
        self.masks = masks
        self.vectors: dict[int, int] = {}
        self.default = 0
        self.base = {4: always, 6: always}
        """Vector of an identity that no positive term of a match holds of and no negative one, by family."""
        self._limit = limit
        self._what = what
        self._classes: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._free: set[int] = set()
        self._rows: dict[int, int] = {}  # identity -> class, of those that are not in the default class
        for record, mask in masks.items():
            if record.is_floating:
                for family in self.base:
                    if record.match.family in (0, family):
                        self.base[family] |= mask

    def build(self, identities: IdentityIndex, draft: Draft) -> None:
        """Classes and rows for all identities, of a map that is not in force yet.

        Cost: the members of all matches, never identities times matches.  The class of most identities is the default.
        """
        vectors = self._special_vectors(identities)
        populations: dict[int, int] = {}
        for vector in vectors.values():
            populations[vector] = populations.get(vector, 0) + 1
        special = {4: 0, 6: 0}
        for number in vectors:
            special[identities.identities[number].family] += 1
        for family, base in self.base.items():
            others = len(identities.family_members(family)) - special[family]
            populations[base] = populations.get(base, 0) + others
        # Ties go to what an unknown IPv4 address is, then to the smallest vector: the choice depends on content alone.
        default = max(populations, key=lambda vector: (populations[vector], vector == self.base[4], -vector))
        self.vectors = {0: default}
        self._counts = {0: 0}
        self._classes = {default: 0}
        rows = draft.rows(Phase.GROW, "peer_classes")
        for family, base in self.base.items():
            if base != default:
                for number in identities.family_members(family):
                    if number not in vectors:
                        vectors[number] = base
        for number, vector in vectors.items():
            if vector != default:
                class_ = self._classes.get(vector)
                if class_ is None:
                    class_ = self._append(vector)
                self._counts[class_] += 1
                self._rows[number] = class_
                rows[(self.number, number)] = class_

    def _special_vectors(self, identities: IdentityIndex) -> dict[int, int]:
        """Vectors of the identities that some term holds of."""
        removed: dict[int, int] = {}
        vectors: dict[int, int] = {}
        for record, mask in self.masks.items():
            if not record.is_floating:
                for number in identities.members(record):
                    vectors[number] = vectors.get(number, 0) | mask
            elif record.negative:
                for number in identities.excluded(record):
                    removed[number] = removed.get(number, 0) | mask
        for number in {*vectors, *removed}:
            base = self.base[identities.identities[number].family]
            vectors[number] = vectors.get(number, 0) | (base & ~removed.get(number, 0))
        return vectors

    def _append(self, vector: int) -> int:
        """A class of a map that is being built."""
        class_ = len(self.vectors)
        self._check(class_)
        self.vectors[class_] = vector
        self._counts[class_] = 0
        self._classes[vector] = class_
        return class_

    def _check(self, class_: int) -> None:
        if class_ >= self._limit:
            raise exceeded(self._what, "classes_per_set", self._limit, class_ + 1)

    def add(self, identity: int, vector: int, draft: Draft, journal: Journal) -> int | None:
        """Give a new identity its class. Returns the class if it is a new one."""
        class_ = self._classes.get(vector)
        created = class_ is None
        if class_ is None:
            class_ = self._new_class(vector, journal)
        if class_ != self.default:
            journal.put(self._counts, class_, self._counts[class_] + 1)
            journal.put(self._rows, identity, class_)
            draft.write(Phase.GROW, "peer_classes", (self.number, identity), class_)
        return class_ if created else None

    def _new_class(self, vector: int, journal: Journal) -> int:
        """The smallest number that no class has."""
        if self._free:
            class_ = min(self._free)
            journal.discard(self._free, class_)
        else:
            class_ = len(self.vectors)
            self._check(class_)
        journal.put(self.vectors, class_, vector)
        journal.put(self._counts, class_, 0)
        journal.put(self._classes, vector, class_)
        return class_

    def remove(self, identity: int, draft: Draft, journal: Journal) -> None:
        """An identity is gone: drop its row, and its class if it was the last one."""
        class_ = self._rows.get(identity)
        if class_ is None:
            return
        journal.pop(self._rows, identity)
        draft.write(Phase.SHRINK, "peer_classes", (self.number, identity), DELETED)
        journal.put(self._counts, class_, self._counts[class_] - 1)
        if not self._counts[class_]:
            journal.pop(self._counts, class_)
            journal.pop(self._classes, journal.pop(self.vectors, class_))
            journal.add(self._free, class_)

    def clear(self, draft: Draft) -> None:
        """The set is gone: drop all rows."""
        rows = draft.rows(Phase.SHRINK, "peer_classes")
        for identity in self._rows:
            rows[(self.number, identity)] = DELETED

    def class_of(self, identity: int) -> int:
        """The class of an identity in use."""
        return self._rows.get(identity, self.default)

    def vector_of(self, identity: int) -> int:
        """The vector of an identity in use."""
        return self.vectors[self._rows.get(identity, self.default)]

    @property
    def span(self) -> int:
        """One more than the largest class number in use."""
        return len(self.vectors) + len(self._free)
