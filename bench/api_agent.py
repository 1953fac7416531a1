# SPDX-License-Identifier: Apache-2.0
"""Measure a real netpol-agent that watches a simulated API server: start, policy edits, churn, and the cost at rest.

    sudo .venv/bin/python -m bench.api_agent [--sizes 10000x1000,100000x10000] [-o FILE]

*Until in force* is the time from the agent's start until it reports that everything is in force. *Policy edit* is the
time from the write of the event to the server's socket until the pinned program judges a packet by the new policy
(`BPF_PROG_TEST_RUN`, a new flow each time). It is measured without other changes, and while pods of other nodes change.
No part of the agent runs in this process.

Invariant: this process requests nothing from the agent while it is measured. If a verdict does not change in time, that
is an error.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from bench.api_server import SimulatedApi
from bench.cluster import ELSEWHERE, HERE, Object, Size, objects, pod
from bench.control_plane import MAP_SIZES, mapped_bytes, parse_size, peak_bytes, resident_bytes
from bench.end_to_end import ended_by
from bench.idle import processor_s
from bench.progress import Progress
from bench.record import LESS, Case, Run, begin, save, this_command
from bench.report import percentile
from bench.site import BPFFS, NODE_ADDRESS, NODE_HOST, wait_until
from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.probe import CLONE_NEWNET
from netpol_ebpf.lab.topology import Host
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import SKB_BYTES, SKB_IFINDEX, SKB_INGRESS_IFINDEX

SUITE = "control plane"
CONTENDER = "netpol-ebpf"
SIZES = (Size(10_000, 1000, 30), Size(100_000, 10_000, 30))
SMOKE_SIZES = (Size(1000, 100, 5),)
PODS_OF_A_NODE = 20
FIRST_NODE = 0xC0A80000
CHURN_PER_S = 100
HEARTBEATS_PER_S = 20
"""Status updates of nodes in a second. 5 000 nodes with one update each every five minutes make 17."""
FIRST_PORT = 20_000
READY_DEADLINE_S = 600.0
VERDICT_DEADLINE_S = 20.0
REST_S = 3.0
SUBJECT = 0
"""Number of the pod that the edited policy selects: the first local one."""
STRANGER = IPv4Address("172.16.200.9")
FIRST_INDEX = 1000
IN_FORCE = "in force: "


@dataclass(slots=True)
class Findings:
    """The results of one size: times in seconds, memory in bytes, and processor time as a share of one processor."""

    until: float = 0.0
    start_processor: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    edits: list[float] = field(default_factory=list)
    edits_in_churn: list[float] = field(default_factory=list)
    churn_share: float = 0.0
    churn_rate: float = 0.0
    rest_share: float = 0.0


def nodes(count: int) -> Iterator[Object]:
    """The Node objects of a cluster."""
    yield from (node(number) for number in range(count))


def node(number: int, *, beat: int = 0) -> Object:
    """A Node object. ``beat``: the number of its heartbeat, which changes no field that policy reads."""
    status = {
        "addresses": [{"type": "InternalIP", "address": str(IPv4Address(FIRST_NODE + number))}],
        "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": str(beat)}],
    }
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"node-{number}"}, "status": status}


def edited(port: int) -> Object:
    """The policy that is edited: it isolates the pod SUBJECT, and allows one port."""
    subject = pod(SUBJECT)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "edited", "namespace": subject["metadata"]["namespace"]},
        "spec": {
            "podSelector": {"matchLabels": {"app": subject["metadata"]["labels"]["app"]}},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": [{"protocol": "TCP", "port": port}]}],
        },
    }


class Stage:
    """The node with the interfaces of its pods, and its agent."""

    def __init__(self, lab: Lab, home: Path, pins: Path, size: Size) -> None:
        self._lab, self._home, self._pins = lab, home, pins
        self._agent: subprocess.Popen[bytes] | None = None
        self._plug(size)

    @property
    def namespace(self) -> Path:
        """The network namespace of the node."""
        return NETNS_DIR / self._lab.namespace_of[NODE_HOST]

    @property
    def pid(self) -> int:
        """The process id of the agent."""
        if self._agent is None:
            raise AssertionError("no agent was started")
        return self._agent.pid

    def _plug(self, size: Size) -> None:
        """Create the interfaces of the local pods and the routes to them. All other ends are in one namespace."""
        pods = f"{self._lab.token}-pods"
        self._lab.record(namespaces=[pods])
        subprocess.run(["ip", "netns", "add", pods], check=True)
        lines = []
        for at, number in enumerate(size.local_pods()):
            addresses = [one["ip"] for one in pod(number)["status"]["podIPs"]]
            lines += [
                f"link add pod{at} index {FIRST_INDEX + at} type veth peer name peer{at} netns {pods}",
                f"link set pod{at} up",
                *(f"route add {one}/{128 if ':' in one else 32} dev pod{at}" for one in addresses),
            ]
        command = self._lab.command(NODE_HOST, ["ip", "-batch", "-"])
        subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True, capture_output=True)

    def start(self, url: str) -> float:
        """Start the agent. Returns the seconds until everything is in force."""
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c"}}],
        }  # fmt: skip
        (self._home / "kubeconfig").write_text(json.dumps(config), encoding="ascii")
        sizes = [word for name, size in MAP_SIZES.items() for word in ("--map-size", f"{name}={size}")]
        command = [
            sys.executable, "-m", "netpol_ebpf.agent.main", "--kubeconfig", str(self._home / "kubeconfig"), "--node", HERE,
            "--saved-state", str(self._home / "cluster"), "--pin-root", str(self._pins), "--state-dir", str(self._home / "state"),
            *sizes,
        ]  # fmt: skip
        log, began = self._home / "log", time.monotonic()
        with log.open("ab") as said:
            self._agent = self._lab.start(NODE_HOST, command, stdout=said, stderr=said)
        wait_until(lambda: IN_FORCE in log.read_text(), "everything is in force", READY_DEADLINE_S, every_s=0.02)
        return time.monotonic() - began

    @contextmanager
    def judge(self) -> Iterator[Callable[[int], bool]]:
        """Yield a function that runs the pinned program on the first packet of a new flow to a port of SUBJECT."""
        (pin,) = self._pins.glob(f"v*/programs/{Hook.TC_EGRESS.value}")
        program = syscall.obj_get(pin)
        context = bytearray(SKB_BYTES)
        struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, 1)
        struct.pack_into("=I", context, SKB_IFINDEX, FIRST_INDEX)
        destination = IPv4Address(pod(SUBJECT)["status"]["podIP"])
        flows = 0

        def passes(port: int) -> bool:
            nonlocal flows
            flows += 1
            frame = syn(STRANGER, destination, 1024 + flows % 60_000, port)
            verdict, _ = syscall.prog_test_run(program, frame, context, 1)
            return verdict in (abi.NP_PASS, abi.NP_PASS_ALONE)

        try:
            yield passes
        finally:
            os.close(program)


def syn(source: IPv4Address, destination: IPv4Address, source_port: int, port: int) -> bytes:
    """The Ethernet frame of an initial SYN."""
    tcp = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, source.packed, destination.packed)
    return bytes(12) + b"\x08\x00" + ip + tcp


def enter(namespace: Path) -> None:
    """Move this thread into a network namespace. Raises OSError."""
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


# --- measuring -----------------------------------------------------------------------------------------------------------


def measure(size: Size, *, edits: int, churn_s: float, rest_s: float) -> Findings:
    """Measure one size of cluster: the start, edits without other changes, edits during churn, and rest."""
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="netpol-bench-api-") as name:
        pins = BPFFS / f"netpol-bench-api-{os.getpid()}"
        with Lab([Host(NODE_HOST, None, (NODE_ADDRESS,))], directories=[pins]) as lab:
            stage = Stage(lab, Path(name), pins, size)
            made = [*nodes(max(2, size.pods // PODS_OF_A_NODE)), *objects(size), edited(FIRST_PORT)]
            with SimulatedApi(made, stage.namespace) as api:
                del made
                found.until = stage.start(api.url)
                found.start_processor = processor_s(stage.pid)
                found.memory["after the start"] = resident_bytes(stage.pid)
                worker = threading.Thread(target=_at_work, args=(stage, api, size, found, edits, churn_s, rest_s))
                worker.start()
                worker.join()
                if not found.rest_share:
                    raise AssertionError("the measurement ended early; what it said is above")
                found.memory["at most"] = peak_bytes(stage.pid)
                found.memory["of maps, mapped"] = mapped_bytes(stage.pid)
    return found


def _at_work(
    stage: Stage, api: SimulatedApi, size: Size, found: Findings, edits: int, churn_s: float, rest_s: float
) -> None:
    """Measure with the started agent. Must run in a thread of its own, because it enters the node's namespace."""
    enter(stage.namespace)
    with stage.judge() as passes:
        time.sleep(REST_S)
        port = FIRST_PORT
        for _ in range(edits):
            port += 1
            found.edits.append(_edit(api, passes, port))
            time.sleep(0.1)
        done, sent = threading.Event(), [0]
        churning = threading.Thread(target=_churn, args=(api, size, done, sent))
        before, began = processor_s(stage.pid), time.monotonic()
        churning.start()
        while time.monotonic() - began < churn_s:
            port += 1
            found.edits_in_churn.append(_edit(api, passes, port))
            time.sleep(0.1)
        done.set()
        churning.join()
        elapsed = time.monotonic() - began
        found.churn_share, found.churn_rate = (processor_s(stage.pid) - before) / elapsed, sent[0] / elapsed
        time.sleep(REST_S)
        before, began = processor_s(stage.pid), time.monotonic()
        api.mark()
        time.sleep(rest_s)
        found.rest_share = max(1e-9, (processor_s(stage.pid) - before) / (time.monotonic() - began))


