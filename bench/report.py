# SPDX-License-Identifier: Apache-2.0
"""Render a result as Markdown for a reader, with plots if matplotlib is installed.

    .venv/bin/python -m bench.report RESULT.json [-o DIRECTORY]

The report is DIRECTORY/README.md, with the plots as SVG files beside it. Every figure is a median over the rounds; the
brackets have the smallest and the largest round. The report must have every case: the last table has the cases that no
other table has.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import scale, targets
from bench.end_to_end import SUITE as END_TO_END
from bench.end_to_end import ended_by
from bench.loads import CONNECTS, LOADS
from bench.record import Case, Run, load
from bench.site import NOTHING

CONTROL_PLANE = "control plane"
MICRO = "micro"
UNITS: Mapping[str, tuple[tuple[float, str], ...]] = {
    "bit/s": ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1, "bit/s")),
    "bytes": ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")),
    "ms": ((1e3, "s"), (1, "ms"), (1e-3, "µs")),
    "1/s": ((1e3, "k/s"), (1, "/s")),
}
UNIT_OF_AXIS = {
    "rules": "rule",
    "pods": "pod",
    "cidrs": "CIDR",
    "sets": "policy set",
    "services": "service",
    "flows": "flow",
}


def human(value: float, unit: str) -> str:
    """A figure with three digits and a fitting unit."""
    for factor, name in UNITS.get(unit, ()):
        if abs(value) >= factor:
            return f"{_digits(value / factor)} {name}"
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(samples: Sequence[float], share: float) -> float:
    """A percentile: the sample at the position ``share`` (from 0 to 1) in the order of the samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratio(run: Run, case: Case) -> str:
    """The ratio of a case to its base: that of the medians, and the range over the rounds."""
    base = run.case(case.base) if case.base else None
    if base is None or base.median <= 0:
        return "1" if not case.base else "-"
    each = [top / bottom for top, bottom in zip(case.samples, base.samples, strict=False) if bottom > 0]
    spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
    return f"{case.median / base.median:.2f}{spread}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, followed by an empty line."""
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


