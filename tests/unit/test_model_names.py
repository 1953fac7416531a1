# SPDX-License-Identifier: Apache-2.0
"""Domain names in the reference model, against the section on names of policy/MATCHING.md."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from worlds import HOST, POD, ask, packet, policy, world

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import (
    TCP,
    Action,
    ClusterNode,
    Direction,
    EndpointKey,
    Entity,
    LabelledNets,
    Outcome,
    Ports,
    Rule,
    World,
)
from netpol_ebpf.selector import parse

OUTSIDE = "192.0.2.9"
SETS = {
    "cdn": LabelledNets("cdn", {"kind": "cdn"}, (ip_network("198.51.100.0/24"),), frozenset({"*.cdn.net"})),
    "other": LabelledNets("other", {"kind": "other"}, (), frozenset({"other.org"})),
}


def allows(
    *rules: Rule,
    names: tuple[str, ...] = ("api.example.com",),
    to: str = OUTSIDE,
    endpoint: EndpointKey = POD,
    direction: Direction = Direction.EGRESS,
    port: int = 443,
    **more: Any,
) -> bool:
    """Whether one policy with ``rules`` allows a packet of an endpoint that knows ``names`` for its destination."""
    given: World = world(policy("p", *rules))
    given.network_sets.update(SETS)
    given.nodes["n2"] = ClusterNode("n2", {}, (ip_address("172.16.0.2"),))
    source = "172.16.0.1" if endpoint is HOST else "10.0.0.1"
    question = ask(endpoint, direction, about=packet(source, to, TCP, port), **more)
    return ReferenceModel(given).decide(replace(question, names=frozenset(names))).outcome is Outcome.ALLOW


def to(*patterns: str, action: Action = Action.ALLOW, **parts: Any) -> Rule:
    return Rule(action, 0, protocol=TCP, destination=Entity(domains=frozenset(patterns), **parts))


def to_set(selector: str, action: Action = Action.ALLOW, **parts: Any) -> Rule:
    return Rule(action, 0, protocol=TCP, destination=Entity(selector=parse(selector), **parts))


@pytest.mark.parametrize(
    ("rule", "names", "expected"),
    [
        (to("api.example.com"), ("api.example.com",), True),
        (to("api.example.com"), (), False),
        (to("api.example.com"), ("www.example.com",), False),
        (to("*.example.com"), ("www.example.com", "x.net"), True),
        (to("*.example.com"), ("example.com",), False),
        (to("a.net", "*.org"), ("b.org",), True),
        (to("api.example.com", ports=Ports(((443, 443),))), ("api.example.com",), True),
        (to("api.example.com", ports=Ports(((80, 80),))), ("api.example.com",), False),
        (to("api.example.com", not_nets=(ip_network("192.0.2.0/24"),)), ("api.example.com",), False),
        (replace(to("api.example.com"), ip_version=6), ("api.example.com",), False),
    ],
)
def test_a_rule_with_names(rule: Rule, names: tuple[str, ...], expected: bool) -> None:  # noqa: FBT001
    """A rule with patterns matches if a learned name matches one of them, and everything else matches too."""
    assert allows(rule, names=names) is expected


@pytest.mark.parametrize("to_address", ["10.0.0.1", "172.16.0.1", "172.16.0.2"])
def test_names_of_addresses_of_the_cluster_do_not_count(to_address: str) -> None:
    """The address of a workload, of a host endpoint or of a Node has no name, whatever an answer said."""
    assert not allows(to("api.example.com"), to=to_address)
    assert not allows(to_set("kind == 'other'"), to=to_address, names=("other.org",))


def test_names_count_for_egress_only() -> None:
    """On ingress a rule with patterns matches nothing."""
    assert not allows(to("api.example.com"), direction=Direction.INGRESS)
    assert not allows(to_set("kind == 'other'"), direction=Direction.INGRESS, names=("other.org",))


def test_a_host_endpoint_knows_names_too() -> None:
    """Rules with patterns match the packets of a host endpoint."""
    assert allows(to("api.example.com"), endpoint=HOST)


@pytest.mark.parametrize(
    ("rule", "names", "to_address", "expected"),
    [
        (to_set("kind == 'cdn'"), ("a.cdn.net",), OUTSIDE, True),
        (to_set("kind == 'cdn'"), (), OUTSIDE, False),
        (to_set("kind == 'cdn'"), (), "198.51.100.7", True),
        (to_set("kind == 'cdn'"), ("other.org",), OUTSIDE, False),
        (to_set("has(kind)"), ("other.org",), OUTSIDE, True),
        (to_set("kind == 'cdn'", nets=(ip_network("203.0.113.0/24"),)), ("a.cdn.net",), OUTSIDE, False),
        (to_set("kind == 'cdn'", nets=(ip_network("192.0.2.0/24"),)), ("a.cdn.net",), OUTSIDE, True),
        (to_set("kind == 'cdn'", ports=Ports((), ("http",))), ("a.cdn.net",), OUTSIDE, False),
        (to_set("has(kind)", domains=frozenset({"x.net"})), ("a.cdn.net", "x.net"), OUTSIDE, False),
        (to_set("has(kind)", domains=frozenset({"x.net"})), ("x.net",), "198.51.100.7", True),
    ],
)
def test_a_rule_that_selects_sets_with_names(
    rule: Rule,
    names: tuple[str, ...],
    to_address: str,
    expected: bool,  # noqa: FBT001
) -> None:
    """The names of a selected set count beside its nets, unless the rule has patterns of its own."""
    assert allows(rule, names=names, to=to_address) is expected


@pytest.mark.parametrize("action", [Action.DENY, Action.PASS, Action.LOG])
def test_only_allow_rules_match_by_names_of_sets(action: Action) -> None:
    """A Deny, Pass or Log rule that selects a set ignores its names, so the rule after it decides."""
    assert allows(to_set("kind == 'cdn'", action=action), to("a.cdn.net"), names=("a.cdn.net",))


def test_a_not_selector_ignores_names_of_sets() -> None:
    """An address that only a name connects with a set is not one of the set's for notSelector."""
    rule = Rule(Action.ALLOW, 0, destination=Entity(not_selector=parse("kind == 'cdn'")))
    assert allows(rule, names=("a.cdn.net",))
