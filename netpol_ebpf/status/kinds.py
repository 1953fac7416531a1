# SPDX-License-Identifier: Apache-2.0
"""The kinds of policies as an API server has them, by their names in the policy model."""

from __future__ import annotations

from typing import NamedTuple

from netpol_ebpf.errors import UsageError
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.resources import calico, kubernetes, signetwork

_KUBERNETES = "KubernetesNetworkPolicy"
"""The policy model's name of networking.k8s.io's NetworkPolicy. In the model, NetworkPolicy is Calico's kind."""


class PolicyKind(NamedTuple):
    """A kind of policy at an API server."""

    api_version: str
    kind: str
    is_namespaced: bool

    @property
    def plural(self) -> str:
        """The plural name of the kind in API paths. The singular names of all kinds end in "Policy"."""
        return f"{self.kind.lower()[:-1]}ies"

    @property
    def group_path(self) -> str:
        """The API path at which the server lists the kinds of this apiVersion."""
        return f"/apis/{self.api_version}"

    def path(self, namespace: str, name: str) -> str:
        """The API path of one object."""
        where = f"/namespaces/{namespace}" if self.is_namespaced else ""
        return f"{self.group_path}{where}/{self.plural}/{name}"


POLICY_KINDS: dict[str, PolicyKind] = {
    _KUBERNETES if one in kubernetes.KINDS else one.kind: PolicyKind(one.api_version, one.kind, one.namespaced)
    for one in (*kubernetes.KINDS, *calico.KINDS, *signetwork.KINDS)
    if one.kind.endswith("NetworkPolicy")
}


def kind_at(path: str) -> PolicyKind | None:
    """The kind of the policy at an API path; None if the path is not that of a policy."""
    kinds = POLICY_KINDS.values()
    return next((one for one in kinds if path.startswith(f"{one.group_path}/") and f"/{one.plural}/" in path), None)


def parse_policy(text: str) -> PolicyKey:
    """Parse the name of a policy. Raises UsageError.

    The forms are NAMESPACE/NAME (a NetworkPolicy of Kubernetes), KIND/NAMESPACE/NAME, and KIND/NAME for kinds without
    namespaces.
    """
    first, *rest = text.split("/")
    kind, names = (first, rest) if first in POLICY_KINDS else (_KUBERNETES, [first, *rest])
    is_namespaced = POLICY_KINDS[kind].is_namespaced
    if len(names) != 1 + is_namespaced or not all(names):
        raise UsageError(
            f"{text}: expected NAMESPACE/NAME for a NetworkPolicy of Kubernetes, or KIND/NAMESPACE/NAME, or KIND/NAME for a "
            f"kind without namespaces; kinds: {', '.join(POLICY_KINDS)}"
        )
    return PolicyKey(kind, names[0] if is_namespaced else "", names[-1])