class Report:
    """Builds the text, and records which cases it has shown."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run = run
        self.directory = directory
        self.lines: list[str] = []
        self._shown: set[str] = set()
        self.plots = importlib.util.find_spec("matplotlib") is not None

    def build(self) -> str:
        """Build the whole document."""
        self._head()
        self._micro()
        self._end_to_end()
        self._scale()
        self._control_plane()
        self._rest()
        return "\n".join(self.lines).rstrip() + "\n"

    def _cases(self, suite: str, name: str | None = None) -> list[Case]:
        found = [case for case in self.run.cases if case.suite == suite and name in (None, case.name)]
        self._shown |= {case.id for case in found}
        return found

    def _add(self, *lines: str) -> None:
        self.lines += lines

    def _head(self) -> None:
        run, machine = self.run, self.run.machine
        dirty = " with uncommitted changes" if run.source.get("dirty") else ""
        kind = "virtual" if machine["virtual"] else "physical"
        self._add(
            "# Benchmark result",
            "",
            f"{machine['cpu']}, {machine['cpus']} CPUs ({kind}), {human(machine['memory_bytes'], 'bytes')}, "
            f"{machine['architecture']}, Linux {machine['kernel']}, Python {machine['python']}, load before: "
            f"{machine['load_before']}.",
            "",
            f"Commit `{run.source.get('commit')}`{dirty}, {run.started}, {run.seconds:.0f} s, made by `{run.command}`.",
            "",
            "Medians over the rounds; in brackets the smallest and the largest round.",
            "",
        )
        if run.notes:
            self._add(*(f"- {note}" for note in run.notes), "")
        if run.tools:
            self._add("Tools: " + "; ".join(f"{name}: {text}" for name, text in run.tools.items()) + ".", "")

    # --- packets ------------------------------------------------------------------------------------------------------

    def _micro(self) -> None:
        cases = self._cases(MICRO)
        if not cases:
            return
        counts = [case for case in cases if case.unit != "ns"]
        cases = [case for case in cases if case.unit == "ns"]
        columns = list(dict.fromkeys(_parameters(case) for case in cases))
        names = list(dict.fromkeys(case.name for case in cases))
        found = {(case.name, _parameters(case)): case for case in cases}
        self._add(
            "## One packet, nanoseconds", "", "Over an empty program, except for the empty programs themselves.", ""
        )
        rows = [
            [name, *(_digits(found[(name, one)].median) if (name, one) in found else "" for one in columns)]
            for name in names
        ]
        self._add(*table(["case", *columns], rows))
        self._targets()
        if counts:
            rows = [[case.name, f"{case.median:.0f}"] for case in counts]
            self._add("What the verifier went through, over all paths:", "", *table(["program", "instructions"], rows))

    def _targets(self) -> None:
        micro, grown = (targets.by_size(self.run.cases, suite) for suite in (MICRO, scale.SUITE))
        rows = [
            [
                row.name,
                f"at most {row.limit:g} {row.unit}",
                "-" if row.figure is None else f"{_digits(row.figure)} {row.unit}",
                f"**{row.verdict}**" if row.verdict == targets.MISSED else row.verdict,
            ]
            for row in targets.rows(micro, grown)
        ]
        self._add("### Targets", "", *table(["target", "limit", "measured", ""], rows))

    def _end_to_end(self) -> None:
        if not any(case.suite == END_TO_END for case in self.run.cases):
            return
        self._add("## End to end", "", f"Ratios are to *{NOTHING}* in the same rounds.", "")
        for one in LOADS:
            main = self._cases(END_TO_END, one.name)
            if not main:
                continue
            extra = [
                name
                for name in dict.fromkeys(case.name for case in self.run.cases if case.suite == END_TO_END)
                if name.startswith(f"{one.name}: ")
            ]
            columns = {name: {_who(case): case for case in self._cases(END_TO_END, name)} for name in extra}
            self._add(f"### {one.name.capitalize()}", "")
            heads = ["contender", "median", "ratio", *(name.removeprefix(f"{one.name}: ") for name in extra)]
            rows = []
            for case in main:
                row = [_who(case), human(case.median, case.unit), ratio(self.run, case)]
                rows.append([*row, *(_human_or_blank(columns[name].get(_who(case))) for name in extra)])
            self._add(*table(heads, rows))
        self._plot("connect-close", "Connections opened and closed", self._draw_connects)

    def _draw_connects(self, axes: Any) -> None:
        cases = [case for case in self.run.cases if case.suite == END_TO_END and case.name == CONNECTS.name]
        base = next(case for case in cases if case.contender == NOTHING)
        kinds = list(dict.fromkeys(case.contender for case in cases if "rules" in case.parameters))
        for kind in kinds:
            points = sorted((int(case.parameters["rules"]), case.median) for case in cases if case.contender == kind)
            axes.plot([x for x, _ in points], [y / base.median for _, y in points], marker="o", label=kind)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="rules", ylabel=f"rate, over {NOTHING}", ylim=(0, None))

    # --- growth -------------------------------------------------------------------------------------------------------

    def _scale(self) -> None:
        cases = self._cases(scale.SUITE)
        if not cases:
            return
        self._add(
            "## How it grows",
            "",
            "One thing made larger at a time. Ratios are to the smallest of the row's own axis.",
            "",
        )
        timed = [case for case in cases if case.unit == "ns" and len(case.parameters) == 1]
        self._growth(timed)
        if sizes := [case for case in cases if len(case.parameters) > 1]:
            self._add("Pods and rules together, over the first row:", "")
            self._growth(sizes)
        points = list(dict.fromkeys(_parameters(case) for case in timed))
        self._memory(cases, points, {(case.name, _parameters(case)): case for case in cases})
        axes_seen = list(dict.fromkeys(next(iter(case.parameters)) for case in timed))
        for axis in axes_seen:
            self._plot(f"scale-{axis}", f"Cost by number of {axis}", functools.partial(self._draw_axis, axis=axis))

    def _growth(self, cases: Sequence[Case]) -> None:
        names = list(dict.fromkeys(case.name for case in cases))
        found = {(case.name, _parameters(case)): case for case in cases}
        rows = [
            [
                point,
                *(
                    f"{_digits(found[(name, point)].median)} ns, {_plain_ratio(self.run, found[(name, point)])}"
                    for name in names
                ),
            ]
            for point in dict.fromkeys(_parameters(case) for case in cases)
        ]
        self._add(*table(["", *names], rows))

    def _memory(self, cases: Sequence[Case], points: Sequence[str], found: Mapping[tuple[str, str], Case]) -> None:
        names = list(dict.fromkeys(case.name for case in cases if case.unit == "bytes"))
        rows = [[point, *(human(found[(name, point)].median, "bytes") for name in names)] for point in points]
        self._add("### Memory of the maps", "", *table(["", *names], rows))
        rows = []
        for axis, unit in UNIT_OF_AXIS.items():
            for name in names:
                line = sorted(
                    (int(case.parameters[axis]), case.median)
                    for case in cases
                    if case.name == name and axis in case.parameters
                )
                if len(line) > 1:
                    (least, small), (most, large) = line[0], line[-1]
                    rows.append([unit, name, f"{(large - small) / (most - least):.0f} B"])
        self._add(
            "Bytes for one more, between the smallest and the largest point:",
            "",
            *table(["one more", "of", "bytes"], rows),
        )

    def _draw_axis(self, axes: Any, *, axis: str) -> None:
        cases = [
            case
            for case in self.run.cases
            if case.suite == scale.SUITE and case.unit == "ns" and list(case.parameters) == [axis]
        ]
        for name in dict.fromkeys(case.name for case in cases):
            points = sorted((int(case.parameters[axis]), case.median) for case in cases if case.name == name)
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.set(xscale="log", xlabel=axis, ylabel="ns over an empty program", ylim=(0, None))

    # --- the control plane --------------------------------------------------------------------------------------------

    def _control_plane(self) -> None:
        cases = self._cases(CONTROL_PLANE)
        if not cases:
            return
        sizes = list(dict.fromkeys(_parameters(case) for case in cases))
        found = {(case.name, _parameters(case)): case for case in cases}
        names = list(dict.fromkeys(case.name for case in cases if not case.name.startswith("yardstick")))
        self._add(
            "## Control plane",
            "",
            "From the object to the last write to a map. Single changes: p50 / p99 of all events.",
            "",
        )
        rows = []
        for name in names:
            cells = []
            for size in sizes:
                case = found.get((name, size))
                cells.append(_distribution(case) if case is not None else "")
            rows.append([name, *cells])
        self._add(*table(["", *sizes], rows))

    def _rest(self) -> None:
        rest = [case for case in self.run.cases if case.id not in self._shown]
        if rest:
            self._add("## Everything else", "")
            self._add(
                *table(
                    ["case", "median", "ratio"],
                    [[one.id, human(one.median, one.unit), ratio(self.run, one)] for one in rest],
                )
            )

    # --- plots --------------------------------------------------------------------------------------------------------

    def _plot(self, name: str, title: str, draw: Callable[[Any], None]) -> None:
        if not self.plots:
            return
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        # Text stays text, and ids inside the file are the same each time, so that a new result changes few lines.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "netpol", "font.size": 9}):
            figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
            draw(axes)
            axes.set_title(title)
            axes.grid(visible=True, linewidth=0.3)
            axes.legend(fontsize=7)
            figure.savefig(self.directory / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        self._add(f"![{title}]({name}.svg)", "")


def _parameters(case: Case) -> str:
    return ", ".join(f"{value} {name}" for name, value in case.parameters.items())


def _who(case: Case) -> str:
    return f"{case.contender}, {_parameters(case)}" if case.parameters else case.contender


def _human_or_blank(case: Case | None) -> str:
    return human(case.median, case.unit) if case is not None else ""


def _plain_ratio(run: Run, case: Case) -> str:
    base = run.case(case.base) if case.base else None
    if base is None:
        return "1"
    return f"{case.median / base.median:.2f}" if base.median > 0 else "-"


def _distribution(case: Case) -> str:
    if len(case.samples) == 1 or case.unit != "ms":
        return human(case.median, case.unit)
    return f"{human(case.median, case.unit)} / {human(percentile(case.samples, 0.99), case.unit)}"


def write(run: Run, directory: Path) -> Path:
    """Write the report. Returns the path of its text."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "README.md"
    path.write_text(Report(run, directory).build(), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="directory; default: beside the result, with its name")
    options = parser.parse_args(argv)
    report = Report(load(options.result), options.output or options.result.with_suffix(""))
    report.directory.mkdir(parents=True, exist_ok=True)
    (report.directory / "README.md").write_text(report.build(), encoding="utf-8")
    if not report.plots:
        print("without plots: matplotlib is not installed (pip install 'netpol-ebpf[bench]')", file=sys.stderr)
    print(report.directory / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
