# SPDX-License-Identifier: Apache-2.0
"""The project's own conformance cases, run on the engines that need neither root nor a kernel.

`tests/cases/shared` holds expectations from public suites, `tests/cases/decisions` one case for each point on which this
project had to decide (docs/semantics-decisions.md), `tests/cases/names` rules with domain names, and `tests/cases/vectors` the short
conformance vectors of docs/SEMANTICS.md appendix A.
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


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_cases_with_names(engine: str) -> None:
    """Every probe of the cases with DNS answers goes as expected."""
    loaded = load_cases([CASES / "names"])
    report = run_cases(loaded, engine)
    assert (report.invalid, report.failed) == ([], [])
    assert report.cases == len(list((CASES / "names").glob("*.yaml")))


def test_the_set_is_whole() -> None:
    """A missing family, or a case without probes, would otherwise not be noticed."""
    cases = load_cases([CASES]).cases
    assert len(cases) >= 199
    assert sum(len(case.probes) for case in cases) >= 8990


@pytest.mark.parametrize("example", [1, 2], ids=["probes", "names"])
def test_the_documented_examples(example: int) -> None:
    """The cases in docs/case-files.md do what the page says."""
    page = (CASES.parents[1] / "docs" / "case-files.md").read_text()
    loaded = LoadedCases()
    parse_cases(page.split("```yaml\n")[example].split("```")[0], "case-files.md", loaded)
    report = run_cases(loaded)
    assert (report.cases, report.probes, report.failed, report.invalid) == (1, 4, [], [])
