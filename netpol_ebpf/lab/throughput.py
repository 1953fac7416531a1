# SPDX-License-Identifier: Apache-2.0
"""Measures the throughput between two hosts, and compares two such pairs of hosts.

Invariant: a comparison measures the two pairs alternately and compares successive measurements, so that other load of
the machine affects both pairs alike. This module needs iperf3 and ss (iproute2).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from dataclasses import dataclass

from netpol_ebpf.errors import PlatformError
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.topology import IPAddress

LISTEN_DEADLINE_S = 5.0
POLL_S = 0.02
SLACK_S = 15.0  # added to the time limit of a measurement: iperf3 also connects and reports, on a busy machine slowly


@dataclass(frozen=True, slots=True)
class Pair:
    """A client and a server to measure.

    ``address``, ``port``: where iperf3 listens; no other server may use the TCP port.
    """

    client: str
    server: str
    address: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All measurements with and without enforcement, in bits per second.

    Measurements with the same index were made one directly after the other.
    """

    with_samples: tuple[float, ...]
    without_samples: tuple[float, ...]

    @property
    def with_bps(self) -> float:
        """Median throughput with enforcement."""
        return statistics.median(self.with_samples)

    @property
    def without_bps(self) -> float:
        """Median throughput without enforcement."""
        return statistics.median(self.without_samples)

    @property
    def ratio(self) -> float:
        """The share of the throughput that remains with enforcement: the median ratio of successive measurements."""
        return statistics.median(
            one / other for one, other in zip(self.with_samples, self.without_samples, strict=True)
        )


def compare(lab: Lab, with_pair: Pair, without_pair: Pair, *, rounds: int = 5, seconds: int = 1) -> Comparison:
    """Measure both pairs alternately, ``rounds`` times each, for ``seconds`` each time.

    Raises PlatformError if iperf3 fails.
    """
    servers: list[subprocess.Popen[bytes]] = []
    samples: tuple[list[float], list[float]] = ([], [])
    try:
        for pair in (with_pair, without_pair):
            servers.append(_start_server(lab, pair))
            _wait_for_listener(lab, pair, servers[-1])
        for turn in range(rounds):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for side in order:
                samples[side].append(_measure(lab, (with_pair, without_pair)[side], seconds))
    finally:
        for server in servers:
            lab.stop(server)
    return Comparison(tuple(samples[0]), tuple(samples[1]))


def _start_server(lab: Lab, pair: Pair) -> subprocess.Popen[bytes]:
    return lab.start(pair.server, ["iperf3", "--server", "--bind", str(pair.address), "--port", str(pair.port)])


def _wait_for_listener(lab: Lab, pair: Pair, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + scaled(LISTEN_DEADLINE_S)
    while not lab.run(pair.server, ["ss", "-Hltn", f"sport = :{pair.port}"]).stdout:
        if process.poll() is not None or time.monotonic() > deadline:
            raise PlatformError(f"iperf3 does not listen on {pair.address} port {pair.port} of {pair.server}")
        time.sleep(POLL_S)


def _measure(lab: Lab, pair: Pair, seconds: int) -> float:
    command = ["iperf3", "--client", str(pair.address), "--port", str(pair.port), "--time", str(seconds), "--json"]
    done = lab.run(pair.client, command, timeout_s=seconds + SLACK_S, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError as error:
        raise PlatformError(f"iperf3 from {pair.client} gave no report: {done.stderr.strip()}") from error
    if "error" in report:
        raise PlatformError(f"iperf3 from {pair.client} to {pair.address} port {pair.port}: {report['error']}")
    return float(report["end"]["sum_received"]["bits_per_second"])
