# SPDX-License-Identifier: Apache-2.0
"""Translates the policies of policy.networking.k8s.io into policies of tiers that end in Pass.

ClusterNetworkPolicy, the newer kind, has the tiers kube-admin and kube-baseline.  AdminNetworkPolicy has its own tier
directly after kube-admin, BaselineAdminNetworkPolicy directly after kube-baseline.  Upstream does not define the order
of new and old kinds (SEMANTICS 3.5).

Invariants: a direction without rules has no effect.  Subjects, and peers selected by namespaces or pods, are Kubernetes
pods only.  A peer or port of a type that is not known fails closed (SEMANTICS 1.14): an Accept rule with an unknown
peer or port matches nothing, not even its known peers and ports; a Deny or Pass rule with an unknown peer or port
denies everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Union

from netpol_ebpf.policy.translate.composition import (
    IS_POD,
    NAMESPACE_PREFIX,
    from_label_selector,
    make_ports,
    namespace_selector,
    pods,
)
from netpol_ebpf.policy.types import ANY_ENTITY, Action, Direction, Entity, Policy, PolicyKey, PolicyTier, Ports, Rule
from netpol_ebpf.resources.sharing import share
from netpol_ebpf.resources.types import (
    AdminNetworkPolicy,
    BaselineAdminNetworkPolicy,
    ClusterNetworkPolicy,
    LabelSelector,
    SigPeer,
    SigPort,
    SigRule,
    SigSubject,
)
from netpol_ebpf.selector import Selector, all_of, equals, has, negate

KUBE_ADMIN = PolicyTier("kube-admin", 1000.0, Action.PASS)
KUBE_BASELINE = PolicyTier("kube-baseline", 10_000_000.0, Action.PASS)
OLD_ADMIN = replace(KUBE_ADMIN, name="adminnetworkpolicy", follows=KUBE_ADMIN.name)
OLD_BASELINE = replace(KUBE_BASELINE, name="baselineadminnetworkpolicy", follows=KUBE_BASELINE.name)

BASELINE_ORDER = 1000.0
"""The order of the only BaselineAdminNetworkPolicy in its tier (SEMANTICS 1.8)."""

_ACTIONS = {"Allow": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS}

SigPolicy = Union[ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy]

LabelValues = tuple[Union[str, None], ...]
"""The values of some label keys on one namespace; None for a label that the namespace lacks."""

DistinctValues = Callable[[tuple[str, ...]], Iterable[LabelValues]]
"""Maps label keys to the distinct combinations of their values on existing namespaces."""


def translate_cluster_policy(key: PolicyKey, policy: ClusterNetworkPolicy, distinct_values: DistinctValues) -> Policy:
    """The translation of a ClusterNetworkPolicy. ``distinct_values``: see `_policy`."""
    tier = KUBE_BASELINE if policy.tier == "Baseline" else KUBE_ADMIN
    return _policy(key, policy, tier, float(policy.priority), distinct_values)


def translate_admin_policy(key: PolicyKey, policy: AdminNetworkPolicy, distinct_values: DistinctValues) -> Policy:
    """The translation of an AdminNetworkPolicy, which is evaluated before the user's tiers.

    ``distinct_values``: see `_policy`.
    """
    return _policy(key, policy, OLD_ADMIN, float(policy.priority), distinct_values)


def translate_baseline_policy(
    key: PolicyKey, policy: BaselineAdminNetworkPolicy, distinct_values: DistinctValues
) -> Policy:
    """The translation of a BaselineAdminNetworkPolicy, which is evaluated after the user's tiers.

    ``distinct_values``: see `_policy`.
    """
    return _policy(key, policy, OLD_BASELINE, BASELINE_ORDER, distinct_values)


def _policy(
    key: PolicyKey, policy: SigPolicy, tier: PolicyTier, order: float, distinct_values: DistinctValues
) -> Policy:
    """Translate a ClusterNetworkPolicy, AdminNetworkPolicy or BaselineAdminNetworkPolicy.

    ``tier``, ``order``: tier and order of the result.
    ``distinct_values``: called only with keys that `related_keys` returned for the policy.
    """
    types = {Direction.INGRESS: policy.ingress, Direction.EGRESS: policy.egress}
    return Policy(
        key=key,
        tier=tier.name,
        order=order,
        subject=_subject(policy.subject),
        types=share(frozenset(direction for direction, rules in types.items() if rules)),
        ingress=tuple(_rules(policy.ingress, Direction.INGRESS, distinct_values)),
        egress=tuple(_rules(policy.egress, Direction.EGRESS, distinct_values)),
        location=policy.meta.location,
    )


def related_keys(policy: SigPolicy) -> frozenset[tuple[str, ...]]:
    """The namespace label keys of the policy's sameLabels and notSameLabels peers, one tuple for each peer.

    Such a peer compares the labels of a namespace with those of the subject's namespace, so the policy's translation
    depends on the values that namespaces have for these keys.
    """
    peers = [peer for rule in (*policy.ingress, *policy.egress) for peer in rule.peers]
    return frozenset(peer.same_labels or peer.not_same_labels for peer in peers if _is_related(peer))


def _subject(subject: SigSubject) -> Selector:
    if subject.pods is not None:
        return pods(_namespaces(subject.pods.namespace_selector), subject.pods.pod_selector)
    if subject.namespaces is None:
        raise AssertionError("a subject has one of its two fields")  # the parser checks this
    return pods(_namespaces(subject.namespaces), None)


def _namespaces(selector: LabelSelector) -> Selector:
    return namespace_selector(from_label_selector(selector))


def _rules(rules: tuple[SigRule, ...], direction: Direction, distinct_values: DistinctValues) -> Iterator[Rule]:
    for index, rule in enumerate(rules):
        action = _ACTIONS[rule.action]
        base = Rule(action, index, name=rule.name, location=rule.location)
        unknown = any(peer.unknown for peer in rule.peers) or any(port.unknown for port in rule.ports or ())
        if action is not Action.ALLOW and (unknown or any(peer.domain_names for peer in rule.peers)):
            yield replace(base, action=Action.DENY)
            continue
        if unknown:
            yield replace(base, source=Entity(impossible=True))
            continue
        for own, peer in _sides(rule.peers, distinct_values):
            for protocol, ports in _protocols(rule.ports):
                rule_of_both = replace(base, protocol=protocol)
                if direction is Direction.INGRESS:
                    yield replace(rule_of_both, source=peer, destination=replace(own, ports=ports))
                else:
                    yield replace(rule_of_both, source=own, destination=replace(peer, ports=ports))


def _sides(peers: Sequence[SigPeer], distinct_values: DistinctValues) -> Iterator[tuple[Entity, Entity]]:
    """For each peer: the subject's side and the peer's side.

    A sameLabels or notSameLabels peer gives one pair for each combination of label values on a namespace.
    """
    for peer in peers:
        if peer.domain_names:
            yield ANY_ENTITY, Entity(domains=frozenset(peer.domain_names))
        elif _is_related(peer):
            yield from _related_sides(peer, distinct_values)
        elif peer.nodes is not None:
            yield ANY_ENTITY, Entity(nodes=from_label_selector(peer.nodes))
        elif peer.networks:
            yield ANY_ENTITY, Entity(nets=peer.networks)
        elif peer.pods is not None:
            selector = pods(_namespaces(peer.pods.namespace_selector), peer.pods.pod_selector)
            yield ANY_ENTITY, Entity(selector=selector)
        elif peer.namespaces is not None:
            yield ANY_ENTITY, Entity(selector=pods(_namespaces(peer.namespaces), None))
        else:
            yield ANY_ENTITY, Entity(impossible=True)


def _is_related(peer: SigPeer) -> bool:
    return bool(peer.same_labels or peer.not_same_labels)


def _related_sides(peer: SigPeer, distinct_values: DistinctValues) -> Iterator[tuple[Entity, Entity]]:
    """The pairs of `_sides` for a sameLabels or notSameLabels peer.

    There is one pair for each combination of values that the label keys have on a namespace.  With sameLabels, the
    peer's namespace must have all the labels, with the values of the subject's namespace.  With notSameLabels, it must
    have all of them, and at least one must differ from the subject's.  A label that the subject's namespace lacks
    counts as different.
    """
    keys = peer.same_labels or peer.not_same_labels
    pod_selector = peer.pods.pod_selector if peer.pods is not None else None
    labels = [NAMESPACE_PREFIX + key for key in keys]
    for values in sorted(
        distinct_values(keys), key=lambda values: tuple((value is not None, value or "") for value in values)
    ):
        same = all_of(*map(_has_value, labels, values))
        if peer.same_labels:
            if None in values:
                continue
            other = same
        else:
            other = all_of(*map(has, labels))
            if None not in values:
                other = all_of(other, negate(same))
        yield Entity(selector=all_of(IS_POD, same)), Entity(selector=pods(other, pod_selector))


def _has_value(label: str, value: str | None) -> Selector:
    return negate(has(label)) if value is None else equals(label, value)


def _protocols(ports: tuple[SigPort, ...] | None) -> list[tuple[int | None, Ports | None]]:
    """Each protocol of ``ports`` with its ports; None as ports stands for all ports.

    A named port has no protocol, so it is returned with None as protocol, which stands for any protocol.
    """
    if ports is None:
        return [(None, None)]
    ranges: dict[int, list[tuple[int, int]]] = {}
    whole: set[int] = set()
    names: list[str] = []
    for port in ports:
        if port.named_port is not None or port.protocol is None:
            names.append(port.named_port or "")
        elif (port.first, port.last) == (0, 0):
            whole.add(port.protocol)
        else:
            ranges.setdefault(port.protocol, []).append((port.first, port.last))
    found: list[tuple[int | None, Ports | None]] = [
        (protocol, None if protocol in whole else make_ports(ranges[protocol], ()))
        for protocol in sorted(whole | ranges.keys())
    ]
    return [*found, (None, make_ports((), names))] if names else found
