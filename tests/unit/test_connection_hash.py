# SPDX-License-Identifier: Apache-2.0
"""The numbers of the connections' hash are drawn so that a sequence of ports or addresses has room."""

from __future__ import annotations

import collections
import os
import random
import sys

import pytest

from netpol_loader import abi
from netpol_loader.tables.connections import ROWS_PER_BUCKET, draw_number, spreads

BUCKETS = 256
SHIFTS = (0, 8, 16, 24)


def fullest(number: int, shift: int) -> int:
    """How many of a sequence that half fills the table meet in one bucket, counted with the hash itself."""
    steps = (number * (step << shift) for step in range(ROWS_PER_BUCKET * BUCKETS))
    return max(collections.Counter((one >> 32) % BUCKETS for one in steps).values())


@pytest.fixture(scope="module")
def drawn() -> list[int]:
    """Numbers at random, always the same."""
    source = random.Random(7)
    return [source.getrandbits(64) for _ in range(400)]


def test_a_sequence_has_room(drawn: list[int]) -> None:
    """Under a number that spreads, no bucket overflows."""
    good = [number for number in drawn if spreads(number, BUCKETS)]
    assert len(good) > len(drawn) / 2
    assert {fullest(number, shift) > abi.NP_CONN_WAYS for number in good for shift in SHIFTS} == {False}


def test_a_number_is_not_given_up_in_vain(drawn: list[int]) -> None:
    """Nearly all that do not spread would overflow a bucket."""
    bad = [number for number in drawn if not spreads(number, BUCKETS)]
    vain = [number for number in bad if max(fullest(number, shift) for shift in SHIFTS) <= abi.NP_CONN_WAYS]
    assert len(bad) > len(drawn) / 10
    assert len(vain) <= len(bad) / 20


@pytest.mark.parametrize("number", [0, 1, 1 << 40, (1 << 40) // 3], ids=["zero", "one", "one bucket", "three buckets"])
def test_a_number_that_clusters(number: int) -> None:
    """All of a sequence would meet in few buckets."""
    assert not spreads(number, BUCKETS)


def test_one_bucket_takes_any() -> None:
    """There is nothing to spread over."""
    assert spreads(0, 1)


def test_numbers_that_cluster_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a small number a sequence would meet in few buckets."""
    clustering = iter([bytes(8), (1).to_bytes(8, sys.byteorder)])
    draw = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: next(clustering, None) or draw(size))
    assert draw_number([BUCKETS]) > 1
    assert next(clustering, None) is None
