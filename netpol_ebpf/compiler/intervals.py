# SPDX-License-Identifier: Apache-2.0
"""Sets of integers as sorted, disjoint, non-adjacent inclusive intervals.

Invariant: equal sets have equal representations, so an interval set can be a dictionary key.
"""

from __future__ import annotations

from collections.abc import Iterable

Intervals = tuple[tuple[int, int], ...]
"""Pairs (first, last), both included, in ascending order. At least one integer is missing between two pairs."""

NOTHING: Intervals = ()


def normalise(pairs: Iterable[tuple[int, int]]) -> Intervals:
    """The set of all integers in any of the ``pairs`` (first, last). A pair with first > last is empty."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if first > last:
            continue
        if merged and first <= merged[-1][1] + 1:
            if last > merged[-1][1]:
                merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return tuple(merged)


def intersection(left: Intervals, right: Intervals) -> Intervals:
    """Integers in both sets."""
    if left == right:
        return left
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        first = max(left[i][0], right[j][0])
        last = min(left[i][1], right[j][1])
        if first <= last:
            found.append((first, last))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def difference(left: Intervals, right: Intervals) -> Intervals:
    """Integers of the first set that are not in the second."""
    found: list[tuple[int, int]] = []
    j = 0
    for first, last in left:
        start = first
        while j < len(right) and right[j][1] < start:
            j += 1
        k = j
        while k < len(right) and right[k][0] <= last:
            if right[k][0] > start:
                found.append((start, right[k][0] - 1))
            start = right[k][1] + 1
            k += 1
        if start <= last:
            found.append((start, last))
    return tuple(found)


def contains(intervals: Intervals, value: int) -> bool:
    """Whether the integer is in the set. Cost: linear in the number of intervals."""
    return any(first <= value <= last for first, last in intervals)
