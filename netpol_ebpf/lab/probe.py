# SPDX-License-Identifier: Apache-2.0
"""Real sockets in the namespaces of a laboratory: echo servers, attempts with a deadline, connections held open.

A socket belongs to the network namespace in which its thread created it. So one thread with one event loop serves all
hosts: it enters a host's namespace and creates the socket there. The rejected alternative is a helper process for each
host: its start costs a tenth of a second of CPU time, and the processes would have to exchange messages.

Invariant: only the prober's own thread changes its namespace, and it enters a host's namespace before it creates a
socket.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from netpol_ebpf.errors import PlatformError, PrivilegeError, UsageError
from netpol_ebpf.lab.attempt import Attempt, AttemptResult, Reachability
from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.topology import ICMP, ICMPV6, TCP, UDP, IPAddress, Listen

T = TypeVar("T")

SETTINGS_DIR = Path("/proc/sys/net")
CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns comes with Python 3.12
DEADLINE_S = 0.4
HOLD_DEADLINE_S = 5.0  # for a connection that is expected to open
RESENDS = 4  # datagrams per deadline, because a busy machine may lose one
LAST_TURNS = 3  # passes of the event loop before an attempt without answer counts as silent; arbitrary
JOIN_DEADLINE_S = 5.0
ANSWER_DEADLINE_S = 120.0  # for a whole batch; only a bug can make it take longer
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EHOSTDOWN}


class Held:
    """A TCP connection to an echo server that stays open."""

    def __init__(self, prober: Prober, sock: socket.socket) -> None:
        self._prober = prober
        self._sock = sock

    @property
    def source_port(self) -> int:
        """The local port of the connection."""
        port: int = self._sock.getsockname()[1]
        return port

    def exchange(self, deadline_s: float = DEADLINE_S) -> bool:
        """Send new bytes; returns whether they are echoed before the deadline."""
        return self._prober.call(self._prober.echo_stream(self._sock, scaled(deadline_s)))

    def close(self) -> None:
        """Close the socket. Policy may drop the peer's answer to the FIN, so this does not wait for it."""
        self._sock.close()


@dataclass(slots=True)
class _Batch:
    """Attempts made at the same time.

    ``moved_s``: the event loop's time at which an attempt of the batch last made progress.
    """

    moved_s: float


