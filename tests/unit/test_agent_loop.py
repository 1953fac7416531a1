# SPDX-License-Identifier: Apache-2.0
"""The agent's loop while clients send requests without a pause: its own work, its order, and the work of children."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from memory_barrier import MemoryTables
from memory_maps import MemoryMap
from memory_source import MemorySource
from test_agent_core import CLUSTER, DB, POD, POLICY, WIRING, Bench, MemoryNode
from test_sources_reading import in_child, stop, wait_for_stop

from netpol_ebpf.agent import control_socket as control_socket_module
from netpol_ebpf.agent import loop as agent_loop
from netpol_ebpf.agent import report
from netpol_ebpf.agent.answering import Answering
from netpol_ebpf.agent.control_socket import ControlSocket
from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.loop import AgentLoop
from netpol_ebpf.agent.main import answers_of
from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.resources import manifest_files
from netpol_ebpf.sources import reading

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""The threads belong to the test runner; the agent has only one."""

OPERATIONS = ("status", "rules", "identities", "connections", "flows")
CLIENTS = 6


class ReadableTables(MemoryTables):
    """Tables that a forked child can leave, without notifications of the kernel."""

    def fileno(self) -> None:
        return None

    def part(self) -> None:
        assert os.getpid() != AGENT


AGENT = os.getpid()


@dataclass
class ReadableNode(MemoryNode):
    """A node whose news make a pipe readable."""

    pipe: tuple[int, int] = field(default_factory=os.pipe)
    listed_again: dict[str, int] = field(default_factory=dict)

    def fileno(self) -> int:
        return self.pipe[0]

    def tell(self) -> None:
        os.write(self.pipe[1], b"x")


