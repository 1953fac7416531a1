# SPDX-License-Identifier: Apache-2.0
"""Predicates on protocols and ports, and their atoms."""

from __future__ import annotations

import random

import pytest

from netpol_ebpf.compiler.intervals import Intervals, contains
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.l4 import (
    ANY_L4,
    ANY_SOURCE,
    SOURCE_BLOCK,
    WITH_PORTS,
    WITHOUT_PORTS,
    AtomSpace,
    icmp,
    ports,
    protocol,
)
from netpol_ebpf.compiler.limits import Limits
from netpol_ebpf.compiler.tables import ATOM_BLOCKS, OTHER_BLOCK, PROTOCOL_SLOT
from netpol_ebpf.errors import LimitError
from netpol_ebpf.policy.types import ICMP, ICMPV6, SCTP, TCP, UDP


def space(limits: Limits | None = None) -> AtomSpace:
    """An empty line of destination ports."""
    return AtomSpace(ANY_L4, 0, ATOM_BLOCKS, limits or Limits())


def at(number: int, port: int = 0) -> int:
    """The position of a packet, of a protocol with or without ports."""
    slot = PROTOCOL_SLOT.get(number)
    return OTHER_BLOCK * 256 + number if slot is None else slot * 65536 + port


def test_predicates_are_where_the_tables_look() -> None:
    """There are slots of 256 blocks of 256, and one block for the other protocols."""
    assert protocol(UDP) == ((65536, 131071),)
    assert protocol(47) == ((OTHER_BLOCK * 256 + 47, OTHER_BLOCK * 256 + 47),)
    assert ports((TCP, SCTP), ((80, 81),)) == ((80, 81), (2 * 65536 + 80, 2 * 65536 + 81))
    assert icmp(ICMPV6, 128, None) == ((4 * 65536 + 128 * 256, 4 * 65536 + 128 * 256 + 255),)
    assert icmp(ICMP, 3, 1) == ((3 * 65536 + 3 * 256 + 1,) * 2,)
    assert contains(WITH_PORTS, at(SCTP, 65535))
    assert not contains(WITHOUT_PORTS, at(UDP, 0))
    assert contains(WITHOUT_PORTS, at(47))


def test_everything_makes_no_atom() -> None:
    """A predicate that matches every packet splits nothing."""
    atoms, journal = space(), Journal()
    atoms.acquire(ANY_L4, journal)
    assert not atoms.is_stale
    assert atoms.atoms() == {0}


def test_atoms_are_what_predicates_tell_apart() -> None:
    """Two overlapping ranges make three atoms and the rest. Equal signatures share a number."""
    atoms, journal = space(), Journal()
    low, high = ports((TCP,), ((80, 89), (200, 209))), ports((TCP,), ((85, 95),))
    for predicate in (low, high):
        atoms.acquire(predicate, journal)
    split = atoms.partition(journal)
    number = [atoms.atom_at(at(TCP, port)) for port in (79, 80, 85, 90, 96, 205)]
    assert number[0] == number[4] == 0
    assert number[1] == number[5]
    assert len(set(number)) == 4
    assert set(atoms.atoms_of(low)) == {number[1], number[2]}
    assert set(atoms.atoms_of(high)) == {number[2], number[3]}
    assert set(split.parents.values()) == {0}
    assert set(split.blocks) == {0}
    assert [split.blocks[0][port] for port in (79, 80, 85, 90, 96, 205)] == number  # type: ignore[index]


def test_a_block_goes_when_it_is_all_zeros_again() -> None:
    """After the removal of the last predicate, no block has a row."""
    atoms, journal = space(), Journal()
    atoms.acquire(protocol(TCP), journal)
    assert len(atoms.partition(journal).blocks) == 256
    atoms.release(protocol(TCP), journal)
    split = atoms.partition(journal)
    assert set(split.blocks.values()) == {None}
    assert len(split.blocks) == 256
    assert not split.parents


def test_source_ports_have_their_own_blocks() -> None:
    """The line of source ports begins at its own slot."""
    sources, journal = AtomSpace(ANY_SOURCE, SOURCE_BLOCK, 256, Limits()), Journal()
    sources.acquire(((300, 300),), journal)
    split = sources.partition(journal)
    assert set(split.blocks) == {SOURCE_BLOCK + 1}
    assert sources.atom_at(300) == 1


def test_numbers_that_stay_mean_the_same_to_predicates_that_stay() -> None:
    """After random changes (additions first), a kept number, and a new one through its parent, have the old classes."""
    chance = random.Random(3)
    pool = [
        ports((TCP, UDP), ((first, first + chance.randrange(1, 400)),)) for first in chance.sample(range(1, 2000), 12)
    ]
    pool += [protocol(TCP), protocol(ICMP), WITHOUT_PORTS]
    atoms, journal = space(), Journal()
    live: set[Intervals] = set()
    positions = [at(number, port) for number in (TCP, UDP) for port in range(0, 2500, 7)] + [at(47), at(ICMP, 2048)]
    for _ in range(60):
        added = set(chance.sample(pool, 3)) - live
        removed = set(chance.sample(sorted(live), min(2, len(live))))
        before = {position: atoms.atom_at(position) for position in positions}
        for predicate in added:
            atoms.acquire(predicate, journal)
        split = atoms.partition(journal)
        for position in positions:
            number = atoms.atom_at(position)
            assert split.parents.get(number, number) == before[position]
        before = {position: atoms.atom_at(position) for position in positions}
        for predicate in removed:
            atoms.release(predicate, journal)
        live = (live | added) - removed
        assert not atoms.partition(journal).parents
        classes: dict[int, frozenset[Intervals]] = {}
        for position in positions:
            signature = frozenset(predicate for predicate in live if contains(predicate, position))
            assert classes.setdefault(atoms.atom_at(position), signature) == signature
            assert classes.setdefault(before[position], signature) == signature or before[position] not in atoms.atoms()
            assert all((atoms.atom_at(position) in atoms.atoms_of(one)) == (one in signature) for one in live)
        assert len({frozenset(one) for one in classes.values()}) <= len(atoms.atoms())


def test_rollback_restores_the_partition() -> None:
    """Numbers, blocks and staleness are as before."""
    atoms = space()
    first = Journal()
    atoms.acquire(protocol(TCP), first)
    atoms.partition(first)
    second = Journal()
    atoms.acquire(ports((TCP,), ((80, 80),)), second)
    atoms.partition(second)
    assert atoms.atom_at(80) != atoms.atom_at(81)
    second.rollback()
    assert atoms.atom_at(80) == atoms.atom_at(81) == 1
    assert not atoms.is_stale
    with pytest.raises(KeyError):
        atoms.atoms_of(ports((TCP,), ((80, 80),)))


def test_too_many_atoms_are_refused() -> None:
    """The error names the limit."""
    atoms, journal = space(Limits(atoms=4)), Journal()
    for port in range(1, 9, 2):
        atoms.acquire(ports((TCP,), ((port, port),)), journal)
    with pytest.raises(LimitError, match="atoms: needs 5, the limit is 4"):
        atoms.partition(journal)
