# SPDX-License-Identifier: Apache-2.0
"""Restores programs, pins, rows and tables that another program changed.

Other software's programs that may let packets bypass policy are reported but not removed: two programs that each insist
on running first would replace each other for ever.

Invariants: counters only grow, and for every count there is a line in the log. Rows are compared only with tables that
are in force.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from netpol_ebpf.agent.attachments import Attachments
from netpol_ebpf.agent.barrier import Barrier
from netpol_ebpf.agent.enforcement import Enforcement
from netpol_ebpf.agent.node_access import RepairAccess
from netpol_ebpf.agent.other_programs import REDIRECT, problems_of
from netpol_ebpf.agent.problem_log import ProblemLog
from netpol_ebpf.errors import Location, PlatformError, Problem
from netpol_loader.pins.drift import Drift, PartlyMendedError

log = logging.getLogger(__name__)

AUDIT_S = 1.0
"""Seconds between two checks of programs, pins and the next part of the rows. The number is arbitrary."""
ROUND_S = 5.0
"""Least seconds between the starts of two rounds through all rows. The number is arbitrary."""
REMEMBERED = 20
"""Largest number of repairs that `status` shows. The number is arbitrary."""


@dataclass(slots=True)
class DriftLog:
    """Log of repaired drift.

    ``counts``: the number of repairs by kind. ``recent``: (time in seconds, repair), oldest first.
    """

    counts: Counter[str] = field(default_factory=Counter)
    recent: deque[tuple[float, Drift]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def note(self, found: Iterable[Drift], now_s: float) -> None:
        """Count and log repairs that were made."""
        for drift in found:
            self.counts[drift.kind] += 1
            self.recent.append((now_s, drift))
            log.warning("restored: %s", drift)


class Repair:
    """Finds and repairs drift. The agent's main loop calls `step` once in each pass. ``drift``: the log of repairs."""

    def __init__(
        self,
        node: RepairAccess,
        enforcement: Enforcement,
        attachments: Attachments,
        barrier: Barrier,
        name_of: Callable[[int], str],
        clock: Callable[[], float],
    ) -> None:
        """``name_of``: returns the name of an interface by its index. ``clock``: returns the time in seconds."""
        self.drift = DriftLog()
        self._node = node
        self._enforcement = enforcement
        self._attachments = attachments
        self._barrier = barrier
        self._name_of = name_of
        self._clock = clock
        self._audited_s = self._round_s = clock()
        self._failure: Problem | None = None
        self._other_programs: Sequence[Problem] = ()
        self._problem_log = ProblemLog(log)

    @property
    def other_programs(self) -> Sequence[Problem]:
        """Problems for other software's programs that may let packets bypass policy, as the last check found them."""
        return self._other_programs

    @property
    def failure(self) -> Problem | None:
        """The failure of the last repair; None if it succeeded."""
        return self._failure

    @property
    def rounds(self) -> int:
        """The number of completed rounds. A round compares every row in force with its desired content."""
        audit = self._enforcement.audit
        return 0 if audit is None else audit.rounds

    def step(self) -> bool:
        """Restore what the kernel reported as changed.

        Once every AUDIT_S, also check for all other drift and restore it.

        Each check compares one part of the rows with the tables; the next check takes the next part. Returns whether
        this call made a check.
        """
        now_s = self._clock()
        self.drift.note(self._barrier.restore_reported(), now_s)
        if now_s - self._audited_s < AUDIT_S:
            return False
        self._audited_s = now_s
        self._look_for_other_programs()
        self.drift.note(self._barrier.look(), now_s)
        self._failure = None
        try:
            self._restore_programs(now_s)
            self._restore_rows(now_s)
        except PlatformError as error:
            message = f"cannot restore what something else changed: {error.message}"
            self._failure = Problem(Location(""), "", message, slug="drift")
        self._problem_log.note((*self._other_programs, *(() if self._failure is None else (self._failure,))))
        return True

    def _restore_programs(self, now_s: float) -> None:
        try:
            self._note_programs(self._node.mend(frozenset(self._attachments.interfaces)), now_s)
        except PartlyMendedError as error:
            self._note_programs(error.found, now_s)
            raise

    def _note_programs(self, found: Collection[Drift], now_s: float) -> None:
        self.drift.note(found, now_s)
        if any(one.kind == "program" for one in found):
            self._enforcement.applier.bump_generation()  # packets may have passed without a verdict meanwhile

    def _restore_rows(self, now_s: float) -> None:
        audit = self._enforcement.audit
        if audit is None or not self._enforcement.is_installed:
            return
        if audit.is_between_rounds:
            if now_s - self._round_s < ROUND_S:
                return
            self._round_s = now_s
            self.drift.note(self._enforcement.restore_learners(), now_s)
        self.drift.note(audit.step(), now_s)

    def _look_for_other_programs(self) -> None:
        try:
            found = self._node.other_programs(frozenset(self._attachments.interfaces))
            self._other_programs = problems_of(found, self._name_of)
        except PlatformError as error:
            message = f"cannot tell whether programs of others bypass policy: {error.message}"
            self._other_programs = [Problem(Location(""), "", message, severity="warning", slug=REDIRECT)]
