# SPDX-License-Identifier: Apache-2.0
"""Warnings about domain names: each is given when it should be, and not when it should not."""

from __future__ import annotations

import pytest

from netpol_ebpf.errors import Problem
from netpol_ebpf.policy import lint_names
from netpol_ebpf.policy.lint import lint
from netpol_ebpf.resources.load import parse_documents

CLUSTER = """
apiVersion: v1
kind: Namespace
metadata: {name: 'n'}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: 'n', labels: {app: a}}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: 'n', labels: {app: b}}
status: {podIP: 10.0.0.2}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: h, labels: {role: host}}
spec: {node: n1, interfaceName: eth0, expectedIPs: [172.16.0.1]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: cdn, labels: {for: cdn}}
spec: {allowedEgressDomains: ["*.cdn.net"], nets: [192.0.2.0/24]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: local, labels: {for: local}}
spec: {allowedEgressDomains: [db.shop.svc.cluster.local]}
---
"""
DNS = "{action: Allow, protocol: UDP, destination: {ports: [53]}}"


def _global(spec: str, name: str = "g", kind: str = "GlobalNetworkPolicy") -> str:
    return f"{{apiVersion: projectcalico.org/v3, kind: {kind}, metadata: {{name: {name}}}, spec: {spec}}}\n---\n"


def _egress(*rules: str, selector: str = "app == 'a'", more: str = "", **names: str) -> str:
    return _global(f"{{selector: {selector!r}, types: [Egress], egress: [{', '.join(rules)}]{more}}}", **names)


def _to(*patterns: str) -> str:
    return f"{{action: Allow, destination: {{domains: [{', '.join(map(repr, patterns))}]}}}}"


def _lint(policies: str) -> list[Problem]:
    return lint(parse_documents(CLUSTER + policies, "f.yaml").check())


def _slugs(policies: str) -> list[tuple[str, str]]:
    return [(problem.slug, problem.path) for problem in _lint(policies)]


@pytest.mark.parametrize(
    ("pattern", "slugs"),
    [
        ("api.example.com", []),
        ("*.example.com", []),
        ("example.local", []),
        ("api", ["single-label-name"]),
        ("db.shop.svc.cluster.local", ["cluster-name"]),
        ("*.cluster.local", ["cluster-name"]),
        ("db.shop.svc", ["cluster-name"]),
        ("a.localhost", ["unanswerable-name"]),
        ("x.invalid", ["unanswerable-name"]),
        ("x.onion", ["unanswerable-name"]),
        ("x.*.com", ["inner-wildcard"]),
        ("x.*.svc", ["cluster-name", "inner-wildcard"]),
    ],
)
def test_patterns(pattern: str, slugs: list[str]) -> None:
    """A name that cannot match as its author means is named with the rule that has it."""
    assert _slugs(_egress(DNS, _to(pattern))) == [(slug, "spec.egress[1]") for slug in slugs]


def test_a_warning_names_the_pattern_and_the_line_of_the_rule() -> None:
    """One rule with several bad patterns has one warning for each."""
    first, second = _lint(_egress(DNS, _to("api", "x.*.com", "good.example.com")))
    assert '"api" has no dot' in first.message
    assert 'cannot match "x.*.com"' in second.message
    assert first.location.line == second.location.line > 1


def test_names_of_selected_sets_are_looked_at_too() -> None:
    """At the rule that selects the set."""
    rules = DNS, "{action: Allow, destination: {selector: for == 'local'}}"
    assert _slugs(_egress(*rules)) == [("cluster-name", "spec.egress[1]")]


@pytest.mark.parametrize(
    ("rule", "slugs"),
    [
        ("{action: Allow, destination: {selector: for == 'cdn'}}", []),
        ("{action: Deny, destination: {selector: for == 'cdn'}}", ["names-ignored"]),
        ("{action: Pass, destination: {selector: for == 'cdn'}}", ["names-ignored"]),
        ("{action: Allow, destination: {notSelector: for == 'cdn'}}", ["names-ignored"]),
        ("{action: Deny, destination: {selector: app == 'b'}}", []),
        ("{action: Deny, source: {selector: for == 'cdn'}}", []),
    ],
)
def test_rules_that_ignore_names_of_sets(rule: str, slugs: list[str]) -> None:
    """A Deny of a set with names, or a notSelector, does less than it seems to."""
    assert _slugs(_egress(DNS, rule)) == [(slug, "spec.egress[1]") for slug in slugs]


