# SPDX-License-Identifier: Apache-2.0
"""`netpolctl can-i` queries exactly the rights that the admission policy checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver_traces import failure
from fake_apiserver import FakeServer, Request, Wire, write_kubeconfig
from writable_api import ok

from netpol_ebpf.cli.can_i import ADMISSION, NO_READS, POLICY, REVIEWS, TIERED, WRITES
from netpol_ebpf.cli.main import main

FILE = Path(__file__).resolve().parents[2] / "deploy" / "chart" / "admission" / "tier-rights.yaml"


class Rights:
    """A server that grants the rights in a set: (verb, resource, namespace, name)."""

    def __init__(self) -> None:
        self.granted: set[tuple[str, str, str, str]] = set()
        self.asked: list[tuple[str, str, str, str]] = []
        self.admission = 200
        self.answer = 201

    def __call__(self, request: Request) -> Wire:
        if request.method == "GET":
            assert request.target.startswith(ADMISSION)
            assert request.target.endswith(POLICY)
            return Wire(ok({}) if self.admission == 200 else failure(self.admission))
        assert request.target == REVIEWS
        attributes = json.loads(request.body)["spec"]["resourceAttributes"]
        assert attributes["group"] == "projectcalico.org"
        right = (
            attributes["verb"],
            attributes["resource"],
            attributes.get("namespace", ""),
            attributes.get("name", ""),
        )
        self.asked.append(right)
        if self.answer != 201:
            return Wire(failure(self.answer))
        return Wire(ok({"status": {"allowed": right in self.granted, "reason": "RBAC: a role"}}, 201))


@pytest.fixture
def rights() -> Rights:
    return Rights()


@pytest.fixture
def kubeconfig(rights: Rights, tmp_path: Path) -> Iterator[str]:
    with FakeServer(rights) as server:
        yield str(write_kubeconfig(tmp_path / "config", server.url))


def ask(kubeconfig: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["can-i", *arguments, "--kubeconfig", kubeconfig, "-o", "json"])
    return code, json.loads(capsys.readouterr().out or "{}")


ALL = {
    ("create", "networkpolicies", "shop", "db"),
    ("get", "tiers", "", "security"),
    ("create", "tier.networkpolicies", "shop", "security.*"),
    ("create", "tier.networkpolicies", "shop", "db"),
}
CREATE = ("create", "networkpolicies", "db", "--tier", "security", "-n", "shop")


def test_all_rights_are_asked_for(rights: Rights, kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The plain right, the right to the tier, and the two alternatives for the virtual resource."""
    rights.granted = set(ALL)
    code, answer = ask(kubeconfig, capsys, *CREATE)
    assert (code, answer["allowed"]) == (0, True)
    assert set(rights.asked) == ALL
    assert NO_READS in answer["notes"]


@pytest.mark.parametrize("missing", sorted(ALL))
def test_each_missing_right_is_named(
    rights: Rights, kubeconfig: str, capsys: pytest.CaptureFixture[str], missing: tuple[str, str, str, str]
) -> None:
    """One of the two rights to the virtual resource suffices."""
    rights.granted = ALL - {missing}
    code, answer = ask(kubeconfig, capsys, *CREATE)
    assert answer["allowed"] == missing[1].startswith("tier.")
    assert code == (0 if answer["allowed"] else 1)
    (lacks,) = (one["right"] for one in answer["checks"] if not one["allowed"])
    assert missing[0] in lacks
    assert missing[1] in lacks
    assert missing[3] in lacks


def test_without_the_admission_policy_plain_rights_decide(
    rights: Rights, kubeconfig: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer says so. If the policy may not be read, it is assumed to exist."""
    rights.granted = {("create", "networkpolicies", "shop", "db")}
    rights.admission = 404
    code, answer = ask(kubeconfig, capsys, *CREATE)
    assert (code, answer["allowed"]) == (0, True)
    assert any("NOT in force" in one for one in answer["notes"])
    rights.admission = 403
    code, answer = ask(kubeconfig, capsys, *CREATE)
    assert (code, answer["allowed"]) == (1, False)
    assert any("may not read" in one for one in answer["notes"])


def test_reads_are_plain_rights(rights: Rights, kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No right to a tier is queried."""
    rights.granted = {("list", "globalnetworkpolicies", "", "")}
    code, answer = ask(kubeconfig, capsys, "list", "GlobalNetworkPolicy", "--tier", "security")
    assert (code, answer["notes"]) == (0, [NO_READS])
    assert rights.asked == [("list", "globalnetworkpolicies", "", "")]


def test_patch_needs_update_in_the_tier(rights: Rights, kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The admission policy requires the same."""
    ask(kubeconfig, capsys, "patch", "stagednetworkpolicies", "-n", "shop")
    assert {one[:2] for one in rights.asked} == {
        ("patch", "stagednetworkpolicies"),
        ("get", "tiers"),
        ("update", "tier.stagednetworkpolicies"),
    }


def test_text_says_yes_or_no_first(rights: Rights, kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The other lines show each right."""
    rights.granted = set()
    assert main(["can-i", *CREATE, "--kubeconfig", kubeconfig]) == 1
    text = capsys.readouterr().out
    assert text.startswith("no\n")
    assert "create tier.networkpolicies security.* in namespace shop" in text


def test_server_that_gives_no_answer_is_exit_code_4(rights: Rights, kubeconfig: str) -> None:
    """Without an answer, the result is neither yes nor no."""
    rights.answer = 401
    assert main(["can-i", *CREATE, "--kubeconfig", kubeconfig]) == 4


@pytest.mark.parametrize(
    "arguments", [("create", "pods"), ("create", "networkpolicies.networking.k8s.io"), ("eat", "networkpolicies")]
)
def test_other_kinds_and_verbs_are_usage(arguments: tuple[str, ...]) -> None:
    """Such questions are for kubectl."""
    with pytest.raises(SystemExit) as found:
        main(["can-i", *arguments])
    assert found.value.code == 2
    assert main(["can-i", "create", "globalnetworkpolicies", "-n", "shop"]) == 2


def test_checks_are_those_of_the_admission_policy() -> None:
    """Kinds, verbs, the virtual resource and both names are the same."""
    policy = next(yaml.safe_load_all(FILE.read_text()))
    assert policy["metadata"]["name"] == POLICY
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert set(rule["resources"]) == set(TIERED)
    variables = {one["name"]: one["expression"] for one in policy["spec"]["variables"]}
    assert set(yaml.safe_load(variables["verb"].partition("[")[0]).values()) == set(WRITES.values())
    assert variables["resource"] == "'tier.' + request.resource.resource"
    named = policy["spec"]["validations"][1]["expression"]
    assert "variables.joins + '.*'" in named
    assert "variables.policies.name(variables.name)" in named
