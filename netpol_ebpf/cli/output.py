# SPDX-License-Identifier: Apache-2.0
"""The ``-o`` option that all commands share, and writing values and tables.

Invariant: what `json` and `yaml` print is one document of plain values and nothing else, whatever the command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

FORMATS = ("text", "wide", "json", "yaml")


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Add ``-o``/``--output``; the value is one of FORMATS."""
    parser.add_argument("-o", "--output", choices=FORMATS, default="text", help="how to print (default: text)")


def print_value(output: str, value: Any) -> bool:
    """Print a plain value when JSON or YAML is asked for; False when the caller is to print text."""
    if output == "json":
        print(json.dumps(value, indent=2))
    elif output == "yaml":
        print(yaml.safe_dump(value, sort_keys=False), end="")
    else:
        return False
    return True


def render_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with aligned columns, header in capitals; ends without a newline."""
    lines = [[title.upper() for title in header], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
