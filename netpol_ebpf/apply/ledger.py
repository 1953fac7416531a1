# SPDX-License-Identifier: Apache-2.0
"""The numbers that connections and people remember, kept beyond the life of one agent.

A connection in the kernel is keyed by its endpoint's number and names the rule that allowed it by number; identities appear in
events.  A new agent that gave such a number to something else would take one pod's connections for another's, so each
number is written to a file before the kernel first sees it, and read back by the next agent.

Invariants: at any instruction at which the process may die, every number in the kernel is in the file, or `Ledger.problems` says
that it is not; whatever is wrong with the file or its file system ends nothing.  What cannot be written is written as soon as it
can be, the whole file anew; a file that cannot be understood is kept aside, and the numbers count as lost.  Numbers that went are
forgotten when the file is next rewritten, at start.  The file lives where the pins live and die, on a tmpfs: it is worthless
after a reboot, and so are they.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from netpol_ebpf.errors import Location, PlatformError, Problem
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, EndpointKey, PolicyKey

FORMAT = 1
"""Of the file; a file of another format is refused."""
DAMAGED_SUFFIX = ".damaged"
"""Of a file that could not be understood."""
RETRY_S = 5.0
"""How often it is tried again to write; arbitrary."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Numbers:
    """What has which number. Identities by what the compiler says they stand for."""

    rules: dict[Cause, int] = field(default_factory=dict)
    endpoints: dict[EndpointKey, int] = field(default_factory=dict)
    identities: dict[str, int] = field(default_factory=dict)

    def _table(self, kind: str) -> dict[Any, int]:
        tables: dict[str, dict[Any, int]] = {
            "rule": self.rules, "endpoint": self.endpoints, "identity": self.identities,
        }  # fmt: skip
        return tables[kind]

    def entries(self) -> Iterator[tuple[str, Any, int]]:
        """Everything, as (kind, what, number)."""
        for kind in _READERS:
            for what, number in self._table(kind).items():
                yield kind, what, number


class _DamagedError(Exception):
    """The file is not what a ledger wrote; where, and what was seen."""


