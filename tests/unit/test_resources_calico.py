# SPDX-License-Identifier: Apache-2.0
"""projectcalico.org/v3: defaulting, every field of a rule, and every constraint between fields."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from netpol_ebpf.resources.load import LoadResult, parse_documents
from netpol_ebpf.resources.types import (
    CalicoNetworkPolicy,
    CalicoPolicySpec,
    CalicoRule,
    EndpointPort,
    EntityRule,
    GlobalNetworkPolicy,
    HostEndpoint,
    HttpHeader,
    HttpMatch,
    HttpPath,
    Icmp,
    NetworkSet,
    PortSpec,
    Profile,
    ServiceAccountMatch,
    ServiceMatch,
    StagedKubernetesNetworkPolicy,
    StagedNetworkPolicy,
    Tier,
    WorkloadEndpoint,
)
from netpol_ebpf.selector import parse


def _load(kind: str, spec: str, metadata: str = "{name: x}") -> LoadResult:
    return parse_documents(
        f"apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n", "f.yaml"
    )


def _one(kind: str, spec: str, metadata: str = "{name: x}") -> Any:
    (resource,) = _load(kind, spec, metadata).check()
    return resource


def _spec(spec: str, kind: str = "GlobalNetworkPolicy") -> CalicoPolicySpec:
    policy = _one(kind, spec)
    assert isinstance(policy, (GlobalNetworkPolicy, CalicoNetworkPolicy))
    return policy.spec


def _rule(rule: str, direction: str = "ingress", kind: str = "GlobalNetworkPolicy") -> CalicoRule:
    spec = _spec(f"{{{direction}: [{rule}]}}", kind)
    (one,) = spec.ingress or spec.egress
    return one


def _nets(count: int) -> list[str]:
    return [f"10.{number // 256}.{number % 256}.0/24" for number in range(count)]


# --- policies -------------------------------------------------------------------------------------------------------


def test_policy_defaults() -> None:
    """Tier default, last in order, every endpoint, ingress."""
    spec = _spec("{}")
    assert (spec.tier, spec.order, spec.selector, spec.types) == ("default", None, None, ("Ingress",))
    assert (spec.do_not_track, spec.pre_dnat, spec.apply_on_forward, spec.performance_hints) == (
        False,
        False,
        False,
        (),
    )
    assert _spec('{tier: "", selector: "", order: 0}') == CalicoPolicySpec(
        "default", 0.0, None, None, None, ("Ingress",), (), ()
    )


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ("{ingress: [{action: Allow}]}", ("Ingress",)),
        ("{egress: [{action: Allow}]}", ("Egress",)),
        ("{ingress: [{action: Allow}], egress: [{action: Allow}]}", ("Ingress", "Egress")),
        ("{types: [], egress: [{action: Allow}]}", ("Egress",)),
        ("{types: [Egress, Ingress]}", ("Ingress", "Egress")),
    ],
)
def test_types_default_by_the_rules_there_are(spec: str, types: tuple[str, ...]) -> None:
    """Only egress rules make an egress policy; this differs from a Kubernetes policy."""
    assert _spec(spec).types == types


def test_all_fields_of_a_global_policy() -> None:
    """Selectors are parsed; flags and hints are kept."""
    spec = _spec(
        "{tier: security, order: 1.5, selector: a == 'b', namespaceSelector: has(env), serviceAccountSelector: all(), "
        "types: [Ingress], doNotTrack: true, applyOnForward: true, performanceHints: [AssumeNeededOnEveryNode]}"
    )
    assert spec == CalicoPolicySpec(
        tier="security",
        order=1.5,
        selector=parse("a == 'b'"),
        namespace_selector=parse("has(env)"),
        service_account_selector=parse("all()"),
        types=("Ingress",),
        ingress=(),
        egress=(),
        do_not_track=True,
        apply_on_forward=True,
        performance_hints=("AssumeNeededOnEveryNode",),
    )


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ("{order: '5'}", "spec.order", "must be a number (without quotes)"),
        ("{order: .nan}", "spec.order", "must be a number"),
        ("{tier: a.b}", "spec.tier", "lower-case"),
        ("{selector: a = 'b'}", "spec.selector", "^"),
        ("{selector: 5}", "spec.selector", "must be text"),
        ("{selector: global()}", "spec.selector", "global() is allowed only in"),
        ("{namespaceSelector: '!global()'}", "spec.namespaceSelector", "global() is allowed only in"),
        (f"{{selector: has({'a' * 1020})}}", "spec.selector", "at most 1024 characters, has 1025"),
        ("{types: [ingress]}", "spec.types[0]", 'write "Ingress"'),
        ("{types: [Ingress, Ingress]}", "spec.types[1]", "given twice"),
        ("{policyTypes: [Ingress]}", "spec.policyTypes", "it is `types`"),
        ("{podSelector: {}}", "spec.podSelector", "it is `selector`"),
        ("{ports: []}", "spec.ports", "is at the wrong indentation level"),
        ("{ingress: {action: Allow}}", "spec.ingress", "put `- ` before `action:`"),
        ("{doNotTrack: true}", "spec.doNotTrack", "needs `applyOnForward: true`"),
        ("{preDNAT: true}", "spec.preDNAT", "needs `applyOnForward: true`"),
        ("{preDNAT: true, doNotTrack: true, applyOnForward: true}", "spec.preDNAT", "cannot be combined"),
        (
            "{preDNAT: true, applyOnForward: true, types: [Ingress, Egress]}",
            "spec.types",
            "cannot have the type Egress",
        ),
        ("{preDNAT: true, applyOnForward: true, egress: [{action: Allow}]}", "spec.egress", "only ingress rules"),
        ("{applyOnForward: 'true'}", "spec.applyOnForward", "true or false"),
        ("{performanceHints: [Fast]}", "spec.performanceHints[0]", "must be AssumeNeededOnEveryNode"),
    ],
)
def test_what_is_refused_in_a_policy(spec: str, path: str, words: str) -> None:
    """One problem at the field that is wrong."""
    (problem,) = _load("GlobalNetworkPolicy", spec).problems
    assert (problem.path, problem.severity) == (path, "error")
    assert words in problem.message


def test_fields_of_global_policies_only() -> None:
    """A NetworkPolicy refuses them, and says who has them."""
    for field in ("namespaceSelector", "doNotTrack", "preDNAT", "applyOnForward"):
        (problem,) = _load("NetworkPolicy", f"{{{field}: x}}").problems
        assert problem.message == f"unknown field `{field}`; only a GlobalNetworkPolicy has it"


def test_rule_lists_are_limited_and_may_be_inert() -> None:
    """1024 rules a direction; a direction that `types` lacks is a warning."""
    rules = ", ".join(["{action: Allow}"] * 1025)
    (problem,) = _load("NetworkPolicy", f"{{ingress: [{rules}]}}").problems
    assert problem.message == "must have at most 1024 rules, has 1025"
    (warning,) = _load("NetworkPolicy", "{types: [Egress], ingress: [{action: Allow}]}").problems
    assert (warning.path, warning.severity, warning.slug) == ("spec.ingress", "warning", "inert-rules")


@pytest.mark.parametrize(
    ("kind", "name", "accepted"),
    [
        ("NetworkPolicy", "thing", True),
        ("NetworkPolicy", "tier.thing", True),
        ("NetworkPolicy", "a.b.c", False),
        ("NetworkPolicy", "knp.default.a.b.c", True),
        ("StagedNetworkPolicy", "ossg.default.thing", True),
        ("NetworkPolicy", "Thing", False),
        ("NetworkPolicy", "-thing", False),
        ("NetworkPolicy", "x" * 253, True),
        ("NetworkPolicy", "x" * 254, False),
        ("GlobalNetworkPolicy", "tier.thing", True),
        ("GlobalNetworkPolicy", "knp.default.thing", False),
        ("StagedGlobalNetworkPolicy", "ossg.default.thing", False),
        ("StagedKubernetesNetworkPolicy", "a.b.c", True),
        ("Tier", "x" * 63, True),
        ("Tier", "x" * 64, False),
        ("Tier", "a.b", False),
        ("Profile", "kns.shop", True),
        ("NetworkSet", "a.b.c", True),
        ("NetworkSet", "a$b", False),
    ],
)
def test_names(kind: str, name: str, accepted: bool) -> None:  # noqa: FBT001 - a table
    """Each kind has its own idea of a name."""
    result = _load(kind, "{}", f"{{name: {name}}}")
    assert [problem.path for problem in result.errors] == ([] if accepted else ["metadata.name"])


# --- rules ----------------------------------------------------------------------------------------------------------


def test_all_fields_of_a_rule() -> None:
    """Names and numbers of protocols are the same; empty text in a selector is no selector."""
    rule = _rule(
        "{action: Log, ipVersion: 4, protocol: '6', notProtocol: UDPLite, notICMP: {type: 8, code: 0}, "
        "source: {nets: [10.0.0.0/8], notNets: [10.1.0.0/16], selector: a == 'b', notSelector: has(c), "
        "namespaceSelector: global(), ports: [1, '2', '3:4', http, a_B.c-1], notPorts: [5], "
        "serviceAccounts: {names: [x, 'y'], selector: has(z)}}, "
        "destination: {selector: ''}, metadata: {annotations: {n/k: v}}}"
    )
    assert rule == CalicoRule(
        action="Log",
        location=rule.location,
        ip_version=4,
        protocol=6,
        not_protocol=136,
        not_icmp=Icmp(8, 0),
        source=EntityRule(
            nets=(ip_network("10.0.0.0/8"),),
            not_nets=(ip_network("10.1.0.0/16"),),
            selector=parse("a == 'b'"),
            not_selector=parse("has(c)"),
            namespace_selector=parse("global()"),
            ports=(PortSpec(1, 1), PortSpec(2, 2), PortSpec(3, 4), PortSpec(0, 0, "http"), PortSpec(0, 0, "a_B.c-1")),
            not_ports=(PortSpec(5, 5),),
            service_accounts=ServiceAccountMatch(("x", "y"), parse("has(z)")),
        ),
        annotations={"n/k": "v"},
    )
    assert rule.location.line == 4


def test_icmp_and_services_and_domains() -> None:
    """An ICMP clause without a type says nothing; a service of a NetworkPolicy is in the policy's namespace."""
    assert _rule("{action: Allow, protocol: ICMP, icmp: {type: 8}}").icmp == Icmp(8, None)
    assert _rule("{action: Allow, protocol: 58, icmp: {}}").icmp is None
    service = _rule("{action: Allow, source: {services: {name: s}}}", kind="NetworkPolicy").source.services
    assert service == ServiceMatch("s", "default")
    rule = _rule("{action: Allow, destination: {services: {name: s, namespace: 'n'}}}", "egress")
    assert rule.destination.services == ServiceMatch("s", "n")
    rule = _rule("{action: Allow, destination: {domains: [Example.COM., '*.a.b', x.*.c]}}", "egress")
    assert rule.destination.domains == ("example.com", "*.a.b", "x.*.c")


