# SPDX-License-Identifier: Apache-2.0
"""The election of the one agent in the cluster that writes the conditions of policies. A Lease names it.

All times are the API server's, from the Date header of its answers, so the clocks of the nodes do not matter. The other
agents, the followers, read the Lease rarely. In a cluster of 5 000 nodes some follower reads it at almost any moment,
and the first follower that finds it expired takes it.

Invariant: an agent that could not renew the Lease stops leading before another agent may take it. If two agents lead at
the same time, for example after one node was suspended, both write the same conditions.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.status.report import parse_time
from netpol_ebpf.status.requests import Response, Sender, request
from netpol_ebpf.status.writer import RENEWALS_PER_S

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
LEASE = "netpol-status"
DURATION_S, RENEW_S, LEADS_S = 60, 15.0, 40.0
"""In seconds: how long the Lease is valid; the interval of its renewal; how long an agent leads after a renewal."""


@dataclass(slots=True)
class Election:
    """Takes and renews the Lease for one node.

    ``nodes``: the number of nodes in the cluster. ``problem``: why this agent cannot take part; "" if it can.
    """

    sender: Sender
    node: str
    nodes: int = 1
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    problem: str = ""
    _until_s: float = -math.inf

    @property
    def is_leading(self) -> bool:
        """Whether this agent leads now."""
        return self.clock() < self._until_s

    def step(self) -> float:
        """Read the Lease, and take or renew it if this agent may. Returns the seconds until the next step."""
        began_s = self.clock()
        try:
            response = self._take()
        except (UnreachableError, ValueError, KeyError, TypeError) as error:
            self.problem = str(error)
            return self._pause_s()
        if response is not None and response.is_done:
            self._until_s = began_s + LEADS_S
        elif response is None or response.status == HTTPStatus.CONFLICT:
            self._until_s = -math.inf  # another leads
        refused = response is not None and not response.is_done and response.status != HTTPStatus.CONFLICT
        self.problem = response.message if refused and response is not None else ""
        return self._pause_s()

    def _pause_s(self) -> float:
        if self.is_leading:
            return RENEW_S
        return max(RENEW_S, self.nodes / RENEWALS_PER_S) * (0.5 + self.chance())

    def _take(self) -> Response | None:
        """Write the Lease if this agent holds it or may take it. Returns None if another agent holds it."""
        found = request(self.sender, "GET", f"{LEASES}/{LEASE}")
        now_s = found.server_time_s
        if now_s is None:
            raise ValueError("the API server told no time")
        if found.status == HTTPStatus.NOT_FOUND:
            return request(self.sender, "POST", LEASES, self._lease(now_s, {"name": LEASE, "namespace": "kube-system"}))
        if not found.is_done:
            return found
        spec = found.body.get("spec") or {}
        holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime")
        is_valid = bool(holder) and isinstance(renewed, str) and now_s - parse_time(renewed) < DURATION_S
        if is_valid and holder != self.node:
            return None
        metadata = found.body["metadata"]
        kept = {key: metadata[key] for key in ("name", "namespace", "resourceVersion")}
        return request(self.sender, "PUT", f"{LEASES}/{LEASE}", self._lease(now_s, kept))

    def _lease(self, now_s: float, metadata: dict[str, Any]) -> dict[str, Any]:
        renewed = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(now_s))
        spec = {"holderIdentity": self.node, "leaseDurationSeconds": DURATION_S, "renewTime": renewed}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
