# SPDX-License-Identifier: Apache-2.0
"""The agent with objects from an API server over real sockets: a late start, no server, its loss and its return."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver_traces import NAMESPACES, PODS, failure, stream
from fake_apiserver import FakeServer, Wire
from memory_barrier import MemoryTables
from memory_source import MemorySource, upsert
from test_agent_core import CLUSTER, DB, POLICY, WEB, WIRING, Bench, MemoryNode
from test_agent_loop import ReadableNode
from test_kubernetes_source import MiniApi

from netpol_ebpf.agent.control_socket import ControlSocket, ask
from netpol_ebpf.agent.core import CLOSE_S, NOT_SYNCED, Agent
from netpol_ebpf.agent.handover import Handover
from netpol_ebpf.agent.loop import AgentLoop
from netpol_ebpf.agent.main import answers_of, waits_of
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.cli import main as cli
from netpol_ebpf.cli import release
from netpol_ebpf.errors import InvalidInputError, UnreachableError
from netpol_ebpf.policy.translate import ResourceKey
from netpol_ebpf.policy.types import Direction
from netpol_ebpf.sources import reading
from netpol_ebpf.sources.files import ManifestDirectory
from netpol_ebpf.sources.kubernetes import source as source_module
from netpol_ebpf.sources.kubernetes import watching
from netpol_ebpf.sources.kubernetes.client import Cluster
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind
from netpol_ebpf.sources.kubernetes.source import KubernetesSource
from netpol_ebpf.sources.merged import MergedSources
from netpol_ebpf.sources.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""Answers come from forked children, and readers of the API are threads."""

POLICIES = next(kind for kind in KINDS if str(kind) == "networkpolicies.networking.k8s.io")
GLOBAL_POLICIES = next(kind for kind in KINDS if str(kind) == "globalnetworkpolicies.projectcalico.org")
FEW = (NAMESPACES, PODS, POLICIES)
DEADLINE_S = 20.0
PLACE = {"pid": 1, "manifests": None, "pin_dir": "p", "upgrade": ""}


class AbsentTables(MemoryTables):
    """Tables of a second barrier without notifications of the kernel."""

    def fileno(self) -> None:
        return None

    def part(self) -> None:
        return None


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("FIRST_RETRY_S", 0.05),
        ("LONGEST_RETRY_S", 0.2),
        ("ABSENT_RETRY_S", 0.05),
        ("GRACE_S", 0.1),
    ):
        monkeypatch.setattr(watching, name, seconds)
    monkeypatch.setattr(source_module, "SAVE_S", 0.05)


def objects() -> dict[Any, list[dict[str, Any]]]:
    """The objects of `CLUSTER` and `POLICY` as a server has them."""
    found: dict[Any, list[dict[str, Any]]] = {kind: [] for kind in FEW}
    for number, one in enumerate(yaml.safe_load_all(f"{CLUSTER}---\n{POLICY}"), 1):
        kind = next(kind for kind in FEW if kind.kind == one["kind"])
        one["metadata"]["resourceVersion"] = str(number)
        found[kind].append(one)
    return found


