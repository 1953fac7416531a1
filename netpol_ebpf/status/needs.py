# SPDX-License-Identifier: Apache-2.0
"""The nodes that need each policy, kept up to date while policies and endpoints of a whole cluster change.

A node needs a policy if the policy selects an endpoint of the node. Endpoints with equal labels form a group, which
counts its endpoints on each node. So the cost of a policy for all pods grows with the number of groups, not of pods.

Invariant: the result is the same as if each policy's subject were tested on each running endpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from netpol_ebpf.policy.types import Endpoint, EndpointKey, Policy, PolicyKey
from netpol_ebpf.selector import SelectorIndex

_Labels = frozenset[tuple[str, str]]


def needs_policy(endpoint: Endpoint) -> bool:
    """Whether a node must enforce policy for an endpoint.

    True for a host endpoint that is on a node, and for a workload that is on a node and has an address. The address
    shows that the workload runs.
    """
    return endpoint.node is not None and (bool(endpoint.addresses) or endpoint.interface is not None)


def nodes_needing(policy: Policy, endpoints: Iterable[Endpoint]) -> set[str]:
    """The nodes that need one policy. Cost: linear in the number of endpoints."""
    found = (one.node for one in endpoints if needs_policy(one) and policy.subject.matches(one.labels))
    return {node for node in found if node is not None}


@dataclass(slots=True)
class Needs:
    """The nodes that need each of many policies."""

    _index: SelectorIndex[PolicyKey, _Labels] = field(default_factory=SelectorIndex)
    _nodes: dict[_Labels, Counter[str]] = field(default_factory=dict)
    _places: dict[EndpointKey, tuple[_Labels, str]] = field(default_factory=dict)

    def set_policy(self, key: PolicyKey, policy: Policy | None) -> None:
        """Add or change a policy; None removes it."""
        if policy is None:
            self._index.remove_selector(key)
        else:
            self._index.add_selector(key, policy.subject)

    def set_endpoint(self, key: EndpointKey, endpoint: Endpoint | None) -> None:
        """Add or change an endpoint; None removes it."""
        old = self._places.pop(key, None)
        if endpoint is not None and endpoint.node is not None and needs_policy(endpoint):
            labels = frozenset(endpoint.labels.items())
            self._places[key] = (labels, endpoint.node)
            if labels not in self._nodes:
                self._index.add_labels(labels, endpoint.labels)
                self._nodes[labels] = Counter()
            self._nodes[labels][endpoint.node] += 1
        if old is not None:
            self._forget(*old)

    def nodes(self, key: PolicyKey) -> set[str]:
        """The nodes that need a policy, as a new set. Raises KeyError for an unknown policy."""
        found: set[str] = set()
        return found.union(*(self._nodes[labels] for labels in self._index.matching_labels(key)))

    def _forget(self, labels: _Labels, node: str) -> None:
        """Subtract one endpoint from its group; remove the group with its last endpoint."""
        counts = self._nodes[labels]
        counts[node] -= 1
        if not counts[node]:
            del counts[node]
        if not counts:
            del self._nodes[labels]
            self._index.remove_labels(labels)
