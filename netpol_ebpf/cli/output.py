# SPDX-License-Identifier: Apache-2.0
"""The ``-o`` option of all commands, and the rendering of values and tables.

Invariants: with ``-o json`` or ``-o yaml`` every command prints exactly one document of plain values in printable
ASCII, and rounds or shortens no value. Table cells contain only printable characters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from netpol_ebpf.terminal import escaped

FORMATS = ("text", "wide", "json", "yaml")


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``-o``/``--output``. Its value is one of FORMATS."""
    parser.add_argument("-o", "--output", choices=FORMATS, default="text", help="output format (default: text)")


def print_value(output: str, value: Any) -> bool:
    """Print ``value`` if ``output`` is "json" or "yaml".

    Returns False for other formats: the caller must then print text.
    """
    if output == "json":
        print(render_json(value, indent=2))
    elif output == "yaml":
        print(yaml.safe_dump(value, sort_keys=False), end="")
    else:
        return False
    return True


def render_json(value: Any, indent: int | None = None) -> str:
    """Render a value as JSON in printable ASCII. ``indent``: spaces for each level, None for a single line."""
    return json.dumps(value, indent=indent).replace(
        "\x7f", "\\u007f"
    )  # json.dumps escapes all other control characters


def counted(counts: Mapping[str, int]) -> str:
    """Render numbers of objects as a list, such as ``2 apps/v1 Deployment, 1 v1 ConfigMap``.

    ``counts``: the number of objects by the name of their kind.
    """
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def render_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Render a table with aligned columns and a header in capitals. The text ends without a line break."""
    lines = [[title.upper() for title in header], *([escaped(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
