# SPDX-License-Identifier: Apache-2.0
"""Keeps the numbers of rules, endpoints, identities and name classes beyond the life of one agent.

In the kernel, the key of a connection has the number of the connection's endpoint, and the row of the connection has
the number of the rule that allowed the connection. Events have numbers of identities.  A learned address has numbers of
name classes.  If a new agent gave such a number to another object, the agent would take one pod's connections for
another pod's, or the program would take one domain name for another.  So each number is written to a
file before the kernel first gets the number, and the next agent reads the file.

Invariants: at any time, every number in the kernel is in the file, or `Ledger.problems` reports that some are not.  A
damaged file or file system does not stop the agent.  After a failed write the whole file is written again, at
intervals.  No two objects of one kind have the same number.  A file with an invalid line, or with a number of several
objects, is renamed; the invalid entries are lost, and the valid entries are used.  Released numbers are dropped when
the file is rewritten: at the start, and when the file has grown to twice its size.  The file is on a tmpfs, so a reboot
removes it; a reboot also removes the pins.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from netpol_ebpf.apply.records import (
    checked,
    checked_list,
    load_regular,
    open_draft,
    parse_json,
    reason_of,
    set_aside,
    told,
)
from netpol_ebpf.compiler.domains import NameClass
from netpol_ebpf.compiler.tables import FIRST_NODE
from netpol_ebpf.errors import Location, PlatformError, Problem
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, EndpointKey, PolicyKey

FORMAT = 1
"""The format number of the file. A file with another format number is rejected."""
RETRY_S = 5.0
"""Interval in seconds at which a failed write is repeated; arbitrary."""
MOST_BYTES = 1 << 28
"""Size of the largest file that is read; arbitrary.