def test_a_deny_of_a_set_hides_no_allow_of_its_names() -> None:
    """The Allow rule behind it still matches by names, so it is not reported as never reached."""
    rules = (
        "{action: Deny, destination: {selector: has(for)}}",
        "{action: Allow, destination: {selector: for == 'cdn'}}",
    )
    assert "shadowed-rule" not in dict(_slugs(_egress(DNS, *rules)))
    without = CLUSTER.replace('allowedEgressDomains: ["*.cdn.net"], ', "").replace(
        "allowedEgressDomains: [db.shop.svc.cluster.local]", ""
    )
    problems = lint(parse_documents(without + _egress(DNS, *rules), "f.yaml").check())
    assert [problem.slug for problem in problems] == ["shadowed-rule"]


TIER = (
    "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: t}, spec: {order: 1, defaultAction: Pass}}\n---\n"
)


@pytest.mark.parametrize(
    ("policies", "is_mute"),
    [
        (_egress(_to("a.b")), True),
        (_egress(DNS, _to("a.b")), False),
        (_egress(_to("a.b"), "{action: Allow, protocol: TCP, destination: {ports: [53]}}"), False),
        (_egress(_to("a.b"), "{action: Allow, protocol: TCP, destination: {ports: [443]}}"), True),
        (_egress(_to("a.b"), "{action: Allow, protocol: UDP, destination: {domains: [dns.b], ports: [53]}}"), True),
        (_egress(_to("a.b"), "{action: Allow}"), False),
        (_egress(_to("a.b")) + _egress(DNS, selector="all()", name="dns"), False),
        (_egress(_to("a.b")) + _egress(DNS, selector="app == 'b'", name="dns"), True),
        (TIER + _egress(_to("a.b"), more=", tier: t"), False),
        (TIER + _egress(_to("a.b"), more=", tier: t") + _egress("{action: Deny}", name="deny"), True),
        (_egress(_to("a.b"), kind="StagedGlobalNetworkPolicy"), True),
        (_egress(DNS, _to("a.b"), kind="StagedGlobalNetworkPolicy"), False),
        (_egress(_to("a.b"), selector="role == 'host'"), False),
    ],
)
def test_who_cannot_ask_for_names(policies: str, is_mute: bool) -> None:  # noqa: FBT001 - a table
    """Rules with names need a rule that allows DNS, by whatever policy; hosts have a failsafe for it."""
    assert ("no-dns" in dict(_slugs(policies))) is is_mute


def test_who_cannot_ask_is_named_if_others_can() -> None:
    """One endpoint of those that cannot ask stands for all."""
    policies = _egress(_to("a.b"), selector="has(app)") + _egress(DNS, selector="app == 'b'", name="dns")
    (message,) = [problem.message for problem in _lint(policies) if problem.slug == "no-dns"]
    assert message.startswith("Pod/n/a may not ask")


def test_forwarded_packets_of_hosts() -> None:
    """A host endpoint's policy for what it forwards knows the host's names only."""
    more = ", applyOnForward: true"
    assert _slugs(_egress(_to("a.b"), selector="role == 'host'", more=more)) == [("forwarded-names", "spec.egress")]
    assert _slugs(_egress(DNS, _to("a.b"), more=more)) == []


def test_more_patterns_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All patterns of rules and sets together count once each, and each wildcard also for its bare name."""
    monkeypatch.setattr(lint_names, "MAX_PATTERNS", 5)
    assert _slugs(_egress(DNS, _to("a.b", "c.d", "*.cdn.net"))) == []
    problems = _lint(_egress(DNS, _to("a.b", "c.d", "*.cdn.net", "e.f")))
    assert [(problem.slug, problem.message.split(";")[0]) for problem in problems] == [
        ("too-many-names", "the patterns of domain names need 6 rows, two for each wildcard")
    ]


@pytest.mark.parametrize("action", ["Deny", "Pass", "Log"])
def test_names_in_other_rules_are_refused_with_the_reason(action: str) -> None:
    """A rule that denies by name would do nothing until somebody asks for the name."""
    parsed = parse_documents(_egress(_to("a.b").replace("Allow", action)), "f.yaml")
    (problem,) = parsed.problems
    assert (problem.severity, problem.path) == ("error", "spec.egress[0].destination.domains")
    assert "only after a workload asked for it" in problem.message
