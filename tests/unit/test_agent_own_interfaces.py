# SPDX-License-Identifier: Apache-2.0
"""The node's own interfaces with an agent, on a node in memory: rows come before programs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from test_agent_core import CLUSTER, POD, POLICY, WIRING, Bench, settle
from worlds import packet

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.rejected import RETRY_S
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.apply.encode import LocalFlag, Meaning
from netpol_ebpf.compiler import Interpreter
from netpol_ebpf.errors import MapFullError
from netpol_ebpf.policy.types import IPIP, TCP, UDP, Direction, EndpointKey, Outcome, Question, Stage
from netpol_loader import abi

NODE = "---\napiVersion: v1\nkind: Node\nmetadata: {name: NAME}\nstatus: {addresses: [{type: InternalIP, address: ADDRESS}]}\n"
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
    """The node's own interface is never closed, whichever policy applies to it."""
    agent = bench.agent()
    bench.write("host.yaml", HOST.replace("NAME", "eth0"))
    settle(agent)
    row = bench.node.row(2)
    assert row is not None
    assert (row.flags, row.number) == (
        abi.NP_ENDPOINT_HOST | abi.NP_ENDPOINT_OUTSIDE,
        agent.enforcement.tables.endpoints[EndpointKey("HostEndpoint", "", "h")].number,
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
    assert agent.enforcement.applier.config_flags & abi.NP_CONFIG_DEFER
    bench.remove("service.yaml")
    settle(agent)
    assert bench.node.row(2) is not None
    assert not agent.enforcement.applier.config_flags & abi.NP_CONFIG_DEFER
    assert agent.problems == []


def test_gateway_within_the_node_is_not_outside(bench: Bench) -> None:
    """Packets from a bridge, or from a pair within the node, were judged before.

    The same is true for a device on top of them.
    """
    links = {
        8: Interface(8, "cni0", "bridge"), 9: Interface(9, "gw0", "veth"), 10: Interface(10, "gw1", "veth", master=8),
        11: Interface(11, "cni0.5", "vlan", lower=8), 12: Interface(12, "shim0", "macvlan", lower=11), 13: Interface(13, "gw0.5", "vlan", lower=9),
        14: Interface(14, "eth0.5", "vlan", lower=2),
    }  # fmt: skip
    bench.node.wiring = replace(WIRING, links={**WIRING.links, **links})
    bench.write("service.yaml", SERVICE)  # every exit gets the programs
    bench.agent()
    flags = {ifindex: row.flags for ifindex in (2, *links) if (row := bench.node.row(ifindex)) is not None}
    assert [ifindex for ifindex, one in flags.items() if one & abi.NP_ENDPOINT_OUTSIDE] == [2, 14]
    assert flags.keys() == {2, 9, 10, 11, 12, 13, 14}


def test_services_are_closed_while_an_exit_has_no_program(bench: Bench) -> None:
    """If an own interface cannot get the programs, services are closed, and this is reported."""
    bench.node.refuses = {2}
    bench.write("service.yaml", SERVICE)
    agent = bench.agent()
    assert [problem.slug for problem in agent.problems] == ["no-exit"]
    assert len(bench.node.in_force["np_vip4"].rows) == 2
    assert not agent.enforcement.applier.config_flags & abi.NP_CONFIG_DEFER


def test_host_endpoint_without_its_interface_is_told(bench: Bench) -> None:
    """An object without its interface is a warning with its place."""
    bench.write("host.yaml", HOST.replace("NAME", "eth9"))
    (problem,) = bench.agent().problems
    assert (problem.severity, problem.slug, problem.obj) == ("warning", "host-endpoint", "HostEndpoint/h")
    assert problem.location.line == 1


def test_node_with_more_addresses_than_room_is_told(bench: Bench) -> None:
    """The earlier addresses stay known. The agent continues, and adds the others when there is room."""
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


@pytest.mark.parametrize("is_external", [True, False])
def test_tunnel_that_tells_who_sent_a_packet_is_marked(bench: Bench, is_external: bool) -> None:  # noqa: FBT001
    """All other tunnels are ordinary own interfaces."""
    tunnel = Interface(9, "vx0", "vxlan", is_external=is_external)
    bench.node.wiring = replace(bench.node.wiring, links={**bench.node.wiring.links, 9: tunnel})
    bench.agent()
    row = bench.node.row(9)
    assert row is not None
    assert row.flags & abi.NP_ENDPOINT_OUTSIDE
    assert bool(row.flags & abi.NP_ENDPOINT_EXTERNAL) == is_external


def node_numbers(bench: Bench) -> tuple[int, dict[str, int]]:
    """The number of the node that another node's pod is on, from the row of the pod's address.

    And the numbers of nodes, by the addresses in the kernel.
    """
    maps = bench.node.in_force
    pod = abi.np_addr.from_buffer_copy(maps["np_addr4"].rows[ip_address("10.0.0.3").packed])
    rows = {str(ip_address(key)): abi.np_local.from_buffer_copy(value) for key, value in maps["np_local4"].rows.items()}
    return pod.holder, {address: row.node for address, row in rows.items() if row.flags & abi.NP_LOCAL_NODE}


def test_addresses_of_nodes_and_of_their_pods_have_one_number(bench: Bench) -> None:
    """This holds also if the pod moves, if the node changes or loses its address, and after a restart."""
    nodes = NODE.replace("NAME", "there").replace("ADDRESS", "172.16.0.2") + NODE.replace("NAME", "yonder").replace(
        "ADDRESS", "172.16.0.3"
    )
    bench.write("nodes.yaml", nodes)
    agent = bench.agent()
    pod, numbers = node_numbers(bench)
    assert numbers == {"172.16.0.2": pod, "172.16.0.3": pod + 1}
    assert pod >= abi.NP_NODE_FIRST
    bench.write("cluster.yaml", CLUSTER.replace("nodeName: there", "nodeName: yonder"))
    settle(agent)
    assert node_numbers(bench) == (pod + 1, numbers)
    bench.write("nodes.yaml", nodes.replace("172.16.0.3", "172.16.0.4"))
    settle(agent)
    assert node_numbers(bench) == (pod + 1, {"172.16.0.2": pod, "172.16.0.4": pod + 1})
    bench.write("nodes.yaml", nodes.replace("172.16.0.3", "172.16.0.2"))
    settle(agent)
    assert node_numbers(bench) == (0, {"172.16.0.2": 0})
    bench.write("nodes.yaml", nodes)
    bench.agent()
    pod, numbers = node_numbers(bench)
    assert numbers["172.16.0.3"] == pod != numbers["172.16.0.2"]


def test_node_keeps_its_addresses_until_rows_of_its_pods_are_written(bench: Bench) -> None:
    """So no packet of a pod is compared with a node that has just lost its number."""
    nodes = NODE.replace("NAME", "there").replace("ADDRESS", "172.16.0.2")
    bench.write("nodes.yaml", nodes)
    agent = bench.agent()
    before = node_numbers(bench)
    log = bench.node.in_force["np_local4"].log
    log.clear()
    bench.remove("nodes.yaml")
    settle(agent)
    key, pod = ip_address("172.16.0.2").packed, ip_address("10.0.0.3").packed
    assert node_numbers(bench) == (0, {})
    assert before[1] == {"172.16.0.2": before[0]}
    assert log.index(("put", "np_addr4", pod)) < log.index(("delete", "np_local4", key))


def test_refused_host_endpoint_leaves_the_node_s_interface_alone(bench: Bench) -> None:
    """Its row is not in force, so its interface may get neither programs nor a row with its number at the next news."""
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
    """Removals that belong to a change without room are not applied, neither at once nor at the next news."""
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


NODES = """\
apiVersion: v1
kind: Node
metadata: {name: here}
status: {addresses: [{type: InternalIP, address: 172.16.0.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: there}
status: {addresses: [{type: InternalIP, address: 172.16.0.2}]}
"""
FELIX = """\
apiVersion: projectcalico.org/v3
kind: FelixConfiguration
metadata: {name: node.here}
spec: {failsafeInboundHostPorts: [{protocol: TCP, port: 2222, net: 192.0.2.0/24}]}
"""


def passes(agent: Agent, source: str, protocol: int, port: int) -> bool:
    """Whether the host endpoint's tables allow a packet to the node."""
    about = packet(source, "172.16.0.1", protocol, port)
    question = Question(EndpointKey("HostEndpoint", "", "h"), Direction.INGRESS, Stage.NORMAL, about)
    return Interpreter(agent.enforcement.tables).decide(question).outcome is Outcome.ALLOW


def test_failsafe_ports_follow_the_manifests(bench: Bench) -> None:
    """The ports of this node are in force while a manifest has them, and the built-in ones before and after."""
    bench.write("host.yaml", HOST.replace("NAME", "'*'"))
    agent = bench.agent()
    ports = [("192.0.2.1", TCP, 22), ("192.0.2.1", TCP, 2222), ("198.51.100.1", TCP, 2222)]
    assert [passes(agent, *one) for one in ports] == [True, False, False]
    bench.write("felix.yaml", FELIX)
    settle(agent)
    assert [passes(agent, *one) for one in ports] == [False, True, False]
    bench.write("felix.yaml", FELIX.replace("2222", "a"))
    settle(agent)
    assert [problem.slug for problem in agent.problems] == ["type"]
    assert [passes(agent, *one) for one in ports] == [False, True, False]
    bench.remove("felix.yaml")
    settle(agent)
    assert [passes(agent, *one) for one in ports] == [True, False, False]


def test_tunnels_of_devices_and_of_the_option_pass_between_nodes(bench: Bench) -> None:
    """A device that is added or removed changes the tunnels that policy never blocks.

    At a start they are in force at once.
    """
    bench.write("host.yaml", HOST.replace("NAME", "'*'"))
    bench.write("nodes.yaml", NODES)
    agent = bench.agent(AgentSettings("here", tunnels=frozenset({(UDP, 8472)})))
    settle(agent)
    assert agent.enforcement.changes_applied == 1
    ports = [(UDP, 4789), (UDP, 8472), (UDP, 6081), (IPIP, 0), (47, 0)]
    assert [passes(agent, "172.16.0.2", *one) for one in ports] == [True, True, False, True, False]
    assert [passes(agent, "192.0.2.1", *one) for one in ports] == [False] * 5
    plain = bench.node.wiring
    device = Interface(9, "gnv0", "geneve", takes=((UDP, 6081),))
    bench.node.wiring, bench.node.news = replace(plain, links={**plain.links, 9: device}), True
    agent.step()
    assert agent.enforcement.changes_applied == 2
    assert [passes(agent, "172.16.0.2", *one) for one in ports] == [True, True, True, True, False]
    again = bench.agent()
    settle(again)
    assert again.enforcement.changes_applied == 1
    assert passes(again, "172.16.0.2", UDP, 6081)
    bench.node.wiring, bench.node.news = plain, True
    again.step()
    assert not passes(again, "172.16.0.2", UDP, 6081)


def test_automatic_host_endpoint_is_in_force(bench: Bench) -> None:
    """It is the host endpoint of the node's interfaces, like a written one, and is removed with its configuration."""
    bench.write("nodes.yaml", NODES)
    agent = bench.agent()
    bench.write(
        "controllers.yaml",
        "apiVersion: projectcalico.org/v3\nkind: KubeControllersConfiguration\nmetadata: {name: default}\n"
        "spec: {controllers: {node: {hostEndpoint: {autoCreate: Enabled}}}}\n",
    )
    settle(agent)
    key = EndpointKey("HostEndpoint", "", "here-auto-hep")
    row = bench.node.row(2)
    assert row is not None
    assert row.number == agent.enforcement.tables.endpoints[key].number
    assert agent.problems == []
    bench.remove("controllers.yaml")
    settle(agent)
    assert key not in agent.enforcement.tables.endpoints
