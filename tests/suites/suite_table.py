# SPDX-License-Identifier: Apache-2.0
"""Render the results of suites (tests.suites.in_suite) as a table, for a terminal and for docs/versions.md.

    python3 -m tests.suites.suite_table [--record PAGE] RESULT.json...

With --record the table replaces the one between the markers of the page. Rows of suites that were not run stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ORDER = ("bookworm", "trixie", "sid")  # oldest first, as scripts/suites.sh has them
BEGIN, END = "<!-- scripts/suites.sh --record writes from here -->\n", "<!-- to here -->\n"
HEAD = (
    "| suite | run | kernel | Python | BCC | LLVM | pyroute2 | libbpf | verified instructions, largest program "
    "(x86-64 / arm64) | cases, probes | tests passed | failed |\n" + "|---" * 12 + "|\n"
)


def main() -> int:
    """Print the table, and with --record also write it into the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, metavar="PAGE")
    parser.add_argument("results", nargs="+", type=Path)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.results]
    print(HEAD + "".join(map(render_row, results)), end="")
    if arguments.record is not None:
        page = arguments.record.read_text()
        arguments.record.write_text(replace_rows(page, {one["suite"]: render_row(one) for one in results}))
    return 0


def render_row(result: dict[str, Any]) -> str:
    """The row of a suite; "not run" for steps after a failed one."""
    versions = result["versions"]
    verified = [max(programs.items(), key=lambda item: item[1]) for programs in result.get("verified", {}).values()]
    costs = " / ".join(f"{count} ({name})" for name, count in verified)
    cases, tests = result.get("cases"), result.get("tests")
    cells = [
        result["suite"], result["date"], result["kernel"], versions["python"], versions["bcc"], versions["llvm"],
        versions["pyroute2"], versions["libbpf"], costs or "not run",
        f"{cases['cases']}, {cases['probes']}" if cases else "not run",
        f"{tests['passed']} (skipped: {tests['skipped']})" if tests else "not run",
        str(len(result["failed"])),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def replace_rows(page: str, rows: dict[str, str]) -> str:
    """The page with these rows, by suite, in place of its own. Raises ValueError if the page has no markers."""
    before, table, after = page.partition(BEGIN)[0], page.partition(BEGIN)[2].partition(END)[0], page.partition(END)[2]
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no line {BEGIN.strip()} before a line {END.strip()}")
    kept = {line.split("|")[1].strip(): line for line in table.splitlines(keepends=True)[2:]}
    merged = {**kept, **rows}
    return before + BEGIN + HEAD + "".join(merged[suite] for suite in sorted(merged, key=ORDER.index)) + END + after


if __name__ == "__main__":
    sys.exit(main())
