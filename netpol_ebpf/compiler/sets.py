# SPDX-License-Identifier: Apache-2.0
"""A policy set in use: a rule list's entries as bit vectors, with classes, columns and verdicts.

*Own entries* are the entries that match the endpoint's own addresses, in templates that constrain the own side.  If all
own addresses match the same entries, the policy set contains no other entries of these templates, and the program does
not look up the own address.  Otherwise the set has verdict rows for each class of own addresses.

Invariants: each combination of classes in use has a verdict row.  The verdicts of a published set never change; the set
only gains and loses classes.  If a set's range of verdicts or columns gets too small, the set moves to a larger range
in phase PREPARE, so that the endpoint rows that refer to the set change before all other rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from netpol_ebpf.compiler.classes import ClassTable, ClassTables, EntryVectors
from netpol_ebpf.compiler.domains import DomainIndex
from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.entries import Effect
from netpol_ebpf.compiler.identities import IdentityIndex, MatchRecord
from netpol_ebpf.compiler.intervals import Intervals
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.l4 import ANY_SOURCE, AtomSpace, Split
from netpol_ebpf.compiler.limits import Limits, exceeded
from netpol_ebpf.compiler.numbers import Ranges
from netpol_ebpf.compiler.registers import RowRegister
from netpol_ebpf.compiler.rule_lists import RuleList, TemplateUse, nothing_decided
from netpol_ebpf.compiler.tables import COLUMN_BLOCK, Candidate, DomainList, PatternSet, SetRow, VerdictRow
from netpol_ebpf.compiler.terms import ANYONE
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, Outcome

OwnEntries = tuple[int, ...]
"""The entries that match the own addresses, as bits.

There is one item for each template of a rule list that constrains the own side, in the order of the rule list.
"""
SetKey = tuple[RuleList, "OwnEntries | None"]

LEAST_ROOM = 2
"""The smallest number of spare classes for which a policy set reserves verdicts on one side; arbitrary."""

_TRIM_ABOVE = 256
"""How many verdicts of deleted classes a policy set may cache; arbitrary."""

EXCEPTIONS = (CauseKind.FAILSAFE, CauseKind.TUNNEL)
"""The kinds of causes that protect packets from the policy of a host, in all stages."""

_OUTCOMES = {Effect.ALLOW: Outcome.ALLOW, Effect.DENY: Outcome.DENY, Effect.CONTINUE: Outcome.CONTINUE}


@dataclass(slots=True)
class Stores:
    """The parts of a compiler's state that all its policy sets share."""

    identities: IdentityIndex
    atoms: AtomSpace
    sources: AtomSpace
    causes: RowRegister[Cause]
    log_lists: RowRegister[tuple[int, ...]]
    names: DomainIndex
    class_tables: ClassTables
    verdicts: Ranges
    columns: Ranges
    limits: Limits


