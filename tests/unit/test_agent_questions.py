# SPDX-License-Identifier: Apache-2.0
"""The agent's answers to `netpolctl explain`: for the policy in force with its own settings, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_agent_core import CLUSTER, POD, POLICY, WIRING, Bench, settle

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.questions import answer_question
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.errors import InvalidInputError, LimitError, PlatformError, UsageError
from netpol_ebpf.policy.types import Action

NODE = """\
---
apiVersion: v1
kind: Node
metadata: {name: here}
status: {addresses: [{type: InternalIP, address: 172.30.0.10}]}
"""
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.5, selector: {app: db}, ports: [{port: 80, targetPort: 5432}]}
"""
HOST_ENDPOINT = """\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: uplink}
spec: {node: here, interfaceName: INTERFACE}
"""
CLOSED = """\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: closed}
spec: {selector: role == 'edge', applyOnForward: true, types: [Ingress, Egress]}
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER + NODE)
    bench.write("policy.yaml", POLICY)
    yield bench
    bench.close()


def ways(agent: Agent, source: str, destination: str, **more: Any) -> list[dict[str, Any]]:
    """The agent's answer to a question, by default about TCP port 5432."""
    request = {"op": "explain", "source": source, "destination": destination, "protocol": 6, "port": 5432, **more}
    return list(answer_question(agent, request)["ways"])


def allowed(agent: Agent, source: str, destination: str, **more: Any) -> bool:
    (way,) = ways(agent, source, destination, **more)
    return bool(way["allowed"])


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_answer_names_the_rule(bench: Bench, engine: str) -> None:
    """As for files, each step has its rule, and the rule's place in a file."""
    agent = bench.agent()
    assert allowed(agent, "shop/web", "shop/db", engine=engine)
    (way,) = ways(agent, "shop/far", "10.0.0.2", engine=engine)
    assert not way["allowed"]
    assert way["decided_by"]["policy"] == "KubernetesNetworkPolicy/shop/db"
    assert way["decided_by"]["file"].endswith("policy.yaml")


def test_broken_file_and_directory_that_cannot_be_read_change_no_answer(bench: Bench) -> None:
    """The objects in force are those of the last good state, and no file is opened for an answer."""
    agent = bench.agent()
    bench.write("policy.yaml", "kind: [")
    settle(agent)
    for path in (bench.home / "manifests").iterdir():
        path.unlink()
    assert not allowed(agent, "shop/far", "shop/db")


