# SPDX-License-Identifier: Apache-2.0
"""networking.k8s.io/v1 NetworkPolicy: defaulting, absent against empty, and every rule of validation."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from netpol_ebpf.resources.load import LoadResult, parse_documents
from netpol_ebpf.resources.types import (
    IPBlock,
    KubernetesNetworkPolicy,
    KubernetesPeer,
    KubernetesPolicySpec,
    KubernetesPort,
    LabelSelector,
    Requirement,
)

HEAD = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: 'n'}\n"


def _load(spec: str) -> LoadResult:
    return parse_documents(f"{HEAD}spec: {spec}\n", "p.yaml")


def _spec(spec: str) -> KubernetesPolicySpec:
    (policy,) = _load(spec).check()
    assert isinstance(policy, KubernetesNetworkPolicy)
    return policy.spec


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ("{}", ("Ingress",)),
        ("{ingress: [{}]}", ("Ingress",)),
        ("{egress: []}", ("Ingress",)),
        ("{egress: [{}]}", ("Ingress", "Egress")),
        ("{policyTypes: [], egress: [{}]}", ("Ingress", "Egress")),
        ("{policyTypes: [Egress]}", ("Egress",)),
        ("{policyTypes: [Egress, Ingress]}", ("Ingress", "Egress")),
        ("{policyTypes: [Ingress, Ingress]}", ("Ingress",)),
    ],
)
def test_policy_types_default_as_the_server_does(spec: str, types: tuple[str, ...]) -> None:
    """Ingress always, Egress when there is an egress rule, unless they are given."""
    assert _spec(spec).policy_types == types


def test_absent_and_empty_selectors_are_kept_apart() -> None:
    """In a peer they mean different things; in the policy's own selector the same."""
    spec = _spec(
        "{ingress: [{from: [{podSelector: {}}, {namespaceSelector: {}}, {podSelector: {}, namespaceSelector: {}}]}]}"
    )
    everything = LabelSelector()
    assert spec.pod_selector == everything
    assert spec.ingress[0].peers == (
        KubernetesPeer(pod_selector=everything),
        KubernetesPeer(namespace_selector=everything),
        KubernetesPeer(everything, everything),
    )


