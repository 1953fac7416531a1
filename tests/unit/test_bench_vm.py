# SPDX-License-Identifier: Apache-2.0
"""The benchmark between two virtual machines: its manifests, and the evaluation of its samples."""

from __future__ import annotations

from bench.record import Run
from bench.vm.__main__ import NOTE, _fill, render
from bench.vm.node import CLIENTS, DENIED_PORT, ENFORCED, FREE, IPERF_PORT, MANIFESTS, SERVERS, STREAM, TCP_REQUESTS
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.prediction import Prediction
from netpol_ebpf.lab.scene import plan_for
from netpol_ebpf.lab.topology import TCP
from netpol_ebpf.resources.load import parse_documents


def test_policy_allows_what_is_measured_and_denies_what_proves_it() -> None:
    """The reference model says so for the manifests of the two nodes. The other pair of pods is in no manifest."""
    resources = parse_documents(MANIFESTS, "bench.yaml").check()
    prediction = Prediction(resources, plan_for(resources))
    target = SERVERS.pods[ENFORCED]
    assert prediction.reached(Attempt("bench/client", target, TCP, IPERF_PORT))
    assert not prediction.reached(Attempt("bench/client", target, TCP, DENIED_PORT))
    assert str(CLIENTS.pods[FREE]) not in MANIFESTS
    assert str(SERVERS.pods[FREE]) not in MANIFESTS


def test_ratios_are_of_rounds_and_nothing_is_judged() -> None:
    """It is the median of the rounds' ratios, not the ratio of medians. Every case is marked as not judged."""
    samples = {
        STREAM: {ENFORCED: [90.0, 40.0, 80.0], FREE: [100.0, 50.0, 80.0]},
        TCP_REQUESTS: {ENFORCED: [2.0], FREE: [1.0]},
    }
    run = Run("command", {"cpu": "x"}, {}, {}, "2026-11-30")
    _fill(run, {"kernel": "6.12.0", "samples": samples})
    assert not any(case.judged for case in run.cases)
    assert run.machine["emulated"] is True
    assert run.notes == [NOTE]
    text = render(run)
    assert NOTE in text
    (row,) = [line for line in text.splitlines() if line.startswith(STREAM)]
    assert row.split()[-1] == "0.900"