def test_http() -> None:
    """Methods, paths and headers."""
    rule = _rule(
        "{action: Allow, protocol: TCP, http: {methods: [GET, '*'], paths: [{exact: /a}, {prefix: /b}], "
        "headers: [{header: X, operator: In, values: ['y']}, {header: Z, operator: Exists}]}}"
    )
    assert rule.http == HttpMatch(
        ("GET", "*"),
        (HttpPath(exact="/a"), HttpPath(prefix="/b")),
        (HttpHeader("X", "In", ("y",)), HttpHeader("Z", "Exists")),
    )


@pytest.mark.parametrize(
    ("rule", "path", "words"),
    [
        ("{}", "", "`action` is required"),
        ("{action: allow}", ".action", "did you mean `Allow`?"),
        ("{action: Allow, ipVersion: 5}", ".ipVersion", "must be 4 or 6"),
        ("{action: Allow, ipVersion: '4'}", ".ipVersion", "without quotes"),
        ("{action: Allow, ipVersion: true}", ".ipVersion", "must be 4 or 6"),
        ("{action: Allow, protocol: tcp}", ".protocol", "did you mean `TCP`?"),
        ("{action: Allow, protocol: 256}", ".protocol", "from 1 to 255"),
        ("{action: Allow, protocol: true}", ".protocol", "must be one of TCP"),
        ("{action: Allow, notProtocol: [6]}", ".notProtocol", "must be one of TCP"),
        ("{action: Allow, icmp: {type: 8}}", ".icmp", "needs `protocol: ICMP`"),
        ("{action: Allow, protocol: TCP, icmp: {type: 8}}", ".icmp", "needs `protocol: ICMP`"),
        ("{action: Allow, protocol: ICMP, icmp: {type: 255}}", ".icmp.type", "from 0 to 254"),
        ("{action: Allow, protocol: ICMP, icmp: {code: 0}}", ".icmp.code", "needs a `type`"),
        ("{action: Allow, notICMP: {code: 0}}", ".notICMP.code", "needs a `type`"),
        ("{action: Allow, notIcmp: {}}", ".notIcmp", "did you mean `notICMP`?"),
        ("{action: Allow, protocol: ICMP, ipVersion: 6}", ".ipVersion", "exists only in IPv4"),
        ("{action: Allow, notProtocol: 58, ipVersion: 4}", ".ipVersion", "exists only in IPv6"),
        ("{action: Allow, source: {nets: [10.0.0.1/8]}}", ".source.nets[0]", "write 10.0.0.0/8"),
        ("{action: Allow, source: {nets: [10.0.0.1]}}", ".source.nets[0]", 'write "10.0.0.1/32"'),
        ("{action: Allow, source: {nets: [10.0.0.01/32]}}", ".source.nets[0]", "must be a CIDR"),
        ("{action: Allow, source: {notNets: ['::/0']}}", ".source.notNets[0]", "exclude every address"),
        (
            "{action: Allow, source: {nets: [10.0.0.0/8]}, destination: {notNets: ['fd00::/8']}}",
            ".destination.notNets",
            "make two rules",
        ),
        ("{action: Allow, ipVersion: 4, source: {nets: ['fd00::/8']}}", ".source.nets", "has ipVersion 4"),
        ("{action: Allow, source: {ports: [80]}}", ".source.ports", "needs `protocol: TCP`"),
        ("{action: Allow, source: {notPorts: [http, 80]}}", ".source.notPorts", "only named ports"),
        ("{action: Allow, notProtocol: UDP, source: {ports: [80]}}", ".source.ports", "needs `protocol: TCP`"),
        ("{action: Allow, protocol: UDPLite, source: {ports: [80]}}", ".source.ports", 'has protocol "UDPLite"'),
        ("{action: Allow, protocol: 1, source: {ports: [http]}}", ".source.ports", "has protocol 1"),
        ("{action: Allow, protocol: TCP, source: {ports: [0]}}", ".source.ports[0]", "from 1 to 65535"),
        ("{action: Allow, protocol: TCP, source: {ports: [65536]}}", ".source.ports[0]", "from 1 to 65535"),
        ("{action: Allow, protocol: TCP, source: {ports: ['2:1']}}", ".source.ports[0]", "ends before it begins"),
        ("{action: Allow, protocol: TCP, source: {ports: ['1:65536']}}", ".source.ports[0]", "both ends"),
        ("{action: Allow, protocol: TCP, source: {ports: [1.5]}}", ".source.ports[0]", "must be a port number"),
        ("{action: Allow, protocol: TCP, source: {ports: ['a b']}}", ".source.ports[0]", "a port name"),
        ("{action: Allow, source: {selector: global()}}", ".source.selector", "allowed only in"),
        ("{action: Allow, source: {notSelector: a ==}}", ".source.notSelector", "^"),
        (
            "{action: Allow, source: {namespaceSelector: global() && all()}}",
            ".source.namespaceSelector",
            "must stand alone",
        ),
        (
            "{action: Allow, source: {serviceAccounts: {name: [x]}}}",
            ".source.serviceAccounts.name",
            "did you mean `names`?",
        ),
        ("{action: Allow, source: {services: {name: s}}}", ".source.services", "`namespace` is required"),
        ("{action: Allow, source: {services: {namespace: 'n'}}}", ".source.services", "`name` is required"),
        ("{action: Allow, source: {services: {name: S, namespace: 'n'}}}", ".source.services.name", "lower-case"),
        (
            "{action: Allow, destination: {services: {name: s, namespace: 'n'}}}",
            ".destination.services",
            "only in the `source`",
        ),
        (
            "{action: Allow, source: {services: {name: s, namespace: 'n'}, notSelector: a == 'b'}}",
            ".source.services",
            "cannot be combined with `notSelector`",
        ),
        ("{action: Allow, source: {domains: [a.b]}}", ".source.domains", "`destination` of an egress rule"),
        ("{action: Allow, destination: {domains: [a.b]}}", ".destination.domains", "`destination` of an egress rule"),
        ("{action: Allow, source: {net: [10.0.0.0/8]}}", ".source.net", "did you mean `nets`?"),
        ("{action: Allow, selector: a == 'b'}", ".selector", "wrong indentation level"),
        ("{action: Allow, from: []}", ".from", "has `source:`"),
        ("{action: Deny, http: {}}", ".http", "only with action Allow"),
        ("{action: Allow, protocol: UDP, http: {}}", ".http", "needs `protocol: TCP`"),
        ("{action: Allow, http: {methods: [GET, GET]}}", ".http.methods", "twice"),
        (f"{{action: Allow, http: {{methods: {[str(n) for n in range(21)]}}}}}", ".http.methods", "at most 20"),
        ("{action: Allow, http: {paths: [{}]}}", ".http.paths[0]", "must have `exact` or `prefix`"),
        ("{action: Allow, http: {paths: [{exact: /a, prefix: /b}]}}", ".http.paths[0]", "not both"),
        ("{action: Allow, http: {paths: [{exact: a}]}}", ".http.paths[0].exact", 'must begin with "/"'),
        ("{action: Allow, http: {paths: [{prefix: '/a?b'}]}}", ".http.paths[0].prefix", "neither"),
        (f"{{action: Allow, http: {{paths: [{{prefix: /{'a' * 1024}}}]}}}}", ".http.paths[0].prefix", "at most 1024"),
        (
            "{action: Allow, http: {headers: [{header: X, operator: Is}]}}",
            ".http.headers[0].operator",
            "must be one of Exists",
        ),
        ("{action: Allow, http: {headers: [{header: X, operator: In}]}}", ".http.headers[0]", "at least one entry"),
        (
            "{action: Allow, http: {headers: [{header: X, operator: Exists, values: [a]}]}}",
            ".http.headers[0].values",
            "must be empty",
        ),
        (
            "{action: Allow, http: {headers: [{header: X, operator: MatchesRegex, values: ['(']}]}}",
            ".http.headers[0].values[0]",
            "not a regular expression",
        ),
        ("{action: Allow, metadata: {annotations: {'!': a}}}", ".metadata.annotations", "no annotation name"),
        ("{action: Allow, metadata: {labels: {}}}", ".metadata.labels", "unknown field"),
        (f"{{action: Allow, protocol: TCP, source: {{ports: {list(range(1, 52))}}}}}", ".source.ports", "at most 50"),
        (f"{{action: Allow, source: {{nets: {_nets(256)}}}}}", "", ""),
        (
            f"{{action: Allow, source: {{nets: {_nets(257)}}}}}",
            ".source.nets",
            "at most 256",
        ),
    ],
)
def test_what_is_refused_in_a_rule(rule: str, path: str, words: str) -> None:
    """One problem at the field that is wrong; a rule with nothing wrong has none."""
    problems = _load("GlobalNetworkPolicy", f"{{ingress: [{rule}]}}").problems
    if not words:
        assert problems == []
        return
    (problem,) = problems
    assert (problem.path, problem.severity) == (f"spec.ingress[0]{path}", "error")
    assert words in problem.message


