# SPDX-License-Identifier: Apache-2.0
"""The growth benchmark: its points, and the order of its turns."""

from __future__ import annotations

from bench import targets
from bench.record import Run
from bench.scale import AXES, SMOKE_AXES, SMOKE_SIZES, Point, _record, points, turns


def test_each_round_begins_with_another() -> None:
    """Each round has each point once, whether there are more rounds or more points."""
    assert list(turns("ab", 3)) == [*"ab", *"ba", *"ab"]
    assert list(turns("abcdef", 2)) == [*"abcdef", *"defabc"]


def test_sizes_that_targets_compare_are_points() -> None:
    """These points have the given numbers of pods and rules, and otherwise the values of the axes."""
    named = points(AXES, targets.SIZES)
    assert named[(("pods", 100_000), ("rules", 10))] == Point(pods=100_000, rules=10)
    assert named[(("cidrs", 10),)] == Point(cidrs=10)


def test_a_case_is_divided_by_the_smallest_of_its_own_sort() -> None:
    """A point of an axis is divided by the axis's smallest value, a size by the smallest size."""
    named = points(SMOKE_AXES, SMOKE_SIZES)
    run = Run("command", {}, {}, {}, "now")
    samples = {(point, "established, hot"): [1.0] for point in named.values()}
    _record(run, named, samples, {Point(rules=10): {"rows": 7}, Point(rules=1000): {"rows": 9}})
    bases = {case.id: case.base for case in run.cases if case.base}
    first = "scale/established, hot/netpol-ebpf/"
    assert bases == {
        f"{first}rules=1000": f"{first}rules=10",
        f"{first}pods=10,rules=1000": f"{first}pods=10,rules=10",
        "scale/rows/netpol-ebpf/rules=1000": "scale/rows/netpol-ebpf/rules=10",
    }
