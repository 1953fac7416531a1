# SPDX-License-Identifier: Apache-2.0
"""The record of changes that came into force: a log line for each change, and a histogram of how long changes took.

Invariant: a change is in the histogram and in the log exactly once. Changes that come into force less than LINE_S
seconds after a log line share the next line. It has the sums of the numbers of their objects, and the longest of their
times.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram in seconds. The numbers are arbitrary. They range from the time for one policy on a
small node to the time of the first start on a large cluster."""
LINE_S = 1.0
"""Least seconds between two log lines. The number is arbitrary."""

log = logging.getLogger(__name__)


class ObjectCounts(NamedTuple):
    """The numbers of objects that a change added, changed and removed."""

    added: int = 0
    changed: int = 0
    removed: int = 0

    def plus(self, other: ObjectCounts) -> ObjectCounts:
        """Add the numbers of ``other`` to these; returns the sums."""
        return ObjectCounts(self.added + other.added, self.changed + other.changed, self.removed + other.removed)


class ChangeRecord:
    """The record of changes. Callers call `begin` when they start to apply a change.

    Then they call `note` when the change is in force, or `drop` if nothing was to be changed.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock``: returns the time in seconds."""
        self._clock = clock
        self._begun_s: float | None = None
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0
        self._line_s = -math.inf
        self._changes = 0  # without a line
        self._longest_s = 0.0
        self._generation = 0
        self._objects: dict[str, ObjectCounts] = {}

    def begin(self) -> None:
        """Start measuring the time, unless an earlier change is still not in force."""
        if self._begun_s is None:
            self._begun_s = self._clock()

    def drop(self) -> None:
        """Stop measuring the time: nothing was to be changed."""
        self._begun_s = None

    def note(self, objects: Mapping[str, ObjectCounts], generation: int) -> None:
        """Record that everything since `begin` is in force. ``objects``: the numbers by table of the world."""
        now_s = self._clock()
        took_s = 0.0 if self._begun_s is None else now_s - self._begun_s
        self._begun_s = None
        self._counts[sum(took_s > bound for bound in BUCKETS_S)] += 1
        self._sum_s += took_s
        self._changes += 1
        self._longest_s = max(self._longest_s, took_s)
        self._generation = generation
        for table, counts in objects.items():
            self._objects[table] = self._objects.get(table, ObjectCounts()).plus(counts)
        self.write_line()

    def write_line(self) -> None:
        """Log the changes that no line has yet, unless the last line is less than LINE_S old."""
        if not self._changes or self._clock() < self._line_s + LINE_S:
            return
        total = ObjectCounts()
        for counts in self._objects.values():
            total = total.plus(counts)
        fields: dict[str, Any] = {"changes": self._changes, "generation": self._generation}
        fields |= {"milliseconds": round(1000 * self._longest_s, 1), **total._asdict()}
        fields |= {table: "+{}~{}-{}".format(*counts) for table, counts in self._objects.items() if any(counts)}
        log.info("in force", extra={"fields": fields})
        self._line_s, self._changes, self._longest_s = self._clock(), 0, 0.0
        self._objects.clear()

    def histogram(self) -> dict[str, Any]:
        """The histogram of the times: ``buckets`` as [upper bound, cumulative count], and ``sum`` in seconds."""
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        total, buckets = 0, []
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            buckets.append([bound, total])
        return {"buckets": buckets, "sum": self._sum_s}
