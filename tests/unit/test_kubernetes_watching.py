# SPDX-License-Identifier: Apache-2.0
"""The state machine of one kind, against recorded answers of a kube-apiserver and made-up ones in their form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from apiserver_traces import (
    PODS,
    TIERS,
    Bench,
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

from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind
from netpol_ebpf.sources.kubernetes.watching import GRACE_S, HASTY_STEPS, IDLE_S, LONGEST_RETRY_S, SHORT_S, State

AWAY = UnreachableError("connection refused")
NO_STREAMS = failure(422)
GONE_TIERS = WatchedKind("gone.example.test/v3", "Tier", "tiers", is_custom=True)


Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes benches: `make(kind, reply, ...)`."""
    benches: list[Bench] = []

    def _make(kind: WatchedKind, *replies: Reply | Exception) -> Bench:
        benches.append(Bench(kind, *replies))
        return benches[-1]

    yield _make
    for one in benches:
        one.cache.close()


def listed(make: Make, *objects: dict[str, Any], kind: WatchedKind = TIERS) -> Bench:
    """A bench that has listed these objects by a stream, which was cut."""
    bench = make(kind, stream(*(("ADDED", one) for one in objects), mark("5", ends_list=True), is_cut=True))
    bench.steps()
    assert bench.store.is_synced
    return bench


# --- lists ----------------------------------------------------------------------------------------------------------------------


def test_pages_are_one_list(make: Make) -> None:
    """L1, L2: pages to the last one, then a WATCH at their common resourceVersion."""
    bench = make(PODS, NO_STREAMS, *(recorded("list-pods-paged", number) for number in range(3)), stream())
    assert bench.steps(2) == 0.0
    recorded_pages = [json.loads(recorded("list-pods-paged", number).body()) for number in range(3)]
    names = sorted(item["metadata"]["name"] for one in recorded_pages for item in one["items"])
    assert bench.names() == names
    bench.steps()
    version = recorded_pages[0]["metadata"]["resourceVersion"]
    assert f"resourceVersion={version}" in bench.script.targets[-1]
    assert "watch=1" in bench.script.targets[-1]
    assert [target.count("resourceVersion=") for target in bench.script.targets[1:4]] == [0, 0, 0]


def test_nothing_is_taken_up_of_a_list_without_its_last_page(make: Make) -> None:
    """A page that does not come leaves everything as it was."""
    bench = make(PODS, NO_STREAMS, recorded("list-pods-paged", 0), AWAY)
    bench.steps(2)
    assert bench.names() == []
    assert not bench.store.is_synced


def test_expired_continue_token_begins_a_new_list(make: Make) -> None:
    """L6: HTTP 410; the inconsistent token that its body offers is not used."""
    bench = make(PODS, NO_STREAMS, recorded("list-pods-paged", 0), recorded("expired-410", 0), page(version="9"))
    assert bench.steps(2) == 0.0
    bench.steps()
    assert "continue" not in bench.script.targets[-1]
    assert bench.store.is_synced


def test_pages_of_different_versions_are_no_list(make: Make) -> None:
    """L6 again: pages by an inconsistent token."""
    bench = make(PODS, NO_STREAMS, page(version="5", more="x"), page(version="6"))
    bench.steps(2)
    assert not bench.store.is_synced


@pytest.mark.parametrize("body", [b"", b"{}", b'{"items": []}', b'{"metadata": {"resourceVersion": "1"}}', b"<html>"])
def test_body_that_is_no_list_is_no_empty_list(make: Make, body: bytes) -> None:
    """A proxy's page, a cut body, or an answer without items removes nothing."""
    bench = listed(make, pod("web"), kind=PODS)
    bench.script.replies = [failure(410), NO_STREAMS, Reply(chunks=[(0.0, body)])]
    bench.steps(3)
    assert bench.names() == ["web"]


