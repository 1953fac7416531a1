# SPDX-License-Identifier: Apache-2.0
"""Floods of new flows against open connections, through the loaded program."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from one_cpu import on_one_cpu
from packets import ACK, SYN, TCP, frame, tcp
from rig import ALLOW, DENY, ELSEWHERE, POD4, POD6, Rig, everything

from netpol_loader import abi
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.pins.dataplane import Dataplane

pytestmark = pytest.mark.kernel

FLOWS_SHORT, FLOWS_LONG = 100_000, 1_000_000
OPEN = 500
ROOM = 4096
SIZES = {
    "np_endpoint": 64, "np_addr4": 4096, "np_addr6": 4096, "np_cidr4": 1024, "np_cidr6": 1024, "np_peer_class": 1024,
    "np_l4_col": 256, "np_verdict": 4096, "np_rule": 256, "np_rule_count": 256, "np_log_limit": 16,
    "np_conn4": ROOM, "np_conn6": ROOM, "np_frag4": 256, "np_frag6": 256,
    "np_event": 65536,
}  # fmt: skip
FLOW_MAPS = (*abi.maps_with_rows(abi.MapRole.CONNECTION), *abi.UNREPLIED_VIEWS.values(), "np_event")
PEER = {4: "192.0.2.1", 6: "2001:db8::1"}
POD = {4: POD4, 6: POD6}


@pytest.fixture(scope="module")
def dataplane() -> Iterator[Dataplane]:
    one = Dataplane.open(Path(f"/sys/fs/bpf/netpol-test-flood-{os.getpid()}"), sizes=SIZES)
    yield one
    one.remove()


@pytest.fixture(scope="module")
def loaded_rig(dataplane: Dataplane) -> Iterator[Rig]:
    with on_one_cpu():
        rig = Rig(dataplane)
        yield rig
        rig.reader.close()


@pytest.fixture
def rig(loaded_rig: Rig) -> Rig:
    loaded_rig.reset()
    return loaded_rig


@pytest.fixture
def flows(is_long: bool) -> int:  # noqa: FBT001
    """The number of flows in a flood."""
    return FLOWS_LONG if is_long else FLOWS_SHORT


def open_connections(rig: Rig, version: int, count: int = OPEN) -> list[bytes]:
    """Open connections of the pod that were answered. Returns a later packet of each."""
    packets = []
    for port in range(20_000, 20_000 + count):
        begin = frame(POD[version], PEER[version], TCP, tcp(port, 443, SYN))
        assert rig.dataplane.test_run(Hook.TC_INGRESS, begin).passed
        answer = frame(PEER[version], POD[version], TCP, tcp(443, port, SYN | ACK))
        assert rig.dataplane.test_run(Hook.TC_EGRESS, answer, ingress_ifindex=ELSEWHERE).passed
        packets.append(frame(POD[version], PEER[version], TCP, tcp(port, 443, ACK)))
    return packets


def flood(dataplane: Dataplane, version: int, count: int) -> int:
    """Send SYNs of the pod, each of another flow. Returns the number that passed."""
    packet = bytearray(frame(POD[version], "198.18.0.0" if version == 4 else "2001:db8:1::", TCP, tcp(1, 80, SYN)))
    at = packet.index(ip_address(POD[version]).packed)
    host_at, port_at = at + (4 if version == 4 else 16) + (2 if version == 4 else 14), at + (8 if version == 4 else 32)
    passed = 0
    for number in range(count):
        struct.pack_into("!H", packet, host_at, number // 50_000)
        struct.pack_into("!H", packet, port_at, 1024 + number % 50_000)
        passed += dataplane.test_run(Hook.TC_INGRESS, bytes(packet)).passed
    return passed


def memory_bytes(one: Map) -> int:
    """The memory of a map as the kernel reports it."""
    lines = Path(f"/proc/self/fdinfo/{one.fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("memlock:"))


def footprint(rig: Rig) -> dict[str, int]:
    return {name: memory_bytes(rig.map(name)) for name in FLOW_MAPS}


def reason(rig: Rig, number: int) -> int:
    return rig._counts("np_reason_count")[number]


def still_open(rig: Rig, packets: list[bytes]) -> int:
    """The number of connections whose packets pass because they are open.

    Policy would deny each of them as a new flow.
    """
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12))  # same generation: open connections are not judged
    return sum(rig.dataplane.test_run(Hook.TC_INGRESS, packet).passed for packet in packets)


@pytest.mark.parametrize("version", [4, 6])
def test_allowed_flood(rig: Rig, flows: int, version: int) -> None:
    """New flows that policy allows evict each other, but no open connection. The memory does not grow."""
    rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    packets, before = open_connections(rig, version), footprint(rig)
    assert flood(rig.dataplane, version, flows) == flows
    assert footprint(rig) == before
    rig.forget_flow_cache()
    assert still_open(rig, packets) == OPEN


@pytest.mark.parametrize("version", [4, 6])
def test_denied_flood(rig: Rig, flows: int, version: int) -> None:
    """New flows that policy denies leave no entry. Each is counted, and each event is reported or counted as lost."""
    rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    packets, before = open_connections(rig, version), footprint(rig)
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12))
    unreplied = sum(1 for _ in rig.map(f"np_unreplied{version}").items())
    rig.reader.consume()
    rig.events.clear()
    denied, lost = reason(rig, abi.NP_REASON_POLICY_DENY), reason(rig, abi.NP_REASON_EVENT_LOST)
    assert flood(rig.dataplane, version, flows) == 0
    rig.reader.consume()
    lost = reason(rig, abi.NP_REASON_EVENT_LOST) - lost
    assert reason(rig, abi.NP_REASON_POLICY_DENY) - denied == flows
    assert lost > 0
    assert len(rig.events) + lost == flows
    assert sum(1 for _ in rig.map(f"np_unreplied{version}").items()) == unreplied
    assert footprint(rig) == before
    rig.forget_flow_cache()
    assert still_open(rig, packets) == OPEN
    print(f"{flows} denied flows over IPv{version}: {len(rig.events)} events read, {lost} counted as lost")
