# SPDX-License-Identifier: Apache-2.0
"""Turns: every interface is looked at in each round, a part of them in each check."""

from __future__ import annotations

import pytest

from netpol_loader.pins.turns import CHECKS, LEAST, Turns


@pytest.mark.parametrize("count", [0, 1, LEAST, LEAST + 1, 5 * LEAST, 5 * LEAST + 1, 1000])
def test_round_covers_all_interfaces_in_few_checks(count: int) -> None:
    """No interface waits longer than CHECKS checks; a small node is looked at whole each time."""
    turns, present = Turns(), range(3, 3 + count)
    for _ in range(3):
        looked = []
        for number in range(CHECKS):
            looked += turns.next(present)
            assert turns.is_first == (number == 0)
            if len(looked) == count:
                break
        assert looked == [*present]


def test_interface_keeps_its_turn_while_others_come_and_go() -> None:
    """Neither numbers that come before nor those that go let one be passed over."""
    turns = Turns(most=2)
    assert turns.next({10, 20, 30, 40, 50}) == [10, 20]
    assert turns.next({1, 2, 3, 30, 40, 50}) == [30, 40]
    assert turns.next({1, 2, 3, 30, 50}) == [50]
    assert not turns.is_first
    assert turns.next({1, 2, 3, 50}) == [1, 2]
    assert turns.is_first


def test_round_begins_anew_when_the_last_ones_are_gone() -> None:
    """The turn after the last interface is the first one's."""
    turns = Turns(most=2)
    turns.next({10, 20, 30})
    assert turns.next({10, 20}) == [10, 20]
    assert turns.is_first
