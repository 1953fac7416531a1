# SPDX-License-Identifier: Apache-2.0
"""SIG-network policies in the internal model: positions, peers, ports, and what is not known."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from worlds import read

from netpol_ebpf.errors import Location
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.translate.signetwork import translate_cluster_policy
from netpol_ebpf.policy.types import (
    ANY_ENTITY,
    SCTP,
    TCP,
    UDP,
    Action,
    Direction,
    Entity,
    Policy,
    PolicyKey,
    Ports,
    Rule,
)
from netpol_ebpf.resources.types import (
    ClusterNetworkPolicy,
    LabelSelector,
    Meta,
    SigPeer,
    SigPort,
    SigRule,
    SigSubject,
)

K8S = 'projectcalico.org/orchestrator == "k8s"'
HAS_NS = "has(projectcalico.org/namespace)"
HERE = Location("test.yaml", 1)


def cluster_policy(spec: str) -> Policy:
    head = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec:\n"
    (policy,) = derive(
        read(head + f"  {{tier: Admin, priority: 5, subject: {{namespaces: {{}}}}, {spec}}}\n")
    ).policies.values()
    return policy


def of_rule(rule: SigRule) -> tuple[Rule, ...]:
    """The internal ingress rules of one rule."""
    subject = SigSubject(namespaces=LabelSelector())
    policy = ClusterNetworkPolicy(Meta("p", "", {}, HERE), "Admin", 1, subject, (rule,), ())
    return translate_cluster_policy(PolicyKey("ClusterNetworkPolicy", "", "p"), policy, lambda _: ()).ingress


@pytest.mark.parametrize(
    ("kind", "version", "spec", "tier", "order"),
    [
        ("ClusterNetworkPolicy", "v1alpha2", "tier: Admin, priority: 7", "kube-admin", 7.0),
        ("ClusterNetworkPolicy", "v1alpha2", "tier: Baseline, priority: 7", "kube-baseline", 7.0),
        ("AdminNetworkPolicy", "v1alpha1", "priority: 7", "adminnetworkpolicy", 7.0),
        ("BaselineAdminNetworkPolicy", "v1alpha1", "", "baselineadminnetworkpolicy", 1000.0),
    ],
)
def test_positions(kind: str, version: str, spec: str, tier: str, order: float) -> None:
    """Each kind in its tier, all of which end in Pass; priority is the order."""
    text = f"""
