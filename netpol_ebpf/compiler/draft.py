# SPDX-License-Identifier: Apache-2.0
"""The writes of one commit, collected by phase. The tables stay unchanged until the commit has succeeded.

Invariant: the `Change` that `Draft.publish` returns has exactly the writes that `publish` made to the tables.
"""

from __future__ import annotations

import enum
from typing import Any

from netpol_ebpf.compiler.tables import Change, CompiledTables


class Phase(enum.Enum):
    """The batches of a `Change`, in the order in which they are written."""

    PREPARE = "prepare"
    GROW = "grow"
    FLIP = "flip"
    SHRINK = "shrink"


DELETED: Any = None
"""Stands in place of a row when the key must be removed."""


class Draft:
    """The writes of a commit that are not applied yet.

    In one phase, a later write to a key replaces an earlier write.
    """

    def __init__(self) -> None:
        self._writes: dict[Phase, dict[str, dict[Any, Any]]] = {phase: {} for phase in Phase}
        self.revokes = False

    def write(self, phase: Phase, table: str, key: object, row: object) -> None:
        """Record the write of one row; ``row`` DELETED records the removal of the key."""
        writes = self._writes[phase]
        rows = writes.get(table)
        if rows is None:
            rows = writes[table] = {}
        rows[key] = row

    def rows(self, phase: Phase, table: str) -> dict[Any, Any]:
        """The writes of a phase to a table, by key. The caller may add writes to the mapping."""
        return self._writes[phase].setdefault(table, {})

    def size_after(self, tables: CompiledTables, table: str) -> int:
        """The largest number of rows that the table has at any time during the change.

        Rows are deleted last, so the result is the number of present rows plus the number of new keys.
        """
        existing = getattr(tables, table)
        added: set[object] = set()
        for writes in self._writes.values():
            added.update(
                key for key, row in writes.get(table, {}).items() if row is not DELETED and key not in existing
            )
        return len(existing) + len(added)

    def publish(self, tables: CompiledTables) -> Change:
        """Apply the writes to the tables and clear the draft. Returns the writes as a change."""
        change = Change(revokes=self.revokes)
        for phase, writes in self._writes.items():
            for name in list(writes):
                table = getattr(tables, name)
                table.write(writes.pop(name))
                delta = table.take()
                if delta:
                    getattr(change, phase.value)[name] = delta
        return change
