# SPDX-License-Identifier: Apache-2.0
"""The policies that select each local endpoint, and the local endpoints that each policy selects.

Invariant: both results are the same as if the selector of every policy were tested on the labels of every local
endpoint.  Endpoints of other nodes are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.policy.types import EndpointKey, PolicyKey
from netpol_ebpf.selector import Selector, SelectorIndex


class Subjects:
    """The index between policies and the local endpoints that they select."""

    def __init__(self) -> None:
        self._index: SelectorIndex[PolicyKey, EndpointKey] = SelectorIndex()
        self._selectors: dict[PolicyKey, Selector] = {}
        self._labels: dict[EndpointKey, dict[str, str]] = {}
        self._policies_of: dict[EndpointKey, set[PolicyKey]] = {}
        self._endpoints_of: dict[PolicyKey, set[EndpointKey]] = {}

    def endpoints_of(self, policy: PolicyKey) -> AbstractSet[EndpointKey]:
        """The local endpoints that a policy selects. The result is valid until the next change."""
        return self._endpoints_of.get(policy, set())

    def policies_of(self, endpoint: EndpointKey) -> AbstractSet[PolicyKey]:
        """The policies that select a local endpoint. The result is valid until the next change."""
        return self._policies_of.get(endpoint, set())

    def selecting(self) -> set[PolicyKey]:
        """The policies that select a local endpoint, as a new set."""
        return {policy for policy, endpoints in self._endpoints_of.items() if endpoints}

    def set_policy(self, policy: PolicyKey, subject: Selector | None, journal: Journal) -> None:
        """Add a policy, or change the selector of its subject. ``subject`` None removes the policy."""
        before = self._selectors.get(policy)
        if before == subject:
            return
        journal.on_rollback(lambda: self._restore_selector(policy, before))
        if subject is None:
            self._index.remove_selector(policy)
            journal.pop(self._selectors, policy)
            selected: set[EndpointKey] = set()
        else:
            selected = self._index.add_selector(policy, subject)
            journal.put(self._selectors, policy, subject)
        known = set(self.endpoints_of(policy))
        for endpoint in known - selected:
            self._unlink(policy, endpoint, journal)
        for endpoint in selected - known:
            self._link(policy, endpoint, journal)

    def set_endpoint(self, endpoint: EndpointKey, labels: Mapping[str, str] | None, journal: Journal) -> None:
        """Add a local endpoint, or change its labels. ``labels`` None removes the endpoint."""
        before = self._labels.get(endpoint)
        wanted = None if labels is None else dict(labels)
        if before == wanted:
            return
        journal.on_rollback(lambda: self._restore_labels(endpoint, before))
        known = set(self.policies_of(endpoint))
        if wanted is None:
            self._index.remove_labels(endpoint)
            journal.pop(self._labels, endpoint)
            selecting: set[PolicyKey] = set()
        else:
            selecting = self._index.add_labels(endpoint, wanted)
            journal.put(self._labels, endpoint, wanted)
        for policy in known - selecting:
            self._unlink(policy, endpoint, journal)
        for policy in selecting - known:
            self._link(policy, endpoint, journal)

    def _link(self, policy: PolicyKey, endpoint: EndpointKey, journal: Journal) -> None:
        journal.add_to(self._policies_of, endpoint, policy)
        journal.add_to(self._endpoints_of, policy, endpoint)

    def _unlink(self, policy: PolicyKey, endpoint: EndpointKey, journal: Journal) -> None:
        journal.discard_from(self._policies_of, endpoint, policy)
        journal.discard_from(self._endpoints_of, policy, endpoint)

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