class Ledger:
    """The file of numbers. One writer; ``close`` it, or let it go with the process."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self.numbers = Numbers()
        self._whats: dict[str, dict[int, Any]] = {}  # by kind, number -> what
        self._file: IO[str] | None = None  # None while the file has to be written anew
        self._is_open = False
        self._damage: Problem | None = None
        self._failure: Problem | None = None
        self._tried_s = 0.0

    @property
    def problems(self) -> list[Problem]:
        """What the next agent will not know, and why."""
        return [one for one in (self._damage, self._failure) if one is not None]

    def open(self) -> Numbers:
        """Read what an earlier agent wrote, rewrite it without what went, and be ready to append.

        Raises PlatformError when the file is of another format. A last line that is cut short (its writer died before the kernel
        saw the number) is dropped. Whatever else is wrong is in `problems`, and the numbers count as lost.
        """
        self.numbers, self._whats = Numbers(), {}
        self._damage = self._failure = None
        try:
            self._read()
        except FileNotFoundError:
            pass
        except (_DamagedError, OSError) as error:
            self.numbers = Numbers()
            self._set_aside(error)
        for kind, what, number in self.numbers.entries():
            self._whats.setdefault(kind, {})[number] = what
        self._is_open = True
        self._rewrite()
        return self.numbers

    def try_again(self) -> None:
        """Write what could not be written, every RETRY_S."""
        if self._is_open and self._file is None and self._clock() - self._tried_s >= RETRY_S:
            self._rewrite()
            if self._failure is None:
                log.info("%s: the numbers are written down again", self._path)

    def _rewrite(self) -> None:
        """Write the whole file and go on behind it; what prevents that is told."""
        self._tried_s = self._clock()
        draft = self._path.with_suffix(".draft")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with draft.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"format": FORMAT}) + "\n")
                file.writelines(_line(kind, what, number) for kind, what, number in self.numbers.entries())
            draft.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            with contextlib.suppress(OSError):  # what is left of it takes room
                draft.unlink(missing_ok=True)
            self._fail(error)
        else:
            self._failure = None

    def _fail(self, error: OSError) -> None:
        """Go on without the file, and say so."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # it is told already
                self._file.close()
            self._file = None
        message = (
            f"the numbers of rules, endpoints and identities cannot be written down ({error.strerror}): enforcement goes on, and it "
            "is tried again; an agent that starts before may give them to others, so names in flows and counters may be wrong then"
        )
        problem = Problem(Location(str(self._path)), "", message, severity="warning", slug="ledger")
        if problem != self._failure:
            log.warning("%s", problem)
        self._failure = problem

    def _set_aside(self, error: Exception) -> None:
        """Keep a file that is not understood where nobody reads it, and say so."""
        aside = self._path.with_suffix(DAMAGED_SUFFIX)
        seen = error.strerror if isinstance(error, OSError) else str(error)
        try:
            self._path.replace(aside)
            kept = f"it is kept as {aside}"
        except OSError as second:
            kept = f"it cannot be kept aside ({second.strerror})"
        message = (
            f"what an earlier agent wrote down cannot be read ({seen}); {kept}. Endpoints keep the numbers of the rows in force; "
            "all others are new, so names in flows and counters from before may be wrong"
        )
        self._damage = Problem(Location(str(self._path)), "", message, severity="warning", slug="ledger")
        log.warning("%s", self._damage)

    def record(self, kind: str, numbers: Mapping[Any, int]) -> None:
        """Note numbers before the kernel sees them. ``kind``: "rule", "endpoint" or "identity"; what is noted already is free."""
        table = self.numbers._table(kind)  # noqa: SLF001 - two classes of one file
        news = [(what, number) for what, number in numbers.items() if table.get(what) != number]
        table.update(news)
        self._whats.setdefault(kind, {}).update((number, what) for what, number in news)
        self._append(_line(kind, what, number) for what, number in news)

    def forget(self, kind: str, gone: Iterable[Any]) -> None:
        """Note that these have no number any more, after the kernel has forgotten them."""
        table = self.numbers._table(kind)  # noqa: SLF001 - two classes of one file
        present = [what for what in gone if table.pop(what, None) is not None]
        self._append(_line(kind, what, 0) for what in present)

    def release(self, kind: str, numbers: Iterable[int]) -> None:
        """Note that these numbers stand for nothing any more, after the kernel has forgotten them.

        What has meanwhile been given another number keeps that.
        """
        table, whats = self.numbers._table(kind), self._whats.get(kind, {})  # noqa: SLF001 - two classes of one file
        gone = [(whats.pop(number), number) for number in numbers if number in whats]
        self.forget(kind, [what for what, number in gone if table.get(what) == number])

    def close(self) -> None:
        """Close the file; the numbers stay."""
        self._is_open = False
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, lines: Iterable[str]) -> None:
        if not self._is_open:
            raise AssertionError("the ledger is not open")
        if self._file is None:  # all of it is written when it can be
            return
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            self._fail(error)  # a line that was cut short is dropped by who reads it
            self._tried_s = self._clock()

    def _read(self) -> None:
        """Raises OSError, _DamagedError, PlatformError for another format."""
        try:
            lines = self._path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut short
                self._read_line(number, line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _DamagedError(f"line {number}: {error.reason}") from error

    def _read_line(self, number: int, line: str) -> None:
        try:
            found = json.loads(line)
            if number > 1:
                self._take(*found)
                return
            written_format = found["format"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _DamagedError(f"line {number}: {error}") from error
        if written_format != FORMAT:
            raise PlatformError(
                f"{self._path} is of format {written_format}, this program writes format {FORMAT}",
                hint="Start the version that wrote it, or remove the file: then names in flows and counters from before may be wrong.",
            )

    def _take(self, kind: str, written: Any, number: int) -> None:
        table, what = self.numbers._table(kind), _READERS[kind](written)  # noqa: SLF001 - two classes of one file
        if number:
            table[what] = number
        else:
            table.pop(what, None)


def _line(kind: str, what: Any, number: int) -> str:
    return json.dumps([kind, _WRITERS[kind](what), number], separators=(",", ":")) + "\n"


def _write_cause(cause: Cause) -> list[Any]:
    policy = None if cause.policy is None else [cause.policy.kind, cause.policy.namespace, cause.policy.name]
    return [cause.kind.name, cause.direction.name, cause.tier, policy, cause.profile, cause.index, cause.action.name]


def _read_cause(written: list[Any]) -> Cause:
    kind, direction, tier, policy, profile, index, action = written
    key = None if policy is None else PolicyKey(*policy)
    return Cause(CauseKind[kind], Direction[direction], tier, key, profile, index, Action[action])


_WRITERS: Mapping[str, Any] = {
    "rule": _write_cause,
    "endpoint": lambda key: [key.kind, key.namespace, key.name],
    "identity": str,
}
_READERS: Mapping[str, Any] = {
    "rule": _read_cause,
    "endpoint": lambda written: EndpointKey(*written),
    "identity": str,
}
