# SPDX-License-Identifier: Apache-2.0
"""Parses YAML and JSON text to plain values with their positions in the text.

One pass over the parser's events builds, for each document, the values (dict, list, str, int, float, bool, None) and a
compact tree of positions.  So a problem that is found later has its line without a second parse.

Scalars and keys are read as kubectl reads them (`scalars`).  JSON values may follow each other without ``---`` between
them, as `jq -c` prints them.  `yaml_mistakes` writes the messages for invalid text.

Invariants: any input gives documents and problems, without an exception, and with bounded work (nesting and alias
expansion are limited).  Every text in a document can be written as UTF-8.  After a syntax error the next document is
read.  This module must not depend on Kubernetes objects.
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
from netpol_ebpf.resources.scalars import key_text, read_plain
from netpol_ebpf.resources.sharing import share

Path = tuple[Union[str, int], ...]

# A position is line << 24 | column, both zero-based.  The mark of a scalar is its position, with the source text if the
# value does not determine it (0755 is 493).  The mark of a container is its position and its children's marks.  The
# position of an entry of a mapping is that of its key.
_Mark = Union[int, tuple[int, Any]]

_COLUMN_BITS = 24
_COLUMN_MASK = (1 << _COLUMN_BITS) - 1

MAX_DEPTH = 100  # arbitrary; real objects stay below 30
MAX_ALIAS_NODES = 1_000_000  # arbitrary; number of nodes to which all aliases of one document may expand

MAX_QUOTED = 100  # arbitrary; characters of a text in a message

MAX_JSON_COLUMN = 10_000  # arbitrary; for JSON values further to the right, messages have a column that is too low

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_LONGEST_PLAIN_FLOAT = 1e21
"""Go's JSON encoder writes numbers from this value on with an exponent."""

