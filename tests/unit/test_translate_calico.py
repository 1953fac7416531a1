# SPDX-License-Identifier: Apache-2.0
"""Calico policies in the internal model: composition of selectors (SEMANTICS 2.6) and every field of a rule."""

from __future__ import annotations

import math
from ipaddress import ip_network

import pytest
from worlds import read

from netpol_ebpf.errors import Location
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.translate.calico import translate_profile
from netpol_ebpf.policy.types import (
    TCP,
    Action,
    BackendMatch,
    Direction,
    Entity,
    IcmpType,
    Policy,
    PolicyKey,
    PolicyTier,
    Ports,
    Rule,
    Staged,
)
from netpol_ebpf.resources.types import CalicoRule, EntityRule, Meta, Profile


def document(kind: str, spec: str, name: str = "p", namespace: str = "") -> str:
    place = f", namespace: {namespace}" if namespace else ""
    return f"---\napiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: {name}{place}}}\nspec: {{{spec}}}\n"


def global_policy(spec: str) -> Policy:
    (policy,) = derive(read(document("GlobalNetworkPolicy", spec))).policies.values()
    return policy


def namespaced_policy(spec: str) -> Policy:
    (policy,) = derive(read(document("NetworkPolicy", spec, namespace="ns"))).policies.values()
    return policy


OWN = 'projectcalico.org/namespace == "ns"'
HAS_NS = "has(projectcalico.org/namespace)"
HAS_SA = "has(projectcalico.org/serviceaccount)"
X_ACCOUNT = 'projectcalico.org/serviceaccount in {"x"}'


@pytest.mark.parametrize(
    ("spec", "subject"),
    [
        ("selector: a == 'b'", f'(a == "b" && {OWN})'),
        ("serviceAccountSelector: t == 'u'", f'(all() && {OWN} && pcsa.t == "u")'),
        ("serviceAccountSelector: all()", f"(all() && {OWN} && {HAS_SA})"),
    ],
)
def test_subjects_of_namespaced_policies(spec: str, subject: str) -> None:
    """Selector, then namespace, then service accounts (2.6 a)."""
    assert str(namespaced_policy(spec).subject) == subject


@pytest.mark.parametrize(
    ("spec", "subject"),
    [
        ("selector: ''", "all()"),
        ("selector: a == 'b'", 'a == "b"'),
        ("selector: a == 'b', namespaceSelector: n == 'm'", '(a == "b" && pcns.n == "m")'),
        ("namespaceSelector: all()", HAS_NS),
        ("namespaceSelector: '!has(n)'", "!has(pcns.n)"),
        ("selector: '', namespaceSelector: n != 'm'", 'pcns.n != "m"'),
        ("selector: all(), namespaceSelector: n != 'm'", f'({HAS_NS} && pcns.n != "m")'),
        ("selector: all(), namespaceSelector: n == 'm'", f'({HAS_NS} && pcns.n == "m")'),
        ("selector: '!all()', namespaceSelector: '!has(n)'", f"(!{HAS_NS} && !has(pcns.n))"),
        ("selector: '!all()'", "!all()"),
        ("serviceAccountSelector: t != 'u'", 'pcsa.t != "u"'),
        ("selector: all(), serviceAccountSelector: t != 'u'", f'({HAS_SA} && pcsa.t != "u")'),
        ("selector: '!all()', serviceAccountSelector: t != 'u'", f'(!{HAS_SA} && pcsa.t != "u")'),
        ("serviceAccountSelector: all()", HAS_SA),
        (
            "selector: all(), namespaceSelector: n != 'm', serviceAccountSelector: all()",
            f'({HAS_NS} && pcns.n != "m" && {HAS_SA})',
        ),
    ],
)
def test_subjects_of_global_policies(spec: str, subject: str) -> None:
    """Beside a selector of namespaces or accounts every all() of the joined text changes, of the base too (a quirk kept).

    A base selector that is not written is no part of that text.
    """
    found = str(global_policy(spec).subject)
    assert found.replace(f"({HAS_NS} && {HAS_NS})", HAS_NS) == subject


def source(policy: Policy) -> Entity:
    return policy.ingress[0].source


