# SPDX-License-Identifier: Apache-2.0
"""A short form of the benchmark of an agent at an API server: the simulated server feeds a real agent."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec", reason="the extra [kubernetes] is not installed")

from bench import api_agent  # noqa: E402
from bench.cluster import Size  # noqa: E402
from bench.page import API_TARGETS  # noqa: E402
from bench.record import begin  # noqa: E402
from bench.site import BPFFS  # noqa: E402

pytestmark = pytest.mark.netns


def test_agent_enforces_what_the_simulated_server_sends() -> None:
    """The pinned program judges by each edit, with and without churn.

    The run has every case of the page, and nothing remains.
    """
    run = begin(["test"])
    size = Size(300, 30, 3)
    api_agent.run_suite(run, sizes=[size], edits=3, churn_s=1.0, rest_s=0.5)
    cases = {case.name.removeprefix("API server: "): case for case in run.cases}
    assert {name for name, _, _ in API_TARGETS} <= cases.keys()
    assert len(cases["policy edit"].samples) == 3
    assert all(case.samples and min(case.samples) > 0 for case in cases.values())
    assert list(BPFFS.glob("netpol-bench-api-*")) == []