@pytest.mark.parametrize(
    ("rule", "path", "words"),
    [
        ("{action: Allow, http: {}}", ".http", "only in ingress rules"),
        (
            "{action: Allow, source: {services: {name: s, namespace: 'n'}}}",
            ".source.services",
            "only in the `destination`",
        ),
        (
            "{action: Allow, protocol: TCP, destination: {services: {name: s, namespace: 'n'}, ports: [80]}}",
            ".destination.ports",
            "the service's own ports apply",
        ),
        ("{action: Deny, destination: {domains: [a.b]}}", ".destination.domains", "with action Allow"),
        (
            "{action: Allow, destination: {domains: [a.b], nets: [10.0.0.0/8]}}",
            ".destination.domains",
            "combined with `nets`",
        ),
        (
            "{action: Allow, destination: {domains: [a.b], selector: all()}}",
            ".destination.domains",
            "combined with `selector`",
        ),
        ("{action: Allow, destination: {domains: ['*']}}", ".destination.domains[0]", "not as the last part"),
        ("{action: Allow, destination: {domains: ['a*.b']}}", ".destination.domains[0]", "whole parts"),
        ("{action: Allow, destination: {domains: ['*.*.b']}}", ".destination.domains[0]", 'one "*" at most'),
        ("{action: Allow, destination: {domains: ['a..b']}}", ".destination.domains[0]", "must be a domain name"),
    ],
)
def test_what_is_refused_in_an_egress_rule(rule: str, path: str, words: str) -> None:
    """The mirror of the rules for ingress, and domains."""
    (problem,) = _load("GlobalNetworkPolicy", f"{{egress: [{rule}]}}").problems
    assert problem.path == f"spec.egress[0]{path}"
    assert words in problem.message


