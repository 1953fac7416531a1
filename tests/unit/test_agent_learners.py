# SPDX-License-Identifier: Apache-2.0
"""An agent with rules that have domain names, on a node in memory: which rows the program finds, and when they go."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_agent_core import CLUSTER, DB, POD, WEB, Bench, settle

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.dns_servers import parse_dns_server
from netpol_ebpf.agent.repair import ROUND_S
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.policy.types import EndpointKey
from netpol_loader import abi

DNS = """\
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIPs: [10.96.0.10], ports: [{name: dns, protocol: UDP, port: 53}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-4, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.53]}]
ports: [{name: dns, protocol: UDP, port: 1053}]
"""
NODE = """\
---
apiVersion: v1
kind: Node
metadata: {name: there}
status: {addresses: [{type: InternalIP, address: 192.0.2.7}]}
"""
NAMES = """\
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: names, namespace: shop}
spec:
  selector: app == 'web'
  types: [Egress]
  egress: [{action: Allow, destination: {domains: ["*.example.com"]}}]
"""
INNER = NAMES.replace("*.example.com", "api.*.example.com")
BY_SET = (
    NAMES.replace('domains: ["*.example.com"]', "selector: role == 'partners'")
    + """\
---
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: partners, namespace: shop, labels: {role: partners}}
spec: {allowedEgressDomains: [www.example.com]}
"""
)
PENDING = b"\1" + bytes(ctypes.sizeof(abi.np_asked) - 1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Two pods of this node, a DNS service, and a policy with names for one of the pods."""
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER + DNS + NODE)
    bench.write("names.yaml", NAMES)
    yield bench
    bench.close()


def config(bench: Bench) -> abi.np_config:
    """The program's configuration."""
    return abi.np_config.from_buffer_copy(bench.node.in_force["np_config"].rows[bytes(4)])


def number_of(agent: Agent, key: EndpointKey) -> int:
    """The number of an endpoint."""
    return agent.enforcement.tables.endpoints[key].number


def askers(bench: Bench) -> set[int]:
    """The numbers of the endpoints that have room for questions."""
    return {struct.unpack("=I", key)[0] for key in bench.node.in_force["np_asked"].rows}


def resolvers(bench: Bench) -> set[tuple[str, int]]:
    """The servers that the program believes."""
    keys = map(abi.np_resolver4_key.from_buffer_copy, bench.node.in_force["np_resolver4"].rows)
    return {(str(IPv4Address(bytes(one.address))), one.port) for one in keys}


def is_unlearned(bench: Bench, text: str) -> bool:
    """Whether a row keeps the program from learning exactly this address."""
    key = abi.np_cidr4_key(prefix_bits=32, address=(ctypes.c_uint8 * 4)(*ip_address(text).packed))
    return bytes(key) in bench.node.in_force["np_unlearned4"].rows


def learn(bench: Bench, number: int) -> bytes:
    """Have the program learn an address for an endpoint; the key of its row."""
    key = struct.pack("=I", number) + ip_address("198.51.100.1").packed
    bench.node.in_force["np_learned4"].put(key, bytes(abi.np_learned()))
    return key


@pytest.mark.parametrize("policy", [NAMES, INNER, BY_SET], ids=["wildcard", "inner wildcard", "network set"])
def test_a_pod_whose_policy_has_names_learns_and_others_do_not(bench: Bench, policy: str) -> None:
    """Also if no row of np_name can have the pattern: the program must report names before the agent can add rows."""
    bench.write("names.yaml", policy)
    agent = bench.agent()
    assert askers(bench) == {number_of(agent, WEB)}
    assert resolvers(bench) == {("10.96.0.10", 53), ("10.0.0.53", 1053)}
    assert is_unlearned(bench, "192.0.2.7")
    assert is_unlearned(bench, "10.96.0.10")
    assert config(bench).flags & abi.NP_CONFIG_NAMES
    assert (config(bench).dns_ports, config(bench).name_floor_s, config(bench).name_extra_s) == (1053, 30, 0)
    assert agent.problems == []


def test_without_names_nothing_is_there(bench: Bench) -> None:
    """When the last rule with names goes, no packet pays for DNS; when it comes back, questions are read again."""
    agent = bench.agent()
    bench.write("names.yaml", NAMES.replace('domains: ["*.example.com"]', "nets: [203.0.113.0/24]"))
    settle(agent)
    assert askers(bench) == set()
    assert resolvers(bench) == set()
    assert not config(bench).flags & abi.NP_CONFIG_NAMES
    bench.write("names.yaml", NAMES)
    settle(agent)
    assert askers(bench) == {number_of(agent, WEB)}
    assert config(bench).flags & abi.NP_CONFIG_NAMES


