# SPDX-License-Identifier: Apache-2.0
"""Run the steps of a guest on another machine, for kernels that the harness does not boot, such as those of arm64.

    python -m tests.vm.alone > REPORT                  on that machine, as root, with the compiled file installed
    python -m tests.vm.alone --record REPORT           on this machine; ``--source TEXT``: where the kernel comes from

The other machine needs no compiler, and only the packages that the agent needs. NETPOL_TIMEOUT_FACTOR multiplies time
limits. A report has one JSON document in each line; other lines, such as those of a console, are ignored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from netpol_loader.pins import compilation
from netpol_loader.pins.build import compiled_program
from tests.vm.record import RUNS, Result, current_commit, series_of, today, write_result
from tests.vm.steps import all_steps, choose_steps, read_document

STEPS = ("system", "load", "cases", "demo")
"""All steps except the one that needs the source of an older version."""
MARK = "netpol-vm-step "
TIMEOUT_S = 3600.0


def run() -> int:
    """Run the steps and print a line for each. Returns 0 if all exit codes are 0."""
    codes = []
    for step in choose_steps(all_steps(Path("/nonexistent")), STEPS):
        program = f"import sys; from tests.vm import inside; sys.exit(inside.{step.call}(*{step.arguments!r}))"
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        record = {"step": step.name, "code": done.returncode, "seconds": round(time.monotonic() - began, 1)}
        record |= {"output": done.stdout, "errors": done.stderr[-2000:]}
        if step.name == "system":
            record["compiler"] = compiled_program(keep=False).compiler
            record["digest"] = compilation.source_digest(compilation.source_dir()).hex()
        print(MARK + json.dumps(record), flush=True)
        codes.append(done.returncode)
    return 0 if not any(codes) else 1


def read_report(text: str) -> list[dict[str, Any]]:
    """The records of a report. Other lines of the console are ignored."""
    return [json.loads(line[line.index(MARK) + len(MARK) :]) for line in text.splitlines() if MARK in line]


def to_result(records: list[dict[str, Any]], source: str) -> Result:
    """The result to record. Raises SystemExit if the report is of other sources, or lacks a step."""
    by_name = {record["step"]: record for record in records}
    missing = [name for name in STEPS if name not in by_name]
    if missing:
        raise SystemExit(f"the report lacks {', '.join(missing)}")
    machine = json.loads(by_name["system"]["output"])["machine"]
    ours = compilation.source_digest(compilation.source_dir(), machine=machine).hex()
    if by_name["system"]["digest"] != ours:
        raise SystemExit("the report is of other C sources than those of this tree")
    steps = {}
    for step in choose_steps(all_steps(Path("/nonexistent")), STEPS):
        record = by_name[step.name]
        document = read_document(record["output"])
        code = record["code"] or (1 if document is None else 0)
        steps[step.name] = {"code": code, "seconds": record["seconds"], "cpu_s": record["seconds"]}
        steps[step.name] |= {"said": record["errors"]} if code else {"result": step.keep(document)}
    system = steps["system"]["result"]
    return Result(
        series=series_of(system["release"]), release=system["release"], source=source, machine=machine,
        compiler=by_name["system"]["compiler"], expected=RUNS, date=today(), commit=current_commit(),
        seconds=round(sum(record["seconds"] for record in records), 1), steps=steps, failure="",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the steps, or record a report."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.alone", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="REPORT")
    parser.add_argument("--source", default="not said", metavar="TEXT", help="where the kernel comes from")
    options = parser.parse_args(argv)
    if options.record is None:
        return run()
    result = to_result(read_report(options.record.read_text(errors="replace")), options.source)
    print(write_result(result))
    return 0 if result.is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
