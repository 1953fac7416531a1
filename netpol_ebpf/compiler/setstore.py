# SPDX-License-Identifier: Apache-2.0
"""All policy sets by content, and their update when identities and atoms are added or removed.

Endpoints with equal rule lists and equal own entries share a policy set.

Invariant: when a row that gives packets a new identity or atom is written, every published policy set already has a
class for that identity or atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from netpol_ebpf.compiler.classes import ClassTable
from netpol_ebpf.compiler.draft import Draft
from netpol_ebpf.compiler.identities import MatchRecord
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.l4 import Split
from netpol_ebpf.compiler.sets import LiveSet, SetKey, Stores, free_columns, free_verdicts
from netpol_ebpf.compiler.tables import SetRow


class SetStore:
    """All policy sets, by rule list and own entries."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self._sets: dict[SetKey, LiveSet] = {}
        self._published: set[LiveSet] = set()
        self._uses: dict[MatchRecord, dict[ClassTable, int]] = {}
        self._sets_of: dict[ClassTable, dict[LiveSet, None]] = {}  # published sets
        self._odd: dict[int, set[ClassTable]] = {4: set(), 6: set()}
        """By family: the class tables in which identities without any true term have another class than the default."""
        self._created: list[LiveSet] = []
        self._dying: list[LiveSet] = []
        self._moved: dict[LiveSet, SetRow] = {}
        self._left_verdicts: list[tuple[int, int]] = []
        self._left_columns: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._sets)

    def acquire(self, key: SetKey, what: str, draft: Draft, journal: Journal) -> LiveSet:
        """Add a reference to the policy set of ``key``, which is created if it does not exist.

        A new set has no rows until `build_created`.  The caller must have acquired the set's rule list.
        ``what``: the object to name in a LimitError.
        """
        live = self._sets.get(key)
        if live is None:
            live = LiveSet(key, what, self.stores, draft, journal)
            journal.put(self._sets, key, live)
            self._created.append(live)
        journal.assign(live, "references", live.references + 1)
        return live

    def release(self, live: LiveSet, journal: Journal) -> None:
        """Drop a reference to a policy set. A set without references keeps its rows until `bury` removes the set."""
        journal.assign(live, "references", live.references - 1)
        if not live.references:
            journal.pop(self._sets, live.key)
            self._dying.append(live)

    def release_predicates(self, journal: Journal) -> None:
        """Release the protocol and port predicates of the sets without references."""
        for live in self._dying:
            live.release_predicates(journal)

    @property
    def moved(self) -> Mapping[LiveSet, SetRow]:
        """The published sets that moved to a new range in this commit, each with the row that it had before."""
        return self._moved

    def extend(self, created: Iterable[int], draft: Draft, journal: Journal) -> None:
        """Give new identities their classes in all published sets.

        Cost: linear in the number of sets that have a match that depends on one of these identities.
        """
        grown: dict[ClassTable, list[int]] = {}
        for identity in created:
            for class_table, vector in self._vectors(identity).items():
                class_ = class_table.add(identity, vector, draft, journal)
                if class_ is not None:
                    grown.setdefault(class_table, []).append(class_)
        for live in dict.fromkeys(live for class_table in grown for live in self._sets_of[class_table]):
            peers, owns = (
                {}
                if side is None
                else {class_: side.vector(side.table.vectors[class_]) for class_ in grown.get(side.table, ())}
                for side in (live.peer, live.own)
            )
            row = live.row
            left = live.add_classes(peers, owns, draft, journal)
            if left is not None:
                self._left_verdicts.append(left)
                self._moved.setdefault(live, row)

    def distinguishing(self, one: int, other: int) -> Iterator[tuple[ClassTable, Iterable[LiveSet]]]:
        """The class tables in which two identities may have different classes.

        Yields (class table, published sets that use the class table).
        """
        for class_table in {**self._vectors(one), **self._vectors(other)}:
            yield class_table, self._sets_of[class_table]

    def _vectors(self, identity: int) -> dict[ClassTable, int]:
        """The vector of an identity in each class table in which the identity may be outside the default class."""
        holding, excluded = self.stores.identities.concerning(identity)
        family = self.stores.identities.identities[identity].family
        vectors = {class_table: class_table.base[family] for class_table in self._odd[family]}
        for record in excluded:
            for class_table, mask in self._uses.get(record, {}).items():
                vectors[class_table] = vectors.get(class_table, class_table.base[family]) & ~mask
        for record in holding:
            for class_table, mask in self._uses.get(record, {}).items():
                vectors[class_table] = vectors.get(class_table, class_table.base[family]) | mask
        return vectors

    def split_atoms(self, split: Split, *, source: bool, draft: Draft, journal: Journal) -> None:
        """Give new atoms their classes in all published sets. ``source``: whether the atoms are source-port atoms."""
        if split.parents:
            for live in self._published:
                row = live.row
                left = live.add_atoms(split, source, draft, journal)
                if left is not None:
                    self._left_columns.append(left)
                    self._moved.setdefault(live, row)

    def build_created(self, draft: Draft, journal: Journal) -> None:
        """Build and write the new sets. After this call, this commit must not add identities or atoms."""
        for live in self._created:
            live.build(draft, journal)
            journal.add(self._published, live)
            for class_table in live.class_tables:
                if class_table not in self._sets_of:
                    self._publish(class_table, journal)
                journal.put(self._sets_of[class_table], live, None)

    def _publish(self, class_table: ClassTable, journal: Journal) -> None:
        journal.put(self._sets_of, class_table, {})
        for record, mask in class_table.masks.items():
            users = self._uses.get(record)
            if users is None:
                users = {}
                journal.put(self._uses, record, users)
            journal.put(users, class_table, mask)
        for family, odd in self._odd.items():
            if class_table.base[family] != class_table.vectors[class_table.defaults[family]]:
                journal.add(odd, class_table)

    def _withdraw(self, class_table: ClassTable, journal: Journal) -> None:
        journal.pop(self._sets_of, class_table)
        for record in class_table.masks:
            users = self._uses[record]
            journal.pop(users, class_table)
            if not users:
                journal.pop(self._uses, record)
        for odd in self._odd.values():
            journal.discard(odd, class_table)

    def remove_identities(self, gone: Iterable[int], draft: Draft, journal: Journal) -> None:
        """Delete the class rows of identities that no address has any more."""
        numbers = list(gone)
        if numbers:
            for class_table in self._sets_of:
                for number in numbers:
                    class_table.remove(number, draft, journal)

    def bury(self, draft: Draft, journal: Journal) -> None:
        """Remove the sets that no endpoint uses any more. Must be called at the end of a commit."""
        for live in self._dying:
            if live not in self._published:
                raise AssertionError("a set that was never built was released")
            journal.discard(self._published, live)
            for class_table in live.class_tables:
                journal.pop(self._sets_of[class_table], live)
                if not self._sets_of[class_table]:
                    self._withdraw(class_table, journal)
            live.release(draft, journal)
        for base, size in self._left_verdicts:
            free_verdicts(base, size, self.stores, draft)
        for base, blocks in self._left_columns:
            free_columns(base, blocks, self.stores, draft)

    def end_commit(self) -> None:
        """Clear what was recorded for one commit. Must be called after every commit, also after a failed commit."""
        self._created.clear()
        self._dying.clear()
        self._moved.clear()
        self._left_verdicts.clear()
        self._left_columns.clear()