class _Entries:
    """The entries of a rule list that can match, by bit number.

    The entry of bit 0 is evaluated first.
    ``own_entries``: the entries to take from templates that constrain the own side.  None: all entries of these
    templates.
    """

    def __init__(self, rule_list: RuleList, own_entries: OwnEntries | None) -> None:
        self.effects: list[Effect] = []
        self.outcomes: list[Outcome] = []
        self.causes: list[Cause] = []
        # By bit: the first bit after its tier, at which the evaluation continues after Pass.
        self.targets: list[int] = []
        self.peers: dict[MatchRecord, int] = {}
        self.owns: dict[MatchRecord, int] = {}
        self.l4: dict[Intervals, int] = {}
        self.sources: dict[Intervals, int] = {}
        self.enforced = self.pending = self.ends = 0
        self.named = 0
        """The entries with domain names, as bits."""
        self.domains: dict[int, PatternSet] = {}  # by bit number
        self._direction = rule_list.direction
        self._own_iterator = None if own_entries is None else iter(own_entries)
        for use in rule_list.head:
            self._add_template(use)
        for tier in rule_list.tiers:
            first = len(self.effects)
            for use in tier.uses:
                self._add_template(use)
            ends = {(tier.end_enforced, True, tier.end_enforced == tier.end_pending)}
            if tier.end_pending != tier.end_enforced:
                ends.add((tier.end_pending, False, True))
            for policy, enforced, pending in sorted(ends, key=lambda end: not end[1]):
                if policy is not None:
                    cause = Cause(CauseKind.TIER_END, rule_list.direction, tier.name, policy, action=Action.DENY)
                    self.ends |= 1 << len(self.effects)
                    self._add(Effect.DENY, cause, enforced=enforced, pending=pending)
            self.targets[first:] = [len(self.effects)] * (len(self.effects) - first)
        for use in rule_list.profiles:
            self._add_template(use)

    @property
    def asks_source(self) -> bool:
        """Whether an enforced entry depends on the owner of the source address, or on the source port.

        If so, the program drops a packet whose source was translated, because policy cannot see the real source. Staged
        entries do not count, because they must not cause a drop.
        """
        owners = self.owns if self._direction is Direction.EGRESS else self.peers
        asking = [bits for record, bits in owners.items() if not record.match.is_family_alone]
        asking += [bits for intervals, bits in self.sources.items() if intervals != ANY_SOURCE]
        return any(bits & self.enforced for bits in asking)

    def _add(self, effect: Effect, cause: Cause, *, enforced: bool, pending: bool) -> int:
        bit = 1 << len(self.effects)
        self.effects.append(effect)
        self.outcomes.append(
            _OUTCOMES.get(effect, Outcome.CONTINUE)
        )  # not read for Pass and Log, which end no evaluation
        self.causes.append(cause)
        self.targets.append(0)
        if enforced:
            self.enforced |= bit
        if pending and effect is not Effect.LOG:  # only the enforced evaluation records Log rules
            self.pending |= bit
        return bit

    def _add_template(self, use: TemplateUse) -> None:
        template = use.template
        kept = -1
        if self._own_iterator is not None and template.constrains_own:
            kept = next(self._own_iterator)
        for index, (entry, peer, own) in enumerate(zip(template.entries, template.peers, template.owns, strict=True)):
            if not kept >> index & 1:
                continue
            bit = self._add(entry.effect, entry.cause, enforced=use.enforced, pending=use.pending)
            if entry.domains:
                self.named |= bit
                self.domains[len(self.effects) - 1] = entry.domains
            self.peers[peer] = self.peers.get(peer, 0) | bit
            if self._own_iterator is None:
                self.owns[own] = self.owns.get(own, 0) | bit
            self.l4[entry.l4] = self.l4.get(entry.l4, 0) | bit
            self.sources[entry.source] = self.sources.get(entry.source, 0) | bit


class _Column:
    """The class of each atom of one line (L4 or source ports) in a policy set.

    ``vectors``: maps a class to the bit vector of the entries that match the class.
    ``classes``: maps an atom to its class, padded to the end of the last block.
    """

    def __init__(self, masks: dict[Intervals, int], always: int, space: AtomSpace, limit: int, what: str) -> None:
        self.base = 0
        self.blocks = 0
        by_atom: dict[int, int] = dict.fromkeys(range(space.size), always)
        for predicate, mask in masks.items():
            for atom in space.atoms_of(predicate):
                by_atom[atom] |= mask
        used = space.atoms()
        numbers: dict[int, int] = {}
        self.classes = [
            numbers.setdefault(by_atom[atom], len(numbers)) if atom in used else 0 for atom in range(space.size)
        ]
        self.vectors = list(numbers)
        if len(numbers) > limit:
            raise exceeded(what, "classes_per_set", limit, len(numbers))

    @property
    def is_constant(self) -> bool:
        """Whether all atoms are in one class, so that the program needs no column."""
        return len(self.vectors) == 1

    def place(self, phase: Phase, stores: Stores, draft: Draft, what: str) -> None:
        """Allocate a range of blocks with spare room, and write the classes of all atoms there.

        Raises LimitError if no range is free.
        ``what``: the object that the error names.
        """
        self.blocks = 1
        while self.blocks * COLUMN_BLOCK < len(self.classes) + COLUMN_BLOCK // 2:
            self.blocks *= 2
        base = stores.columns.take(self.blocks)
        if base is None:
            raise exceeded(what, "column_blocks", stores.limits.column_blocks, stores.columns.in_use + self.blocks)
        self.base = base
        self.classes.extend([0] * (self.blocks * COLUMN_BLOCK - len(self.classes)))
        self.write(phase, range(self.blocks), draft)

    def by_atom(self, space: AtomSpace) -> list[int]:
        """The vector of each atom in use, in the order of the atoms' numbers."""
        atoms = sorted(space.atoms())
        if self.is_constant:
            return self.vectors * len(atoms)
        return [self.vectors[self.classes[atom]] for atom in atoms]

    def write(self, phase: Phase, blocks: range | set[int], draft: Draft) -> None:
        rows = draft.rows(phase, "l4_columns")
        for block in blocks:
            rows[self.base + block] = tuple(self.classes[block * COLUMN_BLOCK : (block + 1) * COLUMN_BLOCK])


