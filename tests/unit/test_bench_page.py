# SPDX-License-Identifier: Apache-2.0
"""The summary of the recorded result in the documentation."""

from __future__ import annotations

import pytest

from bench import page
from netpol_ebpf.errors import InvalidInputError
from tests.unit.test_bench_report import example


def test_targets_without_cases_are_said_to_be_not_measured() -> None:
    """A target is never left out, whatever the result lacks."""
    rows = page.judged(example())
    assert "not measured" in {row.verdict for row in rows}
    assert any("cold start" in row.name for row in rows)
    assert "c0ffee" in page.render(example())


def test_figures_of_earlier_results_have_columns() -> None:
    """Each column has its machine and commit, with the rows of the same targets."""
    text = page.render(example(), [example()])
    heads, row = (line.split("|") for line in text.splitlines() if line.startswith(("| target |", "| cold start,")))
    assert "`c0ffee`" in heads[5]
    assert row[3].strip() == row[5].strip()


def test_only_the_section_is_replaced() -> None:
    """Text outside the markers stays, and a second run changes nothing."""
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    once = page.with_section(text, "new")
    assert once == f"before\n{page.BEGIN}\nnew\n{page.END}\nafter\n"
    assert page.with_section(once, "new") == once


def test_a_page_without_markers_is_refused() -> None:
    """Nothing is appended."""
    with pytest.raises(InvalidInputError):
        page.with_section("nothing here", "new")
