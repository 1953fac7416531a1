# SPDX-License-Identifier: Apache-2.0
"""Warnings about rules with domain names: names that no rule can match as its author probably means.

Invariant: as in `netpol_ebpf.policy.lint`, a warning changes no verdict.  Whether an endpoint can ask for names at all
is judged by the policies given: a warning is a proof that no policy lets it ask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from netpol_ebpf.policy.coverage import is_dead
from netpol_ebpf.policy.domain_names import is_inner_wildcard
from netpol_ebpf.policy.provenance import sets_with_names
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Policy,
    PolicyKey,
    Rule,
    Staged,
    World,
)

DOMAIN_PORT = 53
MAX_PATTERNS = 65536
"""The size of the packet path's table of patterns, np_name (docs/domain-names.md)."""

_CLUSTER = ("cluster.local", "svc")
"""Endings of the names of services and pods, with the cluster's domain that almost every cluster has, and without."""
_UNANSWERED = {
    "localhost": "answers lead to the workload itself, and such addresses are never learned (RFC 6761)",
    "invalid": "this ending is reserved for names that do not exist (RFC 6761)",
    "onion": "names with this ending are not looked up in DNS (RFC 7686)",
}


@dataclass(frozen=True, slots=True)
class NameWarning:
    """A warning about a user rule, or about a whole policy if ``rule`` is None."""

    slug: str
    message: str
    rule: Rule | None = None


class NameLinter:
    """Finds the warnings about names for the policies of a world."""

    def __init__(self, world: World, selected: Mapping[PolicyKey, Collection[EndpointKey]]) -> None:
        """``selected``: the endpoints to which each policy applies. Cost: linear in rules and selected endpoints."""
        self._world = world
        self._selected = selected
        self._sets_with_names = [held for held in world.network_sets.values() if held.domains]
        self._may_ask: set[EndpointKey] = set()
        self._isolated: set[EndpointKey] = set()
        for policy in world.policies.values():
            if policy.staged is Staged.NO and _is_for_connections(policy):
                self._may_ask.update(selected[policy.key] if any(map(_allows_dns, policy.egress)) else ())
                self._isolated.update(selected[policy.key] if self._isolates(policy) else ())

    def _isolates(self, policy: Policy) -> bool:
        """Whether the policy's tier denies at its end what the policy does not decide."""
        tier = self._world.tiers.get(policy.tier)
        return tier is None or tier.default_action is Action.DENY

    def of_policy(self, policy: Policy) -> Iterator[NameWarning]:
        """The warnings about a policy."""
        if Direction.EGRESS not in policy.types:
            return
        named = None
        for rule in policy.egress:
            patterns = self._patterns(rule)
            if patterns and named is None:
                named = rule
            for pattern in sorted(patterns):
                yield from (NameWarning(slug, message, rule) for slug, message in of_pattern(pattern))
            yield from self._ignored(rule)
        if named is not None:
            selected = sorted(self._selected[policy.key])
            yield from self._of_endpoints(policy, [self._world.endpoints[key] for key in selected])

    def of_world(self) -> str | None:
        """The message of a warning if all policies together have more patterns than the packet path holds.

        A pattern ``*.example.com`` needs a row for ``example.com`` too, because the wildcard does not match that name.
        """
        patterns = {pattern for held in self._sets_with_names for pattern in held.domains}
        for policy in self._world.policies.values():
            patterns |= {pattern for rule in policy.egress for pattern in rule.destination.domains}
        rows = patterns | {pattern.removeprefix("*.") for pattern in patterns}
        if len(rows) <= MAX_PATTERNS:
            return None
        return (
            f"the patterns of domain names need {len(rows)} rows, two for each wildcard; the packet path has {MAX_PATTERNS}, so the "
            "agent rejects these policies"
        )

    def _patterns(self, rule: Rule) -> set[str]:
        """All patterns by which an egress rule may match: its own, and those of network sets that it selects."""
        sets = sets_with_names(self._world, rule, Direction.EGRESS)
        return {*rule.destination.domains, *(pattern for held in sets for pattern in held.domains)}

    def _ignored(self, rule: Rule) -> Iterator[NameWarning]:
        """Warn if a rule selects network sets with names, but is of a kind that ignores names."""
        entity = rule.destination
        if rule.action is not Action.ALLOW and entity.selector is not None:
            selector, why = entity.selector, f"a {rule.action.value.capitalize()} rule matches their nets only"
        elif entity.not_selector is not None:
            selector, why = entity.not_selector, "notSelector compares their nets only"
        else:
            return
        sets = sorted(held.key for held in self._sets_with_names if selector.matches(held.labels))
        if sets:
            yield NameWarning(
                "names-ignored",
                f"it selects network sets with domain names ({', '.join(sets)}), but {why}: an address is known for a name only "
                "after an endpoint asked for the name",
                rule,
            )

    def _of_endpoints(self, policy: Policy, selected: list[Endpoint]) -> Iterator[NameWarning]:
        if policy.apply_on_forward and any(endpoint.kind is EndpointKind.HOST for endpoint in selected):
            yield NameWarning(
                "forwarded-names",
                "it applies to forwarded packets too, but a host endpoint knows only names that its own host asked for: for what "
                "workloads send, use a policy that selects the workloads",
            )
        workloads = [endpoint for endpoint in selected if endpoint.kind is EndpointKind.WORKLOAD]
        mute = [endpoint for endpoint in workloads if not self._can_ask(endpoint, policy)]
        if mute:
            which = "none of the endpoints that it selects" if len(mute) == len(workloads) else str(mute[0].key)
            may = "may" if len(mute) == len(workloads) else "may not"
            yield NameWarning(
                "no-dns",
                f"{which} {may} ask a DNS server (no rule allows UDP or TCP port {DOMAIN_PORT}), so no name is ever learned and the rules "
                "with names match nothing there; add a rule that allows DNS",
            )

    def _can_ask(self, endpoint: Endpoint, own: Policy) -> bool:
        """Whether some rule may let ``endpoint`` send to port 53, or no tier stops it. Earlier Deny rules are not compared.

        ``own``: a policy that selects the endpoint; it counts also if it is staged.
        """
        if endpoint.key in self._may_ask or any(map(_allows_dns, own.egress)):
            return True
        if endpoint.key in self._isolated or self._isolates(own):
            return False
        profiles = (self._world.profiles.get(name) for name in endpoint.profiles)
        return any(_allows_dns(rule) for profile in profiles if profile is not None for rule in profile.egress)


