# SPDX-License-Identifier: Apache-2.0
"""Whether one policy is in force on the nodes that need it, from the reports of those nodes.

A node needs a policy if the policy selects an endpoint of the node. The reader derives this from the cluster's objects,
not from the reports, because a node that does not know the policy yet cannot report that it needs it.

Invariant: a policy counts as in force on a node only if the node's report proves it and is not stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from netpol_ebpf.status.report import NodeReport, fingerprint, render_time

RECENT = 16
"""Number of older generations that are tried, to tell which one is in force on a node that is behind. The number is
arbitrary."""
IN_FORCE = "Programmed"
PENDING, NO_REPORT, STALE, INVALID = "Pending", "NoReport", "StaleReport", "Invalid"


@dataclass(frozen=True, slots=True)
class NodeStanding:
    """The standing of a policy on one node.

    ``reason``: `IN_FORCE`, or why the newest generation is not in force. ``generation``: the generation in force there,
    0 if it is not known.
    """

    node: str
    reason: str
    message: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """The standing of a policy in the cluster, or on one node.

    ``generation``: the newest generation of the policy's spec, 0 for a policy from a manifest. ``nodes``: the nodes
    that need the policy. ``problem``: why no node can enforce this spec; "" if nodes can enforce it.
    """

    policy: str
    generation: int
    nodes: tuple[NodeStanding, ...]
    problem: str = ""

    @property
    def in_force(self) -> int:
        """The number of nodes that need this generation and have it in force."""
        return sum(one.reason == IN_FORCE for one in self.nodes)

    @property
    def is_programmed(self) -> bool:
        """Whether this generation is in force on every node that needs it."""
        return not self.problem and self.in_force == len(self.nodes)

    @property
    def reason(self) -> str:
        """The reason in one word: `IN_FORCE`, `INVALID`, or the reason of a node that is behind.

        If several nodes are behind for different reasons, a rejection takes precedence over PENDING, NO_REPORT and
        STALE.
        """
        if self.problem:
            return INVALID
        behind = [one.reason for one in self.nodes if one.reason != IN_FORCE]
        soft = {PENDING, NO_REPORT, STALE}
        return min(behind, key=lambda one: (one in soft, one)) if behind else IN_FORCE

    @property
    def message(self) -> str:
        """The standing as one sentence."""
        what = f"generation {self.generation}" if self.generation else "it"
        if self.problem:
            return f"{what} is not valid: {self.problem}"
        if not self.nodes:
            return f"{what} is in force: it selects nothing on any node"
        text = f"{what} is in force on {self.in_force} of {len(self.nodes)} nodes that need it"
        first = next((one for one in self.nodes if one.reason == self.reason and one.reason != IN_FORCE), None)
        return text if first is None else f"{text}; {first.node}: {first.message}"

    def as_dict(self) -> dict[str, Any]:
        """The standing as plain values, for `netpolctl status --policy`."""
        return {
            "policy": self.policy,
            "programmed": self.is_programmed,
            "generation": self.generation,
            "reason": self.reason,
            "message": self.message,
            "nodes_needing": len(self.nodes),
            "nodes_in_force": self.in_force,
            "nodes": [
                {"node": one.node, "reason": one.reason, "generation": one.generation, "message": one.message}
                for one in self.nodes
            ],
        }


def is_proven(revision: str, nodes: Iterable[str], reports: Mapping[str, NodeReport], now_s: float) -> bool:
    """Whether the reports prove that a revision is in force on all of these nodes."""
    mark = fingerprint(revision)
    return all(_proves(reports.get(node), mark, now_s) for node in nodes)


def evaluate(
    policy: str, revision: str, nodes: Iterable[str], reports: Mapping[str, NodeReport], now_s: float, problem: str = ""
) -> Standing:
    """The standing of a policy on ``nodes``, from their reports.

    ``revision``: see `Meta.revision`. ``now_s``: seconds since 1970. ``problem``: as in `Standing`.
    """
    uid, _, generation = revision.rpartition("/")
    mark, current = fingerprint(revision), int(generation)
    found = []
    for node in sorted(nodes):
        report = reports.get(node)
        if _proves(report, mark, now_s):
            found.append(NodeStanding(node, IN_FORCE, "", current))
        else:
            found.append(_behind(policy, uid, current, node, report, now_s))
    return Standing(policy, current, tuple(found), problem)


def _proves(report: NodeReport | None, mark: bytes, now_s: float) -> bool:
    return report is not None and mark in report.fingerprints and not report.is_stale(now_s)


def _behind(policy: str, uid: str, generation: int, node: str, report: NodeReport | None, now_s: float) -> NodeStanding:
    """The standing on a node whose report does not prove that the newest generation is in force."""
    if report is None:
        return NodeStanding(node, NO_REPORT, "no agent has reported from this node")
    known = next((one for one in _recent(generation) if report.has(f"{uid}/{one}")), 0)
    if report.is_stale(now_s):
        last = f"the last report is of {render_time(report.renewed_s)}"
        state = f"then generation {known} was in force" if known else "then no recent generation was in force"
        return NodeStanding(node, STALE, f"{last}: {state}; see whether the agent runs", known)
    short = report.shortfall_of(policy)
    if short is not None:
        return NodeStanding(node, short.reason, short.message, known)
    message = f"generation {known} is in force" if known else "it has not reported this policy yet"
    return NodeStanding(node, PENDING, message, known)


def _recent(generation: int) -> range:
    return range(generation, max(0, generation - RECENT), -1)
