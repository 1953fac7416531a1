# SPDX-License-Identifier: Apache-2.0
"""Run the tests against a real API server and write what it did into docs/kubernetes.md.

KUBE_APISERVER=FILE ETCD=FILE python -m tests.apiserver
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree as ET

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "kubernetes.md"
BEGIN, END = "<!-- Written by `python -m tests.apiserver`; not edited by hand. -->\n", "<!-- end of the runs -->\n"
HEAD = "| Kubernetes | etcd | passed | not run | date | commit |\n|---|---|---|---|---|---|\n"


def row(report: Path, date: str, commit: str) -> str:
    """The row of a run, made from pytest's report. Tests of features that the server lacks count as not run."""
    suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314 - written by pytest here
    if suite is None:
        raise ValueError(f"{report}: no test suite in it")
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    cases = len(list(suite.iter("testcase")))
    skipped = len(list(suite.iter("skipped")))
    cells = (properties["kubernetes"], properties["etcd"], cases - skipped, skipped, date, commit)
    return f"| {' | '.join(map(str, cells))} |\n"


def with_row(text: str, new: str) -> str:
    """The page with the row of a run in place of the row of the same version."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {line.split("|")[1]: line for line in table.removeprefix(HEAD).splitlines(keepends=True)}
    rows[new.split("|")[1]] = new
    return before + BEGIN + HEAD + "".join(rows[key] for key in sorted(rows)) + END + after


def main() -> int:
    """Run the tests and write the page. Returns pytest's exit code."""
    missing = [name for name in ("KUBE_APISERVER", "ETCD") if not os.environ.get(name)]
    if missing:
        print(f"error: name the program with {' and '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(HERE), f"--junit-xml={report}"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code != 0:
            return code
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_row(text, row(report, date, commit)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
