# SPDX-License-Identifier: Apache-2.0
"""The agent's socket with both sides in one process: the agent's side is polled between the client's steps."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.agent import answering
from netpol_ebpf.agent import control_socket as module
from netpol_ebpf.agent.control_socket import ControlSocket, ask, connect
from netpol_ebpf.errors import InvalidInputError, NetpolError, PlatformError, UnreachableError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""The threads belong to the test runner; the agent has only one."""

DEADLINE_S = 30.0
"""Time limit of any answer in seconds. Arbitrary, and far longer than an answer takes."""


def refuse(_request: Any) -> Any:
    raise InvalidInputError("no such pod", hint="Look again.")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[ControlSocket]:
    service = ControlSocket(
        tmp_path / "agent.sock", {"echo": lambda request: {"you": request["word"]}, "refuse": refuse}
    )
    service.open()
    yield service
    service.close()


def answers(agent: ControlSocket, request: dict[str, Any]) -> list[Any]:
    """All lines of an answer to another process. This process polls the agent meanwhile, as its loop does."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        found: dict[str, Any]
        try:
            found = {"lines": list(ask(agent.path, request))}
        except NetpolError as error:
            found = {"error": error.message, "hint": error.hint, "slug": error.slug}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        while not select.select([said], [], [], 0)[0]:
            readable, writable = agent.descriptors()
            select.select([said, *readable], writable, [], 1)
            agent.poll()
        text = said.read()
    os.waitpid(process, 0)
    found = json.loads(text)
    if "error" in found:
        kind = {one.slug: one for one in (UnreachableError, InvalidInputError)}[found["slug"]]
        raise kind(found["error"], hint=found["hint"])
    return list(found["lines"])


def finish(agent: ControlSocket) -> None:
    """Poll until no child works. A child has copies of this process's descriptors, the clients' ends included."""
    deadline = time.monotonic() + DEADLINE_S
    while agent._answering.count() or any(client.request is not None for client in agent._clients):
        assert time.monotonic() < deadline
        select.select(agent.descriptors()[0], [], [], 1)
        agent.poll()


def told(agent: ControlSocket, channel: socket.socket) -> Any:
    """The one line that arrives at a channel. The agent is polled meanwhile."""
    channel.settimeout(0)
    data, deadline = b"", time.monotonic() + DEADLINE_S
    while not data.endswith(b"\n"):
        assert time.monotonic() < deadline
        readable, writable = agent.descriptors()
        select.select([channel, *readable], writable, [], 1)
        agent.poll()
        with contextlib.suppress(BlockingIOError):
            data += channel.recv(1 << 16)
    return json.loads(data)


def test_question_is_answered(agent: ControlSocket) -> None:
    """A request gets its answer, as one value."""
    assert answers(agent, {"op": "echo", "word": "hello"}) == [{"you": "hello"}]


def test_error_is_told_with_its_hint(agent: ControlSocket) -> None:
    """An error of an operation arrives with its message and hint."""
    with pytest.raises(InvalidInputError, match="the agent refused: no such pod") as caught:
        answers(agent, {"op": "refuse"})
    assert caught.value.hint == "Look again."


def test_unknown_operation_names_the_known_ones(agent: ControlSocket) -> None:
    """The error of an unknown request names the known ones."""
    with pytest.raises(UnreachableError, match="known are flows, echo, refuse"):
        answers(agent, {"op": "nonsense"})


GARBAGE = [
    b"{\n",
    b"[]\n",
    b"\xff\n",
    b"x" * 5000,
    b'{"op": []}\n',
    b'{"op": {}}\n',
    b'{"op": null}\n',
    b"[" * 4000 + b"\n",
]


@pytest.mark.parametrize("line", GARBAGE)
def test_garbage_is_an_error_and_harms_nobody(agent: ControlSocket, line: bytes) -> None:
    """A line that is no request gets an error, and the next client is served."""
    with connect(agent.path) as channel:
        channel.sendall(line)
        agent.poll()
        agent.poll()
        assert b"not a request" in channel.recv(4096)
    assert answers(agent, {"op": "echo", "word": "still here"}) == [{"you": "still here"}]


def test_flows_are_those_before_and_those_that_follow(agent: ControlSocket) -> None:
    """A client that follows gets recent flows and each new one. Others get only the recent ones."""
    agent.publish([{"n": 1}, {"n": 2}])
    assert answers(agent, {"op": "flows"}) == [{"n": 1}, {"n": 2}]
    with connect(agent.path) as channel, channel.makefile("rb") as lines:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        agent.publish([{"n": 3}])
        agent.poll()
        assert [json.loads(lines.readline()) for _ in range(3)] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_follower_that_went_is_forgotten(agent: ControlSocket) -> None:
    """A client that has closed its connection is dropped at the next poll."""
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        assert len(agent.descriptors()[0]) == 2
    agent.poll()
    assert len(agent.descriptors()[0]) == 1


def test_reader_that_does_not_read_is_dropped(agent: ControlSocket) -> None:
    """A following client that is too far behind is disconnected, and the agent does not wait for it."""
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        agent.publish({"n": "x" * 1000} for _ in range(module.BACKLOG_BYTES // 500))
        assert agent.descriptors()[1] != []
        agent.poll()
        assert len(agent.descriptors()[0]) == 1


def test_user_with_too_many_connections_leaves_room_for_others(
    agent: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user with many connections gets no more and a message. Other users, and especially root, are still served."""
    agent.group = 4321
    monkeypatch.setattr(module, "peer_groups", lambda _channel: frozenset({4321}))
    with contextlib.ExitStack() as stack:
        for user in range(12345, 12345 + module.READERS // module.READERS_OF_USER + 1):
            monkeypatch.setattr(module, "peer_user", lambda _channel, user=user: user)
            for _ in range(module.READERS_OF_USER + 1):
                stack.enter_context(connect(agent.path))
                agent.poll()
        assert len(agent.descriptors()[0]) == module.READERS + 1
        with pytest.raises(UnreachableError, match="too many connections"):
            answers(agent, {"op": "echo", "word": "hello"})
        monkeypatch.setattr(module, "peer_user", lambda _channel: 0)
        assert answers(agent, {"op": "echo", "word": "hello"}) == [{"you": "hello"}]
        finish(agent)
    agent.poll()
    assert len(agent.descriptors()[0]) == 1


def test_lack_of_descriptors_is_waited_out(agent: ControlSocket) -> None:
    """If there is no descriptor for a new client, the agent continues, and answers when there is one again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "echo", "word": "hello"}\n')
        resource.setrlimit(resource.RLIMIT_NOFILE, (channel.fileno(), before[1]))
        try:
            agent.poll()
            assert len(agent.descriptors()[0]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert told(agent, channel) == {"you": "hello"}


def test_stranger_is_refused(agent: ControlSocket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is neither root nor the agent's own gets this message, whatever the request is."""
    monkeypatch.setattr(module, "peer_user", lambda _channel: 12345)
    with pytest.raises(UnreachableError, match="only root and members"):
        answers(agent, {"op": "echo", "word": "hello"})


@pytest.mark.parametrize(
    ("line", "words"),
    [(b'{"error": "not you"}\n', "the agent refused: not you"), (b"", "stopped answering: Broken pipe")],
)
def test_refusal_before_the_question_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, words: str
) -> None:
    """If the agent closes the connection before the request, the client still gets the agent's reason."""
    path, real = tmp_path / "curt.sock", module.connect

    @contextlib.contextmanager
    def connect_and_be_refused(path: Path, timeout_s: float | None) -> Iterator[socket.socket]:
        with real(path, timeout_s) as channel:
            other, _ = listener.accept()
            other.sendall(line)
            other.close()
            yield channel

    monkeypatch.setattr(module, "connect", connect_and_be_refused)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(UnreachableError, match=words):
            list(ask(path, {"op": "echo"}))


