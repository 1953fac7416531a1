# SPDX-License-Identifier: Apache-2.0
"""Writes the report of this node to the API server: when its content changes, and once in a period.

All nodes of a cluster together write at most `WRITES_PER_S` reports per second: each node waits at least `gap_s`
between two reports, and a random part of `gap_s` before each report. Changes during this wait are in one report.

Invariants: `ReportWriter.offer` never waits. A report that the server did not confirm is written again. A failure is
only a problem of the report and changes nothing that is in force.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import quote

from netpol_ebpf.errors import Location, Problem, UnreachableError
from netpol_ebpf.status.report import COLLECTION, NodeStatus, fingerprint, render_report
from netpol_ebpf.status.requests import Response, Sender, apply, request

WRITES_PER_S = 100.0
"""Most reports per second of all nodes of a cluster: a fifth of what their kubelets write in any case, because each
kubelet renews its Lease every 10 s (5 000 nodes: 500 writes/s)."""
RENEWALS_PER_S = 20.0
"""Reports per second of all nodes of a large cluster if nothing changes."""
SHORTEST_GAP_S, SHORTEST_PERIOD_S = 1.0, 60.0
FIRST_RETRY_S, LONGEST_RETRY_S = 2.0, 120.0
ABSENT_RETRY_S = 60.0
"""Seconds between two attempts while the server has no kind NodeReport, or this node may not write it."""
SLUG = "status-report"
NODES = "/api/v1/nodes"


def gap_s(nodes: int) -> float:
    """Shortest time in seconds between two reports of one node. ``nodes``: the number of nodes in the cluster."""
    return max(SHORTEST_GAP_S, nodes / WRITES_PER_S)


def period_s(nodes: int) -> float:
    """Longest time in seconds between two reports of one node. ``nodes``: the number of nodes in the cluster."""
    return max(SHORTEST_PERIOD_S, nodes / RENEWALS_PER_S)


@dataclass(slots=True)
class ReportWriter:
    """Writes the report of one node. One thread calls `step`; any thread may call `offer`.

    ``clock``: returns the time in seconds. ``wall``: returns the seconds since 1970. ``chance``: returns random numbers
    from [0, 1).
    """

    sender: Sender
    node: str
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random
    wake: threading.Event = field(default_factory=threading.Event)
    problem: Problem | None = None
    written: int = 0
    """The number of reports that the server confirmed."""
    _wanted: NodeStatus | None = None
    _confirmed: NodeStatus | None = None
    _told: frozenset[bytes] = frozenset()  # fingerprints in the confirmed report
    _due_s: float = math.inf  # when the change must be written
    _renew_s: float = math.inf  # when the report must be written in any case
    _earliest_s: float = -math.inf
    _failures: int = 0
    _node_uid: str = ""

    def offer(self, status: NodeStatus) -> None:
        """Set the status that the next report must have. A later call replaces it."""
        if status != self._wanted:
            self._wanted = status
            self.wake.set()

    def step(self) -> float:
        """Write the report if it is due.

        Returns the seconds until the next step, which setting `wake` triggers earlier.
        """
        wanted, now_s = self._wanted, self.clock()
        if wanted is None:
            return math.inf
        if self._due_s == math.inf and self._is_news(wanted):
            self._due_s = max(now_s, self._earliest_s) + self.chance() * gap_s(wanted.nodes)
        due_s = max(min(self._due_s, self._renew_s), self._earliest_s)
        if now_s < due_s:
            return due_s - now_s
        try:
            response = self._write(wanted)
        except UnreachableError as error:
            return self._failed(error.message, self._backoff_s())
        if not response.is_done:
            return self._refused(response)
        if response.status == HTTPStatus.CREATED:
            self._node_uid = ""  # the report was deleted, perhaps with its Node: the next one reads the UID again
        now_s = self.clock()
        self.problem, self._failures, self.written = None, 0, self.written + 1
        self._confirmed, self._told = wanted, frozenset(map(fingerprint, wanted.in_force.values()))
        self._due_s, self._earliest_s = math.inf, now_s + gap_s(wanted.nodes)
        self._renew_s = now_s + period_s(wanted.nodes) * (0.5 + self.chance() / 2)
        return 0.0 if self._wanted is not wanted else self._renew_s - now_s

    def _is_news(self, wanted: NodeStatus) -> bool:
        """Whether a status has news for which readers wait; that a node no longer needs a policy is no news."""
        known = self._confirmed
        if known is None or wanted.shortfalls != known.shortfalls:
            return True
        if wanted.in_force == known.in_force:
            return False
        return not self._told.issuperset(map(fingerprint, wanted.in_force.values()))

    def _write(self, wanted: NodeStatus) -> Response:
        self._node_uid = self._node_uid or self._read_node_uid()
        report = render_report(self.node, wanted, self.wall(), period_s(wanted.nodes), self._node_uid)
        return apply(self.sender, f"{COLLECTION}/{quote(self.node, safe='')}", report)

    def _read_node_uid(self) -> str:
        """The UID of this node's Node object; "" if there is no such object.

        The UID is read by a LIST of this one object, because agents always have the right to list Nodes.
        """
        found = request(self.sender, "GET", f"{NODES}?fieldSelector=metadata.name%3D{quote(self.node, safe='')}")
        items = found.body.get("items") or [{}]
        return str(items[0].get("metadata", {}).get("uid", ""))

    def _refused(self, response: Response) -> float:
        status = response.status
        if status == HTTPStatus.NOT_FOUND:
            return self._failed(
                "the cluster has no NodeReports: apply deploy/chart/crds/nodereports.netpol-ebpf.io.yaml",
                ABSENT_RETRY_S,
            )
        if status == HTTPStatus.FORBIDDEN:
            return self._failed(
                f"a right is missing ({response.message}): apply deploy/manifests/rbac.yaml", ABSENT_RETRY_S
            )
        wait_s = self._backoff_s() if response.retry_after_s is None else response.retry_after_s + self.chance()
        return self._failed(f"the API server refused it ({response.message})", wait_s)

    def _backoff_s(self) -> float:
        return min(FIRST_RETRY_S * 2.0**self._failures, LONGEST_RETRY_S) * (0.5 + self.chance())

    def _failed(self, why: str, wait_s: float) -> float:
        self._failures = min(self._failures + 1, 10)
        message = f"the report of node {self.node} was not written: {why}; what is in force stays in force"
        self.problem = Problem(Location(COLLECTION), "", message, severity="warning", slug=SLUG)
        self._due_s = self._earliest_s = self.clock() + wait_s
        return wait_s
