# SPDX-License-Identifier: Apache-2.0
"""The incremental translation keeps state, not history: any order of events ends in the world of the final objects."""

from __future__ import annotations

import hypothesis.strategies as st
import yaml
from hypothesis import given
from manifests import Manifest, clusters

from netpol_ebpf.policy.translate import Derivation, derive, key_of
from netpol_ebpf.policy.types import World
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.resources.types import Resource


def read(manifests: list[Manifest]) -> list[Resource]:
    """The typed resources of these objects; they are all valid."""
    return parse_documents(yaml.safe_dump_all(manifests, sort_keys=False), "cluster.yaml").check()


@given(clusters(), clusters(), st.data())
def test_any_order_ends_in_the_same_world(final: list[Manifest], before: list[Manifest], data: st.DataObject) -> None:
    """Whatever was there first, and in whatever order objects come and go, the world is that of what is there now."""
    resources, passing = read(final), read(before)
    derivation = Derivation()
    copy = World()
    kept = {key_of(resource) for resource in resources}
    for resource in data.draw(st.permutations(passing)):
        derivation.upsert(resource)
        if data.draw(st.booleans()):
            derivation.take_changes().apply_to(copy)
    goners = [key_of(resource) for resource in passing if key_of(resource) not in kept]
    events: list[Resource | tuple[str, str, str]] = [*resources, *goners]
    for event in data.draw(st.permutations(events)):
        if isinstance(event, tuple):
            derivation.remove(*event)
        else:
            derivation.upsert(event)
    assert derivation.world == derive(resources)
    derivation.take_changes().apply_to(copy)
    assert copy == derivation.world


@given(clusters(), st.data())
def test_all_removed_is_a_fresh_world(manifests: list[Manifest], data: st.DataObject) -> None:
    """Adding objects and removing them all leaves what there was without any."""
    resources = read(manifests)
    derivation = Derivation()
    for resource in resources:
        derivation.upsert(resource)
    for resource in data.draw(st.permutations(resources)):
        derivation.remove(*key_of(resource))
    assert derivation.world == Derivation().world