def test_list_by_stream_is_whole_at_its_mark(make: Make) -> None:
    """W11: ADDED for each object, the annotated BOOKMARK, then live events in the same stream."""
    bench = make(PODS, recorded("watch-streaming-list", 0))
    bench.steps()
    assert "sendInitialEvents=true" in bench.script.targets[0]
    assert "resourceVersionMatch=NotOlderThan" in bench.script.targets[0]
    assert "allowWatchBookmarks=true" in bench.script.targets[0]
    assert "resourceVersion=" not in bench.script.targets[0]
    assert bench.names() == ["web-0"]
    assert bench.store.is_synced


def test_list_by_stream_of_nothing_is_empty(make: Make) -> None:
    """W11: the mark alone."""
    bench = make(PODS, recorded("watch-streaming-list", 1))
    bench.steps()
    assert bench.store.is_synced
    assert bench.store.resource_version == "277"


def test_list_by_stream_drops_what_it_does_not_name(make: Make) -> None:
    """W11: deletions missed while away are not sent."""
    bench = listed(make, pod("old"), kind=PODS)
    bench.watcher.relist()
    bench.script.replies = [stream(("ADDED", pod("new")), mark("9", ends_list=True))]
    bench.steps()
    assert bench.names() == ["new"]


def test_stream_without_a_mark_is_no_list(make: Make) -> None:
    """W11, and servers that know no mark: after three streams without one, lists come in pages."""
    bench = make(PODS, *(stream(("ADDED", pod("web"))) for _ in range(3)), page(pod("web"), version="7"))
    bench.steps(3)
    assert bench.names() == []
    assert not bench.store.is_synced
    bench.steps()
    assert "limit=500" in bench.script.targets[-1]
    assert bench.names() == ["web"]


def test_bookmark_before_the_mark_shows_that_there_will_be_none(make: Make) -> None:
    """A plain WATCH sends ADDED for everything and never says where that ends."""
    bench = make(PODS, stream(("ADDED", pod("web")), mark("8"), mark("9")))
    bench.steps()
    assert not bench.store.is_synced


@pytest.mark.parametrize("number", [6, 7, 8])
def test_stream_that_is_refused_is_not_offered(make: Make, number: int) -> None:
    """W11: 422; the list comes in pages, at once."""
    bench = make(PODS, recorded("watch-streaming-list", number), page(version="7"))
    assert bench.steps() == 0.0
    bench.steps()
    assert bench.store.is_synced


def test_list_by_stream_that_is_too_early_is_tried_again(make: Make) -> None:
    """W12: HTTP 200 and an ERROR with code 504; it says nothing of whether streams are offered."""
    bench = make(PODS, recorded("expired-410", 9), recorded("watch-streaming-list", 1))
    assert bench.steps() > 0
    bench.steps()
    assert "sendInitialEvents" in bench.script.targets[-1]
    assert bench.store.is_synced


# --- watches --------------------------------------------------------------------------------------------------------------------


def test_events_are_lines_not_chunks(make: Make) -> None:
    """W1: cut anywhere, the same comes out."""
    whole = b"".join(chunk for _, chunk in recorded("watch-pod-life", 0).chunks)
    states = []
    for size in (len(whole), 7, 1000):
        bench = listed(make, kind=PODS)
        bench.script.replies = [Reply(chunks=[(0.0, whole[at : at + size]) for at in range(0, len(whole), size)])]
        bench.steps()
        states.append((bench.names(), bench.store.resource_version))
    assert states[0] == states[1] == states[2]
    assert int(states[0][1]) > 5


def test_life_of_a_pod(make: Make) -> None:
    """The cache at the end of three pods' lives is what their last events say."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("watch-pod-life", 0)]
    bench.steps()
    last = {}
    for _, chunk in recorded("watch-pod-life", 0).chunks:
        event = json.loads(chunk)
        if event["type"] != "BOOKMARK":
            last[event["object"]["metadata"]["name"]] = event["type"]
    assert "DELETED" in last.values()
    assert bench.names() == sorted(name for name, kind in last.items() if kind != "DELETED")


def test_life_of_a_custom_resource(make: Make) -> None:
    """Created, changed, status written, annotated, deleted, then a bookmark of the deletion's resourceVersion."""
    policies = next(
        kind for kind in KINDS if (kind.kind, kind.api_version) == ("NetworkPolicy", "projectcalico.org/v3")
    )
    bench = listed(make, kind=policies)
    bench.script.replies = [recorded("watch-custom-resource", 0)]
    bench.steps()
    assert bench.names() == []
    assert bench.store.resource_version == "19204"
    assert bench.slugs() == []


