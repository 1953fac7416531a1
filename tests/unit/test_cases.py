# SPDX-License-Identifier: Apache-2.0
"""The project's own conformance cases, run on the engines that need neither root nor a kernel.

`tests/cases/shared` has the expectations of public suites, `tests/cases/decisions` has one case for each decision of
this project (docs/semantics-decisions.md), and `tests/cases/vectors` the short conformance vectors of docs/SEMANTICS.md
appendix A.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol_ebpf.cases.case import LoadedCases, load_cases, parse_cases
from netpol_ebpf.cases.runner import run_cases

CASES = Path(__file__).resolve().parents[1] / "cases"
FAMILIES = sorted(
    path
    for group in ("shared", "decisions", "vectors")
    for path in [CASES / group, *(CASES / group).iterdir()]
    if path.is_dir()
)


@pytest.mark.parametrize("family", [path for path in FAMILIES if any(path.glob("*.yaml"))], ids=lambda path: path.name)
@pytest.mark.parametrize("engine", ["model", "tables"])
def test_cases(engine: str, family: Path) -> None:
    """Every probe of every case gives the expected result."""
    loaded = load_cases([family])
    report = run_cases(loaded, engine)
    assert not report.invalid
    assert not report.failed
    assert report.cases == len(list(family.glob("*.yaml")))


def test_the_set_is_whole() -> None:
    """A missing family, or a case without probes, would otherwise not be noticed."""
    cases = load_cases([CASES]).cases
    assert len(cases) >= 183
    assert sum(len(case.probes) for case in cases) >= 8889


def test_the_documented_example() -> None:
    """The case in docs/case-files.md gives the results that the page states."""
    page = (CASES.parents[1] / "docs" / "case-files.md").read_text()
    loaded = LoadedCases()
    parse_cases(page.split("```yaml\n")[1].split("```")[0], "case-files.md", loaded)
    report = run_cases(loaded)
    assert (report.cases, report.probes, report.failed, report.invalid) == (1, 4, [], [])
