# SPDX-License-Identifier: Apache-2.0
"""Translates Calico policies, tiers and profiles. Effective selectors are composed exactly as in SEMANTICS 2.6.

Invariant: each user rule becomes one internal rule, in the user's order.  A rule with ``http`` is marked unsupported, so
it matches nothing.  Only Allow rules can have this field, so the mark never widens access.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Union

from netpol_ebpf.policy.translate.composition import (
    HAS_NAMESPACE,
    HAS_SERVICE_ACCOUNT,
    NAMESPACE_PREFIX,
    NO_NAMESPACE,
    SERVICE_ACCOUNT,
    SERVICE_ACCOUNT_PREFIX,
    enforced_key,
    in_namespace,
    make_ports,
    namespace_selector,
    service_account_selector,
)
from netpol_ebpf.policy.types import (
    Action,
    BackendMatch,
    Direction,
    Entity,
    IcmpType,
    Policy,
    PolicyKey,
    PolicyTier,
    Ports,
    ProfileRules,
    Rule,
    Staged,
)
from netpol_ebpf.resources import types as resources
from netpol_ebpf.resources.sharing import share
from netpol_ebpf.resources.types import CalicoPolicySpec, CalicoRule, EntityRule, PortSpec, ServiceAccountMatch
from netpol_ebpf.selector import EVERYTHING, Selector, all_of, is_in, negate

UNORDERED_TIER = 1_000_000.0
"""The order of a user's tier that gives no order. Calico stores this value.