def test_rules_peers_and_ports() -> None:
    """All forms together, with the line of each rule."""
    (policy,) = parse_documents(
        HEAD
        + """\
spec:
  podSelector:
    matchLabels: {app: web}
    matchExpressions:
    - {key: tier, operator: In, values: [a, b]}
    - {key: x/y, operator: Exists}
  policyTypes: [Ingress, Egress]
  ingress:
  - {}
  - from:
    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
    ports:
    - {}
    - {protocol: UDP, port: 53}
    - {port: http}
    - {protocol: SCTP, port: 1, endPort: 65535}
  egress:
  - ports: []
    to: null
""",
        "p.yaml",
    ).check()
    assert isinstance(policy, KubernetesNetworkPolicy)
    spec = policy.spec
    assert spec.pod_selector.match_labels == {"app": "web"}
    assert spec.pod_selector.match_expressions == (Requirement("tier", "In", ("a", "b")), Requirement("x/y", "Exists"))
    first, second = spec.ingress
    assert (first.peers, first.ports, first.location.line) == ((), (), 12)
    assert second.location.line == 13
    assert second.peers == (KubernetesPeer(ip_block=IPBlock(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),))),)
    assert second.ports == (
        KubernetesPort(6),
        KubernetesPort(17, 53),
        KubernetesPort(6, "http"),
        KubernetesPort(132, 1, 65535),
    )
    assert spec.egress[0].peers == ()


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ("3", "spec", "must be a mapping, is 3"),
        ("{podSelctor: {}}", "spec.podSelctor", "did you mean `podSelector`?"),
        ("{types: [Ingress]}", "spec.types", "it is `policyTypes`"),
        ("{selector: x}", "spec.selector", "it is `podSelector`"),
        ("{policyTypes: [ingress]}", "spec.policyTypes[0]", 'write "Ingress"'),
        ("{policyTypes: [Both]}", "spec.policyTypes[0]", 'must be Ingress or Egress; is "Both"'),
        ("{policyTypes: [Ingress, Egress, Ingress]}", "spec.policyTypes", "at most two"),
        ("{policyTypes: Ingress}", "spec.policyTypes", "must be a list"),
        ("{ingress: [null]}", "spec.ingress[0]", "must be a mapping, is nothing"),
        ("{ingress: [{to: []}]}", "spec.ingress[0].to", "belongs to egress rules"),
        ("{egress: [{from: []}]}", "spec.egress[0].from", "belongs to ingress rules"),
        ("{ingress: [{from: {podSelector: {}}}]}", "spec.ingress[0].from", "put `- ` before `podSelector:`"),
        (
            "{ingress: [{from: [{}]}]}",
            "spec.ingress[0].from[0]",
            "needs `podSelector`, `namespaceSelector` or `ipBlock`",
        ),
        ("{ingress: [{from: [{cidr: 10.0.0.0/8}]}]}", "spec.ingress[0].from[0].cidr", "belongs inside `ipBlock:`"),
        (
            "{ingress: [{from: [{matchLabels: {}}]}]}",
            "spec.ingress[0].from[0].matchLabels",
            "belongs inside `podSelector:`",
        ),
        (
            "{ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
            "spec.ingress[0].from[0]",
            "cannot be combined with a selector",
        ),
        ("{ingress: [{from: [{ipBlock: {}}]}]}", "spec.ingress[0].from[0].ipBlock", "`cidr` is required"),
        ("{ingress: [{from: [{ipBlock: {cidr: ''}}]}]}", "spec.ingress[0].from[0].ipBlock", "`cidr` is required"),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.1}}]}]}",
            "spec.ingress[0].from[0].ipBlock.cidr",
            'write "10.0.0.1/32"',
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}",
            "spec.ingress[0].from[0].ipBlock.cidr",
            "must be a CIDR",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 'fe80::1%a/64'}}]}]}",
            "spec.ingress[0].from[0].ipBlock.cidr",
            "must be a CIDR",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "must lie within",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/16']}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "must lie within",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "and be smaller",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: 10.0.0.0/9}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except",
            "must be a list",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, excepts: []}}]}]}",
            "spec.ingress[0].from[0].ipBlock.excepts",
            "`except`",
        ),
        ("{ingress: [{ports: [{port: 0}]}]}", "spec.ingress[0].ports[0].port", "from 1 to 65535"),
        ("{ingress: [{ports: [{port: '80'}]}]}", "spec.ingress[0].ports[0].port", "without quotes: 80"),
        ("{ingress: [{ports: [{port: UPPER}]}]}", "spec.ingress[0].ports[0].port", "lower-case"),
        ("{ingress: [{ports: [{port: a--b}]}]}", "spec.ingress[0].ports[0].port", "single dashes"),
        ("{ingress: [{ports: [{port: abcdefghijklmnop}]}]}", "spec.ingress[0].ports[0].port", "at most 15"),
        ("{ingress: [{ports: [{port: 80.5}]}]}", "spec.ingress[0].ports[0].port", "whole number"),
        ("{ingress: [{ports: [{port: true}]}]}", "spec.ingress[0].ports[0].port", "whole number"),
        ("{ingress: [{ports: [{protocol: ICMP}]}]}", "spec.ingress[0].ports[0].protocol", "one of TCP, UDP, SCTP"),
        ("{ingress: [{ports: [{protocol: tcp}]}]}", "spec.ingress[0].ports[0].protocol", "did you mean `TCP`?"),
        ("{ingress: [{ports: [{endPort: 80}]}]}", "spec.ingress[0].ports[0].endPort", "needs a `port`"),
        (
            "{ingress: [{ports: [{port: http, endPort: 80}]}]}",
            "spec.ingress[0].ports[0].endPort",
            "needs a numeric `port`",
        ),
        ("{ingress: [{ports: [{port: 81, endPort: 80}]}]}", "spec.ingress[0].ports[0].endPort", "80 is less than 81"),
        ("{ingress: [{ports: [{port: 81, endPort: 65536}]}]}", "spec.ingress[0].ports[0].endPort", "at most 65535"),
        ("{ingress: [{ports: [80]}]}", "spec.ingress[0].ports[0]", "must be a mapping, is 80"),
        ("{podSelector: {app: web}}", "spec.podSelector.app", "a label belongs under `matchLabels:`"),
        ("{podSelector: {matchlabels: {}}}", "spec.podSelector.matchlabels", "did you mean `matchLabels`?"),
        ("{podSelector: {matchLabels: {a: 1}}}", "spec.podSelector.matchLabels.a", 'put it in quotes: "1"'),
        ("{podSelector: {matchLabels: {a: b c}}}", "spec.podSelector.matchLabels.a", "is no label value"),
        ("{podSelector: {matchLabels: {/a: b}}}", "spec.podSelector.matchLabels[/a]", "must be a DNS name"),
        ("{podSelector: {matchLabels: []}}", "spec.podSelector.matchLabels", "must be a mapping"),
        ("{podSelector: {matchExpressions: {}}}", "spec.podSelector.matchExpressions", "must be a list"),
        (
            "{podSelector: {matchExpressions: [{operator: Exists}]}}",
            "spec.podSelector.matchExpressions[0]",
            "`key` is required",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a}]}}",
            "spec.podSelector.matchExpressions[0]",
            "`operator` is required",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: in}]}}",
            "spec.podSelector.matchExpressions[0].operator",
            "mean `In`",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
            "spec.podSelector.matchExpressions[0]",
            "at least one entry",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
            "spec.podSelector.matchExpressions[0].values",
            "must be empty",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In, values: ['?']}]}}",
            "spec.podSelector.matchExpressions[0].values[0]",
            "is no label value",
        ),
    ],
)
def test_what_is_refused(spec: str, path: str, words: str) -> None:
    """One problem each, at the field that is wrong, in words that say what to write."""
    result = _load(spec)
    (problem,) = result.problems
    assert (problem.path, problem.severity, problem.location.line) == (path, "error", 4)
    assert words in problem.message
    assert problem.obj == "NetworkPolicy/n/p"
    assert result.resources == []


