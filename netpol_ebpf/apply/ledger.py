# SPDX-License-Identifier: Apache-2.0
"""The numbers that connections and people remember, kept beyond the life of one agent.

A connection in the kernel is keyed by its endpoint's number and names the rule that allowed it by number; identities appear in
events.  A new agent that gave such a number to something else would take one pod's connections for another's, so each
number is written to a file before the kernel first sees it, and read back by the next agent.

Invariant: at any instruction at which the process may die, every number in the kernel is in the file.  Numbers that went are
forgotten when the file is next rewritten, at start.  The file lives where the pins live and die, on a tmpfs: it is worthless after a
reboot, and so are they.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, EndpointKey, PolicyKey

FORMAT = 1
"""Of the file; a file of another format is refused."""


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


class Ledger:
    """The file of numbers. One writer; ``close`` it, or let it go with the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.numbers = Numbers()
        self._whats: dict[str, dict[int, Any]] = {}  # by kind, number -> what
        self._file: IO[str] | None = None

    def open(self) -> Numbers:
        """Read what an earlier agent wrote, rewrite it without what went, and be ready to append.

        Raises PlatformError when the file is of another format, or damaged. A last line that is cut short (its writer died before the
        kernel saw the number) is dropped.
        """
        self.numbers = Numbers()
        if self._path.exists():
            self._read(self._path.read_text(encoding="utf-8"))
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT}) + "\n")
            file.writelines(_line(kind, what, number) for kind, what, number in self.numbers.entries())
        for kind, what, number in self.numbers.entries():
            self._whats.setdefault(kind, {})[number] = what
        draft.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self.numbers

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
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, lines: Iterable[str]) -> None:
        if self._file is None:
            raise AssertionError("the ledger is not open")
        self._file.writelines(lines)
        self._file.flush()

    def _read(self, text: str) -> None:
        lines = text.split("\n")
        complete = lines[:-1]  # what follows the last newline was cut short
        for number, line in enumerate(complete, 1):
            self._read_line(number, line)

    def _read_line(self, number: int, line: str) -> None:
        try:
            found = json.loads(line)
            if number > 1:
                self._take(*found)
                return
            written_format = found["format"]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise PlatformError(
                f"{self._path}:{number} is damaged ({error}): what the numbers in the kernel's maps mean is not known",
                hint="Restore the file, or run `netpolctl cleanup`, which ends enforcement, and start again.",
            ) from error
        if written_format != FORMAT:
            raise PlatformError(
                f"{self._path} is of format {written_format}, this program writes format {FORMAT}",
                hint="Run `netpolctl cleanup` with the version that wrote it, then start this one.",
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
