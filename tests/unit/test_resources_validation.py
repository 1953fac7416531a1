# SPDX-License-Identifier: Apache-2.0
"""Whole objects taken from public validation suites: each is accepted or refused as its origin does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.errors import Problem
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.resources.yamltree import Positions, read_documents

DATA = Path(__file__).parent.parent / "data" / "validation.yaml"


def _decoded(value: Any) -> Any:
    """Names of a given length are written as lists of character codes; everything else as it is."""
    if isinstance(value, dict):
        return {
            key: "".join(map(chr, below)) if key == "name" and isinstance(below, list) else _decoded(below)
            for key, below in value.items()
        }
    if isinstance(value, list):
        return [_decoded(below) for below in value]
    return value


def _cases() -> list[Any]:
    problems: list[Problem] = []
    (document,) = read_documents(DATA.read_text(encoding="utf-8"), str(DATA), problems)
    assert problems == []
    return [
        pytest.param(case, document.positions.child((number, "object")), id=f"{number}-{case['kind']}-{case['desc']}")
        for number, case in enumerate(document.value)
    ]


@pytest.mark.parametrize(("case", "positions"), _cases())
def test_accepted_or_refused_as_the_origin_does(case: dict[str, Any], positions: Positions) -> None:
    """A valid object yields a resource; an invalid one none, and at least one problem with line and path."""
    result = parse_object(_decoded(case["object"]), str(DATA), positions)
    assert bool(result.errors) is not case["valid"]
    assert len(result.resources) == (1 if case["valid"] else 0)
    for problem in result.problems:
        assert problem.location.line >= positions.location().line
        assert problem.path
        assert problem.obj.startswith(case["object"]["kind"])
