# SPDX-License-Identifier: Apache-2.0
"""Interfaces and their endpoints: found by route, by the veth's other end, by name; and when not to guess."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from netpol_ebpf.agent.wiring import Link, Wiring, is_candidate, locate
from netpol_ebpf.policy.types import Endpoint, EndpointKey, EndpointKind

LO = Link(1, "lo")
UPLINK = Link(2, "eth0", "veth", (0, 2))
WEB = Link(5, "cali1", "veth", (1, 2))
DB = Link(6, "cali2", "veth", (2, 2))
TAP = Link(7, "tap0", "tun")
LINKS = {link.ifindex: link for link in (LO, UPLINK, WEB, DB, TAP)}


def endpoint(name: str, *addresses: str, interface: str | None = None) -> Endpoint:
    key = EndpointKey("Pod", "shop", name)
    return Endpoint(key, EndpointKind.WORKLOAD, {}, tuple(map(ip_address, addresses)), interface=interface)


def wiring(routes: dict[str, int] | None = None, peers: dict[tuple[int, int], list[str]] | None = None) -> Wiring:
    return Wiring(
        LINKS,
        {ip_address(address): ifindex for address, ifindex in (routes or {}).items()},
        frozenset({UPLINK.ifindex}),
        {peer: tuple(map(ip_address, addresses)) for peer, addresses in (peers or {}).items()},
    )


def found(snapshot: Wiring, *endpoints: Endpoint) -> dict[str, int]:
    return {key.name: ifindex for key, ifindex in locate(snapshot, endpoints).interfaces.items()}


def test_host_route_leads_to_the_interface() -> None:
    """A pod is where the node's route to one of its addresses goes; a family without a route does no harm."""
    assert found(wiring({"10.0.0.1": 5}), endpoint("web", "10.0.0.1", "fd00::1")) == {"web": 5}


def test_other_end_of_the_veth_leads_to_the_interface() -> None:
    """Without a route, the veth whose other end has the address; the same address index in two namespaces is no confusion."""
    snapshot = wiring(peers={(1, 2): ["10.0.0.1", "fe80::1"], (2, 2): ["10.0.0.2", "fe80::1"]})
    assert found(snapshot, endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.2")) == {"web": 5, "db": 6}


def test_route_tells_more_than_a_peer() -> None:
    """Where both lead somewhere, the route counts."""
    assert found(wiring({"10.0.0.1": 6}, {(1, 2): ["10.0.0.1"]}), endpoint("web", "10.0.0.1")) == {"web": 6}


def test_named_interface_needs_no_address() -> None:
    """An endpoint that names its interface has that one, and none while it does not exist."""
    snapshot = wiring({"10.0.0.1": 5})
    assert found(snapshot, endpoint("vm", "10.0.0.1", interface="tap0")) == {"vm": 7}
    assert found(snapshot, endpoint("vm", "10.0.0.1", interface="tap9")) == {}


def test_route_to_a_vanished_interface_is_no_trace() -> None:
    """A route whose interface is not in the snapshot leads nowhere."""
    assert found(wiring({"10.0.0.1": 99}), endpoint("web", "10.0.0.1")) == {}


def test_uplink_is_nobody_s_by_address() -> None:
    """Neither a route nor a peer's address makes an uplink a workload's interface; an endpoint that names it does."""
    snapshot = wiring({"10.0.0.1": 2}, {(0, 2): ["10.0.0.2"]})
    assert found(snapshot, endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2")) == {}
    assert found(snapshot, endpoint("c", interface="eth0")) == {"c": 2}


def test_pod_that_is_not_here_is_no_problem() -> None:
    """An endpoint without a trace is neither found nor a problem."""
    located = locate(wiring(), [endpoint("web", "10.0.0.1")])
    assert (located.interfaces, located.problems) == ({}, {})


@pytest.mark.parametrize(
    ("routes", "peers"),
    [({"10.0.0.1": 5, "fd00::1": 6}, {}), ({}, {(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.1"]})],
    ids=["by family", "one address twice"],
)
def test_endpoint_with_two_interfaces_has_none(routes: dict[str, int], peers: dict[tuple[int, int], list[str]]) -> None:
    """Addresses that lead to several interfaces are a problem that names them, not a guess."""
    located = locate(wiring(routes, peers), [endpoint("web", "10.0.0.1", "fd00::1")])
    assert located.interfaces == {}
    assert list(located.problems.values()) == ["its addresses lead to several interfaces: cali1, cali2"]


def test_interface_of_two_endpoints_is_neither_s() -> None:
    """Two endpoints that lead to one interface are both left out, each naming the other; a third is not affected."""
    snapshot = wiring({"10.0.0.1": 5, "10.0.0.2": 5, "10.0.0.3": 6})
    located = locate(snapshot, [endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"), endpoint("c", "10.0.0.3")])
    assert {key.name for key in located.interfaces} == {"c"}
    assert {key.name for key in located.problems} == {"a", "b"}
    assert set(located.problems.values()) == {"interface cali1 would belong to several: Pod/shop/a, Pod/shop/b"}


def test_workload_interfaces_are_told_from_the_node_s_own() -> None:
    """Veths into other namespaces and taps are workloads'; loopback and whatever carries the node's own traffic are not."""
    snapshot = wiring()
    assert [link.name for link in LINKS.values() if is_candidate(link, snapshot)] == ["cali1", "cali2", "tap0"]


def test_patterns_decide_alone() -> None:
    """With patterns given, they say what is a workload's interface."""
    snapshot = wiring()
    patterns = ("tap*", "eth0")
    assert [link.name for link in LINKS.values() if is_candidate(link, snapshot, patterns)] == ["eth0", "tap0"]
