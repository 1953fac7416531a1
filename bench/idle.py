# SPDX-License-Identifier: Apache-2.0
"""Measure a real netpol-agent on a node of the laboratory while nothing changes: its processor time and its memory.

Invariant: the measurement begins only when the agent is ready and at rest, so that its start is not counted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.cluster import Size, objects
from bench.record import LESS, Case, Run
from bench.site import BPFFS, NODE_ADDRESS, NODE_HOST, wait_until
from netpol_ebpf.agent.control_socket import SOCKET_NAME
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import Host

SUITE = "control plane"
SIZE = Size(1000, 100, 10)
READY_DEADLINE_S = 120.0
REST_S = 0.5
"""The agent counts as at rest if it took no tick of processor time for this time, in seconds."""


def run_suite(run: Run, *, windows: int, seconds: float) -> None:
    """Observe an agent for ``windows`` windows: the share of a processor that it takes in each, and its memory."""
    with tempfile.TemporaryDirectory(prefix="netpol-bench-idle-") as name:
        workshop = Path(name)
        manifests, state = workshop / "manifests", workshop / "state"
        manifests.mkdir()
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects(SIZE))}
        (manifests / "cluster.json").write_text(json.dumps(listed), encoding="utf-8")
        pins = BPFFS / f"netpol-bench-idle-{os.getpid()}"
        with Lab([Host(NODE_HOST, None, (NODE_ADDRESS,))], directories=[pins]) as lab:
            command = [
                sys.executable,
                "-m",
                "netpol_ebpf.agent.main",
                "--config",
                "none",
                "--manifests",
                str(manifests),
                "--node",
                "node-0",
            ]
            agent = lab.start(NODE_HOST, [*command, "--pin-root", str(pins), "--state-dir", str(state)])
            wait_until((state / SOCKET_NAME).exists, "netpol-agent is ready", READY_DEADLINE_S)
            wait_until(lambda: _share(agent.pid, REST_S) == 0, "netpol-agent comes to rest", READY_DEADLINE_S)
            shares = [_share(agent.pid, seconds) for _ in range(windows)]
            resident = _resident_bytes(agent.pid)
            lab.stop(agent)
    parameters = {"pods": SIZE.pods, "policies": SIZE.policies}
    for figure, unit, samples in (("processor share", "%", shares), ("memory", "bytes", [resident])):
        run.cases.append(
            Case(SUITE, f"idle agent: {figure}", "netpol-ebpf", unit, LESS, tuple(samples), parameters, judged=False)
        )


def _share(pid: int, seconds: float) -> float:
    """The processor time that a process takes in ``seconds``, in percent of one processor."""
    before = processor_s(pid)
    time.sleep(seconds)
    return 100 * (processor_s(pid) - before) / seconds


def processor_s(pid: int) -> float:
    """The processor time that a process has taken so far, in seconds, with the resolution of a clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
