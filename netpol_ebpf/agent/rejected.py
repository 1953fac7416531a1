# SPDX-License-Identifier: Apache-2.0
"""Changes that were rejected because they did not fit: their number, the full map, and the time of the next attempt.

Invariant: counters only grow, and for every count there is a line in the log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from netpol_ebpf.errors import LimitError, Location, MapFullError, Problem
from netpol_ebpf.policy.types import Changes

log = logging.getLogger(__name__)

NAMED = 3
"""Largest number of objects that a message names. The number is arbitrary."""
RETRY_S = 5.0
LONGEST_RETRY_S = 300.0
"""Longest interval in seconds between two attempts of a change for which the kernel had no memory. The interval doubles
with each attempt; the number is arbitrary."""

MAPS_BY_LIMIT = {
    "peer_classes": "np_peer_class",
    "addresses": "np_addr4, np_addr6",
    "cidrs": "np_cidr4, np_cidr6",
    "column_blocks": "np_l4_col",
    "verdicts": "np_verdict",
    "rules": "np_rule, np_rule_count",
    "domains": "np_domain",
    "names": "np_name",
}
"""The maps whose sizes determine a limit of the compiler, by the limit's name."""


@dataclass(slots=True)
class RejectedChanges:
    """Changes that did not fit into a map or exceeded a limit.

    ``objects``: the changed objects that are not in force yet, by name, each with its file and line. ``count``: the
    number of rejections. ``by_map``: the number of rejections for each map or limit. ``full``: the map without room, or
    the limit, of the last rejection; "" if nothing is rejected now. ``retry_at_s``: the time of the next attempt; None:
    with the next change.
    """

    objects: dict[str, Location] = field(default_factory=dict)
    count: int = 0
    by_map: Counter[str] = field(default_factory=Counter)
    full: str = ""
    problem: Problem | None = None
    retry_at_s: float | None = None
    _gap_s: float = RETRY_S

    def expect(self, changes: Changes, locate: Callable[[object], Location]) -> None:
        """Add the objects of ``changes`` to those that are not in force yet.

        ``locate``: returns an object's file and line.
        """
        tables: dict[str, Mapping[Any, Any]] = {
            "Tier": changes.tiers, "": changes.policies, "Profile": changes.profiles, " ": changes.endpoints,
            "NetworkSet": changes.network_sets, "Node": changes.nodes, "Service": changes.services,
        }  # fmt: skip
        for kind, table in tables.items():
            for key, new in table.items():
                name = "/".join(key) if isinstance(key, tuple) and kind == "Service" else str(key)
                place = getattr(new, "location", None) or locate(key)
                self.objects[f"{kind}/{name}" if kind.strip() else name] = place

    def accept(self) -> None:
        """Note that all changes are in force, and log that a rejection is over."""
        if self.problem is not None:
            log.info(
                "over: what %s had no room for is in force", self.full, extra={"fields": {"problem": self.problem.slug}}
            )
        self.objects.clear()
        self.full = ""
        self.problem, self.retry_at_s, self._gap_s = None, None, RETRY_S

    def reject(self, error: LimitError | MapFullError, now_s: float) -> None:
        """Count and log a rejection. Nothing of the change is in force; the previous policy stays in force."""
        self.count += 1
        full = error.map_name if isinstance(error, MapFullError) else MAPS_BY_LIMIT.get(error.limit, error.limit)
        self.full = full
        self.by_map[full] += 1
        names = list(self.objects)
        named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        message = f"{error.message}; the previous policy stays in force"
        message += f" without {named}" if named else ""
        place = next(iter(self.objects.values()), Location(""))
        self.problem = Problem(place, "", message, obj=names[0] if names else "", slug=error.slug)
        self.retry_at_s = None  # only another change can bring the objects below a limit
        if isinstance(error, MapFullError):
            self.retry_at_s = now_s + self._gap_s
            self._gap_s = min(2 * self._gap_s, LONGEST_RETRY_S)
        log.error("rejected: %s", message)
