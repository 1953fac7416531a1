# SPDX-License-Identifier: Apache-2.0
"""How fast a pair of hosts talks, and how two pairs compare.

Invariant: a comparison interleaves its measurements and goes by medians of each side, so that what else the machine does
meets both sides alike.  Needs iperf3 and ss (iproute2).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from dataclasses import dataclass

from netpol_ebpf.errors import PlatformError
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import IPAddress

LISTEN_DEADLINE_S = 5.0
POLL_S = 0.02
SLACK_S = 15.0  # for iperf3 to connect and to report, on a busy machine


@dataclass(frozen=True, slots=True)
class Pair:
    """From where to where: a client, a server, the server's address and TCP port (nothing else may listen there)."""

    client: str
    server: str
    address: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians in bits per second; ``samples`` are all measurements of each side, in the order made."""

    with_bps: float
    without_bps: float
    samples: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def ratio(self) -> float:
        """Share of the throughput without that is left with."""
        return self.with_bps / self.without_bps


def compare(lab: Lab, with_pair: Pair, without_pair: Pair, *, rounds: int = 3, seconds: int = 1) -> Comparison:
    """Measure both pairs in turn, ``rounds`` times each. Raises PlatformError when iperf3 fails."""
    servers = [_serve(lab, pair) for pair in (with_pair, without_pair)]
    samples: tuple[list[float], list[float]] = ([], [])
    try:
        for turn in range(rounds):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for side in order:
                samples[side].append(_measure(lab, (with_pair, without_pair)[side], seconds))
    finally:
        for server in servers:
            lab.stop(server)
    medians = [statistics.median(side) for side in samples]
    return Comparison(medians[0], medians[1], (tuple(samples[0]), tuple(samples[1])))


def _serve(lab: Lab, pair: Pair) -> subprocess.Popen[bytes]:
    process = lab.start(pair.server, ["iperf3", "--server", "--bind", str(pair.address), "--port", str(pair.port)])
    deadline = time.monotonic() + LISTEN_DEADLINE_S
    while not lab.run(pair.server, ["ss", "-Hltn", f"sport = :{pair.port}"]).stdout:
        if process.poll() is not None or time.monotonic() > deadline:
            raise PlatformError(f"iperf3 does not listen on {pair.address} port {pair.port} of {pair.server}")
        time.sleep(POLL_S)
    return process


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
