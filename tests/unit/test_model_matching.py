# SPDX-License-Identifier: Apache-2.0
"""Rule matching in the reference model, part by part, against policy/MATCHING.md."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from worlds import packet

from netpol_ebpf.model.matching import destination_side, rule_matches, source_side
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    UDPLITE,
    Action,
    Backend,
    BackendMatch,
    ClusterNode,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    IcmpType,
    LabelledNets,
    NamedPort,
    Packet,
    Ports,
    Rule,
    ServiceBackends,
    World,
)
from netpol_ebpf.selector import parse


def workload(name: str, address: str, labels: dict[str, str], *ports: NamedPort) -> Endpoint:
    key = EndpointKey("Pod", "ns", name)
    return Endpoint(key, EndpointKind.WORKLOAD, labels, (ip_address(address),), ports)


ENDPOINTS = (
    workload("web", "10.0.0.1", {"app": "web"}, NamedPort("http", TCP, 8080), NamedPort("dns", UDP, 53)),
    workload("db", "10.0.0.2", {"app": "db"}, NamedPort("http", TCP, 9090)),
    workload("shared-1", "10.0.0.3", {"app": "one"}, NamedPort("http", TCP, 1111)),
    workload("shared-2", "10.0.0.3", {"app": "two"}),
)
WORLD = World(
    endpoints={endpoint.key: endpoint for endpoint in ENDPOINTS},
    network_sets={
        "set": LabelledNets("set", {"kind": "set"}, (ip_network("192.0.2.0/24"), ip_network("10.0.0.2/32"))),
    },
    nodes={"n": ClusterNode("n", {"zone": "a"}, (ip_address("172.16.0.1"),))},
    services={
        ("ns", "db"): ServiceBackends(
            "ns", "db", frozenset({Backend(ip_address("10.0.0.2"), TCP, 9090), Backend(ip_address("10.0.0.9"), 0, 0)})
        ),
    },
)


def matches(rule: Rule, about: Packet) -> bool:
    return rule_matches(WORLD, rule, about, source_side(WORLD, about), destination_side(WORLD, about))


def rule(**parts: Any) -> Rule:
    return replace(Rule(Action.ALLOW, 0), **parts)


V4, V6 = packet("192.0.2.1", "10.0.0.1", TCP, 8080), packet("fd00::1", "fd00::2", TCP, 8080)


@pytest.mark.parametrize(
    ("parts", "about", "expected"),
    [
        ({}, V4, True),
        ({}, V6, True),
        ({"unsupported": "http"}, V4, False),
        ({"ip_version": 4}, V4, True),
        ({"ip_version": 4}, V6, False),
        ({"protocol": TCP}, V4, True),
        ({"protocol": UDP}, V4, False),
        ({"not_protocol": TCP}, V4, False),
        ({"not_protocol": UDP}, V4, True),
        ({"protocol": ICMP}, packet("192.0.2.1", "10.0.0.1", ICMP, 0), True),
        ({"protocol": ICMP}, packet("fd00::1", "fd00::2", ICMP, 0), False),
        ({"protocol": ICMPV6}, packet("fd00::1", "fd00::2", ICMPV6, 0), True),
        ({"protocol": ICMPV6}, packet("192.0.2.1", "10.0.0.1", ICMPV6, 0), False),
        ({"not_protocol": ICMP}, packet("fd00::1", "fd00::2", ICMPV6, 0), True),
    ],
)
def test_rule_heads(parts: dict[str, Any], about: Packet, expected: bool) -> None:  # noqa: FBT001 - a table's column
    """Family, protocol and its negation; ICMP rules are of one family."""
    assert matches(rule(**parts), about) is expected


@pytest.mark.parametrize(
    ("icmp", "seen", "expected"),
    [
        (IcmpType(8), (8, 0), True),
        (IcmpType(8), (8, 7), True),
        (IcmpType(8, 0), (8, 0), True),
        (IcmpType(8, 0), (8, 1), False),
        (IcmpType(8), (0, 0), False),
    ],
)
def test_icmp_type_and_code_match_as_a_pair(icmp: IcmpType, seen: tuple[int, int], expected: bool) -> None:  # noqa: FBT001
    """The negated form is the negation of the pair."""
    about = packet("192.0.2.1", "10.0.0.1", ICMP, 0, icmp_type=seen[0], icmp_code=seen[1])
    assert matches(rule(protocol=ICMP, icmp=icmp), about) is expected
    assert matches(rule(protocol=ICMP, not_icmp=icmp), about) is not expected


def test_a_negated_icmp_holds_for_other_protocols() -> None:
    """Without a protocol in the rule, a TCP packet is surely not of that ICMP type."""
    assert matches(rule(not_icmp=IcmpType(0)), V4)
    assert not matches(rule(icmp=IcmpType(0)), V4)


def entity_cases() -> list[tuple[Entity, str, bool]]:
    nets = (ip_network("10.0.0.0/30"), ip_network("fd00::/64"))
    return [
        (Entity(), "203.0.113.1", True),
        (Entity(impossible=True), "10.0.0.1", False),
        (Entity(nets=nets), "10.0.0.1", True),
        (Entity(nets=nets), "10.0.0.9", False),
        (Entity(nets=nets), "fd00::9", True),
        (Entity(nets=nets[1:]), "10.0.0.1", False),
        (Entity(not_nets=nets), "10.0.0.1", False),
        (Entity(not_nets=nets), "10.0.0.9", True),
        (Entity(selector=parse("app == 'web'")), "10.0.0.1", True),
        (Entity(selector=parse("app == 'web'")), "10.0.0.2", False),
        (Entity(selector=parse("all()")), "203.0.113.1", False),
        (Entity(selector=parse("!has(app)")), "203.0.113.1", False),
        (Entity(not_selector=parse("has(app)")), "203.0.113.1", True),
        (Entity(not_selector=parse("has(app)")), "10.0.0.1", False),
        (Entity(selector=parse("kind == 'set'")), "192.0.2.77", True),
        # two owners: one of them has to match the whole selector, none of them the negated one
        (Entity(selector=parse("app == 'one'")), "10.0.0.3", True),
        (Entity(selector=parse("app == 'one' && app != 'two'")), "10.0.0.3", True),
        (Entity(selector=parse("has(app) && app != 'one' && app != 'two'")), "10.0.0.3", False),
        (Entity(not_selector=parse("app == 'two'")), "10.0.0.3", False),
        (Entity(selector=parse("kind == 'set'"), nets=nets), "10.0.0.2", True),
        (Entity(selector=parse("kind == 'set'"), nets=nets), "192.0.2.77", False),
        (Entity(nodes=parse("zone == 'a'")), "172.16.0.1", True),
        (Entity(nodes=parse("zone == 'b'")), "172.16.0.1", False),
        (Entity(nodes=parse("all()")), "10.0.0.1", False),
        (Entity(service=BackendMatch("ns", "db", match_ports=False)), "10.0.0.2", True),
        (Entity(service=BackendMatch("ns", "db", match_ports=False)), "10.0.0.9", True),
        (Entity(service=BackendMatch("ns", "db", match_ports=False)), "10.0.0.1", False),
        (Entity(service=BackendMatch("ns", "none", match_ports=False)), "10.0.0.2", False),
        (Entity(service=BackendMatch("ns", "db", match_ports=True)), "10.0.0.2", True),
        (Entity(service=BackendMatch("ns", "db", match_ports=True)), "10.0.0.9", False),
    ]


@pytest.mark.parametrize(("entity", "address", "expected"), entity_cases())
def test_entities(entity: Entity, address: str, expected: bool) -> None:  # noqa: FBT001 - a table's column
    """Each part against an address; the packet's port there is 9090."""
    other = "fd00::99" if ":" in address else "203.0.113.9"
    to = packet(other, address, TCP, 9090)
    assert matches(rule(destination=entity), to) is expected
    back = packet(address, other, TCP, 1, source_port=9090)
    assert matches(rule(source=entity), back) is expected


