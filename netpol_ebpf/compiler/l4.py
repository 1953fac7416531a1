# SPDX-License-Identifier: Apache-2.0
"""Protocol and port predicates, and the atoms into which the predicates divide all packets.

A *position* is an integer that stands for a protocol with a destination port, or for an ICMP type and code: ``block *
256 + index`` in the atom blocks of `netpol_ebpf.compiler.tables`.  The *line* is the range of all positions.  A
predicate is a set of positions, as intervals.  An *atom* is the set of all positions that are in the same predicates.
Source ports have a line of their own, from 0 to 65535.

Invariants: atom 0 is in no predicate.  Positions with the same atom are in the same predicates.  If an atom's number
stays in use across a change, the atom is in the same predicates as before, apart from predicates that the change adds
or removes.  So the columns of policy sets that the change does not concern stay correct.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from netpol_ebpf.compiler.intervals import Intervals, difference, normalise
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import Limits, exceeded
from netpol_ebpf.compiler.tables import ATOM_BLOCK, OTHER_BLOCK, PROTOCOL_SLOT, SOURCE_SLOT
from netpol_ebpf.policy.types import PORT_PROTOCOLS

_SLOT = 256 * ATOM_BLOCK
_OTHER = OTHER_BLOCK * ATOM_BLOCK
_SLOTTED = {slot: protocol for protocol, slot in PROTOCOL_SLOT.items()}

ANY_L4: Intervals = ((0, SOURCE_SLOT * _SLOT - 1), (_OTHER, _OTHER + 255))
ANY_SOURCE: Intervals = ((0, 65535),)
SOURCE_BLOCK = SOURCE_SLOT * 256
"""The first atom block of the source-port line."""


def protocol(number: int) -> Intervals:
    """The positions of all packets of the protocol ``number`` (IANA)."""
    slot = PROTOCOL_SLOT.get(number)
    if slot is None:
        return ((_OTHER + number, _OTHER + number),)
    return ((slot * _SLOT, slot * _SLOT + 65535),)


def ports(protocols: Iterable[int], ranges: Iterable[tuple[int, int]]) -> Intervals:
    """The positions of packets of ``protocols`` (IANA) with a destination port in one of the inclusive ``ranges``."""
    pairs = tuple(ranges)
    bases = [PROTOCOL_SLOT[number] * _SLOT for number in protocols]
    return normalise((base + max(first, 0), base + min(last, 65535)) for base in bases for first, last in pairs)


def icmp(number: int, type_: int, code: int | None) -> Intervals:
    """The positions of packets of ICMP or ICMPv6 (``number``) with this type and code. ``code`` None: any code."""
    base = PROTOCOL_SLOT[number] * _SLOT + type_ * 256
    return ((base, base + 255),) if code is None else ((base + code, base + code),)


WITH_PORTS: Intervals = normalise(pair for number in PORT_PROTOCOLS for pair in protocol(number))
WITHOUT_PORTS: Intervals = difference(ANY_L4, WITH_PORTS)


@dataclass(frozen=True, slots=True)
class Split:
    """The difference between a new partition and the previous one.

    ``parents``: maps the number of each new atom to the number of the atom that had the new atom's positions before.
    If several atoms had these positions, the value is the number of one of these atoms.
    ``blocks``: the changed blocks of the table ``l4_atoms``; None for a block that is all zeros now.
    """

    parents: Mapping[int, int]
    blocks: Mapping[int, tuple[int, ...] | None]


class AtomSpace:
    """The atoms of one line for the predicates in use.

    ``whole``: all positions of the line.
    ``first_block``: the number of the line's first block in the table ``l4_atoms``.
    ``blocks``: how many blocks the line has.
    """

    def __init__(self, whole: Intervals, first_block: int, blocks: int, limits: Limits) -> None:
        self._whole = whole
        self._first_block = first_block
        self._blocks_total = blocks
        self._limits = limits
        self._predicates: dict[Intervals, int] = {}  # predicate -> references
        self._starts: list[int] = [0]
        self._atoms: list[int] = [0]
        self._blocks: dict[int, tuple[int, ...]] = {}
        self._members: dict[Intervals, tuple[int, ...]] = {}
        self._capacity = 1
        self._stale = False

    @property
    def size(self) -> int:
        """The largest atom number in use, plus one."""
        return self._capacity

    @property
    def is_stale(self) -> bool:
        """Whether predicates were added or removed since the last partition."""
        return self._stale

    def acquire(self, predicate: Intervals, journal: Journal) -> None:
        """Add a reference to a predicate. The first reference makes the partition stale."""
        if predicate == self._whole:
            return
        count = self._predicates.get(predicate, 0)
        journal.put(self._predicates, predicate, count + 1)
        if not count:
            journal.assign(self, "_stale", value=True)

    def release(self, predicate: Intervals, journal: Journal) -> None:
        """Drop a reference to a predicate. The last reference removes the predicate and makes the partition stale."""
        if predicate == self._whole:
            return
        count = self._predicates[predicate]
        if count > 1:
            journal.put(self._predicates, predicate, count - 1)
        else:
            journal.pop(self._predicates, predicate)
            journal.assign(self, "_stale", value=True)

    def atoms_of(self, predicate: Intervals) -> Iterable[int]:
        """The numbers of the atoms in a predicate. Raises KeyError if the predicate is not in use."""
        return range(self._capacity) if predicate == self._whole else self._members[predicate]

    def atoms(self) -> set[int]:
        """The atom numbers in use."""
        return {0, *self._atoms}

    def partition(self, journal: Journal) -> Split:
        """Partition the line by the predicates in use. Returns the difference from the previous partition.

        Cost: linear in the number of interval boundaries.  Raises LimitError if there are too many atoms.
        """
        starts, signatures, order = self._sweep()
        numbers, parents = self._number(starts, signatures)
        atoms = [numbers[signature] for signature in signatures]
        members: dict[Intervals, tuple[int, ...]] = {}
        distinct = list(dict.fromkeys(signatures))
        for bit, predicate in enumerate(order):
            mask = 1 << bit
            members[predicate] = tuple(numbers[signature] for signature in distinct if signature & mask)
        blocks = dict(self._fill(starts, atoms))
        changed: dict[int, tuple[int, ...] | None] = {
            block: row for block, row in blocks.items() if self._blocks.get(block) != row
        }
        changed.update((block, None) for block in self._blocks if block not in blocks)
        for name, value in (
            ("_starts", starts), ("_atoms", atoms), ("_members", members), ("_blocks", blocks),
            ("_capacity", max(atoms) + 1), ("_stale", False),
        ):  # fmt: skip
            journal.assign(self, name, value)
        return Split(parents, changed)

    def atom_at(self, position: int) -> int:
        """The number of the atom that contains ``position``."""
        return self._atoms[bisect_right(self._starts, position) - 1]

    def _sweep(self) -> tuple[list[int], list[int], list[Intervals]]:
        """Divide the line into segments of positions that are in the same predicates.

        Returns the start of each segment, the signature of each segment (a bit for each predicate that contains it),
        and the predicate of each bit.
        """
        order = list(self._predicates)
        toggles: dict[int, int] = {0: 0}
        for bit, predicate in enumerate(order):
            mask = 1 << bit
            for first, last in predicate:
                toggles[first] = toggles.get(first, 0) ^ mask
                toggles[last + 1] = toggles.get(last + 1, 0) ^ mask
        starts: list[int] = []
        signatures: list[int] = []
        signature = 0
        for position in sorted(toggles):
            signature ^= toggles[position]
            if not signatures or signature != signatures[-1]:
                starts.append(position)
                signatures.append(signature)
        return starts, signatures, order

    def _number(self, starts: list[int], signatures: list[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Assign an atom number to each signature, if possible a number that one of its segments had before.

        Returns two mappings: from signature to number, and from each new number to the number that its first segment
        had before.
        """
        numbers: dict[int, int] = {0: 0}
        taken = {0}
        for start, signature in zip(starts, signatures, strict=True):
            if signature not in numbers:
                known = self.atom_at(start)
                if known not in taken:
                    numbers[signature] = known
                    taken.add(known)
        # The rest needs a second loop: in the first loop, a signature may still get an old number from a later segment.
        parents: dict[int, int] = {}
        fresh = 0
        in_use = self.atoms()
        for start, signature in zip(starts, signatures, strict=True):
            if signature in numbers:
                continue
            while fresh in taken or fresh in in_use:
                fresh += 1
            numbers[signature] = fresh
            taken.add(fresh)
            parents[fresh] = self.atom_at(start)
        if len(numbers) > self._limits.atoms or fresh >= self._limits.atoms:
            raise exceeded("protocol and port predicates", "atoms", self._limits.atoms, len(numbers))
        return numbers, parents

    def _fill(self, starts: list[int], atoms: list[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The blocks (number, content) of the table ``l4_atoms`` that are not all zeros."""
        constant: dict[int, tuple[int, ...]] = {}
        segment = 0
        for index in range(self._blocks_total):
            begin = index * ATOM_BLOCK
            end = begin + ATOM_BLOCK
            while segment + 1 < len(starts) and starts[segment + 1] <= begin:
                segment += 1
            if segment + 1 >= len(starts) or starts[segment + 1] >= end:
                atom = atoms[segment]
                if atom:
                    row = constant.get(atom)
                    if row is None:
                        row = constant[atom] = (atom,) * ATOM_BLOCK
                    yield self._first_block + index, row
                continue
            cells: list[int] = []
            cursor, at = begin, segment
            while cursor < end:
                stop = min(end, starts[at + 1]) if at + 1 < len(starts) else end
                cells.extend([atoms[at]] * (stop - cursor))
                cursor = stop
                at += 1
            if any(cells):
                yield self._first_block + index, tuple(cells)
