# SPDX-License-Identifier: Apache-2.0
"""Numbers and ranges: allocation, release, and rollback."""

from __future__ import annotations

import random
from itertools import pairwise

from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.numbers import QUARANTINE, NumberPool, Ranges


def test_freed_number_waits_while_fresh_ones_are_to_be_had() -> None:
    """A released number is not the next one."""
    numbers, journal = NumberPool(1, 10_000), Journal()
    first = numbers.take(journal)
    assert first == 1
    numbers.give_back(first, journal)
    later = [numbers.take(journal) for _ in range(QUARANTINE)]
    assert 1 not in later


def test_freed_numbers_are_used_before_none_are_left() -> None:
    """At the limit the oldest released number is reused. Without one there is nothing."""
    numbers, journal = NumberPool(1, 3), Journal()
    assert [numbers.take(journal) for _ in range(3)] == [1, 2, 3]
    assert numbers.take(journal) is None
    numbers.give_back(2, journal)
    numbers.give_back(1, journal)
    assert [numbers.take(journal) for _ in range(3)] == [2, 1, None]


def test_rollback_forgets_what_was_taken_and_given_back() -> None:
    """After a rollback the same numbers are allocated in the same order."""
    numbers, journal = NumberPool(1, 4), Journal()
    kept = [numbers.take(journal) for _ in range(3)]
    assert kept == [1, 2, 3]
    numbers.give_back(2, journal)
    attempt = Journal()
    assert [numbers.take(attempt) for _ in range(2)] == [4, 2]
    numbers.give_back(1, attempt)
    attempt.rollback()
    again = Journal()
    assert [numbers.take(again) for _ in range(3)] == [4, 2, None]


def test_reserved_number_is_not_handed_out() -> None:
    """Numbers of an earlier run are not allocated until they are released."""
    numbers, journal = NumberPool(1, 3), Journal()
    assert numbers.keep({"here": 2}) == {"here": 2}
    assert [numbers.take(journal) for _ in range(3)] == [1, 3, None]
    numbers.give_back(2, journal)
    assert numbers.take(journal) == 2


def test_number_of_several_or_out_of_range_is_not_kept() -> None:
    """A new owner gets a number of its own, whatever an earlier run left."""
    numbers, journal = NumberPool(1, 3), Journal()
    assert numbers.keep({"a": 2, "b": 2, "c": 3, "d": 0, "e": 4, "f": -1}) == {"c": 3}
    assert [numbers.take(journal) for _ in range(3)] == [1, 2, None]


def test_ranges_never_overlap_and_join_again() -> None:
    """After random allocations and releases everything is one gap again."""
    chance = random.Random(2)
    ranges = Ranges(1000)
    held: list[tuple[int, int]] = []
    for _ in range(2000):
        if held and chance.random() < 0.5:
            ranges.give_back(*held.pop(chance.randrange(len(held))))
        else:
            length = chance.randrange(1, 60)
            start = ranges.take(length)
            if start is not None:
                held.append((start, length))
        used = sorted(held)
        assert all(left + length <= right for (left, length), (right, _) in pairwise(used))
        assert ranges.in_use == sum(length for _, length in held)
    while held:
        ranges.give_back(*held.pop())
    assert ranges.take(1000) == 0
    assert ranges.take(1) is None


def test_first_fit() -> None:
    """The first gap that is large enough is used, so that ranges stay low."""
    ranges = Ranges(100)
    first, second = ranges.take(10), ranges.take(10)
    assert (first, second) == (0, 10)
    ranges.give_back(0, 10)
    assert ranges.take(11) == 20
    assert ranges.take(4) == 0


def test_ranges_are_as_before_after_a_rollback() -> None:
    """Numbers that a failed commit allocated and released are restored."""
    ranges = Ranges(100)
    assert ranges.take(10) == 0
    journal = Journal()
    ranges.begin(journal)
    assert ranges.take(20) == 10
    ranges.give_back(0, 10)
    journal.rollback()
    assert ranges.in_use == 10
    assert ranges.take(5) == 10
