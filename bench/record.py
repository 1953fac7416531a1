# SPDX-License-Identifier: Apache-2.0
"""The one format of a benchmark's results: which machine, which source, which cases, and every sample.

Invariant: samples are kept as they were measured, in the order of the rounds, so that whoever doubts a median can look
at what it stands for; a case names the case it must be divided by (its base), measured in the same rounds of the same
run.  Must not judge: `bench/compare.py` does, and `bench/report.py` draws.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from netpol_ebpf.errors import InvalidInputError

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent
Parameter = Union[int, str]

MORE, LESS = "more", "less"
"""The two values that say which direction is better for a case's unit."""

TOOLS: Mapping[str, Sequence[str]] = {
    "iperf3": ("iperf3", "--version"),
    "sockperf": ("sockperf", "--version"),
    "nft": ("nft", "--version"),
    "iptables": ("iptables", "--version"),
    "ipset": ("ipset", "--version"),
    "gcc": ("gcc", "--version"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One thing measured under one condition.

    ``samples``: one figure a round, in ``unit``.  ``better``: MORE or LESS.  ``base``: `id` of the case of the same run that
    it is divided by, round by round; "" where nothing comparable was measured beside it.  ``exact``: a count that does not
    depend on the weather, such as bytes: compared without a base.  ``judged``: whether a regression of its ratio is one; not so for
    figures that are kept for the reader and swing too much, such as the highest percentiles.
    """

    suite: str
    name: str
    contender: str
    unit: str
    better: str
    samples: tuple[float, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: str = ""
    exact: bool = False
    judged: bool = True

    @property
    def id(self) -> str:
        """The name of the case, within a run and across runs."""
        return case_id(self.suite, self.name, self.contender, self.parameters)

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)


def case_id(suite: str, name: str, contender: str, parameters: Mapping[str, Parameter] | None = None) -> str:
    """``suite/name/contender`` and the parameters in the order of their names."""
    written = ",".join(f"{key}={value}" for key, value in sorted((parameters or {}).items()))
    return "/".join(part for part in (suite, name, contender, written) if part)


@dataclass(slots=True)
class Run:
    """A whole run. ``notes``: what was left out and why, or anything a reader must know to believe the figures."""

    command: str
    machine: Mapping[str, Any]
    source: Mapping[str, Any]
    tools: Mapping[str, str]
    started: str
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def case(self, wanted: str) -> Case | None:
        """The case of that id."""
        return next((case for case in self.cases if case.id == wanted), None)


def begin(command: Sequence[str]) -> Run:
    """A run that starts now, on this machine, from this source."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Run(" ".join(command), describe_machine(), describe_source(), describe_tools(), started)


def this_command() -> list[str]:
    """The command line of this process, relative to the source's root."""
    program = Path(sys.argv[0]).resolve()
    shown = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    return [str(shown), *sys.argv[1:]]


def save(run: Run, path: Path) -> None:
    """Write a run as JSON, whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(to_plain(run), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def to_plain(run: Run) -> dict[str, Any]:
    """A run as what JSON can say. Samples are rounded to six significant digits."""
    plain: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(run)}
    for case in plain["cases"]:
        case["samples"] = [float(f"{sample:.6g}") for sample in case["samples"]]
    return plain


def load(path: Path) -> Run:
    """Read a run. Raises InvalidInputError for a file that is none."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: cannot be read as a benchmark's result: {error}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        seen = plain.get("format") if isinstance(plain, dict) else None
        raise InvalidInputError(f"{path}: is of format {seen}, this program reads format {FORMAT}")
    del plain["format"]
    cases = [Case(**{**case, "samples": tuple(case["samples"])}) for case in plain.pop("cases")]
    return Run(**plain, cases=cases)


def merge(into: Run, parts: Iterable[Run]) -> None:
    """Take over the cases and notes of runs on the same machine from the same source."""
    for part in parts:
        into.cases += part.cases
        into.notes += part.notes


# --- what is measured on ----------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Processor, memory, kernel, and how busy it was when the run began."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "virtual": _virtual(),
        "jit": _read(Path("/proc/sys/net/core/bpf_jit_enable")),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _virtual() -> bool:
    words = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    return "hypervisor" in words


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip() if path.exists() else "unknown"


def describe_source() -> dict[str, Any]:
    """Commit, and whether files differ from it. Outside a checkout: unknown."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return {"commit": "unknown", "dirty": None}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def describe_tools() -> dict[str, str]:
    """First line of what each tool says of its version; tools that are missing are left out."""
    found = {}
    for name, command in TOOLS.items():
        if shutil.which(command[0]) is not None:
            done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            found[name] = lines[0].strip() if lines else "unknown"
    return found
