# SPDX-License-Identifier: Apache-2.0
"""The compiled tables: the content of the kernel's maps as plain Python values, and changes of the tables.

The verdict on a packet is found in four steps, each of which is one lookup.  `netpol_ebpf.compiler.interpreter` makes
the steps on these tables, `bpf/np_classify.h` in the kernel:

    1. peer address  -> identity        addresses (exact), else cidrs (longest prefix), else WORLD_V4/WORLD_V6
    2. identity      -> peer class      peer_classes[(set, identity)], else the set's default class for the family
       own address   -> own class       the same with ``own_set``; only if the set has entries on the own address
    3. (protocol, destination port | ICMP type and code) -> atom -> L4 class of the set (``l4_columns``)
       source port   -> atom -> source class; only if a rule of the set has a condition on source ports
    4. verdicts[verdict_base + ((peer class * own_classes + own class) * l4_classes + L4 class) * source_classes
       + source class]
    5. if the verdict has a domain list: domains[(domain list, name class)] for each class of the names that the
       endpoint learned for the peer address; the row with the least rank replaces the verdict

Invariants: rows are immutable.  The verdicts of a published policy set never change; the set may gain classes.  Every
number in a row is defined before the row is written (make before break); the batches of a `Change` have this order.
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
"""The first identity with owners or address groups.

1 (IPv4) and 2 (IPv6) are the identities of addresses without owners and groups; 0 is no identity.
"""

FIRST_NODE = 1 << 20
"""The first number of a node. The numbers of endpoints are below it."""

ATOM_BLOCK = 256
"""How many atom numbers a block has. The index in the block is the low byte of a port, or an ICMP code."""

COLUMN_BLOCK = 64
"""How many classes a block of a column has. The column of a policy set begins at a block boundary."""

PROTOCOL_SLOT: Mapping[int, int] = {TCP: 0, UDP: 1, SCTP: 2, ICMP: 3, ICMPV6: 4}
"""By protocol, a number ``slot`` that determines the protocol's atom blocks.

The block is slot*256 + (port >> 8), or slot*256 + ICMP type.
"""
SOURCE_SLOT = 5
"""The ``slot`` of source ports, for all protocols. The atom block is SOURCE_SLOT*256 + (source port >> 8)."""
OTHER_BLOCK = 6 * 256
"""The atom block of all other protocols. The index in the block is the protocol's number."""
ATOM_BLOCKS = OTHER_BLOCK + 1


@dataclass(frozen=True, slots=True)
class SetRow:
    """One policy set: everything that applies to an endpoint in one direction and stage, as the program reads it.

    ``number``: the ``set`` in keys of ``peer_classes`` for the peer's class.  Policy sets with the same peer classes
    share the number.
    ``default_class*``: by family, the class of identities without a row in ``peer_classes``.
    ``own_set``: like ``number``, for the own side. 0 if all own addresses are in one class; then ``own_classes`` is 1.
    ``l4_base``: the first block of the column of L4 classes in ``l4_columns``.
    ``source_base``: the first block of the column of source-port classes; unused if ``source_classes`` is 1.
    ``peer_classes``, ``own_classes``: every class number is below these bounds.
    ``asks_source``: 1 if an enforced rule depends on the owner of the source address, or on the source port; else 0.
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
        """The key in ``verdicts`` for one combination of classes. Raises IndexError for a class beyond its bound."""
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
    """The policy sets of an endpoint.

    ``number``: the endpoint's number.  It does not change while the endpoint exists, is unique on the node, and is
    never 0.
    ``sets``: the policy set for each (Direction, Stage).  NORMAL has a policy set in both directions.  A stage without
    a policy set decides nothing.
    """

    number: int
    sets: Mapping[tuple[Direction, Stage], SetRow] = field(hash=False)


@dataclass(frozen=True, slots=True)
class AddressRow:
    """The row of an address.

    ``endpoint``: the number of the local endpoint that has the address (for anti-spoofing); 0 if none has it.
    ``node``: the number of the node whose own address this is, or on which the remote endpoint with this address runs.
    0 if the node is unknown, and for addresses of local endpoints.
    """

    identity: int
    endpoint: int = 0
    node: int = 0


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One verdict.

    Rule numbers are keys of ``CompiledTables.rules``.
    ``log_list``: a key of ``CompiledTables.log_lists``, for the Log rules that matched before the verdict; 0 for none.
    ``failsafe``: whether the rule is a failsafe port or a tunnel between nodes, so that no earlier stage may drop the
    packet.
    ``domain_list``: the number of the list of rules with domain names that may match before the verdict's rule; 0 for
    none.
    """

    outcome: Outcome
    rule: int
    staged_outcome: Outcome
    staged_rule: int
    log_list: int = 0
    failsafe: bool = False
    domain_list: int = 0


