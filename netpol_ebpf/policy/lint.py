# SPDX-License-Identifier: Apache-2.0
"""Warnings about valid policies with an effect that is probably not intended.

A warning depends on the whole cluster's state, not on one object.  Each warning concerns one policy and states an
effect; no warning is about style.  A warning that depends on the cluster's endpoints (such as "selects nothing") is
given only if the input has endpoints.  Warnings are not errors and change no verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.lint_names import NameLinter
from netpol_ebpf.policy.shadows import KUBERNETES, Shadows
from netpol_ebpf.policy.translate import derive, key_of
from netpol_ebpf.policy.types import (
    Action,
    Direction,
    EndpointKey,
    EndpointKind,
    Entity,
    IPAddress,
    Policy,
    PolicyKey,
    Rule,
    Staged,
    World,
)
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.selector import SelectorIndex

_WITH_PRIORITY = ("ClusterNetworkPolicy", "AdminNetworkPolicy")
_MIN_PODS = 2  # if a CIDR contains only one pod, the author may mean that pod


def lint(resources: Iterable[Resource]) -> list[Problem]:
    """All warnings about the cluster that consists of ``resources``, sorted by file and line."""
    given = list(resources)
    world = derive(given)
    problems = [*_Linter(world).problems(), *_missing_profiles(given, world)]
    problems.sort(key=lambda problem: (problem.location.file, problem.location.line, problem.path))
    return problems


def shown_name(key: PolicyKey) -> str:
    """A policy's name as its author writes it: ``kind/namespace/name`` with the kind of the API."""
    kind = "NetworkPolicy" if key.kind == "KubernetesNetworkPolicy" else key.kind
    return "/".join(part for part in (kind, key.namespace, key.name) if part)


@dataclass(frozen=True, slots=True)
class _Warning:
    """A warning without the name of its policy.

    ``path``: the field that the warning concerns.
    ``location``: the location of the rule that the warning concerns; None if the warning concerns the whole policy.
    """

    path: str
    message: str
    slug: str
    location: Location | None = None


