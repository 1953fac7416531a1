# SPDX-License-Identifier: Apache-2.0
r"""Text for people, on a terminal and in the log.

Names of objects, files and interfaces come from others, and may contain characters that move the cursor, change colours, reorder the
line or end it.  This module prints all text for people and shows such characters as escapes (``\x1b``, ``\u202e``).

Invariant: the output contains nothing unprintable but our own line breaks.  JSON and YAML have escapes of their own
(`netpol_ebpf.cli.output`).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, TextIO


def escaped(text: str, keep: str = "") -> str:
    """Replace every unprintable character (control, bidirectional and other format characters, lone surrogates) by an escape.

    ``keep``: characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in keep else one.encode("unicode_escape").decode("ascii") for one in text
    )


def paragraph(text: str) -> str:
    """Escape a text of several lines and indent all but the first, so that no line can pass for another message."""
    return "\n  ".join(escaped(line) for line in text.split("\n"))


def say(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text for people, to ``file`` or standard output; keeps the text's line breaks."""
    print(escaped(str(text), keep="\n"), file=sys.stdout if file is None else file, flush=flush)


class LogFormatter(logging.Formatter):
    """Formats log lines, tracebacks included, with `paragraph`; the fields of a record follow its message."""

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
