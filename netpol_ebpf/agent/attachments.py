# SPDX-License-Identifier: Apache-2.0
"""Programs on interfaces: which interfaces have them, and where attaching or detaching failed.

Invariant: a failure on one interface is reported and tried again, and keeps no other interface from its programs.

Must not decide which interfaces get programs.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from netpol_ebpf.agent.node_access import ProgramAccess
from netpol_ebpf.errors import Location, PlatformError, Problem

log = logging.getLogger(__name__)


class Attachments:
    """Attaches and detaches programs. ``interfaces``: indices with the programs on them; read-only for callers."""

    def __init__(self, node: ProgramAccess) -> None:
        self.interfaces: set[int] = set()
        self._node = node
        self._stuck: dict[int, Problem] = {}
        self._stuck_before: dict[int, Problem] = {}

    @property
    def problems(self) -> Collection[Problem]:
        """Failures to attach or detach since the round began."""
        return self._stuck.values()

    def find(self) -> None:
        """Read from the kernel which interfaces have the programs, also those that an earlier agent attached."""
        self.interfaces |= self._node.attached()

    def forget(self, gone: Collection[int]) -> None:
        """Forget interfaces that are gone, and the programs on them."""
        self.interfaces.difference_update(gone)

    def begin_round(self, present: Collection[int]) -> None:
        """Begin a new pass over all interfaces. ``present``: the interfaces that exist."""
        self.interfaces.intersection_update(present)
        self._stuck_before, self._stuck = self._stuck, {}

    def attach(self, ifindex: int, name: str, *, is_newborn: bool = False) -> None:
        """Attach the programs to an interface. A failure becomes a problem and is tried again in the next round."""
        try:
            is_there = self._node.attach(ifindex, is_newborn=is_newborn)
        except PlatformError as error:
            self._note_stuck(ifindex, f"policy NOT enforced on interface {name}: {error.message}")
            return
        if is_there:
            self.interfaces.add(ifindex)
            log.info("attached the programs to interface %s", name)

    def detach(self, ifindex: int, name: str) -> None:
        """Detach the programs from an interface. A failure becomes a problem and is tried again in the next round."""
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