def test_empty_service_accounts_are_a_warning() -> None:
    """They do not restrict anything, which looks like a slip."""
    result = _load("NetworkPolicy", "{ingress: [{action: Allow, source: {serviceAccounts: {}}}]}")
    (problem,) = result.problems
    assert (problem.severity, problem.slug) == ("warning", "inert-field")
    assert result.resources[0].spec.ingress[0].source.service_accounts is None  # type: ignore[union-attr]


# --- staged policies ------------------------------------------------------------------------------------------------


def test_staged_policies() -> None:
    """Set unless said; the spec is that of the enforced kind."""
    staged = _one("StagedNetworkPolicy", "{selector: all(), tier: t}")
    assert isinstance(staged, StagedNetworkPolicy)
    assert (staged.staged_action, staged.spec.tier) == ("Set", "t")
    for action in ("Set", "Learn", "Ignore"):
        assert _one("StagedGlobalNetworkPolicy", f"{{stagedAction: {action}, order: 1}}").staged_action == action
    removal = _one("StagedNetworkPolicy", "{stagedAction: Delete, tier: t, selector: '', types: []}")
    assert (removal.staged_action, removal.spec.tier) == ("Delete", "t")


def test_staged_kubernetes_policies() -> None:
    """Defaulted as the API server would; Delete has no spec."""
    staged = _one("StagedKubernetesNetworkPolicy", "{podSelector: {}, egress: [{}]}")
    assert isinstance(staged, StagedKubernetesNetworkPolicy)
    assert staged.spec is not None
    assert staged.spec.policy_types == ("Ingress", "Egress")
    removal = _one("StagedKubernetesNetworkPolicy", "{stagedAction: Delete, podSelector: {}}")
    assert (removal.staged_action, removal.spec) == ("Delete", None)


