# SPDX-License-Identifier: Apache-2.0
"""Values that rows refer to by number: causes (table ``rules``) and lists of Log rules (table ``log_lists``).

Invariant: a value has one number while anything refers to the value.  The value's row is written in phase GROW of the
first commit that needs the value, and removed in phase SHRINK of the commit that drops the last reference.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import exceeded
from netpol_ebpf.compiler.numbers import NumberPool

V = TypeVar("V", bound=Hashable)


class RowRegister(Generic[V]):
    """Numbers from 1 on for the distinct values of one table.

    ``kept``: numbers of an earlier run, by value.  A value gets its kept number when it is first acquired.  Until
    `release_kept`, no other value gets that number.
    """

    def __init__(self, table: str, limit: int, kept: Mapping[V, int] | None = None) -> None:
        self._table = table
        self._limit = limit
        self._numbers = NumberPool(1, limit)
        self._kept = self._numbers.keep(kept or {})
        self._known: dict[V, int] = {}
        self._values: dict[int, V] = {}
        self._references: dict[int, int] = {}
        self._unreferenced: set[int] = set()

    def acquire(self, value: V, what: str, draft: Draft, journal: Journal) -> int:
        """Add a reference to a value, and return the value's number.

        Raises LimitError if all numbers are in use.
        ``what``: the object that the error names.
        """
        number = self._known.get(value)
        if number is None:
            number = journal.pop(self._kept, value) if value in self._kept else self._numbers.take(journal)
            if number is None:
                raise exceeded(what, self._table, self._limit, len(self._known) + 1)
            journal.put(self._known, value, number)
            journal.put(self._values, number, value)
            draft.write(Phase.GROW, self._table, number, value)
        journal.put(self._references, number, self._references.get(number, 0) + 1)
        return number

    def __len__(self) -> int:
        return len(self._known)

    def has(self, value: V) -> bool:
        """Whether the value has a number in this run."""
        return value in self._known

    def value_of(self, number: int) -> V:
        """The value with this number. Raises KeyError if no value has it."""
        return self._values[number]

    @property
    def has_unreferenced(self) -> bool:
        """Whether `collect` may find values without references."""
        return bool(self._unreferenced)

    def release_kept(self, journal: Journal) -> None:
        """Free the kept numbers that no value uses."""
        for value in list(self._kept):
            self._numbers.give_back(journal.pop(self._kept, value), journal)

    def release(self, number: int, journal: Journal) -> None:
        """Drop a reference to the value ``number``."""
        journal.put(self._references, number, self._references[number] - 1)
        if not self._references[number]:
            journal.add(self._unreferenced, number)

    def collect(self, draft: Draft, journal: Journal) -> dict[int, V]:
        """Remove values without references, and return them by number. Must be called at the end of a commit."""
        gone: dict[int, V] = {}
        for number in list(self._unreferenced):
            journal.discard(self._unreferenced, number)
            if not self._references[number]:
                journal.pop(self._references, number)
                gone[number] = journal.pop(self._values, number)
                journal.pop(self._known, gone[number])
                self._numbers.give_back(number, journal)
                draft.write(Phase.SHRINK, self._table, number, DELETED)
        return gone
