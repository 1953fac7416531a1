# SPDX-License-Identifier: Apache-2.0
"""Two sources as one: which of them gives an object, and what is reported of the other."""

from __future__ import annotations

import select
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from memory_source import MemorySource, upsert

from netpol_ebpf.errors import InvalidInputError, Location, Problem
from netpol_ebpf.policy.translate import ResourceKey
from netpol_ebpf.sources.merged import MergedSources
from netpol_ebpf.sources.source import ObjectEvent, Remove, Source, SourceUpdate, Upsert

NAMES = ("a", "b", "c", "d")


def gone(name: str, source: str, state: int = 0) -> Remove:
    one = upsert(name, source, state)
    return Remove(one.resource, one.key, one.version)


def apply(objects: dict[ResourceKey, str], update: SourceUpdate | None) -> None:
    """Keep the version of each object as whoever reads the stream would; an event that contradicts the stream fails."""
    seen_upsert = False
    for event in () if update is None else update.events:
        if isinstance(event, Upsert):
            seen_upsert = True
            objects[event.key] = event.version
        else:
            assert not seen_upsert, "a removal behind an upsert"
            assert objects.pop(event.key) == event.version


@pytest.fixture
def pair() -> Iterator[tuple[MemorySource, MemorySource, MergedSources]]:
    first, second = MemorySource("first", has_descriptor=True), MemorySource("second", has_descriptor=True)
    merged = MergedSources([first, second])
    yield first, second, merged
    merged.close()


def test_merged_sources_are_a_source(pair: tuple[MemorySource, MemorySource, MergedSources]) -> None:
    """The agent cannot tell merged sources from a single one, and they add up what both skipped."""
    first, second, merged = pair
    source: Source = merged
    first.skipped, second.skipped = {"v1 ConfigMap": 1}, {"v1 ConfigMap": 2, "v1 Secret": 3}
    assert source.name == "first, second"
    assert source.skipped == {"v1 ConfigMap": 3, "v1 Secret": 3}


def test_first_source_wins_and_the_other_is_reported(
    pair: tuple[MemorySource, MemorySource, MergedSources],
) -> None:
    """An object that both have is the first one's, whoever reported it first; where the other one is written is a problem."""
    first, second, merged = pair
    objects: dict[ResourceKey, str] = {}
    second.batches = [[upsert("a", "second"), upsert("b", "second")]]
    apply(objects, merged.step())
    assert set(objects.values()) == {"second-0"}
    first.batches = [[upsert("a", "first")]]
    update = merged.step()
    apply(objects, update)
    assert objects == {ResourceKey("Namespace", "", "a"): "first-0", ResourceKey("Namespace", "", "b"): "second-0"}
    assert update is not None
    assert [(one.slug, one.obj, one.location.file) for one in update.problems] == [
        ("duplicate", "Namespace/a", "second.yaml")
    ]
    second.batches = [[upsert("a", "second", 1)]]
    assert merged.step() is None, "a change of an object that another source wins"


def test_removal_from_the_winner_brings_the_other_in(
    pair: tuple[MemorySource, MemorySource, MergedSources],
) -> None:
    """The loser's object takes the place of the winner's as it is then, and is no problem any more."""
    first, second, merged = pair
    objects: dict[ResourceKey, str] = {}
    first.batches, second.batches = [[upsert("a", "first")]], [[upsert("a", "second", 7)]]
    apply(objects, merged.step())
    first.batches = [[gone("a", "first")]]
    update = merged.step()
    apply(objects, update)
    assert update is not None
    assert [type(one) for one in update.events] == [Upsert]
    assert (list(objects.values()), update.problems) == (["second-7"], ())
    second.batches = [[gone("a", "second", 7)]]
    apply(objects, merged.step())
    assert objects == {}


def test_source_that_has_not_synced_contributes_nothing() -> None:
    """Half of a source's objects could remove what the other half says; all come in with the update that completes them."""
    first, second = MemorySource("first", syncs_after=2), MemorySource("second")
    merged = MergedSources([first, second])
    objects: dict[ResourceKey, str] = {}
    first.batches = [[upsert("a", "first")], [upsert("b", "first")]]
    second.batches = [[upsert("a", "second")]]
    apply(objects, merged.step())
    assert list(objects.values()) == ["second-0"]
    assert not merged.has_synced
    apply(objects, merged.step())
    assert list(objects.values()) == ["first-0", "first-0"]
    assert merged.has_synced