@dataclass
class Stage:
    """A node in memory, an API with its server, and successive agents."""

    bench: Bench
    node: ReadableNode
    api: MiniApi
    server: FakeServer | None = None
    made: list[Source] = field(default_factory=list)
    kinds: tuple[WatchedKind, ...] = FEW

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    def serve(self, port: int = 0) -> None:
        self.server = FakeServer(self.api, port=port)
        self.server.__enter__()

    def stop_serving(self) -> int:
        """Stop the server. Returns its port."""
        assert self.server is not None
        server, self.server = self.server, None
        server.__exit__()
        return server.port

    def cluster(self, *, may_restore: bool = False, url: str = "") -> KubernetesSource:
        clock = lambda: self.bench.now_s  # noqa: E731
        path = self.bench.home / "saved" / "cluster"
        return KubernetesSource(Cluster(url or self.url), path, may_restore, kinds=self.kinds, clock=clock)

    def agent(self, source: Source) -> Agent:
        """An agent that has begun, in place of the previous one."""
        self.close_sources()
        self.made.append(source)
        self.bench.close()
        self.bench.ledgers.append(Ledger(self.bench.home / "numbers"))
        settings = AgentSettings("here")
        handovers = self.bench.home / "handovers"
        one = Agent(settings, self.node, source, self.bench.ledgers[-1], lambda: self.bench.now_s, None, handovers)
        one.begin()
        return one

    def close_sources(self) -> None:
        for one in self.made:
            one.close()
        self.made.clear()

    def turn(self, agent: Agent) -> None:
        """Wait for news for a moment, and make a step."""
        descriptor = agent.source.fileno()
        if descriptor is not None and select.select([descriptor], [], [], 0.05)[0]:
            agent.source.note_news()
        agent.step()

    def until(self, agent: Agent, is_so: Callable[[], bool]) -> None:
        until_s = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < until_s, (agent.problems, agent.source.report())
            self.turn(agent)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    node = ReadableNode(barrier=AbsentTables())
    one = Stage(Bench(tmp_path, node), node, MiniApi(objects()))
    one.serve()
    yield one
    one.close_sources()
    if one.server is not None:
        one.stop_serving()
    one.bench.close()
    for descriptor in node.pipe:
        os.close(descriptor)


def bound(agent: Agent) -> set[Any]:
    return set(agent.enforcement.applier.bindings)


def rows(node: MemoryNode) -> dict[str, Any]:
    """The rows of the maps in force."""
    return {name: dict(one.rows) for name, one in node.in_force.items() if "count" not in name}


def slugs(agent: Agent) -> set[str]:
    return {one.slug for one in agent.problems}


def refuse(api: MiniApi, kind: Any, times: int = 10_000) -> None:
    """Answer 503 to the next ``times`` requests for a kind."""
    api.first[kind.path] = [Wire(failure(503)) for _ in range(times)]


def test_earlier_enforcement_stays_until_every_kind_has_synced(stage: Stage) -> None:
    """One kind is late: no map and no program changes, and the agent names the kind. Then all is exchanged at once."""
    for name, text in (("cluster.yaml", CLUSTER), ("policy.yaml", POLICY)):
        stage.bench.write(name, text)
    stage.agent(ManifestDirectory(stage.bench.home / "manifests", interval_s=0.0))
    before = rows(stage.node), set(stage.node.programs), stage.node.exchanges
    assert stage.node.exchanges == 1
    refuse(stage.api, POLICIES)
    agent = stage.agent(stage.cluster())
    source = agent.source
    assert isinstance(source, KubernetesSource)
    stage.until(agent, lambda: source.cache.unsynced == (POLICIES,))
    stage.bench.now_s += 100 * CLOSE_S
    stage.until(agent, lambda: "unavailable" in slugs(agent))
    assert not agent.is_started
    assert agent.keeps_enforcement
    assert (rows(stage.node), stage.node.programs, stage.node.exchanges) == before
    (waits,) = (one for one in agent.problems if one.slug == NOT_SYNCED)
    assert f"{stage.url} ({POLICIES})" in waits.message
    assert "what an earlier agent put in force stays" in waits.message
    stage.api.first.clear()
    stage.until(agent, lambda: agent.is_in_force)
    assert stage.node.exchanges == 2
    assert bound(agent) == {WEB, DB}
    stage.until(agent, lambda: not agent.problems)


def test_node_without_enforcement_is_closed_when_no_server_answers(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """After a while workloads' interfaces have programs, and no pod has a row.

    When the server answers, pods get their policy.
    """
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}", may_restore=True))
    stage.turn(agent)
    assert not agent.keeps_enforcement
    assert stage.node.programs == set()
    stage.bench.now_s += CLOSE_S
    stage.turn(agent)
    assert {5, 6} <= stage.node.programs
    assert agent.keeps_enforcement
    assert not agent.is_in_force
    (waits,) = (one for one in agent.problems if one.slug == NOT_SYNCED)
    assert waits.severity == "error"
    assert "the workloads of this node are closed" in waits.message
    assert waits.message in caplog.text
    stage.serve(port)
    stage.until(agent, lambda: agent.is_in_force)
    assert bound(agent) == {WEB, DB}
    assert stage.node.row(5) is not None
    stage.until(agent, lambda: not agent.problems)


