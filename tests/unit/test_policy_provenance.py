# SPDX-License-Identifier: Apache-2.0
"""Causes in the user's words, with the place where their rule is written."""

from __future__ import annotations

from netpol_ebpf.errors import Location
from netpol_ebpf.policy.provenance import trace
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, PolicyKey, World
from netpol_ebpf.resources.load import parse_documents

POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {}
  ingress:
  - ports: [{port: 80}]
  - ports: [{port: 443}]
"""
KEY = PolicyKey("KubernetesNetworkPolicy", "shop", "web")


def world() -> World:
    return derive(parse_documents(POLICY, "web.yaml").check())


def rule(index: int) -> Cause:
    return Cause(CauseKind.RULE, Direction.INGRESS, "default", KEY, index=index, action=Action.ALLOW)


def test_rule_is_found_where_it_is_written() -> None:
    """A rule's place is the line of its item."""
    found = trace(world(), rule(1))
    assert found.location == Location("web.yaml", 8, 5)
    assert str(found) == ("allowed by ingress rule 1 of KubernetesNetworkPolicy/shop/web in tier default (web.yaml:8)")
    assert found.as_dict() | {"sentence": ""} == {
        "kind": "rule", "action": "allow", "direction": "ingress", "tier": "default",
        "policy": "KubernetesNetworkPolicy/shop/web", "profile": None, "rule": 1, "file": "web.yaml", "line": 8,
        "sentence": "",
        "names": [],
    }  # fmt: skip


def test_end_of_tier_is_found_at_its_policy() -> None:
    """The end of a tier names the policy because of which it counts, and where that is written."""
    found = trace(world(), Cause(CauseKind.TIER_END, Direction.INGRESS, "default", KEY))
    assert found.location is not None
    assert found.location.line == 1
    assert "denied at the end of tier default" in str(found)
    assert found.as_dict()["rule"] is None


def test_profile_of_a_namespace_says_that_nobody_selects() -> None:
    """The namespace's default has no place; a missing profile says so."""
    default = Cause(CauseKind.PROFILE, Direction.EGRESS, profile="kns.shop", index=0, action=Action.ALLOW)
    assert "the default of namespace shop (no policy selects the endpoint)" in str(trace(world(), default))
    assert trace(world(), default).location is None
    missing = Cause(CauseKind.PROFILE, Direction.EGRESS, profile="kns.gone")
    assert str(trace(world(), missing)) == "denied: the profile kns.gone does not exist"


def test_what_is_gone_has_no_place() -> None:
    """A policy that the world no longer has is named, without a place."""
    found = trace(World(), rule(0))
    assert found.location is None
    assert "KubernetesNetworkPolicy/shop/web" in str(found)


def test_every_kind_has_a_sentence() -> None:
    """No cause is left without words."""
    for kind in CauseKind:
        for action in Action:
            assert str(trace(World(), Cause(kind, Direction.INGRESS, "t", KEY, action=action)))
