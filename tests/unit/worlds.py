# SPDX-License-Identifier: Apache-2.0
"""Short ways to write worlds, packets and questions in tests."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from netpol_ebpf.policy.types import (
    TCP,
    Action,
    Cause,
    CauseKind,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Packet,
    Policy,
    PolicyKey,
    PolicyTier,
    Question,
    Rule,
    Stage,
    World,
)
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.selector import parse

POD = EndpointKey("Pod", "ns", "pod")
HOST = EndpointKey("HostEndpoint", "", "host")


def read(text: str) -> list[Resource]:
    """Resources from (indented) manifests."""
    return parse_documents(textwrap.dedent(text), "test.yaml").check()


def packet(source: str, destination: str, protocol: int = TCP, port: int = 80, **more: Any) -> Packet:
    """A packet; TCP to port 80 unless said otherwise."""
    return replace(Packet(ip_address(source), ip_address(destination), protocol, 40000, port), **more)


def policy(name: str, *rules: Rule, tier: str = "default", order: float = 1.0, **more: Any) -> Policy:
    """A GlobalNetworkPolicy for everything, with ``rules`` in both directions."""
    base = Policy(
        key=PolicyKey("GlobalNetworkPolicy", "", name),
        tier=tier,
        order=order,
        subject=parse("all()"),
        types=frozenset(Direction),
        ingress=rules,
        egress=rules,
    )
    return replace(base, **more)


def world(
    *policies: Policy, tiers: tuple[PolicyTier, ...] = (PolicyTier("default", 1e6),), profiles: tuple[str, ...] = ()
) -> World:
    """A world with one pod (10.0.0.1) and one host (172.16.0.1), both with these profiles."""
    endpoints = [
        Endpoint(POD, EndpointKind.WORKLOAD, {"app": "pod"}, (ip_address("10.0.0.1"),), profiles=profiles, node="n1"),
        Endpoint(HOST, EndpointKind.HOST, {"role": "host"}, (ip_address("172.16.0.1"),), profiles=profiles, node="n1"),
    ]
    return World(
        tiers={tier.name: tier for tier in tiers},
        policies={policy.key: policy for policy in policies},
        endpoints={endpoint.key: endpoint for endpoint in endpoints},
    )


def ask(
    endpoint: EndpointKey = POD,
    direction: Direction = Direction.INGRESS,
    stage: Stage = Stage.NORMAL,
    about: Packet | None = None,
) -> Question:
    """A question; about a TCP packet from outside to port 80 unless said otherwise."""
    return Question(endpoint, direction, stage, about or packet("192.0.2.1", "10.0.0.1"))


def by_rule(owner: Policy, index: int, action: Action, direction: Direction = Direction.INGRESS) -> Cause:
    """The cause "this rule of this policy"."""
    return Cause(CauseKind.RULE, direction, owner.tier, owner.key, index=index, action=action)


ALLOW = Rule(Action.ALLOW, 0)
DENY = Rule(Action.DENY, 0)
PASS = Rule(Action.PASS, 0)
LOG = Rule(Action.LOG, 0)
