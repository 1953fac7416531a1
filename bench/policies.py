# SPDX-License-Identifier: Apache-2.0
"""The policies that all contenders enforce.

They are generated as the internal policy model, and derived from it as flat rules.

A world has one measured endpoint, pods elsewhere in the cluster as peers, and N policies that all apply to the measured
endpoint. Each policy allows some peers (pods by label, or nets) on some ports; all other packets are denied. The policy
in the middle of the order allows the measured traffic. So a contender that walks the rules one by one walks half of
them, which is the mean over all rules, and neither its best case nor its worst.

Invariant: `flat_rules` reads only the world, and nothing of the generator, so nftables and iptables get the same
policies as the compiler. A world outside the supported subset (allow, one direction, IPv4, peers and numeric ports) is
rejected.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_network
from itertools import pairwise

from netpol_ebpf.errors import UsageError
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    Packet,
    Policy,
    PolicyKey,
    PolicyTier,
    Ports,
    ProfileRules,
    Rule,
    Staged,
    World,
)
from netpol_ebpf.selector import Selector, equals

MEASURED = EndpointKey("Pod", "bench", "measured")
PEER = EndpointKey("Pod", "bench", "peer")
NODE = "here"

PODS = 1000
APPLICATIONS = 100
"""Number of applications, which are peers by label. Each has PODS / APPLICATIONS pods. Arbitrary, about the size of a
usual namespace or two."""

FIRST_POD = int(IPv4Address("10.1.0.1"))
FIRST_NET = int(IPv4Address("100.64.0.0"))
"""The first net of peers. Each net is a /24 to /28 inside a /24 of its own, so no two overlap, which contenders with
one large set require."""

LOAD_PORTS = (5201, 5210)
"""Ports of the measured traffic, for TCP and for UDP."""
OTHER_PORTS = (80, 4000)
SERVICES = 48
"""Number of different ports (or ranges) in the rules of a world. Arbitrary: rules name many peers, but few services."""
PORT_SPAN = 8
"""Size of the largest range of ports. An ipset with ports has an element for each port."""


@dataclass(frozen=True, slots=True)
class FlatRule:
    """A rule that allows peers on ports. ``peers``: disjoint and sorted. ``label``: selects the peers; "" for nets."""

    policy: str
    label: str
    peers: tuple[IPv4Network, ...]
    protocol: int
    ports: tuple[tuple[int, int], ...]


def application(index: int) -> str:
    """The value of the label ``app`` of an application."""
    return f"app-{index % APPLICATIONS}"


def remote_pod(index: int) -> Endpoint:
    """A pod on another node."""
    key = EndpointKey("Pod", "bench", f"pod-{index}")
    address = IPv4Address(FIRST_POD + index)
    return Endpoint(key, EndpointKind.WORKLOAD, {"app": application(index)}, (address,), node="elsewhere")


def _services(chance: random.Random, count: int) -> list[Ports]:
    made = []
    for _ in range(count):
        first = chance.randint(*OTHER_PORTS)
        last = first + (chance.randint(1, PORT_SPAN - 1) if chance.random() < 0.25 else 0)
        made.append(Ports(ranges=((first, last),)))
    return made


def _rule(index: int, direction: Direction, peer: Entity, protocol: int, ports: Ports) -> Rule:
    """A rule with its peer and its ports on the sides that the direction requires."""
    if direction is Direction.INGRESS:
        return Rule(Action.ALLOW, index, protocol=protocol, source=peer, destination=Entity(ports=ports))
    destination = Entity(nets=peer.nets, selector=peer.selector, ports=ports)
    return Rule(Action.ALLOW, index, protocol=protocol, destination=destination)


def _policy(number: int, direction: Direction, rules: Sequence[Rule]) -> Policy:
    key = PolicyKey("KubernetesNetworkPolicy", "bench", f"policy-{number:05d}")
    ingress = tuple(rules) if direction is Direction.INGRESS else ()
    egress = tuple(rules) if direction is Direction.EGRESS else ()
    return Policy(key, "default", 1000.0, equals("role", "measured"), frozenset((direction,)), ingress, egress)


def make_policies(
    count: int, direction: Direction, peer: IPv4Address, pods: int = PODS, services: int = SERVICES
) -> Iterator[Policy]:
    """Generate ``count`` policies with one rule each.

    The one in the middle allows ``peer`` on LOAD_PORTS, TCP and UDP.
    """
    chance = random.Random(1)
    offered = _services(chance, services)
    load = Entity(nets=(ip_network(peer),))
    for number in range(count):
        if number == count // 2:
            ports = Ports(ranges=(LOAD_PORTS,))
            yield _policy(number, direction, [_rule(0, direction, load, one, ports) for one in (TCP, UDP)])
            continue
        if number % 2 and pods:
            entity = Entity(selector=equals("app", application(chance.randrange(pods))))
        else:
            net = IPv4Network((FIRST_NET + number * 256, chance.randint(24, 28)))
            entity = Entity(nets=(net,))
        protocol = TCP if chance.random() < 0.8 else UDP
        yield _policy(number, direction, [_rule(0, direction, entity, protocol, chance.choice(offered))])


def make_world(
    count: int, measured: Sequence[IPv4Address], peer: Sequence[IPv4Address], *, direction: Direction, pods: int = PODS,
    services: int = SERVICES, is_peer_here: bool = True,
) -> World:  # fmt: skip
    """The world with ``count`` policies. The measured traffic uses the first addresses of ``measured`` and ``peer``."""
    labels = {"role": "measured"}
    endpoints = [Endpoint(MEASURED, EndpointKind.WORKLOAD, labels, tuple(measured), profiles=("open",), node=NODE)]
    if is_peer_here:
        endpoints.append(Endpoint(PEER, EndpointKind.WORKLOAD, {}, tuple(peer), profiles=("open",), node=NODE))
    endpoints += [remote_pod(index) for index in range(pods)]
    allow = (Rule(Action.ALLOW, 0),)
    return World(
        tiers={"default": PolicyTier("default", 1_000_000.0)},
        policies={policy.key: policy for policy in make_policies(count, direction, peer[0], pods, services)},
        profiles={"open": ProfileRules("open", allow, allow)},
        endpoints={endpoint.key: endpoint for endpoint in endpoints},
    )


# --- back from the model ----------------------------------------------------------------------------------------------


def flat_rules(world: World, key: EndpointKey, direction: Direction) -> list[FlatRule]:
    """The rules that apply to an endpoint in one direction, in evaluation order.

    Raises UsageError outside the subset.
    """
    endpoint = world.endpoints[key]
    applying = [
        policy
        for policy in world.policies.values()
        if direction in policy.types and policy.subject.matches(endpoint.labels)
    ]
    if not applying:
        raise UsageError(f"no policy applies to {key}: there is nothing to deny the rest")
    flat = []
    chosen = _Chosen(world)
    for policy in sorted(applying, key=lambda one: one.sort_key):
        if policy.tier != "default" or policy.staged is not Staged.NO:
            raise _outside(policy, "its tier or stage")
        flat += [_flatten(chosen, policy, rule, direction) for rule in policy.rules(direction)]
    return flat


class _Chosen:
    """The IPv4 addresses that a selector selects. Each selector is evaluated once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[str, list[IPv4Network]] = {}

    def __call__(self, selector: Selector) -> list[IPv4Network]:
        text = str(selector)
        if text not in self._known:
            endpoints = (one for one in self._world.endpoints.values() if selector.matches(one.labels))
            self._known[text] = [
                IPv4Network(one) for each in endpoints for one in each.addresses if isinstance(one, IPv4Address)
            ]
        return self._known[text]


