# SPDX-License-Identifier: Apache-2.0
"""The table of routes, from messages as the kernel writes them."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from netpol_loader.host.links import find_link, interface_towards
from netpol_loader.host.netlink import REPLACE, attribute
from netpol_loader.host.routes import (
    ANYCAST,
    BROADCAST,
    DELETE_ROUTE,
    LOCAL,
    NEW_ROUTE,
    TABLE_LOCAL,
    TABLE_MAIN,
    RouteTable,
    parse_routes,
)

UNICAST = 1
POD4, POD6 = "10.1.0.5", "fd00::5"


def route(
    to: str, oif: int = 0, *, via: str = "", table: int = TABLE_MAIN, metric: int = 0, kind: int = UNICAST, source: str = "",
    hops: tuple[tuple[int, str], ...] = (), flags: int = 0, protocol: int = 3,
) -> bytes:  # fmt: skip
    """A message's body."""
    net = ip_network(to)
    family = socket.AF_INET if net.version == 4 else socket.AF_INET6
    body = struct.pack("=BBBBBBBBI", family, net.prefixlen, 0, 0, table & 0xFF, protocol, 0, kind, flags)
    body += attribute(15, struct.pack("=I", table))
    if net.prefixlen:
        body += attribute(1, net.network_address.packed)
    if metric:
        body += attribute(6, struct.pack("=I", metric))
    if source:
        body += attribute(7, ip_address(source).packed)
    if hops:
        many = b""
        for ifindex, gateway in hops:
            rest = attribute(5, ip_address(gateway).packed) if gateway else b""
            many += struct.pack("=HBBi", 8 + len(rest), 0, 0, ifindex) + rest
        return body + attribute(9, many)
    if via:
        body += attribute(5, ip_address(via).packed)
    return body + attribute(4, struct.pack("=i", oif))


def table(*bodies: bytes) -> RouteTable:
    found = RouteTable()
    for body in bodies:
        assert found.apply(NEW_ROUTE, 0, body) == set()
    return found


@pytest.mark.parametrize("pod", [POD4, POD6])
def test_host_routes(pod: str) -> None:
    """Only what leads to one address by one interface of the main table, with nothing in between, is a pod's; then it goes."""
    size = ip_address(pod).max_prefixlen
    other = str(ip_address(pod) + 1)
    found = table(
        route(f"{pod}/{size}", 5),
        route(f"{other}/{size}", 6, via=pod),
        route(f"{ip_address(pod) + 2}/{size}", 7, table=100),
        route(f"{ip_address(pod) + 3}/{size}", 7, kind=7),  # prohibit
        route(f"{ip_address(pod) + 4}/{size}", hops=((7, ""), (8, ""))),
        route(f"{ip_network((pod, size - 8), strict=False)}", 9),
    )
    assert found.host_routes == {ip_address(pod): 5}
    before = found.version
    assert found.apply(DELETE_ROUTE, 0, route(f"{pod}/{size}", 5)) == set()
    assert found.host_routes == {}
    assert found.version != before


def test_of_several_routes_the_one_that_the_kernel_takes() -> None:
    """The lowest metric counts, whatever came first; of two interfaces with the same none does."""
    found = table(route(f"{POD4}/32", 6, metric=50), route(f"{POD4}/32", 5, metric=10))
    assert found.host_routes == {IPv4Address(POD4): 5}
    found.apply(DELETE_ROUTE, 0, route(f"{POD4}/32", 5, metric=10))
    assert found.host_routes == {IPv4Address(POD4): 6}
    found.apply(NEW_ROUTE, 0, route(f"{POD4}/32", 7, metric=50))
    assert found.host_routes == {}


def test_a_message_that_is_told_twice_counts_once() -> None:
    """What was listed may be told again, and what is told to go may not have been listed."""
    found = table(route(f"{POD4}/32", 5), route(f"{POD4}/32", 5))
    assert found.apply(DELETE_ROUTE, 0, route("10.9.9.9/32", 9)) == set()
    found.apply(DELETE_ROUTE, 0, route(f"{POD4}/32", 5))
    assert found.host_routes == {}