@dataclass
class Stage:
    """The loop, and the events since the last turn began."""

    bench: Bench
    agent: Agent
    loop: AgentLoop
    events: list[str] = field(default_factory=list)
    steps: int = 0
    wake: int = -1

    def turn(self) -> list[str]:
        self.events.clear()
        self.loop.run_once(self.wake)
        assert self.events.count("begin") <= 1, "one answer a turn"
        return list(self.events)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setitem(globals(), "AGENT", os.getpid())
    node = ReadableNode(barrier=ReadableTables())
    bench = Bench(tmp_path, node)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    agent = bench.agent()
    place = {"pid": os.getpid(), "manifests": "m", "pin_dir": "p", "upgrade": ""}
    ledger = bench.ledgers[-1]
    service = ControlSocket(tmp_path / "agent.sock", answers_of(agent, node, ledger, place))
    one = Stage(bench, agent, AgentLoop(agent, node, ledger, service))
    one.wake, writing = os.pipe()

    def noted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            one.events.append(what)
            one.steps += what == "step"
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    noted(agent, "close_newborn", "newborn")
    noted(agent, "step", "step")
    noted(Answering, "begin", "begin")

    # While the loop's own process serves clients, it reads no data for an answer.
    serving = [False]
    poll = control_socket_module.ControlSocket.poll

    def served(self: ControlSocket) -> None:
        serving[0] = True
        try:
            poll(self)
        finally:
            serving[0] = False

    monkeypatch.setattr(control_socket_module.ControlSocket, "poll", served)

    def elsewhere(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            assert not (serving[0] and os.getpid() == AGENT), f"{name} in the agent's own loop"
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("status", "rules", "identities", "connections"):
        elsewhere(report, name)
    for name in ("get", "items"):
        elsewhere(MemoryMap, name)
    one.loop.open()
    yield one
    service.close()
    bench.close()
    for descriptor in (one.wake, writing, *node.pipe):
        os.close(descriptor)


class Crowd:
    """Clients that send the next request as soon as one is answered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered: Counter[str] = Counter()
        self._asked: list[tuple[socket.socket, str, bytearray]] = []
        self._operations = [itertools.cycle(OPERATIONS[at:] + OPERATIONS[:at]) for at in range(CLIENTS)]
        for at in range(CLIENTS):
            self._asked.append(self._ask(at))

    def _ask(self, at: int) -> tuple[socket.socket, str, bytearray]:
        operation = next(self._operations[at])
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(self.path))
        channel.sendall(json.dumps({"op": operation}).encode() + b"\n")
        channel.settimeout(0)
        return channel, operation, bytearray()

    def go_on(self) -> None:
        """Read all available bytes. A client with a complete answer sends its next request."""
        for at, (channel, operation, received) in enumerate(self._asked):
            with contextlib.suppress(BlockingIOError):
                while data := channel.recv(1 << 16):
                    received.extend(data)
                channel.close()
                for line in received.splitlines():
                    value = json.loads(line)
                    assert not (isinstance(value, dict) and "error" in value), value
                assert received or operation == "flows"
                self.answered[operation] += 1
                self._asked[at] = self._ask(at)

    def close(self) -> None:
        for channel, _, _ in self._asked:
            channel.close()


def test_policy_and_interfaces_are_dealt_with_while_everybody_asks(stage: Stage) -> None:
    """No turn walks a table for the clients, a new interface comes first, and policy takes two steps."""
    crowd = Crowd(stage.loop.control_socket.path)
    try:
        while min(crowd.answered[operation] for operation in OPERATIONS) < 2:
            stage.turn()
            crowd.go_on()

        # The policy denies everything to db. It is applied in the steps that a directory needs to settle.
        before = stage.agent.enforcement.changes_applied
        stage.bench.write("policy.yaml", POLICY.replace("ingress: [{", "# ingress: [{"))
        begun, asked = stage.steps, sum(crowd.answered.values())
        while stage.agent.enforcement.changes_applied == before:
            stage.turn()
            crowd.go_on()
            assert stage.steps - begun <= 3, "a change is taken up by the second look that sees it"
        while sum(crowd.answered.values()) < asked + CLIENTS:  # the clients were answered meanwhile
            stage.turn()
            crowd.go_on()

        # A new interface gets its programs before any work for clients.
        node = stage.bench.node
        assert isinstance(node, ReadableNode)
        late = Interface(9, "cali9", "veth", (7, 2))
        node.wiring = replace(
            WIRING, links={**WIRING.links, 9: late}, host_routes={**WIRING.host_routes, ip_address("10.0.0.9"): 9}
        )
        node.born.append(late)
        node.news = True
        node.tell()
        events = stage.turn()
        assert events[0] == "newborn"
        assert 9 in node.programs
        os.read(node.pipe[0], 16)
    finally:
        crowd.close()
    assert stage.agent.enforcement.applier.is_enforced(DB)


def bear(node: MemoryNode) -> None:
    """Add the interface of a pod that the manifests do not have."""
    late = Interface(9, "cali9", "veth", (7, 2))
    node.wiring = replace(WIRING, links={**WIRING.links, 9: late})
    node.born.append(late)
    node.news = True


def test_interfaces_and_questions_do_not_wait_for_large_manifests(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a child reads them, new interfaces are closed at once and clients are answered.

    Then all files are in force together.
    """
    in_child(monkeypatch, stop, "more.yaml")
    before = stage.agent.enforcement.changes_applied
    stage.bench.write("policy.yaml", POLICY.replace("ingress: [{", "# ingress: [{"))
    stage.bench.write("more.yaml", POD.format(name="late", node="here", last=9) + "#" * reading.IN_PLACE_BYTES)
    child = wait_for_stop(stage.agent.source, stage.turn)
    crowd = Crowd(stage.loop.control_socket.path)
    try:
        bear(stage.bench.node)
        assert isinstance(stage.bench.node, ReadableNode)
        stage.bench.node.tell()
        assert stage.turn()[0] == "newborn"
        assert 9 in stage.bench.node.programs
        while min(crowd.answered[operation] for operation in OPERATIONS) < 1:
            stage.turn()
            crowd.go_on()
        assert stage.agent.enforcement.changes_applied == before
        os.read(stage.bench.node.pipe[0], 16)
    finally:
        crowd.close()
        os.kill(child, signal.SIGCONT)
    while stage.agent.enforcement.changes_applied == before:
        stage.turn()
    assert "late" in {one.key.name for one in stage.agent.objects.local.values()}
    assert not {one.slug for one in stage.agent.problems} & {"unreadable", "reading"}


def test_interface_that_is_born_during_a_look_is_closed_before_it_ends(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of many files is interrupted for it. The step then continues and finds its endpoint."""
    monkeypatch.setattr(manifest_files, "PAUSE_ENTRIES", 1)
    closed: list[bool] = []
    real = manifest_files._Search._look_at

    def look_at(self: Any, name: str, entry: Any) -> None:
        closed.append(9 in stage.bench.node.programs)
        if len(closed) == 1:
            bear(stage.bench.node)
        real(self, name, entry)

    monkeypatch.setattr(manifest_files._Search, "_look_at", look_at)
    stage.agent.step()
    assert closed[0] is False
    assert closed[-1] is True
    assert 9 in stage.agent.interfaces.wiring.links
    assert stage.bench.node.row(9) is None


def test_one_step_reads_news_of_the_network_that_come_together(stage: Stage) -> None:
    """New interfaces are closed at once. The step waits SETTLE_S after the first notification, however many follow."""
    now_s = [1000.0]
    stage.loop.clock = lambda: now_s[0]
    assert "step" in stage.turn()
    now_s[0] += agent_loop.NEWS_GAP_S
    for _ in range(2):
        stage.bench.node.tell()
        events = stage.turn()
        assert ("newborn" in events, "step" in events) == (True, False)
        now_s[0] += 0.6 * agent_loop.SETTLE_S
    stage.bench.node.tell()
    assert "step" in stage.turn()


@pytest.mark.parametrize("took_s", [0.0, 0.005, 0.1])
def test_news_of_a_source_makes_a_step_due(stage: Stage, monkeypatch: pytest.MonkeyPatch, took_s: float) -> None:
    """A readable descriptor of the source wakes the loop.

    The step follows at once, or after a pause if the last one took long.
    """
    source, now_s = MemorySource("objects", has_descriptor=True), [1000.0]
    stage.agent.source, stage.loop.clock = source, lambda: now_s[0]
    step = stage.agent.step

    def slow() -> Any:
        now_s[0] += took_s
        return step()

    monkeypatch.setattr(stage.agent, "step", slow)
    source.fileno()
    assert "step" in stage.turn()
    source.wake()
    rest_s = min(agent_loop.NEWS_GAP_S, took_s * agent_loop.REST_FACTOR)
    assert ("step" in stage.turn()) == (rest_s == 0.0)
    if rest_s:
        now_s[0] += 0.9 * rest_s
        assert "step" not in stage.turn()
        now_s[0] += 0.2 * rest_s
        assert source.wait_s() == 0
        assert "step" in stage.turn()
    source.close()


def test_answers_are_those_of_the_agent(stage: Stage) -> None:
    """A child answers with the agent's state at that moment, and with the agent's own process id."""
    stage.bench.write("late.yaml", POD.format(name="late", node="here", last=9))
    before = stage.agent.enforcement.changes_applied
    while stage.agent.enforcement.changes_applied == before:
        stage.turn()
    channel = socket.socket(socket.AF_UNIX)
    with channel:
        channel.connect(str(stage.loop.control_socket.path))
        channel.sendall(b'{"op": "status"}\n')
        channel.settimeout(0)
        received = bytearray()
        while not received.endswith(b"\n"):
            stage.turn()
            with contextlib.suppress(BlockingIOError):
                received += channel.recv(1 << 20)
    state = json.loads(received)
    assert state["pid"] == os.getpid()
    assert "Pod/shop/late" in {one["endpoint"] for one in state["endpoints"]}


def test_no_room_for_the_socket_ends_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a full state directory nobody can connect until there is room. The agent continues."""
    service = stage.loop.control_socket
    service.close()
    full = [True]

    class Bound(socket.socket):
        def bind(self, address: Any) -> None:
            if full[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().bind(address)

    monkeypatch.setattr(control_socket_module.socket, "socket", Bound)
    stage.loop.open()
    assert not service.is_open
    assert "No space left on device" in caplog.text
    steps = stage.steps
    while stage.steps == steps:
        stage.turn()
    full[0] = False
    now_s = stage.loop.clock() + agent_loop.RETRY_S
    stage.loop.clock = lambda: now_s
    stage.turn()
    assert service.is_open


def test_source_that_is_due_gets_its_step_at_once(stage: Stage) -> None:
    """Time passes between two reads of the clock.

    Without this, the loop would turn without a step until its longest wait.
    """
    source, now_s, ticks = MemorySource("objects", has_descriptor=True), [1000.0], itertools.count()
    stage.agent.source, stage.loop.clock = source, lambda: now_s[0] + 1e-6 * next(ticks)
    source.fileno()
    assert "step" in stage.turn()
    source.wake()
    source.note_news()
    now_s[0] += 2 * agent_loop.NEWS_GAP_S
    assert source.wait_s() == 0
    assert "step" in stage.turn()
    source.close()
