# SPDX-License-Identifier: Apache-2.0
"""A strict reader of one object. It gives typed access to fields, and records each wrong field as a problem.

A `Reader` is a cursor over one mapping.  Each accessor returns the field's value.  If the value is wrong, the accessor
records a problem with the field's path and returns None or an empty value.  So a parser continues, and all problems of
an object are reported at once.  If `ProblemReport.failed` is true in the end, the parsed object must not be used.  An
absent field and null are the same, as in the Kubernetes API.

Invariant: an accessor raises no exception, whatever value YAML or JSON can have.  This module must not depend on kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.resources.yamltree import Path, Positions

FOLDING_HINT = (
    "a block that begins with `>` or `|` keeps the line break at its end; begin it with `>-`, or write one line"
)

TOLERATED = frozenset({"name", "label", "limit", "end-port", "excludes-all", "built-in-order"})


@dataclass(slots=True)
class ProblemReport:
    """Collects the problems of one object.

    ``failed``: whether one of the problems is an error.
    ``lenient``: True for objects that no API server has checked, such as those of case files.  Then a fault that an API
    server rejects although its meaning is clear (`TOLERATED`) is a warning instead of an error.
    """

    positions: Positions
    obj: str = ""
    problems: list[Problem] = field(default_factory=list)
    failed: bool = False
    lenient: bool = False
    _seen: set[tuple[Path, str]] = field(default_factory=set)

    def error(self, path: Path, message: str, *, slug: str = "invalid") -> None:
        """Record an error at ``path``. In lenient mode an error with a slug of `TOLERATED` is recorded as a warning."""
        if self.lenient and slug in TOLERATED:
            self._add(path, message, slug, "warning")
            return
        self.failed = True
        self._add(path, message, slug, "error")

    def warning(self, path: Path, message: str, *, slug: str) -> None:
        """Record a warning at ``path``: the value is valid, but probably a mistake."""
        self._add(path, message, slug, "warning")

    def _add(self, path: Path, message: str, slug: str, severity: str) -> None:
        if "\n" in message and slug != "selector":  # messages have one line, so the line break is in a quoted value
            message = message.replace("\n", "\\n") + f"; {FOLDING_HINT}"
        if (path, message) in self._seen:  # a field read twice is reported once
            return
        self._seen.add((path, message))
        self.problems.append(
            Problem(
                self.positions.location(path), render_path(path), message, obj=self.obj, severity=severity, slug=slug
            )
        )

    def location(self, path: Path) -> Location:
        """File, line and column of ``path``."""
        return self.positions.location(path)

    def describe(self, path: Path, value: Any) -> str:
        """The value at ``path`` for a message.

        It is shown as written, and also as it is read if that differs (``yes``, ``0755``).
        """
        written = self.positions.written(path)
        if written is None or value is None:
            return describe(value)
        return f"{written}, which is read as {describe(value)}"

    def wrong_text(self, path: Path, value: Any) -> None:
        """Record that the value at ``path`` is not a text, although it must be one."""
        written = self.positions.written(path)
        if written is None and not isinstance(value, (bool, int, float)):
            hint = '; write "" for an empty text, "null" for the word' if value is None else ""
            self.error(path, f"must be text, is {describe(value)}{hint}", slug="type")
            return
        quoted = describe(value) if written is None else written
        seen = f"{quoted}, which is read as nothing" if value is None else self.describe(path, value)
        self.error(path, f'must be text, is the value {seen}; put it in quotes: "{quoted}"', slug="type")


def render_path(path: Path) -> str:
    """A path as text, such as ``spec.ingress[0].from``. Keys with characters that no field name has are in brackets."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.replace("_", "").isalnum():
            text += f".{step}" if text else step
        else:
            text += f"[{step}]"
    return text


def describe(value: Any) -> str:
    """A value for a message: a text in quotes, other scalars as in YAML, a list or mapping by the name of its type."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'  # noqa: PLR2004 - arbitrary: fits a line
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return str(value)


def suggestion(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The text `` (did you mean `x`?)`` for the most similar word in ``known``; "" if no word is similar.

    ``prefix`` stands before the word and before all known words. It is printed and not compared: a long common prefix would
    make any two words similar.
    """
    near = next((one for one in known if one.lower() == word.lower()), None)
    if near is None:
        near = next(iter(get_close_matches(word, known, n=1, cutoff=0.7)), None)
    return f" (did you mean `{prefix}{near}`?)" if near is not None else ""


