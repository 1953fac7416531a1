# SPDX-License-Identifier: Apache-2.0
"""YAML and JSON text to plain values with positions: what was written, and where.

One pass over the parser's events builds, for each document, the values (dict, list, str, int, float, bool, None) and
beside them a compact tree of positions, so that a problem found later names its line without a second parse.

Invariant: whatever the input, the result is documents and problems, never an exception and never unbounded work
(nesting and alias expansion are limited).  A syntax error ends one document, not the file.  Scalars are read as
kubectl reads them (YAML 1.1 words and numbers, but neither timestamps nor base-60 numbers: ``1:30`` is a port range).
This module knows nothing of Kubernetes objects beyond the wording of its hints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union

import yaml

from netpol_ebpf.errors import Location, Problem

Path = tuple[Union[str, int], ...]

# A position is line << 24 | column, both zero-based.  A leaf's mark is its position; a container's mark is its position
# and the marks of its children.  In a mapping the position of an entry is that of its key.
_Mark = Union[int, tuple[int, Any]]

_COLUMN_BITS = 24
_COLUMN_MASK = (1 << _COLUMN_BITS) - 1

MAX_DEPTH = 100  # arbitrary; real objects stay below 30
MAX_ALIAS_NODES = 1_000_000  # arbitrary; what all aliases of one document may expand to

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_ABSENT: Any = object()
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_MAYBE_NOT_TEXT = frozenset("0123456789+-.~nNtTfFyYoO")
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,39})\Z")
_BASED = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]{1,32}|0[bB][01]{1,128}|0[oO]?[0-7]{1,42})\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9]{1,40}\.[0-9]{0,400}|\.[0-9]{1,400}|[0-9]{1,40}(?=[eE]))(?:[eE][-+]?[0-9]{1,4})?\Z")
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the parts of one value stand in its file; a value without known positions has only the file."""

    file: str
    mark: _Mark | None = None

    def location(self, path: Path = ()) -> Location:
        """The location of ``path``, or of its deepest part that was written (a missing field: its parent)."""
        mark = self.mark
        if mark is None:
            return Location(self.file)
        for step in path:
            below = _step(mark, step)
            if below is None:
                break
            mark = below
        position = mark if isinstance(mark, int) else mark[0]
        return Location(self.file, (position >> _COLUMN_BITS) + 1, (position & _COLUMN_MASK) + 1)

    def child(self, path: Path) -> Positions:
        """The positions of the value at ``path``; of its deepest part that was written when it is missing."""
        mark = self.mark
        for step in path:
            below = None if mark is None else _step(mark, step)
            if below is None:
                break
            mark = below
        return Positions(self.file, mark)