@pytest.mark.parametrize("pod", [POD4, POD6])
def test_a_route_takes_the_place_of_another(pod: str) -> None:
    """Of the same metric; one that is no pod's takes it as well."""
    size = ip_address(pod).max_prefixlen
    found = table(route(f"{pod}/{size}", 5))
    assert found.apply(NEW_ROUTE, REPLACE, route(f"{pod}/{size}", 6)) == set()
    assert found.host_routes == {ip_address(pod): 6}
    gateway = str(ip_address(pod) + 9)
    assert found.apply(NEW_ROUTE, REPLACE, route(f"{pod}/{size}", 6, via=gateway)) == set()
    assert found.host_routes == {}


def test_which_of_several_was_replaced_is_asked() -> None:
    """Their interfaces are in doubt, and what is listed then settles it."""
    found = table(route(f"{POD4}/32", 5), route(f"{POD4}/32", 6))
    doubtful = found.apply(NEW_ROUTE, REPLACE, route(f"{POD4}/32", 7))
    assert doubtful == {5, 6, 7}
    for ifindex, listed in ((5, []), (6, []), (7, [route(f"{POD4}/32", 7)])):
        found.replace_interface(socket.AF_INET, ifindex, listed)
    assert found.host_routes == {IPv4Address(POD4): 7}


def test_a_route_that_does_not_matter_may_have_replaced_one_that_did() -> None:
    """A prefix of the node's own, in a table of a VRF, that becomes a route to others."""
    found = table(route("10.5.0.0/24", 5, kind=LOCAL, table=100))
    found.set_local_tables({100})
    assert [one.net for one in found.local.values()] == [ip_network("10.5.0.0/24")]
    assert found.apply(NEW_ROUTE, REPLACE, route("10.5.0.0/24", 6, table=100)) == {5}
    found.replace_interface(socket.AF_INET, 5, [])
    assert found.local == {}


def test_a_deletion_of_what_is_not_known_puts_its_interface_in_doubt() -> None:
    """Where others of its kind are: it may be one of them that is known by something else."""
    found = table(route(f"{POD4}/32", 5))
    assert found.apply(DELETE_ROUTE, 0, route(f"{POD4}/32", 5, source="10.0.0.1")) == {5}


def test_hops_of_ipv6_go_one_by_one() -> None:
    """A route with several hops is told whole and goes hop by hop; one with others in their place replaces all of them."""
    hops = ((5, "fe80::1"), (6, "fe80::2"))
    found = table(route("::/0", hops=hops, metric=1024))
    assert found.uplinks == {5, 6}
    found.apply(DELETE_ROUTE, 0, route("::/0", 5, via="fe80::1", metric=1024))
    assert found.uplinks == {6}
    found.apply(NEW_ROUTE, 0, route("::/0", hops=hops, metric=1024))
    assert found.apply(NEW_ROUTE, REPLACE, route("::/0", 7, via="fe80::3", metric=1024)) == set()
    assert found.uplinks == {7}


def test_a_route_of_ipv4_with_several_hops_is_one() -> None:
    """It goes with any of its interfaces."""
    found = table(route("0.0.0.0/0", hops=((5, "10.0.0.1"), (6, "10.0.1.1"))))
    assert found.uplinks == {5, 6}
    found.drop_interface(6)
    assert found.uplinks == frozenset()


