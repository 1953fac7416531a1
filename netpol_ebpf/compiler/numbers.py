# SPDX-License-Identifier: Apache-2.0
"""Numbers and ranges for rows: allocated, freed, and not reused at once.

Invariants: nothing is allocated twice; what is freed within a commit is not reused in it; a freed single number is
reused last, so that a reader with a stale number does not soon see another object under it.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Mapping
from typing import TypeVar

from netpol_ebpf.compiler.journal import Journal

V = TypeVar("V")

QUARANTINE = 1024
"""Freed numbers that are kept back while unused ones remain; arbitrary."""


class NumberPool:
    """Single numbers from ``first`` on, at most ``count`` in use."""

    def __init__(self, first: int, count: int) -> None:
        self._first = self._next = first
        self._end = first + count
        self._freed: deque[int] = deque()
        self._skip: set[int] = set()

    def keep(self, known: Mapping[V, int]) -> dict[V, int]:
        """Reserve the numbers of an earlier run that are in range and belong to one object.

        They are not allocated until `give_back`.  Whatever the input, no two objects share a number.  Must be called before
        the first number is taken.
        """
        users = Counter(known.values())
        kept = {
            what: number for what, number in known.items() if self._first <= number < self._end and users[number] == 1
        }
        self._skip.update(kept.values())
        return kept

    def take(self, journal: Journal) -> int | None:
        """Allocate a number; None when all are in use."""
        while self._next in self._skip:
            self._next += 1
        if self._freed and (len(self._freed) > QUARANTINE or self._next >= self._end):
            number = self._freed.popleft()
            journal.on_rollback(lambda: self._freed.appendleft(number))
            return number
        if self._next >= self._end:
            return None
        number = self._next
        journal.assign(self, "_next", number + 1)
        return number

    def give_back(self, number: int, journal: Journal) -> None:
        """Free a number. Must be called at the end of a commit, when nothing refers to the number any more."""
        self._freed.append(number)
        journal.on_rollback(self._freed.pop)


class Ranges:
    """Runs of consecutive numbers from 0 to ``size`` - 1, first fit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, length), ascending, never adjacent

    def begin(self, journal: Journal) -> None:
        """Start a transaction. Must be called at the start of a commit; later calls can be rolled back."""
        before = self._free.copy()
        journal.on_rollback(lambda: self._free.__setitem__(slice(None), before))

    def take(self, length: int) -> int | None:
        """Allocate a run and return its start; None when no gap is large enough."""
        for index, (start, room) in enumerate(self._free):
            if room >= length:
                if room == length:
                    del self._free[index]
                else:
                    self._free[index] = (start + length, room - length)
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free a run. Must be called at the end of a commit."""
        insort(self._free, (start, length))
        index = self._free.index((start, length))
        for at in (index, index - 1):
            if 0 <= at < len(self._free) - 1:
                (left, left_length), (right, right_length) = self._free[at], self._free[at + 1]
                if left + left_length == right:
                    self._free[at : at + 2] = [(left, left_length + right_length)]

    @property
    def in_use(self) -> int:
        """How many numbers are allocated."""
        return self.size - sum(length for _, length in self._free)
