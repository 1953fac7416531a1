# SPDX-License-Identifier: Apache-2.0
"""Measure a node with some hundred pods under a real netpol-agent: its first start, and the cost of each new pod.

    sudo .venv/bin/python -m bench.pods [--pods 300] [--new 50]

A pod is a namespace with a veth pair, and host routes of both families that lead to the pair, as container networks
create them. The object of a new pod exists before its interface. The time is measured from the command that creates the
interface to the row that applies the pod's policy to it, which is read from the pinned map. The processor time is that
of the whole agent for the object and the interface, less the time that the agent takes at rest.

Invariant: this process requests nothing from the agent while it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.end_to_end import ended_by
from bench.idle import REST_S, processor_s
from bench.progress import Progress
from bench.record import LESS, Case, Run, begin, this_command
from bench.report import percentile
from bench.site import BPFFS, NODE_ADDRESS, NODE_HOST, wait_until
from netpol_ebpf.agent.control_socket import SOCKET_NAME
from netpol_ebpf.apply.encode import endpoint_key
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import Host
from netpol_loader.kernel import syscall
from netpol_loader.kernel.maps import Map

SUITE = "control plane"
CONTENDER = "netpol-ebpf"
START, UNTIL, COST, GOES = (
    "first start", "new pod: until it is enforced", "new pod: processor time", "pod that goes: processor time",
)  # fmt: skip
PODS, NEW = 300, 50
READY_DEADLINE_S = 300.0
APART_S = 0.3
"""Seconds between a pod's object and its interface, and between two pods. The agent reads manifests five times a
second. The value is arbitrary."""
REST_LOOK_S = 15.0

NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"
POLICY = """---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: group%(group)d, namespace: shop}
spec:
  podSelector: {matchLabels: {group: "%(group)d"}}
  ingress: [{from: [{podSelector: {matchLabels: {group: "%(other)d"}}}], ports: [{port: 5432}]}]
"""
POD = """---
apiVersion: v1
kind: Pod
metadata: {name: pod%(number)d, namespace: shop, labels: {group: "%(group)d"}}
spec: {nodeName: node, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: %(address4)s}, {ip: "%(address6)s"}]}
"""
GROUPS = 10
FIRST_INDEX = 1000
"""The lowest index of the pods' interfaces. The value is arbitrary, but above all other indices."""


@dataclass(slots=True)
class Findings:
    """The results, in seconds. ``cost``, ``going``: processor time for each added and each removed pod."""

    start: float = 0.0
    rest_share: float = 0.0
    until: list[float] = field(default_factory=list)
    cost: float = 0.0
    going: float = 0.0


def _object(number: int) -> str:
    address4, address6 = f"10.1.{number >> 8}.{number & 255}", f"fd00:1::{number:x}"
    return POD % {"number": number, "group": number % GROUPS, "address4": address4, "address6": address6}


def _routes(number: int) -> list[str]:
    device = f"dev pod{number}"
    return [f"route add 10.1.{number >> 8}.{number & 255}/32 {device}", f"route add fd00:1::{number:x}/128 {device}"]


class Stage:
    """The node, its pods and its agent."""

    def __init__(self, lab: Lab, home: Path, pins: Path) -> None:
        self._lab = lab
        self._manifests, self._state, self._pins = home / "manifests", home / "state", pins
        self._manifests.mkdir()
        self._agent: subprocess.Popen[bytes] | None = None

    def write(self, name: str, text: str) -> None:
        """Write a manifest atomically."""
        draft = self._manifests.parent / "draft"
        draft.write_text(text, encoding="utf-8")
        draft.rename(self._manifests / name)

    def remove(self, name: str) -> None:
        """Remove a manifest."""
        (self._manifests / name).unlink()

    def make_namespaces(self, numbers: Sequence[int]) -> None:
        """Create the namespaces of pods, without interfaces."""
        names = [self._space(number) for number in numbers]
        self._lab.record(namespaces=names)
        _batch(["ip"], [f"netns add {name}" for name in names])

    def plug(self, numbers: Sequence[int]) -> None:
        """Create the interfaces of pods on the node, with the routes to them."""
        lines = []
        for number in numbers:
            lines += [
                f"link add pod{number} index {FIRST_INDEX + number} type veth peer name eth0 netns {self._space(number)}",
                f"link set pod{number} up",
                *_routes(number),
            ]
        _batch(self._lab.command(NODE_HOST, ["ip"]), lines)

    def raise_pods(self, numbers: Sequence[int]) -> None:
        """Set up the ends of the interfaces that are in the pods."""
        for number in numbers:
            _batch(["ip", "-n", self._space(number)], ["link set lo up", "link set eth0 up"])

    def unplug(self, number: int) -> None:
        """Remove a pod's interface."""
        _batch(self._lab.command(NODE_HOST, ["ip"]), [f"link del pod{number}"])

    def _space(self, number: int) -> str:
        return f"{self._lab.token}-pod{number}"

    def start(self) -> float:
        """Start the agent. Returns the seconds until policy is in force."""
        command = [
            sys.executable,
            "-m",
            "netpol_ebpf.agent.main",
            "--config",
            "none",
            "--manifests",
            str(self._manifests),
            "--node",
            "node",
        ]
        began = time.monotonic()
        self._agent = self._lab.start(
            NODE_HOST, [*command, "--pin-root", str(self._pins), "--state-dir", str(self._state)]
        )
        wait_until((self._state / SOCKET_NAME).exists, "netpol-agent is ready", READY_DEADLINE_S)
        return time.monotonic() - began

    def processor_s(self) -> float:
        """The processor time that the agent has used so far, in seconds."""
        if self._agent is None:
            raise AssertionError("no agent was started")
        return processor_s(self._agent.pid)

    @contextlib.contextmanager
    def endpoints(self) -> Iterator[Map]:
        """Open the map np_endpoint, whose rows show which interfaces are under policy."""
        (pin,) = self._pins.glob("v*/np_endpoint")
        rows = Map(syscall.obj_get(pin))
        try:
            yield rows
        finally:
            rows.close()


