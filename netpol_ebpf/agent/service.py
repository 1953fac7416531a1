# SPDX-License-Identifier: Apache-2.0
"""The agent's socket: questions about its state, and the flows it saw, for the command line on the same machine.

One JSON object a line both ways.  A request is ``{"op": NAME, ...}``; ``status`` and the like get one line back, ``flows`` gets
the recent ones and then each new one until the reader goes.

Every operation only reads.  Invariants: only root, the agent's own user and members of one group, if the agent has one, are
answered (SO_PEERCRED, SO_PEERGROUPS: the kernel says who connected); a reader that does not read is dropped and never
delays the agent; whatever is sent, it is answered and harms nobody; one user's connections leave room for everybody
else's.  Runs no loop: `Service.poll` is one look.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import NetpolError, PlatformError, UnreachableError, UsageError

SOCKET_NAME = "agent.sock"
REQUEST_BYTES = 4096
"""Longest request; arbitrary."""
BACKLOG_BYTES = 1 << 20
"""What a reader may lag behind before it is dropped; arbitrary."""
READERS_OF_USER = 16
"""Connections that one user may have at a time; arbitrary. So nobody takes what others, or the agent, need."""
READERS = 256
"""Connections of all users but root; arbitrary, and far below 1024, where select(2) and the usual limit end."""
RECENT_FLOWS = 1000
"""Flows remembered for readers that come later; arbitrary."""
CLIENT_TIMEOUT_S = 5.0
_SO_PEERGROUPS = 59
"""asm-generic/socket.h; Linux 4.13."""
_GROUPS_BYTES = 1024
"""As much as Python's getsockopt takes: 256 groups."""

Answer = Callable[[Mapping[str, Any]], Any]
"""From a request to a value that JSON can hold. May raise NetpolError."""


@dataclass(slots=True)
class _Client:
    channel: socket.socket
    user: int
    received: bytes = b""
    unsent: bytes = b""
    follows: bool = False
    is_answered: bool = False

    def send(self, value: Any) -> None:
        self.unsent += json.dumps(value, separators=(",", ":")).encode() + b"\n"