def test_sync_waits_for_all_sources() -> None:
    """What `sync` returns is complete; a source that cannot be read ends it."""
    first, second = MemorySource("first", syncs_after=3), MemorySource("second", syncs_after=1)
    first.batches = [[upsert("a", "first")], [], [upsert("b", "first")]]
    second.batches = [[upsert("a", "second"), upsert("c", "second")]]
    objects: dict[ResourceKey, str] = {}
    apply(objects, MergedSources([first, second]).sync())
    assert {key.name: version for key, version in objects.items()} == {
        "a": "first-0", "b": "first-0", "c": "second-0",
    }  # fmt: skip

    def fail() -> SourceUpdate:
        raise InvalidInputError("the source is not known")

    second.sync = fail  # type: ignore[method-assign]
    with pytest.raises(InvalidInputError):
        MergedSources([first, second]).sync()


def test_one_descriptor_wakes_for_each_source(pair: tuple[MemorySource, MemorySource, MergedSources]) -> None:
    """The merged descriptor is readable when any source's is; only the source that has news does a step."""
    first, second, merged = pair
    descriptor = merged.fileno()
    assert descriptor is not None
    assert (select.select([descriptor], [], [], 0)[0], merged.wait_s()) == ([], 60.0)
    second.wake()
    assert select.select([descriptor], [], [], 0)[0] == [descriptor]
    merged.note_news()
    assert select.select([descriptor], [], [], 0)[0] == []
    assert (first.wait_s(), second.wait_s(), merged.wait_s()) == (60.0, 0.0, 0.0)
    assert merged.step() is None or merged.problems == ()
    assert merged.wait_s() == 60.0
    merged.close()
    assert first.is_closed
    assert second.is_closed


def test_problems_of_sources_are_those_of_both(pair: tuple[MemorySource, MemorySource, MergedSources]) -> None:
    """A problem that comes without an event is reported once."""
    first, second, merged = pair
    merged.step()
    one = Problem(Location("f", 3), "", "is broken", slug="broken")
    first.problems = (one,)
    update = merged.step()
    assert update is not None
    assert (update.events, update.problems) == ((), (one,))
    assert merged.step() is None
    second.problems = (one,)
    assert merged.problems == (one, one)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_order_of_events_gives_the_same_objects(data: st.DataObject) -> None:
    """Whatever came before, in whatever order and batches, the objects are those of the first source, then those of the second."""
    final = [
        data.draw(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2)), label=source)
        for source in ("first", "second")
    ]
    sources = [MemorySource(name, batches=[], syncs_after=data.draw(st.integers(0, 3))) for name in ("first", "second")]
    for source, wanted in zip(sources, final, strict=True):
        source.batches.extend(_history(data, source.name, wanted))
        source.syncs_after = min(source.syncs_after, len(source.batches))
    merged, objects = MergedSources(sources), dict[ResourceKey, str]()
    while any(one.batches for one in sources):
        chosen = data.draw(st.sampled_from([one for one in sources if one.batches]))
        held = [(one, one.batches) for one in sources if one is not chosen]
        for one, _ in held:
            one.batches = []
        apply(objects, merged.step())
        for one, batches in held:
            one.batches = batches
        if not any(one.has_synced for one in sources):
            assert objects == {}, "objects of sources that have not synced"
    wanted_names = {**{name: f"second-{state}" for name, state in final[1].items()},
                    **{name: f"first-{state}" for name, state in final[0].items()}}  # fmt: skip
    assert {key.name: version for key, version in objects.items()} == wanted_names
    assert {one.obj for one in merged.problems} == {f"Namespace/{name}" for name in final[0].keys() & final[1].keys()}


def _history(data: st.DataObject, source: str, final: dict[str, int]) -> list[list[ObjectEvent]]:
    """Events that end with the final objects, in batches."""
    states = data.draw(st.lists(st.tuples(st.sampled_from(NAMES), st.one_of(st.none(), st.integers(0, 2))), max_size=8))
    present: dict[str, int] = {}
    events: list[ObjectEvent] = []
    steps = [*states, *((name, final.get(name)) for name in data.draw(st.permutations(NAMES)))]
    for name, state in steps:
        if state is not None:
            events.append(upsert(name, source, state))
            present[name] = state
        elif name in present:
            events.append(gone(name, source, present.pop(name)))
    batches: list[list[ObjectEvent]] = [[]]
    for event in events:
        batches[-1].append(event)
        if data.draw(st.booleans()):
            batches.append([])
    return batches
