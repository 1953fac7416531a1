# SPDX-License-Identifier: Apache-2.0
"""Log lines about problems: one line when a problem begins, and one when it ends.

Invariant: a problem that continues has no further line, even if its message changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from netpol_ebpf.errors import Problem

MOST_LINES = 20
"""Largest number of log lines for problems that begin at one time, and for problems that end. The number is
arbitrary."""


@dataclass(slots=True)
class ProblemLog:
    """The present problems of one part of the agent. ``log``: the logger for their lines."""

    log: logging.Logger
    present: tuple[Problem, ...] = ()

    def note(self, problems: Iterable[Problem]) -> None:
        """Replace the problems by the present ones, and log which began and which are over."""
        now = tuple(problems)
        if now == self.present:
            return
        before, self.present = self.present, now
        known, left = set(map(_identity, before)), set(map(_identity, now))
        begun = [one for one in now if _identity(one) not in known]
        over = [one for one in before if _identity(one) not in left]
        for problem in begun[:MOST_LINES]:
            level = logging.ERROR if problem.severity == "error" else logging.WARNING
            self.log.log(level, "%s", _text(problem), extra={"fields": {"problem": problem.slug}})
        for problem in over[:MOST_LINES]:
            self.log.info("over: %s", _text(problem), extra={"fields": {"problem": problem.slug}})
        for what, found in (("began", begun), ("are over", over)):
            if found[MOST_LINES:]:
                self.log.warning(
                    "%d more problems %s at the same time; `netpolctl status` names those that are left",
                    len(found) - MOST_LINES, what,
                )  # fmt: skip


def _identity(problem: Problem) -> tuple[object, ...]:
    """The part of a problem that stays the same while the problem continues.

    The message belongs to this part only if nothing else identifies the object.
    """
    text = "" if _is_placed(problem) else problem.message
    return problem.slug, problem.severity, problem.location, problem.obj, problem.path, text


def _text(problem: Problem) -> str:
    return str(problem) if _is_placed(problem) else problem.message


def _is_placed(problem: Problem) -> bool:
    return bool(problem.location.file or problem.obj)
