# SPDX-License-Identifier: Apache-2.0
"""The steps of a guest run, and what is kept of each.

`tests.vm.inside` runs them; this module names them and parses output.

If a command of the project changes, only this module and `tests.vm.inside` must be adapted.
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
"""Case files about tiers of both APIs, CIDRs with exceptions, named ports, host endpoints, services, IPv6 and ICMP."""


BORDER = ("border_origin", "border_links", "border_headers", "border_node", "barrier")
"""Files of tests/netns (without "test_" and ".py") that a guest runs: attacks at the border and their allowed
counterparts, which depend on the kernel. The rules for tunnels and for lifetimes of connections depend only on the
program, so one kernel proves them."""


WORLDS = ("before-with", "after-without")
"""The worlds of tests/netns/test_networks.py that a guest runs. Each takes ten minutes there."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    ``call``: a function of `tests.vm.inside`. ``keep``: returns the part of its JSON document for the result.
    """

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


def _keep_counts(outcomes: Any) -> Any:
    return {outcome: len(names) for outcome, names in outcomes.items() if names}


def all_steps(older: Path) -> tuple[Step, ...]:
    """The steps of a supported kernel. ``older``: the source of an older version, for the upgrade."""
    return (
        Step("system", "system"),
        Step("load", "load"),
        Step("cases", "netpolctl", ("test", "--engine", "kernel", "--output", "json", *CASES), _keep_cases),
        Step("demo", "netpolctl", ("demo", "--no-iperf", "--output", "json"), _keep_demo, 900.0),
        Step("succession", "succession", (str(older),), timeout_s=900.0),
        *(Step(f"border {name}", "border", (name,), _keep_counts, timeout_s=3600.0) for name in BORDER),
        Step("networks", "networks", WORLDS, timeout_s=3600.0),
    )


def refusal_steps() -> tuple[Step, ...]:
    """The steps of an unsupported kernel."""
    return (Step("system", "system"), Step("refusal", "refusal"))


def choose_steps(steps: Iterable[Step], names: Iterable[str] | None) -> tuple[Step, ...]:
    """The steps with these names; None: all steps. The first step, which identifies the kernel, is always included.

    ``names``: names of steps, or first words of names ("border").
    """
    every = tuple(steps)
    if names is None:
        return every
    wanted = set(names)
    return tuple(one for one in every if one is every[0] or {one.name, one.name.split()[0]} & wanted)


def read_document(output: str) -> Any:
    """The JSON document that a step printed; None if it printed none."""
    try:
        return json.loads(output)
    except ValueError:
        return None
