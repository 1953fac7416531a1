# SPDX-License-Identifier: Apache-2.0
"""The policies that this node needs: which revision of each is in force, and why a newer one is not.

Invariant: a policy counts as in force only if its whole present spec is in the maps, and if each workload of this node
that it selects has the policy on its interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.errors import InvalidInputError, MapFullError, Problem
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.status.kinds import POLICY_KINDS
from netpol_ebpf.status.report import NodeStatus, Shortfall
from netpol_ebpf.status.standing import IN_FORCE, NodeStanding, Standing


class PoliciesInForce:
    """Compares the policies that the agent wants with those in force.

    Cost of `look`: linear in the cluster's policies.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._revisions: dict[PolicyKey, str] = {}  # in force, also while a newer revision is rejected

    def look(self) -> NodeStatus:
        """The status of this node now: which policies are in force, and why others are not."""
        agent = self._agent
        desired, actual = agent.objects.world.policies, agent.objects.world_in_force.policies
        pending = {key for key, one in desired.items() if actual.get(key) is not one and actual.get(key) != one}
        needed = agent.enforcement.selecting()
        for key in self._revisions.keys() - actual.keys():
            del self._revisions[key]
        for key in needed & actual.keys() - pending:
            self._revisions[key] = self._present(key)
        rejected, unenforced = self._rejected(pending, needed), self._unenforced()
        closed = {name for one in unenforced for name in one.policies}
        in_force = {str(key): revision for key in needed if (revision := self._revision(key, key in pending))}
        kept = {name: revision for name, revision in in_force.items() if name not in closed}
        return NodeStatus(kept, (*rejected, *unenforced), max(1, len(agent.objects.world.nodes)))

    def _revision(self, key: PolicyKey, is_pending: bool) -> str:  # noqa: FBT001 - private
        """The revision of a policy that is in force; "" if none is.

        The result is also "" if a rejected change affects the policy but not its spec. An example is a change of a
        namespace's labels.
        """
        revision = self._revisions.get(key, "")
        return "" if is_pending and revision == self._present(key) else revision

    def _present(self, key: PolicyKey) -> str:
        resource = self._agent.objects.derivation.get(key)
        return "" if resource is None else resource.meta.revision

    def _rejected(self, pending: set[PolicyKey], needed: set[PolicyKey]) -> list[Shortfall]:
        """The shortfalls for policies of a rejected change.

        Policies that select no endpoint of this node are left out.
        """
        rejected = self._agent.rejected.problem
        if rejected is None:
            return []
        labels = [one.labels for one in self._agent.objects.local.values()]
        policies = self._agent.objects.world.policies
        names = [
            str(key)
            for key in sorted(pending)
            if key in needed or any(policies[key].subject.matches(one) for one in labels)
        ]
        reason = "MapFull" if rejected.slug == MapFullError.slug else "LimitExceeded"
        return [Shortfall(reason, rejected.message, tuple(names))] if names else []

    def _unenforced(self) -> list[Shortfall]:
        """A shortfall for each endpoint on which policy is not enforced, with the endpoint's policies."""
        agent, found = self._agent, []
        problems: list[Problem] = [*agent.binder.problems, *agent.interfaces.conflicts(), *agent.unenforced()]
        messages = {one.obj: one.message for one in problems if one.severity == "error"}
        for key in sorted(agent.enforcement.tables.endpoints):
            ifindex = agent.interfaces.located.get(key)
            if ifindex is not None and ifindex not in agent.attachments.interfaces:
                messages.setdefault(str(key), "its interface has no programs")
            names = tuple(map(str, agent.enforcement.policies_of(key))) if str(key) in messages else ()
            if names:
                found.append(Shortfall("NotEnforced", f"{key}: {messages[str(key)]}", names))
        return found


def standing_here(agent: Agent, request: Mapping[str, Any]) -> dict[str, Any]:
    """The standing of one policy on this node, for `netpolctl status --policy --local`.

    ``request``: its field ``key`` names the policy, see `PolicyKey`. Raises InvalidInputError if no source has the
    policy.
    """
    key = _key(request)
    fault = _fault(agent, key)
    policy = agent.objects.world.policies.get(key)
    if policy is None and not fault:
        raise InvalidInputError(f"no source of this agent has a policy {key}", hint="See `netpolctl check`.")
    resource = agent.objects.derivation.get(key)
    generation = int((resource.meta.revision if resource is not None else "").rpartition("/")[2] or 0)
    labels = [one.labels for one in agent.objects.local.values()]
    is_needed = key in agent.enforcement.selecting() or (
        policy is not None and any(policy.subject.matches(one) for one in labels)
    )
    nodes: tuple[NodeStanding, ...] = ()
    if is_needed and not fault:
        shortfalls = PoliciesInForce(agent).look().shortfalls
        short = next((one for one in shortfalls if str(key) in one.policies), None)
        reason, message = (IN_FORCE, "") if short is None else (short.reason, short.message)
        nodes = (NodeStanding(agent.settings.node or "this node", reason, message, generation if short is None else 0),)
    return Standing(str(key), generation, nodes, fault).as_dict()


def _key(request: Mapping[str, Any]) -> PolicyKey:
    parts = request.get("key")
    if (
        not isinstance(parts, list)
        or len(parts) != len(PolicyKey._fields)
        or not all(isinstance(one, str) for one in parts)
    ):
        raise InvalidInputError("the request has no key of a policy: kind, namespace and name")
    return PolicyKey(*parts)


def _fault(agent: Agent, key: PolicyKey) -> str:
    """Why the newest state of a policy is not valid; "" if it is valid."""
    kind = POLICY_KINDS.get(key.kind)
    name = "/".join(part for part in (key.kind if kind is None else kind.kind, key.namespace, key.name) if part)
    for one in agent.objects.source_problems:
        is_ours = one.obj == name and one.severity == "error" and one.slug != "kept"
        # Calico's NetworkPolicy and that of Kubernetes have the same name in problems; only paths of a server differ.
        if is_ours and (
            kind is None or not one.location.file.startswith("/apis/") or kind.group_path in one.location.file
        ):
            return f"{one.path}: {one.message}" if one.path else one.message
    return ""
