# SPDX-License-Identifier: Apache-2.0
"""policy.networking.k8s.io: the three kinds, all released forms of peers, and what fails closed."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from netpol_ebpf.resources.load import LoadResult, parse_documents
from netpol_ebpf.resources.types import (
    AdminNetworkPolicy,
    BaselineAdminNetworkPolicy,
    ClusterNetworkPolicy,
    LabelSelector,
    NamespacedPodSelector,
    SigPeer,
    SigPort,
    SigRule,
    SigSubject,
)

ALPHA1 = "policy.networking.k8s.io/v1alpha1"
ALPHA2 = "policy.networking.k8s.io/v1alpha2"
EVERYTHING = LabelSelector()
LABELLED = LabelSelector({"a": "b"})


def _load(kind: str, spec: str, name: str = "x") -> LoadResult:
    version = ALPHA2 if kind == "ClusterNetworkPolicy" else ALPHA1
    return parse_documents(f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n", "f.yaml")


def _cluster(rules: str) -> LoadResult:
    return _load("ClusterNetworkPolicy", f"{{tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, {rules}}}")


def _admin(rules: str) -> LoadResult:
    return _load("AdminNetworkPolicy", f"{{priority: 1, subject: {{namespaces: {{}}}}, {rules}}}")


def _baseline(rules: str, name: str = "default") -> LoadResult:
    return _load("BaselineAdminNetworkPolicy", f"{{subject: {{namespaces: {{}}}}, {rules}}}", name)


def _rule(result: LoadResult) -> SigRule:
    (policy,) = result.check()
    assert isinstance(policy, (ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy))
    (rule,) = policy.ingress or policy.egress
    return rule


def test_cluster_network_policy() -> None:
    """Accept is Allow; the order of rules is kept; protocols absent means everything."""
    (policy,) = _load(
        "ClusterNetworkPolicy",
        "{tier: Baseline, priority: 1000, subject: {pods: {podSelector: {matchLabels: {a: b}}}}, "
        "ingress: [{name: first, action: Accept, from: [{namespaces: {}}]}, "
        "{action: Pass, from: [{pods: {namespaceSelector: {matchLabels: {a: b}}, podSelector: {}}}], "
        "protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 1, end: 2}}}}, "
        "{sctp: {destinationPort: {number: 5}}}, {destinationNamedPort: http}]}], "
        "egress: [{action: Deny, to: [{nodes: {}}, {networks: [10.0.0.0/8, 'fd00::/8']}]}, "
        "{action: Accept, to: [{domainNames: [A.example., '*.b.example']}]}]}",
    ).check()
    assert isinstance(policy, ClusterNetworkPolicy)
    assert (policy.tier, policy.priority) == ("Baseline", 1000)
    assert policy.subject == SigSubject(pods=NamespacedPodSelector(EVERYTHING, LABELLED))
    first, second = policy.ingress
    assert (first.name, first.action, first.peers, first.ports) == (
        "first",
        "Allow",
        (SigPeer(namespaces=EVERYTHING),),
        None,
    )
    assert first.location.line == 4
    assert second.peers == (SigPeer(pods=NamespacedPodSelector(LABELLED, EVERYTHING)),)
    assert second.ports == (SigPort(6, 80, 80), SigPort(17, 1, 2), SigPort(132, 5, 5), SigPort(None, named_port="http"))
    deny, accept = policy.egress
    assert deny.peers == (
        SigPeer(nodes=EVERYTHING),
        SigPeer(networks=(ip_network("10.0.0.0/8"), ip_network("fd00::/8"))),
    )
    assert accept.peers == (SigPeer(domain_names=("a.example", "*.b.example")),)


def test_admin_and_baseline() -> None:
    """The older API: Allow, ports[], TCP unless said."""
    rule = _rule(
        _admin(
            "egress: [{action: Allow, to: [{namespaces: {matchLabels: {a: b}}}], ports: [{portNumber: {port: 80}}, "
            "{portRange: {protocol: UDP, start: 1, end: 9}}, {namedPort: web}]}]"
        )
    )
    assert rule.peers == (SigPeer(namespaces=LABELLED),)
    assert rule.ports == (SigPort(6, 80, 80), SigPort(17, 1, 9), SigPort(None, named_port="web"))
    rule = _rule(_baseline("ingress: [{action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {}}}]}]"))
    assert (rule.action, rule.peers) == ("Deny", (SigPeer(pods=NamespacedPodSelector(EVERYTHING, EVERYTHING)),))


@pytest.mark.parametrize(
    ("peer", "read"),
    [
        ("{namespaces: {namespaceSelector: {matchLabels: {a: b}}}}", SigPeer(namespaces=LABELLED)),
        ("{namespaces: {sameLabels: [t, u]}}", SigPeer(namespaces=EVERYTHING, same_labels=("t", "u"))),
        ("{namespaces: {notSameLabels: [t]}}", SigPeer(namespaces=EVERYTHING, not_same_labels=("t",))),
        (
            "{pods: {namespaces: {namespaceSelector: {}}, podSelector: {matchLabels: {a: b}}}}",
            SigPeer(pods=NamespacedPodSelector(EVERYTHING, LABELLED)),
        ),
        (
            "{pods: {namespaces: {sameLabels: [t]}, podSelector: {matchLabels: {a: b}}}}",
            SigPeer(pods=NamespacedPodSelector(EVERYTHING, LABELLED), same_labels=("t",)),
        ),
    ],
)
def test_peers_of_the_first_releases(peer: str, read: SigPeer) -> None:
    """Namespaces by selector one level deeper, or by labels they share with the subject's own."""
    assert _rule(_admin(f"ingress: [{{action: Allow, from: [{peer}]}}]")).peers == (read,)


