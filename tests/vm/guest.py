# SPDX-License-Identifier: Apache-2.0
"""The guest's program: runs the steps of a task one after another and reports each. It does not know what they do.

    python -m tests.vm.guest TASK-FILE

A step calls one function of the task's module (`tests.vm.inside`) in a child process with a time limit, so that a step
which hangs or crashes ends no other step. The child is forked from this process, which has imported the project once:
on an emulated processor, imports take more than ten seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import tty
from pathlib import Path
from typing import Any

from tests.vm.report import render_record

REPORT = Path("/dev/ttyS1")
OUTPUT_BYTES = 200_000
ERROR_BYTES = 4_000
TIMED_OUT, RAISED = 124, 70
STDOUT, STDERR = 1, 2


def main() -> int:
    """Run the task and report. Always returns 0: the reader of the report judges the steps' exit codes."""
    began = time.monotonic()
    with REPORT.open("wb", buffering=0) as port:
        tty.setraw(port.fileno(), termios.TCSANOW)
        port.write(render_record({"step": "boot", "code": 0, "seconds": round(began, 1)}))
        task = json.loads(Path(sys.argv[1]).read_text())
        os.environ.update(task["environment"])
        for source, target in task["mounts"]:
            Path(target).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", source, target], check=True)
        inside = importlib.import_module(task["module"])
        port.write(render_record({"step": "import", "code": 0, "seconds": round(time.monotonic() - began, 1)}))
        for step in task["steps"]:
            print(f"guest: {step['name']}", flush=True)  # on the console: if the guest dies, it names the step
            port.write(render_record(run_step(step, inside)))
        port.write(render_record({"step": "end", "code": 0, "seconds": round(time.monotonic() - began, 1)}))
        termios.tcdrain(port.fileno())
    return 0


def run_step(step: dict[str, Any], inside: Any) -> dict[str, Any]:
    """Call the step's function with a limit of ``timeout_s``.

    Returns exit code, seconds, output and the end of the errors.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            _be_child(step, inside, output.fileno(), errors.fileno())
        code = _wait(child, step["timeout_s"])
        return {
            "step": step["name"],
            "code": code,
            "seconds": round(time.monotonic() - began, 1),
            "output": _read(output, 0),
            "errors": _read(errors, ERROR_BYTES),
        }


def _be_child(step: dict[str, Any], inside: Any, output: int, errors: int) -> None:
    code = RAISED
    try:
        os.setsid()
        os.dup2(output, STDOUT)
        os.dup2(errors, STDERR)
        code = getattr(inside, step["call"])(*step["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else RAISED
    except BaseException:  # noqa: BLE001 - it is part of the step's error output
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, timeout_s: float) -> int:
    """The child's exit code. Its whole session is killed."""
    handle = os.pidfd_open(child)
    try:
        is_over = bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)
    if not is_over:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) if is_over else TIMED_OUT


def _read(file: Any, last: int) -> str:
    """The file's text: at most OUTPUT_BYTES from its beginning, or its ``last`` bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - last) if last else 0)
    text: str = file.read(OUTPUT_BYTES).decode(errors="replace")
    return text


if __name__ == "__main__":
    sys.exit(main())