def test_stopping_server_is_left_without_a_gap(make: Make) -> None:
    """W7: events, a last bookmark, a clean end after 60 s; the next server goes on from there."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("restart-sigterm-ha", 0), stream()]
    bench.steps(2)
    assert "resourceVersion=499" in bench.script.targets[-1]
    assert bench.names() == ["web-0", "web-2"]


def test_token_that_is_revoked_ends_no_policy(make: Make) -> None:
    """W17: the open WATCH goes on, what follows is refused and tried again; what is known stays."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("token-revoked", 2), *(recorded("token-revoked", 1) for _ in range(8))]
    bench.steps(9)
    assert bench.names() == ["web-3"]
    assert bench.slugs() == ["unauthorized"]


def test_bookmark_moves_the_version_and_is_no_object(make: Make) -> None:
    """W2, W3: of a built-in kind with an empty spec, of a custom kind without one."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("watch-idle-bookmarks", 0), stream()]
    bench.steps(2)
    bookmarks = [json.loads(chunk)["object"] for _, chunk in recorded("watch-idle-bookmarks", 0).chunks]
    version = bookmarks[-1]["metadata"]["resourceVersion"]
    assert f"resourceVersion={version}" in bench.script.targets[-1]
    assert [name for name in bench.names() if not name] == []


def test_end_for_time_watches_on_at_once(make: Make) -> None:
    """W5: no back-off, no LIST, no problem."""
    bench = listed(make, pod("web"), kind=PODS)
    bench.script.replies = [recorded("watch-bookmark-timeout", 0), stream()]
    assert bench.steps() == 0.0
    bench.steps()
    assert "sendInitialEvents" not in bench.script.targets[-1]
    assert bench.slugs() == []


def test_end_before_its_time_resumes_from_the_last_event(make: Make) -> None:
    """W6, W7: the server dropped a slow reader, or stops: nothing is listed, nothing is missed."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [stream(("ADDED", pod("web", "41")), ("DELETED", pod("web", "42")), end_s=20.0), stream()]
    assert bench.steps() == 0.0
    bench.steps()
    assert "resourceVersion=42" in bench.script.targets[-1]  # W16: the deletion's own


def test_end_before_its_time_of_a_custom_kind_lists_again(make: Make) -> None:
    """W7, section 3.1: a new default of a changed definition shows under an unchanged resourceVersion, in no event."""
    bench = listed(make, tier("one", "5"))
    bench.script.replies = [
        recorded("watch-crd-changed-deleted-recreated", 0),
        stream(("ADDED", tier("one", "5", order=99)), mark("6", ends_list=True)),
    ]
    bench.script.replies[0].end_s = 2.0
    bench.steps(2)
    assert "sendInitialEvents" in bench.script.targets[-1]
    (entry,) = bench.store.entries.values()
    assert entry.resource.order == 99


def test_end_for_time_of_a_custom_kind_watches_on(make: Make) -> None:
    """Only the end before its time may mean a changed definition."""
    bench = listed(make, tier("one"))
    bench.script.replies = [stream(mark("9"), end_s=449.0), stream()]
    bench.steps(2)
    assert "resourceVersion=9" in bench.script.targets[-1]


def test_streams_that_end_at_once_are_waited_between(make: Make) -> None:
    """A proxy that ends every stream makes no busy loop."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [stream() for _ in range(4)]
    delays = [bench.steps() for _ in range(4)]
    assert delays[0] == 0.0
    assert 0 < delays[1] < delays[2] < delays[3]


@pytest.mark.parametrize("is_cut", [False, True])
def test_streams_that_never_last_are_a_problem(make: Make, *, is_cut: bool) -> None:
    """Each opens with 200, so no request fails; and no event ever comes."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [stream(is_cut=is_cut) for _ in range(12)]
    bench.steps(12)
    assert bench.slugs() == ["unreachable" if is_cut else "unstable"]
    bench.script.replies = [stream(mark("9"), end_s=300.0)]
    bench.steps()
    assert bench.slugs() == []


