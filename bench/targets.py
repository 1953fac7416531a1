# SPDX-License-Identifier: Apache-2.0
"""What a packet may cost, and whether it does: the product's targets beside what was measured.

A target is a limit in nanoseconds over an empty program, or a ratio to a case of the same rounds.  Must not measure, and must
not leave a row out in silence: a row whose cases were not measured says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ESTABLISHED, DENIED = "established, {}", "SYN denied, {}"
RANDOM_ESTABLISHED = "random: established, 64k flows, v4"
RANDOM_DENIED = "random: SYN denied, v4"
RANDOM_RECORDED = "random: SYN recorded, v4"
BARE_LOOKUP = "bare: LRU lookup, 64k flows"
BARE_INSERT = "bare: LRU insert"

FEW, MANY_RULES, MANY_PODS = 10, 10_000, 100_000

MISSED = "missed"

Size = tuple[int, int]
"""Pods and rules."""
Samples = Mapping[Size, Mapping[str, Sequence[float]]]
"""By size and case: nanoseconds, one figure a round."""


@dataclass(frozen=True, slots=True)
class Row:
    """One target. ``figure``: None where its cases were not measured. ``unit``: "ns", or "x" for a ratio."""

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


def rows(samples: Samples) -> list[Row]:
    """All targets, judged by medians."""
    big = (MANY_PODS, MANY_RULES)

    def cost(name: str, size: Size = big) -> float | None:
        found = samples.get(size, {}).get(name)
        return statistics.median(found) if found else None

    def ratio(top: float | None, bottom: float | None) -> float | None:
        return top / bottom if top is not None and bottom is not None and bottom > 0 else None

    denied = DENIED.format("v4")
    found = [
        Row("established, one hot flow", cost(ESTABLISHED.format("v4")), 15, "ns"),
        Row("established, 64k flows at random / bare LRU lookup", ratio(cost(RANDOM_ESTABLISHED), cost(BARE_LOOKUP)), 1, "x"),
        Row("new flow denied, hot, with its event", cost(denied), 100, "ns"),
        Row("new flow denied, random client", cost(RANDOM_DENIED), 350, "ns"),
        Row("new flow allowed and recorded / bare LRU insert", ratio(cost(RANDOM_RECORDED), cost(BARE_INSERT)), 1.2, "x"),
    ]  # fmt: skip
    grown = {
        "10 000 rules / 10 rules": ((FEW, MANY_RULES), (FEW, FEW)),
        "100 000 pods / 10 pods": ((MANY_PODS, FEW), (FEW, FEW)),
        "10 000 rules and 100 000 pods / 10 and 10": (big, (FEW, FEW)),
    }
    found += [
        Row(f"{case}, hot: {name}", ratio(cost(case, large), cost(case, small)), 1.1, "x")
        for name, (large, small) in grown.items()
        for case in (ESTABLISHED.format("v4"), denied)
    ]
    for case in (ESTABLISHED, DENIED):
        quotient = ratio(cost(case.format("v6")), cost(case.format("v4")))
        found.append(Row(f"{case.format('IPv6 / IPv4')}", quotient, 1.3, "x"))
    return found
