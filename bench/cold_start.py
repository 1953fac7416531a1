# SPDX-License-Identifier: Apache-2.0
"""Measure how long an agent takes from an empty node until policy is in force, and its memory, on a node with 20 pods.

    python -m bench.cold_start [--pods 20] [--starts 5] [-o json]

Each start finds no pins and no state, in a laboratory of namespaces. The compiled program exists already: if it does
not, the first start makes it, and that start is not counted. The agent runs with ``--once``, so it exits when
everything is in force. The seconds are those of the whole process, including the start of Python. The memory is the
largest resident memory of the process, and that of its largest child. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from ipaddress import ip_address
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "loader")]

from bench.end_to_end import ended_by  # noqa: E402
from netpol_ebpf.lab.laboratory import Lab  # noqa: E402
from netpol_ebpf.lab.topology import Host  # noqa: E402

NODE = "node-1"
NODE_MANIFEST = """\
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 172.30.0.10}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: some, namespace: shop}
spec:
  podSelector: {matchLabels: {tier: "1"}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {tier: "2"}}}], ports: [{port: 5432}]}]
  egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.9.0.0/16]}}]}]
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: pod-{n}, namespace: shop, labels: {{app: pod-{n}, tier: "{tier}"}}}}
spec: {{nodeName: node-1, containers: [{{name: c, image: x}}]}}
status: {{podIPs: [{{ip: 10.1.0.{n}}}, {{ip: "fd00:1::{n}"}}]}}
"""
BYTES_IN_KIB = 1024


def start(lab: Lab, manifests: Path) -> tuple[float, float, int]:
    """One start from an empty node, as (seconds, seconds of processor time, bytes).

    Raises SystemExit if the agent fails.
    """
    state = Path(tempfile.mkdtemp(prefix="netpol-cold-"))
    pins = Path(f"/sys/fs/bpf/netpol-cold-{os.getpid()}")
    command = lab.command(
        NODE,
        [
            sys.executable, "-m", "netpol_ebpf.agent.main", "--config", "none", "--once", "--manifests", str(manifests), "--node", NODE,
            "--pin-root", str(pins), "--state-dir", str(state),
        ],
    )  # fmt: skip
    try:
        began = time.monotonic()
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[
            (os.POSIX_SPAWN_OPEN, 2, str(state / "log"), os.O_WRONLY | os.O_CREAT, 0o600)
        ])  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
        seconds = time.monotonic() - began
        if status != 0:
            raise SystemExit(
                f"the agent ended with {os.waitstatus_to_exitcode(status)}:\n{(state / 'log').read_text()}"
            )
        return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * BYTES_IN_KIB
    finally:
        lab.run(NODE, [sys.executable, "-m", "netpol_ebpf.cli.main", "cleanup", "--pin-root", str(pins),
                       "--state-dir", str(state)])  # fmt: skip
        shutil.rmtree(state, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Build the node, start the agent several times, print the results, and remove the node."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pods", type=int, default=20)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    options = parser.parse_args(argv)
    pods = [
        Host(f"shop/pod-{n}", NODE, (ip_address(f"10.1.0.{n}"), ip_address(f"fd00:1::{n}")))
        for n in range(1, options.pods + 1)
    ]
    node = Host(NODE, None, (ip_address("172.30.0.10"),))
    with tempfile.TemporaryDirectory() as manifests, Lab([node, *pods]) as lab:
        text = NODE_MANIFEST + "".join(POD.format(n=n, tier=n % 3) for n in range(1, options.pods + 1))
        (Path(manifests) / "cluster.yaml").write_text(text)
        start(lab, Path(manifests))
        found = [start(lab, Path(manifests)) for _ in range(options.starts)]
    result = {
        "pods": options.pods,
        "seconds": [round(seconds, 2) for seconds, _, _ in found],
        "processor_seconds": [round(processor, 2) for _, processor, _ in found],
        "peak_bytes": [peak for _, _, peak in found],
    }
    if options.output == "json":
        print(json.dumps(result))
        return 0
    seconds, processor, peak = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        f"{options.pods} pods, {options.starts} starts, medians: {seconds:.2f} s, {processor:.2f} s of processor time, "
        f"{peak / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
