# SPDX-License-Identifier: Apache-2.0
"""Kubernetes NetworkPolicy and its staged form, as policies of tier ``default`` with order 1000 (SEMANTICS 1.1, 1.2).

Invariant: every rule is an Allow and every selector is confined to pods of Kubernetes, so these policies never match a
host endpoint, a network set or a foreign workload.  A user rule becomes one internal rule for each combination of
protocol and peer, all with the user rule's index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from netpol_ebpf.policy.translate.composition import (
    enforced_key,
    from_label_selector,
    in_namespace,
    make_ports,
    namespace_selector,
    pods,
)
from netpol_ebpf.policy.types import (
    ANY_ENTITY,
    Action,
    Direction,
    Entity,
    Policy,
    PolicyKey,
    Ports,
    Rule,
    Staged,
)
from netpol_ebpf.resources.sharing import share
from netpol_ebpf.resources.types import (
    KubernetesNetworkPolicy,
    KubernetesPeer,
    KubernetesPolicySpec,
    KubernetesPort,
    KubernetesRule,
    LabelSelector,
    Meta,
    StagedKubernetesNetworkPolicy,
)
from netpol_ebpf.selector import Selector

TIER = "default"
ORDER = 1000.0

_DIRECTIONS = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}


def translate_network_policy(key: PolicyKey, policy: KubernetesNetworkPolicy) -> Policy:
    """Translate a Kubernetes NetworkPolicy."""
    return _policy(key, policy.meta, policy.spec, Staged.NO)


def translate_staged_network_policy(key: PolicyKey, policy: StagedKubernetesNetworkPolicy) -> Policy | None:
    """Translate a StagedKubernetesNetworkPolicy.

    None if its stagedAction is Learn or Ignore: then the policy takes part in no evaluation.
    """
    if policy.staged_action == "Delete" or policy.spec is None:
        spec = KubernetesPolicySpec(LabelSelector(), (), (), ())
        return _policy(key, policy.meta, spec, Staged.DELETE)
    if policy.staged_action != "Set":
        return None
    return _policy(key, policy.meta, policy.spec, Staged.SET)


def _policy(key: PolicyKey, meta: Meta, spec: KubernetesPolicySpec, staged: Staged) -> Policy:
    own = in_namespace(meta.namespace)
    return Policy(
        key=key,
        tier=TIER,
        order=ORDER,
        subject=pods(own, spec.pod_selector),
        types=share(frozenset(_DIRECTIONS[name] for name in spec.policy_types)),
        ingress=tuple(_rules(spec.ingress, own, Direction.INGRESS)),
        egress=tuple(_rules(spec.egress, own, Direction.EGRESS)),
        staged=staged,
        replaces=None if staged is Staged.NO else enforced_key(key),
        location=meta.location,
    )


def _rules(rules: tuple[KubernetesRule, ...], own: Selector, direction: Direction) -> Iterator[Rule]:
    for index, rule in enumerate(rules):
        for peer in [_peer(peer, own) for peer in rule.peers] or [ANY_ENTITY]:
            for protocol, ports in _protocols(rule.ports):
                yield _rule(index, rule, direction, peer, protocol, ports)


def _rule(
    index: int, rule: KubernetesRule, direction: Direction, peer: Entity, protocol: int | None, ports: Ports | None
) -> Rule:
    if direction is Direction.INGRESS:
        source, destination = peer, Entity(ports=ports)
    else:
        source, destination = ANY_ENTITY, replace(peer, ports=ports)
    return Rule(
        action=Action.ALLOW,
        index=index,
        protocol=protocol,
        source=source,
        destination=destination,
        location=rule.location,
    )


def _peer(peer: KubernetesPeer, own: Selector) -> Entity:
    if peer.ip_block is not None:
        return Entity(nets=(peer.ip_block.cidr,), not_nets=peer.ip_block.excepts)
    namespaces = own
    if peer.namespace_selector is not None:
        namespaces = namespace_selector(from_label_selector(peer.namespace_selector))
    return Entity(selector=pods(namespaces, peer.pod_selector))


def _protocols(ports: tuple[KubernetesPort, ...]) -> list[tuple[int | None, Ports | None]]:
    """Each protocol of ``ports`` with its ports; None stands for all ports.

    If ``ports`` is empty, the result is (None, None), which stands for all packets.
    """
    if not ports:
        return [(None, None)]
    ranges: dict[int, list[tuple[int, int]]] = {}
    names: dict[int, list[str]] = {}
    unlimited: set[int] = set()
    for port in ports:
        ranges.setdefault(port.protocol, [])
        if port.port is None:
            unlimited.add(port.protocol)
        elif isinstance(port.port, str):
            names.setdefault(port.protocol, []).append(port.port)
        else:
            ranges[port.protocol].append((port.port, port.port if port.end_port is None else port.end_port))
    return [
        (protocol, None if protocol in unlimited else make_ports(ranges[protocol], names.get(protocol, ())))
        for protocol in sorted(ranges)
    ]
