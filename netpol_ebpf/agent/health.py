# SPDX-License-Identifier: Apache-2.0
"""The agent's side of the health endpoint: the listening socket, the process of the server, and the beats sent to it.

Invariants: the agent never waits for the server (`netpol_ebpf.agent.health_server`). No fault of the endpoint ends the
agent or keeps it from starting: if an address cannot be bound or a server ended, that is logged and tried again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from netpol_ebpf.errors import UsageError

BEAT_S = 1.0
"""Seconds between two beats. The number is arbitrary, but far below the server's STALL_S."""
RETRY_S = 5.0
"""Seconds between two attempts to bind the address or to start a server. The number is arbitrary."""
BACKLOG = 64
"""Largest number of connections that the kernel queues while no server runs. The number is arbitrary."""
END_S = 1.0
"""Seconds that a server may take to end after its socket is closed. After that time it is killed."""
MOST_PORTS = 0xFFFF
LOOPBACK_NAME = b"lo"

log = logging.getLogger("netpol-agent")


def parse_health_address(text: str | None) -> tuple[str, int] | None:
    """Parse ``HOST:PORT`` into (host, port); None if ``text`` is None. Raises UsageError.

    HOST is one IP address of the node, IPv6 in brackets. A name is rejected, because it could become an address that
    pods reach. A wildcard is rejected, because it includes the addresses that pods have as their gateway. An IPv4
    address as IPv6 (::ffff:0.0.0.0) is rejected, because it can be a wildcard or the loopback address under another
    name.
    """
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    expected = f"--health-address {text}: expected ADDRESS:PORT, such as 127.0.0.1:9976 or [::1]:9976"
    try:
        address = ip_address(host[1:-1] if is_bracketed else host)
    except ValueError as error:
        raise UsageError(expected) from error
    is_port = port.isascii() and port.isdecimal() and len(port) <= len(str(MOST_PORTS)) and 0 < int(port) <= MOST_PORTS
    if not is_port or is_bracketed != (address.version == 6):  # noqa: PLR2004 - IPv6
        raise UsageError(expected)
    is_mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    if address.is_unspecified or address.is_multicast or is_mapped:
        raise UsageError(
            f"--health-address {text}: {address} is not one address of this node",
            hint="Give the loopback address, or the address from which Prometheus scrapes this node.",
        )
    return str(address), int(port)


@dataclass
class Health:
    """The health endpoint. Callers call `open` once, then `beat` whenever `next_s` has passed.

    ``address``: IP address and port. ``control_socket``: the path of the agent's control socket. ``log_format``: the
    format of the server's log, a key of `LOG_FORMATS`. ``clock``: returns the time in seconds. ``next_s``: when the
    next beat is due.
    """

    address: tuple[str, int]
    control_socket: Path
    log_format: str = "text"
    clock: Callable[[], float] = time.monotonic
    next_s: float = 0.0
    _listener: socket.socket | None = None
    _beats: socket.socket | None = None
    _server: subprocess.Popen[bytes] | None = None
    _start_s: float = 0.0  # when a server may be started
    _failure: str = ""  # logged, and not over

    def open(self) -> None:
        """Bind the address and start the server. If that fails, a later beat tries again."""
        self._start_s = self.clock() + RETRY_S
        try:
            if self._listener is None:
                self._listener = self._listen()
            self._start(self._listener)
        except OSError as error:
            reason = error.strerror or str(error)
            if reason != self._failure:
                self._failure = reason
                log.error(  # noqa: TRY400 - the machine's state
                    "cannot serve health at %s port %d (%s): enforcement goes on, and the agent tries again every %d s",
                    *self.address, reason, RETRY_S,
                )  # fmt: skip
            return
        self._failure = ""
        log.info("health is served at %s port %d", *self.address)

    def beat(self, checks: Mapping[str, str]) -> None:
        """Send a beat to the server; start a server if none runs. Never blocks."""
        self.next_s = self.clock() + BEAT_S
        if self._server is not None and self._server.poll() is not None:
            log.error("the health server ended with status %d", self._server.returncode)
            self._release()
        if self._server is None and self.clock() >= self._start_s:
            self.open()
        if self._beats is not None:
            with contextlib.suppress(OSError):  # full: the server is behind and has older beats; or it has just ended
                self._beats.send(json.dumps(checks).encode(), socket.MSG_DONTWAIT)

    def close(self) -> None:
        """End the server and stop listening."""
        server = self._server
        self._release()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if server is not None:
            try:
                server.wait(END_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _release(self) -> None:
        if self._beats is not None:
            self._beats.close()
        self._beats = self._server = None

    def _listen(self) -> socket.socket:
        host, port = self.address
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ip_address(host).is_loopback:
                # With route_localnet, which kube-proxy sets, the kernel delivers a pod's packet to 127.0.0.0/8, and a
                # socket without this option takes it.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, LOOPBACK_NAME)
            listener.bind((host, port))
            listener.listen(BACKLOG)
            stack.pop_all()
        return listener

    def _start(self, listener: socket.socket) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [
                sys.executable, "-m", "netpol_ebpf.agent.health_server", "--listener", str(listener.fileno()),
                "--beats", str(theirs.fileno()), "--control-socket", str(self.control_socket.resolve()),
                "--log-format", self.log_format,
            ]  # fmt: skip
            try:
                # -m puts the working directory into the path of imports: the root directory is root's.
                self._server = subprocess.Popen(
                    command, cwd="/", stdin=subprocess.DEVNULL, pass_fds=[listener.fileno(), theirs.fileno()]
                )
            except OSError:
                ours.close()
                raise
        self._beats = ours


@contextlib.contextmanager
def served(address: tuple[str, int] | None, control_socket: Path, log_format: str) -> Iterator[Health | None]:
    """The open health endpoint at an address, closed at the end of the context; None without an address."""
    if address is None:
        yield None
        return
    health = Health(address, control_socket, log_format)
    health.open()
    try:
        yield health
    finally:
        health.close()
