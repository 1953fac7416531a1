# SPDX-License-Identifier: Apache-2.0
"""Warnings that need a whole cluster: each is given when it should be, and not when it should not."""

from __future__ import annotations

import pytest

from netpol_ebpf.errors import Problem
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
spec: {containers: [{name: c, ports: [{name: http, containerPort: 80}]}]}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: 'n', labels: {app: b}}
status: {podIP: 10.0.0.2}
---
"""


def _lint(policies: str, cluster: str = CLUSTER) -> list[Problem]:
    return lint(parse_documents(cluster + policies, "f.yaml").check())


def _slugs(policies: str, cluster: str = CLUSTER) -> list[tuple[str, str]]:
    return [(problem.slug, problem.path) for problem in _lint(policies, cluster)]


def _kubernetes(spec: str, name: str = "p") -> str:
    return f"{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: {name}, namespace: 'n'}}, spec: {spec}}}\n---\n"


def _global(spec: str, name: str = "g", kind: str = "GlobalNetworkPolicy") -> str:
    return f"{{apiVersion: projectcalico.org/v3, kind: {kind}, metadata: {{name: {name}}}, spec: {spec}}}\n---\n"


def test_a_sound_cluster_has_no_warning() -> None:
    """Policies that do something, and nothing twice, are left alone."""
    policies = _kubernetes(
        "{podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {}}], ports: [{port: http}]}, {ports: [{port: 81}]}]}"
    )
    assert _slugs(policies) == []


@pytest.mark.parametrize(
    ("policies", "slugs"),
    [
        (_kubernetes("{podSelector: {matchLabels: {app: c}}}"), [("selects-nothing", "spec")]),
        (_global("{selector: app == 'c'}", kind="StagedGlobalNetworkPolicy"), [("selects-nothing", "spec")]),
        (
            _global("{selector: app == 'c', stagedAction: Delete}", kind="StagedGlobalNetworkPolicy").replace(
                "selector: app == 'c', ", ""
            ),
            [],
        ),
        (_global("{applyOnForward: true, preDNAT: true}"), [("selects-nothing", "spec")]),
        (_global("{selector: app == 'a' && app == 'b'}"), [("impossible-selector", "spec")]),
        (
            _kubernetes(
                "{ingress: [{from: [{podSelector: {matchLabels: {x: 'y'}, matchExpressions: [{key: x, operator: DoesNotExist}]}}]}]}"
            ),
            [("impossible-selector", "spec.ingress[0]")],
        ),
        (
            _global("{types: [Egress], egress: [{action: Deny, destination: {selector: 'a in {}'}}]}"),
            [("impossible-selector", "spec.egress[0]")],
        ),
        (_global("{tier: absent}"), [("missing-tier", "spec.tier")]),
        (
            _global("{ingress: [{action: Allow, http: {methods: [GET]}}]}"),
            [("unsupported", "spec.ingress[0]")],
        ),
        (_kubernetes("{ingress: [{ports: [{port: htp}]}]}"), [("unknown-port-name", "spec.ingress[0]")]),
        (
            _kubernetes("{ingress: [{ports: [{port: http, protocol: UDP}]}]}"),
            [("unknown-port-name", "spec.ingress[0]")],
        ),
        (_kubernetes("{egress: [{ports: [{port: htp}]}]}"), []),
    ],
)
def test_effect_of_a_policy(policies: str, slugs: list[tuple[str, str]]) -> None:
    """One warning each, at the policy or the rule."""
    assert _slugs(policies) == slugs


def test_without_endpoints_nothing_is_said_of_them() -> None:
    """A directory of policies alone is not a cluster without pods."""
    assert _slugs(_kubernetes("{podSelector: {matchLabels: {app: c}}}"), cluster="") == []


@pytest.mark.parametrize(
    ("rules", "warned"),
    [
        ("[{action: Log}]", True),
        ("[{action: Log}, {action: Pass}]", False),
        ("[]", False),
    ],
)
def test_log_only_policies(rules: str, warned: bool) -> None:  # noqa: FBT001 - a table
    """Logging alone still ends in the tier's deny; a Pass at the end avoids it, and so does a tier that passes."""
    problems = _lint(_global(f"{{ingress: {rules}}}"))
    assert [problem.slug for problem in problems] == (["log-only"] if warned else [])
    tier = "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: t}, spec: {order: 1, defaultAction: Pass}}\n---\n"
    assert _slugs(tier + _global(f"{{tier: t, ingress: {rules}}}")) == []


@pytest.mark.parametrize(
    ("block", "warned"),
    [
        ("{cidr: 0.0.0.0/0}", True),
        ("{cidr: 10.0.0.0/8}", True),
        ("{cidr: 0.0.0.0/0, except: [10.0.0.0/16]}", False),
        ("{cidr: 0.0.0.0/0, except: [10.0.0.1/32]}", False),
        ("{cidr: 10.0.0.1/32}", False),
        ("{cidr: '::/0'}", False),
    ],
)
def test_cidrs_that_contain_the_pod_network(block: str, warned: bool) -> None:  # noqa: FBT001 - a table
    """Only a CIDR with all pods of its family in it, and only when they are not excepted."""
    slugs = _slugs(_kubernetes(f"{{ingress: [{{from: [{{ipBlock: {block}}}]}}]}}"))
    assert slugs == ([("contains-pods", "spec.ingress[0]")] if warned else [])


