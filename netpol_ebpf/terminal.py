# SPDX-License-Identifier: Apache-2.0
r"""Output of text for people, on the terminal and in the log.

Names of objects, files and interfaces come from other people. They may contain characters that move the cursor, change
colours, reorder the line or end it. This module prints all text for people and shows such characters as escapes
(``\x1b``, ``\u202e``).

Invariant: the only unprintable characters in the output are this program's own line breaks. JSON and YAML have their
own escapes (`netpol_ebpf.cli.output`).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, TextIO


def escaped(text: str, keep: str = "") -> str:
    """Replace every unprintable character with an escape.

    Unprintable are control characters, bidirectional and other format characters, and lone surrogates. ``keep``:
    unprintable characters that are not replaced.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in keep else one.encode("unicode_escape").decode("ascii") for one in text
    )


def paragraph(text: str) -> str:
    """Escape a text and indent all its lines but the first, so that no line can look like a message of its own."""
    return "\n  ".join(escaped(line) for line in text.split("\n"))


def say(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text for people to ``file`` (None: standard output).

    Line breaks stay; other unprintable characters are escaped.
    """
    print(escaped(str(text), keep="\n"), file=sys.stdout if file is None else file, flush=flush)


class LogFormatter(logging.Formatter):
    """Formats log records, including tracebacks, with `paragraph`. The fields of a record follow its message."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = "".join(f" {name}={value}" for name, value in fields_of(record).items())
        return paragraph(super().format(record) + fields)


class JsonLogFormatter(logging.Formatter):
    """Formats each record as one line of JSON in ASCII: time (UTC), level, logger, message, the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**line, **fields_of(record)}, default=str)


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """The fields of a record: names and values, given as ``extra={"fields": ...}``."""
    found: Mapping[str, Any] = getattr(record, "fields", {})
    return found


LOG_FORMATS: Mapping[str, logging.Formatter] = {
    "text": LogFormatter("%(asctime)s %(levelname)s %(message)s"),
    "json": JsonLogFormatter(),
}
"""Formats of the log, by their names on the command line."""


def log_to_standard_error(log_format: str, level: int) -> None:
    """Send the log of this process to standard error. ``log_format``: a key of `LOG_FORMATS`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LOG_FORMATS[log_format])
    logging.basicConfig(level=level, handlers=[handler])
