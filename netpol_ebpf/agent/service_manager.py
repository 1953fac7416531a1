# SPDX-License-Identifier: Apache-2.0
"""Messages to the service manager by the protocol of sd_notify(3): the agent is ready, alive, or stopping.

Invariant: a message never blocks the agent. The agent goes on if the service manager does not accept a message.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

PARTS = 4
"""Number of signs of life in each period of the watchdog. sd_watchdog_enabled(3) recommends two."""


@dataclass(slots=True)
class ServiceManager:
    """The service manager of this process.

    ``address``: the path of its socket; "": there is no service manager. ``watchdog_s``: the service manager restarts
    the process after this time without a sign of life; 0: never. ``clock``: returns the time in seconds.
    """

    address: str = ""
    watchdog_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _lived_s: float = -math.inf
    _is_ready_due: bool = False
    _is_told: bool = False

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> ServiceManager:
        """The service manager described by the variables NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        usec = environment.get("WATCHDOG_USEC", "")
        is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_s = int(usec) / 1e6 if usec.isascii() and usec.isdecimal() and is_ours else 0.0
        return cls(environment.get("NOTIFY_SOCKET", ""), watchdog_s)

    def ready(self) -> None:
        """Report that the agent is ready: policy is in force, or workloads' interfaces are closed."""
        self._is_ready_due = True
        self.tick()

    def tick(self) -> None:
        """Send a sign of life if one is due, and repeat a report of readiness that was not accepted."""
        if self._is_ready_due:
            self._is_ready_due = not self._send(b"READY=1")
        if self.watchdog_s and self.clock() >= self._lived_s + self.watchdog_s / PARTS:
            self._lived_s = self.clock()
            self._send(b"WATCHDOG=1")

    def stopping(self) -> None:
        """Report that the process ends on request."""
        self._send(b"STOPPING=1")

    def _send(self, message: bytes) -> bool:
        """Send a message. Returns False if the service manager did not accept it; without one, returns True."""
        if not self.address:
            return True
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as channel:
                channel.connect("\0" + self.address[1:] if self.address.startswith("@") else self.address)
                channel.sendall(message)
        except OSError as error:
            if not self._is_told:
                log.warning("the service manager does not take %s: %s", message.decode(), error.strerror)
            self._is_told = True
            return False
        self._is_told = False
        return True