def test_pods_that_a_cidr_excepts_are_not_counted() -> None:
    """The connections that the warning calls allowed are those that the CIDR allows."""
    third = "{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: 'n'}, status: {podIP: 10.0.0.3}}\n---\n"
    block = "{cidr: 10.0.0.0/8, except: [10.0.0.3/32]}"
    (problem,) = _lint(third + _kubernetes(f"{{ingress: [{{from: [{{ipBlock: {block}}}]}}]}}"))
    assert "contains the addresses of 2 of the 3 pods given, so it allows them too" in problem.message


def test_denying_everything_is_no_mistake() -> None:
    """A Deny of all addresses is meant to hold for pods too."""
    assert _slugs(_global("{ingress: [{action: Deny, source: {nets: [0.0.0.0/0]}}]}")) == []


@pytest.mark.parametrize(
    ("policies", "warned"),
    [
        # inside one policy
        (_global("{ingress: [{action: Deny}, {action: Allow, protocol: TCP}]}"), ["spec.ingress[1]"]),
        (_global("{ingress: [{action: Log}, {action: Allow, protocol: TCP}]}"), []),
        (_global("{ingress: [{action: Pass}, {action: Allow, protocol: TCP}]}"), ["spec.ingress[1]"]),
        (_global("{ingress: [{action: Allow, protocol: TCP}, {action: Deny}]}"), []),
        (_kubernetes("{ingress: [{ports: [{port: 80, endPort: 90}]}, {ports: [{port: 85}]}]}"), ["spec.ingress[1]"]),
        (_kubernetes("{ingress: [{ports: [{port: 80, endPort: 90}]}, {ports: [{port: 85}, {port: 91}]}]}"), []),
        # between policies of one tier
        (
            _global("{order: 1, ingress: [{action: Deny}]}") + _global("{order: 2, ingress: [{action: Allow}]}", "h"),
            ["spec.ingress[0]"],
        ),
        (
            _global("{order: 2, ingress: [{action: Deny}]}") + _global("{order: 1, ingress: [{action: Allow}]}", "h"),
            ["spec.ingress[0]"],
        ),
        (
            _global("{order: 1, selector: app == 'a', ingress: [{action: Deny}]}")
            + _global("{order: 2, ingress: [{action: Allow}]}", "h"),
            [],
        ),
        (
            _global("{order: 1, types: [Egress], ingress: [{action: Deny}]}")
            + _global("{order: 2, ingress: [{action: Allow}]}", "h"),
            [],
        ),
        # staged policies decide nothing; Kubernetes policies have no order
        (
            _global("{order: 1, ingress: [{action: Deny}]}", kind="StagedGlobalNetworkPolicy")
            + _global("{order: 2, ingress: [{action: Allow}]}", "h"),
            [],
        ),
        (_kubernetes("{ingress: [{}]}", "p") + _kubernetes("{ingress: [{}]}", "q"), []),
        (_global("{order: 1, ingress: [{action: Allow}]}") + _kubernetes("{ingress: [{}]}"), ["spec.ingress[0]"]),
        # host stages are apart
        (
            _global("{order: 1, ingress: [{action: Deny}]}")
            + _global("{order: 2, applyOnForward: true, ingress: [{action: Allow}]}", "h"),
            [],
        ),
    ],
)
def test_rules_that_are_never_reached(policies: str, warned: list[str]) -> None:
    """A rule is shadowed when all it matches is surely decided before it."""
    problems = [problem for problem in _lint(policies) if problem.slug == "shadowed-rule"]
    assert [problem.path for problem in problems] == warned


def test_shadows_from_earlier_tiers() -> None:
    """An Allow or Deny of an earlier tier is final; a Pass only leaves its own tier."""
    tier = "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: t}, spec: {order: 1}}\n---\n"
    later = _global("{ingress: [{action: Allow}]}", "h")
    (problem,) = _lint(tier + _global("{tier: t, ingress: [{action: Deny}]}") + later)
    assert (
        problem.message
        == "is never reached: all it matches is decided by rule 0 (deny) of GlobalNetworkPolicy/g at the latest"
    )
    assert problem.obj == "GlobalNetworkPolicy/h"
    assert _slugs(tier + _global("{tier: t, ingress: [{action: Pass}]}") + later) == []