def test_stream_that_opens_again_is_a_recovery(make: Make) -> None:
    """The first bookmark may be a minute away."""
    bench = listed(make, kind=PODS)
    seen: list[list[str]] = []
    quiet = stream(end_s=300.0)
    quiet.meanwhile = lambda: seen.append(bench.slugs())
    bench.script.replies = [*(AWAY for _ in range(8)), quiet]
    bench.steps(8)
    assert bench.slugs() == ["unreachable"]
    bench.steps()
    assert seen == [[]]


def test_cut_stream_is_resumed(make: Make) -> None:
    """W8: the connection ends without the final chunk."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("restart-sigkill", 0), stream()]
    assert bench.steps() > 0
    bench.steps()
    assert "resourceVersion=340" in bench.script.targets[-1]
    assert bench.names() == ["web-0"]


@pytest.mark.parametrize("number", [4, 5, 6])
def test_expired_watch_lists_again_and_clears_nothing(make: Make, number: int) -> None:
    """W9, W10: HTTP 200 and an ERROR event with code 410, for metadata too; what is known stays until the list is whole."""
    bench = listed(make, pod("web"), kind=PODS)
    bench.script.replies = [recorded("expired-410", number), AWAY, stream(mark("9", ends_list=True))]
    assert bench.watcher.gaps == 0
    assert bench.steps() == 0.0
    assert bench.watcher.gaps == 1
    assert bench.names() == ["web"]
    bench.steps()
    assert "sendInitialEvents" in bench.script.targets[-1]
    assert bench.names() == ["web"]
    bench.steps()
    assert bench.names() == []


def test_expiring_for_ever_is_waited_between(make: Make) -> None:
    """410 for a list that was just made comes from a server that cannot be helped by haste."""
    bench = make(PODS, *(recorded("expired-410", 4) for _ in range(4)))
    delays = [bench.steps() for _ in range(4)]
    assert delays[0] == 0.0
    assert delays[3] > delays[2] > 0


def test_broken_version_lists_again(make: Make) -> None:
    """W14: HTTP 500."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("expired-410", 10), stream(mark("9", ends_list=True))]
    bench.steps(2)
    assert "sendInitialEvents" in bench.script.targets[-1]


def test_leaving_a_selection_is_a_deletion(make: Make) -> None:
    """W15, W16: with the old labels and a new resourceVersion."""
    bench = listed(make, kind=PODS)
    bench.script.replies = [recorded("watch-selector-leave-enter", 0)]
    bench.steps()
    events = [json.loads(chunk) for _, chunk in recorded("watch-selector-leave-enter", 0).chunks]
    last = {one["object"]["metadata"]["name"]: one["type"] for one in events if one["type"] != "BOOKMARK"}
    assert bench.names() == sorted(name for name, kind in last.items() if kind != "DELETED")


@pytest.mark.parametrize(
    "line", [b"{", b'{"type":"ADDED"}', b'{"type":"NEW","object":{}}', b'{"type":"ADDED","object":{}}']
)
def test_line_that_is_no_event_is_never_skipped(make: Make, line: bytes) -> None:
    """What it would have said is listed."""
    bench = listed(make, pod("web"), kind=PODS)
    bench.script.replies = [Reply(chunks=[(0.0, line + b"\n")]), stream(mark("9", ends_list=True))]
    bench.steps()
    assert bench.names() == ["web"]
    bench.steps()
    assert "sendInitialEvents" in bench.script.targets[-1]


def test_silent_watch_ends_when_it_is_told_to(make: Make) -> None:
    """W13: from a lost future it is silent for ever; the probe asks for a list, and the stream is closed under the reader."""
    bench = listed(make, pod("web"), kind=PODS)
    silent = recorded("etcd-restored-backwards", 0)
    silent.meanwhile = bench.watcher.relist
    bench.script.replies = [silent, page(version="1")]
    assert bench.steps() == 0.0
    bench.watcher._streams = False
    bench.steps()
    assert bench.store.resource_version == "1"
    assert bench.names() == []


