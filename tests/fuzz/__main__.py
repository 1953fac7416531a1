# SPDX-License-Identifier: Apache-2.0
"""Send mutated packets through the loaded program and the reference, and print the smallest episode that differs.

    python -m tests.fuzz [--seconds 600 | --packets N] [--seed N] [--first EPISODE] [--pin-root DIRECTORY]

Needs root (CAP_BPF, CAP_NET_ADMIN; CAP_SYS_ADMIN for a network namespace of its own) and bpffs, but no interface. Exit
code 1: there is a difference.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernel"), str(HERE.parents[1]), str(HERE.parents[1] / "loader")]

from episodes import episode  # noqa: E402 # after the change of sys.path
from harness import SIZES, Harness  # noqa: E402 # as above

from netpol_loader.pins.dataplane import Dataplane  # noqa: E402 # as above


def main() -> int:
    """Run episodes until the time is over or program and reference differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    limit.add_argument("--packets", type=int, help="how many, instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first episode: repeats a failure")
    parser.add_argument("--pin-root", type=Path, default=Path(f"/sys/fs/bpf/netpol-fuzz-{os.getpid()}"))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one CPU: its caches are compared, too
    dataplane = Dataplane.open(arguments.pin_root, sizes=SIZES)
    try:
        harness = Harness(dataplane)
        try:
            return _run(harness, arguments)
        finally:
            harness.close()
    finally:
        dataplane.remove()


def _run(harness: Harness, arguments: argparse.Namespace) -> int:
    began, number = time.monotonic(), arguments.first
    while True:
        seconds = time.monotonic() - began
        if harness.packets >= arguments.packets if arguments.packets is not None else seconds >= arguments.seconds:
            break
        difference = harness.check(episode(arguments.seed, number))
        if difference is not None:
            print(f"seed {arguments.seed} episode {number}: {harness.smallest(difference)}")
            return 1
        number += 1
    for reason, count in harness.reasons.most_common():
        print(f"{count:>10}  {reason}")
    print(
        f"{harness.packets} packets, episodes {arguments.first} to {number - 1} of seed {arguments.seed}, {seconds:.1f} s "
        f"({harness.packets / seconds:.0f} a second): no difference"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