def _flatten(chosen: _Chosen, policy: Policy, rule: Rule, direction: Direction) -> FlatRule:
    ingress = direction is Direction.INGRESS
    peer = rule.source if ingress else rule.destination
    ports = rule.destination.ports
    plain = Rule(
        Action.ALLOW, rule.index, protocol=rule.protocol,
        source=Entity(nets=peer.nets, selector=peer.selector) if ingress else Entity(),
        destination=Entity(ports=ports) if ingress else Entity(nets=peer.nets, selector=peer.selector, ports=ports),
    )  # fmt: skip
    if rule != plain or rule.protocol not in (TCP, UDP):
        raise _outside(policy, f"rule {rule.index}")
    if ports is None or ports.names or bool(peer.nets) == (peer.selector is not None):
        raise _outside(policy, f"the peers or ports of rule {rule.index}")
    if peer.selector is None:
        nets, label = [net for net in peer.nets if isinstance(net, IPv4Network)], ""
        if len(nets) != len(peer.nets):
            raise _outside(policy, f"the nets of rule {rule.index}")
    else:
        nets, label = chosen(peer.selector), str(peer.selector)
    return FlatRule(policy.key.name, label, tuple(sorted(nets)), rule.protocol, ports.ranges)


def _outside(policy: Policy, what: str) -> UsageError:
    return UsageError(f"{policy.key}: {what} cannot be said to every contender")


