# SPDX-License-Identifier: Apache-2.0
"""The consistent read that tells whether the server still speaks for the cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from apiserver_traces import NAMESPACES, PODS, TIERS, Clock, Reply, Script, failure, page, recorded

from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.sources.kubernetes.cache import Cache
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind
from netpol_ebpf.sources.kubernetes.probing import BEHIND_PROBES, RETRY_S, FreshnessProbe, period_s, version_number
from netpol_ebpf.sources.kubernetes.watching import State

CLUSTER_POLICIES = next(kind for kind in KINDS if kind.kind == "ClusterNetworkPolicy")
AWAY = UnreachableError("it does not answer in time")


@dataclass
class Watcher:
    """Notes what it is told."""

    told: list[str] = field(default_factory=list)
    state: State = State.WATCHING

    def relist(self) -> None:
        self.told.append("relist")

    def abort(self) -> None:
        self.told.append("abort")


class Bench:
    """A probe of two kinds, the pods newer."""

    def __init__(self) -> None:
        self.cache = Cache((NAMESPACES, PODS, TIERS, CLUSTER_POLICIES))
        self.cache.stores[NAMESPACES].resource_version = "95"
        self.cache.stores[PODS].resource_version = "100"
        self.script = Script(Clock())
        self.watchers = {kind: Watcher() for kind in (*self.cache.kinds, TIERS, CLUSTER_POLICIES)}
        self.woken: list[WatchedKind] = []
        self.probe = FreshnessProbe(
            self.script, self.cache, self.watchers, self.woken.append, lambda: 0.5, lambda: "12:00"
        )  # type: ignore[arg-type]

    def ask(self, *replies: Reply | Exception) -> float:
        """As many probes; what the last one says."""
        self.script.replies = list(replies)
        return [self.probe.step() for _ in replies][-1]

    def slugs(self) -> list[str]:
        return [problem.slug for problem in self.cache.problems()]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench, given back."""
    made = Bench()
    yield made
    made.cache.close()


def test_question_is_consistent_and_small(bench: Bench) -> None:
    """No resourceVersion, one object, of the kind that is newest."""
    assert bench.ask(page(version="100")) == pytest.approx(60.0)
    assert bench.script.targets == ["/api/v1/pods?limit=1"]
    assert bench.slugs() == []


@pytest.mark.parametrize(
    "unanswered",
    [AWAY, failure(504), failure(500), recorded("etcd-away", 0), recorded("overload-429", 0), Reply(is_cut=True)],
)
def test_server_that_is_cut_off_is_told(bench: Bench, unanswered: Reply | Exception) -> None:
    """Twice without an answer; with the time of the last one; until there is one again."""
    bench.ask(page(version="100"))
    assert bench.ask(unanswered) == pytest.approx(RETRY_S)
    assert bench.slugs() == []
    bench.ask(unanswered)
    (problem,) = bench.cache.problems()
    assert problem.slug == "cut-off"
    assert "since 12:00" in problem.message
    assert "stays in force" in problem.message
    bench.ask(page(version="100"))
    assert bench.slugs() == []


def test_cached_answers_prove_nothing() -> None:
    """L4, W4: what a server answers while its etcd is away is what the probe does not ask for."""
    answered = [recorded("etcd-away", number).status for number in (1, 3, 6, 8)]
    assert answered == [200] * 4


def test_going_back_lists_everything_again(bench: Bench) -> None:
    """R3: etcd was restored from a backup; a WATCH at the lost number is silent for ever."""
    bench.ask(page(version="99"))
    assert [watcher.told for watcher in bench.watchers.values()] == [["relist"]] * 4
    assert bench.woken == list(bench.watchers)
    assert bench.slugs() == []
    assert (bench.probe.went_back, bench.probe.went_back_at) == (1, bench.probe.confirmed)


@pytest.mark.parametrize("version", ["100", "101", "1000"])
def test_going_on_lists_nothing(bench: Bench, version: str) -> None:
    """Numbers, not texts."""
    bench.ask(page(version=version))
    assert [watcher.told for watcher in bench.watchers.values()] == [[]] * 4


