# SPDX-License-Identifier: Apache-2.0
"""Real plugins and well-known layouts: a pod there is enforced, or is reported as not enforced.

Each network gets the same questions by real connections, under an agent that started before the pods and under one that
started after them, with and without the plugin results that runtimes keep. If the kernel lacks a network's devices, its
row says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from network_scene import NETWORKS, Network, World, world

pytestmark = pytest.mark.netns

WORLDS = {
    "before-with": (False, True),
    "before-without": (False, False),
    "after-with": (True, True),
    "after-without": (True, False),
}
"""name -> (whether the agent starts after the pods, whether the runtime keeps the results of plugins)."""


@pytest.fixture(scope="module", params=WORLDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, bool]]:
    is_late, keeps_results = WORLDS[request.param]
    with world(tmp_path_factory.mktemp("networks"), is_late=is_late, keeps_results=keeps_results) as found:
        yield found, keeps_results


@pytest.mark.parametrize("network", NETWORKS, ids=lambda one: one.name)
def test_network(built: tuple[World, bool], network: Network, record_property: Callable[[str, object], None]) -> None:
    """Denied connections fail and allowed ones succeed; or the pod is named, and does not look enforced."""
    found, keeps_results = built
    kept = "-" if network.with_result is None else keeps_results
    row: dict[str, Any] = {"network": network.name, "ipam": network.ipam, "plugin": network.plugin, "result": kept}
    if network.name in found.missing:
        record_property("row", {**row, "verdict": "not run", "why": found.missing[network.name]})
        return
    answers = found.answers[network.name]
    assert all(answers.open), f"without policy not everything is reached: {answers.open}"
    pods = [found.site.pods[pod].endpoint for pod in network.pods]
    shown = {one["endpoint"]: one for one in found.state["endpoints"]}
    evidence = {shown[pod]["evidence"] for pod in pods}
    told = {pod: "; ".join(one["message"] for one in found.state["problems"] if one["object"] == pod) for pod in pods}
    if network.is_seen:
        assert evidence == {network.with_result if keeps_results and network.with_result else network.evidence}
        assert {shown[pod]["state"] for pod in pods} == {"enforced"}
        assert not any(told.values()), told
        assert (any(answers.ingress_denied), any(answers.egress_denied), all(answers.allowed)) == (
            False,
            False,
            True,
        ), answers
    else:
        assert evidence == {None}
        assert {shown[pod]["state"] for pod in pods} == {"waiting"}
        assert all("NOT enforced on this workload: no interface of this node" in text for text in told.values()), told
        if keeps_results:
            assert all(
                f"NOT enforced on its interface eth0: packets of {network.plugin}" in text for text in told.values()
            )
        assert not found.state["in_force"]
    record_property("row", {
        **row, "evidence": next(iter(evidence)) or "none",
        "ingress_denied": not any(answers.ingress_denied), "egress_denied": not any(answers.egress_denied),
        "allowed": all(answers.allowed), "verdict": "enforced" if network.is_seen else "named as not enforced", "why": "",
    })  # fmt: skip
