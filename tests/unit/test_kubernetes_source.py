# SPDX-License-Identifier: Apache-2.0
"""The source as a whole: threads over real sockets, against a small API server that does what a real one did."""

from __future__ import annotations

import json
import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from apiserver_traces import (
    NAMESPACES,
    PODS,
    TIERS,
    Reply,
    definition,
    failure,
    mark,
    page,
    pod,
    recorded,
    stream,
    tier,
)
from fake_apiserver import FakeServer, Feed, Request, Wire

from netpol_ebpf.errors import InvalidInputError, UnreachableError
from netpol_ebpf.sources.files import ManifestDirectory
from netpol_ebpf.sources.kubernetes import source as source_module
from netpol_ebpf.sources.kubernetes import watching
from netpol_ebpf.sources.kubernetes.client import Cluster, Credentials, bearer, read_token
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind
from netpol_ebpf.sources.kubernetes.source import KubernetesSource
from netpol_ebpf.sources.merged import MergedSources
from netpol_ebpf.sources.source import SourceUpdate, Upsert

FEW = (NAMESPACES, PODS, TIERS)
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after fractions of a second."""
    monkeypatch.setattr(watching, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(watching, "ABSENT_RETRY_S", 0.05)
    monkeypatch.setattr(watching, "GRACE_S", 0.1)
    monkeypatch.setattr(source_module, "SAVE_S", 0.1)


class MiniApi:
    """Lists by stream and goes on with what `send` is given; ``first`` answers come before those."""

    def __init__(self, objects: dict[WatchedKind, list[dict[str, Any]]]) -> None:
        self.objects = objects
        self.version = 100
        self.first: dict[str, list[Wire]] = {}
        self.feeds: dict[str, Feed] = {}
        self.definition = definition()
        self.token = ""

    def __call__(self, request: Request) -> Wire:
        path, _, query = request.target.partition("?")
        asked = parse_qs(query)
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return Wire(failure(401))
        if "/customresourcedefinitions/" in path:
            return Wire(self.definition)
        if "PartialObjectMetadata;" in request.headers["accept"]:
            return Wire(failure(406))  # a list of metadata is another type
        if self.first.get(path):
            return self.first[path].pop(0)
        kind = next((kind for kind in self.objects if kind.path == path), None)
        if kind is None:
            return Wire(recorded("crd-404-then-served", 0), length=True)
        if "watch" not in asked:
            return Wire(page(*self.objects[kind], version=str(self.version)))
        feed: Feed = queue.Queue()
        self.feeds[path] = feed
        if "sendInitialEvents" in asked:
            events = [("ADDED", one) for one in self.objects[kind]]
            return Wire(stream(*events, mark(str(self.version), ends_list=True)), end="feed", feed=feed)
        return Wire(stream(), end="feed", feed=feed)

    def send(self, kind: WatchedKind, event: str, item: dict[str, Any]) -> None:
        """An event of the open WATCH."""
        self.feeds[kind.path].put(json.dumps({"type": event, "object": item}).encode() + b"\n")

    def end(self, kind: WatchedKind) -> None:
        """The clean end of the open WATCH."""
        self.feeds[kind.path].put(None)


Open = Callable[..., KubernetesSource]


@pytest.fixture
def api() -> MiniApi:
    """One namespace, one pod, one tier."""
    namespace = {"metadata": {"name": "prod", "resourceVersion": "3"}}
    return MiniApi({NAMESPACES: [namespace], PODS: [pod("web")], TIERS: [tier("one")]})


@pytest.fixture
def server(api: MiniApi) -> Iterator[FakeServer]:
    """The API, served."""
    with FakeServer(api) as made:
        yield made


@pytest.fixture
def open_source() -> Iterator[Open]:
    """Makes sources and closes them."""
    made: list[KubernetesSource] = []

    def _open(url: str, **options: Any) -> KubernetesSource:
        credentials = options.pop("credentials", lambda _refused: Credentials())
        made.append(KubernetesSource(Cluster(url, credentials=credentials), **{"kinds": FEW, **options}))
        return made[-1]

    yield _open
    for one in made:
        one.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("kubernetes-")]
    assert left == []


def changes(update: SourceUpdate | None) -> list[str]:
    """The events as text."""
    return [f"{'+' if isinstance(event, Upsert) else '-'}{event.key}" for event in (update.events if update else ())]


def wait_for(source: KubernetesSource, is_there: Callable[[list[str]], bool]) -> list[str]:
    """Take what comes until that is there."""
    found: list[str] = []
    until_s = time.monotonic() + DEADLINE_S
    while not is_there(found):
        assert time.monotonic() < until_s, (found, source.problems, source.states())
        select.select([source.fileno()], [], [], 0.1)
        source.note_news()
        found += changes(source.step())
    return found


def until(is_so: Callable[[], bool]) -> None:
    """Poll."""
    until_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_first_state_is_whole(server: FakeServer, open_source: Open) -> None:
    """One update with everything; then nothing is due until there is news."""
    source = open_source(server.url)
    assert not source.has_synced
    assert changes(source.sync()) == ["+Namespace/prod", "+Pod/prod/web", "+Tier/one"]
    assert source.has_synced
    assert source.problems == ()
    assert source.wait_s() > 1e9
    assert source.step() is None


def test_event_wakes_who_waits(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """By the descriptor; it is calm after that."""
    source = open_source(server.url)
    source.sync()
    source.note_news()
    source.step()
    assert select.select([source.fileno()], [], [], 0)[0] == []
    api.send(PODS, "ADDED", pod("new", "101"))
    assert select.select([source.fileno()], [], [], DEADLINE_S)[0]
    source.note_news()
    assert source.wait_s() == 0.0
    assert changes(source.step()) == ["+Pod/prod/new"]
    api.send(PODS, "DELETED", pod("web", "102"))
    assert wait_for(source, bool) == ["-Pod/prod/web"]
    assert source.cache.versions[PODS] in ("101", "102")


def test_all_kinds_of_a_cluster_without_definitions(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """No CRD is installed: the first state comes all the same, and every kind says what it is."""
    api.objects = {kind: [] for kind in KINDS if not kind.is_custom} | api.objects
    del api.objects[TIERS]
    source = open_source(server.url, kinds=KINDS)
    assert changes(source.sync()) == ["+Namespace/prod", "+Pod/prod/web"]
    states = {one.kind: one for one in source.states()}
    assert len(states) == len(KINDS)
    assert (states["pods"].state, states["pods"].objects) == ("watching", 1)
    assert states["tiers.projectcalico.org"].state == "not installed"
    assert all(one.is_synced for one in states.values())


def test_kind_that_is_installed_later(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """A probe finds it in its group, and it is listed at once."""
    tiers = api.objects.pop(TIERS)
    source = open_source(server.url)
    assert changes(source.sync()) == ["+Namespace/prod", "+Pod/prod/web"]
    api.objects[TIERS] = tiers
    body = json.dumps({"resources": [{"name": "tiers"}]}).encode()
    api.first[TIERS.group_path] = [Wire(Reply(chunks=[(0.0, body)]))]
    source.probe.step()
    assert wait_for(source, bool) == ["+Tier/one"]


def test_start_of_a_server(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """403, 503, 429, a cut list, then the list: nothing of that is a state."""
    starting = [("startup-answers", 0), ("startup-answers", 1), ("startup-answers", 6), ("overload-429", 0)]
    refusals = [Wire(recorded(*one), length=True) for one in starting]
    for refusal in refusals:
        refusal.reply.retry_after_s = None
    api.first[TIERS.path] = [
        *refusals,
        Wire(stream(("ADDED", tier("one"))), end="cut"),
        Wire(recorded("overload-429", 1), end="reset"),
    ]
    assert "+Tier/one" in changes(open_source(server.url).sync())
    assert api.first[TIERS.path] == []


def test_stream_that_ends_or_is_cut_loses_nothing(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """Resumed at the last event."""
    source = open_source(server.url)
    source.sync()
    for number, end in enumerate(("clean", "cut", "reset")):
        api.first[PODS.path] = [
            Wire(stream(("ADDED", pod(f"more-{number}", str(200 + number)))), end="clean" if end == "reset" else end)
        ]
        api.end(PODS)
        assert wait_for(source, bool) == [f"+Pod/prod/more-{number}"]
        until(lambda number=number: f"resourceVersion={200 + number}" in server.requests[-1].target)  # type: ignore[misc]


def test_expired_stream_changes_nothing_that_did_not_change(
    server: FakeServer, api: MiniApi, open_source: Open
) -> None:
    """After 410 in the stream there is a new list, and only the difference is reported."""
    source = open_source(server.url)
    source.sync()
    api.objects[PODS] = [pod("web", "300"), pod("new", "301")]
    api.version = 301
    api.first[PODS.path] = [Wire(recorded("expired-410", 4))]
    api.end(PODS)
    assert wait_for(source, bool) == ["+Pod/prod/new"]


def test_expired_token(server: FakeServer, api: MiniApi, open_source: Open, tmp_path: Path) -> None:
    """401 until the file has a new one; policy stays, and the problem goes."""
    (tmp_path / "token").write_text("old")
    api.token = "old"
    source = open_source(server.url, credentials=lambda _refused: bearer(read_token(tmp_path / "token")))
    source.sync()
    api.token = "new"
    for kind in FEW:
        api.end(kind)
    wait_for(source, lambda _found: "unauthorized" in {problem.slug for problem in source.problems})
    (tmp_path / "token").write_text("new")
    assert wait_for(source, lambda _found: not source.problems) == []


def test_deleted_definition_and_the_operators_word(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """DELETED, a clean end, 404: the tier stays, until it is released by name."""
    source = open_source(server.url)
    source.sync()
    api.definition = definition(is_ending=True)
    api.send(TIERS, "DELETED", tier("one", "101"))
    del api.objects[TIERS]
    api.end(TIERS)
    assert wait_for(source, lambda _found: "definition deleted" in {one.state for one in source.states()}) == []
    assert [problem.slug for problem in source.problems] == ["crd-deleted"]
    with pytest.raises(InvalidInputError, match=r"are kept of tiers\.projectcalico\.org"):
        source.release("pods")
    assert source.release("tiers.projectcalico.org", is_trial=True) == ("Tier/one",)
    assert source.step() is None
    assert source.release("tiers.projectcalico.org") == ("Tier/one",)
    assert wait_for(source, bool) == ["-Tier/one"]
    assert source.problems == ()


def test_reader_waits_for_nobody(server: FakeServer, api: MiniApi, open_source: Open) -> None:
    """Thousands of events are read before any is taken, and the taken state is the latest one."""
    source = open_source(server.url)
    source.sync()
    for number in range(3000):
        api.send(PODS, "MODIFIED", pod("web", str(1000 + number), address=f"10.0.{number // 250}.{number % 250}"))
    until(lambda: source.cache.stores[PODS].resource_version == "3999")
    update = source.step()
    assert changes(update) == ["+Pod/prod/web"]
    assert update is not None
    assert update.events[0].version == "3999"


def test_server_that_is_away_is_no_empty_cluster(open_source: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given out; the error names kinds and reason."""
    monkeypatch.setattr(source_module, "SYNC_S", 0.5)
    with FakeServer(lambda _request: Wire(Reply())) as server:
        url = server.url
    source = open_source(url)
    with pytest.raises(UnreachableError, match="3 of 3 kinds") as caught:
        source.sync()
    assert "Connection refused" in caught.value.message
    assert not source.has_synced
    assert source.step() is None or source.step() is None


