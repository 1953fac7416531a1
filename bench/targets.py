# SPDX-License-Identifier: Apache-2.0
"""The product's targets for the cost of a packet, beside the measured figures.

A target is a ratio to a case of the same rounds, because nanoseconds of different machines cannot be compared. Limits
that were set in nanoseconds (15, 100 and 350) are divided by the cost of the primitive on the machine for which they
were set. This module must not measure, and must not leave out a row: a row without measured cases says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.record import Case

ESTABLISHED, DENIED = "established, {}", "SYN denied, {}"
RANDOM_ESTABLISHED = "random: established, 64k flows, v4"
RANDOM_DENIED = "random: SYN denied, v4"
RANDOM_RECORDED = "random: SYN recorded, v4"
PARSE_ONLY = "parse only, v4"
BARE_HASH = "bare: hash lookup of an address, random"
BARE_LOOKUP = "bare: LRU lookup, 64k flows"
BARE_INSERT = "bare: LRU insert"

GROWN_ESTABLISHED, GROWN_DENIED = "established, hot", "new flow denied, hot"
"""Names of the cases of `bench/scale.py` that show growth."""

FEW, MANY_RULES, MANY_PODS = 10, 10_000, 100_000

MISSED = "missed"

Size = tuple[int, int]
"""(pods, rules)."""
SMALL, BIG = (FEW, FEW), (MANY_PODS, MANY_RULES)
GROWN: Mapping[str, Size] = {
    "10 000 rules / 10 rules": (FEW, MANY_RULES),
    "100 000 pods / 10 pods": (MANY_PODS, FEW),
    "10 000 rules and 100 000 pods / 10 and 10": BIG,
}
"""By name of the target: the size with the measurement that is divided by the same measurement at SMALL."""
SIZES: Sequence[Size] = (SMALL, *GROWN.values())
Samples = Mapping[Size, Mapping[str, Sequence[float]]]
"""By size and case: nanoseconds, one figure for each round."""


def by_size(cases: Iterable[Case], suite: str) -> Samples:
    """The samples in nanoseconds of a suite's cases that state the numbers of pods and rules."""
    found: dict[Size, dict[str, Sequence[float]]] = {}
    for case in cases:
        pods, rules = case.parameters.get("pods"), case.parameters.get("rules")
        if case.suite == suite and case.unit == "ns" and isinstance(pods, int) and isinstance(rules, int):
            found.setdefault((pods, rules), {})[case.name] = case.samples
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """One target. ``figure``: None if its cases were not measured. ``unit``: "ns", or "x" for a ratio."""

    name: str
    figure: float | None
    limit: float
    unit: str

    @property
    def verdict(self) -> str:
        """Met, missed or not measured."""
        if self.figure is None:
            return "not measured"
        return "met" if self.figure <= self.limit else MISSED


def rows(samples: Samples, grown: Samples | None = None) -> list[Row]:
    """All targets, judged by medians.

    ``samples``: of `bench/micro.py`, which measures its sizes one after the other, minutes apart. ``grown``: of
    `bench/scale.py`, which measures all sizes in each round. Without ``grown``, as in results that are older than these
    cases, growth is judged by ``samples``, too.
    """

    def cost(name: str, size: Size = BIG, source: Samples = samples) -> float | None:
        found = source.get(size, {}).get(name)
        return statistics.median(found) if found else None

    def ratio(top: float | None, bottom: float | None) -> float | None:
        return top / bottom if top is not None and bottom is not None and bottom > 0 else None

    def growth(name: str, case: str, size: Size) -> float | None:
        in_turns = ratio(cost(case, size, grown or {}), cost(case, SMALL, grown or {}))
        return in_turns if in_turns is not None else ratio(cost(name, size), cost(name, SMALL))

    denied = DENIED.format("v4")
    found = [
        Row("established, one hot flow / parsing it", ratio(cost(ESTABLISHED.format("v4")), cost(PARSE_ONLY)), 2.2, "x"),
        Row("established, 64k flows at random / bare LRU lookup", ratio(cost(RANDOM_ESTABLISHED), cost(BARE_LOOKUP)), 1, "x"),
        Row("new flow denied, hot, with its event / parsing it", ratio(cost(denied), cost(PARSE_ONLY)), 14.7, "x"),
        Row("new flow denied, random client / bare hash lookup", ratio(cost(RANDOM_DENIED), cost(BARE_HASH)), 2.5, "x"),
        Row("new flow allowed and recorded / bare LRU insert", ratio(cost(RANDOM_RECORDED), cost(BARE_INSERT)), 1.2, "x"),
    ]  # fmt: skip
    found += [
        Row(f"{name}, hot: {what}", growth(name, case, size), 1.1, "x")
        for what, size in GROWN.items()
        for name, case in ((ESTABLISHED.format("v4"), GROWN_ESTABLISHED), (denied, GROWN_DENIED))
    ]
    for case in (ESTABLISHED, DENIED):
        quotient = ratio(cost(case.format("v6")), cost(case.format("v4")))
        found.append(Row(f"{case.format('IPv6 / IPv4')}", quotient, 1.3, "x"))
    return found
