# SPDX-License-Identifier: Apache-2.0
"""One type per name: no two classes or type aliases of the two packages share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "netpol_ebpf", ROOT / "loader" / "netpol_loader")


def _is_alias(node: ast.stmt) -> tuple[str, ast.expr] | None:
    """The name and the meaning of a type alias: a capitalised name that is assigned a type expression, not a call."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        is_alias = isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias"
        return (node.target.id, node.value) if is_alias else None
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        is_type = isinstance(node.value, (ast.Subscript, ast.Name, ast.Attribute, ast.BinOp))
        return (name, node.value) if is_type and name[0].isupper() and not name.isupper() else None
    return None


def types_of(source: str) -> Iterator[tuple[str, str]]:
    """Name and meaning of each public type that a module defines at its top: "class", or the text of an alias."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found: tuple[str, str] | None = (node.name, "class")
        else:
            alias = _is_alias(node)
            found = None if alias is None else (alias[0], ast.unparse(alias[1]))
        if found is not None and not found[0].startswith("_"):
            yield found


def _shared_names() -> dict[str, frozenset[str]]:
    """Names of several types, each with the modules that define one. Aliases of one meaning are one type."""
    meanings: defaultdict[str, set[str]] = defaultdict(set)
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
            for name, meaning in types_of(path.read_text(encoding="utf-8")):
                meanings[name].add(f"class of {module}" if meaning == "class" else meaning)
                modules[name].add(module)
    return {name: frozenset(modules[name]) for name, found in meanings.items() if len(found) > 1}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class Tier: ...", [("Tier", "class")]),
        ("Net = Union[A, B]", [("Net", "Union[A, B]")]),
        ("Net: TypeAlias = 'A'", [("Net", "'A'")]),
        ("K = TypeVar('K')\nLIMIT = OTHER\nName = make()\n_Own = A\nclass _Own: ...\nx: Net = A[0]", []),
    ],
)
def test_what_counts_as_a_type(source: str, found: list[tuple[str, str]]) -> None:
    """Classes and aliases; no constants, no type variables, nothing private to a module."""
    assert list(types_of(source)) == found


def test_no_two_types_share_a_name() -> None:
    """A name in a message, a document or an import says which type is meant without its module."""
    assert _shared_names() == {}
