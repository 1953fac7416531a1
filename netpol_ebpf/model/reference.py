# SPDX-License-Identifier: Apache-2.0
"""`ReferenceModel`: the verdict of policy on one packet at one endpoint, as in SEMANTICS 3.2 to 3.4, 1.12 and 4.

The other engines are tested against this engine.  So it must be easy to read: it has no caches, no compiled forms, and
shares no code with the other engines.  Section 4 of policy/MATCHING.md defines the content of each `Cause`.
"""

from __future__ import annotations

from netpol_ebpf.model.matching import PacketSide, destination_side, rule_matches, source_side
from netpol_ebpf.policy.types import (
    Action,
    Cause,
    CauseKind,
    Direction,
    Endpoint,
    EndpointKind,
    Failsafe,
    IPAddress,
    Outcome,
    Policy,
    PolicyTier,
    Question,
    Rule,
    Stage,
    Staged,
    Verdict,
    World,
)

_OTHER = {Direction.INGRESS: Direction.EGRESS, Direction.EGRESS: Direction.INGRESS}


class ReferenceModel:
    """The reference engine for one world. Nothing is cached: every call reads the world. Cost: linear in the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def decide(self, question: Question) -> Verdict:
        """The verdict on ``question``, by the enforced and by the pending evaluation."""
        endpoint = self._world.endpoints.get(question.endpoint)
        if endpoint is None:
            outcome, cause = _nothing_decided(question.direction, Stage.NORMAL)
            return Verdict(outcome, cause, outcome, cause)
        packet = question.packet
        names = question.names if question.direction is Direction.EGRESS else frozenset()
        sides = (source_side(self._world, packet), destination_side(self._world, packet, names))
        enforced = [policy for policy in self._world.policies.values() if policy.staged is Staged.NO]
        run = _Run(self._world, endpoint, question, sides)
        outcome, cause = run.evaluate(enforced)
        logs = tuple(dict.fromkeys(run.logs))
        pending = _Run(self._world, endpoint, question, sides)
        staged_outcome, staged_cause = pending.evaluate(pending_policies(self._world))
        return Verdict(outcome, cause, staged_outcome, staged_cause, logs)


def pending_policies(world: World) -> list[Policy]:
    """The policies of the pending evaluation.

    Each staged policy replaces the enforced policy of the same name.  A staged policy with the action Delete removes
    the enforced policy of the same name.
    """
    replaced = {policy.replaces for policy in world.policies.values() if policy.staged is not Staged.NO}
    return [
        policy
        for policy in world.policies.values()
        if policy.staged is not Staged.DELETE and policy.key not in replaced
    ]


class _Run:
    """One evaluation of a question, enforced or pending.

    ``logs``: the causes of the Log rules that matched, in order.
    """

    def __init__(
        self, world: World, endpoint: Endpoint, question: Question, sides: tuple[PacketSide, PacketSide]
    ) -> None:
        self.world = world
        self.endpoint = endpoint
        self.direction = question.direction
        self.stage = question.stage
        self.packet = question.packet
        self.source, self.destination = sides
        self.logs: list[Cause] = []

    def evaluate(self, policies: list[Policy]) -> tuple[Outcome, Cause]:
        """Evaluate failsafes and tunnels, then tiers, then profiles. If none of these decides, the default applies."""
        return (
            self._exceptions()
            or self._tiers([policy for policy in policies if self._takes_part(policy)])
            or self._profiles()
            or _nothing_decided(self.direction, self.stage)
        )

    def _exceptions(self) -> tuple[Outcome, Cause] | None:
        """Evaluate the exceptions (failsafes and tunnels) of a host endpoint. None if no exception matches.

        In stage NORMAL exceptions allow the packet.  In stage UNTRACKED the outcome is CONTINUE, so that later stages
        decide; here a failsafe also matches the replies to packets of the other direction.  The other stages have no
        exceptions.
        """
        if self.endpoint.kind is not EndpointKind.HOST or self.stage not in (Stage.NORMAL, Stage.UNTRACKED):
            return None
        cause = self._failsafe() or self._tunnel()
        return None if cause is None else (Outcome.ALLOW if self.stage is Stage.NORMAL else Outcome.CONTINUE, cause)

    def _failsafe(self) -> Cause | None:
        settings, node = self.world.settings, self.endpoint.node
        own = settings.failsafes(node, self.direction)
        for index, failsafe in enumerate(own):
            if self._is_failsafe(failsafe, self.packet.destination_port):
                return Cause(CauseKind.FAILSAFE, self.direction, index=index, action=Action.ALLOW)
        if self.stage is Stage.UNTRACKED:
            for index, failsafe in enumerate(settings.failsafes(node, _OTHER[self.direction]), start=len(own)):
                if self._is_failsafe(failsafe, self.packet.source_port):
                    return Cause(CauseKind.FAILSAFE, self.direction, index=index, action=Action.ALLOW)
        return None

    def _is_failsafe(self, failsafe: Failsafe, port: int) -> bool:
        return (
            failsafe.protocol == self.packet.protocol
            and failsafe.port == port
            and (failsafe.net is None or self._remote in failsafe.net)
        )

    def _tunnel(self) -> Cause | None:
        """The cause if the packet is a tunnel packet from (ingress) or to (egress) a known node, else None."""
        for tunnel in self.world.settings.tunnels:
            if tunnel.carries(self.packet) and any(
                self._remote in node.addresses for node in self.world.nodes.values()
            ):
                return Cause(CauseKind.TUNNEL, self.direction, index=tunnel.number, action=Action.ALLOW)
        return None

    @property
    def _remote(self) -> IPAddress:
        return self.packet.source if self.direction is Direction.INGRESS else self.packet.destination

    def _takes_part(self, policy: Policy) -> bool:
        return (
            _is_of_stage(policy, self.stage, self.endpoint.kind)
            and self.direction in policy.types
            and policy.subject.matches(self.endpoint.labels)
        )

    def _tiers(self, policies: list[Policy]) -> tuple[Outcome, Cause] | None:
        """Evaluate the tiers that have policies for this question, in order. None if no tier decided."""
        for tier in self.world.sorted_tiers():
            applied = sorted((policy for policy in policies if policy.tier == tier.name), key=lambda one: one.sort_key)
            if not applied:
                continue
            decision = self._tier(tier, applied)
            if decision is not None:
                return decision
        return None

    def _tier(self, tier: PolicyTier, policies: list[Policy]) -> tuple[Outcome, Cause] | None:
        """Evaluate one tier. None if a Pass rule matched, or if no rule decided and the tier has no deny at its end."""
        for policy in policies:
            for rule in policy.rules(self.direction):
                if not self._matches(rule):
                    continue
                cause = Cause(
                    CauseKind.RULE, self.direction, tier.name, policy.key, index=rule.index, action=rule.action
                )
                if rule.action is Action.LOG:
                    self.logs.append(cause)
                elif rule.action is Action.PASS:
                    return None
                else:
                    return _outcome(rule.action), cause
        if tier.default_action is Action.PASS or self.stage in (Stage.PRE_DNAT, Stage.UNTRACKED):
            return None
        return Outcome.DENY, Cause(CauseKind.TIER_END, self.direction, tier.name, policies[-1].key)

    def _profiles(self) -> tuple[Outcome, Cause] | None:
        """Evaluate the profiles, in stage NORMAL only. None if no profile decided.

        A Pass rule of a profile denies.  A profile that does not exist denies everything.
        """
        if self.stage is not Stage.NORMAL:
            return None
        for name in self.endpoint.profiles:
            profile = self.world.profiles.get(name)
            if profile is None:
                return Outcome.DENY, Cause(CauseKind.PROFILE, self.direction, profile=name)
            for rule in profile.rules(self.direction):
                if not self._matches(rule):
                    continue
                action = Action.DENY if rule.action is Action.PASS else rule.action
                cause = Cause(CauseKind.PROFILE, self.direction, profile=name, index=rule.index, action=action)
                if action is not Action.LOG:
                    return _outcome(action), cause
                self.logs.append(cause)
        return None

    def _matches(self, rule: Rule) -> bool:
        return rule_matches(self.world, rule, self.packet, self.source, self.destination)


def _is_of_stage(policy: Policy, stage: Stage, kind: EndpointKind) -> bool:
    """Whether a policy belongs to ``stage``, for an endpoint of this kind.

    Workloads have stage NORMAL only.  Untracked and pre-DNAT policies never apply to a workload.
    """
    if stage is Stage.UNTRACKED:
        return kind is EndpointKind.HOST and policy.do_not_track
    if stage is Stage.PRE_DNAT:
        return kind is EndpointKind.HOST and policy.pre_dnat
    if policy.do_not_track or policy.pre_dnat:
        return False
    if stage is Stage.FORWARD:
        return kind is EndpointKind.HOST and policy.apply_on_forward
    return True


def _outcome(action: Action) -> Outcome:
    return Outcome.ALLOW if action is Action.ALLOW else Outcome.DENY


def _nothing_decided(direction: Direction, stage: Stage) -> tuple[Outcome, Cause]:
    """The outcome and cause if no rule and no tier decides: deny in stage NORMAL, continue in the other stages."""
    if stage is Stage.NORMAL:
        return Outcome.DENY, Cause(CauseKind.NO_MATCH, direction, action=Action.DENY)
    return Outcome.CONTINUE, Cause(CauseKind.NO_MATCH, direction, action=Action.PASS)
