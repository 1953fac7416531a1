# SPDX-License-Identifier: Apache-2.0
"""Each model is right in every execution with all orderings, and wrong without an ordering that it needs."""

from __future__ import annotations

import pytest
from explorer import Machine, find_wrong
from models import MODELS, Model, Ordering

PAIRS = [pytest.param(one, machine, id=f"{one.name}, {machine.value}") for one in MODELS for machine in Machine]
CASES = [
    pytest.param(one, ordering, machine, id=f"{one.name}, {machine.value}, without: {ordering.name}")
    for one in MODELS
    for ordering in one.orderings
    for machine in Machine
    if machine in ordering.there
]


def search(model: Model, machine: Machine, without: Ordering | None = None) -> list[str] | None:
    kept = {one.name for one in model.orderings if machine in one.there and one != without}
    return find_wrong(model.build(kept.__contains__), machine)


@pytest.mark.parametrize(("model", "machine"), PAIRS)
def test_no_execution_goes_wrong(model: Model, machine: Machine) -> None:
    """With the orderings that the product has on the machine, no execution is wrong."""
    assert search(model, machine) is None


@pytest.mark.parametrize(("model", "ordering", "machine"), CASES)
def test_each_ordering_is_needed_where_the_model_says_so(model: Model, ordering: Ordering, machine: Machine) -> None:
    """Without a needed ordering the explorer finds a wrong outcome; without one that is not needed there, none."""
    assert (search(model, machine, ordering) is not None) is (machine in ordering.needed)