PatternSet = frozenset[str]
"""The patterns of domain names of one rule, or of the network sets that one rule selects."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rule with domain names that may match before a verdict's own rule. Its action is allow.

    ``log_list``: a key of ``CompiledTables.log_lists``, for the Log rules that match before ``rule``; 0 for none, and in
    the pending evaluation.
    """

    patterns: PatternSet
    rule: int
    log_list: int = 0


@dataclass(frozen=True, slots=True)
class DomainList:
    """The candidates of a verdict in the enforced and in the pending evaluation, each in the order of evaluation."""

    enforced: tuple[Candidate, ...] = ()
    pending: tuple[Candidate, ...] = ()

    @property
    def pattern_sets(self) -> frozenset[PatternSet]:
        """The pattern sets of all candidates."""
        return frozenset(candidate.patterns for candidate in (*self.enforced, *self.pending))

    def __bool__(self) -> bool:
        return bool(self.enforced or self.pending)


NO_RANK = 65535
"""The rank in a `DomainRow` if no rule matches."""


@dataclass(frozen=True, slots=True)
class DomainRow:
    """The first rules of a domain list that match the names of one name class. The action of these rules is allow.

    ``rank``, ``staged_rank``: the rule's position in the domain list, in the enforced and in the pending evaluation;
    NO_RANK if no rule of the list matches.  Of several name classes, the row with the least rank counts.
    ``rule``, ``staged_rule``: keys of ``CompiledTables.rules``; 0 if no rule matches.
    ``log_list``: a key of ``CompiledTables.log_lists``, for the Log rules that matched before ``rule``; 0 for none.
    """

    rank: int
    staged_rank: int
    rule: int
    staged_rule: int
    log_list: int = 0


@dataclass(slots=True)
class Delta(Generic[K, V]):
    """Writes to one table that are not made yet. A key is in ``upserts`` or in ``deletes``, never in both."""

    upserts: dict[K, V] = field(default_factory=dict)
    deletes: set[K] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.upserts or self.deletes)


class DesiredTable(Generic[K, V]):
    """The desired content of one map, and the writes since the last `take`. Writing one row costs constant time."""

    __slots__ = ("_pending", "_rows", "name", "version")

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = 0
        """A counter that every change increments. Caches of derived values compare the counter to detect changes."""
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
        """The row of ``key``, or None."""
        return self._rows.get(key)

    def items(self) -> Iterator[tuple[K, V]]:
        """All keys with their rows."""
        return iter(self._rows.items())

    def set(self, key: K, row: V) -> None:
        """Insert or replace a row. An equal row is no change."""
        if self._rows.get(key) != row:
            self.version += 1
            self._rows[key] = row
            self._pending.upserts[key] = row
            self._pending.deletes.discard(key)

    def delete(self, key: K) -> None:
        """Delete a row. An absent key is no change."""
        if self._rows.pop(key, None) is not None:
            self.version += 1
            self._pending.upserts.pop(key, None)
            self._pending.deletes.add(key)

    def write(self, rows: Mapping[K, V | None]) -> None:
        """Write many rows: `set` each row, and `delete` each key whose row is None."""
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
        """Return the writes since the last call, and clear them."""
        pending, self._pending = self._pending, Delta()
        return pending


