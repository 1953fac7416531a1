# SPDX-License-Identifier: Apache-2.0
"""The names that only an inner wildcard matches: how many of them have rows."""

from __future__ import annotations

from worlds import read

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
    compiler = Compiler(limits=Limits(names=40))
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
