# SPDX-License-Identifier: Apache-2.0
"""Coverage of rules with domain names is a proof too: with any names, no packet matches the narrow rule alone."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from netpol_ebpf.model.matching import destination_side, rule_matches, source_side
from netpol_ebpf.policy.coverage import covers
from netpol_ebpf.policy.types import TCP, Action, Entity, LabelledNets, Packet, Rule, World
from netpol_ebpf.selector import parse

PATTERNS = ("a.b", "*.b", "b", "*.a.b", "x.*.b")
NAMES = ("a.b", "b", "c.b", "x.a.b", "x.c.b", "a.c")
SELECTORS = tuple(map(parse, ("kind == 'one'", "has(kind)", "all()", "!has(kind)")))
NETS = (ip_network("192.0.2.0/24"), ip_network("0.0.0.0/0"))
PACKETS = tuple(Packet(ip_address("10.0.0.1"), ip_address(f"192.0.{part}.1"), TCP, 40000, 80) for part in (2, 3))

patterns: st.SearchStrategy[frozenset[str]] = st.just(frozenset()) | st.frozensets(
    st.sampled_from(PATTERNS), min_size=1, max_size=3
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "domains": patterns,
    "selector": st.none() | st.sampled_from(SELECTORS),
    "nets": st.just(()) | st.sampled_from(NETS).map(lambda net: (net,)),
}
entities = st.builds(Entity, **FIELDS)
actions = st.sampled_from((Action.ALLOW, Action.DENY))
rules = st.builds(Rule, actions, st.just(0), destination=entities).map(lambda rule: _valid(rule))


def _valid(rule: Rule) -> Rule:
    """The rule without patterns, unless it allows."""
    if rule.action is Action.ALLOW:
        return rule
    return replace(rule, destination=replace(rule.destination, domains=frozenset()))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Rule, Rule]:
    """Two rules, of which the first is the second with another action and one field changed or none."""
    narrow = draw(rules)
    field = draw(st.sampled_from((None, *FIELDS)))
    destination = narrow.destination if field is None else replace(narrow.destination, **{field: draw(FIELDS[field])})
    return _valid(Rule(draw(actions), 0, destination=destination)), narrow


sets = st.lists(
    st.tuples(st.sampled_from(({"kind": "one"}, {"kind": "two"}, {})), st.sampled_from(((), NETS[:1])), patterns),
    min_size=1,
    max_size=2,
).map(lambda drawn: {str(at): LabelledNets(str(at), *parts) for at, parts in enumerate(drawn)})


@settings(max_examples=15 * settings().max_examples)
@given(network_sets=sets, pair=pairs(), names=st.frozensets(st.sampled_from(NAMES)), known=st.booleans())
def test_coverage_with_names_is_sound(
    network_sets: dict[str, LabelledNets],
    pair: tuple[Rule, Rule],
    names: frozenset[str],
    known: bool,  # noqa: FBT001 - drawn
) -> None:
    """Own patterns, sets with names, nets, and every action; with the sets known to the proof, and without."""
    world = World(network_sets=network_sets)
    wide, narrow = pair
    assume(covers(wide, narrow, list(network_sets.values()) if known else None))
    for packet in PACKETS:
        sides = source_side(world, packet), destination_side(world, packet, names)
        assert rule_matches(world, wide, packet, *sides) or not rule_matches(world, narrow, packet, *sides)