@pytest.mark.parametrize(
    ("kind", "spec", "path"),
    [
        ("StagedNetworkPolicy", "{stagedAction: delete}", "spec.stagedAction"),
        ("StagedNetworkPolicy", "{stagedAction: Delete, order: 0}", "spec.order"),
        ("StagedGlobalNetworkPolicy", "{stagedAction: Delete, applyOnForward: true}", "spec.applyOnForward"),
        ("StagedGlobalNetworkPolicy", "{stagedAction: Delete, egress: [{action: Allow}]}", "spec.egress"),
        (
            "StagedKubernetesNetworkPolicy",
            "{stagedAction: Delete, podSelector: {matchLabels: {a: b}}}",
            "spec.podSelector",
        ),
        ("StagedKubernetesNetworkPolicy", "{stagedAction: Delete, policyTypes: [Ingress]}", "spec.policyTypes"),
        ("StagedKubernetesNetworkPolicy", "{tier: x}", "spec.tier"),
    ],
)
def test_what_is_refused_in_staged_policies(kind: str, spec: str, path: str) -> None:
    """Delete leaves everything else empty."""
    (problem,) = _load(kind, spec).problems
    assert problem.path == path


# --- tiers, sets, endpoints, profiles -------------------------------------------------------------------------------


def test_tiers() -> None:
    """The order is kept as written; the action is Deny unless said."""
    bare = _one("Tier", "{}")
    assert bare == Tier(bare.meta, None, "Deny")
    tier = _one("Tier", "{order: 100, defaultAction: Pass}")
    assert (tier.order, tier.default_action) == (100.0, "Pass")
    for name, order, action in (
        ("default", "1000000", "Deny"),
        ("kube-admin", "1e3", "Pass"),
        ("kube-baseline", "10000000.0", "Pass"),
    ):
        assert _load("Tier", f"{{order: {order}, defaultAction: {action}}}", f"{{name: {name}}}").problems == []