class _Linter:
    def __init__(self, world: World) -> None:
        self.world = world
        self.selected = self._selected_endpoints()
        self.pod_addresses: dict[int, set[IPAddress]] = defaultdict(set)
        for endpoint in world.endpoints.values():
            if endpoint.kind is EndpointKind.WORKLOAD:
                for address in endpoint.addresses:
                    self.pod_addresses[address.version].add(address)

    def _selected_endpoints(self) -> dict[PolicyKey, set[EndpointKey]]:
        """The endpoints to which each policy applies."""
        index: SelectorIndex[PolicyKey, EndpointKey] = SelectorIndex()
        hosts = set()
        for key, endpoint in self.world.endpoints.items():
            index.add_labels(key, endpoint.labels)
            if endpoint.kind is EndpointKind.HOST:
                hosts.add(key)
        selected = {}
        for policy in self.world.policies.values():
            if policy.staged is not Staged.DELETE:
                keys = index.add_selector(policy.key, policy.subject)
                selected[policy.key] = keys & hosts if policy.do_not_track or policy.pre_dnat else keys
        return selected

    def problems(self) -> Iterator[Problem]:
        """Every warning, in no particular order."""
        shadows, names = Shadows(self.world), NameLinter(self.world, self.selected)
        for policy in self.world.policies.values():
            if policy.staged is Staged.DELETE:
                continue
            for warning in (
                *self._of_policy(policy),
                *self._of_rules(policy),
                *_of_shadows(policy, shadows),
                *self._of_names(policy, names),
            ):
                location = warning.location or policy.location or Location("")
                yield Problem(
                    location,
                    warning.path,
                    warning.message,
                    obj=shown_name(policy.key),
                    severity="warning",
                    slug=warning.slug,
                )
        yield from self._equal_priorities()
        too_many = names.of_world()
        if too_many is not None:
            yield Problem(Location(""), "", too_many, severity="warning", slug="too-many-names")

    def _of_names(self, policy: Policy, names: NameLinter) -> Iterator[_Warning]:
        """One warning for each distinct message of `NameLinter` about a user rule or the policy."""
        said: set[tuple[int, str]] = set()
        for warning in names.of_policy(policy):
            index = -1 if warning.rule is None else warning.rule.index
            if (index, warning.message) not in said:
                said.add((index, warning.message))
                path = "spec.egress" if warning.rule is None else f"spec.egress[{index}]"
                location = None if warning.rule is None else warning.rule.location
                yield _Warning(path, warning.message, warning.slug, location)

    # --- the policy as a whole --------------------------------------------------------------------------------------

    def _of_policy(self, policy: Policy) -> Iterator[_Warning]:
        if policy.subject.is_unsatisfiable():
            yield _Warning(
                "spec", "its selector contradicts itself, so it can never select anything", "impossible-selector"
            )
        elif self.world.endpoints and not self.selected[policy.key]:
            what = "host endpoint" if policy.do_not_track or policy.pre_dnat else "endpoint"
            yield _Warning("spec", f"it selects no {what} of those given, so it has no effect", "selects-nothing")
        if policy.tier not in self.world.tiers:
            yield _Warning(
                "spec.tier",
                f"the tier {policy.tier} does not exist: such policies come after all others, and what they do not allow "
                "is denied",
                "missing-tier",
            )
        yield from self._log_only(policy)

    def _log_only(self, policy: Policy) -> Iterator[_Warning]:
        """Warn if the policy has Log rules only.

        Such a policy still isolates its endpoints, because the tier denies at its end what no rule decides.
        """
        tier = self.world.tiers.get(policy.tier)
        if policy.pre_dnat or policy.do_not_track or tier is None or tier.default_action is not Action.DENY:
            return
        for direction in sorted(policy.types, key=lambda direction: direction.value):
            rules = policy.rules(direction)
            if rules and all(rule.action is Action.LOG for rule in rules):
                yield _Warning(
                    f"spec.{direction.value}",
                    f"has only Log rules; but since the policy applies, the tier {policy.tier} ends in deny for the endpoints "
                    f"it selects. Add a rule with action Pass at the end to log and change nothing",
                    "log-only",
                    rules[0].location,
                )

    def _equal_priorities(self) -> Iterator[Problem]:
        """Warn about SIG-network policies with equal priorities, because the API does not define their order."""
        first: dict[tuple[str, float], Policy] = {}
        for policy in sorted(self.world.policies.values(), key=lambda policy: policy.sort_key):
            if policy.key.kind not in _WITH_PRIORITY:
                continue
            other = first.setdefault((policy.tier, policy.order), policy)
            if other is not policy:
                yield Problem(
                    policy.location or Location(""),
                    "spec.priority",
                    f"{shown_name(other.key)} has the same priority {policy.order:.0f}; where both apply, the API leaves open "
                    "which comes first (here it is the one whose name sorts first)",
                    obj=shown_name(policy.key),
                    severity="warning",
                    slug="equal-priority",
                )

    # --- single rules -----------------------------------------------------------------------------------------------

    def _of_rules(self, policy: Policy) -> Iterator[_Warning]:
        for direction in policy.types:
            said: set[tuple[int, str]] = set()  # one user rule may become several internal rules
            for rule in policy.rules(direction):
                for slug, message in self._of_rule(policy, direction, rule):
                    if (rule.index, message) in said:
                        continue
                    said.add((rule.index, message))
                    yield _Warning(f"spec.{direction.value}[{rule.index}]", message, slug, rule.location)

    def _of_rule(self, policy: Policy, direction: Direction, rule: Rule) -> Iterator[tuple[str, str]]:
        if rule.unsupported:
            yield "unsupported", f"needs {rule.unsupported}, which is not enforced yet, so this rule matches nothing"
            return
        for side, entity in (("source", rule.source), ("destination", rule.destination)):
            for selector in (entity.selector, entity.nodes):
                if selector is not None and selector.is_unsatisfiable():
                    yield "impossible-selector", f"its {side} selector contradicts itself, so this rule matches nothing"
        peer = rule.source if direction is Direction.INGRESS else rule.destination
        if rule.action is Action.ALLOW and not peer.selector and not peer.nodes:
            yield from self._pod_network(peer)
        yield from self._named_ports(policy, direction, rule)

    def _pod_network(self, peer: Entity) -> Iterator[tuple[str, str]]:
        """Warn about CIDRs that contain the pod network, because they match all pods.

        Often the author intended only addresses outside the cluster.
        """
        for net in peer.nets:
            pods = self.pod_addresses[net.version]
            allowed = sum(not any(address in one for one in peer.not_nets) for address in pods)
            if allowed < _MIN_PODS or not all(address in net for address in pods):
                continue
            which = f"all {allowed}" if allowed == len(pods) else f"{allowed} of the {len(pods)}"
            yield (
                "contains-pods",
                f"{net} contains the addresses of {which} pods given, so it allows them too; if only the world outside is "
                "meant, except the pod network",
            )

    def _named_ports(self, policy: Policy, direction: Direction, rule: Rule) -> Iterator[tuple[str, str]]:
        """Warn about named ports of ingress rules that no selected endpoint declares.

        The destination of ingress is the selected endpoint, so such a port matches nothing.
        """
        ports = rule.destination.ports
        selected = self.selected[policy.key]
        if direction is not Direction.INGRESS or ports is None or not ports.names or not selected:
            return
        declared = {
            port.name
            for key in selected
            for port in self.world.endpoints[key].ports
            if rule.protocol is None or port.protocol == rule.protocol
        }
        for name in ports.names:
            if name not in declared:
                yield (
                    "unknown-port-name",
                    f'none of the endpoints it selects has a port named "{name}" of this protocol',
                )


