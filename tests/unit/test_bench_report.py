# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark's result."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bench import report
from bench.record import LESS, MORE, Case, Run
from bench.suite import add_micro

MACHINE = {
    "cpu": "made up", "cpus": 2, "memory_bytes": 1 << 30, "architecture": "x", "kernel": "6.0", "python": "3.11",
    "virtual": True, "load_before": 0.0,
}  # fmt: skip


def example() -> Run:
    run = Run("netpolctl bench", MACHINE, {"commit": "c0ffee", "dirty": True}, {}, "2026-01-01T00:00:00Z", 60.0)
    base = Case("end to end", "tcp, connect and close", "nothing attached", "1/s", MORE, (20_000.0, 20_100.0))
    run.cases = [
        base,
        Case("end to end", base.name, "nftables, rules", "1/s", MORE, (5000.0, 5100.0), {"rules": 1000}, base.id),
        Case("end to end", f"{base.name}: latency p50", "nothing attached", "µs", LESS, (51.0,)),
        Case("scale", "established, hot", "netpol-ebpf", "ns", LESS, (16.0,), {"rules": 10}),
        Case("scale", "established, hot", "netpol-ebpf", "ns", LESS, (17.0,), {"rules": 1000}),
        Case("scale", "new flow denied, spread", "netpol-ebpf", "ns", LESS, (250.0,), {"rules": 10}),
        Case("scale", "new flow denied, spread", "netpol-ebpf", "ns", LESS, (250.0,), {"rules": 1000}),
        Case("scale", "established, hot", "netpol-ebpf", "ns", LESS, (16.0,), {"pods": 10, "rules": 10}),
        Case(
            "scale", "established, hot", "netpol-ebpf", "ns", LESS, (18.0,), {"pods": 10, "rules": 10_000},
            "scale/established, hot/netpol-ebpf/pods=10,rules=10",
        ),
        Case("scale", "rows", "netpol-ebpf", "bytes", LESS, (1000.0,), {"rules": 10}, exact=True),
        Case("scale", "rows", "netpol-ebpf", "bytes", LESS, (100_000.0,), {"rules": 1000}, exact=True),
        Case(
            "control plane", "policy changed", "netpol-ebpf", "ms", LESS, tuple(map(float, range(1, 101))), {"pods": 10}
        ),
        Case("another", "thing", "x", "1/s", MORE, (1.0,)),
    ]  # fmt: skip
    add_micro(run, {"pods": 100, "rules": 10, "ns": {"parse only, v4": 7.0, "SYN denied, v4": 99.0}})
    return run


@pytest.fixture
def text(tmp_path: Path) -> str:
    return report.write(example(), tmp_path).read_text()


@pytest.mark.parametrize(
    "expected",
    [
        "with uncommitted changes",
        "| nftables, rules, 1000 rules | 5.05 k/s | 0.25 (0.25 to 0.25) |",
        "| rule | rows | 100 B |",
        "| 10 pods, 10000 rules | 18 ns, 1.12 |",
        "| policy changed | 50.5 ms / 100 ms |",
        "| SYN denied, v4 | 99 |",
        "| another/thing/x | 1 /s | 1 |",
        "51 µs",
    ],
)
def test_every_sort_of_figure_is_shown(text: str, expected: str) -> None:
    """Ratios, bytes for one more, percentiles, packets, and the cases that have no table of their own."""
    assert expected in text


def test_plots_are_text_without_a_date(tmp_path: Path) -> None:
    """Plots are SVG files that are equal for the same result.

    Without matplotlib there are none, and the text names none.
    """
    has_plots = importlib.util.find_spec("matplotlib") is not None
    first, second = tmp_path / "a", tmp_path / "b"
    text = report.write(example(), first).read_text()
    report.write(example(), second)
    plots = sorted(path.name for path in first.glob("*.svg"))
    assert plots == (["connect-close.svg", "scale-rules.svg"] if has_plots else [])
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in plots)
    assert all(f"({name})" in text for name in plots)
    assert (".svg" in text) is has_plots
