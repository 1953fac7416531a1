# SPDX-License-Identifier: Apache-2.0
"""The label with a policy's tier: the API server sets it if it can, and otherwise never accepts a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_objects import CHART, documents
from server import Server, collection

LABEL = "projectcalico.org/tier"
KINDS = ("NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy")


def policy(kind: str, tier: str | None = None, labels: dict[str, str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": "labelled"} | ({} if "Global" in kind else {"namespace": "default"})
    if labels is not None:
        metadata["labels"] = labels
    spec = {} if tier is None else {"spec": {"tier": tier}}
    return {"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata} | spec


def in_force(server: Server, name: str, label: str | None) -> Iterator[Server]:
    """Put an admission policy in force.

    ``label``: of a policy with a wrong tier label; None: the policy is rejected.
    """

    def seen() -> str | None:
        body = server.create(policy("NetworkPolicy", "a", {LABEL: "false"}), dryRun="All").body
        return body["metadata"].get("labels", {}).get(LABEL)

    objects = documents(CHART / "admission" / f"{name}.yaml")
    for obj in objects:
        answer = server.apply(obj, fieldValidation="Strict")
        assert answer.status in (200, 201), answer.message
    server.wait_for(lambda: seen() == label, f"{name} acts")
    yield server
    for obj in reversed(objects):
        server.request("DELETE", f"{collection(obj)}/{obj['metadata']['name']}")
    server.wait_for(lambda: seen() == "false", f"{name} is gone")


@pytest.fixture
def labelling(server: Server) -> Iterator[Server]:
    """A server that sets the label."""
    served = server.get("/apis/admissionregistration.k8s.io/v1").body["resources"]
    if all(one["name"] != "mutatingadmissionpolicies" for one in served):
        pytest.skip("this API server has no MutatingAdmissionPolicy")
    yield from in_force(server, "tier-label", "a")


@pytest.fixture
def checking(server: Server) -> Iterator[Server]:
    """A server that rejects a wrong label."""
    yield from in_force(server, "tier-label-check", None)


def test_the_label_is_set_corrected_and_kept(labelling: Server) -> None:
    """The label is set on every tiered kind.

    Other labels stay. A field of a wrong type gets the schema's own message.
    """
    for kind in KINDS:
        for given, tier in ((None, "a"), ({LABEL: "b", "other": "c"}, "a"), ({}, None)):
            answer = labelling.create(policy(kind, tier, given), dryRun="All")
            assert answer.status == 201, answer.message
            labels = answer.body["metadata"]["labels"]
            assert labels == {**(given or {}), LABEL: tier or "default"}
    wrong = policy("NetworkPolicy", "a")
    wrong["spec"]["selector"] = True
    assert labelling.create(wrong, dryRun="All").status == 422


def test_applying_again_writes_nothing(labelling: Server) -> None:
    """The label has no owner, so server-side apply finds neither a conflict nor a change."""
    obj = policy("GlobalNetworkPolicy", "a")
    first = labelling.apply(obj)
    again = labelling.apply(obj)
    path = f"{collection(obj)}/labelled"
    moved = labelling.request("PATCH", path, {"spec": {"tier": "b"}}, content_type="application/merge-patch+json")
    labelling.request("DELETE", path)
    assert first.body["metadata"]["resourceVersion"] == again.body["metadata"]["resourceVersion"]
    assert moved.body["metadata"]["labels"] == {LABEL: "b"}


def test_a_false_label_is_refused(checking: Server) -> None:
    """A correct label is accepted, and so is a policy without the label."""
    for kind in KINDS:
        assert checking.create(policy(kind, "a", {LABEL: "b"}), dryRun="All").status == 422
        for labels in (None, {}, {"other": "b"}, {LABEL: "a"}):
            answer = checking.create(policy(kind, "a", labels), dryRun="All")
            assert answer.status == 201, answer.message
        assert checking.create(policy(kind, None, {LABEL: "default"}), dryRun="All").status == 201


@pytest.mark.usefixtures("takes_an_empty_tier")
def test_an_empty_tier_gets_the_label_of_the_default_one(labelling: Server) -> None:
    """The label is that of the tier default, whichever definition is installed."""
    answer = labelling.create(policy("StagedNetworkPolicy", ""), dryRun="All")
    assert answer.body["metadata"]["labels"] == {LABEL: "default"}


@pytest.mark.usefixtures("takes_an_empty_tier")
def test_the_label_of_an_empty_tier_is_the_default_one(checking: Server) -> None:
    """Any other label is rejected."""
    for label, status in (("default", 201), ("a", 422)):
        assert checking.create(policy("StagedNetworkPolicy", "", {LABEL: label}), dryRun="All").status == status