NEW = Interface(9, "cali9", "veth", (3, 2))
"""The interface of a pod that no agent has seen."""


def with_links(*links: Interface, routes: dict[str, int] | None = None) -> Wiring:
    """The node's network with further interfaces."""
    found = {ip_address(address): ifindex for address, ifindex in (routes or {}).items()}
    return replace(
        WIRING,
        links={**WIRING.links, **{one.ifindex: one for one in links}},
        host_routes={**WIRING.host_routes, **found},
    )


def enforce(stage: Stage) -> None:
    """Let an agent put the cluster in force from manifests."""
    for name, text in (("cluster.yaml", CLUSTER), ("policy.yaml", POLICY)):
        stage.bench.write(name, text)
    stage.agent(ManifestDirectory(stage.bench.home / "manifests", interval_s=0.0))


def test_interface_that_appears_while_the_source_is_missing_is_closed(stage: Stage) -> None:
    """An earlier agent's policy is in force.

    One interface appeared between the agents, one is new. Enforced pods do not change.
    """
    enforce(stage)
    before = rows(stage.node), set(stage.node.programs), stage.node.exchanges
    between, born = Interface(8, "cali8", "veth", (4, 2)), NEW
    stage.node.wiring = with_links(between)
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}"))
    assert stage.node.programs == before[1] | {8}
    stage.node.born.append(born)
    stage.turn(agent)
    assert stage.node.programs == before[1] | {8, 9}
    stage.node.wiring, stage.node.news = with_links(between, born), True
    stage.turn(agent)
    assert not agent.is_started
    assert stage.node.programs == before[1] | {8, 9}
    assert (rows(stage.node), stage.node.exchanges) == (before[0], before[2])
    (waits,) = (one for one in agent.problems if one.slug == NOT_SYNCED)
    assert "cali8, cali9 and other new interfaces of workloads are closed" in waits.message
    stage.serve(port)
    stage.until(agent, lambda: agent.is_in_force)
    assert bound(agent) == {WEB, DB}
    assert {8, 9} <= stage.node.programs
    assert (stage.node.row(8), stage.node.row(9)) == (None, None)


def test_interface_with_the_index_of_one_that_is_gone_is_closed_while_the_source_is_missing(stage: Stage) -> None:
    """The earlier agent's row is removed with its interface, so the new interface does not get the old pod's policy."""
    enforce(stage)
    assert stage.node.row(6) is not None
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}"))
    again = Interface(6, "cali9", "veth", (3, 2))
    stage.node.programs.discard(6)
    stage.node.gone, stage.node.born, stage.node.news = {6}, [again], True
    stage.node.wiring = with_links(again)
    stage.turn(agent)
    stage.turn(agent)
    assert 6 in stage.node.programs
    assert stage.node.row(6) is None


def test_own_interfaces_stay_open_while_the_source_is_missing(stage: Stage) -> None:
    """The role that an earlier agent stored counts, and a default route shows that an interface is the node's own."""
    enforce(stage)
    uplink = Interface(9, "eth9", "veth", (3, 2))
    stage.node.wiring = replace(with_links(uplink), uplinks=frozenset({9}))
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}"))
    stage.turn(agent)
    assert 9 not in stage.node.programs


def test_new_interface_is_closed_at_once_where_nothing_was_in_force(stage: Stage) -> None:
    """Other interfaces, which may have connections, stay open until `CLOSE_S`."""
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}"))
    stage.node.born.append(NEW)
    stage.turn(agent)
    assert stage.node.programs == {9}
    assert not agent.keeps_enforcement


