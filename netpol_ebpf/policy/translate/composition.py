# SPDX-License-Identifier: Apache-2.0
"""The parts from which all policy kinds' effective selectors are built: labels, prefixes, selectors and ports.

Invariant: an effective selector is evaluated on an owner's labels alone, without the policy's namespace or kind
(SEMANTICS 2.5, 2.6).  The module of a policy kind decides which parts it combines.
"""

from __future__ import annotations

from collections.abc import Iterable

from netpol_ebpf.policy.types import PolicyKey, Ports
from netpol_ebpf.resources.types import LabelSelector, Requirement
from netpol_ebpf.selector import EVERYTHING, Selector, all_of, equals, has, is_in, negate, not_in

NAMESPACE = "projectcalico.org/namespace"
ORCHESTRATOR = "projectcalico.org/orchestrator"
SERVICE_ACCOUNT = "projectcalico.org/serviceaccount"
NAME = "projectcalico.org/name"
"""The label that has the name of a namespace or service account. Endpoints inherit the label with a prefix."""

MAX_PORT = 65535

NAMESPACE_PREFIX = "pcns."
SERVICE_ACCOUNT_PREFIX = "pcsa."
INHERITED_PREFIXES = (NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX)

HAS_NAMESPACE = has(NAMESPACE)
NO_NAMESPACE = negate(HAS_NAMESPACE)
HAS_SERVICE_ACCOUNT = has(SERVICE_ACCOUNT)
IS_POD = equals(ORCHESTRATOR, "k8s")
"""Confines selectors of Kubernetes policies to pods, so that they match no network set, host or foreign workload."""


def enforced_key(staged: PolicyKey) -> PolicyKey:
    """The key of the enforced policy that a staged policy replaces: same name, kind without ``Staged``."""
    return PolicyKey(staged.kind.removeprefix("Staged"), staged.namespace, staged.name)


def in_namespace(namespace: str) -> Selector:
    """Selects objects of one namespace."""
    return equals(NAMESPACE, namespace)


def from_label_selector(selector: LabelSelector) -> Selector:
    """The selector that means the same as a Kubernetes label selector. An empty label selector becomes ``all()``."""
    terms = [equals(key, selector.match_labels[key]) for key in sorted(selector.match_labels)]
    terms += [_from_requirement(requirement) for requirement in selector.match_expressions]
    return all_of(*terms) if terms else EVERYTHING


def _from_requirement(requirement: Requirement) -> Selector:
    if requirement.operator == "In":
        return is_in(requirement.key, requirement.values)
    if requirement.operator == "NotIn":
        return not_in(requirement.key, requirement.values)
    if requirement.operator == "Exists":
        return has(requirement.key)
    return negate(has(requirement.key))


def namespace_selector(selector: Selector) -> Selector:
    """A selector of namespace labels, rewritten for the labels that endpoints inherit from namespaces.

    Each ``all()`` becomes "has a namespace".
    """
    return selector.prefixed(NAMESPACE_PREFIX).with_all_as(HAS_NAMESPACE)


def service_account_selector(selector: Selector) -> Selector:
    """A selector of service-account labels, rewritten for the labels that endpoints inherit from service accounts.

    Each ``all()`` becomes "has a service account".
    """
    return selector.prefixed(SERVICE_ACCOUNT_PREFIX).with_all_as(HAS_SERVICE_ACCOUNT)


def pods(namespaces: Selector, pod_selector: LabelSelector | None) -> Selector:
    """Selects Kubernetes pods that ``pod_selector`` matches, in the namespaces that ``namespaces`` matches.

    ``namespaces``: an effective selector.
    ``pod_selector``: if None or empty, all pods of these namespaces are selected.
    """
    if pod_selector is None or pod_selector == LabelSelector():
        return all_of(IS_POD, namespaces)
    return all_of(IS_POD, namespaces, from_label_selector(pod_selector))


def merged_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The ranges in ascending order. Overlapping and adjacent ranges are merged."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def make_ports(ranges: Iterable[tuple[int, int]], names: Iterable[str]) -> Ports:
    """Ports in canonical form: equal sets of ports are equal values. A range beyond port 65535 ends at 65535."""
    clipped = ((first, min(last, MAX_PORT)) for first, last in ranges)
    return Ports(ranges=merged_ranges(clipped), names=tuple(sorted(set(names))))
