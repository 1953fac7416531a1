# SPDX-License-Identifier: Apache-2.0
"""`netpolctl explain` and the program in the kernel agree about hosts: the same steps, from the same rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol_ebpf.analysis.explanation import explain
from netpol_ebpf.cases.case import load_cases
from netpol_ebpf.cases.engines import open_engine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.policy.translate import derive

pytestmark = pytest.mark.kernel
CASES = sorted((Path(__file__).parents[1] / "cases" / "decisions").glob("host-*.yaml"))


def test_steps_of_hosts_are_those_of_the_kernel() -> None:
    """Each journey of processes, forwarded, translated and untracked traffic through host endpoints has the same steps."""
    loaded = load_cases(CASES).cases
    assert len(loaded) > 10
    with open_engine("model") as model, open_engine("kernel") as kernel:
        for case in loaded:
            world = derive(case.resources)
            cast = Cast(case.resources, world)
            for engine in (model, kernel):
                engine.load(world)
            for probe in case.probes:
                told = explain(cast, world, probe, model)
                assert told == explain(cast, world, probe, kernel), (case.name, probe.written)
                assert {way["allowed"] for way in told} == {probe.expect_allow}, (case.name, probe.written)
