# SPDX-License-Identifier: Apache-2.0
"""Which policies select which local endpoints.

Invariant: both directions of the answer agree with testing every policy's subject on every local endpoint's labels; other
endpoints are not held here at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.policy.types import EndpointKey, PolicyKey
from netpol_ebpf.selector import Selector, SelectorIndex


class Subjects:
    """Policies by key, local endpoints by key."""

    def __init__(self) -> None:
        self._index: SelectorIndex[PolicyKey, EndpointKey] = SelectorIndex()
        self._selectors: dict[PolicyKey, Selector] = {}
        self._labels: dict[EndpointKey, dict[str, str]] = {}
        self.policies_of: dict[EndpointKey, frozenset[PolicyKey]] = {}
        self._endpoints_of: dict[PolicyKey, frozenset[EndpointKey]] = {}

    def endpoints_of(self, policy: PolicyKey) -> frozenset[EndpointKey]:
        """Local endpoints that a policy selects."""
        return self._endpoints_of.get(policy, frozenset())

    def set_policy(self, policy: PolicyKey, subject: Selector | None, journal: Journal) -> None:
        """Add or change a policy's subject; None removes it."""
        before = self._selectors.get(policy)
        if before == subject:
            return
        journal.on_rollback(lambda: self._restore_selector(policy, before))
        if subject is None:
            self._index.remove_selector(policy)
            journal.pop(self._selectors, policy)
            selected: frozenset[EndpointKey] = frozenset()
        else:
            selected = frozenset(self._index.add_selector(policy, subject))
            journal.put(self._selectors, policy, subject)
        known = self.endpoints_of(policy)
        for endpoint in known - selected:
            journal.put(self.policies_of, endpoint, self.policies_of[endpoint] - {policy})
        for endpoint in selected - known:
            journal.put(self.policies_of, endpoint, self.policies_of[endpoint] | {policy})
        if selected:
            journal.put(self._endpoints_of, policy, selected)
        elif known:
            journal.pop(self._endpoints_of, policy)

    def set_endpoint(self, endpoint: EndpointKey, labels: Mapping[str, str] | None, journal: Journal) -> None:
        """Add or change a local endpoint's labels; None removes it."""
        before = self._labels.get(endpoint)
        wanted = None if labels is None else dict(labels)
        if before == wanted:
            return
        journal.on_rollback(lambda: self._restore_labels(endpoint, before))
        known = self.policies_of.get(endpoint, frozenset())
        if wanted is None:
            self._index.remove_labels(endpoint)
            journal.pop(self._labels, endpoint)
            journal.pop(self.policies_of, endpoint)
            selecting: frozenset[PolicyKey] = frozenset()
        else:
            selecting = frozenset(self._index.add_labels(endpoint, wanted))
            journal.put(self._labels, endpoint, wanted)
            journal.put(self.policies_of, endpoint, selecting)
        for policy in known - selecting:
            left = self._endpoints_of[policy] - {endpoint}
            if left:
                journal.put(self._endpoints_of, policy, left)
            else:
                journal.pop(self._endpoints_of, policy)
        for policy in selecting - known:
            journal.put(self._endpoints_of, policy, self.endpoints_of(policy) | {endpoint})

    def _restore_selector(self, policy: PolicyKey, selector: Selector | None) -> None:
        if selector is None:
            self._index.remove_selector(policy)
        else:
            self._index.add_selector(policy, selector)

    def _restore_labels(self, endpoint: EndpointKey, labels: dict[str, str] | None) -> None:
        if labels is None:
            self._index.remove_labels(endpoint)
        else:
            self._index.add_labels(endpoint, labels)
