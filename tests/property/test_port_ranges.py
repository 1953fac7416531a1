# SPDX-License-Identifier: Apache-2.0
"""Port ranges are merged without gaining or losing a port."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given

from netpol_ebpf.policy.translate.composition import merged_ranges

ranges = st.tuples(st.integers(1, 12), st.integers(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def _ports(some: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> set[int]:
    return {port for first, last in some for port in range(first, last + 1)}


@given(st.lists(ranges, max_size=5))
def test_merged_ranges(some: list[tuple[int, int]]) -> None:
    """The same ports, in ascending ranges with a gap between each two."""
    merged = merged_ranges(some)
    assert _ports(merged) == _ports(some)
    assert all(one[1] + 1 < other[0] for one, other in pairwise(merged))
