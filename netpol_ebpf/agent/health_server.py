# SPDX-License-Identifier: Apache-2.0
"""The health server: a separate process that answers /livez, /readyz and /metrics over HTTP.

    /livez    200 while the agent's loop runs
    /readyz   200 while the loop runs and every check of the last beat passes; the body names each check
    /metrics  the metrics that `netpolctl metrics` prints, in Prometheus' text format

The agent sends a beat each second: a JSON object that maps the name of each readiness check to the reason of its
failure, or to "" if the check passes. The server requests metrics over the agent's control socket; a fork of the agent
answers.

The server is neither a thread nor a fork of the agent. A thread would compete with the agent's loop for Python's global
lock. A fork would have the agent's memory with the credentials of the API server, and it would read requests from the
network.

Invariants: the agent never waits for this process. This process has no capability, and ends when the agent ends. It
answers only GET and HEAD. Connections, their bytes and their time are limited. A new connection never waits for an
older one, because the oldest is closed. At most one request for metrics is open at the agent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import ask
from netpol_ebpf.agent.metrics import TEXT_FORMAT, Family, render
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.terminal import LOG_FORMATS, escaped, log_to_standard_error

STALL_S = 600.0
"""Seconds without a beat after which the agent's loop counts as hung. The time is long, because one step of the loop
may apply all objects of a large cluster. The watchdog of the systemd unit has the same time."""
LATE_S = 60.0
"""Seconds without a beat after which the agent counts as not ready. The number is arbitrary."""
CONNECTIONS = 32
"""Largest number of connections. A further one closes the oldest. The number is arbitrary."""
REQUEST_S = 5.0
"""Seconds after a client connects within which its request must arrive. The number is arbitrary."""
CONNECTION_S = 20.0
"""Longest duration of a connection in seconds, including the answer. The number is arbitrary, but larger than
ANSWER_S."""
REQUEST_BYTES = 8192
"""Longest request line with headers, in bytes. The number is arbitrary."""
ANSWER_S = 10.0
"""Seconds within which the agent must answer a request for its metrics. Prometheus has the same default time limit for
a scrape."""
METRICS_AGE_S = 1.0
"""Seconds for which the server answers requests for metrics from its last answer, so that clients cannot make the agent
fork more often. The number is arbitrary."""
BEAT_BYTES = 65536
TEXT = "text/plain; charset=utf-8"
METHODS = ("GET", "HEAD")

_PR_SET_NO_NEW_PRIVS = 38
"""Value from the kernel's linux/prctl.h."""
_CAPABILITY_VERSION_3 = 0x20080522
"""Value from the kernel's linux/capability.h."""

log = logging.getLogger("netpol-agent")


@dataclass(frozen=True, slots=True)
class HealthPage:
    """An HTTP answer."""

    status: HTTPStatus
    body: bytes
    content_type: str = TEXT

    def render(self, *, is_head: bool) -> bytes:
        """Encode the answer as an HTTP response, without the body if ``is_head``."""
        allow = f"Allow: {', '.join(METHODS)}\r\n" if self.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
            f"{allow}Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if is_head else self.body)


def error_page(status: HTTPStatus, text: str = "") -> HealthPage:
    """An answer whose body is one line with the reason of the error."""
    return HealthPage(status, f"{text or status.phrase}\n".encode())


