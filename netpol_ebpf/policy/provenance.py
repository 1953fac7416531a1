# SPDX-License-Identifier: Apache-2.0
"""A verdict's cause in the user's terms: the rule, its policy, and its file and line.

Invariant: this module looks up the objects that a `Cause` names, and does not evaluate policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from netpol_ebpf.errors import Location
from netpol_ebpf.policy.domain_names import matching_names
from netpol_ebpf.policy.types import (
    UDP,
    Action,
    Cause,
    CauseKind,
    Direction,
    LabelledNets,
    Question,
    Rule,
    Tunnel,
    World,
)


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a cause.

    ``location``: None if no file contains the cause, as for an end of tier, or if the file no longer contains it.
    ``names``: the domain names by which the cause's rule matched; empty if it needs no name.
    """

    cause: Cause
    sentence: str
    location: Location | None
    names: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The provenance as plain values for JSON. Absent parts are None."""
        cause, place = self.cause, self.location
        return {
            "kind": cause.kind.value,
            "action": cause.action.value,
            "direction": cause.direction.value,
            "tier": cause.tier or None,
            "policy": None if cause.policy is None else str(cause.policy),
            "profile": cause.profile or None,
            "rule": cause.index if cause.index >= 0 and cause.kind is not CauseKind.TUNNEL else None,
            "file": None if place is None else place.file,
            "line": None if place is None else place.line,
            "sentence": self.sentence,
            "names": list(self.names),
        }

    def __str__(self) -> str:
        return self.sentence if self.location is None else f"{self.sentence} ({self.location})"


def trace(world: World, cause: Cause, question: Question | None = None) -> Provenance:
    """Find the user's rule, policy, file and line for ``cause``. Cost: linear in the rules of one policy.

    ``question``: the question that the cause decided.  Only with it, the names by which the rule matched are found.
    """
    names = () if question is None else _names(world, cause, question)
    sentence = _sentence(cause) + (f", for the name {' and '.join(names)}" if names else "")
    return Provenance(cause, sentence, _location(world, cause), names)


def _names(world: World, cause: Cause, question: Question) -> tuple[str, ...]:
    """The names of the question that patterns of the cause's rule match, or patterns of network sets that it selects.

    Names of sets count only if no net of a selected set contains the address.
    """
    address = question.packet.destination
    names: set[str] = set()
    for rule in _rules(world, cause) if question.names else ():
        names.update(matching_names(rule.destination.domains, question.names))
        sets = sets_with_names(world, rule, cause.direction)
        if not any(address in net for held in sets for net in held.nets):
            names.update(matching_names((pattern for held in sets for pattern in held.domains), question.names))
    return tuple(sorted(names))


def sets_with_names(world: World, rule: Rule, direction: Direction) -> list[LabelledNets]:
    """The network sets by whose names a rule of this direction may match: those that its destination selects.

    Empty for a rule with another action than Allow, for an ingress rule, and for a rule with patterns of its own.
    """
    selector = rule.destination.selector
    if rule.action is not Action.ALLOW or direction is not Direction.EGRESS or rule.destination.domains:
        return []
    if selector is None:
        return []
    return [held for held in world.network_sets.values() if held.domains and selector.matches(held.labels)]


def _rules(world: World, cause: Cause) -> list[Rule]:
    """The internal rules of the user rule that made a verdict; empty if no rule of a policy or profile made it."""
    if cause.kind is CauseKind.RULE and cause.policy is not None:
        policy = world.policies.get(cause.policy)
        rules = () if policy is None else policy.rules(cause.direction)
    elif cause.kind is CauseKind.PROFILE:
        profile = world.profiles.get(cause.profile)
        rules = () if profile is None else profile.rules(cause.direction)
    else:
        return []
    return [rule for rule in rules if rule.index == cause.index]


def _sentence(cause: Cause) -> str:
    did = {Action.ALLOW: "allowed", Action.DENY: "denied", Action.LOG: "logged", Action.PASS: "passed on"}[cause.action]
    if cause.kind is CauseKind.RULE:
        return f"{did} by {cause.direction.value} rule {cause.index} of {cause.policy} in tier {cause.tier}"
    if cause.kind is CauseKind.TIER_END:
        return (
            f"{did} at the end of tier {cause.tier}: {cause.policy} selects the endpoint for {cause.direction.value}, "
            "and no rule matched"
        )
    if cause.kind is CauseKind.PROFILE:
        if cause.index < 0:
            return f"{did}: the profile {cause.profile} does not exist"
        what = f"rule {cause.index} of profile {cause.profile}"
        if cause.profile.startswith("kns."):
            what += f", the default of namespace {cause.profile.removeprefix('kns.')} (no policy selects the endpoint)"
        return f"{did} by {what}"
    if cause.kind is CauseKind.FAILSAFE:
        return f"{did}: a failsafe port ({'inbound' if cause.direction is Direction.INGRESS else 'outbound'})"
    if cause.kind is CauseKind.TUNNEL:
        return f"{did}: {_tunnel(Tunnel.of_number(cause.index))} between the addresses of known nodes"
    return f"{did}: nothing decided" if cause.action is not Action.PASS else "nothing decided: on to the next stage"


def _tunnel(tunnel: Tunnel) -> str:
    return f"UDP port {tunnel.port}" if tunnel.protocol == UDP else f"IP protocol {tunnel.protocol}"


def _location(world: World, cause: Cause) -> Location | None:
    if cause.policy is None:
        return None
    policy = world.policies.get(cause.policy)
    if policy is None:
        return None
    if cause.kind is CauseKind.RULE:
        places = (rule.location for rule in policy.rules(cause.direction) if rule.index == cause.index)
        return next((place for place in places if place is not None), policy.location)
    return policy.location
