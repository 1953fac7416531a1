# SPDX-License-Identifier: Apache-2.0
"""The result of one guest run, as one JSON document. Recorded results are in tests/vm/results.

Invariant: a result states what was run and what was observed. A step that was not run is not in it. `tests.vm.page`
renders it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import InvalidInputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "vm" / "results"
FORMAT = 1
RUNS, REFUSED = "runs", "refused"
BORDER = "border"
"""The first word in the names of the steps that run tests of the border."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run.

    ``series``: such as 6.1 or 6.12, as the documentation lists kernels. ``source``: the kernel's package, or "built".
    ``expected``: RUNS or REFUSED. ``steps``: by name, the exit code, the seconds, and the kept part of the step's
    document. ``failure``: the event that ended the run before its last step; "" if it did not end early.
    """

    series: str
    release: str
    source: str
    machine: str
    compiler: str
    expected: str
    date: str
    commit: str
    seconds: float
    steps: Mapping[str, Mapping[str, Any]]
    failure: str = ""

    @property
    def has_border(self) -> bool:
        """Whether the run had steps with tests of the border."""
        return any(name.startswith(f"{BORDER} ") for name in self.steps)

    @property
    def is_ok(self) -> bool:
        """Whether every step of the run ended as required."""
        return not self.failure and bool(self.steps) and all(step["code"] == 0 for step in self.steps.values())

    @property
    def file_name(self) -> str:
        """The name of the result's file. A later run of the same kernel, machine and compiler replaces the file.

        A run with only the tests of the border, which takes an hour, has a file of its own.
        """
        parts = (self.series, self.machine, self.compiler) if self.expected == RUNS else (self.series, self.machine)
        if self.has_border and "load" not in self.steps:
            parts = (*parts, BORDER)
        return re.sub(r"[^a-z0-9.+]+", "-", "-".join(parts).lower()).strip("-") + ".json"


def write_result(result: Result, directory: Path = RESULTS) -> Path:
    """Write a result. Returns the file.

    Tests of the border are merged with those that the same commit ran on this kernel before.
    """
    directory.mkdir(exist_ok=True)
    path = directory / result.file_name
    if path.stem.endswith(BORDER) and path.exists():
        (earlier,) = [one for one in read_results(directory) if one.file_name == path.name]
        if earlier.commit == result.commit:
            result = dataclasses.replace(result, steps={**earlier.steps, **result.steps})
    document = {"format": FORMAT, **dataclasses.asdict(result)}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_results(directory: Path = RESULTS) -> list[Result]:
    """All recorded results. Raises InvalidInputError if a file is not a result."""
    found = []
    for path in sorted(directory.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format", None) != FORMAT:
            raise InvalidInputError(f"{path}: is no result of format {FORMAT}")
        try:
            found.append(Result(**document))
        except TypeError as error:
            raise InvalidInputError(f"{path}: {error}") from error
    return found


def series_of(release: str) -> str:
    """The series of a release: 6.1 for 6.1.0-57-cloud-amd64, 6.12-rt for 6.12.118+deb13-rt-amd64."""
    match = re.match(r"\d+\.\d+", release)
    if match is None:
        raise InvalidInputError(f"{release} is no kernel release")
    return match[0] + ("-rt" if re.search(r"-rt\d*\b", release) else "")


def today() -> str:
    """The date, in the form that results have."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def current_commit() -> str:
    """The commit of the repository, with a mark if there are uncommitted changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "bpf", "loader", "netpol_ebpf")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
