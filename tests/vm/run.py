# SPDX-License-Identifier: Apache-2.0
"""The run of one kernel: boots it, runs the steps, judges each, and makes the result."""

from __future__ import annotations

import importlib.util
import json
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import PlatformError
from netpol_ebpf.lab.patience import VARIABLE as FACTOR_VARIABLE
from netpol_loader.pins.compiled import PREPARED_DIR
from tests.vm.emulator import Machine
from tests.vm.kernels import Kernel
from tests.vm.prepare import Prepared
from tests.vm.record import REFUSED, RUNS, Result, current_commit, series_of, today
from tests.vm.steps import Step, all_steps, choose_steps, read_document, refusal_steps

UNSUPPORTED = frozenset({"5.10", "newest-rt"})
"""Kernels that doctor and agent must reject: no 64-bit compare-and-swap, or real-time without locked bottom halves."""

FACTOR = 12
"""Factor for all time limits inside a guest. An emulated processor is ten to thirty times slower, and guests share
it."""

BOOT_TIMEOUT_S = 180.0
Say = Callable[[str], None]


def run_kernel(
    kernel: Kernel,
    prepared: Prepared,
    say: Say,
    *,
    steps: Iterable[str] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Boot the kernel and run its steps (all, or the named ones).

    A failure of the guest is in the result, and not raised.

    ``stop``: set by a caller that no longer needs the run.
    """
    expected = REFUSED if kernel.name in UNSUPPORTED else RUNS
    chosen = choose_steps(refusal_steps() if expected == REFUSED else all_steps(prepared.older), steps)
    began = time.monotonic()
    seen: dict[str, dict[str, Any]] = {}
    failure = ""
    with tempfile.TemporaryDirectory(prefix="netpol-vm-guest-") as text:
        scratch = Path(text)
        task = scratch / "task.json"
        task.write_text(render_task(chosen, prepared))
        try:
            with Machine(kernel, prepared.tree, task, scratch, stop=stop) as machine:
                cpu_s = 0.0
                for record in machine.records(BOOT_TIMEOUT_S + sum(step.timeout_s for step in chosen)):
                    record["cpu_s"], cpu_s = round(record["cpu_s"] - cpu_s, 1), record["cpu_s"]
                    seen[record["step"]] = _judge(record, chosen, say)
        except PlatformError as error:
            failure = error.message
            say(failure)
    system = seen.get("system", {}).get("result") or {}
    return Result(
        series=series_of(system["release"]) if system else kernel.name.rpartition("/")[2],
        release=system.get("release", ""),
        source=kernel.source,
        machine=platform.machine(),
        compiler=prepared.compiler,
        expected=expected,
        date=today(),
        commit=current_commit(),
        seconds=round(time.monotonic() - began, 1),
        steps={name: one for name, one in seen.items() if name != "end"},
        failure=failure,
    )


def render_task(steps: Iterable[Step], prepared: Prepared, module: str = "tests.vm.inside") -> str:
    """The task for a guest: functions of ``module``. The guest has the compiled files of an image, and no compiler."""
    task = {
        "module": module,
        "environment": {FACTOR_VARIABLE: str(FACTOR)},
        "mounts": [
            (str(prepared.compiled), str(PREPARED_DIR)),
            *((str(prepared.empty), folder) for folder in _compilers()),
        ],
        "steps": [
            {"name": step.name, "call": step.call, "arguments": step.arguments, "timeout_s": step.timeout_s}
            for step in steps
        ],
    }
    return json.dumps(task)


def _compilers() -> list[str]:
    """The directories of BCC, which are hidden in a guest, because a node with the compiled file has no BCC."""
    spec = importlib.util.find_spec("bcc")
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _judge(record: dict[str, Any], steps: Iterable[Step], say: Say) -> dict[str, Any]:
    """The record to keep of a step. Prints whether it succeeded, and the end of its errors if it failed."""
    name, code = record["step"], record["code"]
    step = next((one for one in steps if one.name == name), None)
    kept = {"code": code, "seconds": record["seconds"], "cpu_s": record["cpu_s"]}
    times = f"{record['seconds']:7.1f} s {record['cpu_s']:6.1f} s of processor"
    say(f"{'ok' if code == 0 else 'FAILED':<7}{times}  {name}" + (f" (exit code {code})" if code else ""))
    if step is not None:
        document = read_document(record["output"])
        if code == 0 and document is not None:
            kept["result"] = step.keep(document)
        elif code != 0:
            kept["said"] = (record["output"][-2000:] + record["errors"]).strip()
            say(kept["said"])
        if code == 0 and document is None:
            kept |= {"code": 1, "said": "the step printed no result"}
    return kept