def _room(class_table: ClassTable) -> int:
    """The number of classes for which a policy set reserves verdicts on one side: the present classes and spare ones.

    If every match depends only on the address family, the result has no spare classes, because no class can be added.
    """
    if all(record.match.is_family_alone for record in class_table.matches):
        return class_table.span
    return class_table.span + max(LEAST_ROOM, class_table.span // 4)


@dataclass(frozen=True, slots=True)
class _Walked:
    """The result of one evaluation of a packet's entries, as if no name matched.

    ``named``: the rules with domain names that would have matched before ``rule``, by pattern set, in order: the first
    rule of each pattern set, with the Log rules that matched before that rule.
    """

    outcome: Outcome
    rule: int
    logs: tuple[int, ...]
    named: dict[PatternSet, tuple[int, tuple[int, ...]]]


class LiveSet:
    """A policy set that is published or under construction.

    ``references``: how many combinations of endpoint, direction and stage use the set.
    """

    def __init__(self, key: SetKey, what: str, stores: Stores, draft: Draft, journal: Journal) -> None:
        self.key = key
        self.what = what
        self.references = 0
        self._stores = stores
        rule_list, own_entries = key
        self._entries = entries = _Entries(rule_list, own_entries)
        if len(entries.effects) > stores.limits.entries_per_set:
            raise exceeded(what, "entries_per_set", stores.limits.entries_per_set, len(entries.effects))
        self._rules = [stores.causes.acquire(cause, what, draft, journal) for cause in entries.causes]
        self._exceptions = frozenset(
            rule for rule, cause in zip(self._rules, entries.causes, strict=True) if cause.kind in EXCEPTIONS
        )
        self._tail, cause = nothing_decided(rule_list.direction, rule_list.stage)
        self._tail_rule = stores.causes.acquire(cause, what, draft, journal)
        self._verdicts: dict[int, VerdictRow] = {}
        self._trimmed = 0
        self.losses: dict[tuple[bool, int, int], bool] = {}
        """Cached results of `netpol_ebpf.compiler.revocation`: whether a verdict gets stricter if an identity changes.

        The key is (True if it is the peer's identity, vector of the old identity, vector of the new identity).  A
        result stays valid, because the verdicts of a set never change.
        """
        for predicate in entries.l4:
            stores.atoms.acquire(predicate, journal)
        for predicate in entries.sources:
            stores.sources.acquire(predicate, journal)
        self.peer = self._side(entries.peers, journal)
        self.own: EntryVectors | None = None
        if any(record.match != ANYONE for record in entries.owns):
            self.own = self._side(entries.owns, journal)
        self._l4: _Column
        self._source: _Column
        self.base = 0
        self.size = 0
        self.peer_room = self.own_room = 1
        self.row: SetRow

    def _side(self, matches: dict[MatchRecord, int], journal: Journal) -> EntryVectors:
        always = self._entries.ends
        masks: dict[MatchRecord, int] = {}
        for record, mask in matches.items():
            if record.match == ANYONE:
                always |= mask
            else:
                masks[record] = mask
        return EntryVectors(self._stores.class_tables.acquire(frozenset(masks), self.what, journal), masks, always)

    @property
    def sides(self) -> tuple[EntryVectors, ...]:
        """The peer's side, and the own side if the policy set has verdicts for each class of own addresses."""
        return (self.peer,) if self.own is None else (self.peer, self.own)

    @property
    def class_tables(self) -> Iterable[ClassTable]:
        """The distinct class tables of the sides."""
        return dict.fromkeys(side.table for side in self.sides)

    # --- building ---------------------------------------------------------------------------------------------------

    def build(self, draft: Draft, journal: Journal) -> None:
        """Build the classes, columns and verdicts of an unpublished set. The atom spaces must be up to date."""
        stores = self._stores
        for class_table in self.class_tables:
            if not class_table.is_built:
                class_table.build(draft)
        limit, ends = stores.limits.classes_per_set, self._entries.ends
        self._l4 = _Column(self._entries.l4, ends, stores.atoms, limit, self.what)
        self._source = _Column(self._entries.sources, ends, stores.sources, limit, self.what)
        for column in (self._l4, self._source):
            if not column.is_constant:
                column.place(Phase.GROW, stores, draft, self.what)
        self._place_verdicts(Phase.GROW, draft, journal)

    def _place_verdicts(self, phase: Phase, draft: Draft, journal: Journal) -> None:
        """Allocate a range of verdicts with room for further classes, and write the verdicts of the present classes."""
        self.peer_room = _room(self.peer.table)
        if self.own is not None:
            self.own_room = _room(self.own.table)
        size = self.peer_room * self.own_room * len(self._l4.vectors) * len(self._source.vectors)
        limits = self._stores.limits
        if size > limits.verdicts_per_set:
            raise exceeded(self.what, "verdicts_per_set", limits.verdicts_per_set, size)
        base = self._stores.verdicts.take(size)
        if base is None:
            raise exceeded(self.what, "verdicts", limits.verdicts, self._stores.verdicts.in_use + size)
        self.base, self.size = base, size
        owns = {0: -1} if self.own is None else self.own.vectors
        self._write_verdicts(phase, self.peer.vectors, owns, draft, journal)
        self._make_row()

    def _make_row(self) -> None:
        self.row = SetRow(
            number=self.peer.table.number,
            default_class4=self.peer.table.defaults[4],
            default_class6=self.peer.table.defaults[6],
            peer_classes=self.peer_room,
            own_set=0 if self.own is None else self.own.table.number,
            own_default_class4=0 if self.own is None else self.own.table.defaults[4],
            own_default_class6=0 if self.own is None else self.own.table.defaults[6],
            own_classes=self.own_room,
            l4_base=self._l4.base,
            l4_classes=len(self._l4.vectors),
            asks_source=int(self._entries.asks_source),
            source_base=self._source.base,
            source_classes=len(self._source.vectors),
            verdict_base=self.base,
        )

    def _write_verdicts(
        self, phase: Phase, peers: dict[int, int], owns: dict[int, int], draft: Draft, journal: Journal
    ) -> None:
        rows = draft.rows(phase, "verdicts")
        l4_vectors, source_vectors = self._l4.vectors, self._source.vectors
        stride = len(source_vectors)
        verdicts = self._verdicts
        for (peer, peer_vector), (own, own_vector) in product(peers.items(), owns.items()):
            both = peer_vector & own_vector
            index = self.base + (peer * self.own_room + own) * len(l4_vectors) * stride
            for l4_vector in l4_vectors:
                three = both & l4_vector
                for source_vector in source_vectors:
                    vector = three & source_vector
                    row = verdicts.get(vector)
                    if row is None:
                        row = self._verdict(vector, draft, journal)
                        journal.put(verdicts, vector, row)
                    rows[index] = row
                    index += 1

    def _verdict(self, vector: int, draft: Draft, journal: Journal) -> VerdictRow:
        """The verdict row of the packets that match exactly the entries in ``vector``."""
        enforced, pending = (self._walk(vector & taking) for taking in (self._entries.enforced, self._entries.pending))
        log_lists = self._stores.log_lists

        def list_of(logs: tuple[int, ...]) -> int:
            return log_lists.acquire(logs, self.what, draft, journal) if logs else 0

        domain_list = 0
        if enforced.named or pending.named:
            candidates = DomainList(
                tuple(Candidate(patterns, rule, list_of(logs)) for patterns, (rule, logs) in enforced.named.items()),
                tuple(Candidate(patterns, rule) for patterns, (rule, _) in pending.named.items()),
            )
            domain_list = self._stores.names.acquire(candidates, self.what, draft, journal)
        return VerdictRow(
            enforced.outcome,
            enforced.rule,
            pending.outcome,
            pending.rule,
            list_of(enforced.logs),
            enforced.rule in self._exceptions,
            domain_list,
        )

    def _release_verdict(self, verdict: VerdictRow, journal: Journal) -> None:
        """Release what a verdict row that is no longer cached refers to."""
        stores = self._stores
        if verdict.log_list:
            stores.log_lists.release(verdict.log_list, journal)
        if verdict.domain_list:
            for candidate in stores.names.value_of(verdict.domain_list).enforced:
                if candidate.log_list:
                    stores.log_lists.release(candidate.log_list, journal)
            stores.names.release(verdict.domain_list, journal)

    def _trim(self, journal: Journal) -> None:
        """Drop cached verdicts of removed classes."""
        owns = (-1,) if self.own is None else tuple(self.own.vectors.values())
        reachable = {
            peer & own & l4 & source
            for peer, own, l4, source in product(
                self.peer.vectors.values(), owns, self._l4.vectors, self._source.vectors
            )
        }
        for vector in self._verdicts.keys() - reachable:
            self._release_verdict(journal.pop(self._verdicts, vector), journal)
        journal.assign(self, "_trimmed", len(self._verdicts))

    def _walk(self, vector: int) -> _Walked:
        """Evaluate the entries in ``vector`` in order, as if no name matched."""
        entries = self._entries
        logs: dict[int, None] = {}
        named: dict[PatternSet, tuple[int, tuple[int, ...]]] = {}
        while vector:
            index = (vector & -vector).bit_length() - 1
            effect = entries.effects[index]
            if entries.named >> index & 1:
                named.setdefault(entries.domains[index], (self._rules[index], tuple(logs)))
                vector &= vector - 1
            elif effect is Effect.PASS:
                target = entries.targets[index]
                vector = vector >> target << target
            elif effect is Effect.LOG:
                logs[self._rules[index]] = None
                vector &= vector - 1
            else:
                return _Walked(entries.outcomes[index], self._rules[index], tuple(logs), named)
        return _Walked(self._tail, self._tail_rule, tuple(logs), named)

    # --- growing ----------------------------------------------------------------------------------------------------

    def add_classes(
        self, peers: dict[int, int], owns: dict[int, int], draft: Draft, journal: Journal
    ) -> tuple[int, int] | None:
        """Add new classes to a published set.

        The class tables have these classes already.
        ``peers``, ``owns``: map each new class of the peer's and of the own side to its vector of entries.

        Returns the range of verdicts (start, length) that the set left if it moved, else None.
        """
        left: tuple[int, int] | None = None
        for name in ("base", "size", "peer_room", "own_room", "row"):
            journal.assign(self, name, getattr(self, name))
        if len(self._verdicts) > 2 * self._trimmed + _TRIM_ABOVE:
            self._trim(journal)
        if self.peer.table.span > self.peer_room or (self.own is not None and self.own.table.span > self.own_room):
            left = (self.base, self.size)
            self._place_verdicts(Phase.PREPARE, draft, journal)
            return left
        old_owns = {0: -1} if self.own is None else self.own.vectors
        self._write_verdicts(Phase.GROW, peers, old_owns, draft, journal)
        if owns:
            self._write_verdicts(Phase.GROW, self.peer.vectors, owns, draft, journal)
        return None

    def add_atoms(self, split: Split, source: bool, draft: Draft, journal: Journal) -> tuple[int, int] | None:  # noqa: FBT001  # selects the line
        """Add new atoms to a published set.

        Each new atom gets the class of the atom from which it was split.
        ``source``: whether the atoms are source-port atoms.

        Returns the range of column blocks (start, length) that the set left if it moved, else None.
        """
        column = self._source if source else self._l4
        if column.is_constant or not split.parents:
            return None
        classes = column.classes.copy()
        classes.extend([0] * (max(split.parents) + 1 - len(classes)))
        for atom, parent in split.parents.items():
            classes[atom] = column.classes[parent]
        journal.assign(column, "classes", classes)
        if len(classes) > column.blocks * COLUMN_BLOCK:
            left = (column.base, column.blocks)
            journal.assign(column, "base", column.base)
            journal.assign(column, "blocks", column.blocks)
            journal.assign(self, "row", self.row)
            column.place(Phase.PREPARE, self._stores, draft, self.what)
            self._make_row()
            return left
        column.write(Phase.GROW, {atom // COLUMN_BLOCK for atom in split.parents}, draft)
        return None

    # --- reading ----------------------------------------------------------------------------------------------------

    def outcome(self, vector: int) -> Outcome:
        """The outcome of the enforced evaluation of packets that match exactly the entries in ``vector``."""
        known = self._verdicts.get(vector)
        return self._walk(vector & self._entries.enforced).outcome if known is None else known.outcome

    def allowed_names(self, vector: int) -> frozenset[str]:
        """The patterns of domain names that allow packets that match exactly the entries in ``vector``.

        Names do not count for packets that are allowed without them.
        """
        if not vector & self._entries.named & self._entries.enforced or self.outcome(vector) is Outcome.ALLOW:
            return frozenset()
        return frozenset().union(*self._walk(vector & self._entries.enforced).named)

    def may(self, outcome: Outcome) -> bool:
        """Whether some packet may have this outcome. If the result is False, no packet has the outcome.

        If the result is True, it is not certain that a packet has the outcome.
        """
        return any(
            verdict.outcome is outcome or (outcome is Outcome.ALLOW and verdict.domain_list)
            for verdict in self._verdicts.values()
        )

    def port_vectors(self) -> tuple[list[int], list[int]]:
        """The vectors of the L4 classes, and the vectors of the source-port classes."""
        return self._l4.vectors, self._source.vectors

    def atom_vectors(self) -> list[int]:
        """The vector of each atom in use, in the order of the atoms' numbers."""
        return self._l4.by_atom(self._stores.atoms)

    def source_vectors(self) -> list[int]:
        """The vector of each source-port atom in use, in the order of the atoms' numbers."""
        return self._source.by_atom(self._stores.sources)

    # --- the end ----------------------------------------------------------------------------------------------------

    def release_predicates(self, journal: Journal) -> None:
        """Release the protocol and port predicates of a set without references."""
        for predicate in self._entries.l4:
            self._stores.atoms.release(predicate, journal)
        for predicate in self._entries.sources:
            self._stores.sources.release(predicate, journal)

    def release(self, draft: Draft, journal: Journal) -> None:
        """Remove the set's rows. Must be called at the end of a commit."""
        stores = self._stores
        for side in self.sides:
            stores.class_tables.release(side.table, draft, journal)
        for rule in (*self._rules, self._tail_rule):
            stores.causes.release(rule, journal)
        for verdict in self._verdicts.values():
            self._release_verdict(verdict, journal)
        free_verdicts(self.base, self.size, stores, draft)
        for column in (self._l4, self._source):
            if not column.is_constant:
                free_columns(column.base, column.blocks, stores, draft)


def free_verdicts(base: int, size: int, stores: Stores, draft: Draft) -> None:
    """Free the ``size`` rows of the table ``verdicts`` from ``base`` on, and delete them."""
    rows = draft.rows(Phase.SHRINK, "verdicts")
    for index in range(base, base + size):
        rows[index] = DELETED
    stores.verdicts.give_back(base, size)


def free_columns(base: int, blocks: int, stores: Stores, draft: Draft) -> None:
    """Free the ``blocks`` rows of the table ``l4_columns`` from ``base`` on, and delete them."""
    rows = draft.rows(Phase.SHRINK, "l4_columns")
    for block in range(base, base + blocks):
        rows[block] = DELETED
    stores.columns.give_back(base, blocks)
