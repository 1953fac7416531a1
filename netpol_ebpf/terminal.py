# SPDX-License-Identifier: Apache-2.0
r"""Text for people, on a terminal and in the log.

Names of objects, files and interfaces come from others, and may contain characters that move the cursor, change colours, reorder the
line or end it.  This module prints all text for people and shows such characters as escapes (``\x1b``, ``\u202e``).

Invariant: the output contains nothing unprintable but our own line breaks.  JSON and YAML have escapes of their own
(`netpol_ebpf.cli.output`).
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO


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
    """Formats log lines, tracebacks included, with `paragraph`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return paragraph(super().format(record))