def _edit(api: SimulatedApi, passes: Callable[[int], bool], port: int) -> float:
    """Change the allowed port.

    Returns the seconds until a packet to the new port passes; the old port is then denied.
    """
    if passes(port):
        raise AssertionError(f"port {port} is open before its edit")
    began = time.monotonic()
    api.put(edited(port))
    wait_until(lambda: passes(port), f"port {port} is open", VERDICT_DEADLINE_S, every_s=0.0005)
    taken = time.monotonic() - began
    if passes(port - 1):
        raise AssertionError(f"port {port - 1} is open after its end")
    return taken


def _churn(api: SimulatedApi, size: Size, done: threading.Event, sent: list[int]) -> None:
    """Until ``done`` is set, add and remove pods of other nodes and send heartbeats of nodes, each at its rate."""
    began, count = time.monotonic(), 0
    total_per_s = CHURN_PER_S + HEARTBEATS_PER_S
    while not done.is_set():
        due = int((time.monotonic() - began) * total_per_s)
        for number in range(count, due):
            turn, kind = divmod(number, total_per_s)
            if kind < HEARTBEATS_PER_S:
                api.put(node(number % max(2, size.pods // PODS_OF_A_NODE), beat=number))
                continue
            place = size.pods + (turn * CHURN_PER_S + kind - HEARTBEATS_PER_S) // 2
            one = pod(place, node=ELSEWHERE, like=place * 37 % size.pods)
            (api.remove if (kind - HEARTBEATS_PER_S) % 2 else api.put)(one)
        count = max(count, due)
        sent[0] = count
        time.sleep(1 / total_per_s)


def run_suite(
    run: Run, *, sizes: Sequence[Size] = SIZES, edits: int = 100, churn_s: float = 20.0, rest_s: float = 10.0
) -> None:
    """Measure all sizes, and add the cases to the run."""
    progress = Progress("an agent at an API server", len(sizes))
    for size in sizes:
        progress.step(f"{size.pods} pods, {size.policies} policies, {size.local} of the pods here")
        found = measure(size, edits=edits, churn_s=churn_s, rest_s=rest_s)
        parameters = {"pods": size.pods, "policies": size.policies, "local": size.local}

        def add(name: str, unit: str, samples: Sequence[float], parameters: dict[str, int] = parameters) -> None:
            case = Case(SUITE, f"API server: {name}", CONTENDER, unit, LESS, tuple(samples), parameters, judged=False)
            run.cases.append(case)

        add("until in force", "ms", [1e3 * found.until])
        add("until in force: processor time", "ms", [1e3 * found.start_processor])
        add("policy edit", "ms", [1e3 * one for one in found.edits])
        add(
            f"policy edit at {CHURN_PER_S + HEARTBEATS_PER_S} events a second",
            "ms",
            [1e3 * one for one in found.edits_in_churn],
        )
        add(f"processor share at {CHURN_PER_S + HEARTBEATS_PER_S} events a second", "%", [100 * found.churn_share])
        add("processor share at rest", "%", [100 * found.rest_share])
        for name, figure in found.memory.items():
            add(f"memory {name}", "bytes", [figure])
    progress.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="", help="PODSxPOLICIES[xLOCAL] by commas")
    parser.add_argument("--edits", type=int, default=100, help="policy edits without churn")
    parser.add_argument("--churn", type=float, default=20.0, metavar="SECONDS", help="how long edits are made in churn")
    parser.add_argument("-o", "--output", type=Path, help="write the result to this file")
    options = parser.parse_args(argv)
    run = begin(this_command())
    began = time.monotonic()
    sizes = [parse_size(one) for one in options.sizes.split(",")] if options.sizes else SIZES
    run_suite(run, sizes=sizes, edits=options.edits, churn_s=options.churn)
    run.seconds = round(time.monotonic() - began, 1)
    for case in run.cases:
        figure = f"{case.median:.4g} {case.unit}"
        if len(case.samples) > 1:
            figure += f" (p50), {percentile(case.samples, 0.99):.4g} {case.unit} (p99), {max(case.samples):.4g} {case.unit} (most)"
        print(f"{case.name}, {case.parameters['pods']} pods, {case.parameters['policies']} policies: {figure}")
    if options.output is not None:
        save(run, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
