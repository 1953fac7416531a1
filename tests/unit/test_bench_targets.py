# SPDX-License-Identifier: Apache-2.0
"""The packet path's targets: judged by medians, missed if over the limit, and never left out."""

from __future__ import annotations

from pathlib import Path

from bench import targets
from bench.record import Case, Run
from bench.report import Report
from bench.targets import MISSED, Row, rows

BIG, SMALL = (100_000, 10_000), (10, 10)
FIGURES = {
    "established, v4": [14.0, 90.0, 22.0],
    targets.PARSE_ONLY: [10.0],
    "established, v6": [30.0, 30.0, 30.0],
    targets.RANDOM_ESTABLISHED: [300.0],
    targets.BARE_LOOKUP: [250.0],
    "SYN denied, v4": [100.0],
}


def by_name(found: list[Row]) -> dict[str, str]:
    return {row.name: row.verdict for row in found}


def test_a_limit_is_met_up_to_itself() -> None:
    """The median of the rounds counts, so one bad round does not miss the target."""
    verdicts = by_name(rows({BIG: FIGURES}))
    assert verdicts["established, one hot flow / parsing it"] == "met"
    assert verdicts["new flow denied, hot, with its event / parsing it"] == "met"
    assert verdicts["established, 64k flows at random / bare LRU lookup"] == MISSED
    assert verdicts["established, IPv6 / IPv4"] == MISSED


def test_what_was_not_measured_is_said() -> None:
    """No row is left out, and none without a figure is met."""
    nothing = rows({})
    assert {row.verdict for row in nothing} == {"not measured"}
    assert [row.name for row in nothing] == [row.name for row in rows({BIG: FIGURES})]


def test_growth_is_over_the_small_size() -> None:
    """The growth is the ratio of the same case at both sizes."""
    found = {row.name: row for row in rows({BIG: FIGURES, SMALL: {"SYN denied, v4": [50.0]}})}
    grown = found["SYN denied, v4, hot: 10 000 rules and 100 000 pods / 10 and 10"]
    assert (grown.figure, grown.verdict) == (2.0, MISSED)


def test_growth_is_judged_by_sizes_that_took_turns() -> None:
    """If there are such measurements, they count; otherwise those of sizes that were measured one after the other."""
    apart = {BIG: FIGURES, SMALL: {"SYN denied, v4": [50.0], "established, v4": [11.0]}}
    in_turns = {BIG: {targets.GROWN_DENIED: [51.0, 52.0]}, SMALL: {targets.GROWN_DENIED: [50.0, 50.0]}}
    found = {row.name: row for row in rows(apart, in_turns)}
    what = "hot: 10 000 rules and 100 000 pods / 10 and 10"
    assert (found[f"SYN denied, v4, {what}"].figure, found[f"SYN denied, v4, {what}"].verdict) == (1.03, "met")
    assert found[f"established, v4, {what}"].figure == 2.0


def test_the_report_marks_a_missed_target(tmp_path: Path) -> None:
    """It is bold, beside its limit."""
    machine = {
        "cpu": "c",
        "cpus": 1,
        "virtual": False,
        "memory_bytes": 1,
        "architecture": "a",
        "kernel": "k",
        "python": "3",
    }
    run = Run("command", {**machine, "load_before": 0}, {"commit": "c"}, {}, "now")
    size = {"pods": BIG[0], "rules": BIG[1], "cidrs": 10_000}
    for name, samples in FIGURES.items():
        run.cases.append(Case("micro", name, "netpol-ebpf", "ns", "less", tuple(samples), size))
    run.cases.append(Case("micro", "verified instructions, p", "netpol-ebpf", "instructions", "less", (7.0,)))
    text = Report(run, tmp_path).build()
    assert "| established, 64k flows at random / bare LRU lookup | at most 1 x | 1.2 x | **missed** |" in text
    assert "| established, one hot flow / parsing it | at most 2.2 x | 2.2 x | met |" in text
    assert "| verified instructions, p | 7 |" in text
