# SPDX-License-Identifier: Apache-2.0
"""The compiled tables: what the kernel's maps hold, as plain Python values, and the change from one state to the next.

A packet becomes a verdict in four steps, each one lookup (`netpol_ebpf.compiler.interpreter` is the executable
description, `bpf/np_classify.h` the fast one):

    1. peer address  -> identity        addresses (exact), else cidrs (longest prefix), else WORLD_V4/WORLD_V6
    2. identity      -> peer class      peer_classes[(set, identity)], else the set's default class for the family
       own address   -> own class       the same, through ``own_set``; only where a rule's own side is not constant
    3. (protocol, destination port | ICMP type and code) -> atom -> L4 class of the set (``l4_columns``)
       source port   -> atom -> source class; only where a rule of the set uses source ports
    4. verdicts[verdict_base + ((peer class * own_classes + own class) * l4_classes + L4 class) * source_classes
       + source class]

Invariants: rows are immutable; a published policy set's meaning never changes (it may gain classes); every number that
a row mentions is defined before the row is (make before break: `Change` keeps the order).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    Cause,
    Direction,
    EndpointKey,
    IPAddress,
    IPNetwork,
    Outcome,
    Stage,
    Verdict,
)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

UNKNOWN = 0
WORLD_V4 = 1
WORLD_V6 = 2
FIRST_IDENTITY = 16
"""Identities below this are reserved: 0 never used by a packet, 1 and 2 an address that nothing describes."""

FIRST_NODE = 1 << 20
"""Numbers of nodes begin here; those of endpoints are below."""

ATOM_BLOCK = 256
"""Atoms are kept in blocks of 256: the low byte of a port, or an ICMP code, is the index in the block."""

COLUMN_BLOCK = 64
"""L4 columns are kept in blocks of 64 classes; a set's column starts at a block boundary."""

PROTOCOL_SLOT: Mapping[int, int] = {TCP: 0, UDP: 1, SCTP: 2, ICMP: 3, ICMPV6: 4}
"""Atom blocks slot*256 + (port >> 8), or slot*256 + ICMP type, for these protocols."""
SOURCE_SLOT = 5
"""Atom blocks SOURCE_SLOT*256 + (source port >> 8): source-port atoms, whatever the protocol."""
OTHER_BLOCK = 6 * 256
"""The one block of all other protocols, indexed by protocol number."""
ATOM_BLOCKS = OTHER_BLOCK + 1


@dataclass(frozen=True, slots=True)
class SetRow:
    """One policy set: the ordered list of everything that applies to an endpoint in one direction and stage.

    ``number``: the ``set`` in keys of peer_classes; policy sets with the same peer classes share it.
    ``default_class*``: by family, the class of identities without a row there.  ``own_set``: the same number for the
    endpoint's own side, 0 when the own side is constant (then own_classes is 1).  ``l4_base``: first block of
    destination atoms in l4_columns; ``source_base``: first block of source-port atoms, unused when source_classes is 1.
    ``peer_classes`` and ``own_classes``: upper bounds of class numbers.  ``asks_source``: 1 if an enforced rule depends
    on the owner of the source address, or on the source port, else 0.
    """

    number: int
    default_class4: int
    default_class6: int
    peer_classes: int
    own_set: int
    own_default_class4: int
    own_default_class6: int
    own_classes: int
    l4_base: int
    l4_classes: int
    asks_source: int
    source_base: int
    source_classes: int
    verdict_base: int

    def verdict_index(self, peer_class: int, own_class: int, l4_class: int, source_class: int) -> int:
        """The key in ``verdicts`` of one combination of classes. Raises IndexError for a class beyond its bound."""
        for class_, bound in (
            (peer_class, self.peer_classes), (own_class, self.own_classes),
            (l4_class, self.l4_classes), (source_class, self.source_classes),
        ):  # fmt: skip
            if class_ >= bound:
                raise IndexError(f"class {class_} of policy set {self.number} is beyond {bound}")
        addresses = peer_class * self.own_classes + own_class
        return self.verdict_base + (addresses * self.l4_classes + l4_class) * self.source_classes + source_class


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """The policy sets of an endpoint. ``number``: stable, unique on the node, never 0.

    ``sets`` has (Direction, Stage) for each policy set; NORMAL is always there in both directions.  A host's other
    stage without a policy set has no policy: the packet continues.
    """

    number: int
    sets: Mapping[tuple[Direction, Stage], SetRow] = field(hash=False)