def _step(mark: _Mark, step: str | int) -> _Mark | None:
    if isinstance(mark, int):
        return None
    children = mark[1]
    if isinstance(step, str):
        found: _Mark | None = children.get(step) if isinstance(children, dict) else None
        return found
    if isinstance(children, list) and 0 <= step < len(children):
        item: _Mark = children[step]
        return item
    return None


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file: its value and where its parts stand."""

    value: Any
    positions: Positions


class _Refused(Exception):  # noqa: N818 - control flow inside this module: a limit ends the document
    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


def read_documents(text: str, file: str, problems: list[Problem]) -> Iterator[Document]:
    """Yield the documents of ``text`` (empty ones left out); append what is wrong with them to ``problems``.

    After a syntax error reading goes on at the next line that begins with ``---``.
    """
    text = text.removeprefix("\ufeff")
    start_line = 0
    lines: list[str] | None = None
    chunk = text
    while True:
        builder = _Builder(chunk, file, start_line, problems)
        try:
            yield from builder.documents()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            failed_at = start_line + (mark.line if mark is not None else 0)
            if builder.first and (value := _as_json(text)) is not _ABSENT:
                yield Document(value, Positions(file, 0))
                return
            if lines is None:
                lines = text.split("\n")
            problems.extend(_syntax_problems(error, lines, start_line, failed_at, file))
        except yaml.YAMLError as error:  # the reader's: a character that YAML does not allow, without a mark
            if lines is None:
                lines = text.split("\n")
            failed_at = start_line + _bad_character_line(lines[start_line:])
            problems.append(Problem(Location(file, failed_at + 1), "", f"not valid YAML: {error}", slug="yaml"))
        except UnicodeEncodeError as error:
            line = text.count("\n", 0, text.find(error.object[error.start])) + 1
            problems.append(Problem(Location(file, line), "", "not valid Unicode text: a lone surrogate", slug="yaml"))
            return
        except _Refused as error:
            failed_at = error.position >> _COLUMN_BITS
            problems.append(Problem(_place(file, error.position), "", error.message, slug="yaml"))
            if lines is None:
                lines = text.split("\n")
        else:
            return
        following = next(
            (n for n in range(max(failed_at, start_line + 1), len(lines)) if lines[n].startswith("---")), None
        )
        if following is None:
            return
        start_line = following
        chunk = "\n".join(lines[start_line:])


class _Builder:
    """Builds the documents of one stream from the parser's events."""

    def __init__(self, text: str, file: str, first_line: int, problems: list[Problem]) -> None:
        self.file = file
        self.offset = first_line << _COLUMN_BITS
        self.problems = problems
        self.first = True
        self.loader = _LOADER(text)

    def documents(self) -> Iterator[Document]:
        """Yield each document that is not empty."""
        get_event = self.loader.get_event
        end = yaml.StreamEndEvent
        start = yaml.DocumentStartEvent
        while True:
            event = get_event()
            kind = type(event)
            if kind is end:
                return
            if kind is start:
                value, mark = self._document()
                if value is not None:
                    yield Document(value, Positions(self.file, mark))
                self.first = False

    def _problem(self, position: int, message: str) -> None:
        self.problems.append(Problem(_place(self.file, position), "", message, slug="yaml"))

    def _document(self) -> tuple[Any, _Mark]:
        """Read one document; the loop handles an event per turn and keeps the open containers on a stack of its own."""
        get_event = self.loader.get_event
        offset = self.offset
        root: list[Any] = []
        root_marks: list[_Mark] = []
        container: Any = root
        marks: Any = root_marks
        key: str | None = None
        key_position = 0
        stack: list[tuple[Any, Any, str | None, int, str | None, int]] = []
        anchors: dict[str, tuple[Any, _Mark, int]] = {}
        nodes = 0
        aliased = 0
        while True:
            event = get_event()
            kind = type(event)
            if kind is yaml.ScalarEvent:
                nodes += 1
                where = event.start_mark
                position = (where.line << _COLUMN_BITS | min(where.column, _COLUMN_MASK)) + offset
                if container.__class__ is dict and key is None:
                    key = event.value
                    key_position = position
                    if key in container and key != "<<":
                        self._duplicate(key, position, marks[key])
                    continue
                if event.tag is not None:
                    value = self._tagged(event, position)
                elif event.implicit[0]:
                    value = _plain(event.value)
                else:
                    value = event.value
                mark: _Mark = position
                if event.anchor is not None:
                    anchors[event.anchor] = (value, mark, 1)
            elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
                nodes += 1
                where = event.start_mark
                position = (where.line << _COLUMN_BITS | min(where.column, _COLUMN_MASK)) + offset
                if container.__class__ is dict and key is None:
                    raise _Refused("a key must be a plain word, not a list or a mapping", position)
                if len(stack) >= MAX_DEPTH:
                    raise _Refused(f"nested deeper than {MAX_DEPTH} levels", position)
                if event.tag is not None and event.tag not in (_TAG + "map", _TAG + "seq"):
                    self._problem(position, f"the tag {event.tag} is not supported; remove it")
                below: Any
                value, below = ({}, {}) if kind is yaml.MappingStartEvent else ([], [])
                mark = (position if key is None else key_position, below)
                stack.append((container, marks, key, key_position, event.anchor, nodes + aliased))
                _attach(container, marks, key, value, mark)
                container, marks, key = value, below, None
                continue
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                if kind is yaml.MappingEndEvent and "<<" in container:
                    self._merge(container, marks)
                done, done_marks = container, marks
                container, marks, key, key_position, anchor, before = stack.pop()
                if anchor is not None:
                    position = (event.start_mark.line << _COLUMN_BITS) + offset
                    anchors[anchor] = (done, (position, done_marks), nodes + aliased - before + 1)
                key = None
                continue
            elif kind is yaml.AliasEvent:
                where = event.start_mark
                position = (where.line << _COLUMN_BITS | min(where.column, _COLUMN_MASK)) + offset
                if event.anchor not in anchors:
                    raise _Refused(
                        f"*{event.anchor} refers to no anchor before it (or to one that contains it)", position
                    )
                value, mark, size = anchors[event.anchor]
                aliased += size
                if aliased > MAX_ALIAS_NODES:
                    raise _Refused(f"the aliases expand to more than {MAX_ALIAS_NODES} values", position)
                if container.__class__ is dict and key is None:
                    if not isinstance(value, str):
                        raise _Refused("a key must be a plain word", position)
                    key, key_position = value, position
                    if key in container:
                        self._duplicate(key, position, marks[key])
                    continue
                if not isinstance(mark, int):
                    mark = (position, mark[1])
            else:  # the end of the document
                return (root[0], root_marks[0]) if root else (None, offset)
            if container.__class__ is dict:
                container[key] = value
                marks[key] = key_position if isinstance(mark, int) else (key_position, mark[1])
                key = None
            else:
                container.append(value)
                marks.append(mark)

    def _duplicate(self, key: str, position: int, first: _Mark) -> None:
        line = ((first if isinstance(first, int) else first[0]) >> _COLUMN_BITS) + 1
        self._problem(position, f"the key `{key}` is given twice (first in line {line}); keep one of them")

    def _tagged(self, event: Any, position: int) -> Any:
        tag, text = event.tag, event.value
        if tag in (_TAG + "str", "!"):
            return text
        value = _plain(text)
        kinds = {"int": int, "float": (int, float), "bool": bool, "null": type(None)}
        if tag.startswith(_TAG) and tag[len(_TAG) :] in kinds:
            if isinstance(value, kinds[tag[len(_TAG) :]]):  # type: ignore[arg-type]  # a type or a tuple of types
                return value
            self._problem(position, f"`{text}` is not a value of the type its tag names")
            return None
        self._problem(position, f"the tag {tag} is not supported; remove it")
        return text

    def _merge(self, container: dict[str, Any], marks: dict[str, _Mark]) -> None:
        """Apply a YAML merge key: entries of the named mapping(s) that this one does not give itself."""
        source = container.pop("<<")
        mark = marks.pop("<<")
        sources = source if isinstance(source, list) else [source]
        below = [] if isinstance(mark, int) else (mark[1] if isinstance(source, list) else [mark])
        for one, one_mark in zip(sources, below, strict=False):
            if not isinstance(one, dict):
                break
            for name, value in one.items():
                if name not in container:
                    container[name] = value
                    marks[name] = one_mark[1][name]
        if not sources or not all(isinstance(one, dict) for one in sources):
            self._problem(mark if isinstance(mark, int) else mark[0], "`<<` takes a mapping, as in `<<: *anchor`")


