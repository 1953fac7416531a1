# SPDX-License-Identifier: Apache-2.0
"""The agent's control socket: answers requests of programs on the same machine, such as netpolctl.

Requests and answers are JSON, one object a line. A request is ``{"op": NAME, ...}``. ``status`` and similar operations
get one line back. ``flows`` gets the recent flows and, if the request has ``follow``, then each new flow until the
client disconnects.

Invariants: the agent answers only root, its own user and the members of one group, if a group is set; the kernel
identifies the client (SO_PEERCRED, SO_PEERGROUPS). A slow client is disconnected and never delays the agent. Every
request gets an answer, and no request affects other clients. The connections of one user leave room for those of
others. Operations only read, except ``release`` and those of the CNI plugin, which only root may use. The agent's own
process never iterates over a table for a client: a child process does (`netpol_ebpf.agent.answering`), and each pass
starts at most one child. This module runs no loop: `ControlSocket.poll` is one pass.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.answering import Answer, Answering, encode, encode_error
from netpol_ebpf.errors import (
    InvalidInputError,
    NetpolError,
    PlatformError,
    PrivilegeError,
    UnreachableError,
    UsageError,
)

SOCKET_NAME = "agent.sock"
REQUEST_BYTES = 4096
"""Longest request in bytes. The number is arbitrary."""
REQUEST_S = 5.0
"""Seconds after a client connects within which its request must arrive. A client that reads flows without ``follow``
must also have received them this many seconds after its request. The number is arbitrary."""
BACKLOG_BYTES = 1 << 20
"""Most unsent bytes for one client. A client with more is disconnected. The number is arbitrary."""
SEND_BYTES = 1 << 16
"""Most bytes that one pass sends to one client. The number is arbitrary."""
READERS_OF_USER = 8
"""Connections that one user may have at a time. The number is arbitrary.

The limit leaves file descriptors for other users and for the agent."""
READERS = 64
"""Connections that all users but root may have together. The number is arbitrary, but far below 1024, which is the
limit of select(2) and the usual limit of file descriptors."""
WELCOMES = 16
"""Connections that one pass accepts. The number is arbitrary.

The limit keeps a client that connects again and again from occupying the agent."""
RECENT_FLOWS = 1000
"""Number of flows that are kept for clients that connect later. The number is arbitrary."""
CLIENT_TIMEOUT_S = 5.0
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors by which a file system reports that it has no room."""
FLOWS = "flows"
"""The operation that `ControlSocket` answers itself, without a child process."""
MOST_WAITING = 256
"""Largest number of root's connections that wait for a state of the agent, such as a pod's policy in force. The number
is arbitrary, but larger than the number of pods on a node and far below 1024."""

Wait = Callable[[], Any]
"""A function that checks whether the awaited state is reached: returns the answer, or None if it is not reached yet. It
must not block, and may raise NetpolError."""
_SO_PEERGROUPS = 59
"""From the kernel's asm-generic/socket.h, since Linux 4.13."""
_GROUPS_BYTES = 1024
"""Size of the buffer for group ids, which is enough for 256 groups. Python's getsockopt takes no larger buffer."""


@dataclass(slots=True)
class _Client:
    """The connection of one client.

    ``user``: the client's user id. ``since_s``: until the request is complete, the time at which the client connected;
    afterwards, the time at which the request was complete. ``unsent``: queued lines; the line of a flow is one object,
    which is in the queues of all clients that follow flows. ``request``: a request for which no child could be started
    yet. ``wait``: a function that checks whether the state for which the client waits is reached.
    """

    channel: socket.socket
    user: int
    since_s: float
    received: bytes = b""
    unsent: deque[bytes] = field(default_factory=deque)
    unsent_bytes: int = 0
    follows: bool = False
    is_answered: bool = False
    request: Mapping[str, Any] | None = None
    wait: Wait | None = None

    def send(self, line: bytes) -> None:
        """Queue a line. `flush` sends it as soon as the client accepts it."""
        self.unsent.append(line)
        self.unsent_bytes += len(line)

    def flush(self) -> None:
        """Send what the client accepts now, up to SEND_BYTES. Raises OSError if the client has disconnected."""
        chunk = bytearray()
        while self.unsent and len(chunk) < SEND_BYTES:
            chunk += self.unsent.popleft()
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = self.channel.send(chunk)
        if sent < len(chunk):
            self.unsent.appendleft(bytes(chunk[sent:]))
        self.unsent_bytes -= sent


