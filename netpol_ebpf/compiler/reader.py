# SPDX-License-Identifier: Apache-2.0
"""What compiled tables say of all packets at once: every class of peers, every protocol and port, each with its verdict.

The interpreter answers for one packet; a `TableReader` answers for the whole space.  The packets of one endpoint, direction
and stage are cut into *cells*: (class of the peer's address) x (class of the own address) x (protocol, destination port or
ICMP type) x (source port).  All packets of a cell have one verdict, from one cause.

Invariants: nothing but the tables is read; the cells of a policy set are disjoint and contain every packet, so that a
packet's cell has the verdict that `netpol_ebpf.compiler.interpreter` gives the packet.  A row that another row refers to and
that is missing raises KeyError.

A cause names tier, policy and rule; `netpol_ebpf.policy.provenance.trace` finds the file and line of it in the world that was
compiled.  `Compiler.content_of` returns what the addresses of an identity have in common: labels, nets, services.
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
from netpol_ebpf.compiler.tables import ATOM_BLOCK, ATOM_BLOCKS, WORLD_V4, WORLD_V6, CompiledTables, SetRow
from netpol_ebpf.policy.types import Direction, EndpointKey, IPAddress, IPNetwork, Packet, Stage, Verdict

_SOURCE_BLOCKS = range(SOURCE_BLOCK, SOURCE_BLOCK + 256)
_PROTOCOLS = 256
_VERSIONS = (4, 6)


@dataclass(frozen=True, slots=True)
class AddressClass:
    """Addresses that a policy set cannot tell apart: those of some identities.

    A class may be empty: other rows can cover all its addresses.
    """

    identities: frozenset[int]


@dataclass(frozen=True, slots=True)
class AddressesOfClass:
    """The addresses of a class.

    ``addresses``: known addresses.  ``networks``: every address inside them, except known addresses and inner networks
    of another class.  ``unknown_versions``: 4, 6 or both, where addresses without any row are in the class.
    """

    addresses: tuple[IPAddress, ...]
    networks: tuple[IPNetwork, ...]
    unknown_versions: tuple[int, ...]


class ProtocolPorts(NamedTuple):
    """A protocol by its IANA number, and a part of its packets.

    ``values``: destination ports; of ICMP and ICMPv6 ``type * 256 + code``; None: all packets of the protocol.
    """

    protocol: int
    values: Intervals | None


@dataclass(frozen=True, slots=True)
class Cell:
    """A set of packets with one verdict.

    ``l4``: positions on the line of protocols and ports (`netpol_ebpf.compiler.l4`); `protocol_ports` decodes them.
    ``source_ports``: for a protocol without ports, 0.
    """

    peer: AddressClass
    own: AddressClass
    l4: Intervals
    source_ports: Intervals
    verdict: Verdict


def protocol_ports(l4: Intervals) -> Iterator[ProtocolPorts]:
    """Positions on the line of protocols and ports, by protocol in ascending order."""
    for number in range(_PROTOCOLS):
        whole = protocol(number)
        found = intersection(l4, whole)
        if found == whole:
            yield ProtocolPorts(number, None)
        elif found:
            base = whole[0][0]
            yield ProtocolPorts(number, tuple((first - base, last - base) for first, last in found))


class PolicySetReader:
    """All verdicts of one policy set: of an endpoint in one direction and stage.

    ``peers``, ``owns``: disjoint, and together all identities.  ``l4``, ``source_ports``: disjoint, and together their
    whole lines.
    """

    def __init__(
        self,
        peers: Mapping[int, AddressClass],
        owns: Mapping[int, AddressClass],
        l4: Mapping[int, Intervals],
        source_ports: Mapping[int, Intervals],
        verdict: Callable[[int, int, int, int], Verdict],
        versions: Mapping[int, int],
    ) -> None:
        """Class lists are by class number.

        ``verdict``: verdict of four class numbers; ``versions``: identity to IP version.
        """
        self.peers = peers
        self.owns = owns
        self.l4 = l4
        self.source_ports = source_ports
        self.verdict = verdict
        self._versions = versions

    def cells(self) -> Iterator[Cell]:
        """One cell for each combination of classes that a packet may have. Cost: the product of the classes."""
        for (peer, peers), (own, owns) in product(self.peers.items(), self.owns.items()):
            if self._versions_of(peers).isdisjoint(self._versions_of(owns)):
                continue  # a packet has addresses of one family
            for (source, ports), (l4, positions) in product(self.source_ports.items(), self.l4.items()):
                possible = positions if contains(ports, 0) else intersection(positions, WITH_PORTS)
                if possible:
                    yield Cell(peers, owns, possible, ports, self.verdict(peer, own, l4, source))

    def answers(self) -> Iterator[Cell]:
        """The cells, merged where only protocol and port differ, and then where only the peer differs.

        Like `cells`, they are disjoint and contain every packet.  Cells of one peer follow each other.
        """
        by_peer: dict[AddressClass, dict[tuple[AddressClass, Intervals, Verdict], list[Intervals]]] = {}
        for cell in self.cells():
            key = (cell.own, cell.source_ports, cell.verdict)
            by_peer.setdefault(cell.peer, {}).setdefault(key, []).append(cell.l4)
        alike: dict[frozenset[tuple[AddressClass, Intervals, Verdict, Intervals]], list[AddressClass]] = {}
        for peer, found in by_peer.items():
            said = frozenset((*key, normalise(pair for l4 in many for pair in l4)) for key, many in found.items())
            alike.setdefault(said, []).append(peer)
        for said, peers in alike.items():
            joined = AddressClass(frozenset().union(*(peer.identities for peer in peers)))
            for own, source_ports, verdict, l4 in sorted(
                said, key=lambda one: (one[3], one[1], sorted(one[0].identities))
            ):
                yield Cell(joined, own, l4, source_ports, verdict)

    def _versions_of(self, addresses: AddressClass) -> set[int]:
        return {self._versions[identity] for identity in addresses.identities}


class TableReader:
    """Reads tables as they are at its creation; it must not be used after the tables changed.

    Cost of creation: linear in the tables.
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
        """IP version of each identity that an address may have."""
        blocks = (block for block in range(ATOM_BLOCKS) if block not in _SOURCE_BLOCKS)
        self.atoms = self._intervals(blocks, 0)
        """Positions of each atom on the line of protocols and ports."""
        self.source_atoms = self._intervals(_SOURCE_BLOCKS, SOURCE_BLOCK)
        """Source ports of each source-port atom."""
        self._classes: dict[int, dict[int, int]] = {}
        for (number, identity), class_ in tables.peer_classes.items():
            self._classes.setdefault(number, {})[identity] = class_
        self._sets: dict[SetRow, PolicySetReader] = {}

    def identity_of(self, address: IPAddress) -> int:
        """The identity that an address has."""
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
        """The verdicts of an endpoint, in one direction and stage.

        As in the interpreter, an unknown endpoint denies everything, and a stage without policy continues.
        """
        row = self._tables.endpoints.get(endpoint)
        set_row = None if row is None else row.sets.get((direction, stage))
        if set_row is None:
            return self._undecided(direction, Stage.NORMAL if row is None else stage)
        return self.policy_set(set_row)

    def policy_set(self, row: SetRow) -> PolicySetReader:
        """The verdicts of a policy set. Endpoints that share a set share the reader."""
        known = self._sets.get(row)
        if known is None:
            known = self._sets[row] = self._read(row)
        return known

    def cell_of(self, policy: PolicySetReader, direction: Direction, packet: Packet) -> Cell:
        """The one cell of a policy set that contains a packet. Cost: linear in the cells; the interpreter is faster."""
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
            everyone, everyone, {0: ANY_L4}, {0: ANY_SOURCE}, lambda _peer, _own, _l4, _source: verdict, self.versions
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
            self.versions,
        )

    def _address_classes(self, number: int, defaults: Mapping[int, int]) -> dict[int, AddressClass]:
        """The address classes of one side (peer or own), by class number."""
        rows = self._classes.get(number, {})
        found: dict[int, set[int]] = {}
        for identity, version in self.versions.items():
            found.setdefault(rows.get(identity, defaults[version]), set()).add(identity)
        return {class_: AddressClass(frozenset(identities)) for class_, identities in found.items()}

    def _columns(self, atoms: Mapping[int, Intervals], base: int, classes: int) -> dict[int, Intervals]:
        """The classes of one line, by number, with their positions."""
        found: dict[int, list[tuple[int, int]]] = {}
        for atom, intervals in atoms.items():
            class_ = self._tables.class_of_atom(base, atom) if classes > 1 else 0
            found.setdefault(class_, []).extend(intervals)
        return {class_: normalise(pairs) for class_, pairs in found.items()}

    def _intervals(self, blocks: Iterable[int], first: int) -> dict[int, Intervals]:
        """Positions of each atom on a line that begins with block ``first``."""
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
