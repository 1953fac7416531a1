# SPDX-License-Identifier: Apache-2.0
"""Reports of nodes: small, read back as they were written, and never in force where the proof is missing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from netpol_ebpf.errors import InvalidInputError, UsageError
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.resources import schema_status as schema
from netpol_ebpf.resources.schema import definition
from netpol_ebpf.status.kinds import POLICY_KINDS, kind_at, parse_policy
from netpol_ebpf.status.report import NodeStatus, Shortfall, fingerprint, parse_report, parse_reports, render_report
from netpol_ebpf.status.standing import IN_FORCE, NO_REPORT, PENDING, STALE, evaluate

NOW_S = 1_800_000_000.0
DB = "KubernetesNetworkPolicy/shop/db"
FULL = Shortfall("MapFull", "np_verdict has no room", (DB,))


def report(in_force: dict[str, str], *shortfalls: Shortfall, node: str = "n1", renewed_s: float = NOW_S):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return parse_report(render_report(node, NodeStatus(in_force, shortfalls), renewed_s, 60.0))


def test_report_is_read_as_it_was_written() -> None:
    """Fingerprints, shortfalls, time and period."""
    read = report({DB: "u1/3", "Tier/x": "u2/1"}, FULL)
    assert (read.node, read.renewed_s, read.period_s) == ("n1", NOW_S, 60.0)
    assert read.fingerprints == {fingerprint("u1/3"), fingerprint("u2/1")}
    assert read.shortfalls == (FULL,)
    assert (read.has("u1/3"), read.has("u1/2"), read.has("u3/3")) == (True, False, False)


def test_report_stays_small() -> None:
    """130 policies are some kB, 10 000 less than 100 kB; what is left out is counted."""
    few, many = (
        render_report("n1", NodeStatus({f"P/{at}": f"{at:036}/1" for at in range(count)}), NOW_S, 60.0)
        for count in (130, 10_000)
    )
    assert len(json.dumps(few)) < 2_000
    assert len(json.dumps(many)) < 100_000
    short = [Shortfall("NotEnforced", "x" * 5000, tuple(f"P/{at}" for at in range(300))) for _ in range(50)]
    spec = render_report("n1", NodeStatus({}, tuple(short)), NOW_S, 60.0)["spec"]
    assert (len(spec["shortfalls"]), spec["moreShortfalls"], spec["missing"]) == (schema.MAX_SHORTFALLS, 18, 300)
    assert (len(spec["shortfalls"][0]["policies"]), spec["shortfalls"][0]["more"]) == (schema.MAX_NAMED, 200)
    assert len(spec["shortfalls"][0]["message"]) == schema.MAX_MESSAGE


def test_report_has_the_fields_of_its_definition() -> None:
    """No more, and all that are required."""
    (resource,) = schema.RESOURCES
    version = definition(resource)["spec"]["versions"][0]
    assert "subresources" not in version
    declared = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec = render_report("n1", NodeStatus({DB: "u/1"}, (FULL,)), NOW_S, 60.0)["spec"]
    assert set(spec) == set(declared["properties"]) >= set(declared["required"])
    shortfall = declared["properties"]["shortfalls"]["items"]
    assert set(spec["shortfalls"][0]) == set(shortfall["properties"])


@pytest.mark.parametrize(
    "change",
    [
        {"programmed": "not base64!"},
        {"renewTime": "yesterday"},
        {"periodSeconds": None},
        {"shortfalls": [{}]},
    ],
)
def test_other_objects_are_no_reports(change: dict[str, object]) -> None:
    """They are named, and the other reports count."""
    good = render_report("n1", NodeStatus({}), NOW_S, 60.0)
    bad = {**good, "metadata": {"name": "n2"}, "spec": {**good["spec"], **change}}
    with pytest.raises(InvalidInputError, match="NodeReport/n2"):
        parse_report(bad)
    assert set(parse_reports([bad, good])) == {"n1"}


# --- one policy -------------------------------------------------------------------------------------------------------


def test_standing_needs_the_proof_of_each_node() -> None:
    """In force, behind, refused, silent, stale: each node has its reason, and the policy is programmed only with all."""
    reports = {
        "a": report({DB: "u/3"}),
        "b": report({DB: "u/2"}),
        "c": report({}, FULL),
        "e": report({DB: "u/3"}, renewed_s=NOW_S - 181),
    }
    found = evaluate(DB, "u/3", "abcde", reports, NOW_S)
    assert [(one.node, one.reason, one.generation) for one in found.nodes] == [
        ("a", IN_FORCE, 3), ("b", PENDING, 2), ("c", "MapFull", 0), ("d", NO_REPORT, 0), ("e", STALE, 3),
    ]  # fmt: skip
    assert (found.is_programmed, found.in_force, found.reason) == (False, 1, "MapFull")
    assert "on 1 of 5 nodes" in found.message
    assert "np_verdict" in found.message
    assert evaluate(DB, "u/3", "a", reports, NOW_S).is_programmed
    assert not evaluate(DB, "v/3", "a", reports, NOW_S).is_programmed, "another object of that name"
    assert evaluate(DB, "u/3", "", reports, NOW_S).is_programmed, "it selects nothing"
    assert not evaluate(DB, "u/3", "a", reports, NOW_S, "no such selector").is_programmed


def test_report_in_time_is_not_stale() -> None:
    """Three periods."""
    read = report({DB: "u/1"})
    assert (read.is_stale(NOW_S + 180), read.is_stale(NOW_S + 181)) == (False, True)
    assert replace(read, period_s=100.0).is_stale(NOW_S + 181) is False


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "path"),
    [
        ("shop/db", ("KubernetesNetworkPolicy", "shop", "db"), "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies/db"),
        ("NetworkPolicy/shop/db", ("NetworkPolicy", "shop", "db"), "/apis/projectcalico.org/v3/namespaces/shop/networkpolicies/db"),
        ("GlobalNetworkPolicy/db", ("GlobalNetworkPolicy", "", "db"), "/apis/projectcalico.org/v3/globalnetworkpolicies/db"),
        ("ClusterNetworkPolicy/db", ("ClusterNetworkPolicy", "", "db"), "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies/db"),
    ],
)  # fmt: skip
def test_policy_is_named_as_the_agent_names_it(text: str, key: tuple[str, ...], path: str) -> None:
    """And has one path at a server, from which its kind follows."""
    found = parse_policy(text)
    assert found == PolicyKey(*key)
    kind = POLICY_KINDS[found.kind]
    assert kind.path(found.namespace, found.name) == path
    assert kind_at(path) == kind


@pytest.mark.parametrize("text", ["db", "a/b/c", "GlobalNetworkPolicy/a/b", "NetworkPolicy/db", "/db", "shop/", ""])
def test_other_names_are_refused(text: str) -> None:
    """With the forms that are known."""
    with pytest.raises(UsageError, match="expected NAMESPACE/NAME"):
        parse_policy(text)
