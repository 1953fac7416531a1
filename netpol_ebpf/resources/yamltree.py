# SPDX-License-Identifier: Apache-2.0
"""YAML and JSON text to plain values with positions: what was written, and where.

One pass over the parser's events builds, for each document, the values (dict, list, str, int, float, bool, None) and
beside them a compact tree of positions, so that a problem found later names its line without a second parse.

Invariant: whatever the input, the result is documents and problems, never an exception and never unbounded work
(nesting and alias expansion are limited).  A syntax error ends one document, not the file.  Scalars and keys are read as
kubectl reads them (`scalars`).  JSON values may follow each other without ``---`` between them, as `jq -c` prints them.
This module knows nothing of Kubernetes objects; `yaml_mistakes` words what is wrong with a text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Union

import yaml

from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.resources import yaml_mistakes
from netpol_ebpf.resources.scalars import read_plain
from netpol_ebpf.resources.sharing import share

Path = tuple[Union[str, int], ...]

# A position is line << 24 | column, both zero-based.  A leaf's mark is its position, or its position and the text that was
# written where the value alone does not tell it (0755 is 493); a container's mark is its position and the marks of its
# children.  In a mapping the position of an entry is that of its key.
_Mark = Union[int, tuple[int, Any]]

_COLUMN_BITS = 24
_COLUMN_MASK = (1 << _COLUMN_BITS) - 1

MAX_DEPTH = 100  # arbitrary; real objects stay below 30
MAX_ALIAS_NODES = 1_000_000  # arbitrary; what all aliases of one document may expand to

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_LONGEST_PLAIN_FLOAT = 1e21
"""From here on Go's encoding of JSON writes a number with an exponent."""