def _is_for_connections(policy: Policy) -> bool:
    return Direction.EGRESS in policy.types and not policy.do_not_track and not policy.pre_dnat


def _allows_dns(rule: Rule) -> bool:
    """Whether a rule may let a packet to port 53 pass: it allows it, or hands it to the next tier."""
    if rule.action not in (Action.ALLOW, Action.PASS) or rule.destination.domains or is_dead(rule):
        return False
    if rule.protocol not in (None, UDP, TCP):
        return False
    ports = rule.destination.ports
    return ports is None or bool(ports.names) or any(first <= DOMAIN_PORT <= last for first, last in ports.ranges)


def of_pattern(pattern: str) -> Iterator[tuple[str, str]]:
    """The slug and message of each warning about one pattern."""
    labels = pattern.split(".")
    if len(labels) == 1:
        yield (
            "single-label-name",
            f'"{pattern}" has no dot: workloads look such a name up in their search domains, so the name in the question is a longer '
            "one; write the full name",
        )
    elif labels[-2:] == _CLUSTER[0].split(".") or labels[-1] == _CLUSTER[1]:
        yield (
            "cluster-name",
            f'"{pattern}" is a name of services or pods of the cluster: names do not count for their addresses, so this matches '
            "nothing but what ExternalName services stand for; select the pods or the service instead",
        )
    elif labels[-1] in _UNANSWERED:
        yield "unanswerable-name", f'"{pattern}" matches nothing: {_UNANSWERED[labels[-1]]}'
    if is_inner_wildcard(pattern):
        yield (
            "inner-wildcard",
            f'the packet path cannot match "{pattern}", since its * is not in front: the agent adds each name that it sees, so the '
            "first connection to a new name may be denied, and none is learned while the agent is down",
        )