@pytest.mark.parametrize(("name", "where"), [("app", "before"), ("security", "after")])
def test_a_tier_without_order_is_a_trap(name: str, where: str) -> None:
    """It ties with the default tier, and the name decides."""
    (warning,) = _load("Tier", "{}", f"{{name: {name}}}").problems
    assert (warning.severity, warning.slug) == ("warning", "tier-order")
    assert warning.message.endswith(f"so it comes {where} default")


@pytest.mark.parametrize(
    ("name", "spec", "paths"),
    [
        ("x", "{order: 1, defaultAction: Allow}", ["spec.defaultAction"]),
        ("default", "{order: 1000000, defaultAction: Pass}", ["spec.defaultAction"]),
        ("default", "{order: 5}", ["spec.order"]),
        ("default", "{}", ["spec"]),
        ("kube-admin", "{order: 1000}", ["spec.defaultAction"]),
        ("kube-baseline", "{order: 1, defaultAction: Deny}", ["spec.order", "spec.defaultAction"]),
    ],
)
def test_what_is_refused_in_tiers(name: str, spec: str, paths: list[str]) -> None:
    """Order and action of the built-in tiers are fixed."""
    problems = _load("Tier", spec, f"{{name: {name}}}").problems
    assert [problem.path for problem in problems] == paths


