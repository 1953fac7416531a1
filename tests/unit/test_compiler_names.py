# SPDX-License-Identifier: Apache-2.0
"""The names that only an inner wildcard matches: how many of them have rows."""

from __future__ import annotations

from worlds import read

from netpol_ebpf.apply.events import decode_labels
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.limits import Limits
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


def test_a_flood_of_names_leaves_room_for_patterns() -> None:
    """The names seen last have rows, the others give way, and a policy with more names fits."""
    compiler = Compiler(limits=Limits(names=40, seen_names=10))
    compiler.replace(derive(read(CLUSTER.replace("PATTERNS", "x.*.com"))))
    compiler.commit()
    for number in range(100):
        compiler.see_names({f"x.{number}.com"})
        compiler.commit()
    assert set(compiler.tables.names) == {f"x.{number}.com" for number in range(90, 100)}
    more = ", ".join(f"n{number}.net" for number in range(30))
    compiler.replace(derive(read(CLUSTER.replace("PATTERNS", f"x.*.com, {more}"))))
    compiler.commit()
    assert len(compiler.tables.names) == 40
    compiler.replace(derive(read(CLUSTER.replace("PATTERNS", "n1.net"))))
    compiler.commit()
    assert set(compiler.tables.names) == {"n1.net"}


def test_a_star_in_a_name_is_no_wildcard() -> None:
    """An endpoint may ask for any bytes: such a name gets no row, and is no pattern."""
    compiler = Compiler()
    compiler.replace(derive(read(CLUSTER.replace("PATTERNS", "x.*.com"))))
    compiler.commit()
    for name in ("x.*.evil.com", "x.*.*.evil.com"):
        assert not compiler.wants_name(name)
        compiler.see_names({name})
        compiler.commit()
        assert not len(compiler.tables.names)


def test_a_star_of_a_label_is_shown_as_another_byte() -> None:
    """So that nothing takes a name that was asked for as a pattern."""
    assert decode_labels(b"\x03com\x01*\x01x\0") == r"x.\042.com"