def test_one_kind_that_is_forbidden_holds_all_back(
    server: FakeServer, api: MiniApi, open_source: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-synced cache is no state."""
    monkeypatch.setattr(source_module, "SYNC_S", 1.0)
    api.first[TIERS.path] = [Wire(recorded("startup-answers", 0), length=True) for _ in range(200)]
    source = open_source(server.url)
    with pytest.raises(UnreachableError, match=r"1 of 3 kinds .*tiers\.projectcalico\.org.*grant list and watch"):
        source.sync()


def test_saved_state_stands_in_for_a_server_that_is_away(
    server: FakeServer, api: MiniApi, open_source: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a start of the node; loudly; until the server is back, whose state then is the difference."""
    path = tmp_path / "kubernetes"
    first = open_source(server.url, state_path=path)
    first.sync()
    until(path.exists)
    first.close()
    monkeypatch.setattr(source_module, "RESTORE_S", 0.3)
    with FakeServer(api) as other:
        port = other.port
    source = open_source(f"http://127.0.0.1:{port}", state_path=path, may_restore=True)
    assert changes(source.sync()) == ["+Namespace/prod", "+Pod/prod/web", "+Tier/one"]
    assert source.has_synced
    assert "restored" in {problem.slug for problem in source.problems}
    api.objects[PODS] = []
    with FakeServer(api, port=port):
        assert wait_for(source, lambda _found: not source.problems) == ["-Pod/prod/web"]
        source.close()


def test_saved_state_is_not_for_a_node_with_enforcement(
    open_source: Open, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in force there is newer."""
    path = tmp_path / "kubernetes"
    first = open_source(server.url, state_path=path)
    first.sync()
    until(path.exists)
    monkeypatch.setattr(source_module, "SYNC_S", 0.3)
    source = open_source("http://127.0.0.1:1", state_path=path)
    with pytest.raises(UnreachableError):
        source.sync()


def test_saved_state_that_is_damaged_is_told_and_replaced(
    server: FakeServer, open_source: Open, tmp_path: Path
) -> None:
    """And a place that cannot be written to is, too."""
    path = tmp_path / "kubernetes"
    path.write_bytes(b"{}\n")
    source = open_source(server.url, state_path=path)
    assert [problem.slug for problem in source.sync().problems] == ["saved-state"]
    wait_for(source, lambda _found: not source.problems)
    (tmp_path / "file").write_bytes(b"")
    other = open_source(server.url, state_path=tmp_path / "file" / "kubernetes")
    other.sync()
    wait_for(
        other,
        lambda _found: [problem.severity for problem in other.problems]
        in (["warning"], ["warning", "error"], ["error"]),
    )


def test_bug_in_a_thread_ends_neither_it_nor_enforcement(
    server: FakeServer, api: MiniApi, open_source: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is reported, and the kind is listed again."""
    monkeypatch.setattr(source_module, "AFTER_BUG_S", 0.05)
    source = open_source(server.url)
    source.sync()
    apply = source.cache.stores[PODS].put

    def fail(*_arguments: object) -> None:
        raise AssertionError("made up")

    monkeypatch.setattr(source.cache.stores[PODS], "put", fail)
    api.objects[PODS].append(pod("new", "300"))
    api.send(PODS, "ADDED", pod("new", "300"))
    assert wait_for(source, lambda found: "+Pod/prod/new" in found) == ["+Pod/prod/new"]
    monkeypatch.setattr(source.cache.stores[PODS], "put", apply)
    api.end(PODS)
    wait_for(source, lambda _found: not source.problems)


def test_sources_end_while_streams_are_open(server: FakeServer, open_source: Open) -> None:
    """Readers that wait for the next event are woken; the descriptor is given back."""
    source = open_source(server.url)
    source.sync()
    descriptor = source.fileno()
    source.close()
    assert not any(thread.is_alive() for thread in source._threads)
    with pytest.raises(OSError, match="Bad file descriptor"):
        select.select([descriptor], [], [], 0)


def test_cluster_and_manifests_are_one_source(
    server: FakeServer, api: MiniApi, open_source: Open, tmp_path: Path
) -> None:
    """The first wins; both wake whoever waits."""
    (tmp_path / "one.yaml").write_text(
        "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: one}\nspec: {order: 3}\n"
    )
    both = MergedSources([ManifestDirectory(tmp_path), open_source(server.url)])
    assert sorted(changes(both.sync())) == ["+Namespace/prod", "+Pod/prod/web", "+Tier/one"]
    assert [problem.slug for problem in both.problems] == ["duplicate"]
    api.send(PODS, "DELETED", pod("web", "102"))
    assert select.select([both.fileno()], [], [], DEADLINE_S)[0]
    both.note_news()
    assert both.wait_s() == 0.0
    assert changes(both.step()) == ["-Pod/prod/web"]
    both.close()
