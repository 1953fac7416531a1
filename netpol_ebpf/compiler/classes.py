# SPDX-License-Identifier: Apache-2.0
"""Classes of identities: identities for which the same address matches are true are in one class.

A *class table* is a partition of the identities by a set of matches.  Policy sets with the same matches on one side
share a class table, whatever their verdicts.  So a change of only a policy's ports or actions changes no row of
``peer_classes``. *Entry vectors* are one policy set's view of a class table: for each class, the bit vector of the
set's entries that match the class.

Invariants: every identity in use has a class, either by a row of ``peer_classes`` or as the default class of its
family.  A class number keeps its meaning while it is in use.  So the verdicts of a published policy set stay correct
when identities are added and removed.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.identities import IdentityIndex, MatchRecord
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import Limits, exceeded
from netpol_ebpf.compiler.numbers import NumberPool

_REMEMBERED = 256
"""How many vectors of deleted classes `EntryVectors` may cache; arbitrary."""


class ClassTable:
    """A partition of the identities.

    Two identities are in one class if exactly the same ones of ``matches`` are true for both.
    ``number``: the ``set`` in keys of the table ``peer_classes``.
    ``masks``: maps a match to its bit.
    ``vectors``: maps a class to the bits of the matches that are true for the identities in the class.
    ``defaults``: maps a family to the class of identities without a row.  Each family has its own default class,
    because a rule on 0.0.0.0/0 separates the families.
    ``references``: how many sides of policy sets use the table.
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
        """By family: the vector of an identity for which none of the matches' terms, positive or negative, is true."""
        self.references = 0
        self._identities = identities
        self._limit = limit
        self._what = what
        self._classes: dict[int, int] = {}
        self._counts: dict[int, int] = {}  # class -> how many rows and defaults have it
        self._free: set[int] = set()
        self._rows: dict[int, int] = {}  # identity -> class; identities in their family's default class have no row
        for record, mask in self.masks.items():
            if record.is_floating:
                for family in self.base:
                    if record.match.family in (0, family):
                        self.base[family] |= mask

    @property
    def is_built(self) -> bool:
        """Whether `build` has assigned the classes already."""
        return bool(self.vectors)

    @property
    def rows(self) -> Mapping[int, int]:
        """The class of each identity that is not in its family's default class; read-only for callers."""
        return self._rows

    def build(self, draft: Draft) -> None:
        """Assign classes and rows to all identities, in a table that is not in force yet.

        The largest class of a family becomes the family's default class.  Cost: linear in the number of pairs of a
        match and an identity for which the match is true.
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
            # Of the largest classes, prefer that of unknown addresses (it needs fewer rows), then the smallest vector.
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
        """The vector of each identity whose vector may differ from its family's base vector."""
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
        """The class of a vector, created if it does not exist.

        Only `build` may call this method, because it journals nothing.
        """
        class_ = self._classes.get(vector)
        if class_ is None:
            class_ = len(self.vectors)
            self._check(class_)
            self.vectors[class_] = vector
            self._counts[class_] = 0
            self._classes[vector] = class_
        return class_

    def _default(self, identity: int) -> int:
        return self.defaults[6 if identity in self._identities.v6 else 4]

    def _check(self, class_: int) -> None:
        if class_ >= self._limit:
            raise exceeded(self._what, "classes_per_set", self._limit, class_ + 1)

    def add(self, identity: int, vector: int, draft: Draft, journal: Journal) -> int | None:
        """Give a new identity the class of its vector. Returns the class if this call created it, else None."""
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
        """Delete the row of an identity that no address has any more.

        Also removes the identity's class if no row and no default is left for the class.
        """
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
        """Delete all rows. Must be called after the last policy set released the table."""
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
        """The largest class number in use, plus one."""
        return len(self.vectors) + len(self._free)


class ClassTables:
    """All class tables in use. A set of matches identifies a class table."""

    def __init__(self, identities: IdentityIndex, limits: Limits) -> None:
        self._identities = identities
        self._limits = limits
        self._numbers = NumberPool(1, 1 << 31)
        self._tables: dict[frozenset[MatchRecord], ClassTable] = {}

    def acquire(self, matches: frozenset[MatchRecord], what: str, journal: Journal) -> ClassTable:
        """Add a reference to the class table for ``matches``, which is created if it does not exist.

        `ClassTable.build` assigns the classes of a new table.
        ``what``: the object to name in a LimitError.
        """
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
        """Drop a reference to a class table. A table without references is removed with its rows.

        Must be called at the end of a commit.
        """
        journal.assign(class_table, "references", class_table.references - 1)
        if not class_table.references:
            journal.pop(self._tables, class_table.matches)
            class_table.clear(draft)
            self._numbers.give_back(class_table.number, journal)


class EntryVectors:
    """One policy set's view of a class table.

    For each class, the view has the bit vector of the policy set's entries that match the class.
    ``masks``: maps a match to the bits of the entries with this match.
    ``always``: the bits of the entries that match any address.
    """

    __slots__ = ("_always", "_known", "_masks", "table")

    def __init__(self, class_table: ClassTable, masks: Mapping[MatchRecord, int], always: int) -> None:
        self.table = class_table
        self._always = always
        self._masks = [masks[record] for record in class_table.masks]
        self._known: dict[int, int] = {}

    def vector(self, matching: int) -> int:
        """The bit vector of the policy set's entries that have one of the matches in ``matching``.

        ``matching``: a bit vector of matches (`ClassTable.masks` has the bit of each match).
        """
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
        """Maps each class to the bit vector of the policy set's entries that match the identities in the class."""
        return {class_: self.vector(matching) for class_, matching in self.table.vectors.items()}

    def vector_of(self, identity: int) -> int:
        """The bit vector of the policy set's entries that match an identity in use."""
        return self.vector(self.table.vector_of(identity))