@dataclass(slots=True)
class CompiledTables:
    """All tables of one node.

    Keys and rows have the same meaning as in the maps, but are not packed into bytes.
    ``cidrs``: maps a prefix to its identity.  A default route has a row only if an owner has the default route.  The
    identity of an address that no row contains is WORLD_V4 or WORLD_V6.
    ``peer_classes``: maps (class table, identity) to class.
    ``l4_atoms``: maps a block to its 256 atom numbers.  A block without a row is all zeros.
    ``l4_columns``: maps a block to its 64 class numbers.
    ``verdicts``: maps index to verdict row.
    ``domain_lists``: maps the number of a domain list to its content.
    ``domains``: maps (domain list, name class) to the rules that match the names of the class.
    ``names``: maps a pattern of domain names (``www.example.com``, ``*.example.com``) to the class of the names for which
    it is the most specific pattern.  A name that no pattern matches has class 0.
    ``name_classes``: maps a name class to its content, the pattern sets of rules that match its names.  A class keeps its
    number as long as an endpoint may have learned it.
    ``identities``: maps an identity to the digest of its content.
    ``nodes``: maps the name of a node that its addresses identify (`netpol_ebpf.compiler.nodes`) to its number.
    """

    endpoints: DesiredTable[EndpointKey, EndpointRow] = field(default_factory=lambda: DesiredTable("endpoints"))
    addresses: DesiredTable[IPAddress, AddressRow] = field(default_factory=lambda: DesiredTable("addresses"))
    cidrs: DesiredTable[IPNetwork, int] = field(default_factory=lambda: DesiredTable("cidrs"))
    peer_classes: DesiredTable[tuple[int, int], int] = field(default_factory=lambda: DesiredTable("peer_classes"))
    l4_atoms: DesiredTable[int, tuple[int, ...]] = field(default_factory=lambda: DesiredTable("l4_atoms"))
    l4_columns: DesiredTable[int, tuple[int, ...]] = field(default_factory=lambda: DesiredTable("l4_columns"))
    verdicts: DesiredTable[int, VerdictRow] = field(default_factory=lambda: DesiredTable("verdicts"))
    domain_lists: DesiredTable[int, DomainList] = field(default_factory=lambda: DesiredTable("domain_lists"))
    domains: DesiredTable[tuple[int, int], DomainRow] = field(default_factory=lambda: DesiredTable("domains"))
    names: DesiredTable[str, int] = field(default_factory=lambda: DesiredTable("names"))
    name_classes: DesiredTable[int, frozenset[PatternSet]] = field(default_factory=lambda: DesiredTable("name_classes"))
    rules: DesiredTable[int, Cause] = field(default_factory=lambda: DesiredTable("rules"))
    log_lists: DesiredTable[int, tuple[int, ...]] = field(default_factory=lambda: DesiredTable("log_lists"))
    identities: DesiredTable[int, str] = field(default_factory=lambda: DesiredTable("identities"))
    nodes: DesiredTable[str, int] = field(default_factory=lambda: DesiredTable("nodes"))

    def class_of_atom(self, column: int, atom: int) -> int:
        """The class of ``atom`` in the column that begins at the block ``column`` of ``l4_columns``."""
        return self.l4_columns[column + atom // COLUMN_BLOCK][atom % COLUMN_BLOCK]

    def verdict_of(self, row: VerdictRow) -> Verdict:
        """The verdict of a row, with causes in place of rule numbers."""
        return Verdict(
            row.outcome,
            self.rules[row.rule],
            row.staged_outcome,
            self.rules[row.staged_rule],
            tuple(self.rules[rule] for rule in (self.log_lists[row.log_list] if row.log_list else ())),
        )

    def all(self) -> tuple[DesiredTable[object, object], ...]:
        """Every table, in the order in which rows must be written.

        If a row refers to another row, the other row must be written first.
        """
        return (
            self.rules, self.log_lists, self.identities, self.nodes, self.domain_lists, self.name_classes, self.domains,
            self.names, self.verdicts, self.l4_columns, self.l4_atoms, self.peer_classes, self.addresses, self.cidrs, self.endpoints,
        )  # type: ignore[return-value]  # fmt: skip


@dataclass(slots=True)
class Change:
    """A change of the tables: four batches ``{table name: delta}``, which must be written in this order.

    Within a batch, upserts are written in the order of `CompiledTables.all`, then deletes in the reverse order.  A
    change must be written completely, with grace period and shrink, before the next change, because the next change may
    reuse numbers and ranges.
    ``prepare``: policy sets that need more room, copied to a larger range, and the endpoint rows that refer to them.
    No verdict on a packet changes.
    ``grow``: new rows, and new identities on which no verdict depends yet.  No verdict on a packet changes.
    ``flip``: endpoint rows, and the address rows of endpoints that appeared, changed labels or disappeared.
    ``shrink``: rows to which no row refers any more.  They must be written after a grace period.
    ``revokes``: an allow may have become a deny, so the generation must be incremented after the flip.
    """

    prepare: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    grow: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    flip: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    shrink: dict[str, Delta] = field(default_factory=dict)  # type: ignore[type-arg]
    revokes: bool = False

    def batches(self) -> Iterator[tuple[str, dict[str, Delta]]]:  # type: ignore[type-arg]
        """Each batch with its name, in the order of writing.

        After "flip" the caller must increment the generation if the change revokes, and wait for a grace period.
        """
        yield "prepare", self.prepare
        yield "grow", self.grow
        yield "flip", self.flip
        yield "shrink", self.shrink

    def __bool__(self) -> bool:
        return any(batch for _, batch in self.batches())