Calico's documentation says that such a tier is last, which differs (SEMANTICS 1.8).
"""

_DIRECTIONS = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_ACTIONS = {"Allow": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS, "Log": Action.LOG}

EnforcedPolicy = Union[resources.CalicoNetworkPolicy, resources.GlobalNetworkPolicy]
StagedPolicy = Union[resources.StagedNetworkPolicy, resources.StagedGlobalNetworkPolicy]


def translate_policy(key: PolicyKey, policy: EnforcedPolicy) -> Policy:
    """Translate a Calico NetworkPolicy or GlobalNetworkPolicy."""
    return _policy(key, policy.meta, policy.spec, Staged.NO, None)


def translate_staged_policy(key: PolicyKey, policy: StagedPolicy) -> Policy | None:
    """Translate a StagedNetworkPolicy or StagedGlobalNetworkPolicy.

    None if its stagedAction is Learn or Ignore: then the policy takes part in no evaluation.
    """
    replaces = enforced_key(key)
    if policy.staged_action == "Delete":
        return _policy(key, policy.meta, policy.spec, Staged.DELETE, replaces)
    if policy.staged_action != "Set":
        return None
    return _policy(key, policy.meta, policy.spec, Staged.SET, replaces)


def translate_tier(tier: resources.Tier) -> PolicyTier:
    """Translate a Tier object."""
    return PolicyTier(
        name=tier.meta.name,
        order=UNORDERED_TIER if tier.order is None else tier.order,
        default_action=Action.PASS if tier.default_action == "Pass" else Action.DENY,
    )


def translate_profile(profile: resources.Profile) -> ProfileRules:
    """Translate a Profile object. Its rules mean the same as rules of a GlobalNetworkPolicy."""
    return ProfileRules(
        name=profile.meta.name,
        ingress=tuple(_rules(profile.ingress, "", Direction.INGRESS)),
        egress=tuple(_rules(profile.egress, "", Direction.EGRESS)),
    )


def _policy(
    key: PolicyKey, meta: resources.Meta, spec: CalicoPolicySpec, staged: Staged, replaces: PolicyKey | None
) -> Policy:
    return Policy(
        key=key,
        tier=spec.tier,
        order=math.inf if spec.order is None else spec.order,
        subject=_subject(spec, meta.namespace),
        types=share(frozenset(_DIRECTIONS[name] for name in spec.types)),
        ingress=tuple(_rules(spec.ingress, meta.namespace, Direction.INGRESS)),
        egress=tuple(_rules(spec.egress, meta.namespace, Direction.EGRESS)),
        staged=staged,
        replaces=replaces,
        do_not_track=spec.do_not_track,
        pre_dnat=spec.pre_dnat,
        apply_on_forward=spec.apply_on_forward,
        location=meta.location,
    )


def _subject(spec: CalicoPolicySpec, namespace: str) -> Selector:
    """The effective subject selector (SEMANTICS 2.6 a).

    Calico joins the selectors of a global policy to one text and rewrites each all() in that text so that it
    requires a namespace.  This includes an all() in ``selector``.  An absent ``selector`` adds no all(), so nothing
    requires a namespace: a negative namespaceSelector or serviceAccountSelector also selects endpoints without a namespace or without a
    service account.
    """
    if namespace:
        accounts = () if spec.service_account_selector is None else (spec.service_account_selector,)
        own = spec.selector or EVERYTHING
        return all_of(own, in_namespace(namespace), *map(service_account_selector, accounts))
    joined = () if spec.selector is None else (spec.selector,)
    for given, prefix, any_of_them in (
        (spec.namespace_selector, NAMESPACE_PREFIX, HAS_NAMESPACE),
        (spec.service_account_selector, SERVICE_ACCOUNT_PREFIX, HAS_SERVICE_ACCOUNT),
    ):
        if given is not None:
            joined = (all_of(*joined, given.prefixed(prefix)).with_all_as(any_of_them),)
    return all_of(*joined)


def _rules(rules: tuple[CalicoRule, ...], namespace: str, direction: Direction) -> Iterator[Rule]:
    for index, rule in enumerate(rules):
        action = _ACTIONS[rule.action]
        yield Rule(
            action=action,
            index=index,
            ip_version=_ip_version(rule),
            protocol=rule.protocol,
            not_protocol=rule.not_protocol,
            icmp=None if rule.icmp is None else IcmpType(rule.icmp.type, rule.icmp.code),
            not_icmp=None if rule.not_icmp is None else IcmpType(rule.not_icmp.type, rule.not_icmp.code),
            source=_entity(rule.source, namespace, action, service_ports=False),
            destination=_entity(rule.destination, namespace, action, service_ports=direction is Direction.EGRESS),
            unsupported="http" if action is Action.ALLOW and rule.http is not None else "",
            name=rule.annotations.get("name", ""),
            location=rule.location,
        )


def _ip_version(rule: CalicoRule) -> int | None:
    """The only IP version that the rule matches (SEMANTICS 1.4); None if the rule matches both versions.

    The rule's ipVersion decides.  Without ipVersion, the nets and notNets decide if all of them have the same version.
    """
    if rule.ip_version is not None:
        return rule.ip_version
    nets = (*rule.source.nets, *rule.source.not_nets, *rule.destination.nets, *rule.destination.not_nets)
    versions = {net.version for net in nets}
    return versions.pop() if len(versions) == 1 else None


def _entity(entity: EntityRule, namespace: str, action: Action, *, service_ports: bool) -> Entity:
    """Translate one side (source or destination) of a rule.

    ``namespace``: the policy's namespace; "" for a global policy.
    ``action``: the rule's action.  Only Allow rules may have ``domains``; the parser rejects others.  If another action
    kept them, the rule would match nothing until a name is learned, which would widen access.
    ``service_ports``: whether a service on this side also restricts protocol and port (`BackendMatch.match_ports`).
    """
    service = None
    if entity.services is not None:
        service = BackendMatch(entity.services.namespace, entity.services.name, service_ports)
    selector, not_selector = _positive_selector(entity, namespace), entity.not_selector
    if selector is not None and not_selector is not None:
        # SEMANTICS 2.6 c: one owner of the address must match selector and not match not_selector.
        selector, not_selector = all_of(selector, negate(not_selector)), None
    return Entity(
        nets=entity.nets,
        not_nets=entity.not_nets,
        selector=selector,
        not_selector=not_selector,
        ports=_ports(entity.ports),
        not_ports=_ports(entity.not_ports),
        service=service,
        domains=frozenset(entity.domains) if action is Action.ALLOW else frozenset(),
    )


def _positive_selector(entity: EntityRule, namespace: str) -> Selector | None:
    """The effective positive selector (SEMANTICS 2.6 b); None if the side has no such condition.

    ``notSelector`` gets no prefix (2.6 c).  But if it is present, the positive selector of a namespaced policy is
    confined to the policy's namespace.
    """
    parts: list[Selector] = []
    if entity.service_accounts is not None:
        parts += _service_accounts(entity.service_accounts)
    if entity.selector is not None:
        parts.append(entity.selector)
    if entity.namespace_selector is not None:
        if entity.namespace_selector.is_global:
            parts.insert(0, NO_NAMESPACE)
        else:
            parts.insert(0, namespace_selector(entity.namespace_selector))
    elif namespace and (parts or entity.not_selector is not None):
        parts.insert(0, in_namespace(namespace))
    return all_of(*parts) if parts else None


def _service_accounts(match: ServiceAccountMatch) -> Iterator[Selector]:
    if match.names:
        yield is_in(SERVICE_ACCOUNT, match.names)
    if match.selector is not None:
        yield service_account_selector(match.selector)


def _ports(specs: tuple[PortSpec, ...]) -> Ports | None:
    if not specs:
        return None
    return make_ports(
        ((spec.first, spec.last) for spec in specs if not spec.name), (spec.name for spec in specs if spec.name)
    )
