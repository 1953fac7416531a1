# SPDX-License-Identifier: Apache-2.0
"""Rule lists: everything that applies to one endpoint in one direction and stage, in the order of evaluation.

A *template* has the entries of one policy, of one profile, or of a host endpoint's exceptions (failsafes, tunnels), in
one direction. All rule lists with that policy share the template. A *rule list* has, in this order: exceptions, tiers
of templates, profiles, and the default. It is evaluated twice: in the enforced evaluation, and in the pending
evaluation, in which staged policies take part and replace enforced policies.  Each template and each end of a tier has
flags for the evaluations in which it takes part.

Invariant: rule lists with the same meaning are equal values, whatever the order in which the policies were added
(sections 2 to 4 of policy/MATCHING.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from netpol_ebpf.compiler.entries import EFFECTS, Effect, Resolver, RuleEntry, expand
from netpol_ebpf.compiler.identities import MatchRecord
from netpol_ebpf.compiler.terms import NetsTerm
from netpol_ebpf.policy.types import (
    ANY_ENTITY,
    PORT_PROTOCOLS,
    Action,
    Cause,
    CauseKind,
    Direction,
    Endpoint,
    EndpointKind,
    Entity,
    Failsafe,
    Outcome,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    Ports,
    ProfileRules,
    Rule,
    Stage,
    Staged,
    Tunnel,
)
from netpol_ebpf.selector import EVERYTHING

_OTHER = {Direction.INGRESS: Direction.EGRESS, Direction.EGRESS: Direction.INGRESS}


@dataclass(slots=True, eq=False)
class Template:
    """The entries of one policy, one profile, or a host endpoint's exceptions (failsafes, tunnels), in one direction.

    Compared by object identity.
    ``what``: the object to name in errors.
    ``constrains_own``: at least one entry has a condition on the endpoint's own address.
    ``names_own_nets``: at least one of these conditions is on the nets that contain the own address.
    ``passes``: at least one entry has the effect PASS.
    ``references``: how many rule lists have the template.
    ``peers``, ``owns``: the records of the entries' peer and own matches; empty while ``references`` is 0.
    """

    what: str
    entries: tuple[RuleEntry, ...]
    constrains_own: bool
    names_own_nets: bool
    passes: bool
    references: int = 0
    peers: tuple[MatchRecord, ...] = ()
    owns: tuple[MatchRecord, ...] = ()


def make_template(what: str, entries: Iterable[RuleEntry]) -> Template:
    """Make a template of ``entries`` that no rule list has yet. ``what``: the object to name in errors."""
    found = tuple(entries)
    return Template(
        what,
        found,
        constrains_own=any(entry.own.positive or entry.own.negative for entry in found),
        names_own_nets=any(
            isinstance(term, NetsTerm) for entry in found for term in (*entry.own.positive, *entry.own.negative)
        ),
        passes=any(entry.effect is Effect.PASS for entry in found),
    )


@dataclass(frozen=True, slots=True)
class TemplateUse:
    """A template in a rule list. ``enforced``, ``pending``: whether the template takes part in that evaluation."""

    template: Template
    enforced: bool = True
    pending: bool = True


@dataclass(frozen=True, slots=True)
class TierTemplates:
    """A tier of a rule list, with the templates of its policies.

    ``end_enforced``, ``end_pending``: the policy that the cause names if the tier ends with a deny in that evaluation.
    None: the evaluation continues with the next tier.
    """

    name: str
    uses: tuple[TemplateUse, ...]
    end_enforced: PolicyKey | None
    end_pending: PolicyKey | None
    is_closed: bool = field(init=False, compare=False, repr=False)
    """Whether no evaluation goes beyond this tier.

    This is so if the tier denies at its end, both in the enforced and in the pending evaluation, and no rule of the
    tier has the action Pass.
    """
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        ends = self.end_enforced is not None and self.end_pending is not None
        object.__setattr__(self, "is_closed", ends and not any(use.template.passes for use in self.uses))
        object.__setattr__(self, "_hash", hash((self.name, self.uses, self.end_enforced, self.end_pending)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class RuleList:
    """All templates of an endpoint in one direction and stage, in the order of evaluation.

    ``head``: the exceptions.
    ``constraining``: the templates that constrain the own side, in order.

    The hash is computed once, because rule lists are dictionary keys and may have a thousand templates.
    """

    direction: Direction
    stage: Stage
    head: tuple[TemplateUse, ...]
    tiers: tuple[TierTemplates, ...]
    profiles: tuple[TemplateUse, ...]
    constraining: tuple[Template, ...] = field(init=False, compare=False, repr=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        constraining = tuple(use.template for use in self.uses() if use.template.constrains_own)
        object.__setattr__(self, "constraining", constraining)
        object.__setattr__(self, "_hash", hash((self.direction, self.stage, self.head, self.tiers, self.profiles)))

    def __hash__(self) -> int:
        return self._hash

    def uses(self) -> Iterable[TemplateUse]:
        """All templates in order."""
        yield from self.head
        for tier in self.tiers:
            yield from tier.uses
        yield from self.profiles

    @property
    def is_idle(self) -> bool:
        """Whether the rule list decides no packet: the outcome is always CONTINUE."""
        return self.stage is not Stage.NORMAL and not self.head and not self.tiers


def nothing_decided(direction: Direction, stage: Stage) -> tuple[Outcome, Cause]:
    """The outcome and cause if no rule and no tier decides: deny in stage NORMAL, continue in the other stages."""
    if stage is Stage.NORMAL:
        return Outcome.DENY, Cause(CauseKind.NO_MATCH, direction, action=Action.DENY)
    return Outcome.CONTINUE, Cause(CauseKind.NO_MATCH, direction, action=Action.PASS)


# --- templates ------------------------------------------------------------------------------------------------------


class Exceptions(NamedTuple):
    """The packets that host policy never blocks in one direction and stage.

    ``replies``: in stage UNTRACKED, the failsafes of the other direction, because replies to packets of a failsafe must
    pass as well.
    """

    stage: Stage
    failsafes: tuple[Failsafe, ...]
    replies: tuple[Failsafe, ...]
    tunnels: frozenset[Tunnel]


def exceptions_of(settings: PolicySettings, node: str | None, direction: Direction, stage: Stage) -> Exceptions:
    """The exceptions of the host endpoints of ``node`` in one direction and stage."""
    replies = settings.failsafes(node, _OTHER[direction]) if stage is Stage.UNTRACKED else ()
    return Exceptions(stage, settings.failsafes(node, direction), replies, settings.tunnels)


def policy_entries(policy: Policy, direction: Direction, resolver: Resolver) -> list[RuleEntry]:
    """The entries of a policy in one direction."""
    found: list[RuleEntry] = []
    for rule in policy.rules(direction):
        cause = Cause(CauseKind.RULE, direction, policy.tier, policy.key, index=rule.index, action=rule.action)
        found.extend(expand(rule, direction, EFFECTS[rule.action], cause, resolver))
    return found


def profile_entries(profile: ProfileRules, direction: Direction, resolver: Resolver) -> list[RuleEntry]:
    """The entries of a profile in one direction. In a profile the action Pass denies."""
    found: list[RuleEntry] = []
    for rule in profile.rules(direction):
        action = Action.DENY if rule.action is Action.PASS else rule.action
        cause = Cause(CauseKind.PROFILE, direction, profile=profile.name, index=rule.index, action=action)
        found.extend(expand(rule, direction, EFFECTS[action], cause, resolver))
    return found


def missing_profile_entries(name: str, direction: Direction, resolver: Resolver) -> list[RuleEntry]:
    """The entries in place of a profile that does not exist: they deny everything."""
    cause = Cause(CauseKind.PROFILE, direction, profile=name, action=Action.DENY)
    return list(expand(Rule(Action.DENY, -1), direction, Effect.DENY, cause, resolver))


def exception_entries(exceptions: Exceptions, direction: Direction, resolver: Resolver) -> list[RuleEntry]:
    """The entries of exceptions in one direction.

    Their effect is ALLOW in stage NORMAL, and CONTINUE in stage UNTRACKED.
    """
    effect = Effect.ALLOW if exceptions.stage is Stage.NORMAL else Effect.CONTINUE
    found: list[RuleEntry] = []

    def add(kind: CauseKind, index: int, remote: Entity, protocol: int, port: int, *, reply: bool = False) -> None:
        """Add one entry.

        ``remote``: the addresses of the remote side.
        ``port``: the destination port; for a reply, the source port.
        """
        ports: Ports | None = Ports(ranges=((port, port),))
        if protocol not in PORT_PROTOCOLS:
            if port:
                return  # such packets have port 0
            ports = None
        ingress = direction is Direction.INGRESS
        source, destination = (remote, ANY_ENTITY) if ingress else (ANY_ENTITY, remote)
        source = replace(source, ports=ports if reply else None)
        destination = replace(destination, ports=None if reply else ports)
        rule = Rule(Action.ALLOW, index, protocol=protocol, source=source, destination=destination)
        cause = Cause(kind, direction, index=index, action=Action.ALLOW)
        found.extend(expand(rule, direction, effect, cause, resolver))

    for index, failsafe in enumerate((*exceptions.failsafes, *exceptions.replies)):
        remote = Entity(nets=() if failsafe.net is None else (failsafe.net,))
        is_reply = index >= len(exceptions.failsafes)
        add(CauseKind.FAILSAFE, index, remote, failsafe.protocol, failsafe.port, reply=is_reply)
    for tunnel in sorted(exceptions.tunnels):
        add(CauseKind.TUNNEL, tunnel.number, Entity(nodes=EVERYTHING), tunnel.protocol, tunnel.port)
    return found


# --- rule lists -------------------------------------------------------------------------------------------------------


def stages_of(endpoint: Endpoint) -> tuple[Stage, ...]:
    """The stages in which an endpoint has policy."""
    return (Stage.NORMAL,) if endpoint.kind is EndpointKind.WORKLOAD else tuple(Stage)


def is_of_stage(policy: Policy, stage: Stage) -> bool:
    """Whether a policy belongs to ``stage`` of a host endpoint."""
    if stage is Stage.UNTRACKED:
        return policy.do_not_track
    if stage is Stage.PRE_DNAT:
        return policy.pre_dnat
    if policy.do_not_track or policy.pre_dnat:
        return False
    return stage is Stage.NORMAL or policy.apply_on_forward


def order_tiers(
    policies: Iterable[Policy],
    tiers: Mapping[str, PolicyTier],
    replaced: Collection[PolicyKey],
    stage: Stage,
    templates: Mapping[PolicyKey, Template],
) -> tuple[TierTemplates, ...]:
    """The tiers in order, each with the templates of its policies in order.

    ``policies``: the policies of the stage and direction that select the endpoint.
    ``replaced``: the keys of policies that staged policies replace; these are not in the pending evaluation.
    """
    by_tier: dict[str, list[Policy]] = {}
    for policy in policies:
        if policy.staged is not Staged.DELETE:
            by_tier.setdefault(policy.tier, []).append(policy)
    found: list[TierTemplates] = []
    for tier in sorted(
        (tiers.get(name, PolicyTier(name, exists=False)) for name in by_tier), key=lambda tier: tier.sort_key
    ):
        ordered = sorted(by_tier[tier.name], key=lambda policy: policy.sort_key)
        denies = tier.default_action is not Action.PASS and stage not in (Stage.PRE_DNAT, Stage.UNTRACKED)
        uses: list[TemplateUse] = []
        ends: dict[bool, PolicyKey | None] = {True: None, False: None}
        for policy in ordered:
            enforced, pending = policy.staged is Staged.NO, policy.key not in replaced
            if not enforced and not pending:
                continue
            template = templates[policy.key]
            if template.entries:
                uses.append(TemplateUse(template, enforced, pending))
            if enforced:
                ends[True] = policy.key
            if pending:
                ends[False] = policy.key
        if not denies:
            ends = {True: None, False: None}
        if uses or ends[True] or ends[False]:
            found.append(TierTemplates(tier.name, tuple(uses), ends[True], ends[False]))
    return tuple(found)


def cut(
    tiers: tuple[TierTemplates, ...], profiles: tuple[TemplateUse, ...]
) -> tuple[tuple[TierTemplates, ...], tuple[TemplateUse, ...]]:
    """Drop unreachable tiers and profiles. Then endpoints that differ only in these have the same policy sets."""
    for index, tier in enumerate(tiers):
        if tier.is_closed:
            return tiers[: index + 1], ()
    return tiers, profiles
