# SPDX-License-Identifier: Apache-2.0
"""The state of an agent as plain values, with a value in every field that metrics use."""

from __future__ import annotations

from typing import Any

from test_agent_cli import PROBLEM, SOURCES, STATE

from netpol_ebpf.agent.change_record import ChangeRecord, ObjectCounts

KIND = {"lists": 2, "watches": 3, "gaps": 1, "last_sync": "2026-01-02T03:04:05Z"}


def histogram() -> dict[str, Any]:
    """The histogram of two changes: one of 20 ms, one of two minutes."""
    now_s = 0.0
    record = ChangeRecord(lambda: now_s)
    for took_s in (0.02, 120.0):
        record.begin()
        now_s += took_s
        record.note({"policies": ObjectCounts(1, 0, 0)}, 7)
    return record.histogram()


def full_state() -> dict[str, Any]:
    """The state of a node of a cluster, with one problem and one rejected object."""
    cluster, manifests = SOURCES
    cluster = {
        **cluster,
        "went_back": 1,
        "behind": ["nodes: unreachable"],
        "kinds": [{**one, **KIND} for one in cluster["kinds"]],
    }
    return {
        **STATE,
        "problems": [PROBLEM],
        "sources": [cluster, {**manifests, "behind": []}],
        "readiness": {"synced": "", "programmed": "no room", "fresh": ""},
        "change_seconds": histogram(),
        "connections": {
            "np_conn4": {"established": 5, "unreplied": 1, "size": 64},
            "np_conn6": {"established": 0, "unreplied": 0, "size": 64},
        },
        "refused": {"changes": 3, "by_map": {"np_rule": 3}, "map": "np_rule", "waiting": ["Pod/shop/db"]},
        "packets": {"policy-deny": 4, "event-lost": 5},
    }


def waiting_state() -> dict[str, Any]:
    """The state of a node on which nothing is in force yet."""
    state = full_state()
    kept = ("version", "pid", "node", "manifests", "pin_dir", "problems", "sources", "readiness")
    return {**{name: state[name] for name in kept}, "in_force": False, "waiting": "it waits"}


def rule(number: int, *, packets: int = 0, **labels: str) -> dict[str, Any]:
    """A rule with its counters."""
    known = {"tier": "default", "kind": "KubernetesNetworkPolicy", "namespace": "shop", "policy": "db"}
    whole = {**known, "direction": "ingress", "rule": str(number), "action": "allow", **labels}
    return {"number": number, "packets": packets, "bytes": 100 * packets, "staged_packets": 0, "labels": whole}
