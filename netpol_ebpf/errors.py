# SPDX-License-Identifier: Apache-2.0
"""The project's error tree: every failure on which a user can act is one of these classes.

    NetpolError                     exit 70  (raised itself only for a bug)
    |-- UsageError                  exit 2   the command line is wrong
    |-- InvalidInputError           exit 3   a file, object, selector or case is not valid
    |   |-- SelectorError                    an expression does not parse
    |   |-- ValidationError                  all problems of all files together
    |   `-- LimitError                       an object exceeds a stated limit
    |-- UnreachableError            exit 4   no agent or no API server answers
    `-- PlatformError               exit 5   the kernel, a permission or a package is missing
        |-- PrivilegeError                   the process lacks root or a capability
        |-- LoadError                        the program does not compile or verify
        `-- MapFullError                     a map has no room for a change

Invariant: each class has an exit code, a stable machine-readable slug, and a hint that says what to do. A message says
what failed, on which object, and what was seen. This module imports nothing from the rest of the project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class NetpolError(Exception):
    """Base class of all errors. An error of exactly this class is a bug."""

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

    ``offset``: the zero-based index in ``text`` of the first wrong character.
    """

    slug = "selector"

    def __init__(self, message: str, *, text: str, offset: int, hint: str | None = None) -> None:
        # Each character must take one column; a tab or a line break would move the caret.
        line = "".join(character if character.isprintable() else " " for character in text)
        super().__init__(f"{message}\n  {line}\n  {' ' * offset}^", hint=hint)
        self.reason = message
        self.text = text
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Location:
    """A position in an input: the file name as the user gave it, line and column from 1 on; 0 means unknown."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One error or warning about one field of one object.

    ``path``: the field's path in the object, such as ``spec.ingress[0].ports[1].port``. ``obj``: the object as
    ``kind/namespace/name``; unknown parts are left out. ``message``: what is wrong and what to write instead.
    ``severity``: ``error`` or ``warning``. ``slug``: a stable identifier of the kind of problem.
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
    """The input has problems. ``problems``: all that were found, in order of file and line."""

    slug = "validation"

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class LimitError(InvalidInputError):
    """An object exceeds a stated limit. The message names the object, the limit and the actual number.

    ``limit``: the name of the limit, "" if it has none.
    """

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
    """Enforcement needs something of the machine that is missing: a kernel feature, a package or a permission."""

    exit_code = 5
    slug = "platform"
    default_hint = "Run `netpolctl doctor` to see what this machine lacks."


class PrivilegeError(PlatformError):
    """The process lacks a capability that it needs."""

    slug = "privilege"
    default_hint = "Run as root."


class LoadError(PlatformError):
    """The program does not compile, or the kernel does not load or verify it."""

    slug = "load"


class MapFullError(PlatformError):
    """A map has no room for a change. The message names the map, its size and the needed size.

    ``map_name``: the name of the map.
    """

    slug = "map-full"
    default_hint = "The change was rejected; the previous policy stays in force."

    def __init__(self, message: str, *, hint: str | None = None, map_name: str = "") -> None:
        super().__init__(message, hint=hint)
        self.map_name = map_name
