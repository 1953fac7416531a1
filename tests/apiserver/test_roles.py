# SPDX-License-Identifier: Apache-2.0
"""The example roles give each part of an organisation exactly the rights that deploy/roles/README.md states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_objects import CHART, DEPLOY, documents
from server import Server, collection

CALICO = "projectcalico.org/v3"
GROUPS = {
    "security": ["security"],
    "application": ["shop-developers"],
    "tenant": ["tenant-blue"],
    "auditor": ["auditors"],
}


def obj(kind: str, namespace: str = "", *, api: str = CALICO, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "x"} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


HOST = {"node": "n", "interfaceName": "*"}
KUBERNETES = {"podSelector": {}}
ROWS = (
    # (the object, the groups that may create it)
    (obj("NetworkPolicy", "shop", tier="security"), {"security"}),
    (obj("GlobalNetworkPolicy", tier="security"), {"security"}),
    (obj("StagedGlobalNetworkPolicy", tier="security"), {"security"}),
    (obj("GlobalNetworkPolicy", tier="application"), set()),
    (obj("GlobalNetworkPolicy", tier="default"), set()),
    (obj("GlobalNetworkSet"), {"security"}),
    (obj("HostEndpoint", **HOST), {"security"}),
    (obj("Profile"), {"security"}),
    (obj("Tier", order=5), set()),
    (obj("NetworkPolicy", "shop", tier="application"), {"application"}),
    (obj("StagedNetworkPolicy", "shop", tier="application"), {"application"}),
    (obj("NetworkPolicy", "blue", tier="application"), set()),
    (obj("NetworkPolicy", "shop", tier="default"), set()),
    (obj("NetworkPolicy", "blue", tier="default"), {"tenant"}),
    (obj("StagedNetworkPolicy", "blue", tier="default"), {"tenant"}),
    (obj("NetworkPolicy", "blue", tier="security"), {"security"}),
    (obj("NetworkSet", "blue"), {"tenant"}),
    (obj("NetworkSet", "shop"), set()),
    (obj("StagedKubernetesNetworkPolicy", "blue"), {"tenant"}),
    (obj("NetworkPolicy", "blue", api="networking.k8s.io/v1", **KUBERNETES), {"tenant"}),
    (obj("NetworkPolicy", "shop", api="networking.k8s.io/v1", **KUBERNETES), set()),
    (obj("FelixConfiguration") | {"metadata": {"name": "default"}}, set()),
)


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[Server]:
    """A server with the namespaces, the roles and the admission policies."""
    for name in ("shop", "blue"):
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    admission = documents(CHART / "admission" / "tier-rights.yaml")
    for one in (*admission, *(one for path in sorted((DEPLOY / "roles").glob("*.yaml")) for one in documents(path))):
        answer = server.apply(one, fieldValidation="Strict")
        assert answer.status in (200, 201), (one, answer.message)
    foreign = obj("NetworkPolicy", "shop", tier="default")
    server.wait_for(lambda: may(server, ROWS[0][0], "security"), "the roles act")
    server.wait_for(lambda: may(server, ROWS[9][0], "application"), "the roles act")
    server.wait_for(lambda: not may(server, foreign, "application"), "the admission policies act")
    yield server
    for one in reversed(admission):
        server.request("DELETE", f"{collection(one)}/{one['metadata']['name']}")
    server.wait_for(lambda: may(server, foreign, "application"), "the admission policies are gone")


def may(server: Server, wanted: dict[str, Any], who: str) -> bool:
    """Whether a member of a group may create an object."""
    answer = server.create(wanted, user=f"{who}-member", groups=GROUPS[who], dryRun="All")
    assert answer.status in (201, 403), answer.message
    return answer.status == 201


@pytest.mark.parametrize(
    ("wanted", "allowed"),
    ROWS,
    ids=lambda one: (
        "-".join((one["kind"], one["metadata"].get("namespace", ""), one["spec"].get("tier", "")))
        if isinstance(one, dict)
        else ""
    ),
)
def test_who_may_create(guarded: Server, wanted: dict[str, Any], allowed: set[str]) -> None:
    """Exactly the stated groups may create the object."""
    assert {who for who in GROUPS if may(guarded, wanted, who)} == allowed


@pytest.mark.parametrize("resource", ["tiers", "globalnetworkpolicies", "stagednetworkpolicies", "globalnetworksets"])
def test_an_auditor_reads(guarded: Server, resource: str) -> None:
    """An auditor may read every kind in every namespace."""
    answer = guarded.get(f"/apis/{CALICO}/{resource}", user="auditor-member", groups=GROUPS["auditor"])
    assert answer.status == 200, answer.message
