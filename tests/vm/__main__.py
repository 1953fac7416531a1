# SPDX-License-Identifier: Apache-2.0
"""Boot kernels under emulation and run the project in them.

    python -m tests.vm [KERNEL...] [--ci | --all] [--steps NAME,...] [--compiled FILE] [--jobs N] [--record] [--refresh]

KERNEL: a name of a packaged kernel (5.10, 6.1, 6.1-rt, 6.12, 6.12-rt, 6.18, newest) or the path of a vmlinux with everything it
needs built in (virtio, virtiofs, overlay, veth, clsact, BPF).  Exit codes: 0 all as it must be, 1 some run was not, 2 usage,
5 the machine lacks something.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from netpol_ebpf.errors import NetpolError
from tests.vm import emulator, kernels
from tests.vm.prepare import Prepared, prepare
from tests.vm.record import Result, write_result
from tests.vm.run import run_kernel

CI_KERNELS = ("6.1", "5.10", "6.12")
"""In this order, the first one without regard to the time."""
CI_BUDGET_S = 180.0
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen kernels; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help=f"{', '.join(kernels.NAMES)}, or the path of a vmlinux"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--ci", action="store_true", help=f"{', '.join(CI_KERNELS)}: none begins after the time budget but the first"
    )
    group.add_argument(
        "--all", action="store_true", help="every packaged kernel; without any of these: those of --ci, all of them"
    )
    parser.add_argument(
        "--budget", type=float, default=CI_BUDGET_S, metavar="SECONDS", help="with --ci (default %(default)g)"
    )
    parser.add_argument("--steps", type=lambda text: text.split(","), help="only these: load,cases,demo,succession")
    parser.add_argument(
        "--compiled", type=Path, metavar="FILE", help="a compiled packet path of these sources, by any compiler"
    )
    parser.add_argument("--jobs", type=int, default=1, help="guests at a time (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="keep the results in tests/vm/results")
    parser.add_argument("--refresh", action="store_true", help="look for newer packages of the kernels")
    options = parser.parse_args(argv)
    names = options.kernels or (kernels.NAMES if options.all else CI_KERNELS)
    if options.kernels and (options.all or options.ci):
        parser.error("give kernels, --ci or --all")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        emulator.require_tools()
        return _run_all(names, options)
    except NetpolError as error:
        print(f"error: {error.message}\n  {error.hint}", file=sys.stderr)
        return error.exit_code


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # guests and their files go on the way out


def _run_all(names: Sequence[str], options: argparse.Namespace) -> int:
    began = time.monotonic()
    lock = threading.Lock()
    lines: list[str] = []

    def run_one(name: str, prepared: Prepared) -> Result | None:
        def say(text: str) -> None:
            with lock:
                print("\n".join(f"{name}: {line}" for line in text.splitlines()), flush=True)

        waited = time.monotonic() - began
        if options.ci and name != names[0] and waited > options.budget:
            lines.append(f"NOT RUN         {name}: {waited:.0f} s of {options.budget:.0f} s for kernels had passed")
            return None
        result = run_kernel(kernels.find(name, refresh=options.refresh), prepared, say, steps=options.steps)
        lines.append(_summary(name, result))
        if options.record and result.is_ok:
            say(f"recorded in {write_result(result).name}")
        return result

    with tempfile.TemporaryDirectory(prefix="netpol-vm-") as scratch:
        prepared = prepare(Path(scratch), options.compiled)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda name: run_one(name, prepared), names))
    print("\n".join(["", *lines]))
    return 0 if all(one is None or one.is_ok for one in results) else EXIT_FAILED


def _summary(name: str, result: Result) -> str:
    steps = ", ".join(f"{step} {one['seconds']:.0f} s" for step, one in result.steps.items() if step != "system")
    return f"{'passed' if result.is_ok else 'FAILED':<7}{result.seconds:5.0f} s  {name} ({result.release or 'no release'}): {steps}"


if __name__ == "__main__":
    sys.exit(main())