def test_watch_may_be_silent_for_some_bookmarks() -> None:
    """W3, W4: one comes each minute, and one that is late proves nothing."""
    assert IDLE_S >= 3 * 60


# --- answers that are no data ---------------------------------------------------------------------------------------------------


REFUSALS = [
    ("startup-answers", 0),  # 403, roles are loading
    ("startup-answers", 1),  # 503, paths are being installed
    ("startup-answers", 2),  # 403
    ("startup-answers", 6),  # 429, the cache is not ready
    ("overload-429", 0),  # 429 as text
    ("overload-429", 1),
    ("unavailable-503", 0),  # 503 as text
    ("errors-4xx", 0),  # 403, anonymous
    ("errors-4xx", 1),  # 401
    ("etcd-away", 0),  # 504 after 60 s
    ("watch-crd-deleted", 2),  # 403 for a kind that is gone
    ("restart-sigterm", 1),
]


@pytest.mark.parametrize(("trace", "number"), REFUSALS)
@pytest.mark.parametrize("is_known", [False, True])
def test_refusal_changes_nothing(make: Make, trace: str, number: int, *, is_known: bool) -> None:
    """Absence is never an empty set: each refusal, of a LIST and of a WATCH, keeps what is known and is tried again."""
    bench = listed(make, tier("one")) if is_known else make(TIERS)
    refusal = recorded(trace, number)
    assert refusal.status != 200
    bench.script.replies = [recorded(trace, number) for _ in range(20)]
    for _ in range(20):
        assert bench.steps() > 0
    assert bench.names() == (["one"] if is_known else [])
    assert bench.store.is_synced == is_known


def test_refusal_is_a_problem_when_it_lasts(make: Make) -> None:
    """403 for the 2 s of a start is no missing right; for half a minute it is."""
    bench = make(TIERS, *(recorded("startup-answers", 0) for _ in range(10)))
    began_s = bench.clock.now_s
    seen = []
    for _ in range(8):
        bench.clock.now_s += bench.watcher.step()
        seen.append((bench.clock.now_s - began_s, bench.slugs()))
    assert [slugs for at_s, slugs in seen if at_s < GRACE_S / 2] == [[]] * sum(at_s < GRACE_S / 2 for at_s, _ in seen)
    assert seen[-1][1] == ["forbidden"]
    (problem,) = bench.store.problems()
    assert "grant list and watch" in problem.message
    assert "stays in force" in problem.message


def test_problem_ends_with_its_cause(make: Make) -> None:
    """A list that succeeds is the end of it."""
    bench = make(PODS, *(AWAY for _ in range(8)), stream(mark("9", ends_list=True)))
    bench.steps(8)
    assert bench.slugs() == ["unreachable"]
    bench.steps()
    assert bench.slugs() == []


def test_waits_grow_and_are_bounded(make: Make) -> None:
    """Back-off with jitter."""
    bench = make(PODS, *(AWAY for _ in range(12)))
    delays = [bench.steps() for _ in range(12)]
    assert delays[:3] == sorted(delays[:3])
    assert max(delays) <= 90
    bench.watcher.chance = lambda: 0.0
    bench.script.replies = [AWAY]
    assert bench.steps() != delays[-1]


def test_wait_that_the_server_names_is_kept(make: Make) -> None:
    """Retry-After, and not sooner."""
    bench = make(PODS, recorded("overload-429", 0), failure(503, retry_after_s=5.0))
    assert bench.steps() == pytest.approx(1.5)
    assert bench.steps() == pytest.approx(7.5)


def test_wait_that_the_server_names_is_bounded(make: Make) -> None:
    """A proxy that says to come back tomorrow."""
    assert make(PODS, failure(503, retry_after_s=86400.0)).steps() == pytest.approx(90.0)