apiVersion: policy.networking.k8s.io/{version}
kind: {kind}
metadata: {{name: default}}
spec: {{{spec}{"," if spec else ""} subject: {{namespaces: {{matchLabels: {{a: b}}}}}}}}
"""
    world = derive(read(text))
    (policy,) = world.policies.values()
    assert (policy.key, policy.tier, policy.order) == (PolicyKey(kind, "", "default"), tier, order)
    assert world.tiers[tier].default_action is Action.PASS
    assert str(policy.subject) == f'({K8S} && pcns.a == "b")'
    assert policy.types == frozenset(), "without rules there is no effect in either direction"


def test_subjects_by_pods() -> None:
    """Both selectors are ANDed, and an empty namespace selector is any namespace."""
    head = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec:\n"
    spec = (
        "  {tier: Admin, priority: 1, subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {c: d}}}}}\n"
    )
    (policy,) = derive(read(head + spec)).policies.values()
    assert str(policy.subject) == f'({K8S} && {HAS_NS} && c == "d")'


def test_peers_of_each_sort() -> None:
    """One internal rule for each, all with the user's index; peers are on the other side."""
    policy = cluster_policy(
        "egress: [{action: Pass, name: r, to: [{namespaces: {}}, {pods: {namespaceSelector: {matchLabels: {a: b}}, podSelector: {}}}, "
        "{networks: [10.0.0.0/8, 'fd00::/8']}, {nodes: {matchLabels: {z: 'y'}}}]}]"
    )
    assert policy.types == {Direction.EGRESS}
    assert all((rule.index, rule.name, rule.action) == (0, "r", Action.PASS) for rule in policy.egress)
    assert all(rule.source == ANY_ENTITY and rule.protocol is None for rule in policy.egress)
    spaces, pods, networks, nodes = (rule.destination for rule in policy.egress)
    assert str(spaces.selector) == f"({K8S} && {HAS_NS})"
    assert str(pods.selector) == f'({K8S} && pcns.a == "b")'
    assert networks == Entity(nets=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")))
    assert (str(nodes.nodes), nodes.selector) == ('z == "y"', None)


def test_ports_of_each_sort() -> None:
    """Merged by protocol; a name is of any protocol; ports of an ingress rule are the subject's."""
    ports = (
        SigPort(TCP, 80, 80),
        SigPort(TCP, 81, 90),
        SigPort(UDP),
        SigPort(SCTP, 9, 9),
        SigPort(None, named_port="web"),
    )
    rules = of_rule(SigRule("", "Allow", (EVERYONE,), ports, HERE))
    assert [(rule.protocol, rule.destination.ports) for rule in rules] == [
        (TCP, Ports(ranges=((80, 90),))),
        (UDP, None),
        (SCTP, Ports(ranges=((9, 9),))),
        (None, Ports(names=("web",))),
    ]
    assert all(rule.action is Action.ALLOW for rule in rules)


def test_domain_names() -> None:
    """Such a peer becomes a rule with patterns, with the ports of the whole rule."""
    policy = cluster_policy(
        "egress: [{action: Accept, to: [{domainNames: [Example.com, '*.example.org.']}, {networks: [10.0.0.0/8]}], "
        "protocols: [{tcp: {destinationPort: {number: 443}}}]}]"
    )
    named, nets = policy.egress
    ports = Ports(((443, 443),))
    assert named.destination == Entity(domains=frozenset({"example.com", "*.example.org"}), ports=ports)
    assert nets.destination == Entity(nets=(ip_network("10.0.0.0/8"),), ports=ports)
    assert [rule.unsupported for rule in policy.egress] == ["", ""]


UNKNOWN_PEER, UNKNOWN_PORT = SigPeer(unknown=True), SigPort(None, unknown=True)
EVERYONE = SigPeer(namespaces=LabelSelector())


@pytest.mark.parametrize(
    "rule",
    [
        SigRule("", "Deny", (UNKNOWN_PEER, EVERYONE), None, HERE),
        SigRule("", "Pass", (UNKNOWN_PEER,), None, HERE),
        SigRule("", "Deny", (EVERYONE,), (UNKNOWN_PORT, SigPort(TCP, 80, 80)), HERE),
        SigRule("", "Deny", (SigPeer(domain_names=("example.com",)),), None, HERE),
    ],
)
def test_what_is_not_known_denies_where_it_would_deny_or_pass(rule: SigRule) -> None:
    """SEMANTICS 1.14: the whole rule becomes a Deny of everything."""
    assert of_rule(rule) == (Rule(Action.DENY, 0),)


@pytest.mark.parametrize(
    "rule",
    [
        SigRule("", "Allow", (UNKNOWN_PEER, EVERYONE), None, HERE),
        SigRule("", "Allow", (EVERYONE,), (UNKNOWN_PORT, SigPort(TCP, 80, 80)), HERE),
        SigRule("", "Allow", (EVERYONE,), (UNKNOWN_PORT,), HERE),
        SigRule("", "Allow", (SigPeer(domain_names=("example.com",)), UNKNOWN_PEER), None, HERE),
    ],
)
def test_what_is_not_known_matches_nothing_where_it_would_allow(rule: SigRule) -> None:
    """SEMANTICS 1.14: the whole rule, its known peers and ports too."""
    assert of_rule(rule) == (Rule(Action.ALLOW, 0, source=Entity(impossible=True)),)


ADMIN = """
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {{name: p}}
spec: {{priority: 1, subject: {{namespaces: {{}}}}, ingress: [{{action: Deny, from: [{peer}]}}]}}
"""
SPACES = """
---
{apiVersion: v1, kind: Namespace, metadata: {name: x, labels: {team: a, kubernetes.io/metadata.name: x}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: 'y', labels: {team: a, kubernetes.io/metadata.name: 'y'}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: z, labels: {kubernetes.io/metadata.name: z}}}
"""


def sides(peer: str) -> list[tuple[str, str]]:
    (policy,) = derive(read(ADMIN.format(peer=peer) + SPACES)).policies.values()
    return [(str(rule.destination.selector), str(rule.source.selector)) for rule in policy.ingress]


def test_same_labels_pair_equal_values() -> None:
    """One rule for each value that a namespace has: on the own side and on the peer's."""
    side = f'({K8S} && pcns.team == "a")'
    assert sides("{namespaces: {sameLabels: [team]}}") == [(side, side)]


def test_not_same_labels_pair_each_value_with_the_others() -> None:
    """The peer has the label with another value; a subject without the label differs from all."""
    assert sides("{pods: {namespaces: {notSameLabels: [team]}, podSelector: {matchLabels: {c: d}}}}") == [
        (f"({K8S} && !has(pcns.team))", f'({K8S} && has(pcns.team) && c == "d")'),
        (f'({K8S} && pcns.team == "a")', f'({K8S} && has(pcns.team) && !pcns.team == "a" && c == "d")'),
    ]
