# SPDX-License-Identifier: Apache-2.0
"""The format of a benchmark's result: the machine, the source, the cases, and every sample.

Invariant: samples are kept as they were measured, in the order of the rounds, so that a reader who doubts a median can
see its samples. A case names the case by which it must be divided (its base), which was measured in the same rounds of
the same run. This module must not judge: `bench/compare.py` does, and `bench/report.py` draws.
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
"""The two directions: which values of a case's unit are better."""

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

    ``samples``: one figure for each round, in ``unit``. ``better``: MORE or LESS. ``base``: the `id` of the case of the
    same run by which this case is divided, round by round; "" if nothing comparable was measured with it. ``exact``:
    the figure is a count that other load cannot change, such as bytes; it is compared without a base. ``judged``:
    whether a worse ratio counts as a regression. It is False for figures that vary too much, such as the highest
    percentiles, and are kept only for the reader.
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
        """The name of the case, the same in all runs."""
        return case_id(self.suite, self.name, self.contender, self.parameters)

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)


def case_id(suite: str, name: str, contender: str, parameters: Mapping[str, Parameter] | None = None) -> str:
    """``suite/name/contender``, followed by the parameters in the order of their names."""
    written = ",".join(f"{key}={value}" for key, value in sorted((parameters or {}).items()))
    return "/".join(part for part in (suite, name, contender, written) if part)


@dataclass(slots=True)
class Run:
    """The result of a whole run. ``notes``: what was left out and why, and other facts that a reader must know."""

    command: str
    machine: Mapping[str, Any]
    source: Mapping[str, Any]
    tools: Mapping[str, str]
    started: str
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def case(self, wanted: str) -> Case | None:
        """The case with this id; None if the run has none."""
        return next((case for case in self.cases if case.id == wanted), None)


def begin(command: Sequence[str]) -> Run:
    """A run that starts now, on this machine, from this source."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Run(" ".join(command), describe_machine(), describe_source(), describe_tools(), started)


def this_command() -> list[str]:
    """The command line of this process, relative to the root of the source."""
    program = Path(sys.argv[0]).resolve()
    shown = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    return [str(shown), *sys.argv[1:]]


def save(run: Run, path: Path) -> None:
    """Write a run as JSON, atomically."""
    draft = path.with_name(path.name + ".draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(to_plain(run), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def to_plain(run: Run) -> dict[str, Any]:
    """A run as values that JSON can represent. Samples are rounded to six significant digits."""
    plain: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(run)}
    for case in plain["cases"]:
        case["samples"] = [float(f"{sample:.6g}") for sample in case["samples"]]
    return plain


def load(path: Path) -> Run:
    """Read a run. Raises InvalidInputError if the file is not a run."""
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
    """Add the cases and notes of runs on the same machine from the same source."""
    for part in parts:
        into.cases += part.cases
        into.notes += part.notes


# --- what is measured on ----------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """The processor, the memory, the kernel, and the machine's load when the run began."""
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
    """The commit, and whether files differ from it. Outside a checkout: unknown."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return {"commit": "unknown", "dirty": None}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def describe_tools() -> dict[str, str]:
    """The first line of each tool's version output. Tools that are not installed are left out."""
    found = {}
    for name, command in TOOLS.items():
        if shutil.which(command[0]) is not None:
            done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            found[name] = lines[0].strip() if lines else "unknown"
    return found
