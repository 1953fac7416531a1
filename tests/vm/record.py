# SPDX-License-Identifier: Apache-2.0
"""The result of one guest run: one JSON document, kept in tests/vm/results when it is recorded.

Invariant: a result says what was run and what was seen; a step that was not run is not in it.  `tests.vm.page` renders it.
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
"""First word of the names of the steps that run tests of the border."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    ``series``: 6.1, 6.12, as the documentation lists kernels.  ``source``: the kernel's package, or "built".  ``expected``:
    RUNS or REFUSED.  ``steps``: by name the exit code, the seconds, and what was kept of the step's document.
    ``failure``: "" or what ended the run before its last step.
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
        """Whether tests of the border were among the steps."""
        return any(name.startswith(f"{BORDER} ") for name in self.steps)

    @property
    def is_ok(self) -> bool:
        """Whether every step of the run ended as it must."""
        return not self.failure and bool(self.steps) and all(step["code"] == 0 for step in self.steps.values())

    @property
    def file_name(self) -> str:
        """The name of the file that has this result. A later run of the same kernel, machine and compiler replaces it.

        A run of the border's tests alone, which takes an hour, has a file of its own.
        """
        parts = (self.series, self.machine, self.compiler) if self.expected == RUNS else (self.series, self.machine)
        if self.has_border and "load" not in self.steps:
            parts = (*parts, BORDER)
        return re.sub(r"[^a-z0-9.+]+", "-", "-".join(parts).lower()).strip("-") + ".json"


def write_result(result: Result, directory: Path = RESULTS) -> Path:
    """Keep a result; the file.

    Tests of the border join those that the same commit ran on this kernel before.
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
    """All results that are kept. Raises InvalidInputError for a file that is none."""
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
    """6.1 of 6.1.0-57-cloud-amd64, 6.12-rt of 6.12.118+deb13-rt-amd64."""
    match = re.match(r"\d+\.\d+", release)
    if match is None:
        raise InvalidInputError(f"{release} is no kernel release")
    return match[0] + ("-rt" if re.search(r"-rt\d*\b", release) else "")


def today() -> str:
    """The date, as results carry it."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def current_commit() -> str:
    """The commit of the repository, marked when something in it is not committed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "bpf", "loader", "netpol_ebpf")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
