# SPDX-License-Identifier: Apache-2.0
"""The writes of one commit, collected by phase; the tables are touched only when the commit is certain.

Invariant: what `publish` puts into the tables, phase after phase, is what it returns as the `Change`.
"""

from __future__ import annotations

import enum
from typing import Any

from netpol_ebpf.compiler.tables import Change, CompiledTables


class Phase(enum.Enum):
    """The batches of a `Change`, in the order they are written."""

    PREPARE = "prepare"
    GROW = "grow"
    FLIP = "flip"
    SHRINK = "shrink"


DELETED: Any = None
"""Stands for the removal of a key, in place of a row."""


class Draft:
    """Writes of a commit, not yet applied. A later write of a phase to the same key replaces an earlier one."""

    def __init__(self) -> None:
        self._writes: dict[Phase, dict[str, dict[Any, Any]]] = {phase: {} for phase in Phase}
        self.revokes = False

    def write(self, phase: Phase, table: str, key: object, row: object) -> None:
        """Record the write of one row, or DELETED."""
        writes = self._writes[phase]
        rows = writes.get(table)
        if rows is None:
            rows = writes[table] = {}
        rows[key] = row

    def rows(self, phase: Phase, table: str) -> dict[Any, Any]:
        """The writes of a phase to a table, as a mapping that the caller may extend."""
        return self._writes[phase].setdefault(table, {})

    def size_after(self, tables: CompiledTables, table: str) -> int:
        """The most rows the table will have at any time during the change (deletions come last)."""
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
