# SPDX-License-Identifier: Apache-2.0
"""`Interpreter`: computes a verdict from the compiled tables alone, in the same steps as the program in the kernel.

Invariant: only the tables are read.  KeyError is raised if a row that another row refers to is missing.
"""

from __future__ import annotations

from dataclasses import replace

from netpol_ebpf.compiler.domains import most_specific
from netpol_ebpf.compiler.rule_lists import nothing_decided
from netpol_ebpf.compiler.tables import (
    ATOM_BLOCK,
    NO_RANK,
    OTHER_BLOCK,
    PROTOCOL_SLOT,
    SOURCE_SLOT,
    WORLD_V4,
    WORLD_V6,
    CompiledTables,
    DomainRow,
    SetRow,
    VerdictRow,
)
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    Direction,
    IPAddress,
    Outcome,
    Packet,
    Question,
    Stage,
    Verdict,
)

_NO_ROW = DomainRow(NO_RANK, NO_RANK, 0, 0)


class Interpreter:
    """Computes verdicts from the tables, as they are at the time of each call."""

    def __init__(self, tables: CompiledTables) -> None:
        self._tables = tables
        self._prefixes: dict[int, list[tuple[int, dict[int, int]]]] = {}
        self._prefix_version = -1
        self._verdicts: dict[VerdictRow, Verdict] = {}
        self._verdict_version = (-1, -1)

    def decide(self, question: Question) -> Verdict:
        """The tables' verdict on ``question``. An endpoint without a row is denied everything."""
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
        verdict = tables.verdicts[self._index(set_row, peer, own, packet)]
        if verdict.domain_list and question.names:
            verdict = self._by_names(verdict, question.names)
        return self._verdict(verdict)

    def _by_names(self, row: VerdictRow, names: frozenset[str]) -> VerdictRow:
        """Step 5: the verdict row with the rules that match by one of ``names`` in place of the row's own rules."""
        tables = self._tables
        classes = {most_specific(name, tables.names) for name in names}
        rows = [found for class_ in classes if (found := tables.domains.get((row.domain_list, class_)))]
        enforced = min(rows, key=lambda found: found.rank, default=_NO_ROW)
        pending = min(rows, key=lambda found: found.staged_rank, default=_NO_ROW)
        if enforced.rank != NO_RANK:
            row = replace(row, outcome=Outcome.ALLOW, rule=enforced.rule, log_list=enforced.log_list, failsafe=False)
        if pending.staged_rank != NO_RANK:
            row = replace(row, staged_outcome=Outcome.ALLOW, staged_rule=pending.staged_rule)
        return row

    def identity_of(self, address: IPAddress) -> int:
        """Step 1: the identity of an address.

        The address's own row has the identity, else the row of the longest prefix that contains the address.  Without
        either row, the identity is WORLD_V4 or WORLD_V6.
        """
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
        """Steps 2 to 4: the index of the verdict row for a packet between ``peer`` and ``own``."""
        classes = self._tables.peer_classes
        known = classes.get((row.number, self.identity_of(peer)))
        peer_class = _of_family(peer, row.default_class4, row.default_class6) if known is None else known
        own_class = 0
        if row.own_set:
            known = classes.get((row.own_set, self.identity_of(own)))
            own_class = _of_family(own, row.own_default_class4, row.own_default_class6) if known is None else known
        l4_class = self._column(row.l4_base, 0, l4_position(packet)) if row.l4_classes > 1 else 0
        source_class = 0
        if row.source_classes > 1:
            source_class = self._column(row.source_base, SOURCE_SLOT * 256, source_position(packet))
        return row.verdict_index(peer_class, own_class, l4_class, source_class)

    def _column(self, base: int, first_block: int, position: int) -> int:
        """The L4 class or source-port class of a packet.

        ``base``: the first block of the policy set's column, which has the class of each atom.
        ``first_block``: the first atom block of the packet's line (`netpol_ebpf.compiler.l4`).
        ``position``: the packet's position on that line.
        """
        atoms = self._tables.l4_atoms.get(first_block + position // ATOM_BLOCK)
        return self._tables.class_of_atom(base, 0 if atoms is None else atoms[position % ATOM_BLOCK])

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
            verdict = self._verdicts[row] = tables.verdict_of(row)
        return verdict


def _of_family(address: IPAddress, four: int, six: int) -> int:
    return four if address.version == 4 else six  # noqa: PLR2004  # the family


def l4_position(packet: Packet) -> int:
    """A packet's position on the line of protocols and ports (`netpol_ebpf.compiler.l4`).

    The position stands for the protocol and destination port, or for the ICMP type and code.
    """
    slot = PROTOCOL_SLOT.get(packet.protocol)
    if slot is None:
        return OTHER_BLOCK * ATOM_BLOCK + packet.protocol
    if packet.protocol in (ICMP, ICMPV6):
        return slot * 256 * ATOM_BLOCK + packet.icmp_type * 256 + packet.icmp_code
    return slot * 256 * ATOM_BLOCK + packet.destination_port


def source_position(packet: Packet) -> int:
    """A packet's position on the line of source ports; 0 for protocols without ports."""
    return packet.source_port if packet.protocol in PORT_PROTOCOLS else 0


def _undecided(direction: Direction, stage: Stage) -> Verdict:
    outcome, cause = nothing_decided(direction, stage)
    return Verdict(outcome, cause, outcome, cause)
