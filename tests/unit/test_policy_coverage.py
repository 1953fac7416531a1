# SPDX-License-Identifier: Apache-2.0
"""Coverage of rules, part by part: what is proved, and what must not be."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from netpol_ebpf.policy.coverage import covers, implies
from netpol_ebpf.policy.types import (
    ICMP,
    TCP,
    UDP,
    Action,
    BackendMatch,
    Entity,
    IcmpType,
    LabelledNets,
    Ports,
    Rule,
)
from netpol_ebpf.selector import parse


def _rule(**fields: Any) -> Rule:
    return Rule(Action.ALLOW, 0, **fields)


def _to(**fields: Any) -> Rule:
    nets = {key: tuple(map(ip_network, fields[key])) for key in ("nets", "not_nets") if key in fields}
    selectors = {key: parse(fields[key]) for key in ("selector", "not_selector", "nodes") if key in fields}
    protocol = fields.pop("protocol", TCP)
    return _rule(protocol=protocol, destination=Entity(**{**fields, **nets, **selectors}))


SERVICE = BackendMatch("n", "s", match_ports=False)
SERVICE_PORTS = BackendMatch("n", "s", match_ports=True)


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        (_rule(), _rule(protocol=TCP), True),
        (_rule(protocol=TCP), _rule(), False),
        (_rule(protocol=TCP), _rule(protocol=UDP), False),
        (_rule(ip_version=4), _rule(), False),
        (_rule(ip_version=4), _rule(protocol=ICMP), True),
        (_rule(ip_version=4), _to(nets=["10.0.0.0/8"]), True),
        (_rule(ip_version=6), _to(nets=["10.0.0.0/8"]), False),
        (_rule(ip_version=4), _to(nets=["10.0.0.0/8", "fd00::/8"]), False),
        (_rule(not_protocol=TCP), _rule(protocol=UDP), True),
        (_rule(not_protocol=TCP), _rule(protocol=TCP), False),
        (_rule(not_protocol=TCP), _rule(not_protocol=TCP), True),
        (_rule(not_protocol=TCP), _rule(not_protocol=UDP), False),
        (_rule(icmp=IcmpType(8)), _rule(icmp=IcmpType(8, 0)), True),
        (_rule(icmp=IcmpType(8, 0)), _rule(icmp=IcmpType(8)), False),
        (_rule(icmp=IcmpType(8)), _rule(icmp=IcmpType(3)), False),
        (_rule(icmp=IcmpType(8)), _rule(protocol=ICMP), False),
        (_rule(not_icmp=IcmpType(8, 0)), _rule(not_icmp=IcmpType(8)), True),
        (_rule(not_icmp=IcmpType(8)), _rule(not_icmp=IcmpType(8, 0)), False),
        (_rule(not_icmp=IcmpType(8, 0)), _rule(not_icmp=IcmpType(8, 1)), False),
        (_rule(not_icmp=IcmpType(8)), _rule(protocol=TCP), True),
        (_rule(not_icmp=IcmpType(8)), _rule(icmp=IcmpType(3)), True),
        (_rule(not_icmp=IcmpType(8)), _rule(icmp=IcmpType(8)), False),
        (_to(nets=["10.0.0.0/8"]), _to(nets=["10.1.0.0/16", "10.0.0.0/8"]), True),
        (_to(nets=["10.0.0.0/8"]), _to(nets=["10.1.0.0/16", "11.0.0.0/16"]), False),
        (_to(nets=["10.0.0.0/8"]), _to(), False),
        (_to(nets=["::/0"]), _to(nets=["10.0.0.0/8"]), False),
        (_to(not_nets=["10.0.0.0/16"]), _to(not_nets=["10.0.0.0/8"]), True),
        (_to(not_nets=["10.0.0.0/8"]), _to(not_nets=["10.0.0.0/16"]), False),
        (_to(not_nets=["10.0.0.0/8"]), _to(nets=["11.0.0.0/8"]), True),
        (_to(not_nets=["10.0.0.0/8"]), _to(nets=["0.0.0.0/0"]), False),
        (_to(not_nets=["10.0.0.0/8"]), _to(nets=["fd00::/8"]), True),
        (_to(not_nets=["10.0.0.0/8"]), _to(), False),
        (_to(selector="has(a)"), _to(selector="a == 'b'"), True),
        (_to(selector="a == 'b'"), _to(selector="has(a)"), False),
        (_to(selector="all()"), _to(selector="a == 'b'"), True),
        (_to(selector="all()"), _to(), False),
        (_to(not_selector="a == 'b'"), _to(not_selector="has(a)"), True),
        (_to(not_selector="has(a)"), _to(not_selector="a == 'b'"), False),
        (_to(not_selector="has(a)"), _to(), False),
        (_to(nodes="has(a)"), _to(nodes="a in {'b', 'c'}"), True),
        (_to(nodes="has(a)"), _to(selector="has(a)"), False),
        (_to(ports=Ports(((80, 90),))), _to(ports=Ports(((80, 80), (85, 90)))), True),
        (_to(ports=Ports(((80, 90),))), _to(ports=Ports(((80, 91),))), False),
        (_to(ports=Ports(((80, 90),), ("http",))), _to(ports=Ports((), ("http",))), True),
        (_to(ports=Ports(((1, 65535),))), _to(ports=Ports((), ("http",))), False),
        (_to(ports=Ports(((80, 90),))), _to(), False),
        (_to(not_ports=Ports(((80, 80),))), _to(not_ports=Ports(((79, 81),))), True),
        (_to(not_ports=Ports(((79, 81),))), _to(not_ports=Ports(((80, 80),))), False),
        (_to(not_ports=Ports(((80, 80),))), _to(ports=Ports(((81, 90),))), True),
        (_to(not_ports=Ports(((80, 80),))), _to(ports=Ports(((80, 90),))), False),
        (_to(not_ports=Ports(((80, 80),))), _to(ports=Ports((), ("http",))), False),
        (_to(not_ports=Ports(((80, 80),)), protocol=ICMP), _to(protocol=ICMP), True),
        (_to(not_ports=Ports((), ("http",))), _to(not_ports=Ports((), ("http",))), True),
        (_to(not_ports=Ports((), ("http",))), _to(not_ports=Ports((), ("http",)), selector="has(a)"), False),
        (_to(service=SERVICE), _to(service=SERVICE_PORTS), True),
        (_to(service=SERVICE_PORTS), _to(service=SERVICE), False),
        (_to(service=SERVICE), _to(service=BackendMatch("n", "t", match_ports=False)), False),
        (_to(service=SERVICE), _to(), False),
        (_rule(unsupported="http"), _rule(protocol=TCP), False),
        (_rule(), _rule(unsupported="http"), False),
        (_rule(destination=Entity(impossible=True)), _rule(), False),
        (_rule(), _rule(source=Entity(impossible=True)), False),
    ],
)
def test_covers(wide: Rule, narrow: Rule, expected: bool) -> None:  # noqa: FBT001 - a table
    """The destination stands for both sides, which are compared alike."""
    assert covers(wide, narrow) is expected


def test_the_source_counts_too() -> None:
    """Both sides must be covered."""
    from_ten = _rule(source=Entity(nets=(ip_network("10.0.0.0/8"),)))
    assert covers(_rule(), from_ten)
    assert not covers(from_ten, _rule())


def test_implication_of_selectors() -> None:
    """Conjunctions imply their parts; disjunctions are implied by theirs."""
    assert implies(parse("a == 'b' && c == 'd'"), parse("c == 'd'"))
    assert implies(parse("a == 'b'"), parse("a == 'b' || c == 'd'"))
    assert implies(parse("a in {'b'}"), parse("a != 'c'"))
    assert not implies(parse("a == 'b' || c == 'd'"), parse("a == 'b'"))


def _named(*patterns: str, **more: Any) -> Rule:
    return _to(domains=frozenset(patterns), **more)


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        (_to(), _named("a.b"), True),
        (_named("a.b"), _to(), False),
        (_named("a.b", "*.c"), _named("a.b"), True),
        (_named("*.b"), _named("a.b", "*.a.b", "x.*.b"), True),
        (_named("*.b"), _named("b"), False),
        (_named("a.b"), _named("a.b", "c.b"), False),
        (_named("a.b", ports=Ports(((80, 80),))), _named("a.b"), False),
        (_to(nets=["192.0.2.0/24"]), _named("a.b"), False),
    ],
)
def test_names_of_rules(wide: Rule, narrow: Rule, expected: bool) -> None:  # noqa: FBT001 - a table
    """A rule with names is covered by one without, and by one with patterns that match every name of its own."""
    assert covers(wide, narrow) is expected


SETS = (LabelledNets("s", {"for": "cdn"}, (), frozenset({"a.b"})),)


@pytest.mark.parametrize(
    ("action", "selector", "sets", "expected"),
    [
        (Action.ALLOW, "has(for)", SETS, True),
        (Action.DENY, "has(for)", SETS, False),
        (Action.PASS, "has(for)", SETS, False),
        (Action.DENY, "has(for)", None, False),
        (Action.DENY, "has(for)", (), True),
        (Action.DENY, "has(for) && role == 'x'", SETS, True),
    ],
)
def test_names_of_sets(
    action: Action,
    selector: str,
    sets: tuple[LabelledNets, ...] | None,
    expected: bool,  # noqa: FBT001 - a table
) -> None:
    """A Deny of a set covers no Allow of it, if the set has names: these only the Allow rule knows."""
    wide = replace(_to(selector="has(for)"), action=action)
    assert covers(wide, _to(selector=selector), sets) is expected
    assert covers(replace(_to(), action=action), _to(selector=selector), sets)