def test_what_the_node_takes_for_its_own() -> None:
    """Of the table `local` and those of VRFs; one address on several interfaces is the oldest's; broadcast yields to own."""
    found = table(
        route("10.0.0.1/32", 6, kind=LOCAL, table=TABLE_LOCAL),
        route("10.0.0.1/32", 5, kind=LOCAL, table=TABLE_LOCAL),
        route("10.0.0.255/32", 5, kind=BROADCAST, table=TABLE_LOCAL),
        route("fe80::/128", 5, kind=ANYCAST, table=TABLE_LOCAL),
        route("127.0.0.0/8", 1, kind=LOCAL, table=TABLE_LOCAL),
        route("10.7.0.1/32", 8, kind=LOCAL, table=100),
        route("0.0.0.0/0", 1, kind=LOCAL, table=101),
    )

    def seen() -> dict[str, tuple[bool, int]]:
        return {str(one.net): (one.is_many, one.ifindex) for one in found.local.values()}

    expected = {
        "10.0.0.1/32": (False, 5), "10.0.0.255/32": (True, 5), "fe80::/128": (False, 5), "127.0.0.0/8": (False, 1),
    }  # fmt: skip
    assert seen() == expected
    found.set_local_tables({100})
    assert seen() == {**expected, "10.7.0.1/32": (False, 8)}
    found.set_local_tables(())
    assert seen() == expected
    found.apply(DELETE_ROUTE, 0, route("10.0.0.1/32", 5, kind=LOCAL, table=TABLE_LOCAL))
    assert seen()["10.0.0.1/32"] == (False, 6)


def test_a_default_route_to_oneself_makes_no_uplink() -> None:
    """A transparent proxy's ``local default`` is no way out."""
    assert table(route("0.0.0.0/0", 1, kind=LOCAL, table=100)).uplinks == frozenset()


def test_routes_that_send_from_an_address() -> None:
    """Their interfaces are found by it."""
    found = table(route(f"{POD4}/32", 5, source="10.0.0.1"), route("10.1.0.6/32", 6))
    assert found.interfaces_sending_from(IPv4Address("10.0.0.1").packed) == {5}


def test_listing_a_family_leaves_the_other() -> None:
    """What was there and is not listed is gone; of the other family nothing is."""
    found = table(route(f"{POD4}/32", 5), route(f"{POD6}/128", 5))
    found.replace_family(socket.AF_INET, [route("10.1.0.6/32", 6)])
    assert found.host_routes == {IPv4Address("10.1.0.6"): 6, IPv6Address(POD6): 5}


@pytest.mark.parametrize("cut", [4, 13, 17, 30])
def test_a_message_that_ends_too_early_is_refused(cut: int) -> None:
    """It is not half understood."""
    whole = route(f"{POD4}/32", hops=((5, "10.0.0.1"),))
    with pytest.raises((struct.error, ValueError)):
        parse_routes(whole[:cut])


def test_what_the_main_table_says_of_interfaces() -> None:
    """Prefixes that are directly connected, interfaces that lead to other routers, and those of default routes."""
    found = table(
        route("10.0.0.0/24", 5),
        route("10.0.0.0/24", 6, metric=7),
        route("10.2.0.0/24", 7, via="10.0.0.9"),
        route("10.3.0.0/24", hops=((8, ""), (9, ""))),
        route("0.0.0.0/0", 10, via="10.0.0.1"),
        route("fe80::/64", 11),
        route("10.4.0.0/24", 12, table=100),
        route("0.0.0.0/0", 13, table=100),
    )
    assert found.subnets == {ip_network("10.0.0.0/24"): {5, 6}}
    assert (set(found.next_hops), found.uplinks) == ({7, 8, 9}, {10})
    found.apply(DELETE_ROUTE, 0, route("10.2.0.0/24", 7, via="10.0.0.9"))
    found.apply(DELETE_ROUTE, 0, route("10.0.0.0/24", 5))
    assert found.subnets == {ip_network("10.0.0.0/24"): {6}}
    assert set(found.next_hops) == {8, 9}


@pytest.mark.parametrize("protocol", [1, 9])
def test_what_a_router_announced_says_nothing(protocol: int) -> None:
    """Whoever reaches the node's link could say it."""
    found = table(
        route(f"{POD6}/128", 5, protocol=protocol),
        route("::/0", 6, via="fe80::1", protocol=protocol),
        route("fd09::/64", 7, protocol=protocol),
        route("fd0a::/64", 8, via="fe80::1", protocol=protocol),
    )
    assert (found.host_routes, found.subnets, found.uplinks, set(found.next_hops)) == ({}, {}, frozenset(), set())


def test_the_kernel_is_asked_for_the_way_to_an_address() -> None:
    """The loopback's own address is behind the loopback, by the kernel of this machine."""
    assert interface_towards(ip_address("127.0.0.1")) == find_link("lo").ifindex