@pytest.mark.parametrize(
    "peer", ["{}", "{services: {}}", "{namespaces: {}, services: {}}", "{pods: null}", "{namespaces: {}, identity: x}"]
)
def test_unknown_peers_fail_closed(peer: str) -> None:
    """A peer of a newer API, or one the server emptied, is kept as unknown, with a warning."""
    result = _cluster(f"ingress: [{{action: Deny, from: [{peer}]}}]")
    assert _rule(result).peers == (SigPeer(unknown=True),)
    (warning,) = result.problems
    assert (warning.severity, warning.slug, warning.path) == ("warning", "unknown-peer", "spec.ingress[0].from[0]")
    assert "fails closed" in warning.message


@pytest.mark.parametrize(
    "peer", ["{namespaces: {sameLabels: []}}", "{pods: {namespaces: {self: true}, podSelector: {}}}"]
)
def test_unknown_older_peers_fail_closed(peer: str) -> None:
    """The same inside the older peers."""
    result = _admin(f"ingress: [{{action: Deny, from: [{peer}]}}]")
    assert _rule(result).peers == (SigPeer(unknown=True),)
    assert [problem.slug for problem in result.problems] == ["unknown-peer"]


@pytest.mark.parametrize(
    "protocol",
    [
        "{}",
        "{icmp: {type: 8}}",
        "{tcp: {}}",
        "{tcp: {flags: [syn]}}",
        "{tcp: {destinationPort: {number: 80}, flags: [syn]}}",
        "{udp: {destinationPort: {}}}",
        "{udp: {destinationPort: {service: x}}}",
    ],
)
def test_unknown_protocols_fail_closed(protocol: str) -> None:
    """A match of a newer API never widens to all ports."""
    result = _cluster(f"ingress: [{{action: Accept, from: [{{namespaces: {{}}}}], protocols: [{protocol}]}}]")
    assert _rule(result).ports == (SigPort(None, unknown=True),)
    assert [(problem.severity, problem.slug) for problem in result.problems] == [("warning", "unknown-peer")]


@pytest.mark.parametrize("port", ["{}", "{portSet: [1]}", "{portNumber: {port: 1}, extra: 1}"])
def test_unknown_ports_fail_closed(port: str) -> None:
    """The same in the older API."""
    result = _admin(f"ingress: [{{action: Allow, from: [{{namespaces: {{}}}}], ports: [{port}]}}]")
    assert _rule(result).ports == (SigPort(None, unknown=True),)


FROM = "from: [{namespaces: {}}]"
TO = "to: [{namespaces: {}}]"