def _attach(container: Any, marks: Any, key: str | None, value: Any, mark: _Mark) -> None:
    if container.__class__ is dict:
        container[key] = value
        marks[key] = mark
    else:
        container.append(value)
        marks.append(mark)


def _plain(text: str) -> Any:
    """The value of a plain (unquoted, untagged) scalar."""
    if not text:
        return None
    if text[0] not in _MAYBE_NOT_TEXT:
        return text
    value = _WORDS.get(text, _ABSENT)
    if value is not _ABSENT:
        return value
    if _DECIMAL.match(text):
        return int(text)
    if _BASED.match(text):
        digits = text.lstrip("+-")
        if digits[1] not in "xXbBoO":
            digits = "0o" + digits[1:]
        return int(digits, 0) * (-1 if text[0] == "-" else 1)
    if _FLOAT.match(text):
        return float(text)
    return text


def _place(file: str, position: int) -> Location:
    return Location(file, (position >> _COLUMN_BITS) + 1, (position & _COLUMN_MASK) + 1)


def _as_json(text: str) -> Any:
    """The value of ``text`` when it is JSON that YAML cannot read (surrogate pairs in escapes), or the absent marker."""
    if not text.lstrip().startswith(("{", "[")):
        return _ABSENT
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _ABSENT


def _bad_character_line(lines: list[str]) -> int:
    """The index of the first line with a character that YAML does not allow."""
    forbidden = re.compile("[^\t\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff\r]")
    return next((n for n, line in enumerate(lines) if forbidden.search(line)), 0)