@dataclass(slots=True)
class Service:
    """The listening side. ``answers``: what each operation is answered with; "flows" is the service's own.

    ``group``: number of a group whose members are answered as well.
    """

    path: Path
    answers: Mapping[str, Answer]
    group: int | None = None
    _listener: socket.socket | None = None
    _clients: list[_Client] = field(default_factory=list)
    _recent: deque[Any] = field(default_factory=lambda: deque(maxlen=RECENT_FLOWS))

    def open(self) -> None:
        """Listen. Raises PlatformError when another process does, or the socket cannot be given to the group."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(UnreachableError), connect(self.path):
            raise PlatformError(
                f"another agent answers at {self.path}", hint="Stop it, or give a --state-dir of its own."
            )
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self.path.lstat().st_mode):  # left by an agent that was killed
                self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            listener.bind(str(self.path))
            if self.group is not None:
                os.chown(self.path, -1, self.group)
                self.path.chmod(0o660)
        except OSError as error:
            listener.close()
            raise PlatformError(f"cannot listen at {self.path}: {error.strerror}") from error
        finally:
            os.umask(before)
        listener.listen()
        self._listener = listener

    def close(self) -> None:
        """Stop listening, drop all readers, remove the socket."""
        for client in self._clients:
            client.channel.close()
        self._clients.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def descriptors(self) -> tuple[list[int], list[int]]:
        """What to wait for: descriptors to read, descriptors to write."""
        readable = [client.channel.fileno() for client in self._clients]
        if self._listener is not None:
            readable.append(self._listener.fileno())
        return readable, [client.channel.fileno() for client in self._clients if client.unsent]

    def poll(self) -> None:
        """Accept, read, answer and send whatever is possible now. Never blocks."""
        while self._listener is not None:
            try:
                channel, _ = self._listener.accept()
            except (
                OSError
            ):  # nobody is there, who was has gone, or there is no descriptor left: the next look tries again
                break
            self._welcome(channel)
        for client in list(self._clients):
            if not self._serve(client):
                self._drop(client)

    def publish(self, flows: Iterable[Any]) -> None:
        """Flows for those who follow, and for those who come later."""
        for flow in flows:
            self._recent.append(flow)
            for client in self._clients:
                if client.follows:
                    client.send(flow)

    def _welcome(self, channel: socket.socket) -> None:
        channel.settimeout(0)
        client = _Client(channel, peer_user(channel))
        if client.user not in (0, os.geteuid()) and self.group not in peer_groups(channel):
            self._turn_away(
                client,
                "only root and members of the agent's group (netpol-agent --group) may ask the agent",
                "Ask as one of them." if self.group is not None else "The agent was started without a group.",
                "privilege",
            )
        elif self._is_crowded(client.user):
            message = f"there are too many connections to the agent, {READERS_OF_USER} of one user at most"
            self._turn_away(client, message, "Close some, and ask again.", "busy")
        else:
            self._clients.append(client)

    @staticmethod
    def _turn_away(client: _Client, message: str, hint: str, slug: str) -> None:
        """Hang up, with a word why; there is room for it, since nothing was sent before."""
        client.send({"error": message, "hint": hint, "slug": slug})
        with contextlib.suppress(OSError):  # the other side is gone: nobody to tell
            client.channel.send(client.unsent)
        client.channel.close()

    def _is_crowded(self, user: int) -> bool:
        """Whether there is no room for one more connection of a user."""
        own = sum(one.user == user for one in self._clients)
        return own >= READERS_OF_USER or (user != 0 and len(self._clients) >= READERS)

    def _serve(self, client: _Client) -> bool:
        """Do what can be done for one reader; False when it is to be dropped."""
        try:
            if not client.is_answered:
                self._receive(client)
            if client.unsent:
                with contextlib.suppress(BlockingIOError):
                    client.unsent = client.unsent[client.channel.send(client.unsent) :]
        except OSError:  # the other side is gone: nobody to tell
            return False
        if client.follows:
            return len(client.unsent) <= BACKLOG_BYTES and not self._is_gone(client)
        return bool(client.unsent) or not client.is_answered

    @staticmethod
    def _is_gone(client: _Client) -> bool:
        try:
            return client.channel.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _receive(self, client: _Client) -> None:
        try:
            data = client.channel.recv(REQUEST_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError
        client.received += data
        if b"\n" not in client.received and len(client.received) <= REQUEST_BYTES:
            return
        client.is_answered = True
        try:
            self._answer(client, client.received.split(b"\n", 1)[0])
        except NetpolError as error:
            client.send({"error": error.message, "hint": error.hint, "slug": error.slug})

    def _answer(self, client: _Client, line: bytes) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not a request: {line[:80]!r}") from error
        operation = request.get("op") if isinstance(request, dict) else None
        if not isinstance(operation, str):
            raise UsageError(f"not a request: {line[:80]!r}")
        if operation == "flows":
            for flow in self._recent:
                client.send(flow)
            client.follows = bool(request.get("follow"))
        elif operation in self.answers:
            client.send(self.answers[operation](request))
        else:
            raise UsageError(f"unknown operation {operation!r}; known are flows, {', '.join(sorted(self.answers))}")

    def _drop(self, client: _Client) -> None:
        client.channel.close()
        self._clients.remove(client)


def peer_user(channel: socket.socket) -> int:
    """The user id of the process at the other end."""
    _, user, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def peer_groups(channel: socket.socket) -> frozenset[int]:
    """The ids of the groups of the process at the other end, when it connected. Of a process in very many: its first alone."""
    _, _, first = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        others = channel.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        others = b""
    return frozenset({int(first), *(number for (number,) in struct.iter_unpack("=I", others))})


@contextlib.contextmanager
def connect(path: Path, timeout_s: float | None = CLIENT_TIMEOUT_S) -> Iterator[socket.socket]:
    """A connection to the agent's socket. Raises UnreachableError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(timeout_s)
        try:
            channel.connect(str(path))
        except OSError as error:
            raise UnreachableError(f"no agent answers at {path}: {error.strerror or error}") from error
        yield channel


def ask(path: Path, request: Mapping[str, Any], *, timeout_s: float | None = CLIENT_TIMEOUT_S) -> Iterator[Any]:
    """The agent's answer to a request, line by line as it comes. Raises UnreachableError, also for an error it answers with."""
    with connect(path, timeout_s) as channel:
        hung_up: BrokenPipeError | None = None
        try:
            try:
                channel.sendall(json.dumps(request).encode() + b"\n")
            except (
                BrokenPipeError
            ) as error:  # who is not answered is told so before he has asked: that can be read still
                hung_up = error
            with channel.makefile("rb") as lines:
                for line in lines:
                    value = json.loads(line)
                    if isinstance(value, dict) and "error" in value:
                        raise UnreachableError(f"the agent refused: {value['error']}", hint=value.get("hint"))
                    yield value
            if hung_up is not None:
                raise hung_up
        except OSError as error:
            raise UnreachableError(f"the agent at {path} stopped answering: {error.strerror or error}") from error