ENTITIES = [
    # entity, of a namespaced policy, of a global policy: the effective positive selector
    ("{nets: [10.0.0.0/8]}", None, None),
    ("{ports: [web]}", None, None),
    ("{selector: a == 'b'}", f'({OWN} && a == "b")', 'a == "b"'),
    ("{selector: all()}", f"({OWN} && all())", "all()"),
    ("{notSelector: a == 'b'}", f'({OWN} && !a == "b")', None),
    ("{selector: has(a), notSelector: a == 'b'}", f'({OWN} && has(a) && !a == "b")', '(has(a) && !a == "b")'),
    (
        "{serviceAccounts: {names: [x]}, notSelector: has(a)}",
        f"({OWN} && {X_ACCOUNT} && !has(a))",
        f"({X_ACCOUNT} && !has(a))",
    ),
    ("{namespaceSelector: n == 'm'}", 'pcns.n == "m"', 'pcns.n == "m"'),
    ("{namespaceSelector: all()}", HAS_NS, HAS_NS),
    ("{namespaceSelector: '!all()'}", f"!{HAS_NS}", f"!{HAS_NS}"),
    ("{namespaceSelector: all(), selector: a == 'b'}", f'({HAS_NS} && a == "b")', f'({HAS_NS} && a == "b")'),
    ("{namespaceSelector: global(), selector: a == 'b'}", f'(!{HAS_NS} && a == "b")', f'(!{HAS_NS} && a == "b")'),
    ("{namespaceSelector: global()}", f"!{HAS_NS}", f"!{HAS_NS}"),
    ("{namespaceSelector: n == 'm', notSelector: has(a)}", '(pcns.n == "m" && !has(a))', '(pcns.n == "m" && !has(a))'),
    (
        "{serviceAccounts: {names: [x, 'y']}}",
        f'({OWN} && projectcalico.org/serviceaccount in {{"x", "y"}})',
        'projectcalico.org/serviceaccount in {"x", "y"}',
    ),
    ("{serviceAccounts: {selector: t == 'u'}}", f'({OWN} && pcsa.t == "u")', 'pcsa.t == "u"'),
    ("{serviceAccounts: {selector: all()}}", f"({OWN} && {HAS_SA})", HAS_SA),
    (
        "{serviceAccounts: {names: [x], selector: t == 'u'}, selector: a == 'b', namespaceSelector: n == 'm'}",
        '(pcns.n == "m" && projectcalico.org/serviceaccount in {"x"} && pcsa.t == "u" && a == "b")',
        '(pcns.n == "m" && projectcalico.org/serviceaccount in {"x"} && pcsa.t == "u" && a == "b")',
    ),
]


@pytest.mark.parametrize(("entity", "namespaced", "cluster"), ENTITIES)
def test_positive_selectors_of_entities(entity: str, namespaced: str | None, cluster: str | None) -> None:
    """The table of 2.6 b, row by row."""
    spec = f"ingress: [{{action: Allow, source: {entity}}}]"
    for policy, expected in ((namespaced_policy(spec), namespaced), (global_policy(spec), cluster)):
        selector = source(policy).selector
        assert (None if selector is None else str(selector)) == expected


def test_a_negative_selector_alone_stays_as_it_is() -> None:
    """2.6 c: in a global policy nothing is positive beside it; where something is, it is part of that."""
    spec = "ingress: [{action: Allow, source: {notSelector: a == 'b'}}]"
    assert str(source(global_policy(spec)).not_selector) == 'a == "b"'
    assert source(namespaced_policy(spec)).not_selector is None


def test_every_field_of_a_rule() -> None:
    """Protocols and negations, ICMP, nets, ports as ranges and names, annotations, the position in the list."""
    policy = global_policy(
        """
        tier: default, order: 5.5, selector: all(), types: [Ingress, Egress],
        ingress: [{action: Log}, {action: Deny, ipVersion: 4, protocol: TCP, notProtocol: UDP,
          metadata: {annotations: {name: my-rule}},
          source: {nets: [10.0.0.0/8], notNets: [10.1.0.0/16], ports: [80, '90:99', '81:83', web]},
          destination: {notPorts: [443, tls]}}],
        egress: [{action: Pass, protocol: ICMP, icmp: {type: 8}, notICMP: {type: 8, code: 3}}]
        """
    )
    assert (policy.order, policy.types) == (5.5, frozenset(Direction))
    assert policy.ingress == (
        Rule(Action.LOG, 0),
        Rule(
            Action.DENY,
            1,
            ip_version=4,
            protocol=TCP,
            not_protocol=17,
            source=Entity(
                nets=(ip_network("10.0.0.0/8"),),
                not_nets=(ip_network("10.1.0.0/16"),),
                ports=Ports(ranges=((80, 83), (90, 99)), names=("web",)),
            ),
            destination=Entity(not_ports=Ports(ranges=((443, 443),), names=("tls",))),
            name="my-rule",
        ),
    )
    assert policy.egress == (Rule(Action.PASS, 0, protocol=1, icmp=IcmpType(8), not_icmp=IcmpType(8, 3)),)


@pytest.mark.parametrize(
    ("entity", "version"),
    [
        ("source: {nets: [10.0.0.0/8]}", 4),
        ("source: {notNets: ['fd00::/8']}", 6),
        ("destination: {notNets: [10.0.0.0/8]}", 4),
        ("source: {ports: [web]}", None),
        ("ipVersion: 6", 6),
    ],
)
def test_cidrs_give_a_rule_its_family(entity: str, version: int | None) -> None:
    """Negated ones too (SEMANTICS 1.4)."""
    assert global_policy(f"ingress: [{{action: Allow, {entity}}}]").ingress[0].ip_version == version


