# SPDX-License-Identifier: Apache-2.0
"""The steps of a guest run, and what is kept of each: `tests.vm.inside` does them, this module names them and reads their output.

Adapt here and in `tests.vm.inside` when a command of the project changes; nothing else of the harness knows any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CASES = (
    "examples/cases/three-tiers.yaml",
    "examples/cases/cluster-network-policy.yaml",
    "examples/cases/ip-block-except.yaml",
    "examples/cases/named-and-ranged-ports.yaml",
    "tests/cases/shared/calico/hostep-eth0-security-tier-1-egress-only.yaml",
    "tests/cases/shared/calico/service-ingress-1-allow-from-service.yaml",
    "tests/cases/shared/rules/ingress-allow-from-ffe2-112.yaml",
    "tests/cases/shared/rules/ingress-allow-icmp-packet-with-type-not-equal-to-8-and-code-not-equal-to-3.yaml",
)
"""Tiers of both APIs, CIDRs with exceptions, named ports, host endpoints, services, IPv6, ICMP."""


BORDER = ("origin", "links", "headers", "node")
"""Tests of the border (tests/netns/test_border_*.py) that a guest runs, besides those of the second barrier and of what is followed of interfaces
and routes: those of what kernels do in different ways.  Tunnels and lifetimes are the program's alone."""


WORLDS = ("before-with", "after-without")
"""Of those of tests/netns/test_networks.py, that a guest runs: each takes ten minutes there."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step. ``call``: a function of `tests.vm.inside`; ``keep``: what of its JSON document goes into the result."""

    name: str
    call: str
    arguments: tuple[str, ...] = ()
    keep: Callable[[Any], Any] = lambda document: document
    timeout_s: float = 600.0


def _keep_cases(report: Any) -> Any:
    return {"files": len(CASES), "probes": report["probes"], "failed": report["failed"]}


def _keep_demo(summary: Any) -> Any:
    parts = {name: summary[name] for name in ("before", "after", "changed", "restored")}
    return {
        "ok": summary["ok"],
        "agent_start_s": summary["agent_start_s"],
        "attempts": sum(part["attempts"] for part in parts.values()),
        "mismatches": [text for part in parts.values() for text in part["mismatches"]],
        "open_connection_cut": summary["change"]["open_connection_cut"],
    }


def all_steps(older: Path) -> tuple[Step, ...]:
    """What a supported kernel runs. ``older``: the tree of an older version, for the upgrade."""
    return (
        Step("system", "system"),
        Step("load", "load"),
        Step("cases", "netpolctl", ("test", "--engine", "kernel", "--output", "json", *CASES), _keep_cases),
        Step("demo", "netpolctl", ("demo", "--no-iperf", "--output", "json"), _keep_demo, 900.0),
        Step("succession", "succession", (str(older),), timeout_s=900.0),
        Step("border", "border", BORDER, timeout_s=3600.0),
        Step("networks", "networks", WORLDS, timeout_s=3600.0),
    )


def refusal_steps() -> tuple[Step, ...]:
    """What a kernel runs that is not supported."""
    return (Step("system", "system"), Step("refusal", "refusal"))


def choose_steps(steps: Iterable[Step], names: Iterable[str] | None) -> tuple[Step, ...]:
    """The steps of those names; all of them for None. The first one, which says what kernel it is, always."""
    every = tuple(steps)
    return every if names is None else tuple(one for one in every if one is every[0] or one.name in set(names))


def read_document(output: str) -> Any:
    """The JSON document that a step printed; None when it printed none."""
    try:
        return json.loads(output)
    except ValueError:
        return None
