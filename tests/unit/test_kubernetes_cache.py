# SPDX-License-Identifier: Apache-2.0
"""The known state of the cluster: synchronisation, comparison of contents, problems, the saved state."""

from __future__ import annotations

import hashlib
import json
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver_traces import NAMESPACES, PODS, TIERS, pod, tier

from netpol_ebpf.sources.kubernetes.cache import Cache, SavedKind, SavedObject
from netpol_ebpf.sources.kubernetes.decoding import KINDS, MalformedError, WatchedKind, decode_object
from netpol_ebpf.sources.kubernetes.saved_state import load_state, store_state
from netpol_ebpf.sources.source import ObjectEvent, Remove, Upsert

STORED_TIERS = next(kind for kind in KINDS if (kind.api_version, kind.kind) == ("crd.projectcalico.org/v1", "Tier"))


@pytest.fixture
def cache() -> Iterator[Cache]:
    """Of three kinds."""
    made = Cache((NAMESPACES, PODS, TIERS))
    yield made
    made.close()


def put(cache: Cache, kind: WatchedKind, item: dict[str, Any]) -> None:
    """As an event would."""
    decoded = decode_object(kind, json.dumps(item).encode())
    cache.stores[kind].put(decoded.name, cache.stores[kind].prepare(decoded))


def commit(cache: Cache, kind: WatchedKind, *items: dict[str, Any]) -> None:
    """As a list would."""
    store = cache.stores[kind]
    decoded = [decode_object(kind, json.dumps(item).encode()) for item in items]
    store.commit({one.name: store.prepare(one) for one in decoded}, orphaned=set())


def sync(cache: Cache) -> None:
    """Every kind listed, with nothing in it, and that taken."""
    for kind in cache.kinds:
        commit(cache, kind)
    assert cache.drain() == ()
    cache.calm()


def changes(events: tuple[ObjectEvent, ...]) -> list[str]:
    """The events as text."""
    return [f"{'+' if isinstance(event, Upsert) else '-'}{event.key}" for event in events]


def test_nothing_is_given_out_until_every_kind_was_listed(cache: Cache) -> None:
    """A policy without the pods that it selects, or the reverse, is no state of the cluster."""
    commit(cache, PODS, pod("web"))
    commit(cache, NAMESPACES)
    assert not cache.has_synced
    assert cache.unsynced == (TIERS,)
    assert cache.drain() == ()
    commit(cache, TIERS, tier("one"))
    assert cache.has_synced
    assert changes(cache.drain()) == ["+Pod/prod/web", "+Tier/one"]


def test_empty_cluster_is_a_state(cache: Cache) -> None:
    """Given out once every kind was listed."""
    cache.drain()
    assert not cache.is_given
    sync(cache)
    assert cache.is_given


def test_descriptor_is_readable_when_there_is_something(cache: Cache) -> None:
    """And not otherwise."""

    def is_readable() -> bool:
        return bool(select.select([cache.descriptor], [], [], 0)[0])

    assert not is_readable()
    sync(cache)
    assert not is_readable()
    put(cache, PODS, pod("web"))
    assert is_readable()
    cache.calm()
    assert not is_readable()
    put(cache, PODS, pod("web", "6"))
    assert not is_readable()


def test_content_is_compared_not_versions(cache: Cache) -> None:
    """A new resourceVersion alone is no change; a changed default under the old one is."""
    sync(cache)
    put(cache, TIERS, tier("one", "5"))
    assert changes(cache.drain()) == ["+Tier/one"]
    put(cache, TIERS, tier("one", "6"))
    assert cache.drain() == ()
    put(cache, TIERS, tier("one", "6", order=99))
    assert changes(cache.drain()) == ["+Tier/one"]


def test_what_no_parser_reads_is_no_change(cache: Cache) -> None:
    """Of a policy everything is decoded; an annotation means nothing to it."""
    sync(cache)
    item = tier("one", "5")
    put(cache, TIERS, item)
    assert [event.version for event in cache.drain()] == ["5"]
    item["metadata"] |= {"resourceVersion": "6", "annotations": {"a": "b"}}
    put(cache, TIERS, item)
    assert cache.drain() == ()


