# SPDX-License-Identifier: Apache-2.0
"""The steps of a guest run on the machine where this is started: for kernels that the harness does not boot, such as arm64's.

    python -m tests.vm.alone > REPORT                  there, as root, with the compiled file in place
    python -m tests.vm.alone --record REPORT           here; ``--source TEXT`` says where the kernel comes from

Needs no compiler there, nor any package but what the agent needs.  NETPOL_TIMEOUT_FACTOR stretches time limits.  A report is one
JSON document a line; other lines, such as those of a console, are passed over.
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
"""All but the one that needs the tree of an older version."""
MARK = "netpol-vm-step "
TIMEOUT_S = 3600.0


def run() -> int:
    """Run the steps and print a line for each; 0 when all exit codes are."""
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
    """The records of a report, whatever else the console printed."""
    return [json.loads(line[line.index(MARK) + len(MARK) :]) for line in text.splitlines() if MARK in line]


def to_result(records: list[dict[str, Any]], source: str) -> Result:
    """The result that is kept. Raises SystemExit for a report of other sources, or one that lacks a step."""
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
    """Run, or record a report."""
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
