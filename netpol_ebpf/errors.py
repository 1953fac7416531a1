# SPDX-License-Identifier: Apache-2.0
"""The project's error tree: every failure a user can act on is one of these.

    NetpolError                     exit 70  (a bug when it is raised bare)
    |-- UsageError                  exit 2   the command line itself is wrong
    |-- InvalidInputError           exit 3   files, objects, selectors, cases
    |   |-- SelectorError                    an expression does not parse
    |   |-- ValidationError                  all problems of all files at once
    |   `-- LimitError                       an object exceeds a stated limit
    |-- UnreachableError            exit 4   no agent, no API server
    `-- PlatformError               exit 5   kernel, permission, missing package
        |-- PrivilegeError                   not root, capability missing
        |-- LoadError                        the program does not compile or verify
        `-- MapFullError                     a map has no room for the change

Invariant: each class carries an exit code, a stable slug (machine readable) and a hint (what to do).
Messages say what failed, on which object, what was seen.  Nothing here imports from the rest of the project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class NetpolError(Exception):
    """Base of all errors; raised bare only for a bug."""

    exit_code: ClassVar[int] = 70
    slug: ClassVar[str] = "bug"
    default_hint: ClassVar[str] = "This is a bug in netpol-ebpf; please report it with the command that caused it."

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint


class UsageError(NetpolError):
    """The command line is wrong."""

    exit_code = 2
    slug = "usage"
    default_hint = "See --help."


class InvalidInputError(NetpolError):
    """An input (file, object, selector, case) is not valid."""

    exit_code = 3
    slug = "invalid-input"
    default_hint = "Correct the input and try again."


class SelectorError(InvalidInputError):
    """A selector expression does not parse.

    ``offset`` is the zero-based index, in characters of ``text``, of the offending character.
    """

    slug = "selector"

    def __init__(self, message: str, *, text: str, offset: int, hint: str | None = None) -> None:
        # One character a column: a tab or a line break would put the caret elsewhere.
        line = "".join(character if character.isprintable() else " " for character in text)
        super().__init__(f"{message}\n  {line}\n  {' ' * offset}^", hint=hint)
        self.reason = message
        self.text = text
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Location:
    """Where something was written: file name as the user gave it, 1-based line and column (0: unknown)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong (or suspicious) with one field of one object.

    ``path`` is the field path inside the object, such as ``spec.ingress[0].ports[1].port``; ``obj`` names the object as
    ``kind/namespace/name`` as far as it is known; ``message`` says what is wrong and what to write instead.
    ``severity`` is ``error`` or ``warning``; ``slug`` is a stable identifier of the kind of problem.
    """

    location: Location
    path: str
    message: str
    obj: str = ""
    severity: str = "error"
    slug: str = "invalid"

    def __str__(self) -> str:
        where = f"{self.obj}: " if self.obj else ""
        path = f"{self.path}: " if self.path else ""
        return f"{self.location}: {self.severity}: {where}{path}{self.message}"


class ValidationError(InvalidInputError):
    """One or more problems; always all that were found, in file and line order."""

    slug = "validation"

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class LimitError(InvalidInputError):
    """An object exceeds a stated limit; names the object, the limit and the figure seen. ``limit``: its name, or ""."""

    slug = "limit"
    default_hint = "Split the object or raise the limit in the agent's configuration."

    def __init__(self, message: str, *, hint: str | None = None, limit: str = "") -> None:
        super().__init__(message, hint=hint)
        self.limit = limit


class UnreachableError(NetpolError):
    """The agent or the API server cannot be reached."""

    exit_code = 4
    slug = "unreachable"
    default_hint = "Start netpol-agent on this node, or name the state directory of the running agent (--state-dir)."


class PlatformError(NetpolError):
    """The kernel, a package or a permission that is needed is missing."""

    exit_code = 5
    slug = "platform"
    default_hint = "Run `netpolctl doctor` to see what this machine lacks."


class PrivilegeError(PlatformError):
    """The process lacks a capability."""

    slug = "privilege"
    default_hint = "Run as root."


class LoadError(PlatformError):
    """The program does not compile, load or verify."""

    slug = "load"


class MapFullError(PlatformError):
    """A map has no room for a change; names the map, its size and the figure needed. ``map_name``: the map's."""

    slug = "map-full"
    default_hint = "The change was rejected; the previous policy stays in force."

    def __init__(self, message: str, *, hint: str | None = None, map_name: str = "") -> None:
        super().__init__(message, hint=hint)
        self.map_name = map_name
