# SPDX-License-Identifier: Apache-2.0
"""The reader's answer for all packets at once equals the interpreter's answer for each of them."""

from __future__ import annotations

from itertools import combinations

import hypothesis.strategies as st
from hypothesis import given, settings
from strategies import packets, questions_about, worlds

from netpol_ebpf.compiler import Compiler, Interpreter, TableReader
from netpol_ebpf.compiler.interpreter import l4_position, source_position
from netpol_ebpf.compiler.intervals import contains, intersection, normalise
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE, WITHOUT_PORTS
from netpol_ebpf.compiler.reader import Cell, PolicySetReader
from netpol_ebpf.policy.types import Direction, Packet, Question, Stage, World

some_packets = st.lists(packets(), min_size=1, max_size=8)


def compiled(steps: list[World]) -> Compiler:
    """A compiler with the last of some worlds in force, each taken as a change to the one before."""
    compiler = Compiler()
    for world in steps:
        compiler.replace(world)
        compiler.commit()
    return compiler


def containing(cells: list[Cell], reader: TableReader, question: Question) -> list[Cell]:
    """The cells that a question's packet is in, by what each says it contains."""
    packet = question.packet
    peer, own = map(reader.identity_of, (packet.source, packet.destination))
    if question.direction is Direction.EGRESS:
        peer, own = own, peer
    return [
        cell
        for cell in cells
        if peer in cell.peer.identities
        and own in cell.own.identities
        and contains(cell.l4, l4_position(packet))
        and contains(cell.source_ports, source_position(packet))
    ]


def has_no_packet(cell: Cell, reader: TableReader) -> bool:
    """Whether its addresses are of two families, or it has a source port that a protocol without ports cannot have."""
    peers, owns = ({reader.versions[one] for one in side.identities} for side in (cell.peer, cell.own))
    return peers.isdisjoint(owns) or (not contains(cell.source_ports, 0) and bool(intersection(cell.l4, WITHOUT_PORTS)))


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(worlds(max_policies=3), min_size=1, max_size=2), some_packets)
def test_each_packet_is_in_one_cell_with_the_verdict_of_the_interpreter(
    steps: list[World], drawn: list[Packet]
) -> None:
    """Outcome, cause, staged outcome, staged cause and logs; in the cells as compiled and in those that are joined."""
    compiler = compiled(steps)
    reader, interpreter = TableReader(compiler.tables), Interpreter(compiler.tables)
    for question in questions_about(steps[-1], drawn):
        policy = reader.policy(question.endpoint, question.direction, question.stage)
        expected = interpreter.decide(question)
        for cells in (list(policy.cells()), list(policy.answers())):
            assert not [cell for cell in cells if has_no_packet(cell, reader)]
            (cell,) = containing(cells, reader, question)
            assert cell.verdict == expected, question
        assert reader.cell_of(policy, question.direction, question.packet).verdict == expected


def assert_whole(policy: PolicySetReader, reader: TableReader) -> None:
    """Nothing is missing and nothing is said twice, in each dimension."""
    for addresses in (policy.peers, policy.owns):
        found = [identity for each in addresses.values() for identity in each.identities]
        assert sorted(found) == sorted(reader.versions)
    for line, whole in ((policy.l4, ANY_L4), (policy.source_ports, ANY_SOURCE)):
        assert normalise(pair for each in line.values() for pair in each) == whole
        assert not any(intersection(one, other) for one, other in combinations(line.values(), 2))


@given(worlds())
def test_the_classes_of_a_set_are_all_packets(world: World) -> None:
    """Of every endpoint, direction and stage; identities, positions and source ports are each cut without a rest."""
    reader = TableReader(compiled([world]).tables)
    for endpoint in world.endpoints:
        for direction in Direction:
            for stage in Stage:
                assert_whole(reader.policy(endpoint, direction, stage), reader)


@given(worlds(), st.data())
def test_addresses_of_a_class_have_its_identities(world: World, data: st.DataObject) -> None:
    """Every known address is among those of exactly one class, and the identity's content has its family."""
    compiler = compiled([world])
    reader = TableReader(compiler.tables)
    policy = reader.policy(data.draw(st.sampled_from(sorted(world.endpoints))), Direction.INGRESS)
    told = [reader.addresses_of(each) for each in policy.peers.values()]
    addresses = [address for each in told for address in each.addresses]
    assert sorted(map(str, addresses)) == sorted(map(str, compiler.tables.addresses))
    assert sorted(str(net) for each in told for net in each.networks) == sorted(map(str, compiler.tables.cidrs))
    assert sorted(version for each in told for version in each.unknown_versions) == [4, 6]
    for each in policy.peers.values():
        for address in reader.addresses_of(each).addresses:
            assert reader.identity_of(address) in each.identities
            assert compiler.content_of(reader.identity_of(address)).family == address.version
