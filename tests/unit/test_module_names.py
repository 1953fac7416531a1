# SPDX-License-Identifier: Apache-2.0
"""Any choice of test directories can be collected together: modules are imported by name, so names must be unique."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def test_no_two_test_modules_have_the_same_name() -> None:
    """Of two modules with one name, whichever directory was collected first would win."""
    names = Counter(path.stem for path in TESTS.rglob("*.py") if path.stem not in {"conftest", "__main__", "__init__"})
    assert len(names) > 50
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_is_imported_from_a_conftest() -> None:
    """Every directory may have one, so its name says nothing of whose it is."""
    found = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [str(path) for name in names if name == "conftest"]
    assert found == []
