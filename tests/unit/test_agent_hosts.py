# SPDX-License-Identifier: Apache-2.0
"""Which of the node's own interfaces get the programs, and for which host endpoint."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import permutations

import pytest

from netpol_ebpf.agent.hosts import plan_hosts
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.policy.types import Endpoint, EndpointKey, EndpointKind

LINKS = {
    1: Interface(1, "lo"), 2: Interface(2, "eth0"), 3: Interface(3, "eth1"), 4: Interface(4, "br0", "bridge"), 7: Interface(7, "cali1", "veth", (1, 2)),
}  # fmt: skip
ADDRESS = ip_address("192.0.2.1")
WIRING = Wiring(LINKS, addresses={ADDRESS: 3, ip_address("127.0.0.1"): 1})
POD_LINKS = {7}


def host(name: str, interface: str | None, *addresses: str) -> Endpoint:
    """A host endpoint."""
    key = EndpointKey("HostEndpoint", "", name)
    return Endpoint(key, EndpointKind.HOST, {}, tuple(map(ip_address, addresses)), node="here", interface=interface)


def test_every_own_interface_bears_the_programs() -> None:
    """All own interfaces, except the loopback, bridges and pods' interfaces."""
    assert plan_hosts(WIRING, [], POD_LINKS).interfaces == {2: None, 3: None}


def test_by_name_and_by_address() -> None:
    """A host endpoint has the interface that it names, also a bridge, or those with its addresses."""
    endpoints = [host("a", "eth0"), host("b", None, str(ADDRESS)), host("c", "br0")]
    plan = plan_hosts(WIRING, endpoints, POD_LINKS)
    assert {ifindex: key and key.name for ifindex, key in plan.interfaces.items()} == {2: "a", 3: "b", 4: "c"}
    assert plan.problems == {}
    assert {key.name for key in plan.in_force} == {"a", "b", "c"}


def test_wildcard_has_what_no_other_has() -> None:
    """The wildcard has the remaining interfaces. It is also in force for workloads if no interface remains."""
    wildcard = host("all", "*")
    plan = plan_hosts(WIRING, [wildcard, host("a", "eth0")], POD_LINKS)
    assert {ifindex: key and key.name for ifindex, key in plan.interfaces.items()} == {2: "a", 3: "all"}
    alone = plan_hosts(Wiring({1: LINKS[1]}), [wildcard], ())
    assert (alone.interfaces, alone.in_force) == ({}, {wildcard.key})


@pytest.mark.parametrize(
    ("endpoints", "eth0", "eth1"),
    [
        ([host("b", "eth1"), host("a", None, str(ADDRESS))], None, "b"),
        ([host("b", "eth1"), host("a", "eth1")], None, "a"),
        ([host("b", None, str(ADDRESS)), host("a", None, str(ADDRESS))], None, "a"),
        ([host("a", "*"), host("b", None, str(ADDRESS))], "a", "b"),
        ([host("a", "*"), host("b", "eth1"), host("c", None, str(ADDRESS))], "a", "b"),
        ([host("b", "*"), host("a", "*")], "a", "a"),
    ],
)
def test_order_of_claims(endpoints: list[Endpoint], eth0: str | None, eth1: str) -> None:
    """The interface's name comes before an address, an address before the wildcard.

    Equal claims are ordered by endpoint name.
    """
    for order in permutations(endpoints):
        plan = plan_hosts(WIRING, order, POD_LINKS)
        names = {ifindex: None if key is None else key.name for ifindex, key in plan.interfaces.items()}
        assert names == {2: eth0, 3: eth1}
        assert {key.name for key in plan.problems} == {one.key.name for one in endpoints} - set(names.values())


def test_what_cannot_be_is_told() -> None:
    """Missing interfaces, those of pods or of other endpoints, and second wildcards are reported by name."""
    endpoints = [
        host("a", "eth0"), host("b", "eth0"), host("c", "eth9"), host("d", "cali1"), host("e", None, "192.0.2.9"),
        host("w1", "*"), host("w2", "*"),
    ]  # fmt: skip
    plan = plan_hosts(WIRING, endpoints, POD_LINKS)
    assert {key.name: message for key, message in plan.problems.items()} == {
        "b": "interface eth0 has the host endpoint HostEndpoint/a",
        "c": "its interface eth9 is not one of the node's own",
        "d": "its interface cali1 is not one of the node's own",
        "e": "none of its addresses is on an interface of the node",
        "w2": "HostEndpoint/w1 is the host endpoint of all interfaces already",
    }
