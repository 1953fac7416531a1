# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of one hot packet for the programs of this version and of another version, in one run.

    python -m bench.versions TREE [--loads 3] [--rounds 300] [-o json]

``TREE``: a checkout of the other version. Each version makes its own maps and programs, with its own code. It does so
several times, because a hot packet's time differs by some nanoseconds with the address at which the kernel places a
program. All programs run in turns on the same frames. A figure is the tenth percentile of the rounds of one load, and
the median of these over all loads. Use an otherwise idle processor: `chrt -f 50 taskset -c 1`. Needs root. Nothing is
attached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for _place in (ROOT, ROOT / "loader", ROOT / "tests" / "kernel"):
    sys.path.insert(0, str(_place))

import packets as p  # noqa: E402
from rig import PEER4, PEER6, POD4, POD6  # noqa: E402

from bench.end_to_end import ended_by  # noqa: E402
from netpol_ebpf.errors import PlatformError  # noqa: E402
from netpol_loader.kernel import syscall  # noqa: E402
from netpol_loader.pins.dataplane import SKB_BYTES, SKB_IFINDEX, SKB_INGRESS_IFINDEX  # noqa: E402

REPEAT = 1000
SYN = 2
ELSEWHERE = 2
HOOKS = ("ingress", "egress")
PREPARE = """
import sys
from pathlib import Path
tree, root = sys.argv[1:]
sys.path[:0] = [tree, tree + "/loader", tree + "/tests/kernel"]
import packets as p, rig as r
from map_sizes import SIZES
from netpol_loader.pins.dataplane import Dataplane
with Dataplane.open(Path(root), sizes=SIZES) as dataplane:
    rig = r.Rig(dataplane)
    rig.pod(r.everything(1, r.DENY, 11), r.everything(2, r.ALLOW, 12))
    for pod, peer in ((r.POD4, r.PEER4), (r.POD6, r.PEER6)):
        rig.out(p.frame(pod, peer, p.UDP, p.udp(1, 2)))
        rig.into(p.frame(peer, pod, p.UDP, p.udp(2, 1)))
"""
"""The script that each version runs with its own test rig: a pod that may open connections and accepts none, with one
open connection of each family."""


@dataclass(frozen=True)
class Case:
    """One packet.

    ``ingress``: the interface by which it entered the node; 0: the node itself sends it, or it leaves a pod.
    """

    name: str
    hook: str
    frame: bytes
    ingress: int

    def context(self) -> bytearray:
        """A new ``struct __sk_buff``."""
        context = bytearray(SKB_BYTES)
        struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, self.ingress)
        struct.pack_into("=I", context, SKB_IFINDEX, 1)
        return context


def cases() -> list[Case]:
    """The packets that are compared."""
    found = []
    for version, pod, peer in (("IPv4", POD4, PEER4), ("IPv6", POD6, PEER6)):
        syn = p.tcp(5, 80, flags=SYN)
        found += [
            Case(f"established, {version}", "ingress", p.frame(pod, peer, p.UDP, p.udp(1, 2)), 0),
            Case(f"new flow denied, {version}", "egress", p.frame(peer, pod, p.TCP, syn), ELSEWHERE),
            Case(f"new flow allowed and recorded, {version}", "ingress", p.frame(pod, peer, p.TCP, syn), 0),
            Case(f"new flow of the node itself, {version}", "egress", p.frame(peer, pod, p.TCP, syn), 0),
        ]
    return found


def open_programs(root: Path) -> dict[str, int]:
    """The descriptors of the programs by hook, wherever the version pins its programs."""
    (pins,) = root.glob("v*")
    directory = pins / "programs" if (pins / "programs").is_dir() else pins
    return {hook: syscall.obj_get(directory / f"np_tc_{hook}") for hook in HOOKS}


def measure(loads: Mapping[str, list[dict[str, int]]], case: Case, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds of one packet by version, one figure for each load. Raises PlatformError if the verdicts differ."""
    every = [(name, at, programs[case.hook]) for name, found in loads.items() for at, programs in enumerate(found)]
    verdicts = {syscall.prog_test_run(fd, case.frame, case.context(), 1)[0] for _, _, fd in every}
    if len(verdicts) != 1:
        raise PlatformError(f"{case.name}: verdicts {verdicts}: not the same work, so not compared")
    samples: dict[tuple[str, int], list[int]] = {(name, at): [] for name, at, _ in every}
    for turn in range(rounds):
        for name, at, fd in every if turn % 2 else reversed(every):
            samples[name, at].append(syscall.prog_test_run(fd, case.frame, case.context(), REPEAT)[1])
    tenth = {key: float(sorted(found)[len(found) // 10]) for key, found in samples.items()}
    return {name: [tenth[name, at] for at in range(len(found))] for name, found in loads.items()}


@contextlib.contextmanager
def loaded(trees: Mapping[str, Path], loads: int) -> Iterator[dict[str, list[dict[str, int]]]]:
    """Load the programs of each version ``loads`` times, each with its own maps. All are removed at the end."""
    roots = {
        (name, at): Path(f"/sys/fs/bpf/netpol-versions-{os.getpid()}-{number}-{at}")
        for number, name in enumerate(trees)
        for at in range(loads)
    }
    try:
        for (name, _), root in roots.items():
            command = [sys.executable, "-c", PREPARE, str(trees[name]), str(root)]
            subprocess.run(command, cwd=trees[name], check=True)
        yield {name: [open_programs(roots[name, at]) for at in range(loads)] for name in trees}
    finally:
        for root in roots.values():
            shutil.rmtree(root, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Load both versions, measure in turns, print, and remove everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path, help="a checkout of the other version")
    parser.add_argument("--loads", type=int, default=3, help="how often each version is loaded")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    options = parser.parse_args(argv)
    with loaded({"other": options.tree.resolve(), "this": ROOT}, options.loads) as loads:
        found = {
            case.name: {name: statistics.median(ns) for name, ns in measure(loads, case, options.rounds).items()}
            for case in cases()
        }
    if options.output == "json":
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'ns a packet, test run included':<40}{'other':>8}{'this':>8}{'more':>8}")
    for name, ns in found.items():
        print(f"{name:<40}{ns['other']:>8.0f}{ns['this']:>8.0f}{ns['this'] - ns['other']:>+8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
