# SPDX-License-Identifier: Apache-2.0
"""The node's own interfaces under an agent, on a node in memory: rows before programs, and nothing of what was refused."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from test_agent_core import CLUSTER, POD, POLICY, WIRING, Bench, settle

from netpol_ebpf.agent.trouble import RETRY_S
from netpol_ebpf.agent.wiring import Link
from netpol_ebpf.apply.encode import LocalFlag, Meaning
from netpol_ebpf.errors import MapFullError
from netpol_ebpf.policy.types import EndpointKey
from netpol_loader import abi

HOST = "apiVersion: projectcalico.org/v3\nkind: HostEndpoint\nmetadata: {name: h}\nspec: {node: here, interfaceName: NAME}\n"
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: s, namespace: shop}
spec: {clusterIPs: [10.96.0.1], ports: [{port: 80, nodePort: 30080}]}
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    yield bench
    bench.close()


def test_uplink_has_its_row_before_it_gets_programs(bench: Bench) -> None:
    """The node's own interface is closed at no moment, whoever's policy is for it."""
    agent = bench.agent()
    bench.write("host.yaml", HOST.replace("NAME", "eth0"))
    settle(agent)
    row = bench.node.row(2)
    assert row is not None
    assert (row.flags, row.number) == (
        abi.NP_ENDPOINT_HOST | abi.NP_ENDPOINT_OUTSIDE,
        agent.tables.endpoints[EndpointKey("HostEndpoint", "", "h")].number,
    )
    assert bench.node.rows_when_attached[2]
    assert len(bench.node.in_force["np_host"].rows) == 1
    bench.write("service.yaml", SERVICE)
    bench.remove("host.yaml")
    settle(agent)
    row = bench.node.row(2)
    assert row is not None
    assert row.flags == abi.NP_ENDPOINT_HOST | abi.NP_ENDPOINT_UPLINK | abi.NP_ENDPOINT_OUTSIDE
    assert bench.node.in_force["np_host"].rows == {}
    assert len(bench.node.in_force["np_vip4"].rows) == 2
    assert agent.applier.config_flags & abi.NP_CONFIG_DEFER
    bench.remove("service.yaml")
    settle(agent)
    assert bench.node.row(2) is not None
    assert not agent.applier.config_flags & abi.NP_CONFIG_DEFER
    assert agent.problems == []


def test_pair_within_the_node_is_not_outside(bench: Bench) -> None:
    """What comes in by one end left the node by the other, such as a bridge's packets to its gateway: sources there are judged already."""
    links = {8: Link(8, "cni0", "bridge"), 9: Link(9, "gw0", "veth"), 10: Link(10, "gw1", "veth", master=8)}
    bench.node.wiring = replace(WIRING, links={**WIRING.links, **links})
    bench.write("service.yaml", SERVICE)  # programs at every exit
    bench.agent()
    flags = {ifindex: row.flags for ifindex in (2, *links) if (row := bench.node.row(ifindex)) is not None}
    assert [ifindex for ifindex, one in flags.items() if one & abi.NP_ENDPOINT_OUTSIDE] == [2]
    assert flags.keys() == {2, 9, 10}


def test_services_are_closed_while_an_exit_has_no_program(bench: Bench) -> None:
    """An own interface that cannot get the programs closes services, and says so."""
    bench.node.refuses = {2}
    bench.write("service.yaml", SERVICE)
    agent = bench.agent()
    assert [problem.slug for problem in agent.problems] == ["no-exit"]
    assert len(bench.node.in_force["np_vip4"].rows) == 2
    assert not agent.applier.config_flags & abi.NP_CONFIG_DEFER


def test_host_endpoint_without_its_interface_is_told(bench: Bench) -> None:
    """An object this agent cannot act on is named as a warning, with its place."""
    bench.write("host.yaml", HOST.replace("NAME", "eth9"))
    (problem,) = bench.agent().problems
    assert (problem.severity, problem.slug, problem.obj) == ("warning", "host-endpoint", "HostEndpoint/h")
    assert problem.location.line == 1


def test_node_with_more_addresses_than_room_is_told(bench: Bench) -> None:
    """The addresses that were there stay known; the agent lives, and takes them up when there is room."""
    agent = bench.agent()
    wiring = bench.node.wiring
    bench.node.in_force["np_local4"].max_entries = 2
    many = {ip_address(f"192.0.2.{last}"): Meaning(LocalFlag.OWN, 2) for last in range(1, 4)}
    bench.node.wiring = replace(wiring, meanings=many)
    bench.node.news = True
    agent.step()
    (problem,) = agent.problems
    assert (problem.slug, problem.severity) == ("map-full", "error")
    assert "np_local4 has room for 2 rows; the change needs 3" in problem.message
    bench.node.wiring = replace(wiring, meanings=dict(list(many.items())[:2]))
    bench.node.news = True
    agent.step()
    assert agent.problems == []
    assert len(bench.node.in_force["np_local4"].rows) == 2


def test_refused_host_endpoint_leaves_the_node_s_interface_alone(bench: Bench) -> None:
    """Its row is not in force, so neither programs nor a row that names it may come to its interface with the next news."""
    agent = bench.agent()
    peers = bench.node.in_force["np_addr4"]
    peers.hard_limit = len(peers.rows)
    bench.write("late.yaml", POD.format(name="late", node="there", last=9) + "---\n" + HOST.replace("NAME", "eth0"))
    settle(agent)
    assert [problem.slug for problem in agent.problems] == [MapFullError.slug]
    bench.node.news = True
    agent.step()
    row = bench.node.row(2)
    assert row is not None
    assert (row.number, row.flags & abi.NP_ENDPOINT_UPLINK) == (0, abi.NP_ENDPOINT_UPLINK)
    bench.now_s += RETRY_S
    agent.step()
    row = bench.node.row(2)
    assert row is not None
    assert struct.pack("=I", row.number) in bench.node.in_force["np_host"].rows


def test_host_endpoint_whose_end_was_refused_stays_in_force(bench: Bench) -> None:
    """What was to go together with what does not fit has not gone: not at once, and not with the next news."""
    bench.write("host.yaml", HOST.replace("NAME", "eth0"))
    agent = bench.agent()
    row, rows = bench.node.row(2), dict(bench.node.in_force["np_host"].rows)
    assert row is not None
    assert len(rows) == 1
    peers = bench.node.in_force["np_addr4"]
    peers.hard_limit = len(peers.rows)
    bench.remove("host.yaml")
    bench.write("late.yaml", POD.format(name="late", node="there", last=9))
    settle(agent)
    for _ in range(2):
        after = bench.node.row(2)
        assert after is not None
        assert (after.number, after.flags) == (row.number, row.flags)
        assert bench.node.in_force["np_host"].rows == rows
        bench.node.news = True
        agent.step()
    bench.now_s += RETRY_S
    agent.step()
    assert agent.problems == []
    after = bench.node.row(2)
    assert after is not None
    assert after.flags & abi.NP_ENDPOINT_UPLINK
