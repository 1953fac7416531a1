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


def _configurations(count: int) -> st.SearchStrategy[list[Manifest]]:
    """Nodes, what makes host endpoints of them, and failsafe ports; few names, so that they meet."""
    api = "projectcalico.org/v3"
    names = st.sampled_from(("a", "a-b"))
    spec = st.fixed_dictionaries(
        {},
        optional={
            f"failsafe{way}HostPorts": st.just([]) | st.just([{"protocol": "TCP", "port": 22}])
            for way in ("Inbound", "Outbound")
        },
    )
    template = st.fixed_dictionaries(
        {"generateName": st.sampled_from(("c", "b-c"))}, optional={"labels": st.just({"x": "w"})}
    )
    hosts = st.fixed_dictionaries(
        {
            "autoCreate": st.sampled_from(("Enabled", "Disabled")),
            "createDefaultHostEndpoint": st.sampled_from(("Enabled", "Disabled")),
            "templates": st.lists(
                template.map(lambda one: {**one, "interfaceCIDRs": ["10.0.0.0/8"]}),
                max_size=2,
                unique_by=lambda one: str(one["generateName"]),
            ),
        }
    )
    nodes = st.builds(
        lambda name, last: {
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": f"10.0.0.{last}"}]},
        },
        names, st.integers(1, 2),
    )  # fmt: skip
    felix = st.builds(
        lambda name, given: {"apiVersion": api, "kind": "FelixConfiguration", "metadata": {"name": name}, "spec": given},
        st.sampled_from(("default", "node.a")), spec,
    )  # fmt: skip
    controllers = hosts.map(
        lambda one: {
            "apiVersion": api, "kind": "KubeControllersConfiguration", "metadata": {"name": "default"},
            "spec": {"controllers": {"node": {"hostEndpoint": one}}},
        }
    )  # fmt: skip
    written = names.map(
        lambda name: {
            "apiVersion": api, "kind": "HostEndpoint", "metadata": {"name": f"{name}-auto-hep"},
            "spec": {"node": name, "interfaceName": "eth0"},
        }
    )  # fmt: skip
    return st.lists(
        nodes | nodes | felix | controllers | written,
        max_size=count,
        unique_by=lambda one: (str(one["kind"]), str(one["metadata"]["name"])),
    )


CLUSTERS = st.builds(list.__add__, clusters(), _configurations(6))


@given(CLUSTERS, CLUSTERS, st.data())
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


@given(CLUSTERS, st.data())
def test_all_removed_is_a_fresh_world(manifests: list[Manifest], data: st.DataObject) -> None:
    """Adding objects and removing them all leaves what there was without any."""
    resources = read(manifests)
    derivation = Derivation()
    for resource in resources:
        derivation.upsert(resource)
    for resource in data.draw(st.permutations(resources)):
        derivation.remove(*key_of(resource))
    assert derivation.world == Derivation().world
