# SPDX-License-Identifier: Apache-2.0
"""The loads: what traffic is sent, by which tool, and the figures of a measurement, with the processor time.

Packaged tools are used where one exists: iperf3 for streams and datagrams, sockperf for requests and responses with
percentiles. `connload.c`, which gcc compiles at the start, opens and closes connections.

Requests and responses run with both ends on one processor. Their rate is then the reciprocal of the time that they
cost, without the time to wake another processor. Streams and datagrams run with sender and receiver on two processors.

Invariant: a tool that fails, or a result without the wanted figure, is an error, and never counts as zero.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from bench.record import LESS, MORE
from bench.site import MEASURED_HOST, PEER_HOST, Site, wait_until
from netpol_ebpf.errors import PlatformError

IPERF_PORT, SOCKPERF_PORT, CONNECT_PORT = 5201, 5202, 5203
STREAMS = 4
SLACK_S = 20.0
NS_PER_S = 1_000_000_000

BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Columns of the cpu line of /proc/stat: user, nice, system, irq, softirq, steal."""


@dataclass(frozen=True, slots=True)
class Load:
    """A kind of traffic.

    ``tool``: the program that it needs. ``cpus``: the processors of client and server; (): any.
    """

    name: str
    tool: str
    unit: str
    better: str
    cpus: tuple[int, int]


TCP_1 = Load("tcp, 1 stream", "iperf3", "bit/s", MORE, (0, 1))
TCP_N = Load(f"tcp, {STREAMS} streams", "iperf3", "bit/s", MORE, (0, 1))
UDP_64 = Load("udp, 64 bytes", "iperf3", "1/s", MORE, (0, 1))
UDP_1400 = Load("udp, 1400 bytes", "iperf3", "1/s", MORE, (0, 1))
REQUESTS = Load("tcp, request and response", "sockperf", "1/s", MORE, (0, 0))
CONNECTS = Load("tcp, connect and close", "gcc", "1/s", MORE, (0, 0))
LOADS = (TCP_1, TCP_N, UDP_64, UDP_1400, REQUESTS, CONNECTS)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a measurement. ``name``: "" for the load's main figure. ``judged``: as in `bench.record.Case`."""

    name: str
    value: float
    unit: str
    better: str
    judged: bool = True


