# SPDX-License-Identifier: Apache-2.0
"""The agent's socket, both sides in one process: the agent's side is polled between the reader's steps."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.agent import service as module
from netpol_ebpf.agent.service import Service, ask, connect
from netpol_ebpf.errors import InvalidInputError, PlatformError, UnreachableError


def refuse(_request: Any) -> Any:
    raise InvalidInputError("no such pod", hint="Look again.")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "agent.sock", {"echo": lambda request: {"you": request["word"]}, "refuse": refuse})
    service.open()
    yield service
    service.close()


def answers(agent: Service, request: dict[str, Any]) -> list[Any]:
    """All lines of an answer; the agent is polled by another thread meanwhile."""
    done = threading.Event()

    def serve() -> None:
        while not done.wait(0.001):
            agent.poll()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return list(ask(agent.path, request))
    finally:
        done.set()
        thread.join()


def test_question_is_answered(agent: Service) -> None:
    """A request gets its answer, as one value."""
    assert answers(agent, {"op": "echo", "word": "hello"}) == [{"you": "hello"}]


def test_error_is_told_with_its_hint(agent: Service) -> None:
    """What an operation refuses arrives as an error with message and hint."""
    with pytest.raises(UnreachableError, match="the agent refused: no such pod") as caught:
        answers(agent, {"op": "refuse"})
    assert caught.value.hint == "Look again."


def test_unknown_operation_names_the_known_ones(agent: Service) -> None:
    """A request that is not understood is an error that says what would be."""
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
def test_garbage_is_an_error_and_harms_nobody(agent: Service, line: bytes) -> None:
    """A line that is no request is answered as such, and the next reader is served."""
    with connect(agent.path) as channel:
        channel.sendall(line)
        agent.poll()
        agent.poll()
        assert b"not a request" in channel.recv(4096)
    assert answers(agent, {"op": "echo", "word": "still here"}) == [{"you": "still here"}]


def test_flows_are_those_before_and_those_that_follow(agent: Service) -> None:
    """A follower gets recent flows and then each new one; others get only the recent ones."""
    agent.publish([{"n": 1}, {"n": 2}])
    assert answers(agent, {"op": "flows"}) == [{"n": 1}, {"n": 2}]
    with connect(agent.path) as channel, channel.makefile("rb") as lines:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        agent.publish([{"n": 3}])
        agent.poll()
        assert [json.loads(lines.readline()) for _ in range(3)] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_follower_that_went_is_forgotten(agent: Service) -> None:
    """A reader that closed is dropped at the next look."""
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        assert len(agent.descriptors()[0]) == 2
    agent.poll()
    assert len(agent.descriptors()[0]) == 1


def test_reader_that_does_not_read_is_dropped(agent: Service) -> None:
    """A follower that lags too far behind is cut off, and the agent does not wait for it."""
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "flows", "follow": true}\n')
        agent.poll()
        agent.publish({"n": "x" * 1000} for _ in range(module.BACKLOG_BYTES // 500))
        assert agent.descriptors()[1] != []
        agent.poll()
        assert len(agent.descriptors()[0]) == 1


def test_user_with_too_many_connections_leaves_room_for_others(agent: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds many connections gets no more, is told so, and keeps nobody else, root least of all, from asking."""
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
    agent.poll()
    assert len(agent.descriptors()[0]) == 1


def test_lack_of_descriptors_is_waited_out(agent: Service) -> None:
    """Without a descriptor for who connects the agent lives on, and answers when there is one again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(agent.path) as channel:
        channel.sendall(b'{"op": "echo", "word": "hello"}\n')
        resource.setrlimit(resource.RLIMIT_NOFILE, (channel.fileno(), before[1]))
        try:
            agent.poll()
            assert len(agent.descriptors()[0]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        agent.poll()
        agent.poll()
        assert json.loads(channel.recv(100)) == {"you": "hello"}


def test_stranger_is_refused(agent: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is neither root nor the agent's own is told so, whatever is asked."""
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
    """A reader whom the agent hangs up on before he has asked is told why, if the agent said so."""
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
    agent: Service, monkeypatch: pytest.MonkeyPatch, *, groups: set[int], is_answered: bool
) -> None:
    """Another user is answered exactly when one of his groups is the agent's."""
    agent.group = 4321
    monkeypatch.setattr(module, "peer_user", lambda _channel: 12345)
    monkeypatch.setattr(module, "peer_groups", lambda _channel: frozenset(groups))
    if is_answered:
        assert answers(agent, {"op": "echo", "word": "hello"}) == [{"you": "hello"}]
    else:
        with pytest.raises(UnreachableError, match="only root and members"):
            answers(agent, {"op": "echo", "word": "hello"})


def test_kernel_tells_all_groups_of_who_connects(agent: Service) -> None:
    """The peer's groups are those of the process at the other end: here this one."""
    with connect(agent.path) as channel:
        assert module.peer_groups(channel) == {os.getegid(), *os.getgroups()}


def test_socket_is_private_and_goes_with_the_agent(agent: Service) -> None:
    """Nobody else may connect, and a closed agent leaves no socket."""
    assert agent.path.stat().st_mode & 0o077 == 0
    agent.close()
    assert not agent.path.exists()
    with pytest.raises(UnreachableError, match="no agent answers"):
        list(ask(agent.path, {"op": "echo"}))


def test_second_agent_is_refused_and_a_dead_one_s_socket_is_replaced(agent: Service) -> None:
    """A socket somebody answers at is not taken over; one that was left behind is."""
    with pytest.raises(PlatformError, match="another agent answers"):
        Service(agent.path, {}).open()
    dead = agent.path.with_name("dead.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    heir = Service(dead, {})
    heir.open()
    heir.close()