class Reader:
    """A cursor over one mapping of an object.

    Every field that a caller reads becomes a known field.  `done` reports all other fields.
    """

    __slots__ = ("_known", "_value", "path", "report")

    def __init__(self, value: Mapping[Any, Any], path: Path, report: ProblemReport) -> None:
        self._value = value
        self._known: list[str] = []
        self.path = path
        self.report = report

    def raw(self, key: str) -> Any:
        """The value of a field, of any type; None if the field is absent or null."""
        self._known.append(key)
        return self._value.get(key)

    def peek(self, key: str) -> Any:
        """Like `raw`, but the field does not become a known field."""
        return self._value.get(key)

    def has(self, key: str) -> bool:
        """Whether the field is present with a value other than null."""
        return self._value.get(key) is not None

    def given(self, key: str) -> bool:
        """Whether the field is present, also with the value null."""
        return key in self._value

    def fields(self) -> list[str]:
        """The names of all fields that are present."""
        return [str(key) for key in self._value]

    def error(self, key: str | None, message: str, *, slug: str = "invalid") -> None:
        """Record an error about a field. ``key`` None: about the mapping itself."""
        self.report.error(self.path if key is None else (*self.path, key), message, slug=slug)

    def warning(self, key: str | None, message: str, *, slug: str) -> None:
        """Record a warning about a field. ``key`` None: about the mapping itself."""
        self.report.warning(self.path if key is None else (*self.path, key), message, slug=slug)

    def ignore(self, *keys: str) -> None:
        """Mark fields as known without reading them."""
        self._known.extend(keys)

    def missing(self, key: str) -> None:
        """Record that a required field is absent."""
        self.error(None, f"the field `{key}` is required", slug="required")

    def _wrong_type(self, key: str, wanted: str) -> None:
        seen = self.report.describe((*self.path, key), self._value.get(key))
        self.error(key, f"must be {wanted}, is {seen}", slug="type")

    # --- scalars ----------------------------------------------------------------------------------------------------

    def string(self, key: str) -> str | None:
        """A string field; None if the field is absent or of another type."""
        value = self.raw(key)
        if value is None or isinstance(value, str):
            return value
        self.report.wrong_text((*self.path, key), value)
        return None

    def required_string(self, key: str) -> str:
        """A string field that must be present and not empty.

        If it is not, a problem is recorded and the result is "".
        """
        if not self.has(key) or self._value[key] == "":
            self._known.append(key)
            self.missing(key)
            return ""
        return self.string(key) or ""

    def enum(self, key: str, allowed: Sequence[str], *, required: bool = False) -> str | None:
        """A string field with one of the values ``allowed``; None if the field is absent or wrong."""
        value = self.required_string(key) if required else self.string(key)
        if value is None or value in allowed:
            return value
        if value or not required:
            self.error(key, not_one_of(value, allowed), slug="enum")
        return None

    def boolean(self, key: str) -> bool:
        """A boolean field; False if the field is absent or of another type."""
        value = self.raw(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self._wrong_type(key, "true or false (without quotes)")
        return False

    def integer(self, key: str, low: int, high: int) -> int | None:
        """An integer field from ``low`` to ``high``, both included; None if the field is absent or wrong."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            quotes = " (without quotes)" if isinstance(value, str) else ""
            self._wrong_type(key, f"a whole number from {low} to {high}{quotes}")
            return None
        if not low <= value <= high:
            seen = self.report.describe((*self.path, key), value)
            self.error(key, f"must be from {low} to {high}, is {seen}", slug="range")
            return None
        return int(value)

    def number(self, key: str) -> float | None:
        """A field with a finite number; None if the field is absent or wrong."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            self._wrong_type(key, "a number (without quotes)")
            return None
        return float(value)

    # --- containers -------------------------------------------------------------------------------------------------

    def mapping(self, key: str) -> Reader | None:
        """A cursor over a nested mapping; None if the field is absent or of another type."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self._wrong_type(key, "a mapping")
            return None
        return Reader(value, (*self.path, key), self.report)

    def list(self, key: str) -> Sequence[Any]:
        """A list with items of any type; empty if the field is absent or of another type."""
        value = self.raw(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            self._wrong_type(key, "a list (each item begins with `- `)")
            return ()
        return value

    def mappings(self, key: str) -> Iterator[Reader]:
        """Cursors over a list of mappings. Items of another type are reported and left out."""
        for index, value in enumerate(self.list(key)):
            path = (*self.path, key, index)
            if isinstance(value, Mapping):
                yield Reader(value, path, self.report)
            else:
                self.report.error(path, f"must be a mapping, is {self.report.describe(path, value)}", slug="type")

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings. Items of another type are reported and left out."""
        return tuple(text for _, text in self.indexed_strings(key))

    def indexed_strings(self, key: str) -> Iterator[tuple[Path, str]]:
        """A list of strings, each with its path. Items of another type are reported and left out."""
        for index, value in enumerate(self.list(key)):
            path = (*self.path, key, index)
            if isinstance(value, str):
                yield path, value
            else:
                self.report.wrong_text(path, value)

    def refuse_line_breaks(self, key: str) -> None:
        """Report strings with a line break in a list.

        Callers use this for fields in which such a string can match nothing.
        """
        for path, text in self.indexed_strings(key):
            if "\n" in text:
                self.report.error(path, f"holds a line break, so it matches nothing: {describe(text)}")

    def string_map(self, key: str, check: Callable[[str, str], str | None] | None = None) -> dict[str, str]:
        """A mapping of strings to strings. ``check``: returns the fault of an entry (key, value), or None."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self._wrong_type(key, "a mapping of names to text")
            return {}
        result = {}
        for name, text in value.items():
            if not isinstance(text, str) or not isinstance(name, str):
                self.report.wrong_text((*self.path, key, name), text)
                continue
            result[name] = text
            if check is not None and (message := check(name, text)) is not None:
                self.report.error((*self.path, key, name), message, slug="label")
        return result

    # --- the end ----------------------------------------------------------------------------------------------------

    def done(self, hints: Mapping[str, str] | None = None) -> None:
        """Report every field that was never read. ``hints``: messages for known mistakes, by the field's name."""
        if len(self._value) <= len(self._known) and self._value.keys() <= set(self._known):
            return
        known = list(dict.fromkeys(self._known))
        for key in self._value:
            if key in known:
                continue
            if hints is not None and key in hints:
                self.error(
                    key, hints[key], slug="wrong-depth" if "wrong indentation level" in hints[key] else "unknown-field"
                )
                continue
            near = suggestion(str(key), known)
            what = near or f"; the fields here are {', '.join(known)}"
            self.error(str(key), f"unknown field `{key}`{what}", slug="unknown-field")


def not_one_of(value: str, allowed: Sequence[str]) -> str:
    """The message for a ``value`` that is not in ``allowed``."""
    return f"must be one of {', '.join(allowed)}; is {describe(value)}{suggestion(value, allowed)}"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
