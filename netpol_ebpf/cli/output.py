# SPDX-License-Identifier: Apache-2.0
"""The ``-o`` option of all commands, and rendering of values and tables.

Invariants: for every command, `json` and `yaml` output is exactly one document of plain values in printable ASCII; no
value is rounded or shortened.  Table cells contain only printable characters.
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
    """Add ``-o``/``--output``; the value is one of FORMATS."""
    parser.add_argument("-o", "--output", choices=FORMATS, default="text", help="output format (default: text)")


def print_value(output: str, value: Any) -> bool:
    """Print ``value`` if ``output`` is json or yaml. Otherwise returns False: the caller must then print text."""
    if output == "json":
        print(render_json(value, indent=2))
    elif output == "yaml":
        print(yaml.safe_dump(value, sort_keys=False), end="")
    else:
        return False
    return True


def render_json(value: Any, indent: int | None = None) -> str:
    """Render a plain value as JSON in printable ASCII."""
    return json.dumps(value, indent=indent).replace(
        "\x7f", "\\u007f"
    )  # json.dumps escapes every other control character


def counted(counts: Mapping[str, int]) -> str:
    """Render counts, such as ``2 apps/v1 Deployment, 1 v1 ConfigMap``."""
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def render_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Render a table with aligned columns and a header in capitals, without a final newline."""
    lines = [[title.upper() for title in header], *([escaped(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
