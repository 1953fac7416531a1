# SPDX-License-Identifier: Apache-2.0
"""Writes messages for text that is not valid YAML, with the mistake that usually causes the error.

The functions work on lines of text, because invalid text has no tree.  Line numbers are zero-based.  The parser decides
whether a text is valid; this module only writes messages.
"""

from __future__ import annotations

import re

import yaml

from netpol_ebpf.errors import Location, Problem

_RULE_FIELD = re.compile(r"( *)(ports|from|to):(?:\s.*)?\Z")
_KEY = re.compile(r"( *)(- +)*([A-Za-z][A-Za-z0-9]*):(?:\s|\Z)")
_NAMED = re.compile(r" +(name|namespace): *[\"']?([^\s\"'#]+)")
_WORD = re.compile(r"\s*[\"']?([A-Za-z]+)")
_NOT_YAML = re.compile("[^\t\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def bad_character_line(lines: list[str]) -> int:
    """The first line with a character that YAML does not allow; 0 if there is none."""
    return next((number for number, line in enumerate(lines) if _NOT_YAML.search(line)), 0)


def template_hint(lines: list[str], number: int) -> str:
    """A hint for the end of a message, if the text near line ``number`` looks like an unrendered template; else ""."""
    if "{{" in "\n".join(lines[max(0, number - 1) : number + 2]):
        return "; this looks like a template: render it first (for example with `helm template`)"
    return ""


def explain(error: yaml.MarkedYAMLError, lines: list[str], start: int, failed_at: int, file: str) -> list[Problem]:
    """The problems to report for a parser error, in a document that begins at line ``start``.

    ``failed_at``: the line of the error.
    """
    first = next((n for n in range(min(failed_at, len(lines) - 1), start, -1) if lines[n].startswith("---")), start)
    last = next((n for n in range(failed_at + 1, len(lines)) if lines[n].startswith("---")), len(lines))
    obj = _object_name(lines[first:last])
    slips = _wrong_depth(lines, first, last)
    if any(number == failed_at for number, _, _ in slips):
        return [
            Problem(
                Location(file, number + 1, column + 1),
                _path(lines, first, number),
                message,
                obj=obj,
                slug="wrong-depth",
            )
            for number, column, message in slips
        ]
    said = error.problem or "the text cannot be read"
    if error.context and error.context_mark is not None:
        said += f" ({error.context} that begins in line {start + error.context_mark.line + 1})"
    mark = error.problem_mark or error.context_mark
    column = mark.column + 1 if mark is not None else 0
    message = f"not valid YAML: {said}{_hint(said, lines, failed_at)}"
    return [Problem(Location(file, failed_at + 1, column), "", message, obj=obj, slug="yaml")]


def _hint(said: str, lines: list[str], failed_at: int) -> str:
    written = lines[failed_at] if failed_at < len(lines) else ""
    indentation = written[: len(written) - len(written.lstrip())]
    if "\t" in indentation or "'\\t'" in said:
        return "; indent with spaces, a tab is not allowed"
    if hint := template_hint(lines, failed_at):
        return hint
    if "mapping values are not allowed" in said:
        return "; check the indentation, and quote text that contains `: `"
    if "expected" in said:
        return "; check the indentation of this line against the lines above it"
    return ""


# --- wrong indentation ----------------------------------------------------------------------------------------------


def _wrong_depth(lines: list[str], first: int, last: int) -> list[tuple[int, int, str]]:
    """Find fields of rules that are at the indentation of the list's dashes. Returns (line, column, message).

    A common mistake is ``ports:`` in line with ``- from:`` instead of inside that item.
    """
    found = []
    for number in range(first, min(last, len(lines))):
        match = _RULE_FIELD.match(lines[number].rstrip("\r"))
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        above = _item_above(lines, first, number, depth)
        if above is not None:
            dash = lines[above][depth:]
            item = dash.strip().split(":")[0]
            inside = len(dash) - len(dash[1:].lstrip(" "))
            found.append((number, depth, _wrong_depth_message(name, item, above + 1, inside)))
    return found


def _item_above(lines: list[str], first: int, number: int, depth: int) -> int | None:
    """The first line of the list item that ends just before line ``number`` and has its dash at column ``depth``.

    None if there is no such item, or if the key of the list is at the same column.  In that case a field at the column
    is correctly a sibling of the key.
    """
    item = None
    for above in range(number - 1, first - 1, -1):
        content = lines[above].lstrip(" ")
        indent = len(lines[above]) - len(content)
        if not content.strip() or content.startswith("#") or indent > depth:
            continue
        if indent < depth:
            return item
        if content.startswith("- "):
            item = above if item is None else item
        elif item is not None or not _RULE_FIELD.match(lines[above].rstrip("\r")):
            return None
    return None


def _wrong_depth_message(name: str, item: str, line: int, columns: int) -> str:
    return (
        f"`{name}:` is at the wrong indentation level: beside the `{item}:` item of line {line}, at the level of its dash, instead "
        f"of inside the item. Move `{name}:` and the lines that belong to it {columns} columns to the right, inside "
        f"the `{item}:` item, so that `{name}:` stands under `{item.removeprefix('- ')}:`"
    )


# --- path and object of a line --------------------------------------------------------------------------------------


def _path(lines: list[str], first: int, number: int) -> str:
    """The field path of line ``number``, from indentation alone, without indexes in lists."""
    match = _KEY.match(lines[number])
    keys = [match[3]] if match is not None else []
    depth = len(lines[number]) - len(lines[number].lstrip(" "))
    for above in range(number - 1, first - 1, -1):
        match = _KEY.match(lines[above])
        if match is not None and len(match[1]) < depth:
            depth = len(match[1])
            keys.append(match[3])
    return ".".join(reversed(keys))


def _object_name(lines: list[str]) -> str:
    """``kind/namespace/name`` of a document's object, as far as its lines show them."""
    kind = ""
    names = {"name": "", "namespace": ""}
    block = ""
    for line in lines:
        if line[:1] not in (" ", "#", "\r", ""):
            block, _, value = line.partition(":")
            if block == "kind" and (match := _WORD.match(value)) is not None:
                kind = match[1]
        elif block == "metadata" and (match := _NAMED.match(line)) is not None and not names[match[1]]:
            names[match[1]] = match[2]
    return "/".join(part for part in (kind, names["namespace"], names["name"]) if part)