# Characters that are line breaks in YAML 1.1, which folds them, and ordinary characters of strings in JSON.
_BREAKS_OF_YAML = re.compile("[\x85\u2028\u2029]")
# Escapes of halves of surrogate pairs.  JSON joins two halves, libyaml rejects a half, PyYAML's own parser keeps it.
_SURROGATE = re.compile(r"\\(?:u|U0000)[dD][89a-fA-F]")
_MARK = re.compile(r"^---(?=\s|\Z)", re.MULTILINE)
_BLANK = re.compile(r"(?:\s+|#[^\n]*|^\.\.\.(?=\s|\Z))*", re.MULTILINE)
_MORE_OF_YAML = re.compile(r"[ \t]*[^\s#{[]")
_TAG = "tag:yaml.org,2002:"
_TAGGED: dict[str, tuple[type, ...]] = {
    _TAG + "int": (int,),
    _TAG + "float": (int, float),
    _TAG + "bool": (bool,),
    _TAG + "null": (type(None),),
}


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions of the parts of one value in its file.

    ``mark``: the position of the value and, for a list or mapping, of its parts.  None if positions are unknown; then
    locations have only the file.
    """

    file: str
    mark: _Mark | None = None

    def location(self, path: Path = ()) -> Location:
        """The location of ``path``. If the path does not exist, the location of its deepest part that exists."""
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
        """The source text of the scalar at ``path``, such as ``0755`` for 493.

        None if the value determines the source text.
        """
        mark = self.mark
        for step in path:
            if mark is None:
                return None
            mark = _step(mark, step)
        if isinstance(mark, tuple) and isinstance(mark[1], str):
            return mark[1]
        return None

    def child(self, path: Path) -> Positions:
        """The positions of the value at ``path``.

        If the path does not exist, the positions at its deepest part that exists.
        """
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
    """One document of a file: its value and the positions of its parts."""

    value: Any
    positions: Positions


class _Refused(Exception):  # noqa: N818 - control flow inside this module: a limit ends the document
    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


def read_documents(text: str, file: str, problems: list[Problem]) -> Iterator[Document]:
    """Yield the documents of ``text`` that are not empty, and append their problems to ``problems``.

    Each JSON value is a document, with or without ``---`` between two of them.  After a syntax error reading continues
    at the next line that begins with ``---``.
    """
    yield from _Text(text.removeprefix("\ufeff"), file, problems).documents()


class _Text:
    """A whole file: runs of YAML documents and of JSON values, read one after the other.

    ``offset``: the offset in the text at which reading continues.
    ``line``: the number of the line at ``offset``.
    ``line_offset``: the offset of the start of that line.
    """

    def __init__(self, text: str, file: str, problems: list[Problem]) -> None:
        self.text = text
        self.file = file
        self.problems = problems
        self.offset = 0
        self.line = 0
        self.line_offset = 0

    def documents(self) -> Iterator[Document]:
        """Yield each document that is not empty."""
        if _SURROGATE.search(self.text) is None:
            yield from self._documents()
            return
        for document in self._documents():
            text = _unwritable(document.value)
            if text is None:
                yield document
                continue
            message = (
                f"the text {_quoted(text)} holds half of a surrogate pair, which is no character; write the character"
            )
            self.problems.append(Problem(document.positions.location(), "", message, slug="encoding"))

    def _documents(self) -> Iterator[Document]:
        is_after_json = False
        while (begin := _end_of_blank(self.text, self.offset)) < len(self.text):
            mark = _MARK.match(self.text, begin)
            json_begin = begin if mark is None else _end_of_blank(self.text, mark.end())
            json_end = _end_of_json(self.text, json_begin)
            if json_end is not None:
                self._go_to(json_begin)
                yield from self._json(json_end)
                is_after_json = True
            elif is_after_json and mark is None:
                self._go_to(begin)
                message = "not valid YAML: a document that is not JSON begins here; write `---` in a line before it"
                self.problems.append(Problem(_place(self.file, self._position()), "", message, slug="yaml"))
                self._go_to_mark(begin)
                is_after_json = False
            else:
                if mark is not None:
                    self._go_to(begin)
                yield from self._yaml()
                is_after_json = False

    def _go_to(self, offset: int) -> None:
        self.line += self.text.count("\n", self.offset, offset)
        self.line_offset = max(self.line_offset, self.text.rfind("\n", self.offset, offset) + 1)
        self.offset = offset

    def _go_to_mark(self, offset: int) -> None:
        """Continue at the first line from ``offset`` on that begins with ``---``, or at the end of the file."""
        mark = _MARK.search(self.text, offset)
        self._go_to(len(self.text) if mark is None else mark.start())

    def _position(self) -> int:
        return self.line << _COLUMN_BITS | min(self.offset - self.line_offset, MAX_JSON_COLUMN)

    def _json(self, end: int) -> Iterator[Document]:
        """The document of the JSON value from the present offset to ``end``.

        The value is parsed as YAML to get positions.  If YAML reads the text differently from JSON, it is parsed as
        JSON.
        """
        position, known = self._position(), len(self.problems)
        text, first_line = self.text[self.offset : end], self.line
        self._go_to(end)
        document: Document | None = None
        if not _BREAKS_OF_YAML.search(text) and not _SURROGATE.search(text):
            stream = _Stream(" " * (position & _COLUMN_MASK) + text, self.file, first_line, self.problems)
            try:
                stream.start()
                document = next(stream.documents(), None)
            except _Refused as error:
                _report(error, self.text.split("\n"), first_line, self.file, self.problems)
                return
            except (yaml.YAMLError, UnicodeEncodeError):  # for example, YAML does not allow a tab here
                del self.problems[known:]
        if document is None:
            place = _place(self.file, position)
            value = _unique_json(text, place, self.problems)
            if _is_too_deep(value):
                self.problems.append(Problem(place, "", f"nested deeper than {MAX_DEPTH} levels", slug="yaml"))
                return
            document = Document(value, Positions(self.file, position))
        yield document

    def _yaml(self) -> Iterator[Document]:
        """The YAML documents from the present offset on.

        Reading stops at a JSON value after a document, or at the first invalid document.
        """
        stream = _Stream(self.text[self.offset :], self.file, self.line, self.problems)
        try:
            stream.start()
            yield from stream.documents()
        except (yaml.YAMLError, UnicodeEncodeError, _Refused) as error:
            json_begin = self._json_behind(stream, error)
            if json_begin is not None:
                if stream.begin is not None:
                    del self.problems[stream.known :]  # problems of a document that is read again
                self._go_to(json_begin)
                return
            lines = self.text.split("\n")
            failed_at = _report(error, lines, self.line, self.file, self.problems)
            self._go_to_mark(sum(len(line) + 1 for line in lines[: max(failed_at, self.line + 1)]))
        else:
            self._go_to(len(self.text))

    def _json_behind(self, stream: _Stream, error: Exception) -> int | None:
        """The offset of the JSON value at which the YAML parser failed; None if there is no JSON value.

        The value is the document that the parser could not read, or the text after the last document.
        """
        index = stream.begin
        if index is None and isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            index = error.problem_mark.index
        if index is None:
            return None
        begin = _end_of_blank(self.text, self.offset + index)
        return None if _end_of_json(self.text, begin) is None else begin


def _end_of_blank(text: str, offset: int) -> int:
    """The end of white space, comments and document end marks that begin at ``offset``."""
    match = _BLANK.match(text, offset)
    return offset if match is None else match.end()


def _end_of_json(text: str, offset: int) -> int | None:
    """The end of the JSON object or list at ``offset``.

    None if there is none, or if other text follows in its last line.
    """
    if not text.startswith(("{", "["), offset):
        return None
    try:
        _, end = _JSON.raw_decode(text, offset)
    except (ValueError, RecursionError):
        return None
    return None if _MORE_OF_YAML.match(text, end) else end


def _report(error: Exception, lines: list[str], first_line: int, file: str, problems: list[Problem]) -> int:
    """Record the error that ended reading. Returns the line of the error (zero-based)."""
    if isinstance(error, _Refused):
        failed_at = error.position >> _COLUMN_BITS
        message = error.message + yaml_mistakes.template_hint(lines, failed_at)
        problems.append(Problem(_place(file, error.position), "", message, slug="yaml"))
    elif isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        failed_at = first_line + (mark.line if mark is not None else 0)
        problems.extend(yaml_mistakes.explain(error, lines, first_line, failed_at, file))
    else:  # the error is about a character that YAML does not allow, and has neither line nor column
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
        self.begin: int | None = None  # index of the document that is being read
        self.known = 0  # how many problems were known when it began
        self.get_event: Any = None

    def start(self) -> None:
        """Create the parser, which rejects some texts at once."""
        self.get_event = _LOADER(self.text).get_event

    def documents(self) -> Iterator[Document]:
        while True:
            event = self.get_event()
            kind = type(event)
            if kind is yaml.StreamEndEvent:
                return
            if kind is yaml.DocumentStartEvent:
                self.begin = event.start_mark.index + (len("---") if event.explicit else 0)
                self.known = len(self.problems)
                value, mark = _Tree(self).read()
                self.begin = None
                if value is not None:
                    yield Document(value, Positions(self.file, mark))


class _Tree:
    """Builds the value of one document, and the tree of its positions (marks), from the parser's events.

    The class uses no recursion, so nesting cannot exhaust the stack.
    """

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
        """Return the document's value and the tree of its positions."""
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
        """The text of a key without quotes. If the key is a number or boolean, the text is the same as in kubectl."""
        value = read_plain(text)
        if isinstance(value, str):
            return text
        if value is None:
            self._problem(position, f'the key `{text}` is read as nothing; put it in quotes: "{text}"')
            return text
        key = key_text(value)
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
        """Add a value to its container. An entry of a mapping gets the position of its key."""
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
        """Apply a YAML merge key (``<<``): add the entries of the merged mappings, except keys of ``container``."""
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
    """A number as the API server gets it, in JSON: a float without fraction (``80.0``, ``1e3``) becomes an integer."""
    if value.__class__ is float and math.isfinite(value) and value.is_integer() and abs(value) < _LONGEST_PLAIN_FLOAT:
        return int(value)
    return value


