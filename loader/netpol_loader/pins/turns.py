# SPDX-License-Identifier: Apache-2.0
"""Turns: which interfaces a periodic check looks at next.

In this way the cost of a round is spread over several checks.

Invariant: an interface that stays is checked once in each round, whatever interfaces come and go meanwhile. The module
makes no system call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection

CHECKS = 5
"""How many checks one round over all interfaces has. The value is arbitrary.

With one check a second, a round takes five seconds.
"""
LEAST = 50
"""Least number of interfaces in one check. The value is arbitrary.

A check of so many takes some milliseconds. If a node has fewer interfaces, one check looks at all of them.
"""


class Turns:
    """The order of checks. The caller must call `next` at each check.

    ``is_first``: whether the last turn began a round.
    """

    def __init__(self, most: int | None = None) -> None:
        """``most``: largest number of interfaces in a turn, however long rounds then take.

        None: a round has at most CHECKS turns.
        """
        self.is_first = False
        self._most = most
        self._last = -1

    def next(self, present: Collection[int]) -> list[int]:
        """The interfaces of the next turn, among the ``present`` ones, in ascending order."""
        ordered = sorted(present)
        size = self._most or max(LEAST, -(-len(ordered) // CHECKS))
        begin = bisect_right(ordered, self._last)
        self.is_first = begin in (0, len(ordered))
        turn = ordered[:size] if self.is_first else ordered[begin : begin + size]
        self._last = turn[-1] if turn else -1
        return turn