# --- syntax errors --------------------------------------------------------------------------------------------------

_FIELD_LINE = re.compile(r"( *)(ports|from|to):(?:\s.*)?\Z")


def _syntax_problems(
    error: yaml.MarkedYAMLError, lines: list[str], start_line: int, failed_at: int, file: str
) -> list[Problem]:
    """What the parser says, in words that name the usual slip behind it where there is one."""
    first = next(
        (n for n in range(failed_at, start_line, -1) if lines[n - 1 : n] and lines[n - 1][:3] == "---"), start_line
    )
    last = next((n for n in range(failed_at + 1, len(lines)) if lines[n].startswith("---")), len(lines))
    slips = _wrong_depth(lines, first, last)
    if slips and slips[0][0] <= failed_at:
        return [
            Problem(Location(file, line + 1, column + 1), "", message, slug="wrong-depth")
            for line, column, message in slips
        ]
    said = error.problem or "the text cannot be read"
    if error.context and error.context_mark is not None:
        said += f" ({error.context} that begins in line {start_line + error.context_mark.line + 1})"
    written = lines[failed_at] if failed_at < len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or "'\\t'" in said:
        said += "; indent with spaces, a tab is not allowed"
    elif "{{" in "\n".join(lines[max(first, failed_at - 1) : failed_at + 2]):
        said += "; this looks like a template: render it first (for example with `helm template`)"
    elif "mapping values are not allowed" in said:
        said += "; check the indentation, and quote text that contains `: `"
    elif "expected" in said:
        said += "; check the indentation of this line against the lines above it"
    mark = error.problem_mark or error.context_mark
    column = mark.column + 1 if mark is not None else 0
    return [Problem(Location(file, failed_at + 1, column), "", f"not valid YAML: {said}", slug="yaml")]


def _wrong_depth(lines: list[str], first: int, last: int) -> list[tuple[int, int, str]]:
    """Fields of a rule that stand at the depth of the list's dashes: (line, column, message), zero-based.

    The classic slip is ``ports:`` under ``ingress:`` beside ``- from:`` instead of inside that item.
    """
    found = []
    for number in range(first, min(last, len(lines))):
        match = _FIELD_LINE.match(lines[number].rstrip("\r"))
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        for above in range(number - 1, first - 1, -1):
            text = lines[above]
            content = text.lstrip(" ")
            indent = len(text) - len(content)
            if not content.strip() or content.startswith("#") or indent > depth:
                continue
            if indent == depth and content.startswith("- "):
                item = content.strip().split(":")[0]
                inside = len(content) - len(content[1:].lstrip(" ")) + depth
                found.append((number, depth, _wrong_depth_message(name, item, above + 1, inside - depth)))
                break
            if indent < depth or not _FIELD_LINE.match(text.rstrip("\r")):
                break
    return found


def _wrong_depth_message(name: str, item: str, line: int, columns: int) -> str:
    return (
        f"`{name}:` stands at the wrong depth: beside the `{item}:` item of line {line}, at the depth of its dash, instead "
        f"of inside the item. Move `{name}:` and the lines that belong to it {columns} columns to the right, inside "
        f"the `{item}:` item, so that `{name}:` stands under `{item.removeprefix('- ')}:`"
    )
