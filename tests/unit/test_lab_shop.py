# SPDX-License-Identifier: Apache-2.0
"""The demonstration's cluster: that it is found, is whole, and that its live change does what the demonstration says."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol_ebpf.cli import demo
from netpol_ebpf.cli.main import main
from netpol_ebpf.errors import InvalidInputError, PlatformError
from netpol_ebpf.lab import shop
from netpol_ebpf.lab.matrix import Matrix
from netpol_ebpf.lab.prediction import Prediction
from netpol_ebpf.policy.types import Direction, EndpointKey
from netpol_ebpf.resources.load import load_paths, parse_documents


def test_live_change_allows_one_connection_and_no_other() -> None:
    """Of all attempts the incident's policy changes those of one cell, in both families."""
    resources = load_paths([shop.manifests_dir()]).check()
    plan = shop.shop_plan(resources)
    before = Prediction(resources, plan)
    after = Prediction([*resources, *parse_documents(shop.INCIDENT_POLICY, "incident.yaml").check()], plan)
    attempts = Matrix(plan, shop.SOURCES, shop.SERVICES).attempts()
    changed = [attempt for attempt in attempts if before.reached(attempt) != after.reached(attempt)]
    assert shop.INCIDENT in changed
    assert {(attempt.source, plan.owner(attempt.destination), attempt.port) for attempt in changed} == {
        ("shop/debug", "shop/database", 5432)
    }
    assert len(changed) == 2


def test_policies_at_an_endpoint_come_in_evaluation_order() -> None:
    """Those of one tier and order by name; a policy of the other direction is not among them."""
    resources = load_paths([shop.manifests_dir()]).check()
    found = Prediction(resources, shop.shop_plan(resources)).policies_at(
        EndpointKey("Pod", "shop", "database"), Direction.EGRESS
    )
    assert [policy.key.name for policy in found] == ["allow-dns", "default-deny"]


def test_iperf_port_is_declared_but_not_listened_on() -> None:
    """An echo server there would take the measurement's place."""
    plan = shop.shop_plan(load_paths([shop.manifests_dir()]).check())
    assert shop.BULK_PORT not in {listen.port for listen in plan.hosts["shop/database"].listens}


def test_missing_pods_are_named() -> None:
    """Other manifests than the demonstration's are refused with the names of what it needs."""
    node = "{apiVersion: v1, kind: Node, metadata: {name: node-1}}"
    with pytest.raises(InvalidInputError, match="the manifests lack kube-system/coredns, monitoring/grafana"):
        shop.shop_plan(parse_documents(node, "m.yaml").check())


def test_manifests_that_are_nowhere_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both places are named, and the option that helps."""
    monkeypatch.setattr(shop, "__file__", str(tmp_path / "a" / "b" / "c" / "shop.py"))
    with pytest.raises(PlatformError, match="are neither in") as caught:
        shop.manifests_dir()
    assert "--manifests" in caught.value.hint


def test_a_missing_directory_is_invalid_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit code 3 and its name."""
    assert main(["demo", "--manifests", str(tmp_path / "absent")]) == 3
    assert "absent: there is no such directory" in capsys.readouterr().err


def test_a_missing_tool_is_named_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 5, and nothing was shown."""
    monkeypatch.setattr(demo.os, "geteuid", lambda: 0)
    monkeypatch.setattr("netpol_loader.pins.doctor.require_all", lambda _: None)
    monkeypatch.setattr(demo.shutil, "which", lambda _: None)
    assert main(["demo"]) == 5
    captured = capsys.readouterr()
    assert "bpftool is not installed" in captured.err
    assert captured.out == ""
