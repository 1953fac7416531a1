# SPDX-License-Identifier: Apache-2.0
"""The world from which the rows in the kernel were made. It lags behind the objects while a change is rejected.

Invariant: `WorldInForce.world` is the world after the last change that was applied whole. The memory cost is a
reference for each object, not a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from netpol_ebpf.agent.change_record import ObjectCounts
from netpol_ebpf.policy.types import Changes, World


@dataclass(slots=True)
class WorldInForce:
    """The world in force. ``world``: read-only for callers; it shares its objects with the translated world."""

    world: World = field(default_factory=World)
    _awaited: Changes = field(default_factory=Changes)

    def expect(self, changes: Changes) -> None:
        """Add changes to those that are not in force yet. Cost: linear in the changes."""
        for one in fields(Changes):
            later = getattr(changes, one.name)
            if isinstance(later, dict):
                getattr(self._awaited, one.name).update(later)
            elif later is not None:
                setattr(self._awaited, one.name, later)

    def accept(self) -> dict[str, ObjectCounts]:
        """Apply all changes that are not in force yet to ``world``.

        Returns the numbers of added, changed and removed objects by table of the world.
        """
        counts = {}
        for one in fields(Changes):
            changes = getattr(self._awaited, one.name)
            if isinstance(changes, dict):
                before = getattr(self.world, one.name)
                removed = sum(new is None and key in before for key, new in changes.items())
                changed = sum(new is not None and key in before for key, new in changes.items())
                added = sum(new is not None for new in changes.values()) - changed
                counts[one.name] = ObjectCounts(added, changed, removed)
        self._awaited.apply_to(self.world)
        self._awaited = Changes()
        return counts