class Prober:
    """The thread, with an event loop, that owns the sockets of all hosts: echo servers and clients.

    ``namespace_of``: maps a host's name to the name of its network namespace. The caller must call `close`.
    """

    def __init__(self, namespace_of: dict[str, str]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._namespace_of = namespace_of
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[socket.socket] = set()
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab-prober", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all servers, close all sockets and end the thread. Calling it again has no effect."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(scaled(JOIN_DEADLINE_S))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(scaled(JOIN_DEADLINE_S))
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the prober's thread and wait for its result.

        If an error has ended an echo server, this raises that error instead.
        """
        if self._failure is not None:
            work.close()
            raise self._failure
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(scaled(ANSWER_DEADLINE_S))

    def write_settings(self, host: str, settings: Iterable[tuple[str, str]]) -> None:
        """Write files under /proc/sys/net of the host's namespace.

        ``settings``: (path, value), as ("ipv4/ip_forward", "1").
        """

        def write() -> None:
            for path, value in settings:
                # The kernel uses the network namespace of the thread that opens the file.
                (SETTINGS_DIR / path).write_text(value)

        self.call(self._inside(host, write))

    def open_socket(self, host: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Create a blocking socket in the host's namespace. The caller must close the socket."""
        return self.call(self._inside(host, lambda: socket.socket(family, kind, protocol)))

    def listen(self, host: str, addresses: Iterable[IPAddress], listens: Iterable[Listen]) -> None:
        """Start an echo server for each address and port. The servers accept connections when this method returns."""
        for address in addresses:
            for listen in listens:
                self.call(self._serve(host, address, listen))

    def attempt(
        self, attempts: Sequence[Attempt], *, deadline_s: float = DEADLINE_S, rounds: int = 2
    ) -> list[AttemptResult]:
        """Make all attempts at the same time; returns their results in the same order.

        The round ends when no attempt has made progress for ``deadline_s`` (multiplied by `scaled`). An attempt without
        an answer is then silent. Silent attempts are made again, in up to ``rounds`` rounds in all: a busy machine may
        lose the first SYN of a connection, and TCP sends the next SYN only after a second.
        """
        limit_s = scaled(deadline_s)
        results = self.call(self._attempt_all(attempts, limit_s))
        for _ in range(rounds - 1):
            silent = [place for place, result in enumerate(results) if result.outcome is Reachability.SILENT]
            if not silent:
                break
            again = self.call(self._attempt_all([attempts[place] for place in silent], limit_s))
            for place, result in zip(silent, again, strict=True):
                results[place] = result
        return results

    def hold(self, attempt: Attempt, deadline_s: float = HOLD_DEADLINE_S) -> Held | None:
        """Open a TCP connection and keep it open; None if it cannot be opened before the deadline."""
        return self.call(self._hold(attempt, scaled(deadline_s)))

    # --- on the prober's thread -----------------------------------------------------------------------------------

    async def _shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()

    async def _inside(self, host: str, work: Callable[[], T]) -> T:
        self._enter(host)
        return work()

    def _enter(self, host: str) -> None:
        handle = os.open(NETNS_DIR / self._namespace_of[host], os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self._libc.setns(handle, CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                kind = PrivilegeError if number == errno.EPERM else PlatformError
                raise kind(f"lab: cannot enter the namespace of {host}: {os.strerror(number)}")
        finally:
            os.close(handle)

    def _make(self, host: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        self._enter(host)
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(0)
        return sock

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error

    async def _serve(self, host: str, address: IPAddress, listen: Listen) -> None:
        kinds = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM}
        if listen.protocol not in kinds:
            raise UsageError(f"lab: {host} cannot listen on protocol {listen.protocol}, only TCP and UDP")
        sock = self._make(host, _family(address), kinds[listen.protocol])
        self._sockets.add(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), listen.port))
        if listen.protocol == TCP:
            sock.listen(128)
            self._start(self._accept(sock))
        else:
            self._start(self._echo_datagrams(sock))

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await self._loop.sock_accept(listener)
            self._start(self._echo(sock))

    async def _echo(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(0)
            try:
                while data := await self._loop.sock_recv(sock, 4096):
                    await self._loop.sock_sendall(sock, data)
            except OSError:
                return  # the client closed the connection, or policy cut it

    async def _echo_datagrams(self, sock: socket.socket) -> None:
        while True:
            await _readable(self._loop, sock)
            try:
                data, peer = sock.recvfrom(4096)
                sock.sendto(data, peer)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno not in _UNREACHABLE | {errno.ECONNREFUSED}:
                    raise  # the ignored errors are ICMP errors about an earlier answer, which the client observes

    async def _attempt_all(self, attempts: Sequence[Attempt], deadline_s: float) -> list[AttemptResult]:
        """Make attempts until all have an outcome, or until none has made progress for ``deadline_s``.

        The rejected alternative is a deadline for each attempt. All attempts run at the same time, so on a machine that
        needs longer for the whole batch nearly all of them would count as silent.
        """
        batch = _Batch(self._loop.time())
        tasks = [self._loop.create_task(self._attempt(attempt, batch, deadline_s)) for attempt in attempts]
        waiting = set(tasks)
        while waiting:
            left_s = batch.moved_s + deadline_s - self._loop.time()
            if left_s > 0:
                _, waiting = await asyncio.wait(waiting, timeout=left_s)
                continue
            seen_s = batch.moved_s
            for _ in range(LAST_TURNS):  # lets the loop read answers that arrived while it was busy
                await asyncio.sleep(0)
            if batch.moved_s == seen_s:
                break
        for task in waiting:
            task.cancel()
        return await asyncio.gather(*tasks)

    async def _attempt(self, attempt: Attempt, batch: _Batch, deadline_s: float) -> AttemptResult:
        began = time.monotonic()
        try:
            done = await self._try(attempt, batch, deadline_s)
            outcome = Reachability.REACHED if done else Reachability.SILENT
        except asyncio.CancelledError:  # the batch has ended
            outcome = Reachability.SILENT
        except ConnectionRefusedError:
            outcome = Reachability.REFUSED
        except OSError as error:
            if error.errno not in _UNREACHABLE:
                raise
            outcome = Reachability.UNREACHABLE
        return AttemptResult(attempt, outcome, time.monotonic() - began)

    async def _try(self, attempt: Attempt, batch: _Batch, deadline_s: float) -> bool:
        if attempt.protocol == TCP:
            with await self._connected(attempt, socket.SOCK_STREAM) as sock:
                batch.moved_s = self._loop.time()
                reached = await self._exchange(sock)
        elif attempt.protocol == UDP:
            token = secrets.token_bytes(16)
            with await self._connected(attempt, socket.SOCK_DGRAM) as sock:
                reached = await self._ask(sock, token, token, deadline_s / RESENDS)
        elif attempt.protocol in {ICMP, ICMPV6}:
            token = secrets.token_bytes(16)
            request = 8 if attempt.protocol == ICMP else 128
            # The kernel fills in checksum and identifier of its ping sockets.
            message = struct.pack("!BBHHH", request, 0, 0, 0, 1) + token
            with await self._connected(attempt, socket.SOCK_DGRAM, attempt.protocol) as sock:
                reached = await self._ask(sock, message, token, deadline_s / RESENDS)
        else:
            raise UsageError(f"lab: cannot try protocol {attempt.protocol}, only TCP, UDP, ICMP and ICMPv6")
        batch.moved_s = self._loop.time()
        return reached

    async def _connected(self, attempt: Attempt, kind: int, protocol: int = 0) -> socket.socket:
        sock = self._make(attempt.source, _family(attempt.destination), kind, protocol)
        try:
            if attempt.source_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("", attempt.source_port))
            peer = (str(attempt.destination), attempt.port)
            if kind == socket.SOCK_STREAM:
                await self._loop.sock_connect(sock, peer)
            else:
                sock.connect(peer)  # this only sets the peer; the event loop's sock_connect would call getaddrinfo
        except BaseException:
            sock.close()
            raise
        return sock

    async def _ask(self, sock: socket.socket, message: bytes, token: bytes, resend_s: float) -> bool:
        """Send ``message``, and send it again after each ``resend_s`` without an answer.

        Returns when ``token`` comes back.
        """
        while True:
            await self._loop.sock_sendall(sock, message)
            try:
                answer = await asyncio.wait_for(self._loop.sock_recv(sock, 4096), resend_s)
            except asyncio.TimeoutError:
                continue
            if answer.endswith(token):
                return True

    async def echo_stream(self, sock: socket.socket, deadline_s: float) -> bool:
        """Send bytes on a connected stream; returns whether they come back.

        The result is False if the deadline passes or the peer closes the stream.
        """
        try:
            return await asyncio.wait_for(self._exchange(sock), deadline_s)
        except asyncio.TimeoutError:
            return False

    async def _exchange(self, sock: socket.socket) -> bool:
        token = secrets.token_bytes(16)
        received = b""
        try:
            await self._loop.sock_sendall(sock, token)
            # Answers to earlier exchanges that timed out may come first.
            while not received.endswith(token):
                data = await self._loop.sock_recv(sock, 4096)
                if not data:
                    return False
                received += data
        except (ConnectionResetError, BrokenPipeError):
            return False
        return True

    async def _hold(self, attempt: Attempt, deadline_s: float) -> Held | None:
        try:
            sock = await asyncio.wait_for(self._connected(attempt, socket.SOCK_STREAM), deadline_s)
        except asyncio.TimeoutError:
            return None
        self._sockets.add(sock)
        held = Held(self, sock)
        return held if await self.echo_stream(sock, deadline_s) else None


def _family(address: IPAddress) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - the IP version


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Wait until a socket is readable. asyncio's sock_recvfrom exists only from Python 3.11 on."""
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
