# SPDX-License-Identifier: Apache-2.0
"""The benchmark of domain names: its messages are what a resolver reads, and its cases are all made."""

from __future__ import annotations

import dns.message
import dns.rdatatype

from bench import names
from bench.record import Run


def test_an_answer_is_read_by_another_parser() -> None:
    """The chain leads from the question to the addresses."""
    read = dns.message.from_wire(names.answer("a.wild.example", [1, 2], cnames=2))
    assert [records.rdtype for records in read.answer] == [dns.rdatatype.CNAME, dns.rdatatype.CNAME, dns.rdatatype.A]
    assert read.answer[0].name == read.question[0].name
    assert read.answer[2].name == read.answer[1][0].target
    assert [one.address for one in read.answer[2]] == ["0.0.0.1", "0.0.0.2"]


def test_names_change_only_in_changing_cases() -> None:
    """The watched name itself is only repeated; other names differ by number."""
    for shape in names.SHAPES:
        assert ("changing" in names.ways(shape)) == (shape.asked(1) != shape.asked(2))


def test_every_case_has_a_base_of_its_run() -> None:
    """All but the bases are divided, round trips by those without policy."""
    run = Run("command", {}, {}, {}, "now")
    names.add_packets(run, {name: [1.0] for name in names.case_names()})
    names.add_trips(run, {name: [1.0] for name in (names.DIRECT, names.CONTENDER, names.PROXY)})
    assert len({case.id for case in run.cases}) == len(run.cases)
    assert [case.contender for case in run.cases if not case.base] == [names.CONTENDER, names.DIRECT]
    assert all(run.case(case.base) for case in run.cases if case.base)
