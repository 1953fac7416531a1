# SPDX-License-Identifier: Apache-2.0
"""Draw comments and docstrings at random. A reader who has not seen the code then judges which are clear at once.

    draw_comments.py [--seed TEXT] [--count 100]

The seed is the hash of the last commit unless another one is given, so nobody chooses what is judged. A docstring
counts as one comment, and so do successive lines of `//`. Generated files are left out.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("netpol_ebpf", "loader/netpol_loader")
GENERATED = {"abi.py"}
BLOCK = re.compile(r"(?m)^(?:[ \t]*//[^\n]*\n)+")
TRAILING = re.compile(r"(?m)^[^\n/]*[;,{)][ \t]*// ([^\n]+)$")
LICENSE = "SPDX-License-Identifier"


def of_python(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for statement in getattr(node, "body", []) if not isinstance(node, (ast.Lambda, ast.IfExp)) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip()


def of_c(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every comment."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        lines = [line.strip().removeprefix("//").strip() for line in found[0].splitlines()]
        words = " ".join(line for line in lines if LICENSE not in line).strip()
        if words:
            yield text.count("\n", 0, found.start()) + 1, words
    for found in TRAILING.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, found[1]


def every() -> list[tuple[str, int, str]]:
    """(file, line, text) of all, in the order of the files."""
    found = []
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name not in GENERATED):
        found += [(str(path.relative_to(ROOT)), line, text) for line, text in of_python(path)]
    for path in sorted((ROOT / "bpf").glob("*.[ch]")):
        found += [(str(path.relative_to(ROOT)), line, text) for line, text in of_c(path)]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", help="default: the hash of the last commit")
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args(arguments)
    seed = options.seed or subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()  # fmt: skip
    drawn = random.Random(seed).sample(every(), options.count)
    print(f"seed {seed}, {options.count} of {len(every())}\n")
    for number, (name, line, text) in enumerate(drawn, 1):
        print(f"{number}. {name}:{line}\n   {' '.join(text.split())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
