# SPDX-License-Identifier: Apache-2.0
"""Write the summary of the recorded result into docs/performance.md, between two markers.

    .venv/bin/python -m bench.page [--check]

This program writes every figure of that page from bench/results/reference.json, so page and result agree. It must not
measure, and must not leave out a target: a target without its cases in the result is shown as *not measured*. Exit
code: 0, or 1 with ``--check`` if the page is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import pods, targets
from bench.end_to_end import ended_by
from bench.guards import CHECKSUMS, SIGN, WHOLE
from bench.guards import SUITE as GUARDS
from bench.loads import CONNECTS, REQUESTS, UDP_64
from bench.record import ROOT, Case, Run, case_id, load
from bench.report import MICRO, human, percentile, ratio, table
from bench.scale import SUITE as SCALE
from bench.site import EMPTY, NOTHING, OURS, OURS_BARRIER, OURS_CLSACT
from netpol_ebpf.errors import InvalidInputError

RESULT = ROOT / "bench" / "results" / "reference.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results: python -m bench.page -->", "<!-- end of results -->"
GUARDED = ("established, IPv4", "established, IPv6")
LARGE = {"pods": 100_000, "policies": 10_000}
MEGA = 1_000_000
API_TARGETS = (
    ("until in force", 60_000, "ms"), ("policy edit", 50, "ms"), ("policy edit at 120 events a second", 50, "ms"),
    ("processor share at rest", 1, "%"), ("memory at most", 500, "MB"),
)  # fmt: skip


def judged(run: Run) -> list[targets.Row]:
    """All targets of a run: for packets, guards, connections and the control plane."""
    packets = targets.rows(targets.by_size(run.cases, MICRO), targets.by_size(run.cases, SCALE))
    return [*packets, *_guards(run), *_end_to_end(run), *_control_plane(run)]


def _guards(run: Run) -> list[targets.Row]:
    """The nanoseconds that each guard adds to a hot packet of an open connection: the difference of two medians."""

    def median(contender: str, packet: str) -> float | None:
        case = run.case(case_id(GUARDS, packet, contender))
        return None if case is None else case.median

    rows = []
    for packet in GUARDED:
        whole = median(WHOLE, packet)
        for contender, what in ((CHECKSUMS, "check of partial checksums"), (SIGN, "barrier's sign")):
            without = median(contender, packet)
            figure = whole - without if whole is not None and without is not None else None
            rows.append(targets.Row(f"{what}: more for one packet, {packet}", figure, 5, "ns"))
    return rows


def _end_to_end(run: Run) -> list[targets.Row]:
    def median(name: str, contender: str, rules: int | None = None) -> float | None:
        for case in run.cases:
            known = (case.suite, case.name, case.contender) == ("end to end", name, contender)
            if known and case.parameters.get("rules") == rules:
                return case.median
        return None

    rows = []
    for name, base, limit in (
        (UDP_64.name, EMPTY, 1.02),
        (REQUESTS.name, EMPTY, 1.02),
        (CONNECTS.name, NOTHING, 1 / 0.95),
    ):
        bottom = median(name, base)
        for contender, suffix in ((OURS, ""), (OURS_CLSACT, ", by clsact"), (OURS_BARRIER, ", second barrier")):
            for rules in (10, 10_000):
                ours = median(name, contender, rules)
                figure = bottom / ours if bottom is not None and ours else None
                rows.append(
                    targets.Row(f"{name}, {rules} rules{suffix}: time over {base}", figure, round(limit, 3), "x")
                )
    return rows


def _control_plane(run: Run) -> list[targets.Row]:
    def found(name: str, size: Mapping[str, int] = LARGE) -> Case | None:
        for case in run.cases:
            same_size = all(case.parameters.get(key) == value for key, value in size.items())
            if case.suite == "control plane" and case.name == name and same_size:
                return case
        return None

    wanted = (("cold start", 30_000, "ms"), ("pod added elsewhere", 5, "ms"), ("policy changed", 100, "ms"),
              ("memory at most", 400, "MB"))  # fmt: skip
    rows = []
    for name, limit, unit in wanted:
        case = found(name)
        figure = None
        if case is not None:
            figure = case.median / MEGA if unit == "MB" else percentile(case.samples, 0.99)
        rows.append(targets.Row(f"{name}{', p99' if name in ('pod added elsewhere', 'policy changed') else ''}, "
                                "100 000 pods, 10 000 policies", figure, limit, unit))  # fmt: skip
    for size, where in (({"pods": 10_000, "policies": 1000}, "10 000 pods"), (LARGE, "100 000 pods, 10 000 policies")):
        for name, limit, unit in API_TARGETS:
            case = found(f"API server: {name}", size)
            figure = None
            if case is not None:
                figure = case.median / MEGA if unit == "MB" else percentile(case.samples, 0.99)
            most = ", p99" if name.startswith("policy edit") else ""
            rows.append(targets.Row(f"agent at an API server: {name}{most}, {where}", figure, limit, unit))
    for name, label, limit in ((pods.UNTIL, f"{pods.UNTIL}, p99", 100), (pods.COST, pods.COST, 20)):
        case = found(name, {"pods": pods.PODS})
        figure = None if case is None else percentile(case.samples, 0.99)
        rows.append(targets.Row(f"{label}, {pods.PODS} pods on the node", figure, limit, "ms"))
    return rows


def earlier_results(directory: Path = RESULT.parent) -> list[Run]:
    """The kept results of earlier commits, the oldest first: the files MACHINE-COMMIT.json."""
    return sorted((load(path) for path in directory.glob("*-*.json")), key=lambda one: one.started)


def render(run: Run, earlier: Sequence[Run] = ()) -> str:
    """The section of the page: the origin of the figures, targets beside results, contenders.

    ``earlier``: earlier results, with their figures beside those of ``run`` in the table of targets.
    """
    machine = run.machine
    dirty = " with uncommitted changes" if run.source.get("dirty") else ""
    lines = [
        f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, load before {machine['load_before']}; "
        f"commit `{run.source.get('commit')}`{dirty}, {run.started}, made by `{run.command}`.",
        "",
        *(f"- {note}" for note in run.notes),
        *([""] if run.notes else []),
    ]
    before = [{row.name: row for row in judged(one)} for one in earlier]
    rows = [
        (row.name, f"at most {row.limit:g} {row.unit}", _figure(row),
         f"**{row.verdict}**" if row.verdict == targets.MISSED else row.verdict, *(_figure(one.get(row.name)) for one in before))
        for row in judged(run)
    ]  # fmt: skip
    lines += table(("target", "limit", "measured", "", *map(_origin, earlier)), rows)
    for name in (UDP_64.name, REQUESTS.name, CONNECTS.name):
        cases = [case for case in run.cases if case.suite == "end to end" and case.name == name]
        shown = [
            (case.contender, str(case.parameters.get("rules", "")), human(case.median, case.unit), ratio(run, case))
            for case in cases
        ]
        if shown:
            lines += [f"{name.capitalize()}:", "", *table(("contender", "rules", "median", f"over {NOTHING}"), shown)]
    return "\n".join(lines).rstrip()


def _figure(row: targets.Row | None) -> str:
    return "-" if row is None or row.figure is None else f"{row.figure:.3g} {row.unit}"


def _origin(run: Run) -> str:
    """The machine and the commit of a result, as the head of a column."""
    return f"{run.machine['cpu']}, `{run.source['commit'][:7]}`"


def with_section(page: str, section: str) -> str:
    """The page with a new section between its markers. Raises InvalidInputError if the page has no markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InvalidInputError(f"{PAGE}: has no markers for the results: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the section. With ``--check``, only report whether the page is fresh."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is stale")
    parser.add_argument("--result", type=Path, default=RESULT, help="another result")
    options = parser.parse_args(argv)
    section = (
        render(load(options.result), earlier_results())
        if options.result.exists()
        else "No reference result is recorded yet."
    )
    page = PAGE.read_text(encoding="utf-8")
    fresh = with_section(page, section)
    if options.check and page != fresh:
        print(f"{PAGE.relative_to(ROOT)} is stale: run python -m bench.page", file=sys.stderr)
        return 1
    if not options.check:
        PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