_ABSENT: Any = object()
# Line breaks to YAML 1.1, which folds them, and ordinary characters inside a string to JSON.
_NO_BREAKS_IN_JSON = re.compile("[\x85\u2028\u2029]")
_TAG = "tag:yaml.org,2002:"
_TAGGED: dict[str, tuple[type, ...]] = {
    _TAG + "int": (int,),
    _TAG + "float": (int, float),
    _TAG + "bool": (bool,),
    _TAG + "null": (type(None),),
}


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the parts of one value stand in its file; a value without known positions has only the file."""

    file: str
    mark: _Mark | None = None

    def location(self, path: Path = ()) -> Location:
        """The location of ``path``, or of its deepest part that was written (a missing field: its parent)."""
        mark = self.mark
        if mark is None:
            return share(Location(self.file))
        for step in path:
            below = _step(mark, step)
            if below is None:
                break
            mark = below
        position = mark if isinstance(mark, int) else mark[0]
        return Location(self.file, (position >> _COLUMN_BITS) + 1, (position & _COLUMN_MASK) + 1)

    def written(self, path: Path) -> str | None:
        """The text of the scalar at ``path`` where its value alone does not tell it (``0755``, ``yes``, ``null``); else None."""
        mark = self.mark
        for step in path:
            if mark is None:
                return None
            mark = _step(mark, step)
        if isinstance(mark, tuple) and isinstance(mark[1], str):
            return mark[1]
        return None

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
    if _NO_BREAKS_IN_JSON.search(text) and (value := _as_json(text, problems, file)) is not _ABSENT:
        yield Document(value, Positions(file, 0))
        return
    lines: list[str] | None = None
    chunk, first_line = text, 0
    while True:
        stream = _Stream(chunk, file, first_line, problems)
        try:
            stream.start()
            yield from stream.documents()
        except (yaml.YAMLError, UnicodeEncodeError, _Refused) as error:
            if (
                first_line == 0
                and not stream.documents_seen
                and (value := _as_json(text, problems, file)) is not _ABSENT
            ):
                yield Document(value, Positions(file, 0))
                return
            lines = text.split("\n") if lines is None else lines
            failed_at = _report(error, lines, first_line, file, problems)
        else:
            return
        following = range(max(failed_at, first_line + 1), len(lines))
        first_line = next((number for number in following if lines[number].startswith("---")), -1)
        if first_line < 0:
            return
        chunk = "\n".join(lines[first_line:])


def _report(error: Exception, lines: list[str], first_line: int, file: str, problems: list[Problem]) -> int:
    """Record why reading stopped; the line (zero-based) at which it did."""
    if isinstance(error, _Refused):
        failed_at = error.position >> _COLUMN_BITS
        message = error.message + yaml_mistakes.template_hint(lines, failed_at)
        problems.append(Problem(_place(file, error.position), "", message, slug="yaml"))
    elif isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        failed_at = first_line + (mark.line if mark is not None else 0)
        problems.extend(yaml_mistakes.explain(error, lines, first_line, failed_at, file))
    else:  # a character that YAML does not allow: the reader says neither line nor column
        failed_at = first_line + yaml_mistakes.bad_character_line(lines[first_line:])
        problems.append(
            Problem(Location(file, failed_at + 1), "", f"not valid YAML: {error}".split("\n")[0], slug="yaml")
        )
    return failed_at


class _Stream:
    """One run of the parser over a text that begins at ``first_line`` of its file."""

    def __init__(self, text: str, file: str, first_line: int, problems: list[Problem]) -> None:
        self.text = text
        self.file = file
        self.offset = first_line << _COLUMN_BITS
        self.problems = problems
        self.documents_seen = 0
        self.get_event: Any = None

    def start(self) -> None:
        """Make the parser; it objects to some texts at once."""
        self.get_event = _LOADER(self.text).get_event

    def documents(self) -> Iterator[Document]:
        """Yield each document that is not empty."""
        while True:
            kind = type(self.get_event())
            if kind is yaml.StreamEndEvent:
                return
            if kind is yaml.DocumentStartEvent:
                value, mark = _Tree(self).read()
                self.documents_seen += 1
                if value is not None:
                    yield Document(value, Positions(self.file, mark))


class _Tree:
    """Builds the value and the marks of one document, an event at a time, without recursion."""

    __slots__ = (
        "aliased",
        "anchors",
        "container",
        "key",
        "key_position",
        "marks",
        "nodes",
        "offset",
        "stack",
        "stream",
    )

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream
        self.offset = stream.offset
        self.container: Any = []  # the container being filled; the outermost holds the document's one value
        self.marks: Any = []
        self.key: str | None = None  # in a mapping: the key whose value comes next
        self.key_position = 0
        self.stack: list[tuple[Any, Any, str | None, int]] = []
        self.anchors: dict[str, tuple[Any, _Mark, int]] = {}
        self.nodes = 0
        self.aliased = 0

    def read(self) -> tuple[Any, _Mark]:
        """The value and its mark."""
        handlers: dict[type[Any], Callable[[Any], None]] = {
            yaml.ScalarEvent: self._scalar,
            yaml.MappingStartEvent: partial(self._open, dict),
            yaml.SequenceStartEvent: partial(self._open, list),
            yaml.MappingEndEvent: self._close,
            yaml.SequenceEndEvent: self._close,
            yaml.AliasEvent: self._alias,
        }
        get_event = self.stream.get_event
        while True:
            event = get_event()
            handler = handlers.get(type(event))
            if handler is None:  # the end of the document
                return (self.container[0], self.marks[0]) if self.container else (None, self.offset)
            handler(event)

    def _position(self, event: Any) -> int:
        mark = event.start_mark
        position: int = (mark.line << _COLUMN_BITS | min(mark.column, _COLUMN_MASK)) + self.offset
        return position

    def _problem(self, position: int, message: str) -> None:
        self.stream.problems.append(Problem(_place(self.stream.file, position), "", message, slug="yaml"))

    def _scalar(self, event: Any) -> None:
        self.nodes += 1
        start = event.start_mark
        position = (start.line << _COLUMN_BITS | min(start.column, _COLUMN_MASK)) + self.offset
        text = event.value
        if self.key is None and self.container.__class__ is dict:
            is_plain = event.tag is None and event.implicit[0]
            key = self._plain_key(text, position) if is_plain else text
            if event.anchor is not None:
                self.anchors[event.anchor] = (key, position, 1)
            self._set_key(key, position)
            return
        if event.tag is not None:
            value = self._tagged(event, position)
        else:
            value = _as_json_number(read_plain(text)) if event.implicit[0] else text
        mark: _Mark = position if value.__class__ is str or _is_told_by(value, text) else (position, text)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, mark, 1)
        self._add(value, mark)

    def _plain_key(self, text: str, position: int) -> str:
        """A key without quotes, in the form that kubectl gives to keys that are no text."""
        value = read_plain(text)
        if value.__class__ is str:
            return text
        if value is None or isinstance(value, float):
            what = "nothing" if value is None else "a number"
            self._problem(position, f'the key `{text}` is read as {what}; put it in quotes: "{text}"')
            return text
        key = str(value).lower() if isinstance(value, bool) else str(value)
        if key != text:
            message = f'the key `{text}` is read as `{key}`, as kubectl reads it; put it in quotes: "{text}"'
            self.stream.problems.append(
                Problem(_place(self.stream.file, position), "", message, severity="warning", slug="yaml-key")
            )
        return key

    def _set_key(self, key: str, position: int) -> None:
        if key in self.container:
            first = self.marks[key]
            line = ((first if isinstance(first, int) else first[0]) >> _COLUMN_BITS) + 1
            self._problem(position, f"the key `{key}` is given twice (first in line {line}); keep one of them")
        self.key, self.key_position = key, position

    def _add(self, value: Any, mark: _Mark) -> None:
        """Put a value where it belongs; an entry of a mapping stands where its key does."""
        key = self.key
        if key is None:
            self.container.append(value)
            self.marks.append(mark)
            return
        self.container[key] = value
        self.marks[key] = self.key_position if isinstance(mark, int) else (self.key_position, mark[1])
        self.key = None

    def _open(self, kind: type[Any], event: Any) -> None:
        self.nodes += 1
        position = self._position(event)
        if self.key is None and self.container.__class__ is dict:
            raise _Refused("a key must be a plain word, not a list or a mapping", position)
        if len(self.stack) >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH} levels", position)
        if event.tag is not None and event.tag not in (_TAG + "map", _TAG + "seq"):
            self._problem(position, f"the tag {event.tag} is not supported; remove it")
        container, marks = kind(), kind()
        self._add(container, (position, marks))
        self.stack.append((self.container, self.marks, event.anchor, self.nodes + self.aliased))
        self.container, self.marks = container, marks

    def _close(self, event: Any) -> None:
        container, marks = self.container, self.marks
        if container.__class__ is dict and "<<" in container:
            self._merge(container, marks)
        self.container, self.marks, anchor, before = self.stack.pop()
        if anchor is not None:
            self.anchors[anchor] = (container, (self._position(event), marks), self.nodes + self.aliased - before + 1)

    def _alias(self, event: Any) -> None:
        position = self._position(event)
        if event.anchor not in self.anchors:
            raise _Refused(f"*{event.anchor} refers to no anchor before it (or to one that contains it)", position)
        value, mark, size = self.anchors[event.anchor]
        self.aliased += size
        if self.aliased > MAX_ALIAS_NODES:
            raise _Refused(f"the aliases expand to more than {MAX_ALIAS_NODES} values", position)
        if self.key is None and self.container.__class__ is dict:
            if not isinstance(value, str):
                raise _Refused("a key must be a plain word", position)
            self._set_key(value, position)
            return
        self._add(value, position if isinstance(mark, int) else (position, mark[1]))

    def _tagged(self, event: Any, position: int) -> Any:
        """The value of a scalar with an explicit tag."""
        tag, text = event.tag, event.value
        if tag in (_TAG + "str", "!"):
            return text
        if tag not in _TAGGED:
            self._problem(position, f"the tag {tag} is not supported; remove it")
            return text
        value = read_plain(text)
        if isinstance(value, _TAGGED[tag]):
            return _as_json_number(value)
        self._problem(position, f"`{text}` is not a value of the type its tag names")
        return None

    def _merge(self, container: dict[str, Any], marks: dict[str, _Mark]) -> None:
        """Apply a YAML merge key: entries of the named mapping(s) that this one does not give itself."""
        source, mark = container.pop("<<"), marks.pop("<<")
        sources = source if isinstance(source, list) else [source]
        if isinstance(mark, int) or not all(isinstance(one, dict) for one in sources):
            position = mark if isinstance(mark, int) else mark[0]
            self._problem(position, "`<<` takes a mapping, as in `<<: *anchor`")
            return
        below = mark[1] if isinstance(source, list) else [mark]
        for one, one_mark in zip(sources, below, strict=True):
            for name, value in one.items():
                if name not in container:
                    container[name] = value
                    marks[name] = one_mark[1][name]


def _as_json_number(value: Any) -> Any:
    """A number as it reaches the API server, which gets JSON: without a fraction it is a whole number (``80.0``, ``1e3``)."""
    if value.__class__ is float and math.isfinite(value) and value.is_integer() and abs(value) < _LONGEST_PLAIN_FLOAT:
        return int(value)
    return value


def _is_told_by(value: Any, text: str) -> bool:
    """Whether the text of a scalar that is no text is what a reader of its value would write."""
    if value is None:
        return not text
    if value.__class__ is bool:
        return text == ("true" if value else "false")
    return str(value) == text


def _place(file: str, position: int) -> Location:
    return Location(file, (position >> _COLUMN_BITS) + 1, (position & _COLUMN_MASK) + 1)


def _as_json(text: str, problems: list[Problem], file: str) -> Any:
    """The value of ``text`` when it is JSON that YAML cannot read (surrogate pairs in escapes), or the absent marker."""
    if not text.lstrip().startswith(("{", "[")):
        return _ABSENT

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            problems.append(
                Problem(Location(file), "", f"the key `{twice}` is given twice; keep one of them", slug="yaml")
            )
        return value

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return _ABSENT