EXPIRED = ("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})


@pytest.mark.parametrize(
    ("kind", "replies"),
    [
        (PODS, [page(version="5"), failure(410)]),
        (PODS, [stream(mark("5", ends_list=True), EXPIRED)]),
        (TIERS, [stream(mark("5", ends_list=True))]),
        (TIERS, [page(version="5"), stream()]),
        (TIERS, [stream(("ADDED", tier("a")), mark("5", ends_list=True))]),
        (PODS, [failure(429, retry_after_s=0.0)]),
        (PODS, [failure(429, retry_after_s=-9.0)]),
    ],
    ids=["expires", "expires-in-stream", "ends", "ends-after-pages", "ends-after-object", "zero", "negative"],
)
def test_no_answer_makes_a_loop_without_pauses(make: Make, kind: WatchedKind, replies: list[Reply]) -> None:
    """A server that is half well is not asked again at once for ever, by every node; one that recovers is followed."""
    is_paged = len(replies) > 1
    bench = make(kind, *([NO_STREAMS] if is_paged else []), *replies * 20)
    delays = [bench.steps() for _ in range(len(bench.script.replies))]
    assert min(delays) >= 0.0
    assert delays[-1] >= LONGEST_RETRY_S
    assert sum(delay == 0.0 for delay in delays) <= HASTY_STEPS
    working = stream(("MODIFIED", tier("b") if kind is TIERS else pod("b")), end_s=2 * SHORT_S)
    listed_by_stream = stream(mark("9", ends_list=True), end_s=2 * SHORT_S)
    bench.script.replies = [page(version="9"), working] if is_paged else [listed_by_stream]
    assert bench.steps(len(bench.script.replies)) == 0.0


def test_failure_is_no_refusal_of_streams(make: Make) -> None:
    """500 once; the next list is by stream again."""
    bench = make(PODS, failure(500), stream(mark("9", ends_list=True)))
    bench.steps(2)
    assert "sendInitialEvents" in bench.script.targets[-1]


def test_wait_in_an_error_event_is_kept(make: Make) -> None:
    """W12: retryAfterSeconds of the Status."""
    assert make(PODS, recorded("expired-410", 9)).steps() == pytest.approx(1.5)


# --- kinds that are not there ---------------------------------------------------------------------------------------------------


def test_kind_is_absent_after_404_again_and_again(make: Make) -> None:
    """A text without Status; once is not enough."""
    bench = make(TIERS, *(recorded("crd-404-then-served", 0) for _ in range(4)))
    bench.steps(2)
    assert not bench.store.is_synced
    delay_s = bench.steps()
    assert bench.store.is_synced
    assert bench.watcher.state is State.ABSENT
    assert delay_s == pytest.approx(60.0)
    assert bench.slugs() == []


def test_other_answers_between_do_not_count(make: Make) -> None:
    """404, then a list: the kind is there."""
    absent = [recorded("crd-404-then-served", 0) for _ in range(4)]
    bench = make(
        TIERS, absent[0], absent[1], stream(mark("9", ends_list=True), is_cut=True), failure(410), absent[2], absent[3]
    )
    bench.steps(6)
    assert bench.watcher.state is not State.ABSENT


def test_built_in_kind_is_never_absent(make: Make) -> None:
    """404 for pods is some other server."""
    bench = make(PODS, *(recorded("errors-4xx", 8) for _ in range(5)))
    bench.steps(5)
    assert not bench.store.is_synced
    assert bench.slugs() == ["not-served"]


def test_kind_that_appears_is_followed(make: Make) -> None:
    """A CRD created later."""
    bench = make(
        TIERS,
        *(recorded("crd-404-then-served", 0) for _ in range(3)),
        stream(("ADDED", tier("one")), mark("9", ends_list=True)),
    )
    bench.steps(4)
    assert bench.names() == ["one"]
    assert bench.watcher.state is State.WATCHING


def test_deleted_definition_keeps_its_objects(make: Make) -> None:
    """DELETED for each object, a clean end, 404: all stay in force, and the status says so."""
    bench = listed(make, tier("one"), kind=GONE_TIERS)
    bench.script.definitions = [definition(is_ending=True), failure(404)]
    bench.script.replies = [recorded("watch-crd-deleted", 0), *(recorded("watch-crd-deleted", 1) for _ in range(5))]
    bench.steps(6)
    assert bench.names() == ["one"]
    assert bench.slugs() == ["crd-deleted"]
    assert bench.watcher.state is State.DELETED
    assert len(bench.cache.release(GONE_TIERS)) == 1
    assert bench.names() == []
    assert bench.slugs() == []


def test_deletion_that_is_read_after_its_definition_went_is_none(make: Make) -> None:
    """A reader that is late: the definition is gone by the time."""
    bench = listed(make, tier("one"), tier("two"))
    bench.script.definitions = [failure(404)]
    bench.script.replies = [
        stream(("DELETED", tier("one", "7")), is_cut=True),
        failure(410),
        stream(mark("9", ends_list=True)),
    ]
    bench.steps()
    assert bench.names() == ["one", "two"]
    bench.steps(2)
    assert bench.names() == ["one", "two"]
    assert bench.slugs() == ["crd-deleted"]


def test_deleted_definition_keeps_what_no_event_named(make: Make) -> None:
    """404 after a start, or after the stream was cut."""
    bench = listed(make, tier("one"), tier("two"))
    bench.script.definitions = [failure(404)]
    bench.script.replies = [failure(410), *(recorded("watch-crd-deleted", 1) for _ in range(3))]
    bench.steps(4)
    assert bench.names() == ["one", "two"]
    assert bench.slugs() == ["crd-deleted"]


def test_definition_made_again_lifts_nothing(make: Make) -> None:
    """An empty list of a definition with another uid; what is applied again takes its place, the rest stays."""
    bench = listed(make, tier("one"), tier("two"))
    bench.script.definitions = [definition("d2")]
    bench.script.replies = [
        recorded("watch-crd-changed-deleted-recreated", 4),
        recorded("watch-crd-changed-deleted-recreated", 3),
        stream(mark("668", ends_list=True), ("ADDED", tier("one", "670", order=3)), is_cut=True),
    ]
    bench.steps(3)
    assert bench.names() == ["one", "two"]
    (problem,) = bench.store.problems()
    assert "1 of its objects" in problem.message
    bench.script.replies = [stream(("DELETED", tier("one", "671")))]
    bench.steps()
    assert bench.names() == ["two"]


def test_deletion_is_real_when_the_definition_stands(make: Make) -> None:
    """By an event and by a list."""
    bench = listed(make, tier("one"), tier("two"), tier("three"))
    bench.script.replies = [
        stream(("DELETED", tier("one", "7")), is_cut=True),
        failure(410),
        stream(("ADDED", tier("two")), mark("9", ends_list=True)),
    ]
    bench.steps(3)
    assert bench.names() == ["two"]
    assert bench.slugs() == []


@pytest.mark.parametrize("unread", [failure(403), failure(503), AWAY, Reply(chunks=[(0.0, b"{}")])])
def test_deletion_is_not_believed_without_the_definition(make: Make, unread: Reply | Exception) -> None:
    """Neither the event's nor the list's, until the definition can be read; then both are."""
    bench = listed(make, tier("one"))
    bench.script.definitions = [unread]
    bench.script.replies = [stream(("DELETED", tier("one", "7"))), stream(mark("9", ends_list=True))]
    bench.steps(2)
    assert bench.names() == ["one"]
    bench.script.definitions = [definition()]
    bench.script.replies = [stream(mark("9", ends_list=True))]
    bench.steps()
    assert bench.names() == []


def test_kind_of_an_aggregated_server_has_no_definition(make: Make) -> None:
    """Calico's API server: deletions are deletions."""
    bench = make(TIERS, stream(("ADDED", tier("one")), mark("5", ends_list=True), ("DELETED", tier("one", "6"))))
    bench.script.definitions = [failure(404)]
    bench.steps()
    assert bench.names() == []
    assert bench.slugs() == []


def test_unread_definition_is_a_problem_when_it_lasts(make: Make) -> None:
    """It names the right that is missing."""
    bench = make(TIERS, *(stream(mark("5", ends_list=True)) for _ in range(9)))
    bench.script.definitions = [failure(403, "customresourcedefinitions is forbidden")]
    bench.steps(9)
    (problem,) = bench.store.problems()
    assert "CustomResourceDefinition" in problem.message
    assert not bench.store.is_synced
