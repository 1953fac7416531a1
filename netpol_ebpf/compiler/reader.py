# SPDX-License-Identifier: Apache-2.0
"""Reads the verdicts on all packets from compiled tables: for every class of peers, every protocol and port.

The interpreter computes the verdict on one packet; a `TableReader` lists the verdicts on all packets.  It divides the
packets of one endpoint, direction and stage into *cells*: (class of the peer's address) x (class of the own address) x
(protocol, destination port or ICMP type) x (source port).  All packets of a cell have the same verdict and cause, unless
a domain name that the endpoint learned for the peer matches; the rules that then decide are part of the cell.

Invariants: only the tables are read.  The cells of a policy set are disjoint and together contain every packet.  A cell
has the verdict that `netpol_ebpf.compiler.interpreter` computes for each packet of the cell without names.  KeyError is raised if a
row that another row refers to is missing.

A cause names tier, policy and rule; `netpol_ebpf.policy.provenance.trace` finds its file and line in the world that was
compiled.  `Compiler.content_of` returns the labels, nets and services that the addresses of an identity have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, product
from typing import NamedTuple

from netpol_ebpf.compiler.interpreter import Interpreter, l4_position, source_position
from netpol_ebpf.compiler.intervals import Intervals, contains, intersection, normalise
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE, SOURCE_BLOCK, WITH_PORTS, protocol
from netpol_ebpf.compiler.rule_lists import nothing_decided
from netpol_ebpf.compiler.tables import (
    ATOM_BLOCK,
    ATOM_BLOCKS,
    WORLD_V4,
    WORLD_V6,
    Candidate,
    CompiledTables,
    PatternSet,
    SetRow,
    VerdictRow,
)
from netpol_ebpf.policy.types import Cause, Direction, EndpointKey, IPAddress, IPNetwork, Packet, Stage, Verdict

_SOURCE_BLOCKS = range(SOURCE_BLOCK, SOURCE_BLOCK + 256)
_PROTOCOLS = 256
_VERSIONS = (4, 6)


@dataclass(frozen=True, slots=True)
class AddressClass:
    """Addresses that a policy set cannot tell apart, given by their identities.

    A class may have no address: longer prefixes may contain all addresses of a prefix.
    """

    identities: frozenset[int]


@dataclass(frozen=True, slots=True)
class AddressesOfClass:
    """The addresses of a class.

    ``addresses``: addresses with a row of their own.
    ``networks``: all addresses in these networks are in the class, except addresses and networks inside them that have
    a row of their own in another class.
    ``unknown_versions``: the IP versions (4, 6) for which the addresses without any row are in the class.
    """

    addresses: tuple[IPAddress, ...]
    networks: tuple[IPNetwork, ...]
    unknown_versions: tuple[int, ...]


class ProtocolPorts(NamedTuple):
    """A protocol (IANA number) and some of its destination ports or ICMP types.

    ``values``: destination ports; for ICMP and ICMPv6 ``type * 256 + code``.  None: all packets of the protocol.
    """

    protocol: int
    values: Intervals | None


@dataclass(frozen=True, slots=True)
class NamedRule:
    """A rule that allows packets to an address for which the endpoint learned a name that one of ``patterns`` matches.

    ``logs``: the causes of Log rules that match before the rule, in order.
    """

    patterns: PatternSet
    cause: Cause
    logs: tuple[Cause, ...] = ()


@dataclass(frozen=True, slots=True)
class NamedRules:
    """The rules with domain names that come before a verdict, in the enforced and in the pending evaluation, in order."""

    enforced: tuple[NamedRule, ...] = ()
    pending: tuple[NamedRule, ...] = ()


NO_NAMED_RULES = NamedRules()


@dataclass(frozen=True, slots=True)
class Cell:
    """A set of packets with the same verdict.

    ``l4``: positions of protocols and ports (`netpol_ebpf.compiler.l4`); `protocol_ports` decodes them.
    ``source_ports``: source ports; packets of a protocol without ports have source port 0.
    ``named``: the first of these rules that matches a name takes the place of the verdict's rule.
    """

    peer: AddressClass
    own: AddressClass
    l4: Intervals
    source_ports: Intervals
    verdict: Verdict
    named: NamedRules = NO_NAMED_RULES


def protocol_ports(l4: Intervals) -> Iterator[ProtocolPorts]:
    """Decode positions (`netpol_ebpf.compiler.l4`) into protocols with their ports or types, in ascending order."""
    for number in range(_PROTOCOLS):
        whole = protocol(number)
        found = intersection(l4, whole)
        if found == whole:
            yield ProtocolPorts(number, None)
        elif found:
            base = whole[0][0]
            yield ProtocolPorts(number, tuple((first - base, last - base) for first, last in found))


class PolicySetReader:
    """All verdicts of one policy set.

    Each identity is in exactly one class of ``peers`` and in exactly one class of ``owns``.  Each position of protocols
    and ports is in exactly one class of ``l4``, and each source port in exactly one class of ``source_ports``.
    """

    def __init__(
        self,
        peers: Mapping[int, AddressClass],
        owns: Mapping[int, AddressClass],
        l4: Mapping[int, Intervals],
        source_ports: Mapping[int, Intervals],
        verdict: Callable[[int, int, int, int], Verdict],
        named: Callable[[int, int, int, int], NamedRules],
        versions: Mapping[int, int],
    ) -> None:
        """``peers``, ``owns``, ``l4``, ``source_ports``: the classes, by class number.

        ``verdict``: called with the numbers of a peer, own, L4 and source-port class; returns their verdict.
        ``named``: called as ``verdict``; returns the rules with domain names that come before the verdict.
        ``versions``: the IP version of each identity.
        """
        self.peers = peers
        self.owns = owns
        self.l4 = l4
        self.source_ports = source_ports
        self.verdict = verdict
        self.named = named
        self._versions = versions

    def cells(self) -> Iterator[Cell]:
        """One cell for each combination of classes that a packet may have.

        Cost: the product of the numbers of classes.
        """
        for (peer, peers), (own, owns) in product(self.peers.items(), self.owns.items()):
            if self._versions_of(peers).isdisjoint(self._versions_of(owns)):
                continue  # a packet has addresses of one family
            for (source, ports), (l4, positions) in product(self.source_ports.items(), self.l4.items()):
                possible = positions if contains(ports, 0) else intersection(positions, WITH_PORTS)
                if possible:
                    where = (peer, own, l4, source)
                    yield Cell(peers, owns, possible, ports, self.verdict(*where), self.named(*where))

    def answers(self) -> Iterator[Cell]:
        """The cells, merged to fewer and larger cells.

        First the method merges cells that differ only in protocol and port, then cells that differ only in the peer.
        Like the cells of `cells`, the results are disjoint and together contain every packet.  Cells with the same peer
        follow each other.
        """
        by_peer: dict[AddressClass, dict[tuple[AddressClass, Intervals, Verdict, NamedRules], list[Intervals]]] = {}
        for cell in self.cells():
            key = (cell.own, cell.source_ports, cell.verdict, cell.named)
            by_peer.setdefault(cell.peer, {}).setdefault(key, []).append(cell.l4)
        alike: dict[frozenset[tuple[AddressClass, Intervals, Verdict, NamedRules, Intervals]], list[AddressClass]] = {}
        for peer, found in by_peer.items():
            said = frozenset((*key, normalise(pair for l4 in many for pair in l4)) for key, many in found.items())
            alike.setdefault(said, []).append(peer)
        for said, peers in alike.items():
            joined = AddressClass(frozenset().union(*(peer.identities for peer in peers)))
            for own, source_ports, verdict, named, l4 in sorted(
                said, key=lambda one: (one[4], one[1], sorted(one[0].identities))
            ):
                yield Cell(joined, own, l4, source_ports, verdict, named)

    def _versions_of(self, addresses: AddressClass) -> set[int]:
        return {self._versions[identity] for identity in addresses.identities}


class TableReader:
    """Reads the tables as they are when the reader is created. It must not be used after the tables changed.

    Cost of creation: linear in the rows of the tables.
    """

    def __init__(self, tables: CompiledTables) -> None:
        self._tables = tables
        self._interpreter = Interpreter(tables)
        self._addresses: dict[int, list[IPAddress]] = {}
        self._networks: dict[int, list[IPNetwork]] = {}
        for address, row in tables.addresses.items():
            self._addresses.setdefault(row.identity, []).append(address)
        for network, identity in tables.cidrs.items():
            self._networks.setdefault(identity, []).append(network)
        self.versions: Mapping[int, int] = {
            **{identity: networks[0].version for identity, networks in self._networks.items()},
            **{identity: addresses[0].version for identity, addresses in self._addresses.items()},
            WORLD_V4: 4,
            WORLD_V6: 6,
        }
        """The IP version of each identity that some address may have."""
        blocks = (block for block in range(ATOM_BLOCKS) if block not in _SOURCE_BLOCKS)
        self.atoms = self._intervals(blocks, 0)
        """Maps the number of each atom to its positions (`netpol_ebpf.compiler.l4`)."""
        self.source_atoms = self._intervals(_SOURCE_BLOCKS, SOURCE_BLOCK)
        """Maps the number of each source-port atom to its source ports."""
        self._classes: dict[int, dict[int, int]] = {}
        for (number, identity), class_ in tables.peer_classes.items():
            self._classes.setdefault(number, {})[identity] = class_
        self._sets: dict[SetRow, PolicySetReader] = {}

    def identity_of(self, address: IPAddress) -> int:
        """The identity of an address, as the interpreter finds it."""
        return self._interpreter.identity_of(address)

    def addresses_of(self, addresses: AddressClass) -> AddressesOfClass:
        """The addresses of a class, in ascending order, IPv4 first."""
        identities = sorted(addresses.identities)
        known = [address for identity in identities for address in self._addresses.get(identity, ())]
        networks = [network for identity in identities for network in self._networks.get(identity, ())]
        return AddressesOfClass(
            tuple(sorted(known, key=lambda one: (one.version, int(one)))),
            tuple(sorted(networks, key=lambda one: (one.version, int(one.network_address), one.prefixlen))),
            tuple(self.versions[identity] for identity in identities if identity in (WORLD_V4, WORLD_V6)),
        )

    def policy(self, endpoint: EndpointKey, direction: Direction, stage: Stage = Stage.NORMAL) -> PolicySetReader:
        """All verdicts of an endpoint, in one direction and stage.

        As in the interpreter, an unknown endpoint is denied everything, and in a stage without a policy set the outcome
        is CONTINUE.
        """
        row = self._tables.endpoints.get(endpoint)
        set_row = None if row is None else row.sets.get((direction, stage))
        if set_row is None:
            return self._undecided(direction, Stage.NORMAL if row is None else stage)
        return self.policy_set(set_row)

    def policy_set(self, row: SetRow) -> PolicySetReader:
        """All verdicts of a policy set. Endpoints with the same policy set get the same reader."""
        known = self._sets.get(row)
        if known is None:
            known = self._sets[row] = self._read(row)
        return known

    def cell_of(self, policy: PolicySetReader, direction: Direction, packet: Packet) -> Cell:
        """The cell of a policy set that contains ``packet``. Cost: linear in the cells; the interpreter is faster."""
        ends = packet.source, packet.destination
        peer, own = map(self.identity_of, ends if direction is Direction.INGRESS else reversed(ends))
        position, source_port = l4_position(packet), source_position(packet)
        (found,) = (
            cell
            for cell in policy.cells()
            if peer in cell.peer.identities
            and own in cell.own.identities
            and contains(cell.l4, position)
            and contains(cell.source_ports, source_port)
        )
        return found

    def _undecided(self, direction: Direction, stage: Stage) -> PolicySetReader:
        outcome, cause = nothing_decided(direction, stage)
        verdict, everyone = Verdict(outcome, cause, outcome, cause), {0: AddressClass(frozenset(self.versions))}
        return PolicySetReader(
            everyone,
            everyone,
            {0: ANY_L4},
            {0: ANY_SOURCE},
            lambda _peer, _own, _l4, _source: verdict,
            lambda _peer, _own, _l4, _source: NO_NAMED_RULES,
            self.versions,
        )

    def _read(self, row: SetRow) -> PolicySetReader:
        owns = {0: AddressClass(frozenset(self.versions))}
        if row.own_set:
            owns = self._address_classes(row.own_set, {4: row.own_default_class4, 6: row.own_default_class6})
        tables = self._tables
        return PolicySetReader(
            self._address_classes(row.number, {4: row.default_class4, 6: row.default_class6}),
            owns,
            self._columns(self.atoms, row.l4_base, row.l4_classes),
            self._columns(self.source_atoms, row.source_base, row.source_classes),
            lambda peer, own, l4, source: tables.verdict_of(tables.verdicts[row.verdict_index(peer, own, l4, source)]),
            lambda peer, own, l4, source: self._named(tables.verdicts[row.verdict_index(peer, own, l4, source)]),
            self.versions,
        )

    def _named(self, row: VerdictRow) -> NamedRules:
        """The rules with domain names that come before the verdict of a row."""
        if not row.domain_list:
            return NO_NAMED_RULES
        tables = self._tables

        def told(candidates: Iterable[Candidate]) -> tuple[NamedRule, ...]:
            return tuple(
                NamedRule(
                    one.patterns,
                    tables.rules[one.rule],
                    tuple(tables.rules[rule] for rule in (tables.log_lists[one.log_list] if one.log_list else ())),
                )
                for one in candidates
            )

        value = tables.domain_lists[row.domain_list]
        return NamedRules(told(value.enforced), told(value.pending))

    def _address_classes(self, number: int, defaults: Mapping[int, int]) -> dict[int, AddressClass]:
        """The address classes of one side (peer or own), by class number.

        ``number``: the number of the side's class table.
        ``defaults``: the default class of each IP version.
        """
        rows = self._classes.get(number, {})
        found: dict[int, set[int]] = {}
        for identity, version in self.versions.items():
            found.setdefault(rows.get(identity, defaults[version]), set()).add(identity)
        return {class_: AddressClass(frozenset(identities)) for class_, identities in found.items()}

    def _columns(self, atoms: Mapping[int, Intervals], base: int, classes: int) -> dict[int, Intervals]:
        """The positions of each class of atoms, by class number.

        ``base``: the first block of the policy set's column.
        """
        found: dict[int, list[tuple[int, int]]] = {}
        for atom, intervals in atoms.items():
            class_ = self._tables.class_of_atom(base, atom) if classes > 1 else 0
            found.setdefault(class_, []).extend(intervals)
        return {class_: normalise(pairs) for class_, pairs in found.items()}

    def _intervals(self, blocks: Iterable[int], first: int) -> dict[int, Intervals]:
        """The positions of each atom in ``blocks``.

        ``first``: the first block of the line to which the blocks belong.
        """
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
