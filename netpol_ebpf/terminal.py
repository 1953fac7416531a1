# SPDX-License-Identifier: Apache-2.0
r"""Output of text for people, on the terminal and in the log.

Names of objects, files and interfaces come from other people. They may contain characters that move the cursor, change
colours, reorder the line or end it. This module prints all text for people and shows such characters as escapes
(``\x1b``, ``\u202e``).

Invariant: the only unprintable characters in the output are this program's own line breaks. JSON and YAML have their
own escapes (`netpol_ebpf.cli.output`).
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO


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
    """Formats log records, including tracebacks, with `paragraph`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return paragraph(super().format(record))