def test_network_sets() -> None:
    """CIDRs and bare addresses of both families; host bits are cleared with a warning."""
    result = _load(
        "GlobalNetworkSet", "{nets: [10.0.0.1, 11.0.0.1/8, 'fd00::', 'fd00::/64'], allowedEgressDomains: [A.b]}"
    )
    (warning,) = result.problems
    assert (warning.severity, warning.slug, warning.path) == ("warning", "cidr-masked", "spec.nets[1]")
    (one,) = result.resources
    assert isinstance(one, NetworkSet)
    assert [str(net) for net in one.nets] == ["10.0.0.1/32", "11.0.0.0/8", "fd00::/128", "fd00::/64"]
    assert (one.allowed_egress_domains, one.meta.namespace) == (("a.b",), "")
    assert _one("NetworkSet", "{}").meta.namespace == "default"


@pytest.mark.parametrize(
    ("metadata", "spec", "path"),
    [
        ("{name: x}", "{nets: [garbage]}", "spec.nets[0]"),
        ("{name: x}", "{nets: [10.0.0.0/33]}", "spec.nets[0]"),
        ("{name: x}", "{nets: [10]}", "spec.nets[0]"),
        ("{name: x}", "{net: []}", "spec.net"),
        ("{name: x}", "{allowedEgressDomains: ['*.*.a']}", "spec.allowedEgressDomains[0]"),
        ("{name: x, labels: {projectcalico.org/namespace: a}}", "{}", "metadata.labels[projectcalico.org/namespace]"),
    ],
)
def test_what_is_refused_in_network_sets(metadata: str, spec: str, path: str) -> None:
    """Anything that is neither address nor CIDR, and the label that only the system sets."""
    (problem,) = _load("NetworkSet", spec, metadata).problems
    assert problem.path == path


def test_host_endpoints() -> None:
    """A node, and an interface or addresses."""
    endpoint = _one(
        "HostEndpoint",
        "{node: 'n', interfaceName: '*', expectedIPs: [10.0.0.1, 'fd00::1'], profiles: [knp.default.x], "
        "ports: [{name: ssh, protocol: 6, port: 22}]}",
    )
    assert isinstance(endpoint, HostEndpoint)
    assert (endpoint.node, endpoint.interface, endpoint.profiles) == ("n", "*", ("knp.default.x",))
    assert endpoint.expected_ips == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    assert endpoint.ports == (EndpointPort("ssh", 6, 22),)
    assert _one("HostEndpoint", "{node: 'n', expectedIPs: [10.0.0.1]}").interface is None


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ("{}", ["spec", "spec"]),
        ("{node: 'n'}", ["spec"]),
        ("{node: 'n', interfaceName: '', expectedIPs: []}", ["spec.interfaceName"]),
        ("{interfaceName: eth0}", ["spec"]),
        ("{node: 'N', interfaceName: eth0}", ["spec.node"]),
        ("{node: 'n', interfaceName: abcdefghijklmnop}", ["spec.interfaceName"]),
        ("{node: 'n', expectedIPs: [10.0.0.0/8]}", ["spec.expectedIPs[0]"]),
        ("{node: 'n', interfaceName: eth0, profiles: [.x]}", ["spec.profiles[0]"]),
        ("{node: 'n', interfaceName: eth0, ports: [{protocol: TCP, port: 1}]}", ["spec.ports[0]"]),
        ("{node: 'n', interfaceName: eth0, ports: [{name: a b, protocol: TCP, port: 1}]}", ["spec.ports[0].name"]),
        ("{node: 'n', interfaceName: eth0, ports: [{name: a, protocol: ICMP, port: 1}]}", ["spec.ports[0].protocol"]),
        ("{node: 'n', interfaceName: eth0, ports: [{name: a, protocol: 123, port: 1}]}", ["spec.ports[0].protocol"]),
        ("{node: 'n', interfaceName: eth0, ports: [{name: a, port: 1}]}", ["spec.ports[0]"]),
        ("{node: 'n', interfaceName: eth0, ports: [{name: a, protocol: TCP}]}", ["spec.ports[0]"]),
        ("{node: 'n', interfaceName: eth0, ports: [{name: a, protocol: TCP, port: 0}]}", ["spec.ports[0].port"]),
    ],
)
def test_what_is_refused_in_host_endpoints(spec: str, paths: list[str]) -> None:
    """Each thing wrong is one problem."""
    assert [problem.path for problem in _load("HostEndpoint", spec).problems] == paths