@dataclass(frozen=True, slots=True)
class AddressRow:
    """A known address.

    ``endpoint``: number of the local endpoint that owns it (anti-spoofing), 0 for a remote one.  ``node``: number of the node
    that has it, itself or as the address of an endpoint there; 0: not known, or it is a local endpoint's.
    """

    identity: int
    endpoint: int = 0
    node: int = 0


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One verdict. Rule numbers are keys of ``CompiledTables.rules``.

    ``log_list``: key of ``CompiledTables.log_lists`` (the Log rules that matched before the verdict), 0 for none.  ``failsafe``: the rule is a
    failsafe port or a tunnel between nodes, so nothing that comes before may drop the packet either.
    """

    outcome: Outcome
    rule: int
    staged_outcome: Outcome
    staged_rule: int
    log_list: int = 0
    failsafe: bool = False


@dataclass(slots=True)
class Delta(Generic[K, V]):
    """Pending writes to one table. A key has an upsert or a delete, never both."""

    upserts: dict[K, V] = field(default_factory=dict)
    deletes: set[K] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.upserts or self.deletes)


class DesiredTable(Generic[K, V]):
    """Desired content of one map, with the writes that were not taken yet. Cost of each call: constant."""

    __slots__ = ("_pending", "_rows", "name", "version")

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = 0
        """A counter that every change increments, so that caches derived from the rows can detect staleness."""
        self._rows: dict[K, V] = {}
        self._pending: Delta[K, V] = Delta()

    def __getitem__(self, key: K) -> V:
        return self._rows[key]

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[K]:
        return iter(self._rows)

    def get(self, key: K) -> V | None:
        """The row, or None."""
        return self._rows.get(key)

    def items(self) -> Iterator[tuple[K, V]]:
        """All rows."""
        return iter(self._rows.items())

    def set(self, key: K, row: V) -> None:
        """Insert or replace a row; an equal row is no change."""
        if self._rows.get(key) != row:
            self.version += 1
            self._rows[key] = row
            self._pending.upserts[key] = row
            self._pending.deletes.discard(key)

    def delete(self, key: K) -> None:
        """Delete a row; an absent key is no change."""
        if self._rows.pop(key, None) is not None:
            self.version += 1
            self._pending.upserts.pop(key, None)
            self._pending.deletes.add(key)

    def write(self, rows: Mapping[K, V | None]) -> None:
        """Write many rows: `set` for each row, `delete` where it is None."""
        have, upserts, deletes = self._rows, self._pending.upserts, self._pending.deletes
        for key, row in rows.items():
            if row is None:
                if have.pop(key, None) is not None:
                    upserts.pop(key, None)
                    deletes.add(key)
            elif have.get(key) != row:
                have[key] = row
                upserts[key] = row
                deletes.discard(key)
        self.version += 1

    def take(self) -> Delta[K, V]:
        """Return the pending writes and clear them."""
        pending, self._pending = self._pending, Delta()
        return pending


@dataclass(slots=True)
class CompiledTables:
    """All tables of one node. Keys and rows as the kernel sees them, before packing.

    l4_atoms: block -> 256 atom numbers; l4_columns: block -> 64 class numbers; verdicts: index -> row.
    cidrs: a default route has a row only while a network set contains it; without one, a miss is WORLD_V4/WORLD_V6.
    l4_atoms: a block without a row is all zeros.  nodes: name -> number, of those that their addresses tell.
    """

    endpoints: DesiredTable[EndpointKey, EndpointRow] = field(default_factory=lambda: DesiredTable("endpoints"))
    addresses: DesiredTable[IPAddress, AddressRow] = field(default_factory=lambda: DesiredTable("addresses"))
    cidrs: DesiredTable[IPNetwork, int] = field(default_factory=lambda: DesiredTable("cidrs"))
    peer_classes: DesiredTable[tuple[int, int], int] = field(default_factory=lambda: DesiredTable("peer_classes"))
    l4_atoms: DesiredTable[int, tuple[int, ...]] = field(default_factory=lambda: DesiredTable("l4_atoms"))
    l4_columns: DesiredTable[int, tuple[int, ...]] = field(default_factory=lambda: DesiredTable("l4_columns"))
    verdicts: DesiredTable[int, VerdictRow] = field(default_factory=lambda: DesiredTable("verdicts"))
    rules: DesiredTable[int, Cause] = field(default_factory=lambda: DesiredTable("rules"))
    log_lists: DesiredTable[int, tuple[int, ...]] = field(default_factory=lambda: DesiredTable("log_lists"))
    identities: DesiredTable[int, str] = field(default_factory=lambda: DesiredTable("identities"))
    nodes: DesiredTable[str, int] = field(default_factory=lambda: DesiredTable("nodes"))

    def class_of_atom(self, column: int, atom: int) -> int:
        """The class of an atom in the column that begins at a block of ``l4_columns``."""
        return self.l4_columns[column + atom // COLUMN_BLOCK][atom % COLUMN_BLOCK]

    def verdict_of(self, row: VerdictRow) -> Verdict:
        """A verdict row with causes in place of rule numbers."""
        return Verdict(
            row.outcome,
            self.rules[row.rule],
            row.staged_outcome,
            self.rules[row.staged_rule],
            tuple(self.rules[rule] for rule in (self.log_lists[row.log_list] if row.log_list else ())),
        )

    def all(self) -> tuple[DesiredTable[object, object], ...]:
        """Every table, in an order in which rows may be written (rows that others refer to come first)."""
        return (
            self.rules, self.log_lists, self.identities, self.nodes, self.verdicts, self.l4_columns, self.l4_atoms,
            self.peer_classes, self.addresses, self.cidrs, self.endpoints,
        )  # type: ignore[return-value]  # fmt: skip


@dataclass(slots=True)
class Change:
    """One transition, as batches to be written in this order, each as ``{table name: delta}``.

    Within a batch, upserts in the order of `CompiledTables.all`, then deletes in the reverse order.  A change is written to its
    end (grace period and shrink included) before the next one is begun: numbers and ranges are used again then.

    prepare: policy sets that need more room, copied to a larger range, and the endpoint rows that point at them; no
    packet's verdict changes.
    grow: new rows and neutral re-labellings; no packet's verdict changes.
    flip: endpoint rows, and the address rows of endpoints that appeared, changed labels or went.
    shrink: rows nothing refers to any more; to be written after a grace period.
    ``revokes``: an allow may have become a deny, so the generation must be bumped after the flip.
    """

    prepare: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    grow: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    flip: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    shrink: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    revokes: bool = False

    def batches(self) -> Iterator[tuple[str, dict[str, Delta]]]:  # type: ignore[type-arg]
        """(name, batch) in the order of writing. After "flip" come the generation's increment and the grace period."""
        yield "prepare", self.prepare
        yield "grow", self.grow
        yield "flip", self.flip
        yield "shrink", self.shrink

    def __bool__(self) -> bool:
        return any(batch for _, batch in self.batches())