def _missing_profiles(resources: Iterable[Resource], world: World) -> Iterator[Problem]:
    """One warning for each profile that endpoints name and that does not exist.

    A profile that does not exist denies all packets that no policy decides.
    """
    said: set[str] = set()
    for resource in resources:
        key = key_of(resource)
        endpoint = world.endpoints.get(EndpointKey(*key))
        for profile in () if endpoint is None else endpoint.profiles[:1]:  # if the first one exists, it decides alone
            if profile in world.profiles or profile in said:
                continue
            said.add(profile)
            kind, _, name = profile.partition(".")
            missing = f"the Namespace {name}" if kind == "kns" else f"the Profile {profile}"
            message = f"{missing} is not among the objects given, so what no policy decides is denied"
            yield Problem(
                resource.meta.location,
                "",
                message,
                obj="/".join(filter(None, key)),
                severity="warning",
                slug="missing-profile",
            )


def _of_shadows(policy: Policy, shadows: Shadows) -> Iterator[_Warning]:
    """One warning for each user rule that no packet can reach."""
    for shadow in shadows.of(policy):
        own = all(other.key == policy.key for other, _ in shadow.causes)
        named = " and ".join(dict.fromkeys(_cause_name(policy, *cause) for cause in shadow.causes))
        message = (
            f"adds nothing: all it allows is allowed by {named}"
            if policy.key.kind in KUBERNETES and own
            else f"is never reached: all it matches is decided by {named} at the latest"
        )
        path = f"spec.{shadow.direction.value}[{shadow.rule.index}]"
        yield _Warning(path, message, "shadowed-rule", shadow.rule.location)


def _cause_name(policy: Policy, other: Policy, rule: Rule) -> str:
    where = "" if other.key == policy.key else f" of {shown_name(other.key)}"
    return f"rule {rule.index} ({rule.action.value}){where}"