@pytest.mark.parametrize(
    ("result", "path", "words"),
    [
        (
            _load("ClusterNetworkPolicy", "{tier: admin, priority: 1, subject: {namespaces: {}}}"),
            "spec.tier",
            "mean `Admin`",
        ),
        (_load("ClusterNetworkPolicy", "{priority: 1, subject: {namespaces: {}}}"), "spec", "`tier` is required"),
        (_load("ClusterNetworkPolicy", "{tier: Admin, subject: {namespaces: {}}}"), "spec", "`priority` is required"),
        (
            _load("ClusterNetworkPolicy", "{tier: Admin, priority: 1001, subject: {namespaces: {}}}"),
            "spec.priority",
            "0 to 1000",
        ),
        (_load("ClusterNetworkPolicy", "{tier: Admin, priority: 1}"), "spec", "`subject` is required"),
        (_load("ClusterNetworkPolicy", "{tier: Admin, priority: 1, subject: {}}"), "spec.subject", "exactly one of"),
        (
            _load(
                "ClusterNetworkPolicy", "{tier: Admin, priority: 1, subject: {namespaces: {}, pods: {podSelector: {}}}}"
            ),
            "spec.subject",
            "exactly one of",
        ),
        (
            _load("ClusterNetworkPolicy", "{tier: Admin, priority: 1, subject: {pods: {namespaceSelector: {}}}}"),
            "spec.subject.pods",
            "`podSelector` is required",
        ),
        (
            _load("ClusterNetworkPolicy", "{tier: Admin, priority: 1, subject: {namespaces: {}, nodes: {}}}"),
            "spec.subject.nodes",
            "unknown field",
        ),
        (
            _load("AdminNetworkPolicy", "{tier: x, priority: 1, subject: {namespaces: {}}}"),
            "spec.tier",
            "ClusterNetworkPolicy has it",
        ),
        (
            _load("AdminNetworkPolicy", "{priority: 1, subject: {pods: {podSelector: {}}}}"),
            "spec.subject.pods",
            "`namespaceSelector` is required",
        ),
        (_baseline("priority: 1"), "spec.priority", "without a priority"),
        (_baseline("ingress: []", name="other"), "metadata.name", 'must be "default"'),
        (_cluster("rules: []"), "spec.rules", "unknown field"),
        (_cluster("ingress: {action: Deny}"), "spec.ingress", "put `- ` before `action:`"),
        (_cluster(f"ingress: [{{{FROM}}}]"), "spec.ingress[0]", "`action` is required"),
        (_cluster(f"ingress: [{{action: Allow, {FROM}}}]"), "spec.ingress[0].action", "for Allow write Accept"),
        (_admin(f"ingress: [{{action: Accept, {FROM}}}]"), "spec.ingress[0].action", "for Accept write Allow"),
        (_baseline(f"ingress: [{{action: Pass, {FROM}}}]"), "spec.ingress[0].action", "one of Allow, Deny"),
        (_cluster("ingress: [{action: Deny}]"), "spec.ingress[0]", "`from` is required"),
        (_cluster("egress: [{action: Deny, to: []}]"), "spec.egress[0].to", "at least one entry"),
        (_cluster(f"ingress: [{{action: Deny, {FROM}, to: []}}]"), "spec.ingress[0].to", "belongs to egress rules"),
        (_cluster(f"ingress: [{{action: Deny, {FROM}, ports: []}}]"), "spec.ingress[0].ports", "it is `protocols`"),
        (_admin(f"ingress: [{{action: Deny, {FROM}, protocols: []}}]"), "spec.ingress[0].protocols", "it is `ports`"),
        (
            _cluster(f"ingress: [{{action: Deny, {FROM}, protocols: []}}]"),
            "spec.ingress[0].protocols",
            "at least one entry",
        ),
        (
            _cluster(f"ingress: [{{action: Deny, {FROM}, namespaces: {{}}}}]"),
            "spec.ingress[0].namespaces",
            "wrong indentation level",
        ),
        (_cluster(f"ingress: [{{name: {'n' * 101}, action: Deny, {FROM}}}]"), "spec.ingress[0].name", "at most 100"),
        (
            _cluster(f"ingress: [{', '.join([f'{{action: Deny, {FROM}}}'] * 26)}]"),
            "spec.ingress",
            "at most 25 rules, has 26",
        ),
        (
            _cluster("ingress: [{action: Deny, from: [{networks: [10.0.0.0/8]}]}]"),
            "spec.ingress[0].from[0].networks",
            "only in egress",
        ),
        (
            _cluster("ingress: [{action: Deny, from: [{namespaces: {}, pods: {podSelector: {}}}]}]"),
            "spec.ingress[0].from[0]",
            "has namespaces and pods",
        ),
        (
            _cluster("ingress: [{action: Deny, from: [{namespaces: {namespaceSelector: {}}}]}]"),
            "spec.ingress[0].from[0].namespaces.namespaceSelector",
            "unknown field",
        ),
        (
            _cluster("egress: [{action: Deny, to: [{networks: [10.0.0.300/24]}]}]"),
            "spec.egress[0].to[0].networks[0]",
            "must be a CIDR",
        ),
        (
            _cluster("egress: [{action: Deny, to: [{networks: ['::ffff:10.0.0.0/104']}]}]"),
            "spec.egress[0].to[0].networks[0]",
            "IPv4 inside",
        ),
        (
            _cluster(f"egress: [{{action: Deny, to: [{{networks: {['10.0.0.0/8'] * 26}}}]}}]"),
            "spec.egress[0].to[0].networks",
            "at most 25",
        ),
        (
            _cluster("egress: [{action: Deny, to: [{domainNames: [a.b]}]}]"),
            "spec.egress[0].to[0].domainNames",
            "action Accept",
        ),
        (
            _cluster("egress: [{action: Accept, to: [{domainNames: [a.*.b]}]}]"),
            "spec.egress[0].to[0].domainNames[0]",
            "only in front",
        ),
        (
            _cluster("egress: [{action: Accept, to: [{domainNames: [localhost]}]}]"),
            "spec.egress[0].to[0].domainNames[0]",
            "domain name",
        ),
        (
            _cluster(
                "egress: [{action: Deny, to: [{networks: [10.0.0.0/8]}], protocols: [{destinationNamedPort: a}]}]"
            ),
            "spec.egress[0].to[0].networks",
            "has no named ports",
        ),
        (
            _cluster(
                f"egress: [{{action: Deny, {TO}, protocols: [{{tcp: {{destinationPort: {{range: {{start: 5, end: 5}}}}}}}}]}}]"
            ),
            "spec.egress[0].protocols[0].tcp.destinationPort.range.end",
            "must be greater than `start`",
        ),
        (
            _cluster(
                f"egress: [{{action: Deny, {TO}, protocols: [{{tcp: {{destinationPort: {{range: {{start: 5}}}}}}}}]}}]"
            ),
            "spec.egress[0].protocols[0].tcp.destinationPort.range",
            "`end` is required",
        ),
        (
            _cluster(f"egress: [{{action: Deny, {TO}, protocols: [{{tcp: {{destinationPort: {{number: 0}}}}}}]}}]"),
            "spec.egress[0].protocols[0].tcp.destinationPort.number",
            "from 1 to 65535",
        ),
        (
            _cluster(f"egress: [{{action: Deny, {TO}, protocols: [{{destinationNamedPort: 'A!'}}]}}]"),
            "spec.egress[0].protocols[0].destinationNamedPort",
            "a port name",
        ),
        (
            _admin(f"egress: [{{action: Deny, {TO}, ports: [{{portNumber: {{protocol: ICMP, port: 1}}}}]}}]"),
            "spec.egress[0].ports[0].portNumber.protocol",
            "one of TCP, UDP, SCTP",
        ),
        (
            _admin(f"egress: [{{action: Deny, {TO}, ports: [{{portNumber: {{port: 1}}, namedPort: a}}]}}]"),
            "spec.egress[0].ports[0]",
            "has portNumber and namedPort",
        ),
    ],
)
def test_what_is_refused(result: LoadResult, path: str, words: str) -> None:
    """One problem at the field that is wrong, and no resource."""
    (problem,) = result.problems
    assert (problem.path, problem.severity) == (path, "error")
    assert words in problem.message
    assert result.resources == []


