# SPDX-License-Identifier: Apache-2.0
"""Numbers of nodes. The program uses them to check that a tunnelled packet comes from the node of its source address.

A node has a number only while its addresses identify the node: it has at least one address, and shares no address with
another node.  If an earlier registration of a machine left a second Node object behind, both nodes have no number, and
no address gets the number of the wrong node.

Invariants: a number is never given to another node, nor again to a node that lost its number.  The caller must update
the rows that depend on the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.tables import FIRST_NODE
from netpol_ebpf.policy.types import ClusterNode


class NodeNumbers:
    """The numbers of nodes. ``numbers``: maps the name of each node with a number to the number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._next = FIRST_NODE

    def renumber(self, nodes: Mapping[str, ClusterNode], journal: Journal) -> dict[str, tuple[int, int]]:
        """Update the numbers after the addresses of nodes may have changed. ``nodes``: all nodes, by name.

        Returns, for the name of each node with another number than before, (old number, new number). 0 stands for no
        number.  Cost: linear in the nodes.
        """
        holders = Counter(address for node in nodes.values() for address in set(node.addresses))
        before = self.numbers
        told = [
            name for name, one in nodes.items() if one.addresses and all(holders[each] == 1 for each in one.addresses)
        ]
        fresh = {name: number for number, name in enumerate((name for name in told if name not in before), self._next)}
        after = {name: before.get(name) or fresh[name] for name in told}
        journal.assign(self, "numbers", after)
        journal.assign(self, "_next", self._next + len(fresh))
        names = sorted(before.keys() ^ after.keys())
        return {name: (before.get(name, 0), after.get(name, 0)) for name in names}
