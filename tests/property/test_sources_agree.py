# SPDX-License-Identifier: Apache-2.0
"""The same objects from files and from an API server give the same tables, in whatever order the server sends them.

A server's history has states that end, repeats and relists, and the agent takes changes up at any moment: only the end counts.
"""

from __future__ import annotations

import json

import hypothesis.strategies as st
import yaml
from calico_manifests import calico_clusters
from hypothesis import given
from manifests import Manifest, clusters

from netpol_ebpf.agent.enforcement import _changed_objects
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.policy.translate import Derivation, derive
from netpol_ebpf.policy.types import World
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.sources.kubernetes.cache import Cache, Entry
from netpol_ebpf.sources.kubernetes.decoding import KINDS, Name, WatchedKind, decode_object, decode_page
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


class Server:
    """What a server has, and its readers' cache: each change reaches the cache, the agent takes it up when `take` is called."""

    def __init__(self) -> None:
        self.cache = Cache(KINDS)
        self.objects: dict[WatchedKind, dict[Name, Manifest]] = {kind: {} for kind in KINDS}
        self.version = 0
        self.derivation, self.compiler = Derivation(), Compiler()
        self.taken = 0

    def put(self, manifest: Manifest) -> None:
        """An ADDED or MODIFIED event; the same state again has another resourceVersion."""
        kind = next(one for one in KINDS if (one.api_version, one.kind) == (manifest["apiVersion"], manifest["kind"]))
        name, entry = self._entry(kind, manifest)
        self.objects[kind][name] = manifest
        self.cache.stores[kind].put(name, entry)

    def remove(self, manifest: Manifest) -> None:
        """A DELETED event, if there is the object."""
        kind = next(one for one in KINDS if (one.api_version, one.kind) == (manifest["apiVersion"], manifest["kind"]))
        name = Name(manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"])
        if self.objects[kind].pop(name, None) is not None:
            self.cache.stores[kind].remove(name)

    def relist(self, kind: WatchedKind, missed: list[Manifest]) -> None:
        """A complete list after a WATCH that ended; ``missed``: objects that went without an event."""
        for one in missed:
            name = Name(one["metadata"].get("namespace", ""), one["metadata"]["name"])
            self.objects[kind].pop(name, None)
        staged = dict(self._entry(kind, one) for one in self.objects[kind].values())
        self.cache.stores[kind].commit(staged, orphaned=set())

    def take(self) -> None:
        """What the agent does: all changes since the last time, as one."""
        for event in self.cache.drain():
            self.taken += 1
            if isinstance(event, Upsert):
                self.derivation.upsert(event.resource, event.key)
            else:
                self.derivation.remove(*event.key)
        for kind, key, new in _changed_objects(self.derivation.take_changes()):
            if new is None:
                self.compiler.remove(kind, key)
            else:
                self.compiler.upsert(new)
        self.compiler.commit()

    def _entry(self, kind: WatchedKind, manifest: Manifest) -> tuple[Name, Entry]:
        self.version += 1
        metadata = {**manifest["metadata"], "resourceVersion": str(self.version)}
        decoded = decode_object(kind, json.dumps({**manifest, "metadata": metadata}).encode())
        return decoded.name, self.cache.stores[kind].prepare(decoded)


STEPS = ("state", "other state", "deletion", "relist", "relist after a gap", "take")


@given(st.one_of(clusters(), calico_clusters()), st.data())
def test_history_of_the_api_gives_the_tables_of_its_end(manifests: list[Manifest], data: st.DataObject) -> None:
    """Other states, repeats, deletions, lists with and without a gap before them; taken up together or one by one."""
    watched = {(kind.api_version, kind.kind) for kind in KINDS}
    objects = [one for one in manifests if (one["apiVersion"], one["kind"]) in watched]
    server = Server()
    try:
        for kind in KINDS:
            server.relist(kind, [])
        for one in data.draw(st.lists(st.sampled_from(objects), max_size=5)) if objects else ():
            server.put(one)
        for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=25)):
            there = [one for known in server.objects.values() for one in known.values()]
            ends = step == "deletion" or step.startswith("relist")
            choices = there if ends and there else objects
            one = data.draw(st.sampled_from(choices)) if choices else None
            if step == "take":
                server.take()
            elif one is None:
                continue
            elif step == "deletion":
                server.remove(one)
            elif step.startswith("relist"):
                kind = next(kind for kind in KINDS if (kind.api_version, kind.kind) == (one["apiVersion"], one["kind"]))
                server.relist(kind, [one] if step == "relist after a gap" else [])
            else:
                labels = {"other": data.draw(st.sampled_from("abc"))} if step == "other state" else {}
                own = one["metadata"].get("labels", {})
                server.put(
                    {**one, "metadata": {**one["metadata"], **({"labels": {**own, **labels}} if labels else {})}}
                )
        kept = [one for one in objects if data.draw(st.booleans())]
        for one in data.draw(st.permutations(objects)):
            if one in kept:
                server.put(one)
            else:
                server.remove(one)
        server.take()
        before = server.taken
        for one in kept:  # again: a heartbeat, a list
            server.put(one)
        server.take()
        assert server.taken == before
    finally:
        server.cache.close()
    expected = compiled(from_files(kept))
    assert compiled(server.derivation.world) == expected
    assert server.compiler.canonical() == expected