def test_workload_endpoints() -> None:
    """Addresses are single; unnamed ports need a host port and are not kept; long account labels are accepted."""
    metadata = f"{{name: n-k8s-p-eth0, namespace: s, labels: {{projectcalico.org/serviceaccount: {'a' * 64}}}}}"
    endpoint = _one(
        "WorkloadEndpoint",
        "{node: 'n', orchestrator: libvirt, workload: vm, endpoint: eth0, interfaceName: tap0, mac: 'ee:ee:ee:ee:ee:ee', "
        "containerID: Ab-1, ipNetworks: [10.0.0.1/32, 'fd00::1'], ipNATs: [{internalIP: 10.0.0.1, externalIP: 192.0.2.1}], "
        "ipv4Gateway: 169.254.1.1, profiles: [p], ports: [{name: a, protocol: UDP, port: 5}, "
        "{protocol: TCP, port: 6, hostPort: 7, hostIP: 192.0.2.1}], serviceAccountName: sa, "
        "allowSpoofedSourcePrefixes: [10.9.0.0/16, 10.8.0.1]}",
        metadata,
    )
    assert isinstance(endpoint, WorkloadEndpoint)
    assert (endpoint.node, endpoint.orchestrator, endpoint.workload, endpoint.interface) == (
        "n",
        "libvirt",
        "vm",
        "tap0",
    )
    assert endpoint.addresses == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    assert endpoint.ports == (EndpointPort("a", 17, 5),)
    assert (endpoint.service_account, endpoint.profiles) == ("sa", ("p",))
    assert endpoint.allowed_source_prefixes == (ip_network("10.9.0.0/16"), ip_network("10.8.0.1/32"))


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("{}", "spec"),
        ("{interfaceName: 'a:b'}", "spec.interfaceName"),
        ("{interfaceName: a, ipNetworks: [10.0.0.0/24]}", "spec.ipNetworks[0]"),
        ("{interfaceName: a, ipNATs: [{internalIP: 10.0.0.1, externalIP: 10.0.0.2}]}", "spec.ipNATs[0].internalIP"),
        (
            "{interfaceName: a, ipNetworks: [10.0.0.1], ipNATs: [{internalIP: 10.0.0.1, externalIP: 'fd00::1'}]}",
            "spec.ipNATs[0].externalIP",
        ),
        ("{interfaceName: a, ipv4Gateway: 'fd00::1'}", "spec.ipv4Gateway"),
        ("{interfaceName: a, ipv6Gateway: x}", "spec.ipv6Gateway"),
        ("{interfaceName: a, mac: x}", "spec.mac"),
        ("{interfaceName: a, containerID: -a}", "spec.containerID"),
        ("{interfaceName: a, ports: [{protocol: TCP, port: 1}]}", "spec.ports[0]"),
        ("{interfaceName: a, ports: [{protocol: TCP, port: 1, hostPort: 2, hostIP: x}]}", "spec.ports[0].hostIP"),
        ("{interfaceName: a, allowSpoofedSourcePrefixes: [x]}", "spec.allowSpoofedSourcePrefixes[0]"),
    ],
)
def test_what_is_refused_in_workload_endpoints(spec: str, path: str) -> None:
    """One problem at the field that is wrong."""
    (problem,) = _load("WorkloadEndpoint", spec).problems
    assert problem.path == path


def test_profiles() -> None:
    """Rules and labels; a service match needs a namespace, since a profile has none."""
    profile = _one("Profile", "{ingress: [{action: Deny}], egress: [{action: Pass}], labelsToApply: {a: b}}")
    assert isinstance(profile, Profile)
    assert ([rule.action for rule in profile.ingress], profile.labels_to_apply) == (["Deny"], {"a": "b"})
    (problem,) = _load("Profile", f"{{labelsToApply: {{a: {'b' * 64}}}}}").problems
    assert problem.path == "spec.labelsToApply.a"
    (problem,) = _load("Profile", "{ingress: [{action: Allow, source: {services: {name: s}}}]}").problems
    assert "`namespace` is required" in problem.message