def _batch(command: Sequence[str], lines: Sequence[str]) -> None:
    subprocess.run([*command, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True, capture_output=True)


# --- measuring -----------------------------------------------------------------------------------------------------------


def measure(pods: int, new: int) -> Findings:
    """Start an agent on a node with ``pods`` pods, add ``new`` pods one by one, and remove them again."""
    found = Findings()
    old, coming = range(1, pods + 1), range(pods + 1, pods + new + 1)
    with tempfile.TemporaryDirectory(prefix="netpol-bench-pods-") as name:
        pins = BPFFS / f"netpol-bench-pods-{os.getpid()}"
        with Lab([Host(NODE_HOST, None, (NODE_ADDRESS,))], directories=[pins]) as lab:
            stage = Stage(lab, Path(name), pins)
            policies = "".join(POLICY % {"group": one, "other": (one + 1) % GROUPS} for one in range(GROUPS))
            stage.write("cluster.yaml", NAMESPACE + policies + "".join(_object(number) for number in old))
            stage.make_namespaces([*old, *coming])
            stage.plug(old)
            stage.raise_pods(old)
            found.start = stage.start()
            found.rest_share = _rest(stage)
            with stage.endpoints() as rows:
                found.cost = _spent(
                    stage, found.rest_share, coming, lambda one: found.until.append(_add(stage, rows, one))
                )
                found.going = _spent(stage, found.rest_share, coming, lambda one: _take_away(stage, rows, one))
    return found


def _rest(stage: Stage) -> float:
    """The share of a processor that the agent takes at rest, over some seconds."""
    last = 1.0

    def is_steady() -> bool:
        nonlocal last
        before, last = last, _share(stage, REST_S)
        return abs(before - last) < 0.05 + last / 4

    wait_until(is_steady, "netpol-agent comes to rest", READY_DEADLINE_S)
    return _share(stage, REST_LOOK_S)


def _share(stage: Stage, seconds: float) -> float:
    before = stage.processor_s()
    time.sleep(seconds)
    return (stage.processor_s() - before) / seconds


def _spent(stage: Stage, rest_share: float, numbers: Sequence[int], step: Callable[[int], None]) -> float:
    """Processor seconds that the agent takes for each of the steps, less those that it takes at rest."""
    began, before = time.monotonic(), stage.processor_s()
    for number in numbers:
        step(number)
    time.sleep(APART_S)
    elapsed = time.monotonic() - began
    return max(0.0, stage.processor_s() - before - rest_share * elapsed) / len(numbers)


def _add(stage: Stage, rows: Map, number: int) -> float:
    """Add a pod. Returns the seconds from the command that creates its interface to its row."""
    stage.write(f"pod{number}.yaml", _object(number))
    time.sleep(APART_S)
    began = time.monotonic()
    stage.plug([number])
    key = endpoint_key(FIRST_INDEX + number)
    wait_until(lambda: rows.get(key) is not None, f"pod {number} is enforced", READY_DEADLINE_S, every_s=0.001)
    taken = time.monotonic() - began
    stage.raise_pods([number])
    time.sleep(APART_S)
    return taken


def _take_away(stage: Stage, rows: Map, number: int) -> None:
    stage.unplug(number)
    stage.remove(f"pod{number}.yaml")
    key = endpoint_key(FIRST_INDEX + number)
    wait_until(lambda: rows.get(key) is None, f"pod {number} is forgotten", READY_DEADLINE_S)
    time.sleep(APART_S)


def run_suite(run: Run, *, pods: int = PODS, new: int = NEW) -> None:
    """Measure, and add the cases to the run."""
    progress = Progress("pods of a node", 1)
    progress.step(f"{pods} pods, {new} that come and go")
    found = measure(pods, new)
    progress.end()
    for name, samples in (
        (START, [found.start]), (UNTIL, found.until), (COST, [found.cost]), (GOES, [found.going]),
    ):  # fmt: skip
        in_ms = tuple(1e3 * sample for sample in samples)
        run.cases.append(Case(SUITE, name, CONTENDER, "ms", LESS, in_ms, {"pods": pods}, judged=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pods", type=int, default=PODS, help="how many there are at the start")
    parser.add_argument("--new", type=int, default=NEW, help="how many come, one after the other")
    options = parser.parse_args(argv)
    run = begin(this_command())
    run_suite(run, pods=options.pods, new=options.new)
    for case in run.cases:
        figure = f"{case.median:.1f} {case.unit}"
        if len(case.samples) > 1:
            figure += f" (median), {percentile(case.samples, 0.99):.1f} {case.unit} (p99)"
        print(f"{case.name}, {options.pods} pods: {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