def test_refused_change_is_not_in_force(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that the compiler rejects changes no answer until a later change applies it.

    So for an unknown endpoint.
    """
    agent = bench.agent()
    compiler = agent.enforcement._compiler
    commit = compiler.commit

    def refuse() -> None:
        compiler._staged.clear()
        raise LimitError("too many rules")

    monkeypatch.setattr(compiler, "commit", refuse)
    bench.remove("policy.yaml")
    bench.write("more.yaml", POD.format(name="late", node="there", last=9))
    settle(agent)
    assert not allowed(agent, "shop/far", "shop/db")
    with pytest.raises(InvalidInputError, match="shop/late"):
        ways(agent, "shop/late", "shop/db")
    monkeypatch.setattr(compiler, "commit", commit)
    bench.write("other.yaml", POD.format(name="other", node="there", last=10))
    settle(agent)
    assert allowed(agent, "shop/far", "shop/db")
    assert allowed(agent, "shop/late", "shop/db")


def test_full_map_leaves_the_answers_of_before(bench: Bench) -> None:
    """A change without room in the kernel is not in force, although the compiler has it."""
    agent = bench.agent()
    bench.node.in_force["np_addr4"].hard_limit = len(bench.node.in_force["np_addr4"].rows)
    bench.write(
        "more.yaml", POD.format(name="late", node="there", last=9) + "---\n" + POLICY.replace("app: web", "app: late")
    )
    bench.remove("policy.yaml")
    settle(agent)
    assert allowed(agent, "shop/web", "shop/db")


def test_workload_that_nothing_is_enforced_for_is_no_answer(bench: Bench) -> None:
    """A pod of this node without an interface is not enforced, so policy does not decide about its packets."""
    bench.node.wiring = replace(WIRING, host_routes={ip_address("10.0.0.2"): 6})
    agent = bench.agent()
    with pytest.raises(InvalidInputError, match="policy of Pod/shop/web is NOT enforced"):
        ways(agent, "shop/web", "shop/db")
    assert not allowed(agent, "shop/far", "shop/db")


def test_interface_that_refuses_the_programs_is_no_answer(bench: Bench) -> None:
    """Packets there meet no policy, at a workload's interface or at an own one with a host endpoint."""
    bench.node.refuses = {2, 5}
    bench.write("host.yaml", HOST_ENDPOINT.replace("INTERFACE", "eth0"))
    agent = bench.agent()
    with pytest.raises(InvalidInputError, match="policy of Pod/shop/web is NOT enforced: cali1 has no program"):
        ways(agent, "shop/web", "shop/db")
    with pytest.raises(InvalidInputError, match="policy of HostEndpoint/uplink is NOT enforced: eth0 has no program"):
        ways(agent, "192.0.2.1", "172.30.0.10")
    assert allowed(agent, "172.30.0.10", "shop/db")


def test_service_that_no_exit_is_guarded_for_is_no_answer(bench: Bench) -> None:
    """While an interface of the node has no program, packets of workloads to services are denied where they enter."""
    bench.node.refuses = {2}
    bench.write("service.yaml", SERVICE)
    agent = bench.agent()
    with pytest.raises(
        InvalidInputError, match="packets to services are denied while these interfaces have no program: eth0"
    ):
        ways(agent, "shop/web", "10.96.0.5", port=80)
    assert allowed(agent, "shop/web", "shop/db")


@pytest.mark.parametrize(("action", "expected"), [(Action.ALLOW, True), (Action.DENY, False), (Action.PASS, True)])
def test_setting_of_workloads_to_their_node(bench: Bench, action: Action, expected: bool) -> None:  # noqa: FBT001 - a parameter
    """The agent's options decide the answer."""
    agent = bench.agent(AgentSettings("here", workload_to_host=action))
    assert allowed(agent, "shop/web", "172.30.0.10") == expected


@pytest.mark.parametrize("version", [4, 6])
def test_addresses_of_the_node_that_no_object_states_are_the_node(bench: Bench, version: int) -> None:
    """Addresses of a bridge or a gateway count: a workload's packet to them is one to its own node."""
    gateway = ip_address("169.254.1.1" if version == 4 else "fe80::1")
    bench.node.wiring = replace(WIRING, addresses={gateway: 2})
    web = POD.format(name="web", node="here", last=1)
    bench.write("cluster.yaml", CLUSTER.replace(web, web.replace("10.0.0.1}", '10.0.0.1}, {ip: "fd00::1"}')) + NODE)
    assert allowed(bench.agent(), "shop/web", str(gateway))
    agent = bench.agent(AgentSettings("here", workload_to_host=Action.DENY))
    assert not allowed(agent, "shop/web", str(gateway))
    assert allowed(agent, "shop/web", "192.0.2.9" if version == 4 else "2001:db8::9")


def test_encapsulation_that_nodes_take_is_dropped(bench: Bench) -> None:
    """Such packets from a workload to a node are dropped, for an option or a device of this node.

    Between others they are ordinary.
    """
    tunnel = {"protocol": 17, "port": 8472}
    assert allowed(bench.agent(), "shop/web", "172.30.0.10", **tunnel)
    agent = bench.agent(AgentSettings("here", tunnels=frozenset({(17, 8472)})))
    (way,) = ways(agent, "shop/web", "172.30.0.10", **tunnel)
    assert not way["allowed"]
    assert "encapsulation" in way["decided_by"]["sentence"]
    assert not allowed(agent, "shop/web", "239.0.0.1", **tunnel)
    assert allowed(agent, "shop/web", "shop/far", **tunnel)
    assert allowed(agent, "172.30.0.10", "192.0.2.1", **tunnel)
    vxlan = Interface(9, "vxlan.calico", "vxlan", takes=((17, 4789),))
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: vxlan})
    assert not allowed(bench.agent(), "shop/web", "172.30.0.10", protocol=17, port=4789)


@pytest.mark.parametrize(("protocol", "kind"), [(1, 3), (1, 11), (58, 2)])
def test_error_begins_no_connection(bench: Bench, protocol: int, kind: int) -> None:
    """An ICMP error only passes as part of its connection, so the question gets an error that says so."""
    agent = bench.agent()
    ends = ("shop/web", "shop/db") if protocol == 1 else ("fd00::9", "fd00::8")
    with pytest.raises(InvalidInputError, match="passes with the connection that it is about"):
        ways(agent, *ends, protocol=protocol, port=None, icmp_type=kind)
    assert allowed(
        agent, ends[0], "192.0.2.1" if protocol == 1 else ends[1], protocol=protocol, port=None, icmp_type=None
    )


def test_borrowed_sources_have_another_sender(bench: Bench) -> None:
    """The answer is for both senders of such an address, from outside and from the pod; unless the option is off."""
    borrowing = POD.format(name="web", node="here", last=1).replace(
        "metadata: {", 'metadata: {annotations: {cni.projectcalico.org/allowedSourcePrefixes: "[\\"192.0.2.0/24\\"]"}, '
    )
    bench.write("cluster.yaml", CLUSTER.replace(POD.format(name="web", node="here", last=1), borrowing) + NODE)
    assert len(ways(bench.agent(), "192.0.2.7", "shop/db")) == 1
    (outside, pod) = ways(bench.agent(AgentSettings("here", borrow_sources=True)), "192.0.2.7", "shop/db")
    assert [step["endpoint"] for step in outside["steps"]] == ["Pod/shop/db"]
    assert [step["endpoint"] for step in pod["steps"]] == ["Pod/shop/web", "Pod/shop/db"]


