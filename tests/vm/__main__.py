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
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import NetpolError, PlatformError
from tests.vm import emulator, kernels
from tests.vm.prepare import Prepared, prepare
from tests.vm.record import Result, write_result
from tests.vm.run import run_kernel


@dataclass(frozen=True, slots=True)
class Planned:
    """A kernel to run. ``steps``: the names of the steps; None: all steps."""

    kernel: str
    steps: tuple[str, ...] | None = None


CI_RUNS = (Planned("6.1", ("load", "cases")), Planned("5.10"), Planned("6.12", ("load", "cases")))
"""The runs in this order; the first one is made even if time is short. The demonstration and the upgrade take minutes,
so only full runs have them."""
CI_NAMES = tuple(planned.kernel for planned in CI_RUNS)
CI_BUDGET_S = 180.0
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen kernels. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help=f"{', '.join(kernels.NAMES)}, or the path of a vmlinux"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--ci",
        action="store_true",
        help=f"{', '.join(CI_NAMES)}, not all steps: none begins after the time budget but the first",
    )
    group.add_argument(
        "--all", action="store_true", help="every packaged kernel; without any of these: those of --ci with all steps"
    )
    parser.add_argument(
        "--budget", type=float, default=CI_BUDGET_S, metavar="SECONDS", help="with --ci (default %(default)g)"
    )
    parser.add_argument(
        "--steps",
        type=lambda text: tuple(text.split(",")),
        help="only these: load,cases,demo,succession,border,networks",
    )
    parser.add_argument(
        "--compiled", type=Path, metavar="FILE", help="a compiled packet path of these sources, by any compiler"
    )
    parser.add_argument("--jobs", type=int, default=1, help="guests at a time (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="keep the results in tests/vm/results")
    parser.add_argument("--refresh", action="store_true", help="look for newer packages of the kernels")
    options = parser.parse_args(argv)
    runs = [Planned(name, options.steps) for name in options.kernels or (kernels.NAMES if options.all else CI_NAMES)]
    if options.kernels and (options.all or options.ci):
        parser.error("give kernels, --ci or --all")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        emulator.require_tools()
        return _run_all(CI_RUNS if options.ci else runs, options)
    except NetpolError as error:
        print(f"error: {error.message}\n  {error.hint}", file=sys.stderr)
        return error.exit_code


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # guests and their files are removed when the exception is handled


def _run_all(runs: Sequence[Planned], options: argparse.Namespace) -> int:
    began = time.monotonic()
    lock = threading.Lock()
    stop = threading.Event()
    lines: list[str] = []

    def run_one(planned: Planned, prepared: Prepared) -> bool:
        """Whether the run succeeded.

        A run that is left out prints the reason; with --ci, so does a kernel that is not available.
        """

        def say(text: str) -> None:
            with lock:
                print("\n".join(f"{planned.kernel}: {line}" for line in text.splitlines()), flush=True)

        waited = time.monotonic() - began
        if options.ci and planned is not runs[0] and waited > options.budget:
            lines.append(
                f"NOT RUN        {planned.kernel}: {waited:.0f} s of {options.budget:.0f} s for kernels had passed"
            )
            return True
        try:
            kernel = kernels.find(planned.kernel, refresh=options.refresh)
        except PlatformError as error:
            lines.append(f"{'NOT RUN' if options.ci else 'FAILED':<7}        {planned.kernel}: {error.message}")
            return options.ci
        result = run_kernel(kernel, prepared, say, steps=planned.steps, stop=stop)
        lines.append(_summary(planned.kernel, result))
        if options.record and (result.is_ok or result.has_border):  # a failed step is in the record, too
            say(f"recorded in {write_result(result).name}")
        return result.is_ok

    with tempfile.TemporaryDirectory(prefix="netpol-vm-") as scratch:
        prepared = prepare(Path(scratch), options.compiled)
        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                ended = [pool.submit(run_one, planned, prepared) for planned in runs]
                are_good = [one.result() for one in ended]
            except BaseException:
                stop.set()  # running guests end at once, and waiting ones do not start
                pool.shutdown(cancel_futures=True)
                raise
    print("\n".join(["", *lines]))
    if not all(are_good):
        return EXIT_FAILED
    return PlatformError.exit_code if all(line.startswith("NOT RUN") for line in lines) else 0


def _summary(name: str, result: Result) -> str:
    steps = ", ".join(f"{step} {one['seconds']:.0f} s" for step, one in result.steps.items() if step != "system")
    return f"{'passed' if result.is_ok else 'FAILED':<7}{result.seconds:5.0f} s  {name} ({result.release or 'no release'}): {steps}"


if __name__ == "__main__":
    sys.exit(main())