def _is_told_by(value: Any, text: str) -> bool:
    """Whether ``text`` is the canonical form of ``value`` (number, boolean or null), so that it need not be stored."""
    if value is None:
        return text in ("", "null")
    if value.__class__ is bool:
        return text == ("true" if value else "false")
    return str(value) == text


def _place(file: str, position: int) -> Location:
    return Location(file, (position >> _COLUMN_BITS) + 1, (position & _COLUMN_MASK) + 1)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity


_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=lambda text: _as_json_number(float(text)))


def _unwritable(value: Any) -> str | None:
    """The first string in the value, key or text, that cannot be encoded as UTF-8; None if there is none."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                return one
        elif isinstance(one, dict):
            rest += [*one.values(), *one]
        elif isinstance(one, list):
            rest += one
    return None


def _quoted(text: str) -> str:
    """``text`` with escapes for the characters that UTF-8 cannot encode."""
    return f"`{text.encode('ascii', 'backslashreplace').decode()[:MAX_QUOTED]}`"


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            below
            for one in level
            if isinstance(one, (dict, list))
            for below in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, (dict, list)) for one in level)


def _unique_json(text: str, place: Location, problems: list[Problem]) -> Any:
    """Parse a JSON text that YAML would read differently. A repeated key is recorded as a problem."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            problems.append(Problem(place, "", f"the key `{twice}` is given twice; keep one of them", slug="yaml"))
        return value

    return json.loads(text, object_pairs_hook=unique, parse_float=_JSON.parse_float)
