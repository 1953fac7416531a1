# SPDX-License-Identifier: Apache-2.0
"""Classes of identities as policy sets see them: a class has the identities for which the same matches are true.

A *class table* is a partition of the identities by a set of matches.  Policy sets with the same matches on a side share
it, whatever verdicts they give its classes: a change of a policy's ports or actions changes no row of ``peer_classes``.
*Entry vectors* are one policy set's view of a class table: each class as a bit vector of the set's entries.  As every
entry has one match, classes and vectors are one to one.

Invariants: every identity in use has its class, through a row of ``peer_classes`` or as the default class of its
family; a class number keeps its meaning as long as it is in use, so verdicts of a published set stay right when
identities come and go.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.identities import IdentityIndex, MatchRecord
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import Limits, exceeded
from netpol_ebpf.compiler.numbers import NumberPool

_REMEMBERED = 256
"""How many vectors of deleted classes the cache may hold; arbitrary."""


class ClassTable:
    """The class of each identity, by which matches of a set of matches are true for it.

    ``number``: ``set`` in the keys of ``peer_classes``.  ``masks``: match -> its bit.  ``vectors``: class -> the bits of the
    matches that hold.  ``defaults``: family -> class without rows; each family has its own, since a rule on 0.0.0.0/0
    separates the two families.  ``references``: how many sides of policy sets use the table.
    """

    def __init__(
        self, number: int, matches: frozenset[MatchRecord], identities: IdentityIndex, limit: int, what: str
    ) -> None:
        self.number = number
        self.matches = matches
        self.masks = {record: 1 << bit for bit, record in enumerate(sorted(matches, key=lambda one: one.number))}
        self.vectors: dict[int, int] = {}
        self.defaults = {4: 0, 6: 0}
        self.base = {4: 0, 6: 0}
        """By family: the vector of an identity for which no positive term and no negative term of a match is true."""
        self.references = 0
        self._identities = identities
        self._limit = limit
        self._what = what
        self._classes: dict[int, int] = {}
        self._counts: dict[int, int] = {}  # rows and defaults by class
        self._free: set[int] = set()
        self._rows: dict[int, int] = {}  # identity -> class, of those that are not in the default class
        for record, mask in self.masks.items():
            if record.is_floating:
                for family in self.base:
                    if record.match.family in (0, family):
                        self.base[family] |= mask

    @property
    def is_built(self) -> bool:
        """Whether `build` has assigned the classes."""
        return bool(self.vectors)

    @property
    def rows(self) -> Mapping[int, int]:
        """The class of each identity that is not in its family's default class; read-only for callers."""
        return self._rows

    def build(self, draft: Draft) -> None:
        """Assign classes and rows to all identities, in a table that is not in force yet.

        Cost: the members of all matches, never identities times matches.  The class of most identities of a family
        becomes its default.
        """
        vectors = self._vectors_by_term()
        v6 = self._identities.v6
        populations: dict[int, dict[int, int]] = {4: {}, 6: {}}
        for number, vector in vectors.items():
            of_family = populations[6 if number in v6 else 4]
            of_family[vector] = of_family.get(vector, 0) + 1
        for family, base in self.base.items():
            of_family = populations[family]
            others = len(self._identities.family_members(family)) - sum(of_family.values())
            of_family[base] = of_family.get(base, 0) + others
            # Ties go to what an unknown address is, then to the smallest vector: so that the rows are few.
            default = max(of_family, key=lambda vector: (of_family[vector], vector == base, -vector))
            self.defaults[family] = self._known(default)
            self._counts[self.defaults[family]] += 1
        rows = draft.rows(Phase.GROW, "peer_classes")
        for family, base in self.base.items():
            if self._classes.get(base) != self.defaults[family]:
                for number in self._identities.family_members(family):
                    if number not in vectors:
                        vectors[number] = base
        four, six = (self.vectors[self.defaults[family]] for family in (4, 6))
        for number, vector in vectors.items():
            if vector != (six if number in v6 else four):
                class_ = self._known(vector)
                self._counts[class_] += 1
                self._rows[number] = class_
                rows[(self.number, number)] = class_

    def _vectors_by_term(self) -> dict[int, int]:
        """The vector of each identity for which at least one term is true."""
        identities = self._identities
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

    def _known(self, vector: int) -> int:
        """The class of a vector, in a table during `build`."""
        class_ = self._classes.get(vector)
        if class_ is None:
            class_ = len(self.vectors)
            self._check(class_)
            self.vectors[class_] = vector
            self._counts[class_] = 0
            self._classes[vector] = class_
        return class_

    def _default(self, identity: int) -> int:
        """The default class of an identity's family."""
        return self.defaults[6 if identity in self._identities.v6 else 4]

    def _check(self, class_: int) -> None:
        if class_ >= self._limit:
            raise exceeded(self._what, "classes_per_set", self._limit, class_ + 1)

    def add(self, identity: int, vector: int, draft: Draft, journal: Journal) -> int | None:
        """Give a new identity its class. Returns the class if it is a new one."""
        class_ = self._classes.get(vector)
        created = class_ is None
        if class_ is None:
            class_ = self._new_class(vector, journal)
        if class_ != self._default(identity):
            journal.put(self._counts, class_, self._counts[class_] + 1)
            journal.put(self._rows, identity, class_)
            draft.write(Phase.GROW, "peer_classes", (self.number, identity), class_)
        return class_ if created else None

    def _new_class(self, vector: int, journal: Journal) -> int:
        """Create a class for a vector, with the smallest free number."""
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
        """Drop the row of an identity that no address has any more, and its class if no other identity is in it."""
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
        """Drop all rows, when the last policy set has released the table."""
        rows = draft.rows(Phase.SHRINK, "peer_classes")
        for identity in self._rows:
            rows[(self.number, identity)] = DELETED

    def class_of(self, identity: int) -> int:
        """The class of an identity in use."""
        class_ = self._rows.get(identity)
        return self._default(identity) if class_ is None else class_

    def vector_of(self, identity: int) -> int:
        """The vector of an identity in use."""
        return self.vectors[self.class_of(identity)]

    @property
    def span(self) -> int:
        """One more than the largest class number in use."""
        return len(self.vectors) + len(self._free)


