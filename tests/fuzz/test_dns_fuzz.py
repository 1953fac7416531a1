# SPDX-License-Identifier: Apache-2.0
"""The DNS programs and dnspython agree about what random exchanges teach.

`python -m tests.fuzz.dns_fuzz` goes on for as long as it is told; this is a part of it with a fixed seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import dns.name
import dns_fuzz
import dns_oracle
import pytest
from dns_fuzz import DnsFuzz
from dns_generate import exchange
from one_cpu import on_one_cpu

from netpol_loader.pins.dataplane import Dataplane

pytestmark = pytest.mark.kernel

SEED = 7
EXCHANGES = int(os.environ.get("NETPOL_DNS_EXCHANGES", "1000"))
LEAST = 50
"""Exchanges of each kind in the short run; arbitrary, enough that no kind is rare."""


@pytest.fixture(scope="module")
def fuzz() -> Iterator[DnsFuzz]:
    """One dataplane for all, on one CPU."""
    with on_one_cpu():
        dataplane = Dataplane.open(Path(f"/sys/fs/bpf/netpol-dns-fuzz-test-{os.getpid()}"), sizes=dns_fuzz.SIZES)
        one = DnsFuzz(dataplane)
        yield one
        one.close()
        dataplane.remove()


def test_random_exchanges(fuzz: DnsFuzz) -> None:
    """Learned addresses, their classes and expiries, and reports are those of dnspython."""
    fuzz.seen.clear()
    for number in range(EXCHANGES):
        found = fuzz.difference(number, exchange(SEED, number))
        assert found is None, f"seed {SEED} exchange {number}: {found}"
    assert {what for what, count in fuzz.seen.items() if count >= LEAST} == {"learned", "reported", "nothing"}


SLIPS: dict[str, tuple[object, str, object]] = {
    "classes": (dns_oracle, "class_of", lambda _: 1),
    "floor": (dns_oracle, "FLOOR_S", 0),
    "longest life": (dns_oracle, "WEEK_S", 1 << 31),
    "refused": (dns_oracle, "REFUSED", ()),
    "chain": (dns_oracle, "MOST_TARGETS", 15),
    "addresses": (dns_oracle, "MOST_ADDRESSES", 127),
    "ways": (dns_oracle, "UNLIMITED", 100),
    "pointers": (dns.name, "MAX_COMPRESSION_POINTER_CHAIN", 15),
    "pieces": (dns_oracle, "_pieces", lambda *_: [None]),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_wrong_oracle_is_noticed(fuzz: DnsFuzz, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each slip that is put into the oracle shows: the comparison can fail."""
    where, attribute, wrong = SLIPS[name]
    monkeypatch.setattr(where, attribute, wrong)
    assert any(fuzz.difference(number, exchange(SEED, number)) for number in range(4000))
