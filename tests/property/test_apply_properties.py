# SPDX-License-Identifier: Apache-2.0
"""However it came about, the maps hold the tables: changes one after the other leave what one whole write would."""

from __future__ import annotations

import sys
from ipaddress import ip_network
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from memory_maps import MemoryMap, memory_maps
from strategies import worlds

from netpol_ebpf.apply.applier import ARRAYS, Applier, Binding
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.policy.types import EndpointKey, World

WRITTEN_BY_OTHERS = ("np_config",)


def content(maps: dict[str, MemoryMap]) -> dict[str, dict[bytes, bytes]]:
    """Every element that is not an array's zeros."""
    return {
        name: {key: row for key, row in one.rows.items() if name not in ARRAYS or any(row)}
        for name, one in maps.items()
        if name not in WRITTEN_BY_OTHERS
    }


bindings = st.builds(Binding, st.integers(2, 5), allowed_sources=st.sampled_from(((), (ip_network("192.0.2.0/24"),))))


@given(st.lists(worlds(max_policies=3), min_size=1, max_size=4), st.data())
def test_changes_leave_what_a_whole_write_would(steps: list[World], data: st.DataObject) -> None:
    """After each of several changes, with endpoints found and lost in between, the maps are as if written at once."""
    compiler, maps = Compiler(), memory_maps([])
    applier = Applier(maps, wait=lambda: None)
    bound: dict[EndpointKey, Binding] = {}
    for world in steps:
        compiler.replace(world)
        applier.apply(compiler.commit())
        for key in data.draw(st.sets(st.sampled_from(sorted({*world.endpoints, *bound})))):
            binding = data.draw(st.none() | bindings)
            if binding is None:
                applier.unbind(key)
                bound.pop(key, None)
            elif binding.ifindex not in {one.ifindex for other, one in bound.items() if other != key}:
                applier.bind(key, binding)
                bound[key] = binding
        fresh = memory_maps([])
        whole = Applier(fresh)
        for key, binding in bound.items():
            whole.bind(key, binding)
        whole.fill(compiler.tables)
        assert content(maps) == content(fresh)
        assert {name: count for name, count in applier.counts.items() if count} == {
            name: len(rows) for name, rows in content(fresh).items() if rows and name not in ARRAYS
        }
