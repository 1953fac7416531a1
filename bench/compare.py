# SPDX-License-Identifier: Apache-2.0
"""Compare two results, case by case: same, faster or slower, with a confidence interval.

    .venv/bin/python -m bench.compare OLD.json NEW.json [--threshold 0.10] [-o table|json]

The compared figure is the ratio of a case to its base in the same run, so a machine that is slower by a half is no
regression. The change is that ratio (of medians) in the new run, divided by that in the old run. Its confidence
interval is computed by bootstrap: rounds are drawn again with replacement, the same rounds for a case and its base,
because both were measured in the same rounds.

A case is *slower* or *faster* if the whole interval is beyond the threshold, *same* if the whole interval is within it,
otherwise *unclear*. Exact cases (bytes, rows) are compared without an interval. Three kinds of cases are shown and
never fail: cases without a base, cases that are marked as not judged, and cases with fewer than MIN_ROUNDS samples.

Exit code: 0; 1 if a judged case is slower; 3 if a file is not a result.
"""

from __future__ import annotations

import argparse
import enum
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.end_to_end import ended_by
from bench.record import MORE, Case, Run, load

THRESHOLD = 0.10
"""The smallest change that counts: a tenth. A smaller one should fail nobody's build. The value is arbitrary."""
CONFIDENCE = 0.99
"""Confidence of each interval. There are hundreds of cases: at 95 %, some would be slower by chance in each
comparison."""
RESAMPLES = 2000
MIN_ROUNDS = 5
EXIT_SLOWER = 1


class Change(enum.Enum):
    """The verdict on a case."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "slower"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case in both runs.

    ``change``: the figure of the new run divided by that of the old run; above 1, the new run has more of the case's
    unit. ``low``, ``high``: the confidence interval of ``change``.
    """

    case: str
    change: float
    low: float
    high: float
    verdict: Change
    judged: bool


def compare_runs(old: Run, new: Run, threshold: float = THRESHOLD) -> list[Comparison]:
    """Compare all cases that both runs have, in the order of the new run."""
    found = []
    for case in new.cases:
        before = old.case(case.id)
        if before is not None and before.median and case.median:
            found.append(compare_case(old, before, new, case, threshold))
    return found


def compare_case(old: Run, before: Case, new: Run, case: Case, threshold: float = THRESHOLD) -> Comparison:
    """Compare one case. If more of its unit is better (`Case.better`), more of it counts as faster."""
    if case.exact:
        change = case.median / before.median
        return Comparison(case.id, change, change, change, _verdict(case, change, change, threshold), case.judged)
    bases = (_base(old, before), _base(new, case))
    paired = None not in bases
    rounds = min(len(before.samples), len(case.samples))
    change = _ratio(case, bases[1] if paired else None) / _ratio(before, bases[0] if paired else None)
    chance = random.Random(case.id)  # a fixed seed, so that the same files give the same result
    drawn = sorted(
        _draw(chance, case, bases[1] if paired else None) / _draw(chance, before, bases[0] if paired else None)
        for _ in range(RESAMPLES)
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn[int(tail * RESAMPLES)], drawn[int((1 - tail) * RESAMPLES) - 1]
    judged = case.judged and paired and rounds >= MIN_ROUNDS
    return Comparison(case.id, change, low, high, _verdict(case, low, high, threshold), judged)


def _base(run: Run, case: Case) -> Case | None:
    return run.case(case.base) if case.base else None


def _ratio(case: Case, base: Case | None) -> float:
    top = _not_zero(case.median, case.unit)
    return top / _not_zero(base.median, base.unit) if base is not None else top


def _draw(chance: random.Random, case: Case, base: Case | None) -> float:
    """The ratio of a case to its base in one resample of the rounds."""
    places = [chance.randrange(len(case.samples)) for _ in case.samples]
    top = statistics.median(case.samples[place] for place in places)
    if base is None:
        return _not_zero(top, case.unit)
    bottom = statistics.median(base.samples[place % len(base.samples)] for place in places)
    return _not_zero(top, case.unit) / _not_zero(bottom, base.unit)


def _not_zero(value: float, unit: str) -> float:
    """``value``, but at least 1 ns.

    A difference of two measurements can be zero or negative, and a ratio needs a number above 0.
    """
    return max(value, 1.0 if unit == "ns" else 1e-9)


def _verdict(case: Case, low: float, high: float, threshold: float) -> Change:
    more, less = low > 1 + threshold, high < 1 / (1 + threshold)
    if more or less:
        return Change.FASTER if more == (case.better == MORE) else Change.SLOWER
    if low >= 1 / (1 + threshold) and high <= 1 + threshold:
        return Change.SAME
    return Change.UNCLEAR


def render(comparisons: Sequence[Comparison]) -> str:
    """A table of the cases that changed, followed by the number of cases that did not."""
    lines = []
    for verdict in (Change.SLOWER, Change.FASTER):
        for one in comparisons:
            if one.verdict is verdict:
                mark = "" if one.judged else "  (not judged)"
                lines.append(
                    f"{verdict.value:<8} x{one.change:6.3f}  [{one.low:6.3f}, {one.high:6.3f}]  {one.case}{mark}"
                )
    counts = ", ".join(f"{sum(one.verdict is verdict for one in comparisons)} {verdict.value}" for verdict in Change)
    judged = sum(one.judged for one in comparisons)
    return "\n".join([*lines, f"{len(comparisons)} cases, {judged} of them judged: {counts}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="the smallest change that matters (0.10: a tenth)"
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args(argv)
    old, new = load(options.old), load(options.new)
    comparisons = compare_runs(old, new, options.threshold)
    if options.output == "json":
        fields = ("case", "change", "low", "high", "judged")
        plain = [{name: getattr(one, name) for name in fields} | {"verdict": one.verdict.value} for one in comparisons]
        print(json.dumps(plain, indent=2))
    else:
        print(render(comparisons))
    return EXIT_SLOWER if any(one.judged and one.verdict is Change.SLOWER for one in comparisons) else 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
