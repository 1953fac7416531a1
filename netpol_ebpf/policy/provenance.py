# SPDX-License-Identifier: Apache-2.0
"""A verdict's cause in the user's terms: the rule, its policy, and its file and line.

Invariant: this module looks up the objects that a `Cause` names, and does not evaluate policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from netpol_ebpf.errors import Location
from netpol_ebpf.policy.types import UDP, Action, Cause, CauseKind, Direction, Tunnel, World


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a cause.

    ``location``: None if no file contains the cause, as for an end of tier, or if the file no longer contains it.
    """

    cause: Cause
    sentence: str
    location: Location | None

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
        }

    def __str__(self) -> str:
        return self.sentence if self.location is None else f"{self.sentence} ({self.location})"


def trace(world: World, cause: Cause) -> Provenance:
    """Find the user's rule, policy, file and line for ``cause``. Cost: linear in the rules of one policy."""
    return Provenance(cause, _sentence(cause), _location(world, cause))


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
