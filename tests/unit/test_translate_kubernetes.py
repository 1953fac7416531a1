# SPDX-License-Identifier: Apache-2.0
"""Kubernetes NetworkPolicy in the internal model: tier, order, confinement, one rule for each protocol and peer."""

from __future__ import annotations

from ipaddress import ip_network

from worlds import read

from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import (
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
    Staged,
)

HEAD = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: ns}\nspec:\n"
STAGED = (
    "apiVersion: projectcalico.org/v3\nkind: StagedKubernetesNetworkPolicy\nmetadata: {name: p, namespace: ns}\nspec:\n"
)
POD_OF_NS = 'projectcalico.org/orchestrator == "k8s" && projectcalico.org/namespace == "ns"'


def translate(spec: str, head: str = HEAD) -> Policy:
    (policy,) = derive(read(head + spec)).policies.values()
    return policy


def test_a_policy_lives_in_the_default_tier_with_order_1000() -> None:
    """SEMANTICS 1.2; the subject is confined to pods of the namespace."""
    policy = translate("  {podSelector: {matchLabels: {app: web}}, ingress: [{}]}\n")
    assert (policy.key, policy.tier, policy.order) == (
        PolicyKey("KubernetesNetworkPolicy", "ns", "p"),
        "default",
        1000.0,
    )
    assert str(policy.subject) == f'({POD_OF_NS} && app == "web")'
    assert policy.types == {Direction.INGRESS}
    (rule,) = policy.ingress
    assert rule == Rule(Action.ALLOW, 0)
    assert rule.location is not None
    assert (rule.location.file, rule.location.line) == ("test.yaml", 5)
    assert policy.staged is Staged.NO


def test_label_selectors_become_terms() -> None:
    """Each operator, and a value with quotes of its own is no problem."""
    policy = translate(
        """\
  podSelector:
    matchLabels: {b: "2", a: "1"}
    matchExpressions:
    - {key: c, operator: In, values: ['y', x]}
    - {key: d, operator: NotIn, values: [z]}
    - {key: e, operator: Exists}
    - {key: f, operator: DoesNotExist}
"""
    )
    terms = 'a == "1" && b == "2" && c in {"x", "y"} && d not in {"z"} && has(e) && !has(f)'
    assert str(policy.subject) == f"({POD_OF_NS} && {terms})"


def peers(text: str) -> list[Entity]:
    return [rule.source for rule in translate(f"  podSelector: {{}}\n  ingress:\n  - from: {text}\n").ingress]


def test_peers() -> None:
    """PodSelector is of the own namespace; namespaceSelector reads inherited labels; both together are ANDed."""
    k8s = 'projectcalico.org/orchestrator == "k8s"'
    found = peers(
        "[{podSelector: {matchLabels: {a: b}}}, {podSelector: {}}, {namespaceSelector: {matchLabels: {'n': m}}}, "
        "{namespaceSelector: {}}, {namespaceSelector: {matchLabels: {'n': m}}, podSelector: {matchLabels: {a: b}}}]"
    )
    assert [str(entity.selector) for entity in found] == [
        f'({POD_OF_NS} && a == "b")',
        f"({POD_OF_NS})",
        f'({k8s} && pcns.n == "m")',
        f"({k8s} && has(projectcalico.org/namespace))",
        f'({k8s} && pcns.n == "m" && a == "b")',
    ]


def test_ip_blocks() -> None:
    """Nets with their exceptions; no selector, so pods' addresses are matched as well."""
    (entity,) = peers("[{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.0.0/16]}}]")
    nets = (ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16"))
    assert entity == Entity(nets=(ip_network("10.0.0.0/8"),), not_nets=nets)


def test_ports_are_merged_by_protocol() -> None:
    """One rule for each protocol and peer, all with the user's index; ranges are sorted and coalesced."""
    policy = translate(
        """\
  podSelector: {}
  policyTypes: [Egress]
  egress:
  - {}
  - to: [{ipBlock: {cidr: 10.0.0.0/8}}, {ipBlock: {cidr: 11.0.0.0/8}}]
    ports:
    - {port: 81, endPort: 90}
    - {port: 80}
    - {port: web}
    - {port: 100, protocol: TCP}
    - {protocol: UDP}
    - {protocol: UDP, port: 53}
    - {protocol: SCTP, port: dns}
"""
    )
    expected: list[tuple[int, int, str, Ports | None]] = [
        (1, TCP, net, Ports(ranges=((80, 90), (100, 100)), names=("web",))) for net in ("10.0.0.0/8", "11.0.0.0/8")
    ]
    expected += [(1, UDP, net, None) for net in ("10.0.0.0/8", "11.0.0.0/8")]
    expected += [(1, SCTP, net, Ports(names=("dns",))) for net in ("10.0.0.0/8", "11.0.0.0/8")]
    found = [
        (rule.index, rule.protocol, str(rule.destination.nets[0]), rule.destination.ports) for rule in policy.egress[1:]
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert policy.egress[0] == Rule(Action.ALLOW, 0)


def test_ports_of_an_ingress_rule_are_those_of_the_destination() -> None:
    """The peer stands on the other side."""
    policy = translate("  podSelector: {}\n  ingress: [{ports: [{port: 53}]}]\n")
    assert policy.ingress == (Rule(Action.ALLOW, 0, protocol=TCP, destination=Entity(ports=Ports(((53, 53),)))),)


def test_a_staged_policy_names_what_it_replaces() -> None:
    """And lives in the same tier at the same order."""
    policy = translate("  {podSelector: {}, egress: [{}]}\n", STAGED)
    assert (policy.key.kind, policy.staged) == ("StagedKubernetesNetworkPolicy", Staged.SET)
    assert policy.replaces == PolicyKey("KubernetesNetworkPolicy", "ns", "p")
    assert (policy.tier, policy.order) == ("default", 1000.0)
    assert policy.types == {Direction.INGRESS, Direction.EGRESS}, "defaulted as the API server does for the real kind"


def test_a_staged_delete_has_no_rules_and_the_bookkeeping_states_no_policy() -> None:
    """Learn and Ignore are notes of a recommendation engine."""
    assert translate("  {stagedAction: Delete}\n", STAGED).staged is Staged.DELETE
    for action in ("Learn", "Ignore"):
        assert not derive(read(f"{STAGED}  {{stagedAction: {action}, podSelector: {{}}}}\n")).policies
