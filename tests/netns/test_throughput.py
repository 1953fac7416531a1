# SPDX-License-Identifier: Apache-2.0
"""The comparison of the throughput of two pairs of hosts: it measures, and reports why if it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from netpol_ebpf.errors import PlatformError
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.throughput import Comparison, Pair, compare
from netpol_ebpf.lab.topology import TCP, Host, Listen

pytestmark = pytest.mark.netns

BUSY_PORT = 5434


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A router and two hosts. The second one also echoes on a port of its own."""
    if shutil.which("iperf3") is None:
        pytest.skip("iperf3 is not installed")
    hosts = [
        Host("router", None, ()),
        Host("client", "router", (ip_address("10.0.0.1"),)),
        Host("server", "router", (ip_address("10.0.0.2"),), (Listen(TCP, BUSY_PORT),)),
    ]
    with Lab(hosts) as built:
        yield built


def pair(client: str, port: int) -> Pair:
    return Pair(client, "server", ip_address("10.0.0.2"), port)


def test_each_side_is_measured_in_turn(lab: Lab) -> None:
    """Each side has as many positive figures as rounds."""
    result = compare(lab, pair("client", 5201), pair("client", 5202), rounds=2, seconds=1)
    assert len(result.with_samples) == len(result.without_samples) == 2
    assert min(result.with_samples + result.without_samples) > 0


def test_ratio_is_that_of_neighbours() -> None:
    """A machine that becomes slower meanwhile does not change the ratio."""
    result = Comparison((100.0, 50.0, 10.0), (200.0, 100.0, 20.0))
    assert result.ratio == 0.5
    assert (result.with_bps, result.without_bps) == (50.0, 100.0)


def test_a_port_that_is_taken_is_reported(lab: Lab) -> None:
    """The server ends at once. The error names host, address and port, and no server remains."""
    with pytest.raises(PlatformError, match=f"10.0.0.2 port {BUSY_PORT}"):
        compare(lab, pair("client", BUSY_PORT), pair("client", 5202), rounds=1)
    assert "iperf3" not in lab.run("server", ["ss", "-Hltnp"]).stdout


def test_a_client_that_cannot_connect_is_reported(lab: Lab) -> None:
    """The error has iperf3's message."""
    lab.run("router", ["ip", "rule", "add", "pref", "10", "to", "10.0.0.2", "prohibit"])
    try:
        with pytest.raises(PlatformError, match="iperf3 from client to 10.0.0.2 port 5203: .*connect"):
            compare(lab, pair("client", 5203), pair("client", 5204), rounds=1)
    finally:
        lab.run("router", ["ip", "rule", "del", "pref", "10"])