@dataclass
class HealthServer:
    """Answers from the state that the agent's last beat reported.

    ``load_metrics``: returns the page of metrics; it is called in a thread and may take long. ``clock``: returns the
    time in seconds.
    """

    load_metrics: Callable[[], HealthPage]
    clock: Callable[[], float] = time.monotonic
    _beat_s: float = field(init=False)
    _checks: dict[str, str] = field(default_factory=lambda: {"loop": "the agent is starting"})
    _clients: dict[asyncio.Task[Any], None] = field(default_factory=dict)  # oldest first
    _loading: asyncio.Task[HealthPage] | None = None
    _loaded_s: float = 0.0

    def __post_init__(self) -> None:
        self._beat_s = self.clock()

    def note_beat(self, raw: bytes) -> None:
        """Store the checks of a beat, and the time of its arrival."""
        self._checks, self._beat_s = json.loads(raw), self.clock()

    # --- pages ----------------------------------------------------------------------------------------------------

    def livez(self) -> HealthPage:
        """The page that says whether the agent's loop runs."""
        return _checked({"loop": self._silence(STALL_S)})

    def readyz(self) -> HealthPage:
        """The page that says whether the agent's loop runs and every check passes."""
        return _checked({**self._checks, "loop": self._silence(LATE_S) or self._checks.get("loop", "")})

    async def metrics(self) -> HealthPage:
        """The page of metrics, which is at most METRICS_AGE_S old."""
        loading = self._loading
        if loading is None or (loading.done() and self.clock() - self._loaded_s >= METRICS_AGE_S):
            loading = self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(loading)  # a client that is disconnected does not end the request of the others

    async def _load(self) -> HealthPage:
        try:
            return await asyncio.to_thread(self.load_metrics)
        finally:
            self._loaded_s = self.clock()

    def _silence(self, most_s: float) -> str:
        """Why the agent's loop counts as hung; "" if it sent a beat less than ``most_s`` seconds ago."""
        silent_s = self.clock() - self._beat_s
        return "" if silent_s < most_s else f"the agent's loop has not turned for {silent_s:.0f} s"

    # --- connections ------------------------------------------------------------------------------------------------

    async def serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the request of one connection, then close the connection."""
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("a connection is served by a task")
        self._clients[task] = None
        if len(self._clients) > CONNECTIONS:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.cancel()
        try:
            await asyncio.wait_for(self._exchange(reader, writer), CONNECTION_S)
        except (asyncio.TimeoutError, asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
            writer.transport.abort()  # too slow, too old, or gone
        finally:
            self._clients.pop(task, None)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)  # drain() then waits until everything is sent
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
        except asyncio.LimitOverrunError:
            method, page = "", error_page(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            method, page = await self._answer(head)
        writer.write(page.render(is_head=method == "HEAD"))
        await writer.drain()

    async def _answer(self, head: bytes) -> tuple[str, HealthPage]:
        """Answer a request, given with its headers; returns the request's method, and the answer."""
        parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):  # noqa: PLR2004 - method, target, version
            return "", error_page(HTTPStatus.BAD_REQUEST)
        method, target, _ = parts
        if method not in METHODS:
            return method, error_page(HTTPStatus.METHOD_NOT_ALLOWED)
        path = target.partition("?")[0]
        try:
            if path == "/livez":
                return method, self.livez()
            if path == "/readyz":
                return method, self.readyz()
            if path == "/metrics":
                return method, await self.metrics()
        except Exception:
            log.exception("bug: the health server cannot answer %s", path)
            return method, error_page(HTTPStatus.INTERNAL_SERVER_ERROR)
        return method, error_page(HTTPStatus.NOT_FOUND, "there are /livez, /readyz and /metrics")


def _checked(checks: dict[str, str]) -> HealthPage:
    """A page with a line for each check, in the form of the API server's /readyz.

    ``checks``: the reason of its failure for each check; "" if the check passes.
    """
    lines = [f"[-]{name} failed: {escaped(why)}" if why else f"[+]{name} ok" for name, why in checks.items()]
    status = HTTPStatus.SERVICE_UNAVAILABLE if any(checks.values()) else HTTPStatus.OK
    return HealthPage(status, ("\n".join(lines) + "\n").encode())


def load_metrics(control_socket: Path) -> HealthPage:
    """Ask the agent for its metrics and render them. If the agent cannot answer, the page has the status 503."""
    try:
        (found,) = ask(control_socket, {"op": "metrics"}, timeout_s=ANSWER_S)
    except (NetpolError, TimeoutError) as error:
        return error_page(HTTPStatus.SERVICE_UNAVAILABLE, escaped(str(error)))
    return HealthPage(HTTPStatus.OK, render(Family.from_dict(one) for one in found), TEXT_FORMAT)


async def serve(server: HealthServer, listener: socket.socket, beats: socket.socket) -> None:
    """Serve until the agent closes its end of ``beats``. Both sockets must be non-blocking."""
    is_over = asyncio.Event()

    def receive() -> None:
        with contextlib.suppress(BlockingIOError):
            raw = beats.recv(BEAT_BYTES)
            if raw:
                server.note_beat(raw)
            else:
                is_over.set()

    asyncio.get_running_loop().add_reader(beats.fileno(), receive)
    async with await asyncio.start_server(server.serve_client, sock=listener, limit=REQUEST_BYTES):
        await is_over.wait()


def renounce_capabilities() -> None:
    """Drop every capability, so that this process cannot get one again. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "the health server cannot give up its capabilities")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the process that `netpol_ebpf.agent.health` starts."""
    parser = argparse.ArgumentParser(prog="netpol-agent health server")
    parser.add_argument("--listener", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--beats", type=int, required=True, help="descriptor of the socket on which beats arrive")
    parser.add_argument("--control-socket", type=Path, required=True)
    parser.add_argument("--log-format", choices=tuple(LOG_FORMATS), required=True)
    arguments = parser.parse_args(argv)
    log_to_standard_error(arguments.log_format, logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group or service: the agent decides when it ends
        signal.signal(number, signal.SIG_IGN)
    renounce_capabilities()
    listener, beats = (socket.socket(fileno=number) for number in (arguments.listener, arguments.beats))
    for one in (listener, beats):
        one.settimeout(0)
    asyncio.run(serve(HealthServer(lambda: load_metrics(arguments.control_socket)), listener, beats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
