# SPDX-License-Identifier: Apache-2.0
"""Proofs about two rules: the first matches all packets of the second (`covers`), or none of them (`excludes`).

Both functions are sound and not complete.  True is a proof that holds for every packet and every state of the cluster
(by the definition of a match in MATCHING.md).  False does not prove the contrary.  The functions compare rules only and
do not look at endpoints.  Only where the domain names of network sets matter does a caller say which sets exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from netpol_ebpf.policy.domain_names import covers_pattern
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    Action,
    BackendMatch,
    Entity,
    IPNetwork,
    LabelledNets,
    Ports,
    Rule,
)
from netpol_ebpf.selector import Selector, all_of, negate

_FAMILY_OF_PROTOCOL = {ICMP: 4, ICMPV6: 6}


@lru_cache(maxsize=65536)
def implies(premise: Selector, conclusion: Selector) -> bool:
    """Whether labels that match ``premise`` certainly match ``conclusion`` as well."""
    return premise == conclusion or all_of(premise, negate(conclusion)).is_unsatisfiable()


def covers(wide: Rule, narrow: Rule, named_sets: Iterable[LabelledNets] | None = None) -> bool:
    """Whether ``wide`` matches every packet that ``narrow`` matches.

    False if either rule is known to match no packet.
    ``named_sets``: the network sets with domain names; empty also if names do not count, as for ingress rules.  None: a
    set with any labels may have names.
    """
    if is_dead(wide) or is_dead(narrow):
        return False
    family = _family(narrow)
    return (
        wide.ip_version in (None, family)
        and wide.protocol in (None, narrow.protocol)
        and _not_protocol_covers(wide, narrow)
        and _icmp_covers(wide, narrow)
        and _entity_covers(wide.source, narrow.source, narrow, family)
        and _entity_covers(wide.destination, narrow.destination, narrow, family)
        and not _matches_more_sets(narrow, wide, named_sets)
    )


def _matches_more_sets(narrow: Rule, wide: Rule, named_sets: Iterable[LabelledNets] | None) -> bool:
    """Whether ``narrow`` may match by the domain names of a network set where ``wide`` knows the nets of the set only.

    Only Allow rules without patterns of their own match by the names of sets that their destination selects.
    """
    selector = narrow.destination.selector
    if wide.action is Action.ALLOW or wide.destination.selector is None:
        return False
    if narrow.action is not Action.ALLOW or selector is None or narrow.destination.domains:
        return False
    return named_sets is None or any(selector.matches(held.labels) for held in named_sets)


def excludes(one: Rule, other: Rule) -> bool:
    """Whether no packet matches both rules. A rule that is known to match no packet excludes all others."""
    if is_dead(one) or is_dead(other):
        return True
    families = {_family(one), _family(other)} - {None}
    protocols = {one.protocol, other.protocol} - {None}
    return (
        len(families) > 1
        or len(protocols) > 1
        or (one.protocol is not None and one.protocol == other.not_protocol)
        or (other.protocol is not None and other.protocol == one.not_protocol)
        or _sides_exclude(one.source, other.source)
        or _sides_exclude(one.destination, other.destination)
    )


def _sides_exclude(one: Entity, other: Entity) -> bool:
    """Whether no address and port match both entities, by their nets or by their ports.

    Selectors prove nothing here.  An address may have several owners with different labels, so one owner may match one
    selector and another owner the other selector.
    """
    if one.nets and other.nets and not any(_overlap(net, each) for net in one.nets for each in other.nets):
        return True
    if one.ports is None or other.ports is None or one.ports.names or other.ports.names:
        return False
    return not any(
        first <= high and low <= last for first, last in one.ports.ranges for low, high in other.ports.ranges
    )


def is_dead(rule: Rule) -> bool:
    """Whether the rule is known to match no packet: it has unsupported fields, or a side is marked as impossible."""
    return bool(rule.unsupported) or rule.source.impossible or rule.destination.impossible


def _family(rule: Rule) -> int | None:
    """The IP version of all packets that the rule matches. None if the rule may match both versions."""
    if rule.ip_version is not None:
        return rule.ip_version
    if rule.protocol in _FAMILY_OF_PROTOCOL:
        return _FAMILY_OF_PROTOCOL[rule.protocol]
    for nets in (rule.source.nets, rule.destination.nets):
        versions = {net.version for net in nets}
        if len(versions) == 1:
            return versions.pop()
    return None


def _not_protocol_covers(wide: Rule, narrow: Rule) -> bool:
    return (
        wide.not_protocol is None
        or wide.not_protocol == narrow.not_protocol
        or (narrow.protocol is not None and narrow.protocol != wide.not_protocol)
    )


def _icmp_covers(wide: Rule, narrow: Rule) -> bool:
    if wide.icmp is not None and (
        narrow.icmp is None
        or narrow.icmp.type != wide.icmp.type
        or (wide.icmp.code is not None and narrow.icmp.code != wide.icmp.code)
    ):
        return False
    excluded = wide.not_icmp
    return (
        excluded is None
        or narrow.not_icmp == excluded
        or (narrow.not_icmp is not None and narrow.not_icmp.type == excluded.type and narrow.not_icmp.code is None)
        or (narrow.protocol is not None and narrow.protocol not in _FAMILY_OF_PROTOCOL)
        or (narrow.icmp is not None and narrow.icmp.type != excluded.type)
    )


def _entity_covers(wide: Entity, narrow: Entity, rule: Rule, family: int | None) -> bool:
    return (
        _nets_cover(wide, narrow, family)
        and _selectors_cover(wide, narrow)
        and _domains_cover(wide.domains, narrow.domains)
        and _service_covers(wide.service, narrow.service)
        and _ports_cover(wide.ports, narrow.ports)
        and _not_ports_cover(wide, narrow, rule)
    )


def _nets_cover(wide: Entity, narrow: Entity, family: int | None) -> bool:
    if wide.nets and not (narrow.nets and all(any(_within(net, one) for one in wide.nets) for net in narrow.nets)):
        return False
    return all(
        (family is not None and excluded.version != family)
        or any(_within(excluded, one) for one in narrow.not_nets)
        or (narrow.nets and not any(_overlap(excluded, net) for net in narrow.nets))
        for excluded in wide.not_nets
    )


def _within(inner: IPNetwork, outer: IPNetwork) -> bool:
    return (
        inner.version == outer.version
        and inner.prefixlen >= outer.prefixlen
        and int(inner.network_address) >> (inner.max_prefixlen - outer.prefixlen)
        == int(outer.network_address) >> (outer.max_prefixlen - outer.prefixlen)
    )


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return _within(one, other) or _within(other, one)


def _selectors_cover(wide: Entity, narrow: Entity) -> bool:
    for given, other in ((wide.selector, narrow.selector), (wide.nodes, narrow.nodes)):
        if given is not None and (other is None or not implies(other, given)):
            return False
    # No owner matches narrow.not_selector. So no owner matches a selector that implies narrow.not_selector.
    return wide.not_selector is None or (
        narrow.not_selector is not None and implies(wide.not_selector, narrow.not_selector)
    )


def _domains_cover(wide: frozenset[str], narrow: frozenset[str]) -> bool:
    """Whether an address with a name that ``narrow`` matches has a name that ``wide`` matches. Empty: no condition."""
    if not wide:
        return True
    return bool(narrow) and all(any(covers_pattern(one, pattern) for one in wide) for pattern in narrow)


def _service_covers(wide: BackendMatch | None, narrow: BackendMatch | None) -> bool:
    if wide is None:
        return True
    return (
        narrow is not None
        and (wide.namespace, wide.name) == (narrow.namespace, narrow.name)
        and (narrow.match_ports or not wide.match_ports)
    )


def _ports_cover(wide: Ports | None, narrow: Ports | None) -> bool:
    """Whether ``wide`` matches every port that ``narrow`` matches. Named ports are compared by name.

    A name stands for the ports that some owners declare under this name: the owners that the entity's selector matches.
    So the caller must have checked that the wide entity's selector matches every owner that the narrow entity's
    selector matches.
    """
    if wide is None:
        return True
    return (
        narrow is not None
        and set(narrow.names) <= set(wide.names)
        and all(any(first <= low and high <= last for first, last in wide.ranges) for low, high in narrow.ranges)
    )


def _not_ports_cover(wide: Entity, narrow: Entity, rule: Rule) -> bool:
    excluded = wide.not_ports
    if excluded is None or (rule.protocol is not None and rule.protocol not in PORT_PROTOCOLS):
        return True
    if excluded.names:  # with a wider selector more owners would count, and the name would exclude more ports
        return narrow.not_ports == excluded and narrow.selector == wide.selector
    if narrow.not_ports is not None and _ports_cover(narrow.not_ports, excluded):
        return True
    ports = narrow.ports
    return (
        ports is not None
        and not ports.names
        and not any(low <= last and first <= high for low, high in ports.ranges for first, last in excluded.ranges)
    )
