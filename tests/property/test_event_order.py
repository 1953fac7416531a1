# SPDX-License-Identifier: Apache-2.0
"""The compiler keeps state, not history: tables depend on the objects in force alone, and what went leaves nothing."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis import given
from strategies import worlds

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.compiler import PolicyObject, key_of
from netpol_ebpf.compiler.tables import Change
from netpol_ebpf.policy.types import PolicySettings, World


def objects_of(world: World) -> list[PolicyObject]:
    """Every object of a world, the settings too."""
    tables: list[dict[Any, PolicyObject]] = [
        getattr(world, part.name) for part in fields(world) if part.name != "settings"
    ]
    assert is_dataclass(world)
    return [*(obj for table in tables for obj in table.values()), world.settings]


def compiled(world: World) -> Compiler:
    """A fresh compiler with that world."""
    compiler = Compiler()
    compiler.replace(world)
    compiler.commit()
    return compiler


@given(worlds(max_policies=3), worlds(max_policies=2), st.data())
def test_any_order_of_events_gives_the_same_tables(final: World, before: World, data: st.DataObject) -> None:
    """Other objects first, then in any order and any batches the final ones come and the others go."""
    compiler = Compiler()
    wanted = {(type(obj), key_of(obj)): obj for obj in objects_of(final)}
    for obj in data.draw(st.permutations(objects_of(before))):
        compiler.upsert(obj)
        if data.draw(st.integers(0, 3)) == 0:
            compiler.commit()
    goners = [key for obj in objects_of(before) if (key := (type(obj), key_of(obj))) not in wanted]
    for kind, key in data.draw(st.permutations([*wanted, *goners])):
        final_object = wanted.get((kind, key))
        if final_object is None:
            compiler.remove(kind, key)
        else:
            compiler.upsert(final_object)
        if data.draw(st.integers(0, 3)) == 0:
            compiler.commit()
    compiler.commit()
    assert compiler.world == final
    assert compiler.canonical() == compiled(final).canonical()


@given(worlds(), st.data())
def test_removing_everything_returns_to_the_fresh_state(world: World, data: st.DataObject) -> None:
    """Objects that came and went, in any order and any batches, leave no row behind."""
    compiler = compiled(world)
    for obj in data.draw(st.permutations(objects_of(world))):
        compiler.remove(type(obj), key_of(obj))
        if data.draw(st.integers(0, 3)) == 0:
            compiler.commit()
    compiler.commit()
    fresh = Compiler()
    fresh.commit()
    assert compiler.world == World(settings=PolicySettings())
    assert compiler.canonical() == fresh.canonical()
    assert [len(table) for table in compiler.tables.all()] == [len(table) for table in fresh.tables.all()]


@given(worlds(), worlds(max_policies=2))
def test_a_detour_changes_nothing(world: World, other: World) -> None:
    """Going to another world and back gives the tables one started with; going nowhere gives no change at all."""
    compiler = compiled(world)
    before = compiler.canonical()
    compiler.replace(other)
    compiler.commit()
    compiler.replace(world)
    compiler.commit()
    assert compiler.canonical() == before
    compiler.replace(world)
    change = compiler.commit()
    assert change == Change()
