# SPDX-License-Identifier: Apache-2.0
"""The comparison of two benchmark results: what counts as slower, and what as noise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench import compare
from bench.compare import Change, compare_runs
from bench.record import FORMAT, LESS, MORE, Case, Run, load, save, to_plain
from netpol_ebpf.errors import InvalidInputError


def make_run(*cases: Case) -> Run:
    return Run(
        "bench", {"cpu": "made up"}, {"commit": "c0ffee"}, {}, "2026-01-01T00:00:00Z", 1.0, list(cases), ["a note"]
    )


def rate(
    center: float, *, base: str = "", name: str = "rate", noise: float = 0.02, seed: int = 1, **more: object
) -> Case:
    chance = random.Random(seed)
    samples = tuple(center * chance.uniform(1 - noise, 1 + noise) for _ in range(7))
    return Case("s", name, "ours", "1/s", MORE, samples, {}, base, **more)  # type: ignore[arg-type]


def pair(center: float, speed: float = 1.0, **more: object) -> Run:
    base = Case(
        "s",
        "rate",
        "nothing",
        "1/s",
        MORE,
        tuple(speed * 1000 * factor for factor in (1, 1.01, 0.99, 1, 1.02, 0.98, 1)),
    )
    return make_run(base, rate(center * speed, base=base.id, **more))


def verdict_of(old: Run, new: Run) -> Change:
    return next(one.verdict for one in compare_runs(old, new) if one.case == "s/rate/ours")


@pytest.mark.parametrize(
    ("center", "expected"), [(900, Change.SAME), (600, Change.SLOWER), (1400, Change.FASTER), (910, Change.SAME)]
)
def test_a_clear_change_is_told_from_none(center: float, expected: Change) -> None:
    """Ratios that differ by a third are a change, and those that differ by a hundredth are not."""
    assert verdict_of(pair(900), pair(center, seed=2)) is expected


def test_another_machine_is_no_regression() -> None:
    """A case that is three times slower, together with its base, is unchanged."""
    assert verdict_of(pair(900), pair(900, speed=1 / 3)) is Change.SAME


def test_noise_is_unclear_and_not_slower() -> None:
    """If the median falls by less than the samples vary, the result is unclear."""
    assert verdict_of(pair(900), pair(700, noise=0.6)) is Change.UNCLEAR


def test_less_is_faster_where_less_is_better() -> None:
    """For a duration, the smaller value is the faster one."""
    before = Case("s", "time", "ours", "ns", LESS, (100.0,), exact=True)
    after = Case("s", "time", "ours", "ns", LESS, (50.0,), exact=True)
    assert [one.verdict for one in compare_runs(make_run(before), make_run(after))] == [Change.FASTER]


def test_exact_counts_are_judged_by_one_sample() -> None:
    """The number of bytes has no noise, so twice as many are slower, and judged."""
    before = Case("s", "memory", "ours", "bytes", LESS, (1000.0,), exact=True)
    after = Case("s", "memory", "ours", "bytes", LESS, (2000.0,), exact=True)
    (found,) = compare_runs(make_run(before), make_run(after))
    assert (found.verdict, found.judged) == (Change.SLOWER, True)


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (pair(900, seed=5), 0),
        (pair(500), 1),
        (pair(500, judged=False), 0),
        (make_run(rate(500)), 0),
    ],
    ids=["same", "slower", "slower but not judged", "slower without a base"],
)
def test_exit_code_is_one_for_clear_regressions_alone(tmp_path: Path, new: Run, code: int) -> None:
    """Only a judged case with a base makes the comparison fail."""
    save(pair(900), tmp_path / "old.json")
    save(new, tmp_path / "new.json")
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == code


def test_few_rounds_never_fail() -> None:
    """With fewer rounds than MIN_ROUNDS a change is shown and not judged."""
    short = [
        Case(one.suite, one.name, one.contender, one.unit, one.better, one.samples[:3], {}, one.base)
        for one in pair(500).cases
    ]
    assert not any(one.judged for one in compare_runs(pair(900), make_run(*short)))


def test_a_base_of_nothing_is_not_divided_by() -> None:
    """Differences of nanoseconds around zero, in base and case, give numbers and no error."""
    base = Case("s", "hot", "b", "ns", LESS, (0.0, -1.0, 1.0, 0.0, 0.0))
    case = Case("s", "hot", "a", "ns", LESS, (1.0, 2.0, 1.0, 0.0, 1.0), {}, base.id)
    run = make_run(base, case)
    assert [one.verdict for one in compare_runs(run, run)] == [Change.UNCLEAR]


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    """A written result is read back unchanged."""
    run = pair(900)
    save(run, tmp_path / "run.json")
    assert to_plain(load(tmp_path / "run.json")) == to_plain(run)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', f'{{"format": {FORMAT + 1}}}'])
def test_a_file_of_another_sort_is_refused(tmp_path: Path, text: str) -> None:
    """A file that is no result of this format is invalid input."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InvalidInputError):
        load(tmp_path / "x.json")
