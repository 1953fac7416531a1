# SPDX-License-Identifier: Apache-2.0
"""Coverage of rules is a proof: no packet in any world matches the narrow rule and not the wide one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import (
    ADDRESSES,
    EDGES,
    ICMP_CODES,
    ICMP_TYPES,
    PROTOCOLS,
    icmp_types,
    nets,
    ports,
    rules,
    selectors,
    service_matches,
    worlds,
)  # fmt: skip

from netpol_ebpf.model.matching import destination_side, rule_matches, source_side
from netpol_ebpf.policy.coverage import covers, excludes
from netpol_ebpf.policy.types import ICMP, ICMPV6, SCTP, TCP, UDP, Action, Entity, Packet, Rule, World

PORTS = sorted({port for edge in EDGES for port in (edge - 1, edge, edge + 1) if 0 < port < 65536})
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "nets": nets,
    "not_nets": nets,
    "selector": selectors,
    "not_selector": selectors,
    "nodes": selectors,
    "ports": ports,
    "not_ports": ports,
    "service": service_matches,
}
PROTOCOL_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "ip_version": st.sampled_from([4, 6]),
    "protocol": st.sampled_from(PROTOCOLS),
    "not_protocol": st.sampled_from(PROTOCOLS),
    "icmp": icmp_types,
    "not_icmp": icmp_types,
}


def _pair(draw: st.DrawFn, least: Any, fields: dict[str, st.SearchStrategy[Any]]) -> tuple[Any, Any]:
    """Two values with few fields, so that much matches them, and of which the first is the second with one field changed."""
    names = st.sampled_from(sorted(fields))
    chosen = draw(st.sets(names, max_size=2))
    name = draw(names)
    assume(not {"selector", "not_selector"} <= {*chosen, name})  # no entity has both
    narrow = replace(least, **{one: draw(fields[one]) for one in sorted(chosen)})
    return replace(narrow, **{name: draw(st.just(getattr(least, name)) | fields[name])}), narrow


@st.composite
def _entity_pairs(draw: st.DrawFn) -> tuple[Rule, Rule]:
    """Two rules that differ in their destination."""
    rule = Rule(Action.DENY, 0, protocol=draw(st.sampled_from([None, TCP, UDP])))
    wide, narrow = _pair(draw, Entity(), FIELDS)
    return replace(rule, destination=wide), replace(rule, destination=narrow)


@st.composite
def _protocol_pairs(draw: st.DrawFn) -> tuple[Rule, Rule]:
    """Two rules that differ in family, protocol and ICMP type."""
    wide, narrow = _pair(draw, Rule(Action.DENY, 0), PROTOCOL_FIELDS)
    return wide, narrow


def _packets(destination_ports: bool) -> Iterator[Packet]:  # noqa: FBT001 - which of the two grids
    """A grid over all that the universes of the strategies distinguish."""
    for destination in ADDRESSES:
        source = next(address for address in ADDRESSES if address.version == destination.version)
        if destination_ports:
            yield from (Packet(source, destination, TCP, 80, port) for port in PORTS)
            yield from (Packet(source, destination, protocol, 80, 80) for protocol in (UDP, SCTP))
            yield Packet(source, destination, ICMP if destination.version == 4 else ICMPV6, icmp_type=8)
            continue
        for protocol in (*PROTOCOLS, 255):
            if protocol in (ICMP, ICMPV6):
                for icmp_type in (*ICMP_TYPES, 135):
                    yield from (
                        Packet(source, destination, protocol, 0, 0, icmp_type, code) for code in (*ICMP_CODES, 2)
                    )
            else:
                yield Packet(source, destination, protocol)


def _assert_sound(world: World, wide: Rule, narrow: Rule, *, destination_ports: bool) -> None:
    for packet in _packets(destination_ports):
        source, destination = source_side(world, packet), destination_side(world, packet)
        if rule_matches(world, narrow, packet, source, destination):
            assert rule_matches(world, wide, packet, source, destination), packet


@given(world=worlds(max_policies=0), pair=_entity_pairs())
def test_coverage_of_entities_is_sound(world: World, pair: tuple[Rule, Rule]) -> None:
    """Nets, selectors, ports and services."""
    assume(covers(*pair))
    _assert_sound(world, *pair, destination_ports=True)
    wide, narrow = (replace(rule, source=rule.destination, destination=Entity()) for rule in pair)
    assert covers(wide, narrow)


@given(pair=_protocol_pairs())
def test_coverage_of_protocols_is_sound(pair: tuple[Rule, Rule]) -> None:
    """IP version, protocol, ICMP type and code, and their negations."""
    assume(covers(*pair))
    _assert_sound(World(), *pair, destination_ports=False)


@given(rule=rules())
def test_a_rule_covers_itself(rule: Rule) -> None:
    """Unless it is marked as one that matches nothing."""
    alive = not rule.unsupported and not rule.source.impossible and not rule.destination.impossible
    assert covers(rule, rule) is alive
    if alive:
        assert covers(Rule(Action.ALLOW, 0), rule)


def _assert_exclusive(world: World, one: Rule, other: Rule, *, destination_ports: bool) -> None:
    for packet in _packets(destination_ports):
        source, destination = source_side(world, packet), destination_side(world, packet)
        matched = [rule_matches(world, rule, packet, source, destination) for rule in (one, other)]
        assert not all(matched), packet


@st.composite
def _exclusive(draw: st.DrawFn, pairs: st.SearchStrategy[tuple[Rule, Rule]]) -> tuple[Rule, Rule]:
    one, other = draw(pairs)[0], draw(pairs)[0]
    assume(excludes(one, other))
    return one, other


@settings(suppress_health_check=list(HealthCheck))
@given(world=worlds(max_policies=0), pair=_exclusive(_entity_pairs()))
def test_exclusion_of_entities_is_sound(world: World, pair: tuple[Rule, Rule]) -> None:
    """Nets, selectors, ports and services; on either side."""
    _assert_exclusive(world, *pair, destination_ports=True)
    assert excludes(*(replace(rule, source=rule.destination, destination=Entity()) for rule in pair))


@settings(suppress_health_check=list(HealthCheck))
@given(pair=_exclusive(_protocol_pairs()))
def test_exclusion_of_protocols_is_sound(pair: tuple[Rule, Rule]) -> None:
    """IP version, protocol, ICMP type and code, and their negations."""
    _assert_exclusive(World(), *pair, destination_ports=False)