def test_host_endpoint_without_an_interface_here_has_no_say(bench: Bench) -> None:
    """A host endpoint that names no interface of the node is not in force."""
    bench.write("host.yaml", HOST_ENDPOINT.replace("INTERFACE", "eth0"))
    assert not allowed(bench.agent(), "192.0.2.1", "172.30.0.10")
    bench.write("host.yaml", HOST_ENDPOINT.replace("INTERFACE", "eth7"))
    assert allowed(bench.agent(), "192.0.2.1", "172.30.0.10")


def test_host_endpoint_of_another_interface_has_no_say(bench: Bench) -> None:
    """The endpoint of the uplink does not judge packets that leave by a tunnel of the node, and vice versa."""
    tunnel = Interface(9, "vxlan.calico", "vxlan")
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: tunnel})
    bench.node.routes[ip_address("10.0.0.3")] = 9
    endpoint = HOST_ENDPOINT.replace("{name: uplink}", "{name: uplink, labels: {role: edge}}")
    bench.write("host.yaml", endpoint.replace("INTERFACE", "eth0") + "---\n" + CLOSED)
    agent = bench.agent()
    assert allowed(agent, "shop/web", "shop/far")
    assert not allowed(agent, "shop/web", "192.0.2.1")
    bench.write("host.yaml", endpoint.replace("INTERFACE", "vxlan.calico") + "---\n" + CLOSED)
    agent = bench.agent()
    assert not allowed(agent, "shop/web", "shop/far")
    assert allowed(agent, "shop/web", "192.0.2.1")


def test_address_of_a_service_is_answered_by_backend(bench: Bench) -> None:
    """The selector gives the backends if there is no EndpointSlice."""
    bench.write("service.yaml", SERVICE)
    agent = bench.agent()
    (way,) = ways(agent, "shop/web", "10.96.0.5", port=80)
    assert (way["allowed"], way["backend"], way["service"]) == (
        True, {"address": "10.0.0.2", "port": 5432}, ["Service/shop/db"],
    )  # fmt: skip
    assert not allowed(agent, "shop/far", "10.96.0.5", port=80)


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "web"}, {"source": 5}, {"destination": None}, {"protocol": None}, {"protocol": 256}, {"protocol": True},
        {"port": None}, {"port": 65536}, {"protocol": 1}, {"icmp_type": "8"}, {"source_port": -1}, {"engine": "kernel"},
    ],
)  # fmt: skip
def test_request_of_anybody_is_read_strictly(bench: Bench, wrong: dict[str, Any]) -> None:
    """Every request to the socket gets an answer or an error."""
    agent = bench.agent()
    with pytest.raises(UsageError):
        ways(agent, **{"source": "shop/web", "destination": "shop/db", **wrong})


VIP = ip_address("10.96.0.5")


def bound_answer(
    bench: Bench, wiring: Wiring, bound: frozenset[Any] | None, source: str = "shop/web"
) -> dict[str, Any]:
    """The answer for port 80 of the service, with these addresses and sockets of the node."""
    bench.write("service.yaml", SERVICE)
    bench.node.wiring, bench.node.bound = wiring, bound
    (way,) = ways(bench.agent(AgentSettings("here")), source, str(VIP), port=80)
    return way


def test_a_service_address_that_a_process_has_bound_is_judged_itself(bench: Bench) -> None:
    """As on the node, no backend is judged, because the packet goes to that process. The answer says so."""
    local = replace(WIRING, addresses={**WIRING.addresses, VIP: 1})
    way = bound_answer(bench, local, frozenset({(6, VIP, 80)}))
    assert (way["backend"], way["service"]) == (None, [])
    assert "a process of this node has bound 10.96.0.5 port 80, an address of Service/shop/db" in way["note"]


@pytest.mark.parametrize("bound", [(17, VIP, 80), (6, VIP, 81), (6, ip_address("10.96.0.6"), 80)])
def test_another_socket_changes_no_answer(bench: Bench, bound: Any) -> None:
    """A socket of another protocol, port or address.

    Or an address without a socket, as IPVS gives all of them to the node.
    """
    local = replace(WIRING, addresses={**WIRING.addresses, VIP: 1})
    way = bound_answer(bench, local, frozenset({bound}))
    assert (way["backend"], way["note"]) == ({"address": "10.0.0.2", "port": 5432}, None)


def test_sockets_are_read_only_where_they_count(bench: Bench) -> None:
    """For an address that the node lacks, and for a sender on another node, the backends are judged."""
    assert bound_answer(bench, WIRING, None)["backend"] is not None
    local = replace(WIRING, addresses={**WIRING.addresses, VIP: 1})
    assert bound_answer(bench, local, None, source="shop/far")["backend"] is not None


def test_without_the_sockets_there_is_no_answer(bench: Bench) -> None:
    """It is then unknown whether the backends or the address itself is judged."""
    local = replace(WIRING, addresses={**WIRING.addresses, VIP: 1})
    with pytest.raises(PlatformError, match="does not list this node's sockets"):
        bound_answer(bench, local, None)