@pytest.mark.parametrize(("groups", "is_answered"), [({7, 4321}, True), ({7}, False), (set(), False)])
def test_member_of_the_group_is_answered(
    agent: ControlSocket, monkeypatch: pytest.MonkeyPatch, *, groups: set[int], is_answered: bool
) -> None:
    """Another user is answered exactly if one of the user's groups is the agent's."""
    agent.group = 4321
    monkeypatch.setattr(module, "peer_user", lambda _channel: 12345)
    monkeypatch.setattr(module, "peer_groups", lambda _channel: frozenset(groups))
    if is_answered:
        assert answers(agent, {"op": "echo", "word": "hello"}) == [{"you": "hello"}]
    else:
        with pytest.raises(UnreachableError, match="only root and members"):
            answers(agent, {"op": "echo", "word": "hello"})


def test_kernel_tells_all_groups_of_who_connects(agent: ControlSocket) -> None:
    """The groups of a peer are those of its process, which is this one."""
    with connect(agent.path) as channel:
        assert module.peer_groups(channel) == {os.getegid(), *os.getgroups()}


def test_socket_is_private_and_goes_with_the_agent(agent: ControlSocket) -> None:
    """No other user may connect, and a closed agent leaves no socket."""
    assert agent.path.stat().st_mode & 0o077 == 0
    agent.close()
    assert not agent.path.exists()
    with pytest.raises(UnreachableError, match="no agent answers"):
        list(ask(agent.path, {"op": "echo"}))


