# SPDX-License-Identifier: Apache-2.0
"""`Interpreter`: a verdict from the tables alone, step by step as the program in the kernel takes it.

Invariant: nothing but the tables is looked at; a row that is referred to and missing is an error, not a guess.
"""

from __future__ import annotations

from netpol_ebpf.compiler.rule_lists import nothing_decided
from netpol_ebpf.compiler.tables import (
    ATOM_BLOCK,
    COLUMN_BLOCK,
    OTHER_BLOCK,
    PROTOCOL_SLOT,
    SOURCE_SLOT,
    WORLD_V4,
    WORLD_V6,
    CompiledTables,
    SetRow,
    VerdictRow,
)
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    Direction,
    IPAddress,
    Packet,
    Question,
    Stage,
    Verdict,
)


class Interpreter:
    """Answers questions from tables, as they are when it is asked."""

    def __init__(self, tables: CompiledTables) -> None:
        self._tables = tables
        self._prefixes: dict[int, list[tuple[int, dict[int, int]]]] = {}
        self._prefix_version = -1
        self._verdicts: dict[VerdictRow, Verdict] = {}
        self._verdict_version = (-1, -1)

    def decide(self, question: Question) -> Verdict:
        """The verdict of the tables. Workloads without a row, like unknown endpoints, are denied."""
        tables = self._tables
        row = tables.endpoints.get(question.endpoint)
        if row is None:
            return _undecided(question.direction, Stage.NORMAL)
        set_row = row.sets.get((question.direction, question.stage))
        if set_row is None:
            return _undecided(question.direction, question.stage)
        packet = question.packet
        peer, own = packet.source, packet.destination
        if question.direction is Direction.EGRESS:
            peer, own = own, peer
        return self._verdict(tables.verdicts[self._index(set_row, peer, own, packet)])

    def identity_of(self, address: IPAddress) -> int:
        """Step 1: exact address, else longest prefix, else the world."""
        row = self._tables.addresses.get(address)
        if row is not None:
            return row.identity
        if self._prefix_version != self._tables.cidrs.version:
            self._index_prefixes()
        value = int(address)
        for shift, networks in self._prefixes[address.version]:
            identity = networks.get(value >> shift)
            if identity is not None:
                return identity
        return _of_family(address, WORLD_V4, WORLD_V6)

    def _index(self, row: SetRow, peer: IPAddress, own: IPAddress, packet: Packet) -> int:
        """Steps 2 to 4."""
        classes = self._tables.peer_classes
        known = classes.get((row.number, self.identity_of(peer)))
        peer_class = _of_family(peer, row.default_class4, row.default_class6) if known is None else known
        own_class = 0
        if row.own_set:
            known = classes.get((row.own_set, self.identity_of(own)))
            own_class = _of_family(own, row.own_default_class4, row.own_default_class6) if known is None else known
        l4_class = self._column(row.l4_base, *_position(packet)) if row.l4_classes > 1 else 0
        source_class = 0
        if row.source_classes > 1:
            port = packet.source_port if packet.protocol in PORT_PROTOCOLS else 0
            source_class = self._column(row.source_base, SOURCE_SLOT * 256 + (port >> 8), port & 255)
        for class_, bound in (
            (peer_class, row.peer_classes), (own_class, row.own_classes),
            (l4_class, row.l4_classes), (source_class, row.source_classes),
        ):  # fmt: skip
            if class_ >= bound:
                raise IndexError(f"class {class_} of policy set {row.number} is beyond {bound}")
        wide = peer_class * row.own_classes + own_class
        return row.verdict_base + (wide * row.l4_classes + l4_class) * row.source_classes + source_class

    def _column(self, base: int, block: int, index: int) -> int:
        """The class of the atom at (block, index), in the column at ``base``."""
        atoms = self._tables.l4_atoms.get(block)
        atom = 0 if atoms is None else atoms[index]
        return self._tables.l4_columns[base + atom // COLUMN_BLOCK][atom % COLUMN_BLOCK]

    def _index_prefixes(self) -> None:
        lengths: dict[tuple[int, int], dict[int, int]] = {}
        for network, identity in self._tables.cidrs.items():
            shift = network.max_prefixlen - network.prefixlen
            lengths.setdefault((network.version, shift), {})[int(network.network_address) >> shift] = identity
        self._prefixes = {
            version: [(shift, lengths[(family, shift)]) for family, shift in sorted(lengths) if family == version]
            for version in (4, 6)
        }
        self._prefix_version = self._tables.cidrs.version

    def _verdict(self, row: VerdictRow) -> Verdict:
        tables = self._tables
        version = (tables.rules.version, tables.log_lists.version)
        if version != self._verdict_version:
            self._verdicts.clear()
            self._verdict_version = version
        verdict = self._verdicts.get(row)
        if verdict is None:
            logs = tables.log_lists[row.log_list] if row.log_list else ()
            verdict = self._verdicts[row] = Verdict(
                row.outcome,
                tables.rules[row.rule],
                row.staged_outcome,
                tables.rules[row.staged_rule],
                tuple(tables.rules[rule] for rule in logs),
            )
        return verdict


def _of_family(address: IPAddress, four: int, six: int) -> int:
    return four if address.version == 4 else six  # noqa: PLR2004  # the family


def _position(packet: Packet) -> tuple[int, int]:
    """(atom block, index) of a packet's protocol and destination port or ICMP type and code."""
    slot = PROTOCOL_SLOT.get(packet.protocol)
    if slot is None:
        return OTHER_BLOCK, packet.protocol
    if packet.protocol in (ICMP, ICMPV6):
        return slot * 256 + packet.icmp_type, packet.icmp_code
    return slot * 256 + packet.destination_port // ATOM_BLOCK, packet.destination_port % ATOM_BLOCK


def _undecided(direction: Direction, stage: Stage) -> Verdict:
    outcome, cause = nothing_decided(direction, stage)
    return Verdict(outcome, cause, outcome, cause)
