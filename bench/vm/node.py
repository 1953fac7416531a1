# SPDX-License-Identifier: Apache-2.0
"""One of two nodes that a link joins: its pods, its agent, and the measurements between the nodes. Runs inside a guest.

Each node has two pods. One is in the manifests, so the agent enforces policy at its interface. The other one is not, so
no program is attached to its interface. Both pairs of pods communicate over the same link in the same run, in turns.
The cost of the link and of the emulation affects both alike, so their ratio is the cost of enforcement.

Invariant: measurements begin only after policy was seen at work: what policy denies gets no answer for the one pair,
and an answer for the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import SOCKET_NAME, ask
from netpol_ebpf.errors import PlatformError, UnreachableError
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.topology import PARENT_MAC, Host

UPLINK = "eth0"
WORKLOADS = "cali*"
GATEWAY = "169.254.1.1"
CONTROL_PORT = 7000
IPERF_PORT, SOCKPERF_PORT, DENIED_PORT = 5201, 5202, 5209
DEADLINE_S = 60.0
CONNECT_S = 2.0
POLL_S = 0.05
SLACK_S = 60.0

ENFORCED, FREE = "with enforcement", "without"
STREAM, TCP_REQUESTS, UDP_REQUESTS = "tcp stream", "tcp request and response", "udp request and response"
MORE_IS_BETTER = {STREAM: True, TCP_REQUESTS: False, UDP_REQUESTS: False}
UNITS = {STREAM: "bit/s", TCP_REQUESTS: "µs", UDP_REQUESTS: "µs"}


@dataclass(frozen=True, slots=True)
class Place:
    """One of the two nodes. ``pods``: one pod for each side, in the order of the sides."""

    name: str
    address: IPv4Address
    pods: dict[str, IPv4Address]


CLIENTS = Place(
    "node-1", IPv4Address("172.30.0.10"), {ENFORCED: IPv4Address("10.1.0.1"), FREE: IPv4Address("10.1.0.2")}
)
SERVERS = Place(
    "node-2", IPv4Address("172.30.0.20"), {ENFORCED: IPv4Address("10.2.0.1"), FREE: IPv4Address("10.2.0.2")}
)

MANIFESTS = f"""\
apiVersion: v1
kind: Node
metadata: {{name: {CLIENTS.name}}}
status: {{addresses: [{{type: InternalIP, address: {CLIENTS.address}}}]}}
---
apiVersion: v1
kind: Node
metadata: {{name: {SERVERS.name}}}
status: {{addresses: [{{type: InternalIP, address: {SERVERS.address}}}]}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: bench}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: bench, labels: {{app: client}}}}
spec: {{nodeName: {CLIENTS.name}, containers: [{{name: c, image: x}}]}}
status: {{podIPs: [{{ip: {CLIENTS.pods[ENFORCED]}}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: bench, labels: {{app: server}}}}
spec: {{nodeName: {SERVERS.name}, containers: [{{name: c, image: x}}]}}
status: {{podIPs: [{{ip: {SERVERS.pods[ENFORCED]}}}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: server, namespace: bench}}
spec:
  podSelector: {{matchLabels: {{app: server}}}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{{podSelector: {{matchLabels: {{app: client}}}}}}]
    ports: [{{port: {IPERF_PORT}}}, {{port: {SOCKPERF_PORT}}}, {{port: {SOCKPERF_PORT}, protocol: UDP}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: client, namespace: bench}}
spec:
  podSelector: {{matchLabels: {{app: client}}}}
  policyTypes: [Ingress, Egress]
  egress:
  - to: [{{podSelector: {{matchLabels: {{app: server}}}}}}]
"""


def serve() -> int:
    """Run the node of the servers.

    Everything is up when the control port answers. It ends with the other node's connection.
    """
    with _node(SERVERS, CLIENTS), contextlib.ExitStack() as running:
        for side, address in SERVERS.pods.items():
            for command in _servers(address):
                running.enter_context(_process(_inside(side, command)))
        with socket.create_server((str(SERVERS.address), CONTROL_PORT)) as listener:
            listener.settimeout(scaled(DEADLINE_S))
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(None)  # no time limit here, because the guest's step has one
                connection.recv(1)
    print(json.dumps({"served": True}))
    return 0


def measure(rounds: str, seconds: str) -> int:
    """Run the node of the clients: prove that policy is at work, measure in turns, print every sample."""
    with _node(CLIENTS, SERVERS), _control():
        _prove()
        samples: dict[str, dict[str, list[float]]] = {name: {ENFORCED: [], FREE: []} for name in UNITS}
        for turn in range(int(rounds)):
            for name, taken in samples.items():
                for side in (ENFORCED, FREE) if turn % 2 == 0 else (FREE, ENFORCED):
                    taken[side].append(_measure(name, side, int(seconds)))
    print(json.dumps({"kernel": os.uname().release, "samples": samples}))
    return 0


# --- the node -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _node(here: Place, there: Place) -> Iterator[None]:
    """Create the node's link and pods, and run an agent that enforces.

    The guest ends with the run, so only the agent is stopped.
    """
    subprocess.run(["modprobe", "--quiet", "virtio_net"], check=False)  # may fail: some kernels have it built in
    _wait(lambda: Path(f"/sys/class/net/{UPLINK}").exists(), f"{UPLINK} is there")
    for name, value in (("ip_forward", 1), ("conf/all/rp_filter", 0), ("conf/default/rp_filter", 0)):
        Path(f"/proc/sys/net/ipv4/{name}").write_text(str(value))
    lines = [f"address add {here.address}/24 dev {UPLINK}", f"link set {UPLINK} up"]
    lines += [f"route add {address}/32 via {there.address}" for address in there.pods.values()]
    for side, address in here.pods.items():
        device = _device(here, side)
        lines += [
            f"netns add {_namespace(side)}",
            f"link add {device} address {PARENT_MAC} type veth peer name eth0 netns {_namespace(side)}",
            f"link set {device} up",
            f"address add {GATEWAY}/32 dev {device} scope link",
            f"route add {address}/32 dev {device}",
        ]
    _ip(lines)
    for side, address in here.pods.items():
        inside = ["link set lo up", "link set eth0 up", f"address add {address}/32 dev eth0"]
        _ip([*inside, f"route add default via {GATEWAY} dev eth0 onlink"], side)
    with tempfile.TemporaryDirectory() as home, _agent(here, Path(home)):
        yield


def _device(here: Place, side: str) -> str:
    """The name of the node's end of a pod's veth. The agent closes every interface of WORKLOADS without a known pod."""
    pod = "bench/client" if here is CLIENTS else "bench/server"
    return Host(pod, here.name, ()).parent_interface if side == ENFORCED else "free0"


def _namespace(side: str) -> str:
    return "enforced" if side == ENFORCED else "free"


@contextlib.contextmanager
def _agent(here: Place, home: Path) -> Iterator[None]:
    manifests, state = home / "manifests", home / "state"
    manifests.mkdir()
    (manifests / "bench.yaml").write_text(MANIFESTS)
    command = [
        sys.executable, "-m", "netpol_ebpf.agent.main", "--manifests", str(manifests), "--node", here.name,
        "--pin-root", "/sys/fs/bpf/netpol-bench", "--state-dir", str(state), "--workload-interfaces", WORKLOADS,
    ]  # fmt: skip

    with _process(command, output=None) as process:

        def is_in_force() -> bool:
            if process.poll() is not None:
                raise PlatformError(f"netpol-agent ended with code {process.returncode}")
            with contextlib.suppress(UnreachableError):
                for status in ask(state / SOCKET_NAME, {"op": "status"}, timeout_s=scaled(CONNECT_S)):
                    return bool(status["in_force"] and status["objects"]["enforced_endpoints"] == 1)
            return False

        _wait(is_in_force, "policy is in force")
        yield


def _ip(lines: Sequence[str], side: str | None = None) -> None:
    command = ["ip", "-batch", "-"]
    subprocess.run(_inside(side, command) if side else command, input="\n".join(lines) + "\n", text=True, check=True)


def _inside(side: str, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{_namespace(side)}", "--", *command]


@contextlib.contextmanager
def _process(command: Sequence[str], output: int | None = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output) as process:
        try:
            yield process
        finally:
            process.terminate()


def _servers(address: IPv4Address) -> list[list[str]]:
    """The commands of the serving pod. Policy denies connections to the last one."""
    ends = ["-i", str(address), "-p", str(SOCKPERF_PORT)]
    return [
        ["iperf3", "--server", "--bind", str(address), "--port", str(IPERF_PORT)],
        ["sockperf", "server", "--tcp", *ends],
        ["sockperf", "server", *ends],
        ["iperf3", "--server", "--bind", str(address), "--port", str(DENIED_PORT)],
    ]


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + scaled(DEADLINE_S)
    while not condition():
        if time.monotonic() > deadline:
            raise PlatformError(f"not within {scaled(DEADLINE_S):.0f} s: {what}")
        time.sleep(scaled(POLL_S))


@contextlib.contextmanager
def _control() -> Iterator[None]:
    """A connection to the other node. It opens when that node is ready, and its end tells that node to stop."""
    opened: list[socket.socket] = []

    def connect() -> bool:
        with contextlib.suppress(OSError):
            opened.append(socket.create_connection((str(SERVERS.address), CONTROL_PORT), scaled(CONNECT_S)))
        return bool(opened)

    _wait(connect, f"{SERVERS.name} is ready")
    with opened[0]:
        yield


# --- measuring ----------------------------------------------------------------------------------------------------------


def _prove() -> None:
    """Raise PlatformError unless the one pair is subject to policy and the other one is not."""
    for side, port, expected in (
        (FREE, DENIED_PORT, True),
        (ENFORCED, IPERF_PORT, True),
        (ENFORCED, DENIED_PORT, False),
    ):
        if _connects(side, port) != expected:
            raise PlatformError(
                f"{side}: port {port} {'does not answer' if expected else 'answers'}; nothing is measured"
            )


def _connects(side: str, port: int) -> bool:
    program = f"import socket; socket.create_connection(({str(SERVERS.pods[side])!r}, {port}), {scaled(CONNECT_S)})"
    done = subprocess.run(_inside(side, [sys.executable, "-S", "-c", program]), check=False, capture_output=True)
    return done.returncode == 0


def _measure(name: str, side: str, seconds: int) -> float:
    target = str(SERVERS.pods[side])
    if name == STREAM:
        command = ["iperf3", "--client", target, "--port", str(IPERF_PORT), "--time", str(seconds), "--json"]
        report: dict[str, Any] = json.loads(_call(side, command, seconds))
        if "error" in report:
            raise PlatformError(f"{name}, {side}: iperf3: {report['error']}")
        return float(report["end"]["sum_received"]["bits_per_second"])
    protocol = ["--tcp"] if name == TCP_REQUESTS else []
    ends = ["-i", target, "-p", str(SOCKPERF_PORT)]
    text = _call(
        side, ["sockperf", "ping-pong", *protocol, *ends, "-m", "64", "-t", str(seconds), "--full-rtt"], seconds
    )
    found = re.search(r"percentile 50\.000 =\s*([\d.]+)", text)
    if found is None:
        raise PlatformError(f"{name}, {side}: sockperf reports no median: {text.strip()[-300:]}")
    return float(found[1])


def _call(side: str, command: Sequence[str], seconds: int) -> str:
    if shutil.which(command[0]) is None:
        raise PlatformError(f"{command[0]} is not installed", hint=f"apt install {command[0]}")
    done = subprocess.run(
        _inside(side, command), check=False, capture_output=True, text=True, timeout=seconds + SLACK_S
    )  # fmt: skip
    return done.stdout + ("" if done.returncode == 0 else done.stderr)
