# SPDX-License-Identifier: Apache-2.0
"""What endpoints learned before a change of patterns still counts after it, as far as the old patterns are left."""

from __future__ import annotations

from worlds import read

from netpol_ebpf.compiler import Compiler, KnownNumbers
from netpol_ebpf.compiler.tables import NO_RANK
from netpol_ebpf.policy.translate import derive

CLUSTER = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: a}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: p, namespace: a}
spec:
  egress: [{action: Allow, destination: {domains: [PATTERNS]}}]
  types: [Egress]
"""


def commit(compiler: Compiler, patterns: str) -> None:
    """Commit the policy with these patterns."""
    compiler.replace(derive(read(CLUSTER.replace("PATTERNS", patterns))))
    compiler.commit()


def matches(compiler: Compiler, class_: int) -> bool:
    """Whether the names of a class are allowed by the one domain list in force."""
    (number,) = dict(compiler.tables.domain_lists.items())
    row = compiler.tables.domains.get((number, class_))
    return row is not None and row.rank != NO_RANK


def test_a_rule_that_gains_a_name_keeps_what_was_learned() -> None:
    """The class of the old patterns matches the new list, so that no connection to the old names is cut."""
    compiler = Compiler()
    commit(compiler, "a.com, b.com")
    old = compiler.tables.names["a.com"]
    commit(compiler, "a.com, b.com, c.com")
    assert compiler.tables.names["a.com"] != old
    assert matches(compiler, old)


def test_a_rule_that_loses_a_name_does_not() -> None:
    """The class may be that of the name that is gone."""
    compiler = Compiler()
    commit(compiler, "a.com, b.com")
    old = compiler.tables.names["a.com"]
    commit(compiler, "a.com")
    assert not matches(compiler, old)


def test_the_same_after_a_restart() -> None:
    """The classes of an earlier run count in the lists of this one."""
    known = KnownNumbers(name_classes={frozenset({frozenset({"a.com"})}): 7, frozenset({frozenset({"z.com"})}): 8})
    compiler = Compiler(known=known)
    commit(compiler, "a.com, b.com")
    assert matches(compiler, 7)
    assert not matches(compiler, 8)


def test_rows_go_with_the_class_and_with_the_list() -> None:
    """No row is left when nobody has the old class any more, or when the rule is gone."""
    compiler = Compiler()
    commit(compiler, "a.com")
    old = compiler.tables.names["a.com"]
    commit(compiler, "a.com, b.com")
    compiler.forget_name_classes([old])
    compiler.commit()
    assert not matches(compiler, old)
    assert {class_ for _, class_ in compiler.tables.domains} == {compiler.tables.names["a.com"]}
    compiler.replace(derive(read(CLUSTER.split("---")[0])))
    compiler.commit()
    assert not len(compiler.tables.domains)


def test_a_wide_rule_finds_its_parts_both_ways() -> None:
    """With few classes by their patterns, with many by the parts of the rule's patterns."""
    compiler = Compiler()
    commit(compiler, "a.com")
    old = compiler.tables.names["a.com"]
    for number in range(40):
        commit(compiler, f"a.com, n{number}.net")
    commit(compiler, "a.com, b.com, c.com")
    assert matches(compiler, old)
