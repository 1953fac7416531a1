# SPDX-License-Identifier: Apache-2.0
"""Attachment of the programs to interfaces: which interfaces have them, and which attempts failed.

Invariant: a failure on one interface is reported and tried again, and does not affect other interfaces. This module
does not decide which interfaces get the programs.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from netpol_ebpf.agent.node_access import ProgramAccess
from netpol_ebpf.errors import Location, PlatformError, Problem

log = logging.getLogger(__name__)


class Attachments:
    """Attaches and detaches the programs. ``interfaces``: indices of attached interfaces; read-only for callers."""

    def __init__(self, node: ProgramAccess) -> None:
        self.interfaces: set[int] = set()
        self._node = node
        self._stuck: dict[int, Problem] = {}
        self._stuck_before: dict[int, Problem] = {}

    @property
    def problems(self) -> Collection[Problem]:
        """The failures to attach or detach since the last `begin_round`."""
        return self._stuck.values()

    def find(self) -> None:
        """Add the interfaces to which the kernel says the programs are attached, also by an earlier agent."""
        self.interfaces |= self._node.attached()

    def forget(self, gone: Collection[int]) -> None:
        """Remove interfaces that no longer exist."""
        self.interfaces.difference_update(gone)

    def begin_round(self, present: Collection[int]) -> None:
        """Begin a pass over all interfaces: drop old failures. ``present``: indices of the interfaces that exist."""
        self.interfaces.intersection_update(present)
        self._stuck_before, self._stuck = self._stuck, {}

    def attach(self, ifindex: int, name: str, *, is_newborn: bool = False) -> None:
        """Attach the programs to an interface. A failure is reported as a problem; the next round tries again.

        ``is_newborn``: the interface just appeared.
        """
        try:
            is_there = self._node.attach(ifindex, is_newborn=is_newborn)
        except PlatformError as error:
            self._note_stuck(ifindex, f"policy NOT enforced on interface {name}: {error.message}")
            return
        if is_there:
            self.interfaces.add(ifindex)
            log.info("attached the programs to interface %s", name)

    def detach(self, ifindex: int, name: str) -> None:
        """Detach the programs from an interface. A failure is reported as a problem; the next round tries again."""
        log.info("detaching the programs from interface %s: no policy applies to it", name)
        try:
            self._node.detach(ifindex)
        except PlatformError as error:
            self._note_stuck(
                ifindex,
                f"policy is still enforced on interface {name}, to which it does not apply any more: {error.message}",
            )
            return
        self.interfaces.discard(ifindex)

    def _note_stuck(self, ifindex: int, message: str) -> None:
        problem = Problem(Location(""), "", message, slug="attach")
        if problem not in (self._stuck.get(ifindex), self._stuck_before.get(ifindex)):
            log.error("%s", message)
        self._stuck[ifindex] = problem