class ClassTables:
    """The class tables in use, by their matches."""

    def __init__(self, identities: IdentityIndex, limits: Limits) -> None:
        self._identities = identities
        self._limits = limits
        self._numbers = NumberPool(1, 1 << 31)
        self._tables: dict[frozenset[MatchRecord], ClassTable] = {}

    def acquire(self, matches: frozenset[MatchRecord], what: str, journal: Journal) -> ClassTable:
        """Count a use of the class table for these matches; a new one has no classes until it is built."""
        found = self._tables.get(matches)
        if found is None:
            number = self._numbers.take(journal)
            if number is None:
                raise exceeded(what, "endpoints", self._limits.endpoints, self._limits.endpoints + 1)
            found = ClassTable(number, matches, self._identities, self._limits.classes_per_set, what)
            journal.put(self._tables, matches, found)
        journal.assign(found, "references", found.references + 1)
        return found

    def release(self, class_table: ClassTable, draft: Draft, journal: Journal) -> None:
        """Count one use less; a table without uses is removed, with its rows. Must be called at the end of a commit."""
        journal.assign(class_table, "references", class_table.references - 1)
        if not class_table.references:
            journal.pop(self._tables, class_table.matches)
            class_table.clear(draft)
            self._numbers.give_back(class_table.number, journal)


class EntryVectors:
    """One policy set's view of a class table.

    ``masks``: match -> bits of the set's entries; ``always``: bits of entries that match any address.
    """

    __slots__ = ("_always", "_known", "_masks", "table")

    def __init__(self, class_table: ClassTable, masks: Mapping[MatchRecord, int], always: int) -> None:
        self.table = class_table
        self._always = always
        self._masks = [masks[record] for record in class_table.masks]
        self._known: dict[int, int] = {}

    def vector(self, matching: int) -> int:
        """The entries of the policy set that have one of these matches, as a bit vector."""
        known = self._known.get(matching)
        if known is None:
            if len(self._known) > 2 * len(self.table.vectors) + _REMEMBERED:
                self._known.clear()
            known, rest = self._always, matching
            while rest:
                lowest = rest & -rest
                known |= self._masks[lowest.bit_length() - 1]
                rest ^= lowest
            self._known[matching] = known
        return known

    @property
    def vectors(self) -> dict[int, int]:
        """Class -> the entries of the policy set with a match that is true for the class, as a bit vector."""
        return {class_: self.vector(matching) for class_, matching in self.table.vectors.items()}

    def vector_of(self, identity: int) -> int:
        """Bit vector of the policy set's entries with a match that is true for an identity in use."""
        return self.vector(self.table.vector_of(identity))
