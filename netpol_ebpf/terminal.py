# SPDX-License-Identifier: Apache-2.0
r"""Text for people: on a terminal, and in a log that one reads on a terminal.

Names of objects, files and interfaces come from others, and may hold characters that move the cursor, change colours, reorder the
line or end it.  Everything that people read is printed here, where such characters become visible (``\x1b``, ``\u202e``).

Invariant: nothing unprintable gets out but the line breaks that are ours.  JSON and YAML are made exact by their own escapes
(`netpol_ebpf.cli.output`).
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO


def escaped(text: str, keep: str = "") -> str:
    """A text with everything unprintable (control, bidirectional and other format characters, lone surrogates) as an escape.

    ``keep``: characters to be left as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in keep else one.encode("unicode_escape").decode("ascii") for one in text
    )


def paragraph(text: str) -> str:
    """A text of several lines, escaped; all but the first are indented, so that none can be taken for another message."""
    return "\n  ".join(escaped(line) for line in text.split("\n"))


def say(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text for people, on standard output if not to ``file``; its line breaks count."""
    print(escaped(str(text), keep="\n"), file=sys.stdout if file is None else file, flush=flush)


class LogFormatter(logging.Formatter):
    """Log lines, tracebacks included, as `paragraph` makes them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return paragraph(super().format(record))