def test_same_fields_are_parsed_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relist of a large cluster costs its decoding."""
    sync(cache)
    put(cache, PODS, pod("web", "5"))

    def fail(*_arguments: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr("netpol_ebpf.sources.kubernetes.cache.parse", fail)
    put(cache, PODS, pod("web", "6"))
    with pytest.raises(AssertionError, match="parsed again"):
        put(cache, PODS, pod("web", "7", address="10.0.0.2"))


def test_latest_state_alone_is_kept(cache: Cache) -> None:
    """However often an object changes before it is taken, it is one change."""
    sync(cache)
    for number in range(100):
        put(cache, PODS, pod("web", str(number), address=f"10.0.0.{number}"))
    events = cache.drain()
    assert changes(events) == ["+Pod/prod/web"]
    assert str(events[0].resource.addresses[0]) == "10.0.0.99"  # type: ignore[union-attr]


def test_object_that_came_and_went_is_no_event(cache: Cache) -> None:
    """Between two drains."""
    sync(cache)
    put(cache, PODS, pod("web"))
    cache.stores[PODS].remove(next(iter(cache.stores[PODS].entries)))
    assert cache.drain() == ()


def test_list_is_a_difference(cache: Cache) -> None:
    """What it names stays or comes, what it does not name goes; what is the same is no event."""
    sync(cache)
    commit(cache, PODS, pod("a"), pod("b"))
    cache.drain()
    commit(cache, PODS, pod("b", "9"), pod("c"))
    events = cache.drain()
    assert changes(events) == ["-Pod/prod/a", "+Pod/prod/c"]
    assert isinstance(events[0], Remove)


def test_invalid_object_keeps_its_last_good_state(cache: Cache) -> None:
    """And is reported by kind and name until it is valid, or gone."""
    sync(cache)
    put(cache, TIERS, tier("one"))
    cache.drain()
    put(cache, TIERS, tier("one", order="first"))
    assert cache.drain() == ()
    assert {problem.obj for problem in cache.problems()} == {"Tier/one"}
    assert "last good state stays in force" in cache.problems()[-1].message
    put(cache, TIERS, tier("one", order=11))
    assert changes(cache.drain()) == ["+Tier/one"]
    assert cache.problems() == ()


def test_invalid_object_without_a_good_state_is_reported(cache: Cache) -> None:
    """Nothing of it is in force, and that is said."""
    sync(cache)
    put(cache, TIERS, tier("one", order="first"))
    assert "nothing of it is in force" in cache.problems()[-1].message
    cache.stores[TIERS].remove(next(iter(cache.stores[TIERS].entries)))
    assert cache.problems() == ()
    assert cache.drain() == ()


def test_stored_form_gives_way_to_the_object() -> None:
    """crd.projectcalico.org/v1 beside projectcalico.org/v3: one object, the latter."""
    cache = Cache((TIERS, STORED_TIERS))
    sync(cache)
    put(cache, STORED_TIERS, tier("one", order=1))
    assert changes(cache.drain()) == ["+Tier/one"]
    put(cache, TIERS, tier("one", order=2))
    assert changes(cache.drain()) == ["+Tier/one"]
    cache.stores[STORED_TIERS].remove(next(iter(cache.stores[STORED_TIERS].entries)))
    assert cache.drain() == ()
    cache.stores[TIERS].remove(next(iter(cache.stores[TIERS].entries)))
    assert changes(cache.drain()) == ["-Tier/one"]
    cache.close()


def test_different_states_have_different_versions(cache: Cache) -> None:
    """Also those of one resourceVersion, between which a default of the definition changed; equal ones have one version."""
    sync(cache)
    versions = []
    for item in (
        tier("one", "5"),
        tier("one", "6"),
        tier("one", "6", order=1),
        tier("one", "6", order=2),
        tier("one", "7", order=3),
    ):
        put(cache, TIERS, item)
        versions += [event.version for event in cache.drain()]
    assert versions == ["5", "6", "6+", "7"]


def test_versions_are_of_what_was_given_out(cache: Cache) -> None:
    """Not of what was received: somebody who waits for a version waits for enforcement."""
    sync(cache)
    cache.stores[PODS].resource_version = "7"
    assert cache.versions[PODS] == ""
    put(cache, PODS, pod("web", "7"))
    cache.drain()
    assert cache.versions[PODS] == "7"


# --- the saved state --------------------------------------------------------------------------------------------------------------


def refilled(path: Path, kinds: tuple[WatchedKind, ...]) -> Cache:
    """A new cache that begins with the saved state."""
    state = load_state(path)
    assert state is not None
    cache = Cache(kinds)
    cache.load(state.of(kinds))
    return cache


@pytest.fixture
def saved(cache: Cache, tmp_path: Path) -> Path:
    """The saved state of a cluster with a pod, a good tier, and one that was good once."""
    sync(cache)
    cache.stores[TIERS].definition_uid = "d1"
    put(cache, PODS, pod("web"))
    put(cache, TIERS, tier("one"))
    put(cache, TIERS, tier("two", order=7))
    put(cache, TIERS, tier("two", order="bad"))
    path = tmp_path / "state" / "kubernetes"
    store_state(path, cache.saved())
    return path


def test_saved_state_is_given_out_on_request_alone(saved: Path) -> None:
    """A node with enforcement of its own must not go back to what was saved."""
    cache = refilled(saved, (NAMESPACES, PODS, TIERS))
    assert cache.drain() == ()
    cache.restore()
    assert changes(cache.drain()) == ["+Pod/prod/web", "+Tier/one", "+Tier/two"]
    cache.close()


def test_saved_state_is_not_mixed_with_the_servers(saved: Path) -> None:
    """It is in force as a whole until every kind was listed: old policies on new pods were never a state of the cluster."""
    cache = refilled(saved, (NAMESPACES, PODS, TIERS))
    commit(cache, PODS, pod("other"))
    cache.restore()
    assert changes(cache.drain()) == ["+Pod/prod/web", "+Tier/one", "+Tier/two"]
    put(cache, PODS, pod("more"))
    commit(cache, NAMESPACES)
    assert cache.drain() == ()
    commit(cache, TIERS, tier("one"))
    assert changes(cache.drain()) == ["-Pod/prod/web", "-Tier/two", "+Pod/prod/more", "+Pod/prod/other"]
    cache.close()


def test_server_takes_the_place_of_the_saved_state(saved: Path) -> None:
    """An object that is gone meanwhile is removed; an unchanged one is no event."""
    cache = refilled(saved, (NAMESPACES, PODS, TIERS))
    cache.restore()
    cache.drain()
    commit(cache, NAMESPACES)
    commit(cache, PODS)
    commit(cache, TIERS, tier("one"), tier("two", order="bad"))
    assert changes(cache.drain()) == ["-Pod/prod/web"]
    assert "last good state stays in force" in cache.problems()[-1].message
    cache.close()


def test_saved_state_knows_the_definition_and_orphans(saved: Path, cache: Cache) -> None:
    """So a definition deleted while the node was down lifts nothing either."""
    cache.stores[TIERS].commit_absent()
    store_state(saved, cache.saved())
    after = refilled(saved, (NAMESPACES, PODS, TIERS))
    store = after.stores[TIERS]
    assert store.definition_uid == "d1"
    assert {name.name for name in store.orphans} == {"one", "two"}
    assert after.stores[PODS].orphans == set()
    after.close()


def test_damaged_state_is_refused(saved: Path) -> None:
    """Any byte of it."""
    raw = saved.read_bytes()
    for at in range(0, len(raw), 7):
        saved.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(MalformedError):
            load_state(saved)
    for length in range(0, len(raw) - 1, 11):
        saved.write_bytes(raw[:length])
        with pytest.raises(MalformedError):
            load_state(saved)
    saved.write_bytes(raw)
    assert load_state(saved) is not None


@pytest.mark.parametrize(
    "fields",
    [b"{}", b'{"metadata": []}', b'{"metadata": {"name": 5}}', b'{"metadata": {"name": "a", "namespace": {}}}', b"["],
)
def test_state_of_objects_without_a_name_is_refused(saved: Path, fields: bytes) -> None:
    """As a whole, before any of it is taken up; its hash proves no origin."""
    store_state(saved, {NAMESPACES: SavedKind("", []), PODS: SavedKind("", [SavedObject(fields, is_orphan=False)])})
    with pytest.raises(MalformedError):
        load_state(saved)


@pytest.mark.parametrize(
    "kind",
    [b'{"apiVersion": "v1", "kind": "Pod", "definition": 5, "objects": 0}', b"[" * 100_000],
    ids=["definition", "depth"],
)
def test_state_with_another_head_of_a_kind_is_refused(saved: Path, kind: bytes) -> None:
    """Of another type, or nested too deep."""
    body = b'{"format": 1, "saved": "now"}\n' + kind + b"\n"
    saved.write_bytes(body + hashlib.sha256(body).hexdigest().encode() + b"\n")
    with pytest.raises(MalformedError):
        load_state(saved)


def test_state_of_another_format_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number."""
    monkeypatch.setattr("netpol_ebpf.sources.kubernetes.saved_state.FORMAT", 2)
    with pytest.raises(MalformedError, match="format"):
        load_state(saved)


def test_missing_state_is_none(tmp_path: Path) -> None:
    """The first start of a node."""
    assert load_state(tmp_path / "none") is None


def test_state_is_private_and_replaced_in_one_step(saved: Path, cache: Cache) -> None:
    """It tells of all pods; what a crash left of a draft does not matter."""
    saved.with_suffix(".draft").write_bytes(b"left")
    store_state(saved, cache.saved())
    assert saved.stat().st_mode & 0o777 == 0o600
    assert saved.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in saved.parent.iterdir()] == ["kubernetes"]
