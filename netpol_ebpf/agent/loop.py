# SPDX-License-Identifier: Apache-2.0
"""The agent's loop: waits for the kernel, for the source of objects and for clients, and runs the agent's steps.

Invariant: the time of `AgentLoop.run_once` is bounded. `serve` contains the only endless loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from netpol_ebpf.agent.control_socket import ControlSocket
from netpol_ebpf.agent.health import Health
from netpol_ebpf.agent.service_manager import ServiceManager
from netpol_ebpf.apply.ledger import Ledger

NEWS_GAP_S = 0.05
"""Least seconds between two passes over all interfaces. A new interface gets the programs without this delay. The
number is arbitrary."""
SETTLE_S = 0.01
"""Seconds from the first news of the node's network to the step that reads it. The number is arbitrary.

A container network makes an interface and its routes within milliseconds: one pass sees both, and binds the pod.
"""
REST_FACTOR = 4
"""Factor of the delay of a source's changes: after a step, further changes wait this many times as long as the step
took, at most NEWS_GAP_S. So a source with many small changes takes at most a fifth of a processor, and a single change
is not delayed."""
TICK_S = 0.2
"""Most seconds between two steps of the agent. A step reads flow events, whose arrival does not wake the agent. The
number is arbitrary."""
RETRY_S = 5.0
"""Seconds between two attempts to create the socket. The number is arbitrary."""
log = logging.getLogger("netpol-agent")


@dataclass
class AgentLoop:
    """The agent's loop, as single passes.

    ``when_in_force``: called once, when a state of the source is in force. ``service_manager``: gets the report that
    the agent is ready, and signs of life. ``after_step``: called after each step; it must not wait. ``clock``: returns
    the time in seconds. ``health``: the health endpoint, which gets beats; None: there is none.
    """

    agent: Any
    node: Any
    ledger: Ledger
    control_socket: ControlSocket
    when_in_force: Callable[[], None] = lambda: None
    service_manager: ServiceManager = field(default_factory=ServiceManager)
    after_step: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    health: Health | None = None
    _is_ready: bool = False
    _is_told: bool = False
    _stepped_s: float = -math.inf
    _rested_s: float = -math.inf  # changes of the source wait until then
    _news_due_s: float = math.inf  # when the step for the news is due; infinite: there is no news
    _opened_s: float = -math.inf

    def open(self) -> None:
        """Open the control socket.

        If the file system has no room for it, a later pass tries again. Raises PlatformError.
        """
        self._opened_s = self.clock()
        try:
            self.control_socket.open()
        except OSError as error:
            log.error(  # noqa: TRY400 - the machine's state
                "cannot open the control socket %s (%s): enforcement goes on, and the agent tries again every %d s",
                self.control_socket.path, error.strerror, RETRY_S,
            )  # fmt: skip

    def run_once(self, wake: int) -> None:
        """Wait until there is work or ``wake`` is readable, then do the work."""
        from netpol_ebpf.agent import report
        from netpol_ebpf.apply.events import FlowEvent

        readable, writable = self.control_socket.descriptors()
        network = self.node.network.fileno()
        barrier = self.node.barrier.fileno() if self.agent.is_started else None
        objects = self.agent.source.fileno()
        readable += [one for one in (wake, network, barrier, objects) if one is not None]
        woken, _, _ = select.select(readable, writable, [], self._wait_s())
        if network in woken:
            self.agent.close_newborn()
            self._news_due_s = min(self._news_due_s, self.clock() + SETTLE_S)
        if barrier in woken:
            self.node.barrier.note_news()
            self._news_due_s = -math.inf
        if objects in woken:
            self.agent.source.note_news()
        # After a recent pass over all interfaces the next one waits, so that a busy node does not occupy the agent.
        if self._wait_s() <= 0:
            self._news_due_s = math.inf
            self._stepped_s = self.clock()
            flows = [event for event in self.agent.step() if isinstance(event, FlowEvent)]
            self.control_socket.publish(report.flow(self.agent, flow) for flow in flows)
            self.ledger.try_again()
            self.note_progress()
            self.after_step()
            ended_s = self.clock()
            self._rested_s = ended_s + min(NEWS_GAP_S, REST_FACTOR * (ended_s - self._stepped_s))
        if not self.control_socket.is_open and self.clock() >= self._opened_s + RETRY_S:
            self.open()
        self.control_socket.poll()
        if self.health is not None and self.clock() >= self.health.next_s:
            self.health.beat(report.readiness(self.agent))
        if self.agent.has_handovers:
            self._news_due_s = -math.inf
        self.service_manager.tick()

    def note_progress(self) -> None:
        """Report once that enforcement is in place, and once that the objects are in force."""
        if not self._is_ready and self.agent.keeps_enforcement:
            self._is_ready = True
            self.service_manager.ready()
        if not self._is_told and self.agent.is_in_force:
            self._is_told = True
            self.when_in_force()

    def _wait_s(self) -> float:
        """Seconds until the next step; 0 if the step is due."""
        now_s = self.clock()
        if self._news_due_s < math.inf:
            return max(0.0, self._stepped_s + NEWS_GAP_S - now_s, self._news_due_s - now_s)
        tick_s, source_s = self._stepped_s + TICK_S - now_s, float(self.agent.source.wait_s())
        return max(0.0, min(tick_s, max(self._rested_s - now_s, source_s)))


def serve(loop: AgentLoop) -> None:
    """Run passes of the loop until a signal ends it."""
    loop.open()
    loop.note_progress()
    try:
        with wakened_by(signal.SIGTERM, signal.SIGINT) as (received, wake):
            while not received:
                loop.run_once(wake)
            loop.service_manager.stopping()
            log.info(
                "ended by %s; enforcement stays as it is, `netpolctl cleanup` ends it", signal.Signals(received[0]).name
            )
    finally:
        loop.control_socket.close()


@contextlib.contextmanager
def wakened_by(*signals: signal.Signals) -> Iterator[tuple[list[int], int]]:
    """Receive signals within the context, which gives (list of received signals, file descriptor).

    The descriptor becomes readable with each signal.
    """
    received: list[int] = []
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in signals}
    wakeup = signal.set_wakeup_fd(writing)
    try:
        yield received, reading
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
