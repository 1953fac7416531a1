# SPDX-License-Identifier: Apache-2.0
"""Domain names in the tables: rows of patterns, numbers of classes, limits, rollback."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from worlds import ALLOW, POD, policy, world

from netpol_ebpf.compiler import Compiler, KnownNumbers, Limits
from netpol_ebpf.compiler.domains import DomainIndex
from netpol_ebpf.compiler.draft import Draft, Phase
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import LimitError
from netpol_ebpf.compiler.reader import TableReader
from netpol_ebpf.compiler.tables import Candidate, DomainList
from netpol_ebpf.policy.types import SCTP, TCP, UDP, Direction, Entity, Policy, Rule, World


def to(*patterns: str, index: int = 0) -> Rule:
    """A rule that allows egress to names."""
    return replace(ALLOW, index=index, destination=Entity(domains=frozenset(patterns)))


def named(*rules: Rule, name: str = "p") -> Policy:
    """A policy for egress with these rules."""
    return replace(policy(name), types=frozenset({Direction.EGRESS}), ingress=(), egress=rules)


def compiled(objects: World, **how: Any) -> Compiler:
    """A compiler with these objects in force."""
    compiler = Compiler(**how)
    compiler.replace(objects)
    compiler.commit()
    return compiler


def contents(compiler: Compiler) -> dict[str, set[frozenset[str]]]:
    """The pattern sets of each row of ``names``."""
    classes = dict(compiler.tables.name_classes.items())
    return {pattern: set(classes.get(number, ())) for pattern, number in compiler.tables.names.items()}


def test_longer_rows_contain_what_shorter_ones_say() -> None:
    """The most specific row has every pattern set that matches; the bare name is not matched by its wildcard."""
    compiler = compiled(world(named(to("*.com"), to("*.a.com", "b.com"), to("x.a.com"))))
    every, some, one = frozenset({"*.com"}), frozenset({"*.a.com", "b.com"}), frozenset({"x.a.com"})
    assert contents(compiler) == {
        "com": set(),
        "*.com": {every},
        "a.com": {every},
        "*.a.com": {every, some},
        "b.com": {every, some},
        "x.a.com": {every, some, one},
    }


def test_seen_names_of_an_inner_wildcard_have_rows_of_their_own() -> None:
    """A row comes with the name and goes with the pattern; names that it does not match get none."""
    compiler = compiled(world(named(to("x.*.com"))))
    assert contents(compiler) == {}
    assert compiler.wants_name("x.a.com")
    assert not compiler.wants_name("y.a.com")
    compiler.see_names(["x.a.com", "y.a.com", "x.com"])
    compiler.commit()
    assert contents(compiler) == {"x.a.com": {frozenset({"x.*.com"})}}
    assert not compiler.wants_name("x.a.com")
    compiler.upsert(named(to("y.com")))
    compiler.commit()
    assert set(contents(compiler)) == {"y.com"}


def test_seen_names_never_use_up_the_rows_of_patterns() -> None:
    """A workload that asks for ever new names replaces the oldest ones, so that policy can still change."""
    compiler = compiled(world(named(to("x.*.com"))), limits=Limits(names=8, seen_names=4))
    for number in range(20):
        compiler.see_names([f"x.n{number}.com"])
        compiler.commit()
    assert set(contents(compiler)) == {f"x.n{number}.com" for number in range(16, 20)}
    compiler.upsert(named(to("x.*.com"), to("a.com", "b.com")))
    compiler.commit()
    assert {"a.com", "b.com"} <= set(contents(compiler))


def test_a_class_keeps_its_number_over_a_restart_until_it_is_forgotten() -> None:
    """Also a class that no pattern gives any more; its content stays known."""
    first = compiled(world(named(to("b.com"), to("a.com"))))
    numbers = {content: number for number, content in first.tables.name_classes.items()}
    known = KnownNumbers(name_classes=numbers)
    second = compiled(world(named(to("c.com"), to("a.com"))), known=known)
    after = {content: number for number, content in second.tables.name_classes.items()}
    assert numbers.items() <= after.items()
    assert len(set(after.values())) == 3
    gone = numbers[frozenset({frozenset({"b.com"})})]
    assert second.unused_name_classes() == {gone}
    second.forget_name_classes([*numbers.values()])
    second.commit()
    assert {content for _, content in second.tables.name_classes.items()} == {
        frozenset({frozenset({"a.com"})}),
        frozenset({frozenset({"c.com"})}),
    }


@pytest.mark.parametrize("table", ["names", "domain_lists", "name_classes", "domains"])
def test_a_full_table_refuses_the_change_and_keeps_what_is_in_force(table: str) -> None:
    """LimitError names the table; tables and state are those of before, and a smaller change succeeds."""
    limits = replace(Limits(), **{table: 2})
    compiler = compiled(world(named(to("a.com"))), limits=limits)
    before = compiler.canonical()
    protocols = {"q": TCP, "r": UDP, "s": SCTP}
    more = [named(replace(to(f"{name}.com"), protocol=number), name=name) for name, number in protocols.items()]
    for one in more:
        compiler.upsert(one)
    with pytest.raises(LimitError) as refused:
        compiler.commit()
    assert refused.value.limit == table
    assert compiler.canonical() == before
    compiler.upsert(named(to("b.com")))
    compiler.commit()
    compiler.forget_name_classes(compiler.unused_name_classes())
    compiler.commit()
    assert compiler.canonical() == compiled(world(named(to("b.com")))).canonical()


def test_rows_come_before_what_refers_to_them() -> None:
    """Lists, classes and their rows in the first batch, patterns next, deletions last."""
    compiler = compiled(world(named(to("a.com"))))
    compiler.upsert(named(to("b.com")))
    change = compiler.commit()
    assert {"domain_lists", "domains", "name_classes"} <= change.grow.keys()
    assert "names" not in change.grow
    assert set(change.flip["names"].upserts) == {"b.com"}
    assert set(change.shrink["names"].deletes) == {"a.com"}
    assert change.shrink["domain_lists"].deletes
    assert change.revokes


def test_the_reader_tells_the_rules_with_names_of_a_cell() -> None:
    """In order, with the patterns and the cause of each; cells that differ in them alone are not joined."""
    tables = compiled(world(named(to("a.com"), to("*.b.com", index=1)))).tables
    cells = list(TableReader(tables).policy(POD, Direction.EGRESS).answers())
    told = {tuple((one.patterns, one.cause.index) for one in cell.named.enforced) for cell in cells}
    both = ((frozenset({"a.com"}), 0), (frozenset({"*.b.com"}), 1))
    assert both in told
    assert () in told, "the addresses of endpoints and nodes"


def test_the_first_commit_is_linear_in_the_wildcards() -> None:
    """Twice the wildcards cost about twice the calls of functions, so that tens of thousands are no matter of minutes."""
    assert calls(400) < calls(800) < 3 * calls(400)


def calls(count: int) -> int:
    """How many functions a commit with this many wildcards calls."""
    index, draft, journal = DomainIndex(Limits()), Draft(), Journal()
    for number in range(count):
        patterns = frozenset({f"*.s{number}.example.com"})
        index.acquire(DomainList((Candidate(patterns, number + 1),)), "x", draft, journal)
    counted = 0

    def count_call(_frame: object, event: str, _arg: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        index.end_commit("x", draft, journal)
    finally:
        sys.setprofile(before)
    assert len(draft.rows(Phase.FLIP, "names")) == 2 * count
    return counted


def test_small_tables_leave_rows_to_patterns_as_well() -> None:
    """However small the table of names is, seen names have at most half of it."""
    compiler = compiled(world(named(to("x.*.com"))), limits=Limits(names=6))
    compiler.see_names(f"x.n{number}.com" for number in range(20))
    compiler.commit()
    assert len(contents(compiler)) == 3
    compiler.upsert(named(to("x.*.com"), to("a.com", "b.com", "c.com")))
    compiler.commit()
    assert {"a.com", "b.com", "c.com"} <= set(contents(compiler))


def test_an_empty_class_of_an_earlier_run_is_ignored() -> None:
    """Class 0 is that of names without patterns; it is never forgotten."""
    compiler = compiled(world(named(to("a.com"))), known=KnownNumbers(name_classes={frozenset(): 3}))
    assert compiler.unused_name_classes() == frozenset()
    compiler.forget_name_classes([0, 3])
    compiler.commit()
    assert len(list(compiler.tables.name_classes.items())) == 1