@pytest.mark.parametrize(
    ("spec", "path", "slug"),
    [
        ("{ingress: [{from: [{ipBlock: {cidr: 10.1.2.3/8}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr", "cidr-masked"),
        ("{policyTypes: [Ingress], egress: [{}]}", "spec.egress", "inert-rules"),
        ("{policyTypes: [Egress], ingress: [{}]}", "spec.ingress", "inert-rules"),
        ("{ingress: [{from: []}]}", "spec.ingress[0].from", "empty-peers"),
        ("{ingress: [{from: }]}", "spec.ingress[0].from", "empty-peers"),
        ("{ingress: [{from: [{podSelector: {}}]}, {ports: [{port: 80}]}]}", "spec.ingress[1]", "split-rule"),
        (
            "{egress: [{ports: [{port: 80}]}, {to: [{podSelector: {}}]}], policyTypes: [Egress]}",
            "spec.egress[1]",
            "split-rule",
        ),
    ],
)
def test_what_is_legal_but_suspicious(spec: str, path: str, slug: str) -> None:
    """A warning, and the resource all the same."""
    result = _load(spec)
    (problem,) = result.problems
    assert (problem.path, problem.severity, problem.slug) == (path, "warning", slug)
    assert len(result.resources) == 1


def test_whole_rules_are_not_taken_for_halves() -> None:
    """Neighbours that have both parts, or the same part, are left alone."""
    rules = "{from: [{podSelector: {}}], ports: [{port: 80}]}, {ports: [{port: 81}]}, {ports: [{port: 82}]}, {}"
    assert _load(f"{{ingress: [{rules}]}}").problems == []


def test_cidrs_that_older_servers_stored_are_read() -> None:
    """Leading zeros are decimal, host bits are cleared, also in excepts."""
    result = _load("{ingress: [{from: [{ipBlock: {cidr: 010.000.0.0/8, except: [10.001.2.3/16]}}]}]}")
    (policy,) = result.check()
    assert isinstance(policy, KubernetesNetworkPolicy)
    block = policy.spec.ingress[0].peers[0].ip_block
    assert block == IPBlock(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),))


def test_many_problems_of_one_object_come_out_together() -> None:
    """Nothing stops at the first."""
    result = _load("{x: 1, policyTypes: [a], ingress: [{ports: [{port: 0}], from: [{}]}, 3]}")
    assert len(result.problems) == 5
