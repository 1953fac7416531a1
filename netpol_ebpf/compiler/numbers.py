# SPDX-License-Identifier: Apache-2.0
"""Allocates numbers and ranges of numbers for rows.

Invariants: no number is allocated twice.  A number that a commit frees is not reused in the same commit.  Freed single
numbers are reused as late as possible, so that a reader with a stale number does not soon find another object under
that number.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Mapping
from typing import TypeVar

from netpol_ebpf.compiler.journal import Journal

V = TypeVar("V")

QUARANTINE = 1024
"""How many freed numbers must wait before the first of them is reused, while never used numbers remain; arbitrary."""


class NumberPool:
    """Allocates single numbers from ``first`` to ``first + count - 1``."""

    def __init__(self, first: int, count: int) -> None:
        self._first = self._next = first
        self._end = first + count
        self._freed: deque[int] = deque()
        self._skip: set[int] = set()

    def keep(self, known: Mapping[V, int]) -> dict[V, int]:
        """Reserve the numbers of an earlier run (object -> number), and return those that were reserved.

        Numbers out of range, and numbers of several objects, are not reserved.  A reserved number is not allocated
        until `give_back` frees it.  Must be called before the first `take`.
        """
        users = Counter(known.values())
        kept = {
            what: number for what, number in known.items() if self._first <= number < self._end and users[number] == 1
        }
        self._skip.update(kept.values())
        return kept

    def take(self, journal: Journal) -> int | None:
        """Allocate a number; None if all numbers are in use."""
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
    """Allocates ranges of consecutive numbers from 0 to ``size`` - 1. The first gap that is large enough is used."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, length), ascending, never adjacent

    def begin(self, journal: Journal) -> None:
        """Start a commit: the journal's rollback restores the present allocation.

        Must be the first call in a commit.
        """
        before = self._free.copy()
        journal.on_rollback(lambda: self._free.__setitem__(slice(None), before))

    def take(self, length: int) -> int | None:
        """Allocate ``length`` consecutive numbers and return the first; None if no gap is large enough."""
        for index, (start, room) in enumerate(self._free):
            if room >= length:
                if room == length:
                    del self._free[index]
                else:
                    self._free[index] = (start + length, room - length)
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free the range of ``length`` numbers from ``start`` on. Must be called at the end of a commit."""
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