def test_a_service_with_ports_needs_protocol_and_port() -> None:
    """The triple of a slice's endpoint must match whole."""
    entity = Entity(service=BackendMatch("ns", "db", match_ports=True))
    assert not matches(rule(destination=entity), packet("192.0.2.1", "10.0.0.2", TCP, 9091))
    assert not matches(rule(destination=entity), packet("192.0.2.1", "10.0.0.2", UDP, 9090))


def port_cases() -> list[tuple[Entity, str, int, int, bool]]:
    http = Ports(names=("http",))
    return [
        (Entity(ports=Ports(ranges=((80, 90),))), "203.0.113.1", TCP, 80, True),
        (Entity(ports=Ports(ranges=((80, 90),))), "203.0.113.1", SCTP, 90, True),
        (Entity(ports=Ports(ranges=((80, 90),))), "203.0.113.1", TCP, 91, False),
        (Entity(ports=http), "10.0.0.1", TCP, 8080, True),
        (Entity(ports=http), "10.0.0.1", TCP, 9090, False),
        (Entity(ports=http), "10.0.0.2", TCP, 9090, True),
        (Entity(ports=http), "10.0.0.1", UDP, 8080, False),
        (Entity(ports=http), "203.0.113.1", TCP, 8080, False),
        (Entity(ports=Ports(names=("dns",))), "10.0.0.1", UDP, 53, True),
        (Entity(ports=Ports(ranges=((1, 1),), names=("http",))), "10.0.0.1", TCP, 1, True),
        (Entity(ports=http, selector=parse("app == 'two'")), "10.0.0.3", TCP, 1111, False),
        (Entity(ports=http, selector=parse("app == 'one'")), "10.0.0.3", TCP, 1111, True),
        (Entity(ports=Ports(ranges=((0, 65535),))), "203.0.113.1", UDPLITE, 0, False),
    ]


@pytest.mark.parametrize(("entity", "address", "protocol", "port", "expected"), port_cases())
def test_ports(entity: Entity, address: str, protocol: int, port: int, expected: bool) -> None:  # noqa: FBT001
    """By number and by the names that endpoints of the address declare; the negated form is the negation."""
    about = packet("203.0.113.9", address, protocol, port)
    assert matches(rule(destination=entity), about) is expected
    negated = replace(entity, ports=None, not_ports=entity.ports, selector=None)
    if entity.selector is None:
        assert matches(rule(destination=negated), about) is not expected


def test_negated_named_ports_are_filtered_by_the_positive_selector() -> None:
    """The name is looked up among the endpoints that the selector picks; a notSelector alone picks none out."""
    about = packet("203.0.113.9", "10.0.0.3", TCP, 1111)
    http = Ports(names=("http",))
    assert matches(rule(destination=Entity(selector=parse("app == 'two'"), not_ports=http)), about)
    assert not matches(rule(destination=Entity(selector=parse("app == 'one'"), not_ports=http)), about)
    assert not matches(rule(destination=Entity(not_selector=parse("app == 'three'"), not_ports=http)), about)


def test_no_entity_has_both_a_selector_and_a_negated_one() -> None:
    """No engine has to know what the two together mean: translation joins them."""
    with pytest.raises(ValueError, match="join them"):
        Entity(selector=parse("a == 'b'"), not_selector=parse("c == 'd'"))