def fold(rules: Iterable[FlatRule]) -> dict[tuple[IPv4Network, int], list[tuple[int, int]]]:
    """All rules as one mapping from (peer net, protocol) to merged ranges of ports.

    Raises UsageError if nets overlap.
    """
    folded: dict[tuple[IPv4Network, int], list[tuple[int, int]]] = {}
    for rule in rules:
        for net in rule.peers:
            folded.setdefault((net, rule.protocol), []).extend(rule.ports)
    nets = sorted({net for net, _ in folded})
    for left, right in pairwise(nets):
        if left.overlaps(right):
            raise UsageError(f"{left} and {right} overlap: one set cannot hold both")
    return {key: _merged(ranges) for key, ranges in folded.items()}


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


# --- questions to compare the contenders by ---------------------------------------------------------------------------


def peer_addresses(rules: Sequence[FlatRule], own: IPv4Address, count: int = 12) -> list[IPv4Address]:
    """Source addresses for the questions.

    They are addresses that rules name, at several places of the order, the neighbours of these, and one that no rule
    names.
    """
    step = max(1, len(rules) // count)
    asked = [own]
    for rule in rules[::step][:count]:
        net = rule.peers[0]
        asked += [net.network_address, IPv4Address(int(net.network_address) + net.num_addresses)]
    return list(dict.fromkeys([*asked, IPv4Address("203.0.113.77")]))


def questions(
    rules: Sequence[FlatRule],
    measured: IPv4Address,
    peers: Sequence[IPv4Address],
    direction: Direction,
    count: int = 64,
) -> list[Packet]:
    """Packets that sample the rules: for each peer, ports at, in and beyond the ranges of rules that name the peer."""
    chance = random.Random(2)
    found: dict[Packet, None] = {}

    def ask(peer: IPv4Address, protocol: int, port: int) -> None:
        source, destination = (peer, measured) if direction is Direction.INGRESS else (measured, peer)
        found[Packet(source, destination, protocol, 40_000, port)] = None

    for peer in peers:
        naming = [rule for rule in rules if any(peer in net for net in rule.peers)]
        for rule in naming[:3]:
            for first, last in rule.ports:
                ask(peer, rule.protocol, first)
                ask(peer, rule.protocol, last)
                ask(peer, rule.protocol, last + 1)
                ask(peer, TCP if rule.protocol == UDP else UDP, first)
        ask(peer, chance.choice((TCP, UDP)), chance.randint(*OTHER_PORTS))
    kept = list(found)
    if len(kept) > count:
        kept = chance.sample(kept, count)
    return kept
