# SPDX-License-Identifier: Apache-2.0
"""The same objects from files and from an API server give the same tables, in whatever order the server sends them."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import yaml
from calico_manifests import calico_clusters
from hypothesis import given
from manifests import Manifest, clusters

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.policy.translate import Derivation, derive
from netpol_ebpf.policy.types import World
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.sources.kubernetes.cache import Cache
from netpol_ebpf.sources.kubernetes.decoding import KINDS, decode_object, decode_page
from netpol_ebpf.sources.source import Upsert


def from_files(manifests: list[Manifest]) -> World:
    return derive(parse_documents(yaml.safe_dump_all(manifests, sort_keys=False), "cluster.yaml").check())


def from_api(manifests: list[Manifest], listed: list[bool]) -> World:
    """The objects through lists and then, those that are not ``listed``, through events, as the readers of the API take them up."""
    cache, derivation = Cache(KINDS), Derivation()

    def take() -> None:
        for event in cache.drain():
            if isinstance(event, Upsert):
                derivation.upsert(event.resource, event.key)
            else:
                derivation.remove(*event.key)

    try:
        for kind, store in cache.stores.items():
            whole = [one for one in manifests if (one["apiVersion"], one["kind"]) == (kind.api_version, kind.kind)]
            known = [one for one in whole if listed[manifests.index(one)]]
            page = decode_page(json.dumps({"metadata": {"resourceVersion": "1"}, "items": known}).encode())
            decoded = [decode_object(kind, raw) for raw in page.items]
            store.commit({one.name: store.prepare(one) for one in decoded}, orphaned=set())
        take()
        for manifest in manifests:
            if not listed[manifests.index(manifest)]:
                kind = next(
                    one for one in KINDS if (one.api_version, one.kind) == (manifest["apiVersion"], manifest["kind"])
                )
                one = decode_object(kind, json.dumps(manifest).encode())
                cache.stores[kind].put(one.name, cache.stores[kind].prepare(one))
                take()
        assert [one for one in cache.problems() if one.severity == "error"] == []
    finally:
        cache.close()
    derivation.take_changes()
    return derivation.world


def compiled(world: World) -> object:
    compiler = Compiler()
    compiler.replace(world)
    compiler.commit()
    return compiler.canonical()


@given(st.one_of(clusters(), calico_clusters()), st.data())
def test_files_and_api_give_the_same_tables(manifests: list[Manifest], data: st.DataObject) -> None:
    """Profiles aside, which an API server makes of namespaces and accounts by itself."""
    watched = {(kind.api_version, kind.kind) for kind in KINDS}
    objects = [one for one in manifests if (one["apiVersion"], one["kind"]) in watched]
    sent = [
        {**one, "metadata": {**one["metadata"], "resourceVersion": str(number)}}
        for number, one in enumerate(objects, 1)
    ]
    sent = data.draw(st.permutations(sent))
    listed = data.draw(st.lists(st.booleans(), min_size=len(sent), max_size=len(sent)))
    assert compiled(from_api(sent, listed)) == compiled(from_files(objects))