It is more than the numbers of all rows need if maps have default sizes and names have usual length.
"""
SMALL_BYTES = 1 << 20
"""A file below this size is not rewritten to drop released numbers; arbitrary."""

E = TypeVar("E", bound=enum.Enum)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Numbers:
    """The number of each rule, endpoint, identity and name class.

    The key of an identity is the digest of its content.  The key of a name class is its content: the pattern sets of
    rules that match its names.
    """

    rules: dict[Cause, int] = field(default_factory=dict)
    endpoints: dict[EndpointKey, int] = field(default_factory=dict)
    identities: dict[str, int] = field(default_factory=dict)
    name_classes: dict[NameClass, int] = field(default_factory=dict)

    def _table(self, kind: str) -> dict[Any, int]:
        tables: dict[str, dict[Any, int]] = {
            "rule": self.rules, "endpoint": self.endpoints, "identity": self.identities, "name_class": self.name_classes,
        }  # fmt: skip
        return tables[kind]

    def entries(self) -> Iterator[tuple[str, Any, int]]:
        """All numbers, as (kind, object, number)."""
        for kind in _READERS:
            for what, number in self._table(kind).items():
                yield kind, what, number


def with_lost_classes(known: Mapping[NameClass, int], in_use: Iterable[int]) -> dict[NameClass, int]:
    """The name classes of an earlier agent, also those that the ledger lost.

    If a number that learned addresses or connections have got another meaning, the program would allow one domain name
    for another.  So a number without a known content, or with two, gets a content that no name has, and is not given to
    a new class.

    ``known``: the classes of the ledger.  ``in_use``: the numbers in the kernel's rows.
    """
    users = Counter(known.values())
    certain = {content: number for content, number in known.items() if users[number] == 1}
    lost = {*in_use, *known.values()} - set(certain.values()) - {0}
    return {**certain, **{frozenset({frozenset({f"lost class {number}"})}): number for number in sorted(lost)}}


class Ledger:
    """The file of numbers in use. It must have one writer at a time."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self.numbers = Numbers()
        self._whats: dict[str, dict[int, Any]] = {}  # kind -> number -> object
        self._file: IO[str] | None = None  # None: the whole file must be written again
        self._is_open = False
        self._damage: Problem | None = None
        self._failure: Problem | None = None
        self._tried_s = 0.0
        self._bytes = self._whole_bytes = 0  # the file's size now, and after its last rewrite

    @property
    def problems(self) -> list[Problem]:
        """The reasons for which the next agent will not find some numbers in the file."""
        return [one for one in (self._damage, self._failure) if one is not None]

    def open(self) -> Numbers:
        """Read the file of an earlier agent, rewrite it without released numbers, and open it for appending.

        Raises PlatformError if the file has another format.  A truncated last line is dropped, because its writer ended
        before it gave the number to the kernel.  Every other fault of the file is reported in `problems`, and the
        number in the faulty line is lost.
        """
        self.numbers, self._whats = Numbers(), {}
        self._damage = self._failure = None
        try:
            wrong = self._read()
        except FileNotFoundError:
            wrong = []
        except (OSError, ValueError) as error:
            wrong = [reason_of(error)]
        if wrong:
            self._set_aside(wrong)
        self._is_open = True
        self._rewrite()
        return self.numbers

    def try_again(self) -> None:
        """Repeat a failed write if the last attempt was at least RETRY_S ago. Must be called regularly."""
        if self._is_open and self._file is None and self._clock() - self._tried_s >= RETRY_S:
            self._rewrite()
            if self._failure is None:
                log.info("%s: the numbers are written down again", self._path)

    def _rewrite(self) -> None:
        """Write the whole file and open it for appending. An error is reported in `problems`, not raised."""
        self._tried_s = self._clock()
        draft = self._path.with_suffix(".draft")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open_draft(draft) as file:
                file.write(json.dumps({"format": FORMAT}) + "\n")
                file.writelines(_line(kind, what, number) for kind, what, number in self.numbers.entries())
            draft.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
            self._bytes = self._whole_bytes = self._path.stat().st_size
        except OSError as error:
            with contextlib.suppress(OSError):  # a partial draft would take space
                draft.unlink(missing_ok=True)
            self._fail(error)
        else:
            self._failure = None

    def _fail(self, error: OSError) -> None:
        """Close the file until the next attempt, and report the error."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the first error is reported already
                self._file.close()
            self._file = None
        message = (
            f"the numbers of rules, endpoints, identities and name classes cannot be written down ({error.strerror}): enforcement goes on, and it "
            "is tried again; an agent that starts before may give them to others, so names in flows and counters may be wrong then"
        )
        problem = Problem(Location(str(self._path)), "", message, severity="warning", slug="ledger")
        if problem != self._failure:
            log.warning("%s", problem)
        self._failure = problem

    def _set_aside(self, wrong: list[str]) -> None:
        """Rename the invalid file so that no agent reads it again, and report its faults ``wrong``."""
        message = (
            f"the numbers that an earlier agent wrote down are damaged ({told(wrong)}); {set_aside(self._path)}. "
            "What is right in it counts. Other endpoints keep the numbers of the rows in force; all else is numbered anew, so names in "
            "flows and counters from before may be wrong"
        )
        self._damage = Problem(Location(str(self._path)), "", message, severity="warning", slug="ledger")
        log.warning("%s", self._damage)

    def record(self, kind: str, numbers: Mapping[Any, int]) -> None:
        """Record the numbers of objects.

        Must be called before the kernel gets the numbers.
        ``kind``: "rule", "endpoint", "identity" or "name_class".

        Numbers that are already recorded are not written again.  If another object already has one of the numbers, as
        after a failed change, that object loses the number.  Raises AssertionError if two of the given objects have the
        same number.
        """
        if len(set(numbers.values())) != len(numbers):
            raise AssertionError(f"several of one {kind} number")
        table, whats = self.numbers._table(kind), self._whats.setdefault(kind, {})  # noqa: SLF001 - two classes of one file
        news = {what: number for what, number in numbers.items() if table.get(what) != number}
        self.forget(kind, [whats[number] for number in news.values() if number in whats])
        for what, number in news.items():
            self._put(kind, what, number)
        self._append(_line(kind, what, number) for what, number in news.items())

    def forget(self, kind: str, gone: Iterable[Any]) -> None:
        """Record that the objects ``gone`` have no number. Must be called after the kernel has lost their numbers."""
        table = self.numbers._table(kind)  # noqa: SLF001 - two classes of one file
        present = [what for what in dict.fromkeys(gone) if what in table]
        for what in present:
            self._put(kind, what, 0)
        self._append(_line(kind, what, 0) for what in present)

    def _put(self, kind: str, what: Any, number: int) -> None:
        """Set the number of an object. ``number`` 0: the object has none. No other object may have the number."""
        table, whats = self.numbers._table(kind), self._whats.setdefault(kind, {})  # noqa: SLF001 - two classes of one file
        if what in table:
            del whats[table.pop(what)]
        if number:
            table[what], whats[number] = number, what

    def release(self, kind: str, numbers: Iterable[int]) -> None:
        """Record that ``numbers`` are free. Must be called after the kernel has lost these numbers.

        An object that has got another number since then keeps the other number.
        """
        whats = self._whats.get(kind, {})
        self.forget(kind, [whats[number] for number in numbers if number in whats])

    def close(self) -> None:
        """Close the file. The file keeps the numbers for the next agent."""
        self._is_open = False
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, lines: Iterable[str]) -> None:
        if not self._is_open:
            raise AssertionError("the ledger is not open")
        if self._file is None:  # `try_again` writes the whole file
            return
        text = "".join(lines)
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._fail(error)  # a reader drops a truncated line
            self._tried_s = self._clock()
            return
        self._bytes += len(text)  # the text is ASCII: one byte a character
        if self._bytes > max(2 * self._whole_bytes, SMALL_BYTES):
            self._file.close()
            self._file = None
            self._rewrite()

    def _read(self) -> list[str]:
        """Read the valid lines of the file. Returns a description of each fault.

        Raises PlatformError if the file has another format, and OSError or ValueError if the file cannot be read at
        all.
        """
        first, *lines = load_regular(self._path, MOST_BYTES).split(b"\n")
        try:
            written_format = checked(checked(parse_json(first), dict, "it").get("format"), int, "the format")
        except ValueError as error:
            raise ValueError(f"line 1: {error}") from error
        if written_format != FORMAT:
            raise PlatformError(
                f"{self._path} is of format {written_format}, this program writes format {FORMAT}",
                hint="Start the version that wrote it, or remove the file: then names in flows and counters from before may be wrong.",
            )
        wrong: list[str] = []
        several: dict[tuple[str, int], list[str]] = {}  # (kind, number) -> names of its objects
        for at, line in enumerate(lines[:-1], 2):  # text after the last newline is a truncated line
            try:
                kind, what, number = _parse_line(line)
            except ValueError as error:  # noqa: PERF203 - a fault of one line does not concern the others
                wrong.append(f"line {at}: {error}")
            else:
                self._take(kind, what, number, several)
        wrong.extend(
            f"{kind} number {number} is given to several: {', '.join(all_)}" for (kind, number), all_ in several.items()
        )
        return wrong

    def _take(self, kind: str, what: Any, number: int, several: dict[tuple[str, int], list[str]]) -> None:
        """Record one line of the file.

        If another object has the number already, both objects lose it.
        ``several``: the numbers that several objects have, with the names of these objects; the method adds to it.
        """
        self._put(kind, what, 0)
        holder = self._whats[kind].get(number)
        if holder is not None:
            self._put(kind, holder, 0)
            several[kind, number] = [str(holder)]
        if (kind, number) in several:
            several[kind, number].append(str(what))
        else:
            self._put(kind, what, number)


def _line(kind: str, what: Any, number: int) -> str:
    return json.dumps([kind, _WRITERS[kind](what), number], separators=(",", ":")) + "\n"


def _write_cause(cause: Cause) -> list[Any]:
    policy = None if cause.policy is None else [cause.policy.kind, cause.policy.namespace, cause.policy.name]
    return [cause.kind.name, cause.direction.name, cause.tier, policy, cause.profile, cause.index, cause.action.name]


def _parse_line(line: bytes) -> tuple[str, Any, int]:
    """Parse one line to (kind, object, number). Number 0: the object has none. Raises ValueError."""
    found = checked(parse_json(line), list, "it")
    if len(found) != 3:  # noqa: PLR2004 - the three values of the docstring
        raise ValueError(f"it must have 3 values, not {len(found)}")
    kind, number = checked(found[0], str, "the kind"), checked(found[2], int, "the number")
    if kind not in _READERS:
        raise ValueError(f"unknown kind {kind!r}")
    if not 0 <= number < _NUMBER_ENDS[kind]:
        raise ValueError(f"{kind} number {number} is out of range")
    return kind, _READERS[kind](found[1]), number


def _read_cause(written: Any) -> Cause:
    if len(checked(written, list, "a rule")) != 7:  # noqa: PLR2004 - the fields below
        raise ValueError("a rule has 7 fields")
    kind, direction, tier, policy, profile, index, action = written
    return Cause(
        _member(CauseKind, kind),
        _member(Direction, direction),
        checked(tier, str, "a tier"),
        None if policy is None else PolicyKey(*checked_list(policy, str, "a policy", 3)),
        checked(profile, str, "a profile"),
        checked(index, int, "an index"),
        _member(Action, action),
    )


def _member(kind: type[E], name: Any) -> E:
    """The member ``name`` of the enumeration ``kind``. Raises ValueError if there is none."""
    found = kind.__members__.get(checked(name, str, kind.__name__))
    if found is None:
        raise ValueError(f"{name!r} is no {kind.__name__}")
    return found


def _read_endpoint(written: Any) -> EndpointKey:
    return EndpointKey(*checked_list(written, str, "an endpoint", 3))


def _read_identity(written: Any) -> str:
    return checked(written, str, "an identity")


def _read_name_class(written: Any) -> NameClass:
    sets = checked(written, list, "a name class")
    return frozenset(frozenset(checked_list(patterns, str, "a set of patterns")) for patterns in sets)


_WRITERS: Mapping[str, Any] = {
    "rule": _write_cause,
    "endpoint": lambda key: [key.kind, key.namespace, key.name],
    "identity": str,
    "name_class": lambda sets: sorted(sorted(patterns) for patterns in sets),
}
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "rule": _read_cause,
    "endpoint": _read_endpoint,
    "identity": _read_identity,
    "name_class": _read_name_class,
}
_NUMBER_ENDS = {"rule": 1 << 32, "endpoint": FIRST_NODE, "identity": 1 << 32, "name_class": 1 << 32}
"""Every number must be below this bound: 2**32 for a row's field of 32 bits, or the first number of a node."""