@pytest.mark.parametrize(
    ("guard", "later", "is_shadowed"),
    [
        ("{action: Pass, protocol: TCP, destination: {ports: [80]}}, {action: Deny}", "{ports: [{port: 80}]}", False),
        ("{action: Pass, protocol: TCP, destination: {ports: [80]}}, {action: Deny}", "{ports: [{port: 81}]}", True),
        ("{action: Pass, protocol: UDP}, {action: Allow}", "{ports: [{port: 80}]}", True),
        (
            "{action: Pass, source: {nets: [10.0.0.0/8]}}, {action: Deny}",
            "{from: [{ipBlock: {cidr: 10.1.0.0/16}}]}",
            False,
        ),
        (
            "{action: Pass, source: {nets: [10.0.0.0/8]}}, {action: Deny}",
            "{from: [{ipBlock: {cidr: 11.1.0.0/16}}]}",
            True,
        ),
        (
            "{action: Pass, source: {selector: has(x)}}, {action: Deny}",
            "{from: [{podSelector: {matchLabels: {app: a}}}]}",
            False,
        ),
        ("{action: Deny}, {action: Pass}", "{ports: [{port: 80}]}", True),
    ],
)
def test_a_pass_of_an_earlier_tier_hands_packets_on(guard: str, later: str, is_shadowed: bool) -> None:  # noqa: FBT001
    """What it matches never meets the rest of its tier, in the same policy or in another one."""
    tier = "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: t}, spec: {order: 1}}\n---\n"
    rules = guard.replace("}, {action", "}|{action").split("|")
    whole = _global(f"{{tier: t, ingress: [{guard}]}}")
    split = "".join(
        _global(f"{{tier: t, order: {order}, selector: all(), ingress: [{rule}]}}", f"g{order}")
        for order, rule in enumerate(rules)
    )
    for policies in (whole, split):
        problems = _lint(tier + policies + _kubernetes(f"{{ingress: [{later}]}}"))
        warned = [problem.obj for problem in problems if problem.obj.startswith("NetworkPolicy")]
        assert warned == (["NetworkPolicy/n/p"] if is_shadowed else [])


def test_what_is_staged_is_held_against_what_would_be_enforced() -> None:
    """A namesake that it replaces or deletes shadows no staged policy; one that stays does; a staged Pass hands on."""
    old = _global("{order: 1, ingress: [{action: Deny, protocol: TCP}]}", "old")
    new = _global("{order: 2, ingress: [{action: Allow, protocol: TCP}]}", "new", "StagedGlobalNetworkPolicy")
    tier = "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: t}, spec: {order: 1}}\n---\n"
    for policies, warned in (
        (old + new, ["StagedGlobalNetworkPolicy/new"]),
        (old + new + _global("{stagedAction: Delete}", "old", "StagedGlobalNetworkPolicy"), []),
        (
            old
            + new
            + _global("{order: 3, ingress: [{action: Deny, protocol: UDP}]}", "old", "StagedGlobalNetworkPolicy"),
            [],
        ),
        (
            tier
            + _global("{tier: t, order: 2, ingress: [{action: Deny}]}", "shut")
            + _global("{tier: t, order: 1, ingress: [{action: Pass}]}", "hand-on", "StagedGlobalNetworkPolicy")
            + new,
            [],
        ),
    ):
        assert [problem.obj for problem in _lint(policies) if problem.slug == "shadowed-rule"] == warned


def test_equal_priorities() -> None:
    """The API leaves the order open, per tier."""

    def policy(name: str, tier: str, priority: int) -> str:
        return (
            "{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, "
            f"metadata: {{name: {name}}}, spec: {{tier: {tier}, priority: {priority}, subject: {{namespaces: {{}}}}}}}}\n---\n"
        )

    (problem,) = _lint(
        policy("a", "Admin", 5) + policy("b", "Admin", 5) + policy("c", "Admin", 6) + policy("d", "Baseline", 5)
    )
    assert (problem.slug, problem.obj, problem.path) == ("equal-priority", "ClusterNetworkPolicy/b", "spec.priority")
    assert "ClusterNetworkPolicy/a has the same priority 5" in problem.message


def test_missing_profiles() -> None:
    """A namespace that is not given is said once, at the first of its pods; so is a missing Profile."""
    pods = "".join(f"{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: m}}}}\n---\n" for name in "xw")
    host = (
        "{apiVersion: projectcalico.org/v3, kind: HostEndpoint, metadata: {name: h}, "
        "spec: {node: 'n', interfaceName: eth0, profiles: [p]}}\n---\n"
    )
    problems = _lint(pods + host)
    assert [(problem.slug, problem.obj) for problem in problems] == [
        ("missing-profile", "Pod/m/x"),
        ("missing-profile", "HostEndpoint/h"),
    ]
    assert problems[0].message == "the Namespace m is not among the objects given, so what no policy decides is denied"


def test_warnings_are_in_order_and_carry_lines() -> None:
    """File, line, then path."""
    problems = _lint(_global("{selector: app == 'z',\n ingress: [{action: Deny},\n {action: Allow}]}"))
    assert [(problem.location.line, problem.slug) for problem in problems] == [
        (17, "selects-nothing"),
        (19, "shadowed-rule"),
    ]
    assert {problem.severity for problem in problems} == {"warning"}