def test_backends_of_the_dns_service_are_followed(bench: Bench) -> None:
    """A DNS pod with another address is believed from then on, the one before no longer; pending questions stay."""
    agent = bench.agent()
    (row,) = bench.node.in_force["np_asked"].rows
    bench.node.in_force["np_asked"].rows[row] = PENDING
    bench.write("cluster.yaml", CLUSTER + DNS.replace("10.0.0.53", "10.0.0.54") + NODE)
    settle(agent)
    assert resolvers(bench) == {("10.96.0.10", 53), ("10.0.0.54", 1053)}
    assert bench.node.in_force["np_asked"].rows == {row: PENDING}


def test_missing_dns_service_is_a_problem(bench: Bench) -> None:
    """It is an error while no other server is known, and ends when the service appears."""
    bench.write("cluster.yaml", CLUSTER)
    agent = bench.agent()
    assert [one.severity for one in agent.problems] == ["warning", "error"]
    assert all(one.slug == "dns-servers" for one in agent.problems)
    bench.write("cluster.yaml", CLUSTER + DNS)
    settle(agent)
    assert agent.problems == []


def test_options_reach_the_program(bench: Bench) -> None:
    """Servers, times, and what happens to answers that cannot be read."""
    settings = AgentSettings(
        "here",
        name_ttl_floor_s=5,
        name_extra_ttl_s=7,
        dns_servers=(parse_dns_server("192.0.2.53:5300"),),
        unread_dns="drop",
    )
    bench.agent(settings)
    found = config(bench)
    assert resolvers(bench) == {("192.0.2.53", 5300)}
    assert (found.name_floor_s, found.name_extra_s, found.unread_dns) == (5, 7, abi.NP_UNREAD_DNS_DROP)
    assert found.dns_ports == 5300


def test_the_next_agent_keeps_what_was_learned(bench: Bench) -> None:
    """Pending questions and learned addresses outlive the agent, but not an endpoint that went meanwhile."""
    bench.write("names.yaml", NAMES.replace("app == 'web'", "all()"))
    agent = bench.agent()
    web, db = number_of(agent, WEB), number_of(agent, DB)
    kept, _lost = learn(bench, web), learn(bench, db)
    asked = bench.node.in_force["np_asked"].rows
    asked[struct.pack("=I", web)] = PENDING
    bench.write("cluster.yaml", CLUSTER.replace(POD.format(name="db", node="here", last=2), "") + DNS + NODE)
    heir = bench.agent()
    assert number_of(heir, WEB) == web
    assert bench.node.in_force["np_asked"].rows == {struct.pack("=I", web): PENDING}
    assert bench.node.in_force["np_learned4"].rows.keys() == {kept}


def test_pod_that_goes_takes_what_it_learned(bench: Bench) -> None:
    """Before its number is another pod's."""
    agent = bench.agent()
    learn(bench, number_of(agent, WEB))
    bench.write("cluster.yaml", CLUSTER.replace(POD.format(name="web", node="here", last=1), "") + DNS + NODE)
    settle(agent)
    assert not bench.node.in_force["np_learned4"].rows
    assert askers(bench) == set()


def test_rounds_restore_what_another_program_changed(bench: Bench) -> None:
    """The rows of servers, refused prefixes and askers are compared like all others; pending questions are left alone."""
    agent = bench.agent()
    web = struct.pack("=I", number_of(agent, WEB))
    maps = bench.node.in_force
    before = {name: dict(maps[name].rows) for name in ("np_resolver4", "np_unlearned4", "np_asked")}
    maps["np_asked"].rows[web] = PENDING
    bench.now_s += ROUND_S
    agent.step()
    assert agent.repair.drift.counts.total() == 0
    assert maps["np_asked"].rows == {web: PENDING}
    maps["np_asked"].rows.clear()
    maps["np_resolver4"].rows.clear()
    maps["np_unlearned4"].put(bytes(8), bytes(abi.np_unlearned(refused=1)))
    bench.now_s += ROUND_S
    agent.step()
    assert {name: maps[name].rows for name in before} == before
