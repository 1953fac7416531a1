# SPDX-License-Identifier: Apache-2.0
"""The comparison of maps with the compiled tables, for the tables of domain names."""

from __future__ import annotations

import pytest
from memory_maps import MemoryMap, memory_maps

from netpol_ebpf.apply.applier import Applier
from netpol_ebpf.apply.audit import Audit
from netpol_ebpf.apply.encode import map_and_key, name_key
from netpol_ebpf.apply.surroundings import SurroundingsWriter
from netpol_ebpf.compiler.tables import CompiledTables, DomainRow
from netpol_loader import abi

ROW = bytes(abi.np_domain(rank=3, staged_rank=4, rule=30, staged_rule=31))


@pytest.fixture
def maps() -> dict[str, MemoryMap]:
    return memory_maps([])


@pytest.fixture
def audit(maps: dict[str, MemoryMap]) -> Audit:
    """Maps that have what the tables require: one name, and one row of a domain list."""
    tables = CompiledTables()
    tables.domains.set((5, 40), DomainRow(3, 4, 30, 31))
    tables.names.set("*.example.com", 40)
    applier = Applier(maps, lambda: None)
    applier.fill(tables)
    return Audit(maps, tables, applier, SurroundingsWriter(maps, lambda: None))


def found(audit: Audit) -> list[tuple[str, str]]:
    """The differences of one round: the end of each row's name, and what was wrong with it."""
    drifts = audit.step()
    assert audit.rounds == 1
    return [(one.where.rpartition(" ")[2], one.was) for one in drifts]


def test_rows_as_they_should_be_are_left_alone(audit: Audit, maps: dict[str, MemoryMap]) -> None:
    """Names and domain lists that are right are no difference."""
    before = {name: dict(one.rows) for name, one in maps.items()}
    assert found(audit) == []
    assert {name: dict(one.rows) for name, one in maps.items()} == before


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("np_domain", map_and_key("domains", (5, 41))[1], ROW),
        ("np_name", name_key("evil.org"), bytes(abi.np_name(name_class=40))),
        ("np_name", bytes(abi.np_name_key(prefix_bits=3)), bytes(abi.np_name(name_class=40))),
    ],
    ids=["a class of the list", "a name", "a key of no name"],
)
def test_foreign_row_that_would_allow_a_name_is_removed(
    audit: Audit, maps: dict[str, MemoryMap], name: str, key: bytes, value: bytes
) -> None:
    """A row that the tables do not have is removed, whatever its key is."""
    maps[name].put(key, value)
    assert found(audit) == [(name, "foreign")]
    assert maps[name].get(key) is None


def test_changed_and_missing_rows_are_restored(audit: Audit, maps: dict[str, MemoryMap]) -> None:
    """A name with another class and a missing row of a domain list are written again."""
    place = map_and_key("domains", (5, 40))[1]
    maps["np_name"].put(name_key("*.example.com"), bytes(abi.np_name(name_class=41)))
    maps["np_domain"].delete(place)
    assert sorted(found(audit)) == [("np_domain", "missing"), ("np_name", "changed")]
    assert maps["np_domain"].get(place) == ROW
    assert maps["np_name"].get(name_key("*.example.com")) == bytes(abi.np_name(name_class=40))


def test_what_endpoints_learned_is_not_compared(audit: Audit, maps: dict[str, MemoryMap]) -> None:
    """Learned addresses are the program's own rows, which no table has."""
    maps["np_learned4"].put(bytes(8), bytes(abi.np_learned()))
    assert found(audit) == []
    assert maps["np_learned4"].get(bytes(8)) is not None
