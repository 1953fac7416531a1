# SPDX-License-Identifier: Apache-2.0
"""Run the tests against a real API server and write what it did into docs/kubernetes.md.

KUBE_APISERVER=FILE ETCD=FILE python -m tests.apiserver
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree as ET

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "kubernetes.md"
BEGIN, END = "<!-- Written by `python -m tests.apiserver`; not edited by hand. -->\n", "<!-- end of the run -->\n"


def block(report: Path, date: str, commit: str) -> str:
    """The block of a run, from pytest's report of it."""
    suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314 - written by pytest here
    if suite is None:
        raise ValueError(f"{report}: no test suite in it")
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    counts = Counter(case.get("classname", "").rpartition(".")[2] for case in suite.iter("testcase"))
    lines = [
        f"Kubernetes {properties['kubernetes']} with etcd {properties['etcd']}, {date}, commit {commit}: "
        f"{sum(counts.values())} tests, all passed.",
        "",
        "| tests | number |",
        "|---|---|",
        *(f"| `tests/apiserver/{name}.py` | {number} |" for name, number in sorted(counts.items())),
    ]
    return BEGIN + "\n".join(lines) + "\n" + END


def main() -> int:
    """Run and write; the exit code is pytest's."""
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
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        PAGE.write_text(before + block(report, date, commit) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
