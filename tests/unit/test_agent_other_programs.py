# SPDX-License-Identifier: Apache-2.0
"""Which programs of others are reported, and with which severity: by their position and by what they can do."""

from __future__ import annotations

import pytest

from netpol_ebpf.agent.other_programs import SHOWN, problems_of
from netpol_loader.pins.others import XDP, Other, Reach

BEHIND, BEFORE = False, True
TC = "tcx ingress"


def one(hook: str, place: bool, reach: Reach, number: int = 7) -> Other:  # noqa: FBT001
    return Other(5, hook, number, "cil", is_first=place, reach=reach)


def name_of(ifindex: int) -> str:
    return f"cali{ifindex}"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (one(TC, BEFORE, Reach.NONE), ("overtaken", "error")),
        (one(TC, BEFORE, Reach.REDIRECTS), ("overtaken", "error")),
        (one(TC, BEHIND, Reach.REDIRECTS), ("redirect", "error")),
        (one(TC, BEHIND, Reach.UNKNOWN), ("redirect", "warning")),
        (one(XDP, BEFORE, Reach.REDIRECTS), ("overtaken", "error")),
        (one(XDP, BEFORE, Reach.UNKNOWN), ("overtaken", "warning")),
        (one(XDP, BEFORE, Reach.NONE), ("overtaken", "warning")),
        (one(XDP, BEHIND, Reach.REDIRECTS), ("overtaken", "error")),
        (one(XDP, BEHIND, Reach.UNKNOWN), ("overtaken", "warning")),
    ],
)
def test_told(found: Other, expected: tuple[str, str]) -> None:
    """The problem has interface, hook, number and name.

    Without a program of ours on the interface, XDP counts as after it.
    """
    (problem,) = problems_of([found], name_of)
    assert (problem.slug, problem.severity) == expected
    assert f"cali5 {found.hook} program 7 (cil)" in problem.message


@pytest.mark.parametrize("hook", [TC, XDP])
def test_what_cannot_redirect_is_no_problem_behind_ours(hook: str) -> None:
    """It only sees packets that policy allows.

    On an interface without policy, its packets meet policy where they arrive.
    """
    assert problems_of([one(hook, BEHIND, Reach.NONE)], name_of) == []


def test_programs_of_which_the_same_is_true_are_one_problem() -> None:
    """Some are named, and the others counted."""
    found = [one(TC, BEHIND, Reach.REDIRECTS, number) for number in range(SHOWN + 3)]
    (problem,) = problems_of([*found, one(TC, BEHIND, Reach.NONE, 999)], name_of)
    assert problem.message.count("cali5") == SHOWN
    assert problem.message.endswith("and 3 more")
