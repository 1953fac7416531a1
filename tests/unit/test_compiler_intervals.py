# SPDX-License-Identifier: Apache-2.0
"""Interval sets, compared with sets of integers."""

from __future__ import annotations

import random

import pytest

from netpol_ebpf.compiler.intervals import Intervals, contains, difference, intersection, normalise


def members(intervals: Intervals) -> set[int]:
    """The integers of the set."""
    return {value for first, last in intervals for value in range(first, last + 1)}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], ()),
        ([(5, 4)], ()),
        ([(1, 2), (3, 4)], ((1, 4),)),
        ([(1, 2), (4, 5)], ((1, 2), (4, 5))),
        ([(4, 9), (1, 5), (6, 7)], ((1, 9),)),
    ],
)
def test_equal_sets_have_one_representation(pairs: list[tuple[int, int]], expected: Intervals) -> None:
    """Order, overlap, adjacency and empty pairs do not matter."""
    assert normalise(pairs) == expected


def test_operations_are_those_of_sets() -> None:
    """Intersection, difference and membership are right on many small random sets."""
    chance = random.Random(1)
    for _ in range(500):
        left, right = (
            normalise(
                (start, start + chance.randrange(-1, 5)) for start in chance.choices(range(30), k=chance.randrange(5))
            )
            for _ in range(2)
        )
        assert members(intersection(left, right)) == members(left) & members(right)
        assert members(difference(left, right)) == members(left) - members(right)
        for result in (intersection(left, right), difference(left, right)):
            assert result == normalise(result)
        assert all(contains(left, value) == (value in members(left)) for value in range(40))