def test_a_near_miss_is_suggested() -> None:
    """A misspelt peer fails closed like an unknown one; the warning names the field that was probably meant."""
    (warning,) = _cluster("ingress: [{action: Deny, from: [{namespace: {}}]}]").problems
    assert (warning.severity, "did you mean `namespaces`?" in warning.message) == ("warning", True)


@pytest.mark.parametrize("field", ["podSelector", "namespaceSelector", "ipBlock"])
def test_peers_of_a_kubernetes_policy_are_refused(field: str) -> None:
    """These are no fields of a newer API but a mix-up of two."""
    (problem,) = _cluster(f"ingress: [{{action: Deny, from: [{{{field}: {{}}}}]}}]").problems
    assert (problem.severity, problem.path) == ("error", f"spec.ingress[0].from[0].{field}")
    assert "here it is" in problem.message


def test_baseline_has_no_domain_names() -> None:
    """Its egress peers lack them, so such a peer is unknown and fails closed."""
    result = _baseline("egress: [{action: Allow, to: [{domainNames: [a.b]}]}]")
    assert _rule(result).peers == (SigPeer(unknown=True),)


def test_missing_spec() -> None:
    """An object without a spec misses everything in it."""
    result = parse_documents(f"apiVersion: {ALPHA2}\nkind: ClusterNetworkPolicy\nmetadata: {{name: x}}\n", "f")
    messages: list[Any] = [problem.message for problem in result.problems]
    assert messages[0] == "the field `spec` is required"


def test_unmasked_networks_are_read_with_a_warning() -> None:
    """The API takes them."""
    result = _cluster("egress: [{action: Deny, to: [{networks: [10.1.2.3/8]}]}]")
    assert _rule(result).peers == (SigPeer(networks=(ip_network("10.0.0.0/8"),)),)
    assert [problem.slug for problem in result.problems] == ["cidr-masked"]