@dataclass(slots=True)
class ControlSocket:
    """The listening socket and its clients.

    ``answers``: a function for each operation that a child process answers. ``group``: the id of a group whose members
    may use the socket; None: no group. ``waits``: a function for each operation that waits for a state; it takes the
    request, may raise NetpolError, and only root may use it. ``clock``: returns the time in seconds.
    """

    path: Path
    answers: Mapping[str, Answer]
    group: int | None = None
    waits: Mapping[str, Callable[[Mapping[str, Any]], Wait]] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _listener: socket.socket | None = None
    _clients: list[_Client] = field(default_factory=list)
    _answering: Answering = field(default_factory=Answering)
    _recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=RECENT_FLOWS))

    @property
    def is_open(self) -> bool:
        """Whether the socket is open."""
        return self._listener is not None

    def open(self) -> None:
        """Create the socket and listen.

        Raises PlatformError if another process listens there, or if the socket cannot be given to the group. Raises
        OSError if the file system has no room.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(UnreachableError), connect(self.path):
            raise PlatformError(
                f"another agent answers at {self.path}", hint="Stop it, or give a --state-dir of its own."
            )
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self.path.lstat().st_mode):  # of an agent that was killed
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
            if error.errno in NO_ROOM:
                raise
            raise PlatformError(f"cannot listen at {self.path}: {error.strerror}") from error
        finally:
            os.umask(before)
        listener.listen()
        self._listener = listener

    def close(self) -> None:
        """Stop listening, disconnect all clients, end all children, and remove the socket."""
        self._answering.close()
        for client in self._clients:
            client.channel.close()
        self._clients.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def descriptors(self) -> tuple[list[int], list[int]]:
        """The file descriptors to poll for reading, and those to poll for writing."""
        heard = [
            client for client in self._clients if not client.is_answered or client.follows
        ]  # other clients are not read: their data stays in the kernel's buffers
        readable = [*(client.channel.fileno() for client in heard), *self._answering.descriptors()]
        if self._listener is not None:
            readable.append(self._listener.fileno())
        return readable, [client.channel.fileno() for client in self._clients if client.unsent]

    def poll(self) -> None:
        """Do what is possible without blocking: accept clients, read requests, start one child, send bytes.

        The agent's own process iterates over no table here; the child that computes an answer does.
        """
        self._answering.reap()
        for _ in range(WELCOMES if self._listener is not None else 0):
            try:
                channel, _address = self._listener.accept()  # type: ignore[union-attr]  # it is not None
            except OSError:  # no client waits, it disconnected, or no descriptor is free
                break
            self._welcome(channel)
        for client in list(self._clients):
            if not self._serve(client):
                self._drop(client)
        self._begin_answer()

    def publish(self, flows: Iterable[Any]) -> None:
        """Send flows to the clients that follow, and keep the last flows for later clients."""
        for flow in flows:
            line = encode(flow)
            self._recent.append(line)
            for client in self._clients:
                if client.follows:
                    client.send(line)

    def _welcome(self, channel: socket.socket) -> None:
        channel.settimeout(0)
        client = _Client(channel, peer_user(channel), self.clock())
        if client.user not in (0, os.geteuid()) and self.group not in peer_groups(channel):
            message = "only root and members of the agent's group (netpol-agent --group) may connect to the agent"
            hint = "Connect as one of them." if self.group is not None else "The agent was started without a group."
            self._turn_away(client, PrivilegeError(message, hint=hint))
        elif self._is_crowded(client.user):
            message = f"there are too many connections to the agent: a user may have {READERS_OF_USER}"
            self._turn_away(client, UnreachableError(message, hint="Close some, and try again."))
        else:
            self._clients.append(client)

    @staticmethod
    def _turn_away(client: _Client, error: NetpolError) -> None:
        """Send an error to a new client and disconnect it. The socket buffer is empty, so it has room for the error."""
        with contextlib.suppress(OSError):  # the other side is gone: nobody to tell
            client.channel.send(encode_error(error))
        client.channel.close()

    def _is_crowded(self, user: int) -> bool:
        """Whether a user may have no further connection now. Running answers count as connections."""
        if sum(one.wait is not None for one in self._clients) >= MOST_WAITING:
            return True
        own = sum(one.user == user and one.wait is None for one in self._clients) + self._answering.count(user)
        return own >= READERS_OF_USER or (user != 0 and len(self._clients) + self._answering.count() >= READERS)

    def _serve(self, client: _Client) -> bool:
        """Serve one client without blocking; returns False if the client must be disconnected."""
        try:
            if not client.is_answered:
                self._receive(client)
            if client.wait is not None:
                self._look(client, client.wait)
            if client.unsent:
                client.flush()
        except OSError:  # the other side is gone: nobody to tell
            return False
        if client.request is not None or client.wait is not None:
            return not self._is_gone(client)
        if client.follows:
            return client.unsent_bytes <= BACKLOG_BYTES and not self._is_gone(client)
        return (bool(client.unsent) or not client.is_answered) and self.clock() - client.since_s < REQUEST_S

    def _look(self, client: _Client, wait: Wait) -> None:
        """Answer a client that waits for a state, if the state is reached or can no longer be reached."""
        try:
            answer = wait()
        except NetpolError as error:
            line = encode_error(error)
        else:
            if answer is None:
                return
            line = encode(answer)
        client.wait, client.since_s = None, self.clock()
        client.send(line)

    @staticmethod
    def _is_gone(client: _Client) -> bool:
        """Whether the client has closed the connection.

        Bytes that arrive after the request are discarded, so that they do not wake the agent again and again.
        """
        try:
            return client.channel.recv(REQUEST_BYTES) == b""
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
        client.since_s = self.clock()
        try:
            self._hear(client, client.received.split(b"\n", 1)[0])
        except NetpolError as error:
            client.send(encode_error(error))

    def _hear(self, client: _Client, line: bytes) -> None:
        """Handle a request line: answer it, reject it, or queue it for a child process."""
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not a request: {line[:80]!r}") from error
        operation = request.get("op") if isinstance(request, dict) else None
        if not isinstance(operation, str):
            raise UsageError(f"not a request: {line[:80]!r}")
        if operation == FLOWS:
            for flow in self._recent:
                client.send(flow)
            client.follows = bool(request.get("follow"))
        elif operation in self.answers:
            client.request = request
        elif operation in self.waits and client.user != 0:
            raise PrivilegeError(f"only root may ask for {operation!r}", hint="")
        elif operation in self.waits:
            client.wait = self.waits[operation](request)
        else:
            known = ", ".join([FLOWS, *sorted([*self.answers, *self.waits])])
            raise UsageError(f"unknown operation {operation!r}; known are {known}")

    def _begin_answer(self) -> None:
        """Start a child for the first queued request that may begin now.

        A pass starts only one child, because the agent stands still during a fork.
        """
        for client in self._clients:
            request = client.request
            if request is None or not self._answering.has_room(client.user):
                continue
            foreign = [one.channel for one in self._clients if one is not client]
            foreign += [] if self._listener is None else [self._listener]
            try:
                self._answering.begin(client.channel, client.user, self.answers[request["op"]], request, foreign)
            except PlatformError as error:
                client.request = None
                client.send(encode_error(error))
            else:
                self._drop(client)
            return

    def _drop(self, client: _Client) -> None:
        client.channel.close()
        self._clients.remove(client)


def peer_user(channel: socket.socket) -> int:
    """The user id of the process at the other end of the connection."""
    _, user, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def peer_groups(channel: socket.socket) -> frozenset[int]:
    """The group ids of the process at the other end, as they were when it connected.

    If the process has more groups than the buffer holds, only its primary group is returned.
    """
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
    """Connect to the agent's socket; the context closes the connection. Raises UnreachableError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(timeout_s)
        try:
            channel.connect(str(path))
        except OSError as error:
            raise UnreachableError(f"no agent answers at {path}: {error.strerror or error}") from error
        yield channel


