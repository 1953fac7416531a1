# SPDX-License-Identifier: Apache-2.0
"""DNS servers that the program believes, prefixes that it never learns, and endpoints that learn names."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from memory_maps import MemoryMap

from netpol_ebpf.agent.dns_servers import NEVER_LEARNED, NO_DNS, DnsInputs, DnsServer, DnsServers, parse_dns_server
from netpol_ebpf.agent.name_learners import NameLearners, may_use_names
from netpol_ebpf.errors import Location, UsageError
from netpol_ebpf.policy.domain_names import is_never_learned
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Backend,
    ClusterNode,
    EndpointKey,
    Entity,
    ResourceKey,
    Rule,
    ServiceBackends,
    Vip,
    VipKey,
    World,
)
from netpol_ebpf.resources.types import Meta, Resource, Service, ServicePort
from netpol_ebpf.selector import EVERYTHING
from netpol_loader import abi

CLUSTER_IP, POD = ip_address("10.96.0.10"), ip_address("10.0.0.53")
KUBE_DNS = ("kube-system", "kube-dns")
WEB, DB = EndpointKey("Pod", "shop", "web"), EndpointKey("Pod", "shop", "db")


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("192.0.2.1", DnsServer(ip_address("192.0.2.1"), port=53)),
        ("192.0.2.1:5353", DnsServer(ip_address("192.0.2.1"), port=5353)),
        ("2001:db8::1", DnsServer(ip_address("2001:db8::1"), port=53)),
        ("[2001:db8::1]:5353", DnsServer(ip_address("2001:db8::1"), port=5353)),
        ("[2001:db8::1]", DnsServer(ip_address("2001:db8::1"), port=53)),
        ("k8s-service:kube-dns", DnsServer(service=KUBE_DNS)),
        ("k8s-service:dns/resolver:5353", DnsServer(service=("dns", "resolver"), port=5353)),
    ],
)
def test_servers_are_parsed(text: str, server: DnsServer) -> None:
    """Addresses have port 53 unless another is given; services are in kube-system unless another namespace is given."""
    assert parse_dns_server(text) == server


@pytest.mark.parametrize(
    "text",
    ["", "kube-dns", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:x", "[2001:db8::1]x", "k8s-service:", "k8s-service:/a",
     "k8s-service:a/", "k8s-service:a:x", "192.0.2.0/24"],
)  # fmt: skip
def test_wrong_servers_are_refused(text: str) -> None:
    """The message shows the forms."""
    with pytest.raises(UsageError, match="k8s-service"):
        parse_dns_server(text)


def service(*ports: int) -> Service:
    """The DNS service with these ports."""
    meta = Meta("Service", "kube-system", "kube-dns", Location(""))
    return Service(meta, None, (CLUSTER_IP,), (), tuple(ServicePort("", UDP, port, None, 0) for port in ports))


def servers(found: Service | None, *texts: str) -> DnsServers:
    """Servers of the options, in a cluster with one service or none."""

    def get(key: ResourceKey) -> Resource | None:
        return found if key == ResourceKey("Service", *KUBE_DNS) else None

    return DnsServers(tuple(map(parse_dns_server, texts or ("k8s-service:kube-dns",))), (), get)


BACKENDS = ServiceBackends(
    *KUBE_DNS, frozenset({Backend(POD, UDP, 1053), Backend(POD, TCP, 1053), Backend(POD, TCP, 9153)})
)
VIP = Vip(VipKey(CLUSTER_IP, UDP, 53))
WORLD = World(services={KUBE_DNS: BACKENDS}, nodes={"a": ClusterNode("a", {}, (ip_address("192.0.2.7"),))})


def test_a_service_stands_for_its_addresses_and_backends() -> None:
    """Its DNS port is 53 if it has it; of its backends the ports with UDP count, so not that of its metrics."""
    assert servers(service(9153, 53)).inputs(WORLD).resolvers == {(CLUSTER_IP, 53), (POD, 1053)}
    assert servers(service(5353)).inputs(WORLD).resolvers == {(CLUSTER_IP, 5353), (POD, 1053)}
    metrics = ServicePort("", TCP, 9153, None, 0)
    mixed = replace(service(5353), ports=(metrics, *service(5353).ports))
    assert servers(mixed).inputs(WORLD).resolvers == {(CLUSTER_IP, 5353), (POD, 1053)}


def test_nodes_and_the_like_are_never_learned() -> None:
    """Addresses of nodes and services, the DNS servers' too, loopback and link-local; the nodes' network is not among them, because names lead there too."""
    found = servers(service(53)).inputs(replace(WORLD, vips={VIP.key: VIP}))
    assert {ip_network(text) for text in ("127.0.0.0/8", "fe80::/10", "::1/128")} <= found.unlearned
    assert found.own == {ip_address("192.0.2.7"), CLUSTER_IP}
    assert not any(ip_address("192.0.2.8") in net for net in found.unlearned)


def test_the_policy_model_refuses_the_same_addresses() -> None:
    """Both ends of each refused prefix are never learned in the model, and their neighbours are."""
    for net in NEVER_LEARNED:
        assert is_never_learned(net[0])
        assert is_never_learned(net[-1])
    for text in (
        "0.0.0.1",
        "126.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "223.255.255.255",
        "240.0.0.0",
        "::2",
        "fec0::",
    ):
        assert not is_never_learned(ip_address(text))
        assert not any(ip_address(text) in net for net in NEVER_LEARNED)


def test_missing_servers_are_a_problem_only_if_names_are_used() -> None:
    """A node without such rules needs no DNS server."""
    absent = servers(None)
    inputs = absent.inputs(replace(WORLD, services={}))
    assert not absent.problems(inputs, is_used=False)
    messages = [one.message for one in absent.problems(inputs, is_used=True)]
    assert [one.severity for one in absent.problems(inputs, is_used=True)] == ["warning", "error"]
    assert "k8s-service:kube-system/kube-dns is not known" in messages[0]


def test_more_ports_than_the_program_reads_are_a_problem() -> None:
    """Besides 53 there is room for four."""
    many = servers(None, *(f"192.0.2.1:{port}" for port in (53, 1, 2, 3, 4, 5)))
    inputs = many.inputs(World())
    assert inputs.other_ports == (1, 2, 3, 4, 5)
    assert ["port 5" in one.message for one in many.problems(inputs, is_used=True)] == [True]
    assert DnsInputs() == NO_DNS


ALLOW = Rule(Action.ALLOW, 0)


@pytest.mark.parametrize(
    ("rule", "alone", "with_sets"),
    [
        (ALLOW, False, False),
        (replace(ALLOW, destination=Entity(domains=frozenset({"a.com"}))), True, True),
        (replace(ALLOW, destination=Entity(selector=EVERYTHING)), False, True),
        (Rule(Action.DENY, 0, destination=Entity(selector=EVERYTHING)), False, False),
    ],
)
def test_rules_that_may_use_names(rule: Rule, alone: bool, with_sets: bool) -> None:  # noqa: FBT001
    """A rule by its own patterns, or, if some network set has names, by its selector."""
    assert may_use_names((rule,), has_named_sets=False) is alone
    assert may_use_names((rule,), has_named_sets=True) is with_sets


def maps(asked: int = 8) -> dict[str, MemoryMap]:
    """The maps of learners in memory. ``asked``: room of np_asked."""
    return {
        "np_asked": MemoryMap("np_asked", asked, ctypes.sizeof(abi.np_asked), []),
        **{name: MemoryMap(name, 8, ctypes.sizeof(abi.np_learned), []) for name in ("np_learned4", "np_learned6")},
    }


def key(number: int) -> bytes:
    """The key of an endpoint."""
    return struct.pack("=I", number)


def test_rows_of_learners_are_made_once_and_removed_with_what_was_learned() -> None:
    """A row that exists is not written again, because it has pending questions."""
    found, learners = maps(), NameLearners()
    learners.update(found, {WEB: 1, DB: 2})
    pending = b"\1" + bytes(ctypes.sizeof(abi.np_asked) - 1)
    found["np_asked"].rows[key(1)] = pending
    for number in (1, 2):
        found["np_learned4"].rows[key(number) + bytes(4)] = bytes(32)
    learners.update(found, {WEB: 1})
    assert found["np_asked"].rows == {key(1): pending}
    assert found["np_learned4"].rows.keys() == {key(1) + bytes(4)}


def test_an_endpoint_with_a_new_number_learns_anew() -> None:
    """What its old number learned is gone."""
    found, learners = maps(), NameLearners()
    learners.update(found, {WEB: 1})
    found["np_learned6"].rows[key(1) + bytes(16)] = bytes(32)
    learners.update(found, {WEB: 3})
    assert found["np_asked"].rows.keys() == {key(3)}
    assert not found["np_learned6"].rows


def test_rows_of_an_earlier_agent_are_taken_over() -> None:
    """Endpoints that still have their number keep their questions; all other rows are deleted."""
    found, learners = maps(), NameLearners()
    for number in (1, 2):
        found["np_asked"].rows[key(number)] = bytes(ctypes.sizeof(abi.np_asked))
        found["np_learned4"].rows[key(number) + bytes(4)] = bytes(32)
    learners.adopt(found, {WEB: 1})
    assert learners.numbers == {WEB: 1}
    assert found["np_asked"].rows.keys() == {key(1)}
    assert found["np_learned4"].rows.keys() == {key(1) + bytes(4)}


def test_a_full_map_is_a_problem_by_endpoint() -> None:
    """It ends when there is room."""
    found, learners = maps(asked=1), NameLearners()
    learners.update(found, {WEB: 1, DB: 2})
    assert [one.obj for one in learners.problems] == [str(DB)]
    learners.update(found, {DB: 2})
    assert not learners.problems


def test_rows_that_another_program_changed_are_restored() -> None:
    """A missing row is made, a surplus row goes, and a row with pending questions stays as it is."""
    found, learners = maps(), NameLearners()
    learners.update(found, {WEB: 1, DB: 2})
    pending = b"\1" + bytes(ctypes.sizeof(abi.np_asked) - 1)
    found["np_asked"].rows[key(1)] = found["np_asked"].rows[key(9)] = pending
    del found["np_asked"].rows[key(2)]
    assert sorted(one.was for one in learners.restore(found)) == ["foreign", "missing"]
    assert found["np_asked"].rows == {key(1): pending, key(2): bytes(ctypes.sizeof(abi.np_asked))}
    assert learners.restore(found) == []
