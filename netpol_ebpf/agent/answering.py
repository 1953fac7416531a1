# SPDX-License-Identifier: Apache-2.0
"""Answers that need a pass over whole tables. A fork of the agent computes each answer and sends it to the client.

The child has the agent's state and the open maps as they were at the fork, and may take long. The agent only starts the
child and notices its end. Rejected alternatives: passes in the agent's loop, in portions (the tables would change
between portions), and cached answers (they would be outdated, and computing them would still block the loop).

Invariants: a child changes only its own memory, and writes only to the socket of the client that asked. It exits
without running further agent code when it has finished, when its time limit ends, or when the agent ends. Each user has
at most one child at a time; all users but root together have at most MOST.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from netpol_ebpf.child import part_from
from netpol_ebpf.errors import NetpolError, PlatformError

log = logging.getLogger(__name__)

MOST = 3
"""Most children at a time of all users but root. The number is arbitrary."""
WORK_S = 30
"""Seconds in which a child must compute its answer. The number is arbitrary: tables of a million rows take some
seconds."""
SEND_S = 5
"""Seconds in which the client must receive the answer. The number is arbitrary."""

NICE = 19
"""Niceness of the children, so that the agent and other processes have precedence."""

Answer = Callable[[Mapping[str, Any]], Any]
"""A function that computes the answer to a request, as a value that JSON can represent. It runs in the child, and may
raise NetpolError."""


@dataclass(slots=True)
class Answering:
    """The running children. The key of each is a file descriptor that becomes readable when the child ends (pidfd)."""

    _users: dict[int, int] = field(default_factory=dict)
    _processes: dict[int, int] = field(default_factory=dict)

    def descriptors(self) -> list[int]:
        """File descriptors that become readable when a child has ended. The caller must then call `reap`."""
        return list(self._users)

    def count(self, user: int | None = None) -> int:
        """The number of running children of ``user``; of all users if ``user`` is None."""
        return len(self._users) if user is None else sum(one == user for one in self._users.values())

    def has_room(self, user: int) -> bool:
        """Whether a child may be started now for ``user``."""
        others = sum(one != 0 for one in self._users.values())
        return not self.count(user) and (user == 0 or others < MOST)

    def begin(
        self,
        channel: socket.socket,
        user: int,
        answer: Answer,
        request: Mapping[str, Any],
        foreign: Iterable[socket.socket],
    ) -> None:
        """Start a child that answers a request on ``channel``. This process may then close its copy of the channel.

        ``foreign``: the sockets of other clients and the listening socket, which the child must close. Raises
        PlatformError if no child can be started now.
        """
        agent = os.getpid()
        try:
            process = os.fork()
        except OSError as error:
            raise PlatformError(
                f"the agent cannot begin a process to answer: {error.strerror}", hint="Ask again."
            ) from error
        if process == 0:
            _work(agent, channel, answer, request, foreign)
        descriptor = os.pidfd_open(process)
        self._users[descriptor], self._processes[descriptor] = user, process

    def reap(self) -> None:
        """Remove children that have ended. Never blocks."""
        for descriptor, process in list(self._processes.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                if os.WIFSIGNALED(status):
                    log.warning(
                        "the process that worked out an answer was ended by %s: its reader gets none",
                        signal.Signals(os.WTERMSIG(status)).name,
                    )
                self._forget(descriptor)

    def close(self) -> None:
        """End all children."""
        for descriptor, process in list(self._processes.items()):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            self._forget(descriptor)

    def _forget(self, descriptor: int) -> None:
        os.close(descriptor)
        del self._users[descriptor], self._processes[descriptor]


def encode_error(error: NetpolError) -> bytes:
    """Encode an error, with its message, hint and slug, as a line of the response."""
    return encode({"error": error.message, "hint": error.hint, "slug": error.slug})


def encode(value: Any) -> bytes:
    """Encode a value as one line of JSON."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _work(
    agent: int,
    channel: socket.socket,
    answer: Answer,
    request: Mapping[str, Any],
    foreign: Iterable[socket.socket],
) -> None:
    """Do the child's work, then exit the process. Never returns."""
    try:
        part_from(agent, WORK_S)
        os.nice(NICE)
        for one in foreign:
            one.close()
        line = _line(answer, request)
        signal.alarm(SEND_S)
        channel.setblocking(True)  # noqa: FBT003 - the library's
        with contextlib.suppress(OSError):  # the client has disconnected
            channel.sendall(line)
            channel.shutdown(socket.SHUT_WR)
    finally:
        os._exit(0)


def _line(answer: Answer, request: Mapping[str, Any]) -> bytes:
    """Compute the line of the response. A bug in the computation becomes an error response and has no other effect."""
    try:
        return encode(answer(request))
    except NetpolError as error:
        return encode_error(error)
    except Exception as error:  # noqa: BLE001 - the one place where a bug in an answer becomes a line
        message = f"bug: {type(error).__name__}: {error}"
        log.error("cannot answer %s: %s", request, message)  # noqa: TRY400 - one line
        return encode_error(NetpolError(message))
