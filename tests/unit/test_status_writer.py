# SPDX-License-Identifier: Apache-2.0
"""The writer of a node's report: when it writes, and what each answer of the server means, over real sockets."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
from apiserver_traces import Clock, Reply, failure
from fake_apiserver import FakeServer
from writable_api import WritableApi

from netpol_ebpf.sources.kubernetes.client import Client, Cluster
from netpol_ebpf.status.report import COLLECTION, NodeStatus, Shortfall, parse_report
from netpol_ebpf.status.writer import (
    ABSENT_RETRY_S,
    LONGEST_RETRY_S,
    NODES,
    RENEWALS_PER_S,
    WRITES_PER_S,
    ReportWriter,
    gap_s,
    period_s,
)

PATH = f"{COLLECTION}/n1"
DB = {"P/db": "u1/1"}


@pytest.fixture
def api() -> WritableApi:
    return WritableApi()


@pytest.fixture
def server(api: WritableApi) -> Iterator[FakeServer]:
    with FakeServer(api) as made:
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def writer(server: FakeServer, clock: Clock) -> ReportWriter:
    return ReportWriter(Client(Cluster(server.url)), "n1", clock, lambda: 1_800_000_000.0, lambda: 0.5)


def run(writer: ReportWriter, clock: Clock, seconds: float) -> None:
    """All steps of so many seconds."""
    until_s = clock.now_s + seconds
    while True:
        pause_s = writer.step()
        if clock.now_s + pause_s > until_s:
            clock.now_s = until_s
            return
        clock.now_s += pause_s


def test_nothing_is_written_before_something_is_known(writer: ReportWriter, api: WritableApi) -> None:
    """An agent that waits for its source reports nothing: its node is silent."""
    assert writer.step() == math.inf
    assert api.writes == []


def test_report_is_written_once_and_renewed_in_its_period(writer: ReportWriter, clock: Clock, api: WritableApi) -> None:
    """The first within the gap; after that, without news, one in a period."""
    writer.offer(NodeStatus(DB))
    run(writer, clock, 1.0)
    assert [(method, path) for method, path, _ in api.writes] == [("PATCH", PATH)]
    assert parse_report(api.objects[PATH]).has("u1/1")
    assert writer.problem is None
    run(writer, clock, 600.0)
    assert 10 <= len(api.writes) - 1 <= 20


def test_report_goes_with_its_node(writer: ReportWriter, clock: Clock, api: WritableApi) -> None:
    """Its owner is the Node; a Node that was made anew, whose report was deleted, becomes the owner of the next."""
    node = {"metadata": {"name": "n1", "uid": "node-1"}}
    api.objects[NODES] = {"items": [node], "metadata": {}}
    writer.offer(NodeStatus(DB))
    run(writer, clock, 200.0)

    def owner() -> str:
        (found,) = api.objects[PATH]["metadata"]["ownerReferences"]
        assert (found["apiVersion"], found["kind"], found["name"]) == ("v1", "Node", "n1")
        return str(found["uid"])

    assert owner() == "node-1"
    reads = api.reads.count(NODES)
    run(writer, clock, 600.0)
    assert api.reads.count(NODES) == reads, "it is read once"
    node["metadata"]["uid"] = "node-2"
    del api.objects[PATH]
    run(writer, clock, 200.0)
    assert owner() == "node-2"


def test_changes_in_a_row_are_one_report(writer: ReportWriter, clock: Clock, api: WritableApi) -> None:
    """The last counts; what a node no longer needs waits for the next report."""
    writer.offer(NodeStatus(DB, nodes=1000))
    run(writer, clock, 11.0)
    before = len(api.writes)
    for generation in range(2, 50):
        writer.offer(NodeStatus({"P/db": f"u1/{generation}"}, nodes=1000))
        run(writer, clock, 0.1)
    run(writer, clock, 20.0)
    assert len(api.writes) - before <= 2
    assert parse_report(api.objects[PATH]).has("u1/49")
    before = len(api.writes)
    writer.offer(NodeStatus({}, nodes=1000))
    run(writer, clock, 5.0)
    assert len(api.writes) == before
    writer.offer(NodeStatus({}, (Shortfall("MapFull", "no room", ("P/db",)),), nodes=1000))
    run(writer, clock, 20.0)
    assert len(api.writes) == before + 1


@pytest.mark.parametrize("nodes", [1, 100, 1000, 5000, 20_000])
def test_all_nodes_together_write_no_storm(nodes: int) -> None:
    """The bounds of ADR 20, whatever changes."""
    assert nodes / gap_s(nodes) <= max(WRITES_PER_S, nodes)
    assert nodes / period_s(nodes) <= max(RENEWALS_PER_S, nodes / 60)
    if nodes >= 1000:
        assert nodes / gap_s(nodes) == WRITES_PER_S


ANSWERS = [
    (failure(404), "deploy/chart/crds/nodereports", ABSENT_RETRY_S),
    (failure(403, "user may not patch nodereports"), "may not patch", ABSENT_RETRY_S),
    (failure(409), "refused", LONGEST_RETRY_S),
    (failure(410), "refused", LONGEST_RETRY_S),
    (failure(422, "spec.programmed: wrong"), "spec.programmed: wrong", LONGEST_RETRY_S),
    (failure(429, retry_after_s=7), "refused", 8.0),
    (failure(500), "refused", LONGEST_RETRY_S),
    (failure(503), "refused", LONGEST_RETRY_S),
    (Reply(200, chunks=[(0.0, b"<html>")]), "not JSON", LONGEST_RETRY_S),
]


@pytest.mark.parametrize(("answer", "says", "most_s"), ANSWERS, ids=lambda one: str(getattr(one, "status", "")))
def test_refusal_is_told_and_tried_again(
    writer: ReportWriter, clock: Clock, api: WritableApi, answer: Reply, says: str, most_s: float
) -> None:
    """A warning, since what is in force does not depend on it; it goes with the next report that is confirmed."""
    api.refusals["PATCH"] = [answer]
    writer.offer(NodeStatus(DB))
    clock.now_s += writer.step()
    pause_s = writer.step()
    assert writer.problem is not None
    assert (writer.problem.severity, writer.problem.slug) == ("warning", "status-report")
    assert says in writer.problem.message
    assert 0 < pause_s <= most_s
    assert len(api.writes) == 1
    clock.now_s += pause_s
    writer.step()
    assert (len(api.writes), writer.problem) == (2, None)


def test_server_that_is_away_is_tried_ever_less_often(api: WritableApi, clock: Clock) -> None:
    """The offer never waits; the report is written when the server is back."""
    with FakeServer(api) as first:
        port = first.port
    writer = ReportWriter(Client(Cluster(f"http://127.0.0.1:{port}")), "n1", clock, time.time, lambda: 0.5)
    writer.offer(NodeStatus(DB))
    clock.now_s += writer.step()
    pauses = []
    for _ in range(8):
        pauses.append(writer.step())
        clock.now_s += pauses[-1]
        writer.offer(NodeStatus({"P/db": f"u1/{len(pauses)}"}))
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_RETRY_S
    assert writer.problem is not None
    assert "cannot be reached" in writer.problem.message
    with FakeServer(api, port=port):
        writer.step()
    assert parse_report(api.objects[PATH]).has("u1/8")


def test_refused_renewal_waits_too(writer: ReportWriter, clock: Clock, api: WritableApi) -> None:
    """A report that is overdue is not tried without a pause, also when the node changes meanwhile."""
    writer.offer(NodeStatus(DB))
    run(writer, clock, 1.0)
    api.refusals["PATCH"] = [failure(503) for _ in range(500)]
    run(writer, clock, 60.0)
    for generation in range(2, 200):
        writer.offer(NodeStatus({"P/db": f"u1/{generation}"}))
        run(writer, clock, 0.1)
    assert 3 <= len(api.writes) <= 10


def test_cut_answer_is_no_confirmation(server: FakeServer, api: WritableApi, clock: Clock) -> None:
    """It may have been written: it is written again."""
    del server

    def cut(request):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        wire = api(request)
        wire.end = "cut" if request.method == "PATCH" and len(api.writes) == 1 else "clean"
        return wire

    with FakeServer(cut) as other:
        writer = ReportWriter(Client(Cluster(other.url)), "n1", clock, time.time, lambda: 0.5)
        writer.offer(NodeStatus(DB))
        clock.now_s += writer.step()
        clock.now_s += writer.step()
        assert writer.problem is not None
        writer.step()
    assert (len(api.writes), writer.problem, writer.written) == (2, None, 1)
