# SPDX-License-Identifier: Apache-2.0
"""The README shows what the commands print."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path

import pytest

from netpol_ebpf.cli.flows import render_flow
from netpol_ebpf.cli.main import build_parser, main
from netpol_ebpf.lab import shop
from netpol_ebpf.lab.attempt import AttemptResult, Reachability
from netpol_ebpf.lab.matrix import Matrix, Observation
from netpol_ebpf.lab.prediction import Prediction
from netpol_ebpf.model.reference import ReferenceModel
from netpol_ebpf.policy.provenance import trace
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import TCP, Direction, EndpointKey, Packet, Question, Stage
from netpol_ebpf.resources.load import load_paths

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_matrix_is_the_one_the_model_predicts() -> None:
    """Every line of the predicted table stands in the README."""
    resources = load_paths([ROOT / "examples" / "demo"]).check()
    plan = shop.shop_plan(resources)
    matrix = Matrix(plan, shop.SOURCES, shop.SERVICES, shop.NAMES)
    prediction = Prediction(resources, plan)
    outcomes = {
        attempt: AttemptResult(
            attempt, Reachability.REACHED if prediction.reached(attempt) else Reachability.SILENT, 0.0
        )
        for attempt in matrix.attempts()
    }
    seen = Observation(matrix, outcomes)
    shown = {line.strip() for line in README.splitlines()}
    assert [line for line in seen.render(colour=False).splitlines() if line.strip() not in shown] == []
    assert f"{len(outcomes)} connections tried (TCP, UDP, ICMP; IPv4, IPv6): {seen.reached} answered" in README


def test_explanation_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the tour prints the block that follows it."""
    monkeypatch.chdir(ROOT)
    command = re.search(r"^netpolctl (explain --manifests examples/demo .*)$", README, re.MULTILINE)
    assert command is not None
    assert main(command[1].split()) == 1
    answer = capsys.readouterr().out.strip()
    assert answer.count("DENIED") == 2, "an answer for each family"
    assert answer in README


def test_every_command_of_the_tour_exists() -> None:
    """The commands in the README are accepted."""
    help_text = build_parser().format_help()
    named = set(re.findall(r"netpolctl ([a-z-]+)", README))
    assert named >= {"test", "explain", "status", "flows", "get", "cleanup", "doctor", "demo"}
    assert [name for name in sorted(named) if not re.search(rf"^    {name} ", help_text, re.MULTILINE)] == []


def test_every_link_leads_somewhere() -> None:
    """Relative links name files of the checkout."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_line_of_flows_is_what_the_command_prints() -> None:
    """The page of the agent shows a denied flow of the demonstration, as `netpolctl flows` renders it."""
    page = (ROOT / "docs" / "agent.md").read_text()
    line = re.search(r"^    (deny  egress .*)$", page, re.MULTILINE)
    assert line is not None
    world = derive(load_paths([ROOT / "examples" / "demo"]).check())
    packet = Packet(ip_address("10.244.1.13"), ip_address("10.244.1.12"), TCP, 37974, 5432)
    asked = Question(EndpointKey("Pod", "shop", "debug"), Direction.EGRESS, Stage.NORMAL, packet)
    decided = trace(world, ReferenceModel(world).decide(asked).cause).as_dict()
    decided["file"] = f"/etc/netpol-ebpf/manifests/{Path(decided['file']).name}"
    flow = {
        "kind": "deny",
        "direction": "egress",
        "protocol": TCP,
        "source": "10.244.1.13",
        "source_port": 37974,
        "source_name": "Pod/shop/debug",
        "destination": "10.244.1.12",
        "destination_port": 5432,
        "destination_name": "Pod/shop/database",
        "decided_by": decided,
    }
    assert render_flow(flow) == line[1]
