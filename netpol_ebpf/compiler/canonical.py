# SPDX-License-Identifier: Apache-2.0
"""What tables say, without the numbers they say it with.

Two compilers with the same objects have equal canonical forms, whatever the order in which the objects came and went.  The form
is read from the tables alone, so rows that nothing refers to (a leak) make a difference as well.

Invariant: no number that depends on history is part of the form.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from itertools import groupby, product

from netpol_ebpf.compiler.intervals import Intervals, normalise
from netpol_ebpf.compiler.l4 import SOURCE_BLOCK
from netpol_ebpf.compiler.tables import (
    ATOM_BLOCK,
    ATOM_BLOCKS,
    COLUMN_BLOCK,
    WORLD_V4,
    WORLD_V6,
    CompiledTables,
    SetRow,
    VerdictRow,
)

_WORLDS = {WORLD_V4: "world 4", WORLD_V6: "world 6"}
_SOURCE_BLOCKS = range(SOURCE_BLOCK, SOURCE_BLOCK + 256)
Groups = dict[int, tuple[Hashable, ...]]
"""Class -> what is in it, in an order that does not depend on numbers."""


class _Reader:
    """Reads the tables of one moment."""

    def __init__(self, tables: CompiledTables) -> None:
        self._tables = tables
        self._names = {**dict(tables.identities.items()), **_WORLDS}
        self._families = {WORLD_V4: 4, WORLD_V6: 6}  # an identity in use is that of an address or a prefix
        self._families.update((row.identity, address.version) for address, row in tables.addresses.items())
        self._families.update((identity, network.version) for network, identity in tables.cidrs.items())
        blocks = set(range(ATOM_BLOCKS)) - set(_SOURCE_BLOCKS)
        self._atoms = self._intervals(sorted(blocks), 0)
        self._sources = self._intervals(_SOURCE_BLOCKS, SOURCE_BLOCK)
        self._classes: dict[int, dict[int, int]] = {}
        for (number, identity), class_ in tables.peer_classes.items():
            self._classes.setdefault(number, {})[identity] = class_
        self._sets: dict[SetRow, Hashable] = {}

    def name(self, identity: int) -> str:
        """An identity without its number."""
        return self._names[identity]

    def _intervals(self, blocks: Iterable[int], first: int) -> dict[int, Intervals]:
        """Atom -> its positions on its line."""
        pairs: dict[int, list[tuple[int, int]]] = {}
        for block in blocks:
            start = (block - first) * ATOM_BLOCK
            row = self._tables.l4_atoms.get(block)
            if row is None:
                pairs.setdefault(0, []).append((start, start + ATOM_BLOCK - 1))
                continue
            for atom, run in groupby(row):
                last = start + sum(1 for _ in run) - 1
                pairs.setdefault(atom, []).append((start, last))
                start = last + 1
        return {atom: normalise(found) for atom, found in pairs.items()}

    def set(self, row: SetRow) -> Hashable:
        """Peers that are judged alike, each with the verdicts by own side, protocol and port, and source port."""
        known = self._sets.get(row)
        if known is None:
            known = self._sets[row] = self._read_set(row)
        return known

    def _read_set(self, row: SetRow) -> Hashable:
        peers = self._identity_groups(row.number, {4: row.default_class4, 6: row.default_class6})
        owns: Groups = {0: ()}
        if row.own_set:
            owns = self._identity_groups(row.own_set, {4: row.own_default_class4, 6: row.own_default_class6})
        l4 = self._atom_groups(self._atoms, row.l4_base, row.l4_classes)
        sources = self._atom_groups(self._sources, row.source_base, row.source_classes)
        alike: dict[Hashable, list[Hashable]] = {}
        for peer, members in peers.items():
            verdicts = tuple(
                (in_own, in_l4, in_source, self._verdict(row, peer, own, l4_class, source_class))
                for (own, in_own), (l4_class, in_l4), (source_class, in_source) in product(
                    owns.items(), l4.items(), sources.items()
                )
            )
            alike.setdefault(verdicts, []).extend(members)
        return frozenset((frozenset(members), verdicts) for verdicts, members in alike.items())

    def _identity_groups(self, number: int, defaults: Mapping[int, int]) -> Groups:
        """Classes of one side by the names in them, ordered by those."""
        rows = self._classes.get(number, {})
        groups: dict[int, list[str]] = {}
        for identity, name in self._names.items():
            class_ = rows.get(identity, defaults[self._families[identity]])
            groups.setdefault(class_, []).append(name)
        ordered = sorted((sorted(names), class_) for class_, names in groups.items())
        return {class_: tuple(names) for names, class_ in ordered}

    def _atom_groups(self, atoms: Mapping[int, Intervals], base: int, classes: int) -> Groups:
        """Classes of one line by the atoms in them, ordered by position."""
        groups: dict[int, list[Intervals]] = {}
        for atom, intervals in atoms.items():
            class_ = 0
            if classes > 1:
                class_ = self._tables.l4_columns[base + atom // COLUMN_BLOCK][atom % COLUMN_BLOCK]
            groups.setdefault(class_, []).append(intervals)
        ordered = sorted((sorted(found), class_) for class_, found in groups.items())
        return {class_: tuple(found) for found, class_ in ordered}

    def _verdict(self, row: SetRow, peer: int, own: int, l4_class: int, source_class: int) -> Hashable:
        wide = peer * row.own_classes + own
        index = row.verdict_base + (wide * row.l4_classes + l4_class) * row.source_classes + source_class
        return self.content(self._tables.verdicts[index])

    def content(self, row: VerdictRow) -> Hashable:
        """A verdict with causes in place of rule numbers."""
        rules = self._tables.rules
        logs = self._tables.log_lists[row.log_list] if row.log_list else ()
        return (
            row.outcome, rules[row.rule], row.staged_outcome, rules[row.staged_rule],
            tuple(rules[rule] for rule in logs),
        )  # fmt: skip


def canonical(tables: CompiledTables) -> dict[str, Hashable]:
    """The content of the tables, to be compared with ``==``. Cost: all of the tables, and all cells of all sets in use."""
    reader = _Reader(tables)
    keys = {row.number: key for key, row in tables.endpoints.items()}
    nodes = {number: name for name, number in tables.nodes.items()}
    return {
        "endpoints": frozenset(
            (key, slot, reader.set(set_row))
            for key, row in tables.endpoints.items()
            for slot, set_row in row.sets.items()
        ),
        "addresses": frozenset(
            (
                address,
                reader.name(row.identity),
                keys[row.endpoint] if row.endpoint else None,
                nodes[row.node] if row.node else None,
            )
            for address, row in tables.addresses.items()
        ),  # fmt: skip
        "nodes": frozenset(nodes.values()),
        "cidrs": frozenset((network, reader.name(identity)) for network, identity in tables.cidrs.items()),
        "identities": frozenset(digest for _, digest in tables.identities.items()),
        "rules": frozenset(cause for _, cause in tables.rules.items()),
        "rows of no set": len({number for number, _ in tables.peer_classes} - _numbers_in_use(tables)),
    }


def _numbers_in_use(tables: CompiledTables) -> set[int]:
    """Numbers of policy sets that an endpoint has, on either side."""
    rows = [set_row for _, row in tables.endpoints.items() for set_row in row.sets.values()]
    return {row.number for row in rows} | {row.own_set for row in rows}