def test_services_match_ports_as_an_egress_destination_only() -> None:
    """By address as an ingress source; the namespace of the policy is the default."""
    policy = namespaced_policy(
        "types: [Ingress, Egress], ingress: [{action: Allow, source: {services: {name: s}}}], "
        "egress: [{action: Allow, destination: {services: {name: s, namespace: other}}}]"
    )
    assert source(policy).service == BackendMatch("ns", "s", match_ports=False)
    assert policy.egress[0].destination.service == BackendMatch("other", "s", match_ports=True)
    assert source(policy).selector is None


def test_what_no_engine_has_is_marked() -> None:
    """Allow rules that need HTTP match nothing for now."""
    policy = global_policy("ingress: [{action: Allow, protocol: TCP, http: {methods: [GET]}}], types: [Ingress]")
    assert policy.ingress[0].unsupported == "http"


def test_domains() -> None:
    """They become patterns in lower case without a dot at the end, beside the other fields of the destination."""
    policy = global_policy(
        "egress: [{action: Allow, protocol: TCP, destination: {domains: [Example.com., '*.example.org'], ports: [443]}}], "
        "types: [Egress]"
    )
    (rule,) = policy.egress
    assert rule.unsupported == ""
    assert rule.destination == Entity(domains=frozenset({"example.com", "*.example.org"}), ports=Ports(((443, 443),)))


@pytest.mark.parametrize("action", [Action.DENY, Action.PASS, Action.LOG])
def test_domains_never_narrow_what_is_not_allowed(action: Action) -> None:
    """The parser rejects them there; if they came through, the rule would match whatever the name is."""
    place = Location("test.yaml", 1)
    rule = CalicoRule(action.value.capitalize(), place, destination=EntityRule(domains=("example.com",)))
    profile = Profile(Meta("p", "", {}, place), labels_to_apply={}, ingress=(), egress=(rule,))
    assert translate_profile(profile).egress == (Rule(action, 0),)


def test_kinds_of_host_policy() -> None:
    """The flags travel; no order is the last one."""
    policy = global_policy("preDNAT: true, applyOnForward: true, types: [Ingress], ingress: [{action: Deny}]")
    assert (policy.pre_dnat, policy.apply_on_forward, policy.do_not_track) == (True, True, False)
    assert policy.order == math.inf


@pytest.mark.parametrize(
    ("kind", "enforced", "namespace"),
    [("StagedNetworkPolicy", "NetworkPolicy", "ns"), ("StagedGlobalNetworkPolicy", "GlobalNetworkPolicy", "")],
)
def test_staged_policies(kind: str, enforced: str, namespace: str) -> None:
    """Set is the default; Delete has no rules; Learn and Ignore take no part."""

    def staged(spec: str) -> list[Policy]:
        return list(derive(read(document(kind, spec, namespace=namespace))).policies.values())

    (policy,) = staged("ingress: [{action: Deny}]")
    assert (policy.key, policy.staged) == (PolicyKey(kind, namespace, "p"), Staged.SET)
    assert policy.replaces == PolicyKey(enforced, namespace, "p")
    (gone,) = staged("stagedAction: Delete")
    assert (gone.staged, gone.ingress, gone.replaces) == (Staged.DELETE, (), policy.replaces)
    assert not staged("stagedAction: Learn, ingress: [{action: Deny}]")
    assert not staged("stagedAction: Ignore, ingress: [{action: Deny}]")


def test_tiers() -> None:
    """Built-in ones always exist; a user's tier without order has the one of default."""
    world = derive(read(document("Tier", "", "mine") + document("Tier", "order: 7, defaultAction: Pass", "other")))
    assert world.tiers["mine"] == PolicyTier("mine", 1_000_000.0, Action.DENY)
    assert world.tiers["other"] == PolicyTier("other", 7.0, Action.PASS)
    assert [tier.name for tier in world.sorted_tiers()] == [
        "other",
        "kube-admin",
        "adminnetworkpolicy",
        "default",
        "mine",
        "kube-baseline",
        "baselineadminnetworkpolicy",
    ]


def test_profiles() -> None:
    """Rules of a Profile object are read like a global policy's."""
    world = derive(read(document("Profile", "ingress: [{action: Allow, source: {notSelector: a == 'b'}}]", "mine")))
    (rule,) = world.profiles["mine"].ingress
    assert rule.source.selector is None
    assert str(rule.source.not_selector) == 'a == "b"'
    assert world.profiles["mine"].egress == ()
