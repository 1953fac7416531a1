# SPDX-License-Identifier: Apache-2.0
"""The table of guards: each can be removed, each has tests, and its page says so. Whether they notice: `python -m tests.guards`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import guards as bench_guards  # noqa: E402  # the same
from tests.guards.__main__ import PAGE, page  # noqa: E402  # the path comes first
from tests.guards.table import GUARDS, Guard  # noqa: E402  # the same


@pytest.mark.parametrize("guard", GUARDS, ids=lambda one: one.name)
def test_guard_can_be_removed(guard: Guard) -> None:
    """Its text is there exactly once, and what takes its place is another one."""
    old, new = guard.removal
    assert (ROOT / guard.file).read_text().count(old) == 1
    assert old != new


@pytest.mark.parametrize("guard", GUARDS, ids=lambda one: one.name)
def test_guard_has_tests(guard: Guard) -> None:
    """The functions that its node ids name are there."""
    assert guard.tests
    for test in guard.tests:
        file, name = test.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_names_are_unique() -> None:
    """A name means one guard."""
    assert len({one.name for one in GUARDS}) == len(GUARDS)


def test_page_is_fresh() -> None:
    """The page is what the table says: `python -m tests.guards --write`."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize(
    ("file", "text"), [(file, text) for removals in bench_guards.REMOVALS.values() for file, text, _ in removals]
)
def test_the_benchmark_of_guards_finds_what_it_removes(file: str, text: str) -> None:
    """Each text is there once."""
    assert (ROOT / file).read_text().count(text) == 1
