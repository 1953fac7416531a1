# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/theory.md is what the compiler makes of it, and its last step is the truth."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from netpol_ebpf.model.reference import ReferenceModel
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import TCP, Direction, Outcome, Packet, Question, Stage
from netpol_ebpf.resources.load import load_paths
from tests import theory


def test_page_is_fresh() -> None:
    """Every table on the page is the compiler's."""
    assert theory.main(["--check"]) == 0


def test_a_stale_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another set of policies gives other tables."""
    monkeypatch.setattr(theory, "FILES", theory.FILES[:-2])
    assert theory.main(["--check"]) == 1


@pytest.mark.parametrize("port", theory.PORTS)
@pytest.mark.parametrize("peer", theory.PEERS)
def test_the_look_up_by_hand_gives_the_verdict(peer: str, port: int) -> None:
    """The row that the four steps select says what the reference model says."""
    example = theory.Example()
    world = derive(load_paths([theory.DEMO / name for name in theory.FILES]).check())
    packet = Packet(ip_address(theory.PEERS[peer]), ip_address("10.244.1.12"), TCP, 40000, port)
    verdict = ReferenceModel(world).decide(Question(theory.DATABASE, Direction.INGRESS, Stage.NORMAL, packet))
    row = example.tables.verdicts[example.verdict_index(theory.PEERS[peer], port)]
    assert (row.outcome is Outcome.ALLOW) == (verdict.outcome is Outcome.ALLOW)
    assert example.tables.rules[row.rule] == verdict.cause