def build_connload(directory: Path) -> Path:
    """Compile connload.c. Raises PlatformError without gcc."""
    if shutil.which("gcc") is None:
        raise PlatformError("gcc is not installed", hint="Install it, or leave connect and close out with --loads.")
    program = directory / "connload"
    source = Path(__file__).with_name("connload.c")
    done = subprocess.run(
        ["gcc", "-O2", "-Wall", "-o", str(program), str(source)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise PlatformError(f"{source.name} does not compile: {done.stderr.strip()[:400]}")
    return program


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """Yield a directory with the compiled tool. It is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="netpol-bench-") as name:
        directory = Path(name)
        if shutil.which("gcc") is not None:
            build_connload(directory)
        yield directory


def servers(address: IPv4Address, tools: Path) -> dict[str, list[str]]:
    """The command of each tool's server, by tool."""
    listed = {
        "iperf3": ["iperf3", "--server", "--bind", str(address), "--port", str(IPERF_PORT)],
        "sockperf": ["sockperf", "server", "--tcp", "-i", str(address), "-p", str(SOCKPERF_PORT)],
        "gcc": [str(tools / "connload"), "serve", str(address), str(CONNECT_PORT)],
    }
    return {tool: command for tool, command in listed.items() if shutil.which(tool) is not None}


def ports(tool: str) -> int:
    """The TCP port on which the server of a tool listens."""
    return {"iperf3": IPERF_PORT, "sockperf": SOCKPERF_PORT, "gcc": CONNECT_PORT}[tool]


class Traffic:
    """Runs the loads between the two ends of a site. Each measurement starts its own server."""

    def __init__(self, site: Site, tools: Path) -> None:
        self._site = site
        self._tools = tools
        self._remote = site.scenario.remote
        self._client = PEER_HOST if self._remote is None else MEASURED_HOST
        self._target = site.scenario.measured if self._remote is None else self._remote.peer

    def measure(self, load: Load, seconds: float) -> list[Figure]:
        """Run a load for ``seconds``. Raises PlatformError if its tool fails."""
        client_cpu, server_cpu = load.cpus
        with self._server(load.tool, _cpu(server_cpu)) as server:
            before = self._meter(server)
            figures = self._run(load, seconds, _cpu(client_cpu))
            after = self._meter(server)
        packets = after["packets"] - before["packets"]
        if packets <= 0:
            raise PlatformError(f"{load.name}: no packet went through {self._client}")
        figures += [
            Figure(
                "cpu per packet, whole machine",
                (after["machine"] - before["machine"]) / packets,
                "ns",
                LESS,
                judged=False,
            ),
            Figure("cpu per packet, client and server", (after["ends"] - before["ends"]) / packets, "ns", LESS),
        ]
        return figures

    # --- running --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _server(self, tool: str, cpu: int) -> Iterator[subprocess.Popen[bytes] | None]:
        """The server of one measurement.

        It ends with it, because an idle server of another contender could take processor time.
        """
        if self._remote is not None:
            yield None  # the server runs on the other machine
            return
        lab, port = self._site.lab, ports(tool)
        process = lab.start(MEASURED_HOST, [*_pinned(cpu), *servers(self._target, self._tools)[tool]])

        def listening() -> bool:
            if process.poll() is not None:
                raise PlatformError(f"the server of {tool} ended at once, with {process.returncode}")
            return bool(lab.run(MEASURED_HOST, ["ss", "-Hltn", f"sport = :{port}"]).stdout)

        try:
            wait_until(listening, f"{tool} listens on port {port}")
            yield process
        finally:
            lab.stop(process)

    def _run(self, load: Load, seconds: float, cpu: int) -> list[Figure]:
        if load.tool == "iperf3":
            return self._iperf(load, seconds, cpu)
        if load.tool == "sockperf":
            return self._sockperf(load, seconds, cpu)
        text = self._call(
            [str(self._tools / "connload"), "load", str(self._target), str(CONNECT_PORT), str(seconds)], cpu
        )
        seen = json.loads(text)
        return [
            Figure("", seen["connections"] / seen["seconds"], load.unit, load.better),
            *(
                Figure(f"latency {name}", seen[f"{name}_us"], "µs", LESS, name == "p50")
                for name in ("p50", "p90", "p99")
            ),
        ]

    def _iperf(self, load: Load, seconds: float, cpu: int) -> list[Figure]:
        options = {
            TCP_1: [],
            TCP_N: ["--parallel", str(STREAMS)],
            UDP_64: ["--udp", "--bandwidth", "0", "--length", "64"],
            UDP_1400: ["--udp", "--bandwidth", "0", "--length", "1400"],
        }[load]
        duration = str(max(1, round(seconds)))
        command = ["iperf3", "--client", str(self._target), "--port", str(IPERF_PORT), "--time", duration, "--json"]
        report = json.loads(self._call([*command, *options], cpu))
        if "error" in report:
            raise PlatformError(f"{load.name}: iperf3: {report['error']}")
        end = report["end"]
        if load in (TCP_1, TCP_N):
            return [Figure("", float(end["sum_received"]["bits_per_second"]), load.unit, load.better)]
        sent = end["sum"]
        rate = sent["packets"] / sent["seconds"]
        return [
            Figure("", rate, load.unit, load.better),
            Figure("delivered", rate * (1 - sent["lost_percent"] / 100), load.unit, load.better, judged=False),
        ]

    def _sockperf(self, load: Load, seconds: float, cpu: int) -> list[Figure]:
        duration = str(max(1, round(seconds)))
        command = ["sockperf", "ping-pong", "--tcp", "-i", str(self._target), "-p", str(SOCKPERF_PORT), "-m", "64"]
        text = self._call([*command, "-t", duration, "--full-rtt"], cpu)
        valid = re.search(r"Valid Duration\] RunTime=([\d.]+) sec; SentMessages=\d+; ReceivedMessages=(\d+)", text)
        if valid is None:
            raise PlatformError(f"{load.name}: sockperf reports no valid observations: {text.strip()[-200:]}")
        figures = [Figure("", int(valid[2]) / float(valid[1]), load.unit, load.better)]
        for name, written in (("p50", "50.000"), ("p90", "90.000"), ("p99", "99.000"), ("p99.9", "99.900")):
            found = re.search(rf"percentile {re.escape(written)} =\s*([\d.]+)", text)
            if found is None:
                raise PlatformError(f"{load.name}: sockperf reports no percentile {written}")
            figures.append(Figure(f"latency {name}", float(found[1]), "µs", LESS, name == "p50"))
        return figures

    def _call(self, command: Sequence[str], cpu: int) -> str:
        done = self._site.lab.run(self._client, [*_pinned(cpu), *command], timeout_s=SLACK_S + 10, check=False)
        if done.returncode != 0 and not done.stdout.lstrip().startswith("{"):
            message = (done.stderr or done.stdout).strip()[-300:]
            raise PlatformError(f"{Path(command[0]).name} from {self._client} ({self._site.contender}): {message}")
        return done.stdout

    # --- metering -------------------------------------------------------------------------------------------------------

    def _meter(self, server: subprocess.Popen[bytes] | None) -> Mapping[str, float]:
        """The packets of the client's interface so far, and the processor time (ns) of the machine and of both ends."""
        children = os.times()
        ends = (children.children_user + children.children_system) * NS_PER_S
        if server is not None:
            ends += _process_ns(server.pid)
        done = self._site.lab.run(self._client, ["ip", "-j", "-s", "link", "show", "dev", "eth0"])
        seen: dict[str, Any] = json.loads(done.stdout)[0]["stats64"]
        packets = seen["rx"]["packets"] + seen["tx"]["packets"]
        return {"packets": packets, "machine": _machine_ns(), "ends": ends}


def _cpu(wanted: int) -> int:
    """The processor ``wanted``, or the last one that this process may use if there are fewer."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[min(wanted, len(allowed) - 1)]


def _pinned(cpu: int) -> list[str]:
    return ["taskset", "--cpu-list", str(cpu)]


def _machine_ns() -> float:
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    return sum(int(fields[place]) for place in BUSY_FIELDS) * NS_PER_S / os.sysconf("SC_CLK_TCK")


def _process_ns(pid: int) -> float:
    """The processor time of a process and of the children that it waited for, in ns."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) * NS_PER_S / os.sysconf("SC_CLK_TCK")
