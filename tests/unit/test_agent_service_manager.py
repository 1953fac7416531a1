# SPDX-License-Identifier: Apache-2.0
"""The agent's messages to the service manager: readiness once, a sign of life with each due pass, the end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netpol_ebpf.agent.control_socket import ControlSocket
from netpol_ebpf.agent.loop import AgentLoop, serve
from netpol_ebpf.agent.service_manager import PARTS, ServiceManager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as found:
        found.bind(str(tmp_path / "notify"))
        yield found


def said(manager: socket.socket) -> list[bytes]:
    """The messages since the last call."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(manager.recv(64))
    return found


def of(environment: dict[str, str], **fields: Any) -> ServiceManager:
    made = ServiceManager.of_environment(environment)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_readiness_goes_to_the_socket_that_is_named(tmp_path: Path, manager: socket.socket) -> None:
    """Without a socket's name nothing is sent. An abstract name begins with @."""
    of({"NOTIFY_SOCKET": str(tmp_path / "notify")}).ready()
    assert said(manager) == [b"READY=1"]
    of({}).ready()
    assert said(manager) == []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as abstract:
        abstract.bind(f"\0netpol-{os.getpid()}")
        of({"NOTIFY_SOCKET": f"@netpol-{os.getpid()}"}).ready()
        assert said(abstract) == [b"READY=1"]


def test_signs_of_life_come_often_enough_and_no_oftener(tmp_path: Path, manager: socket.socket) -> None:
    """The first pass sends one, and then each part of the watchdog's period, however many passes there are."""
    now = 100.0
    watched = of(
        {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())},
        clock=lambda: now,
    )
    assert watched.watchdog_s == 8.0
    for _ in range(3):
        watched.tick()
    assert said(manager) == [b"WATCHDOG=1"]
    now += 8.0 / PARTS
    watched.tick()
    assert said(manager) == [b"WATCHDOG=1"]


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "-1"}],
)
def test_without_a_watchdog_of_this_process_there_is_no_sign(
    tmp_path: Path, manager: socket.socket, variables: dict[str, str]
) -> None:
    """There is no watchdog, or one of another process, or the value is no number."""
    of({"NOTIFY_SOCKET": str(tmp_path / "notify"), **variables}).tick()
    assert said(manager) == []


def test_a_service_manager_that_takes_nothing_ends_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, manager: socket.socket
) -> None:
    """A full queue does not block. One line reports it. Readiness is sent again until it is accepted."""
    told = of({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        other.connect(str(tmp_path / "notify"))
        with contextlib.suppress(BlockingIOError):
            while True:
                other.send(b"x")
        told.ready()
        told.tick()
    said(manager)
    told.tick()
    told.tick()
    assert said(manager) == [b"READY=1"]
    assert [one.levelno for one in caplog.records] == [logging.WARNING]


@dataclass
class Passes:
    """A ready agent that ends the process's loop after some passes."""

    left: int = 3
    is_started: bool = False
    keeps_enforcement: bool = True
    is_in_force: bool = True
    has_handovers: bool = False
    source: Any = field(default_factory=lambda: SimpleNamespace(fileno=lambda: None, wait_s=lambda: 0.0))

    def step(self) -> list[Any]:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGTERM)
        return []


def test_the_loop_tells_of_its_beginning_its_passes_and_its_end(tmp_path: Path, manager: socket.socket) -> None:
    """The messages are in this order. A loop that hangs sends none."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    watched = of({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "4000000"}, clock=clock)
    node = SimpleNamespace(network=SimpleNamespace(fileno=lambda: None))
    ledger = SimpleNamespace(try_again=lambda: None)
    control_socket = ControlSocket(tmp_path / "socket", {})
    serve(AgentLoop(Passes(), node, ledger, control_socket, service_manager=watched))  # type: ignore[arg-type]
    found = said(manager)
    assert found[0] == b"READY=1"
    assert found[-1] == b"STOPPING=1"
    assert found.count(b"READY=1") == 1
    assert found.count(b"WATCHDOG=1") >= 2
