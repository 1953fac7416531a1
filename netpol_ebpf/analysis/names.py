# SPDX-License-Identifier: Apache-2.0
"""A connection to a domain name: the rules with names that match it, and an address that stands for an unknown one.

Invariant: a stand-in address is the address of no endpoint and no node, so that names count for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from netpol_ebpf.policy.domain_names import matches_pattern
from netpol_ebpf.policy.provenance import sets_with_names
from netpol_ebpf.policy.types import Direction, Endpoint, EndpointKey, IPAddress, IPNetwork, Rule, Staged, World

_FIRST = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}  # RFC 5737, RFC 3849: documentation
_STEPS = 256


def rules_for(world: World, endpoint: EndpointKey, name: str) -> list[dict[str, Any]]:
    """The egress rules with names for which ``endpoint`` would match ``name``, in the order of evaluation.

    Each result has the rule's patterns that match, and the network sets that have them.  Other fields of the rule, such
    as ports, are not compared.
    """
    subject = world.endpoints.get(endpoint)
    return [] if subject is None else list(_rules_for(world, subject, name))


def _rules_for(world: World, endpoint: Endpoint, name: str) -> Iterator[dict[str, Any]]:
    for tier in world.sorted_tiers():
        applied = [
            policy
            for policy in world.policies.values()
            if policy.tier == tier.name
            and Direction.EGRESS in policy.types
            and policy.staged is not Staged.DELETE
            and policy.subject.matches(endpoint.labels)
        ]
        for policy in sorted(applied, key=lambda policy: policy.sort_key):
            of_policy = {"tier": tier.name, "policy": str(policy.key), "staged": policy.staged is not Staged.NO}
            yield from (of_policy | one for one in _matches(world, policy.egress, name))
    for profile in endpoint.profiles:
        rules = world.profiles[profile].egress if profile in world.profiles else ()
        of_profile = {"tier": None, "policy": f"profile {profile}", "staged": False}
        yield from (of_profile | one for one in _matches(world, rules, name))


def _matches(world: World, rules: tuple[Rule, ...], name: str) -> Iterator[dict[str, Any]]:
    """One result for each user rule that matches ``name``. A user rule may have become several rules."""
    found: dict[int, dict[str, Any]] = {}
    for rule in rules:
        sets = sets_with_names(world, rule, Direction.EGRESS)
        patterns = {pattern for pattern in rule.destination.domains if matches_pattern(pattern, name)}
        named = [held for held in sets if any(matches_pattern(pattern, name) for pattern in held.domains)]
        patterns |= {pattern for held in named for pattern in held.domains if matches_pattern(pattern, name)}
        if not patterns:
            continue
        one = found.setdefault(rule.index, {
            "rule": rule.index, "patterns": [], "sets": [],
            "file": None if rule.location is None else rule.location.file,
            "line": None if rule.location is None else rule.location.line,
        })  # fmt: skip
        one["patterns"] = sorted({*one["patterns"], *patterns})
        one["sets"] = sorted({*one["sets"], *(held.key for held in named)})
    yield from found.values()


def stand_ins(world: World, is_outside: Callable[[IPAddress], bool]) -> tuple[IPAddress, ...]:
    """An IPv4 and an IPv6 address outside the cluster that no net of a rule or network set contains, if there is one.

    A net that contains all addresses does not count.  If every address that is tried is in some net, the first one that
    is outside the cluster is taken.
    ``is_outside``: whether an address is outside the cluster.
    """
    return tuple(_stand_in(world, is_outside, version) for version in (4, 6))


def _stand_in(world: World, is_outside: Callable[[IPAddress], bool], version: int) -> IPAddress:
    nets = {net for net in _nets(world) if net.version == version and net.prefixlen > 0}
    candidates = [address for address in _candidates(version) if is_outside(address)]
    free = (address for address in candidates if not any(address in net for net in nets))
    return next(free, candidates[0])


def _candidates(version: int) -> Iterator[IPAddress]:
    """Addresses in many networks: first one that is reserved for documentation, then one of each large block."""
    yield _FIRST[version]
    for step in range(_STEPS):
        if version == 4:  # noqa: PLR2004 - the IP version
            address: IPAddress = IPv4Address(step << 24 | 0x00_71_83_97)  # the lower bytes are arbitrary
        else:
            address = IPv6Address(0x2000 << 112 | step << 104 | 0x71_83_97)
        if address.is_global:
            yield address


def _nets(world: World) -> Iterator[IPNetwork]:
    for held in world.network_sets.values():
        yield from held.nets
    rules = [rule for policy in world.policies.values() for rule in (*policy.ingress, *policy.egress)]
    rules += [rule for profile in world.profiles.values() for rule in (*profile.ingress, *profile.egress)]
    for rule in rules:
        for entity in (rule.source, rule.destination):
            yield from entity.nets
            yield from entity.not_nets
