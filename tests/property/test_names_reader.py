# SPDX-License-Identifier: Apache-2.0
"""Rules with domain names in the cells of a `TableReader`: with any names, they give the reference model's verdict."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from test_names_agree import asked, commit, named_worlds, names, some_packets

from netpol_ebpf.compiler import Compiler, TableReader
from netpol_ebpf.compiler.interpreter import l4_position, source_position
from netpol_ebpf.compiler.intervals import contains
from netpol_ebpf.compiler.reader import Cell, NamedRule
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.domain_names import matches_pattern
from netpol_ebpf.policy.types import Direction, Outcome, Packet, Question, Verdict, World


def first(rules: tuple[NamedRule, ...], known: frozenset[str]) -> NamedRule | None:
    """The first rule with a pattern that matches one of the names."""
    return next(
        (rule for rule in rules if any(matches_pattern(pattern, name) for pattern in rule.patterns for name in known)),
        None,
    )


def verdict_with(cell: Cell, known: frozenset[str]) -> Verdict:
    """The verdict on the packets of a cell, if the endpoint learned these names for the peer."""
    verdict = cell.verdict
    enforced, pending = first(cell.named.enforced, known), first(cell.named.pending, known)
    if enforced is not None:
        verdict = replace(verdict, outcome=Outcome.ALLOW, cause=enforced.cause, logs=enforced.logs)
    if pending is not None:
        verdict = replace(verdict, staged_outcome=Outcome.ALLOW, staged_cause=pending.cause)
    return verdict


def cell_of(cells: list[Cell], reader: TableReader, question: Question) -> Cell:
    """The one cell that the question's packet is in."""
    packet = question.packet
    peer, own = map(reader.identity_of, (packet.source, packet.destination))
    if question.direction is Direction.EGRESS:
        peer, own = own, peer
    (found,) = (
        cell
        for cell in cells
        if peer in cell.peer.identities
        and own in cell.own.identities
        and contains(cell.l4, l4_position(packet))
        and contains(cell.source_ports, source_position(packet))
    )
    return found


@given(named_worlds(max_policies=3), some_packets, names)
def test_cells_with_their_named_rules_are_the_verdicts_of_the_model(
    world: World, drawn: list[Packet], known: frozenset[str]
) -> None:
    """In the cells as compiled and in those that are joined."""
    compiler = Compiler()
    commit(compiler, world)
    reader, model = TableReader(compiler.tables), ReferenceModel(world)
    for question in asked(world, drawn, known):
        policy = reader.policy(question.endpoint, question.direction, question.stage)
        expected = model.decide(question)
        for cells in (list(policy.cells()), list(policy.answers())):
            assert verdict_with(cell_of(cells, reader, question), question.names) == expected, question
