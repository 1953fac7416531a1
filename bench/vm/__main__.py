# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of enforcement across a link between two virtual machines, each a node with pods, as ratios.

    python -m bench.vm [--kernel KERNEL] [--rounds N] [--seconds S] [--output FILE]

The link is a socket between the two QEMU processes; no network of this machine is touched. Everything is emulated (no
KVM), so the figures say nothing about real machines, and even their ratios are not judged. They show that nodes
communicate across a network under enforcement, as in continuous integration in virtual machines, and what changes from
one version to the next.

Exit codes: 0 measured, 1 a guest failed, 2 wrong usage, 5 the machine lacks something.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.record import LESS, MORE, Case, Run, begin, case_id, save
from bench.vm.node import ENFORCED, FREE, MORE_IS_BETTER, UNITS
from netpol_ebpf.errors import NetpolError, PlatformError
from tests.vm import emulator, kernels
from tests.vm.prepare import Prepared, prepare
from tests.vm.run import render_task
from tests.vm.steps import Step, read_document

SUITE = "between virtual machines"
NOTE = "emulated (QEMU without KVM): nothing of it is judged, and no figure says anything of a real machine"
STEP_TIMEOUT_S = 1800.0
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Boot both machines, measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.vm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="6.12", help="as for python -m tests.vm (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each kind and side (default %(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (default %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep every sample, as the other benchmarks do")
    options = parser.parse_args(argv)
    try:
        emulator.require_tools()
        for tool in ("iperf3", "sockperf"):
            if shutil.which(tool) is None:
                raise PlatformError(f"{tool} is not installed", hint=f"apt install {tool}")
        run = begin(["python", "-m", "bench.vm", *(sys.argv[1:] if argv is None else argv)])
        document = _measure(options)
    except NetpolError as error:
        print(f"error: {error.message}\n  {error.hint}", file=sys.stderr)
        return error.exit_code
    if document is None:
        return EXIT_FAILED
    _fill(run, document)
    print(render(run))
    if options.output:
        save(run, options.output)
    return 0


def _measure(options: argparse.Namespace) -> Any:
    """The output of the measuring guest; None if a guest failed, and then the reason is printed."""
    kernel = kernels.find(options.kernel)
    with tempfile.TemporaryDirectory(prefix="netpol-vm-") as text:
        scratch = Path(text)
        prepared = prepare(scratch)
        link = scratch / "link.socket"
        stop = threading.Event()
        arguments = (str(options.rounds), str(options.seconds))
        nodes = (
            (Step("serve", "serve", timeout_s=STEP_TIMEOUT_S), f"server=on,addr.type=unix,addr.path={link}", "01"),
            (
                Step("measure", "measure", arguments, timeout_s=STEP_TIMEOUT_S),
                f"server=off,addr.type=unix,addr.path={link}",
                "02",
            ),
        )
        with ThreadPoolExecutor(len(nodes)) as pool:
            ended = []
            try:
                for step, address, number in nodes:
                    ended.append(
                        pool.submit(_run_node, kernel, prepared, scratch / step.name, step, (address, number), stop)
                    )
                    _await_link(link, ended[0])
                served, measured = (one.result() for one in ended)
            except BaseException:
                stop.set()  # no guest runs longer than this process
                raise
            return measured if served else None


def _await_link(link: Path, listening: Future[Any]) -> None:
    """Wait until the first machine listens, because the second one connects to it."""
    deadline = time.monotonic() + emulator.SOCKET_DEADLINE_S * 6
    while not link.exists() and not listening.done():
        if time.monotonic() > deadline:
            raise PlatformError("the link between the machines does not come up")
        time.sleep(emulator.POLL_S)


def _run_node(
    kernel: kernels.Kernel, prepared: Prepared, scratch: Path, step: Step, link: tuple[str, str], stop: threading.Event
) -> Any:
    """Boot one node and run its step. Returns the step's document; None if this node or the other one failed."""
    scratch.mkdir()
    task = scratch / "task.json"
    task.write_text(render_task([step], prepared, "bench.vm.node"))
    address, number = link
    network = (
        "-netdev",
        f"stream,id=link,{address}",
        "-device",
        f"virtio-net-pci,netdev=link,mac=52:54:00:00:00:{number}",
    )
    try:
        with emulator.Machine(kernel, prepared.tree, task, scratch, network=network, stop=stop) as machine:
            for record in machine.records(STEP_TIMEOUT_S):
                print(f"{step.name}: {record['step']} {record['seconds']} s", file=sys.stderr, flush=True)
                if record["code"] != 0:
                    print((record["output"] + record["errors"]).strip(), file=sys.stderr)
                    break
                if record["step"] == step.name:
                    return read_document(record["output"])
    except PlatformError as error:
        print(f"{step.name}: {error.message}", file=sys.stderr)
    stop.set()
    return None


def _fill(run: Run, document: Any) -> None:
    run.machine = {**run.machine, "kernel": document["kernel"], "emulated": True}
    run.notes.append(NOTE)
    for name, sides in document["samples"].items():
        better = MORE if MORE_IS_BETTER[name] else LESS
        base = case_id(SUITE, name, FREE)
        run.cases += [
            Case(
                SUITE,
                name,
                side,
                UNITS[name],
                better,
                tuple(sides[side]),
                base=base if side == ENFORCED else "",
                judged=False,
            )
            for side in (ENFORCED, FREE)
        ]


def render(run: Run) -> str:
    """A table. The ratio is the median of the ratios of the rounds."""
    lines = [f"{run.machine['kernel']}, {NOTE}", ""]
    for case in run.cases:
        base = run.case(case.base) if case.base else None
        if base is not None:
            ratio = statistics.median(one / other for one, other in zip(case.samples, base.samples, strict=True))
            lines.append(f"{case.name:<26} {case.median:14.5g} {base.median:14.5g} {case.unit:<6} {ratio:6.3f}")
    return "\n".join([*lines[:2], f"{'':<26} {ENFORCED:>14} {FREE:>14} {'':<6} {'ratio':>6}", *lines[2:]])


if __name__ == "__main__":
    sys.exit(main())