def ask(path: Path, request: Mapping[str, Any], *, timeout_s: float | None = CLIENT_TIMEOUT_S) -> Iterator[Any]:
    """Send a request to the agent; yields the values of its answer as they arrive.

    If the answer is an error: raises InvalidInputError if the request is invalid, otherwise UnreachableError. Raises
    UnreachableError if the agent cannot be reached.
    """
    with connect(path, timeout_s) as channel:
        hung_up: BrokenPipeError | None = None
        try:
            try:
                channel.sendall(json.dumps(request).encode() + b"\n")
            except BrokenPipeError as error:  # the agent sent an error before it read the request; read the error
                hung_up = error
            is_answered = request.get("op") == FLOWS  # there may be no flows, so an empty answer is no error
            with channel.makefile("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        raise UnreachableError(f"the answer of the agent at {path} ended early", hint="Ask again.")
                    is_answered = True
                    value = json.loads(line)
                    if isinstance(value, dict) and "error" in value:
                        kind = InvalidInputError if value.get("slug") == InvalidInputError.slug else UnreachableError
                        raise kind(f"the agent refused: {value['error']}", hint=value.get("hint"))
                    yield value
            if hung_up is not None:
                raise hung_up
            if not is_answered:
                raise UnreachableError(
                    f"the agent at {path} ended the connection without an answer", hint="Its log says why; ask again."
                )
        except OSError as error:
            raise UnreachableError(f"the agent at {path} stopped answering: {error.strerror or error}") from error