def test_second_agent_is_refused_and_a_dead_one_s_socket_is_replaced(agent: ControlSocket) -> None:
    """A socket at which an agent answers is not taken over, and a socket of a dead agent is."""
    with pytest.raises(PlatformError, match="another agent answers"):
        ControlSocket(agent.path, {}).open()
    dead = agent.path.with_name("dead.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    heir = ControlSocket(dead, {})
    heir.open()
    heir.close()


# --- who works out the answers, and what they may cost ---------------------------------------------------------------


@pytest.fixture
def stops(tmp_path: Path) -> Iterator[tuple[ControlSocket, int]]:
    """An agent with an answer that waits for a byte in a pipe, and the end of this pipe."""
    reading, writing = os.pipe()

    def wait(_request: Any) -> Any:
        os.read(reading, 1)
        return {"by": os.getpid()}

    service = ControlSocket(
        tmp_path / "agent.sock", {"wait": wait, "bug": lambda request: request["missing"], "die": die}
    )
    service.open()
    yield service, writing
    service.close()
    os.close(reading)
    os.close(writing)


def die(_request: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def asking(agent: ControlSocket, operation: str) -> Iterator[socket.socket]:
    """A connection whose request the agent has read."""
    with connect(agent.path) as channel:
        channel.sendall(json.dumps({"op": operation}).encode() + b"\n")
        agent.poll()
        yield channel


def test_answer_is_worked_out_by_another_process(stops: tuple[ControlSocket, int]) -> None:
    """However long an answer takes, the agent meanwhile accepts clients, reports flows and starts other answers."""
    agent, pipe = stops
    agent.publish([{"n": 1}])
    with asking(agent, "wait") as slow:
        for _ in range(50):
            agent.poll()
        assert answers(agent, {"op": "flows"}) == [{"n": 1}]
        os.write(pipe, b"x")
        assert told(agent, slow)["by"] != os.getpid()


def test_one_answer_at_a_time_for_a_user(stops: tuple[ControlSocket, int]) -> None:
    """A second request of a user waits for the first answer.

    One poll starts at most one answer. A closed client costs nothing more.
    """
    agent, pipe = stops
    with asking(agent, "wait") as first, asking(agent, "wait") as second, asking(agent, "wait"):
        for _ in range(20):
            agent.poll()
        assert agent._answering.count() == 1
        os.write(pipe, b"x")
        by_first = told(agent, first)["by"]
        os.write(pipe, b"x")
        assert told(agent, second)["by"] != by_first
    os.write(pipe, b"x")
    finish(agent)
    assert agent._clients == []


def test_members_leave_room_for_each_other_and_for_root(
    stops: tuple[ControlSocket, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of children is limited, root has a child of its own, and the next client gets the free place."""
    agent, pipe = stops
    agent.group = 4321
    monkeypatch.setattr(module, "peer_groups", lambda _channel: frozenset({4321}))
    with contextlib.ExitStack() as stack:
        for user in range(12345, 12345 + answering.MOST + 2):
            monkeypatch.setattr(module, "peer_user", lambda _channel, user=user: user)
            stack.enter_context(asking(agent, "wait"))
            agent.poll()
        assert agent._answering.count() == answering.MOST
        monkeypatch.setattr(module, "peer_user", lambda _channel: 0)
        root = stack.enter_context(asking(agent, "wait"))
        agent.poll()
        assert agent._answering.count(0) == 1
        os.write(pipe, b"x" * (answering.MOST + 3))  # one for each child, in any order
        assert "by" in told(agent, root)
        finish(agent)


def test_bug_in_an_answer_ends_nothing(stops: tuple[ControlSocket, int]) -> None:
    """It is reported as a bug, and the agent continues."""
    agent, _ = stops
    with pytest.raises(UnreachableError, match="bug: KeyError"):
        answers(agent, {"op": "bug"})
    assert answers(agent, {"op": "flows"}) == []


def test_answer_that_is_given_up_is_no_answer(
    stops: tuple[ControlSocket, int], caplog: pytest.LogCaptureFixture
) -> None:
    """If a child ends without output, its client gets an error, and the log a line."""
    agent, _ = stops
    with pytest.raises(UnreachableError, match="ended the connection without an answer"):
        answers(agent, {"op": "die"})
    finish(agent)
    assert "was ended by SIGKILL" in caplog.text
    assert agent._answering.count() == 0


def test_children_end_with_the_agent(stops: tuple[ControlSocket, int]) -> None:
    """When the agent ends, no child remains, even if clients still wait."""
    agent, _ = stops
    with asking(agent, "wait") as channel:
        assert agent._answering.count() == 1
        agent.close()
        channel.settimeout(60)
        assert channel.recv(10) == b""


def test_children_hold_no_socket_of_others(stops: tuple[ControlSocket, int]) -> None:
    """A client whose answer is complete sees the end of the connection while a child works for another one."""
    agent, _ = stops
    agent.publish([{"n": 1}])
    with connect(agent.path) as reader:
        agent.poll()
        with asking(agent, "wait"):
            assert agent._answering.count() == 1
            reader.sendall(b'{"op": "flows"}\n')
            agent.poll()
            agent.poll()
            reader.settimeout(60)
            with reader.makefile("rb") as lines:
                assert lines.read() == b'{"n":1}\n'


def test_silence_and_slowness_are_bounded(tmp_path: Path) -> None:
    """A client that sends nothing, or does not read, is dropped. A client that follows flows may be silent."""
    now_s = 0.0
    agent = ControlSocket(tmp_path / "agent.sock", {}, clock=lambda: now_s)
    agent.open()
    agent.publish({"n": "x" * 1000} for _ in range(900))
    with connect(agent.path), connect(agent.path) as slow, connect(agent.path) as follower:
        slow.sendall(b'{"op": "flows"}\n')
        follower.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        assert len(agent._clients) == 3
        now_s += module.REQUEST_S
        agent.poll()
        assert [client.follows for client in agent._clients] == [True]
    agent.close()


def test_connecting_again_and_again_is_bounded(agent: ControlSocket) -> None:
    """One poll accepts a few connections, however many there are."""
    with contextlib.ExitStack() as stack:
        for _ in range(module.WELCOMES + 5):
            stack.enter_context(connect(agent.path))
        asked: list[int] = []
        real = module.peer_user
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "peer_user", lambda channel: asked.append(1) or real(channel))
            agent.poll()
        assert len(asked) == module.WELCOMES


def test_talk_after_the_request_does_not_wake_the_agent(agent: ControlSocket) -> None:
    """Bytes of a following client are read and dropped. Bytes of other clients after their request are not read."""
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        channel.sendall(b"blah blah\n")
        agent.poll()
        assert select.select(agent.descriptors()[0], [], [], 0)[0] == []


def test_line_that_was_cut_short_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete answer is an error with this reason, and not a bug."""
    path, real = tmp_path / "curt.sock", module.connect

    @contextlib.contextmanager
    def connect_and_be_left(path: Path, timeout_s: float | None) -> Iterator[socket.socket]:
        with real(path, timeout_s) as channel:
            other, _ = listener.accept()
            other.sendall(b'{"half": ')
            other.close()
            yield channel

    monkeypatch.setattr(module, "connect", connect_and_be_left)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(UnreachableError, match="ended early"):
            list(ask(path, {"op": "echo"}))


# --- operations of root that wait ----------------------------------------------------------------------------------------


@pytest.fixture
def waiting(agent: ControlSocket, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Root's requests. The agent's operation "until" waits until this list has an item: its answer, or an error."""
    come: list[Any] = []

    def look() -> Any:
        if come and isinstance(come[0], NetpolError):
            raise come[0]
        return come[0] if come else None

    agent.waits = {"until": lambda _request: look}
    monkeypatch.setattr(module, "peer_user", lambda _channel: 0)
    return come


@contextlib.contextmanager
def asked(agent: ControlSocket, request: bytes) -> Iterator[socket.socket]:
    with connect(agent.path) as channel:
        channel.sendall(request)
        agent.poll()
        agent.poll()
        yield channel


def test_an_operation_that_waits(agent: ControlSocket, waiting: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered when there is an answer, after any time.

    It does not count as one of the user's few connections.
    """
    now_s = [0.0]
    agent.clock = lambda: now_s[0]
    monkeypatch.setattr(module, "READERS_OF_USER", 1)
    with asked(agent, b'{"op":"until"}\n') as first, asked(agent, b'{"op":"until"}\n') as second:
        now_s[0] = 1000.0
        agent.poll()
        assert select.select([first], [], [], 0)[0] == []
        assert list(answers(agent, {"op": "echo", "word": "me"})) == [{"you": "me"}]
        waiting.append({"in_force": True})
        agent.poll()
        assert [one.recv(100) for one in (first, second)] == [b'{"in_force":true}\n'] * 2
        assert [one.recv(100) for one in (first, second)] == [b""] * 2


def test_an_operation_that_waits_in_vain(agent: ControlSocket, waiting: list[Any]) -> None:
    """An error that it raises is the answer. A client that disconnects is forgotten."""
    with asked(agent, b'{"op":"until"}\n') as first:
        with asked(agent, b'{"op":"until"}\n'):
            assert len(agent._clients) == 2
        agent.poll()
        assert len(agent._clients) == 1
        waiting.append(UnreachableError("not in time", hint=""))
        agent.poll()
        assert json.loads(first.recv(1000)) == {"error": "not in time", "hint": "", "slug": "unreachable"}


def test_an_operation_of_root_alone(agent: ControlSocket, waiting: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the agent's own user nor its group may use an operation that changes something."""
    waiting.append({})
    monkeypatch.setattr(module, "peer_user", lambda _channel: os.geteuid() or 12345)
    monkeypatch.setattr(module, "peer_groups", lambda _channel: {7})
    agent.group = 7
    with asked(agent, b'{"op":"until"}\n') as channel:
        said = json.loads(channel.recv(1000))
    assert said["slug"] == "privilege"
    assert "only root" in said["error"]


def test_room_for_those_who_wait(agent: ControlSocket, waiting: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, further clients are rejected with a message."""
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    with asked(agent, b'{"op":"until"}\n'), connect(agent.path) as channel:
        agent.poll()
        assert json.loads(channel.recv(1000))["slug"] == "unreachable"
    assert not waiting
