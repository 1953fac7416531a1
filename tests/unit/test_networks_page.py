# SPDX-License-Identifier: Apache-2.0
"""The page of networks: what of it can be tested without making any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.errors import InvalidInputError
from tests.netns import networks
from tests.netns.networks import NOT_RUN, Ran, keep, read_record, render


def row(network: str, **changes: Any) -> dict[str, Any]:
    return {
        "network": network, "ipam": "host-local", "plugin": "", "result": True, "evidence": "cni", "ingress_denied": True,
        "egress_denied": True, "allowed": True, "verdict": "enforced", "why": "", **changes,
    }  # fmt: skip


def lacking(network: str) -> dict[str, Any]:
    why = f"this kernel has no {network} devices"
    return {"network": network, "ipam": "static", "plugin": network, "result": True, "verdict": NOT_RUN, "why": why}


def ran(*rows: dict[str, Any], guest: bool = False, release: str = "6.18.1-x", date: str = "2026-11-30") -> Ran:
    return Ran(release, guest, date, "c0ffee", rows)


def lines(text: str, network: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {network} |")]


def test_rows_are_joined_where_kernels_agree_and_apart_where_not() -> None:
    """One line for what several kernels saw alike; what only one of them saw has a line of its own."""
    guest = ran(row("bridge"), row("ptp", egress_denied=False), guest=True, release="6.12.1")
    text = render([ran(row("bridge"), row("bridge"), row("ptp")), guest])
    assert lines(text, "bridge") == [
        "| bridge | host-local | yes | cni | yes | yes | yes | enforced | 6.18, 6.12 (VM) |"
    ]
    assert lines(text, "ptp") == [
        "| ptp | host-local | yes | cni | yes | yes | yes | enforced | 6.18 |",
        "| ptp | host-local | yes | cni | yes | no | yes | enforced | 6.12 (VM) |",
    ]


def test_what_no_kernel_ran_is_in_the_table() -> None:
    """A network that one kernel lacks is told with that kernel, one that all lack in the table, as is a plugin that nobody has."""
    one, other = ran(lacking("ipvlan"), lacking("vlan")), ran(row("vlan", plugin="vlan"), lacking("ipvlan"), guest=True)
    text = render([one, other])
    assert "not run: this kernel has no ipvlan devices" in lines(text, "ipvlan")[0]
    assert "enforced" in lines(text, "vlan")[0]
    assert (
        "6.18: `6.18.1-x`, commit c0ffee, 2026-11-30; this kernel has no ipvlan devices; this kernel has no vlan devices"
        in text
    )
    assert "not run" in lines(text, "sriov")[0]


def test_a_kernel_s_rows_replace_its_own_alone(tmp_path: Path) -> None:
    """What other kernels saw is kept; a file of another format is refused."""
    path = tmp_path / "results" / "networks.json"
    assert read_record(path) == []
    for one in (ran(row("bridge"), guest=True), ran(row("bridge")), ran(row("ptp"), date="2026-12-01")):
        keep(one, path)
    found = {one.label: one for one in read_record(path)}
    assert {label: (one.rows[0]["network"], one.date) for label, one in found.items()} == {
        "6.18": ("ptp", "2026-12-01"), "6.18 (VM)": ("bridge", "2026-11-30"),
    }  # fmt: skip
    path.write_text('{"format": 0}')
    with pytest.raises(InvalidInputError, match="no record of format 1"):
        read_record(path)


def test_page_is_the_recorded_one() -> None:
    """Nobody edits it by hand."""
    assert networks.main(["--check"]) == 0