def test_watch_that_stays_behind_is_opened_anew_once(bench: Bench) -> None:
    """Its server is cut off while another one answers; a server without such bookmarks makes no endless loop of it."""
    bench.ask(*(page(version=str(200 + number)) for number in range(BEHIND_PROBES)))
    assert bench.watchers[PODS].told == []
    bench.ask(page(version="300"))
    assert [watcher.told for watcher in bench.watchers.values()] == [["abort"], ["abort"], [], []]
    bench.ask(*(page(version="301") for _ in range(9)))
    assert bench.watchers[PODS].told == ["abort"]
    bench.cache.stores[PODS].resource_version = "302"
    bench.ask(page(version="303"))
    bench.ask(*(page(version="304") for _ in range(BEHIND_PROBES)))
    assert bench.watchers[PODS].told == ["abort", "abort"]
    assert bench.watchers[NAMESPACES].told == ["abort"]


def test_watch_that_follows_is_left_alone(bench: Bench) -> None:
    """A bookmark a minute."""
    for number in range(200, 220):
        bench.ask(page(version=str(number)))
        for kind in (NAMESPACES, PODS):
            bench.cache.stores[kind].resource_version = str(number)
    assert [watcher.told for watcher in bench.watchers.values()] == [[]] * 4


def test_versions_that_are_no_numbers_are_not_compared(bench: Bench) -> None:
    """Aggregated servers have such ones, and their kinds are not asked: a server of their own answers for them."""
    bench.cache.stores[TIERS].resource_version = "999999"
    bench.ask(page(version="100"))
    assert bench.script.targets == ["/api/v1/pods?limit=1"]
    for store in bench.cache.stores.values():
        store.resource_version = "x1"
    assert bench.probe.step() == RETRY_S
    assert [watcher.told for watcher in bench.watchers.values()] == [[]] * 4


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("340282366920938463463374607431768211455", 2**128 - 1), ("", None), ("0", None), ("01", None)],
)
def test_version_is_a_decimal_number(text: str, number: int | None) -> None:
    """KEP-5504: no leading zero, up to 128 bits."""
    assert version_number(text) == number


@pytest.mark.parametrize("text", ["-1", "1.0", "1e3", " 1", "\u0661", "x"])
def test_other_versions_are_none(text: str) -> None:
    """So they are never compared."""
    assert version_number(text) is None


def offered(*names: str) -> Reply:
    """The list of kinds of an apiVersion."""
    body = {"kind": "APIResourceList", "resources": [{"name": name, "namespaced": False} for name in names]}
    return Reply(chunks=[(0.0, json.dumps(body).encode())])


@pytest.mark.parametrize("state", [State.ABSENT, State.DELETED])
def test_kind_that_is_there_by_now_is_listed(bench: Bench, state: State) -> None:
    """One question a group; what the group does not name proves nothing and changes nothing."""
    for kind in (TIERS, CLUSTER_POLICIES):
        bench.watchers[kind].state = state
    bench.script.replies = [
        page(version="100"),
        recorded("crd-404-then-served", 0),
        offered("clusternetworkpolicies/status"),
    ]
    bench.probe.step()
    assert bench.script.targets[1:] == ["/apis/projectcalico.org/v3", "/apis/policy.networking.k8s.io/v1alpha2"]
    assert bench.woken == []
    bench.script.replies = [page(version="100"), offered("networkpolicies", "tiers"), AWAY]
    bench.probe.step()
    assert bench.woken == [TIERS]
    assert bench.slugs() == []


def test_kinds_that_are_there_are_not_asked_for(bench: Bench) -> None:
    """A group whose kinds are all followed costs nothing."""
    bench.ask(page(version="100"))
    assert len(bench.script.targets) == 1


def test_period_grows_with_the_cluster(bench: Bench) -> None:
    """A minute on small clusters, ten probes a second on large ones; the nodes are those that are known."""
    assert [period_s(nodes) for nodes in (0, 1, 600, 5000)] == [60.0, 60.0, 60.0, 500.0]
    nodes = next(kind for kind in KINDS if kind.kind == "Node")
    cache = Cache((nodes,))
    cache.stores[nodes].entries = dict.fromkeys(range(1200))  # type: ignore[arg-type]
    periods = [
        FreshnessProbe(bench.script, cache, {}, bench.woken.append, chance=lambda at=at: at).period_s()
        for at in (0.0, 0.5, 0.999)
    ]
    assert periods == pytest.approx([60.0, 120.0, 179.88])
    cache.close()
