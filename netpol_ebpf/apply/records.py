# SPDX-License-Identifier: Apache-2.0
"""Reads and writes state files. Files are untrusted input.

Invariant: whatever is in a file, or is at its path instead of a file, a reader never blocks.  It gets values of the
requested types, or OSError or ValueError is raised.  This module must not depend on the meaning of the values.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

DAMAGED_SUFFIX = ".damaged"
"""The suffix that `set_aside` gives to the name of a file."""
MOST_TOLD, MOST_LETTERS = 3, 200
"""How many faults of a file a message has, and how many characters of each fault; arbitrary."""
_JSON_NAMES = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a fraction", bool: "true or false", type(None): "null",
}  # fmt: skip


def load_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file.

    Raises OSError if the file cannot be read, is not a regular file, or has more than ``most_bytes``.  FIFOs are not
    opened because they block a reader, and devices because opening them can have side effects.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):  # the file was replaced after the first check
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = b"" if status.st_size > most_bytes else file.read(most_bytes + 1)
        if max(status.st_size, len(content)) > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", str(path))
    return content


def open_draft(path: Path) -> IO[str]:
    """Create a file for UTF-8 text. An existing file at the path is removed first. Raises OSError."""
    path.unlink(missing_ok=True)
    return path.open("x", encoding="utf-8")


def set_aside(path: Path) -> str:
    """Rename a file so that no program reads it. Returns the end of a sentence: the new name, or the error."""
    aside = path.with_suffix(DAMAGED_SUFFIX)
    try:
        if not aside.is_dir():
            aside.unlink(missing_ok=True)  # a directory could not replace this file by renaming
        path.replace(aside)
    except OSError as error:
        return f"it cannot be kept aside ({error.strerror})"
    return f"it is kept as {aside}"


@dataclass(frozen=True, slots=True)
class EntryFile:
    """A state file that is one JSON object: the number of its format, and its entries under a name.

    ``is_keyed``: whether the entries are an object, so that each has a key, or a list.  ``most_bytes``: the largest file
    that is read.
    """

    path: Path
    name: str
    format: int
    most_bytes: int
    is_keyed: bool = False

    def load(self, take: Callable[[Any], None]) -> str:
        """Call ``take`` with each entry: a value of the list, or a pair of key and value of the object.

        ``take`` raises ValueError for an entry that is not valid; the other entries are taken all the same.  Returns "",
        or what is damaged and where the file was set aside, as the end of a sentence.  An absent file has no entries.
        """
        wrong: list[str] = []
        entries: Iterable[Any] = ()
        try:
            entries = self._entries(load_regular(self.path, self.most_bytes))
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            wrong.append(reason_of(error))
        for entry in entries:
            try:
                take(entry)
            except ValueError as error:  # noqa: PERF203 - a faulty entry must not stop the others
                wrong.append(str(error))
        return f"damaged ({told(wrong)}); {set_aside(self.path)}" if wrong else ""

    def _entries(self, text: bytes) -> Iterable[Any]:
        document = checked(parse_json(text), dict, "it")
        if checked(document.get("format"), int, "the format") != self.format:
            raise ValueError(f"format {document['format']} is not {self.format}")
        written = document.get(self.name)
        if self.is_keyed:
            return checked(written, dict, self.name).items()
        return checked(written, list, self.name)

    def save(self, entries: Iterable[str]) -> None:
        """Write the file atomically. ``entries``: the JSON text of each, with its key if it has one. Raises OSError."""
        begin, end = ("{", "}") if self.is_keyed else ("[", "]")
        draft = self.path.with_suffix(".draft")
        with open_draft(draft) as file:
            file.write(f'{{"format": {self.format}, "{self.name}": {begin}{", ".join(entries)}{end}}}\n')
        draft.replace(self.path)


def told(wrong: Sequence[str]) -> str:
    """The faults ``wrong`` of a file as one line of limited length (MOST_TOLD, MOST_LETTERS)."""
    more = [f"and {len(wrong) - MOST_TOLD} more"] if len(wrong) > MOST_TOLD else []
    return "; ".join([*(one[:MOST_LETTERS] for one in wrong[:MOST_TOLD]), *more])


def reason_of(error: OSError | ValueError) -> str:
    """The message of an error, without the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def parse_json(text: bytes) -> Any:
    """Parse a UTF-8 text that is one JSON value. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def checked(value: object, kind: type[T], what: str) -> T:
    """``value`` if it is exactly of type ``kind``. Otherwise raises ValueError, naming ``what``.

    True does not count as a number, and a text with half of a surrogate pair does not count as a text.
    """
    if not isinstance(value, kind) or kind is not type(value):
        raise ValueError(f"{what} must be {_JSON_NAMES[kind]}, not {_JSON_NAMES[type(value)]}")
    result: T = value
    if isinstance(result, str) and not result.isascii():
        try:
            result.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} is not valid Unicode") from error
    return result


def checked_list(value: Any, kind: type[T], what: str, count: int | None = None) -> list[T]:
    """``value`` if it is a list of values of type ``kind``.

    Otherwise raises ValueError, naming ``what``.
    ``count``: if not None, the list must have this number of values.
    """
    values = [checked(one, kind, f"each of {what}") for one in checked(value, list, what)]
    if count is not None and len(values) != count:
        raise ValueError(f"{what} must have {count} values, not {len(values)}")
    return values
