# SPDX-License-Identifier: Apache-2.0
"""Coverage of rules is a proof: no packet in any world matches the narrow rule and not the wide one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import packets, rules, worlds

from netpol_ebpf.model.matching import destination_side, rule_matches, source_side
from netpol_ebpf.policy.coverage import covers
from netpol_ebpf.policy.types import Entity, Packet, Rule, World


@st.composite
def _relatives(draw: st.DrawFn) -> tuple[Rule, Rule]:
    """Two rules that are likely to be comparable: the wide one is the other with some of its parts left out."""
    narrow = draw(rules())
    wide = draw(st.sampled_from([narrow, draw(rules())]))
    parts = st.sampled_from(["ip_version", "protocol", "not_protocol", "icmp", "not_icmp"])
    wide = replace(wide, **_nothing(draw(st.sets(parts)), None))
    return replace(wide, source=_less(draw, wide.source), destination=_less(draw, wide.destination)), narrow


def _less(draw: st.DrawFn, entity: Entity) -> Entity:
    parts = st.sampled_from(["selector", "not_selector", "nodes", "ports", "not_ports", "service"])
    lists = st.sampled_from(["nets", "not_nets"])
    return replace(entity, **_nothing(draw(st.sets(parts)), None), **_nothing(draw(st.sets(lists)), ()))


def _nothing(fields: set[str], value: Any) -> dict[str, Any]:
    return dict.fromkeys(fields, value)


@given(world=worlds(), relatives=_relatives(), drawn=st.lists(packets(), min_size=4, max_size=12))
def test_coverage_is_sound(world: World, relatives: tuple[Rule, Rule], drawn: list[Packet]) -> None:
    """Whatever matches the covered rule matches the covering one."""
    wide, narrow = relatives
    assume(covers(wide, narrow))
    for packet in drawn:
        source, destination = source_side(world, packet), destination_side(world, packet)
        if rule_matches(world, narrow, packet, source, destination):
            assert rule_matches(world, wide, packet, source, destination)