def test_interface_that_appears_while_manifests_are_read_is_closed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reading takes any time. The agent does not wait for it without a break."""
    enforce(stage)
    monkeypatch.setattr(reading, "IN_PLACE_BYTES", 0)
    has_ended, done = reading.Reading.has_ended, threading.Event()
    monkeypatch.setattr(
        reading.Reading, "has_ended", lambda one, *, wait=False: done.is_set() and has_ended(one, wait=wait)
    )
    agent = stage.agent(ManifestDirectory(stage.bench.home / "manifests", interval_s=0.0))
    assert not agent.is_started
    stage.node.born.append(NEW)
    stage.turn(agent)
    assert 9 in stage.node.programs
    assert "waits for all objects" in agent.problems[-1].message
    done.set()
    stage.until(agent, lambda: agent.is_in_force)
    assert bound(agent) == {WEB, DB}


def test_node_reaches_closed_workloads_of_a_node_without_enforcement(stage: Stage) -> None:
    """Each interface with known addresses has a row that denies all except the node.

    The pods' own rows replace these.
    """
    stage.node.wiring = with_links(NEW, Interface(10, "cali10", "veth", (4, 2)), routes={"10.0.0.9": 9})
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}", may_restore=True))
    stage.bench.now_s += CLOSE_S
    stage.turn(agent)
    assert {5, 6, 9, 10} <= stage.node.programs
    for ifindex in (5, 6, 9):
        assert stage.node.row(ifindex) is not None
    assert stage.node.row(10) is None
    assert {one.name for one in bound(agent)} == {"cali1", "cali2", "cali9"}
    assert all(not agent.enforcement.isolation(key)[way] for key in bound(agent) for way in Direction)
    (waits,) = (one for one in agent.problems if one.slug == NOT_SYNCED)
    assert "except for connections of the node, which do not reach cali10 either" in waits.message
    closed = set(bound(agent))
    # One more interface appears. It is closed, and reached as soon as its address is known.
    late = Interface(11, "cali11", "veth", (5, 2))
    stage.node.wiring, stage.node.news = with_links(NEW, late, routes={"10.0.0.9": 9, "10.0.0.11": 11}), True
    stage.turn(agent)
    assert stage.node.row(11) is not None
    stage.serve(port)
    stage.until(agent, lambda: agent.is_in_force)
    assert bound(agent) == {WEB, DB}
    assert not closed & agent.objects.world.endpoints.keys()
    assert (stage.node.row(9), stage.node.row(11)) == (None, None)
    stage.until(agent, lambda: not agent.problems)


def test_state_that_does_not_fit_is_not_in_force(stage: Stage) -> None:
    """The server answers after workloads were closed, but its objects do not fit. They are not reported as in force."""
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}", may_restore=True))
    stage.bench.now_s += CLOSE_S
    stage.turn(agent)
    room = stage.node.in_force["np_rule"].max_entries
    stage.node.in_force["np_rule"].max_entries = 1
    stage.serve(port)
    stage.until(agent, lambda: agent.rejected.problem is not None)
    assert not agent.is_in_force
    stage.node.in_force["np_rule"].max_entries = room
    stage.bench.now_s += 100 * CLOSE_S
    stage.until(agent, lambda: agent.is_in_force)
    assert bound(agent) == {WEB, DB}


def test_saved_state_is_in_force_on_a_node_that_starts_without_its_server(stage: Stage) -> None:
    """The tables are those of the earlier state.

    `status` says since when they may be stale, until the server answers.
    """
    agent = stage.agent(stage.cluster())
    stage.until(agent, lambda: agent.is_in_force)
    stage.until(agent, (stage.bench.home / "saved" / "cluster").exists)
    wanted = dict(agent.enforcement.tables.endpoints.items())
    stage.node.programs.clear()  # a reboot
    port = stage.stop_serving()
    agent = stage.agent(stage.cluster(url=f"http://127.0.0.1:{port}", may_restore=True))
    stage.bench.now_s += source_module.RESTORE_S
    stage.until(agent, lambda: agent.is_in_force)
    assert dict(agent.enforcement.tables.endpoints.items()) == wanted
    assert bound(agent) == {WEB, DB}
    assert "restored" in slugs(agent)
    (state,) = agent.source.report()
    assert state["restored"]
    assert state["stale_since"].endswith("Z")
    stage.serve(port)
    stage.until(agent, lambda: "restored" not in slugs(agent))
    assert agent.source.report()[0]["stale_since"] is None


def test_cut_server_lifts_nothing_and_its_return_brings_what_was_missed(stage: Stage) -> None:
    """While the server is away no row changes. A policy that was deleted meanwhile is removed afterwards."""
    agent = stage.agent(stage.cluster())
    stage.until(agent, lambda: agent.is_in_force)
    before, applied = rows(stage.node), agent.enforcement.changes_applied
    port = stage.stop_serving()
    stage.until(agent, lambda: "unreachable" in slugs(agent))
    assert rows(stage.node) == before
    assert agent.enforcement.changes_applied == applied
    stage.api.objects[POLICIES].clear()
    stage.api.version += 100
    # The server has no history when it returns, like a restarted one.
    expired = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    for kind in FEW:
        stage.api.first[kind.path] = [Wire(stream(("ERROR", expired)))]
    stage.serve(port)
    stage.until(agent, lambda: not agent.objects.world.policies)
    stage.until(agent, lambda: not agent.problems)
    assert agent.enforcement.changes_applied > applied


def test_manifests_alone_are_not_applied_while_the_cluster_is_missing(stage: Stage) -> None:
    """A policy of a file may allow what one of the cluster denies: nothing of it is in force before both are known."""
    stage.bench.write("policy.yaml", POLICY.replace("name: db,", "name: file,"))
    refuse(stage.api, PODS)
    files = ManifestDirectory(stage.bench.home / "manifests", interval_s=0.0)
    agent = stage.agent(MergedSources([stage.cluster(), files]))
    stage.bench.now_s += CLOSE_S
    stage.until(agent, lambda: agent.is_started)
    assert len(agent.objects.world.policies) == 0
    assert [one["synced"] for one in agent.source.report()] == [False, True]
    stage.api.first.clear()
    stage.until(agent, lambda: agent.is_in_force)
    assert {key.name for key in agent.objects.world.policies} == {"db", "file"}


def test_same_object_in_both_is_a_problem_and_the_cluster_s_is_in_force(stage: Stage) -> None:
    """The problem names the object and both places."""
    stage.bench.write("policy.yaml", POLICY)
    files = ManifestDirectory(stage.bench.home / "manifests", interval_s=0.0)
    agent = stage.agent(MergedSources([stage.cluster(), files]))
    stage.until(agent, lambda: agent.is_in_force)
    (problem,) = (one for one in agent.problems if one.slug == "duplicate")
    assert problem.obj == "KubernetesNetworkPolicy/shop/db"
    assert stage.url in problem.message
    assert problem.location.file.endswith("policy.yaml")


def test_events_before_the_start_are_applied_in_their_order(tmp_path: Path) -> None:
    """If one source syncs last, the events of others in the meantime are not lost."""
    first, second = MemorySource("first"), MemorySource("second", syncs_after=3)
    first.batches = [[upsert("a", "first")], [upsert("a", "first", 1)], [upsert("b", "first")]]
    second.batches = [[], [], [upsert("c", "second")]]
    ledger = Ledger(tmp_path / "numbers")
    agent = Agent(AgentSettings("here"), MemoryNode(), MergedSources([first, second]), ledger, lambda: 0.0)
    agent.begin()
    assert not agent.is_started
    for _ in range(3):
        agent.step()
    assert agent.is_in_force
    for name, state in (("a", "s1"), ("b", "s0"), ("c", "s0")):
        found = agent.objects.derivation.get(ResourceKey("Namespace", "", name))
        assert found is not None
        assert found.meta.labels["state"] == state
    ledger.close()


@dataclass
class Asker:
    """Sends requests to the agent from a thread while the loop runs."""

    loop: AgentLoop
    path: Path
    wake: int

    def __call__(self, operation: str, **request: Any) -> Any:
        answers: list[Any] = []

        def work() -> None:
            try:
                answers.extend(ask(self.path, {"op": operation, **request}, timeout_s=DEADLINE_S))
            except Exception as error:  # noqa: BLE001 - the test checks the error
                answers.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            self.loop.run_once(self.wake)
        thread.join()
        return answers[0]


@pytest.fixture
def asked(stage: Stage) -> Iterator[Callable[[Agent], Asker]]:
    wake, writing = os.pipe()
    sockets: list[ControlSocket] = []

    def make(agent: Agent, told: list[str] | None = None) -> Asker:
        ledger, path = stage.bench.ledgers[-1], stage.bench.home / "agent.sock"
        service = ControlSocket(path, answers_of(agent, stage.node, ledger, PLACE), None, waits_of(agent))
        sockets.append(service)
        loop = AgentLoop(
            agent, stage.node, ledger, service, lambda: (told if told is not None else []).append("in force")
        )
        loop.open()
        return Asker(loop, path, wake)

    yield make
    for one in sockets:
        one.close()
    os.close(wake)
    os.close(writing)


def test_agent_that_waits_answers_and_says_for_what(stage: Stage, asked: Callable[..., Asker]) -> None:
    """`status` has the state of each kind.

    Other requests, also the CNI plugin's, fail with the reason. Then all are answered.
    """
    refuse(stage.api, POLICIES)
    stage.node.programs = {5, 6}  # of an earlier agent
    agent = stage.agent(stage.cluster())
    told: list[str] = []
    query = asked(agent, told)
    source = agent.source
    assert isinstance(source, KubernetesSource)
    stage.until(agent, lambda: source.cache.unsynced == (POLICIES,))
    state = query("status")
    assert state["in_force"] is False
    assert state["node"] == "here"
    assert state["sources"][0]["waiting_for"] == [str(POLICIES)]
    assert {one["kind"]: one["objects"] for one in state["sources"][0]["kinds"]} == {
        "namespaces": 1, "pods": 3, str(POLICIES): 0,
    }  # fmt: skip
    assert NOT_SYNCED in {one["slug"] for one in state["problems"]}
    for operation in ("rules", "identities", "connections", "ready"):
        assert isinstance(query(operation), UnreachableError)
    assert told == []
    stage.api.first.clear()
    while not agent.is_in_force or agent.objects.source_problems:  # the watch begins a moment after the list
        query.loop.run_once(query.wake)
    state = query("status")
    assert state["in_force"] is True
    assert state["sources"][0]["synced"] is True
    assert "waiting" not in state
    assert told == ["in force"]
    assert query("ready") == {"in_force": True}


def test_answer_does_not_wait_for_a_lock_that_a_reader_held(stage: Stage) -> None:
    """A forked child has a copy of a held lock that nobody releases. The answer comes nevertheless."""
    agent = stage.agent(stage.cluster())
    stage.until(agent, lambda: agent.is_in_force)
    status = answers_of(agent, stage.node, stage.bench.ledgers[-1], PLACE)["status"]
    source = agent.source
    assert isinstance(source, KubernetesSource)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with source.cache.lock:
            held.set()
            done.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(DEADLINE_S)
    child = os.fork()
    if child == 0:
        signal.alarm(int(DEADLINE_S))
        os._exit(0 if status({})["sources"][0]["synced"] else 1)
    done.set()
    thread.join()
    _, code = os.waitpid(child, 0)
    assert code == 0


def test_handover_while_the_agent_waits_is_in_force_after_its_start(stage: Stage) -> None:
    """A handover of the CNI plugin in the meantime is used after the start.

    Until then the answer names the missing source.
    """
    refuse(stage.api, POLICIES)
    stage.node.wiring = replace(WIRING, host_routes={})
    agent = stage.agent(stage.cluster())
    handed = Handover(WEB, "", 5, "cali1", (1, 2), "eth0", (ip_address("10.0.0.1"),))
    agent.hand_over(handed)
    assert "waits for all objects" in agent.missing_for(handed)
    stage.api.first.clear()
    stage.until(agent, lambda: agent.is_in_force)
    assert agent.missing_for(handed) == ""
    assert bound(agent) == {WEB}
    # The next agent waits too, and gets another pod. It knows both.
    refuse(stage.api, POLICIES)
    agent = stage.agent(stage.cluster())
    agent.hand_over(Handover(DB, "", 6, "cali2", (2, 2), "eth0", (ip_address("10.0.0.2"),)))
    stage.api.first.clear()
    stage.until(agent, lambda: agent.is_in_force)
    assert set(agent.objects.handovers.pods) == {WEB, DB}
    assert bound(agent) == {WEB, DB}


def test_kept_policies_end_on_an_operators_word(
    stage: Stage, asked: Callable[..., Asker], caplog: pytest.LogCaptureFixture
) -> None:
    """The definition is deleted and the policy stays.

    A dry run names it. The release ends it at once and reports it.
    """
    stage.kinds = (*FEW, GLOBAL_POLICIES)
    metadata = {"name": "all", "resourceVersion": "50", "uid": "one"}
    stage.api.objects[GLOBAL_POLICIES] = [
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "GlobalNetworkPolicy",
            "metadata": metadata,
            "spec": {"types": ["Ingress"]},
        }
    ]
    agent = stage.agent(stage.cluster())
    stage.until(agent, lambda: agent.is_in_force)
    query = asked(agent)
    kind = str(GLOBAL_POLICIES)
    assert isinstance(query("release", kind=kind, dry_run=False), InvalidInputError)
    stage.api.definition = failure(404)
    del stage.api.objects[GLOBAL_POLICIES]
    stage.api.end(GLOBAL_POLICIES)
    stage.until(agent, lambda: "crd-deleted" in slugs(agent))
    assert f"netpolctl release {kind}" in str([one for one in agent.problems if one.slug == "crd-deleted"])
    names = ["GlobalNetworkPolicy/all"]
    assert query("release", kind=kind, dry_run=True) == {"released": names, "rejected": None}
    assert len(agent.objects.world.policies) == 2
    assert query("release", kind=kind, dry_run=False) == {"released": names, "rejected": None}
    assert len(agent.objects.world.policies) == 1
    assert "an operator released 1 objects" in caplog.text
    stage.until(agent, lambda: not agent.problems)


def test_release_says_what_it_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has the names, and whether the change was rejected."""
    answers = iter([
        {"released": ["Tier/one", "Tier/two"], "rejected": None},
        {"released": ["Tier/one"], "rejected": None},
        {"released": ["Tier/one"], "rejected": "np_rule is full"},
    ])  # fmt: skip
    requests: list[dict[str, Any]] = []

    def said(_arguments: Any, operation: str, **request: Any) -> Any:
        requests.append({"op": operation, **request})
        yield next(answers)

    monkeypatch.setattr(release, "ask_agent", said)
    assert cli.main(["release", "tiers.projectcalico.org", "--dry-run"]) == 0
    assert (
        capsys.readouterr().out
        == "would end: 2 objects of tiers.projectcalico.org on this node\n  Tier/one\n  Tier/two\n"
    )
    assert cli.main(["release", "tiers.projectcalico.org"]) == 0
    assert capsys.readouterr().out.startswith("released: 1 objects")
    assert cli.main(["release", "tiers.projectcalico.org"]) == 1
    assert "REJECTED, what was in force stays in force: np_rule is full" in capsys.readouterr().out
    assert [(one["kind"], one["dry_run"]) for one in requests] == [
        ("tiers.projectcalico.org", True), ("tiers.projectcalico.org", False), ("tiers.projectcalico.org", False),
    ]  # fmt: skip
