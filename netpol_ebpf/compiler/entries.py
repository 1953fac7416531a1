# SPDX-License-Identifier: Apache-2.0
"""A rule as entries of the form (peer address) x (own address) x (protocol, port or type) x (source port).

A rule with named ports, or with a service's ports, does not have this form, because the matching ports depend on the
address.  Such a rule becomes one entry for each port for which the name or service stands.  All entries of a rule have
the rule's cause, so it does not matter if a packet matches several of them.

Invariant: a packet matches a rule exactly if it matches one of the rule's entries (section 1 of policy/MATCHING.md
defines a match).  This module does not read endpoints or services.  A `Resolver` reads them, and records the names and
services on which the rule depends.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from itertools import chain, product
from typing import Protocol

from netpol_ebpf.compiler.intervals import Intervals, difference, intersection, normalise
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE, WITH_PORTS, WITHOUT_PORTS, icmp, ports, protocol
from netpol_ebpf.compiler.terms import (
    AddressMatch,
    NamedPortTerm,
    NetsTerm,
    NodeTerm,
    ObjectTerm,
    SelectorTerm,
    ServiceTerm,
    Term,
)
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    Action,
    Cause,
    Direction,
    Entity,
    IcmpType,
    IPNetwork,
    Ports,
    Rule,
)
from netpol_ebpf.selector import Selector

PortPair = tuple[int, int]
"""(protocol, port)."""


class Resolver(Protocol):
    """Resolves named ports and services to the ports for which they stand at present."""

    def named(self, selector: Selector | None, name: str) -> Iterable[PortPair]:
        """Every (protocol, port) that an endpoint matched by ``selector`` declares as ``name``.

        ``selector`` None: any endpoint.
        """

    def service(self, namespace: str, name: str) -> Iterable[PortPair]:
        """Every (protocol, port) of a service's backends."""

    def domains(self, selector: Selector) -> frozenset[str]:
        """The patterns of domain names of all network sets that ``selector`` matches."""


class Effect(enum.Enum):
    """The effect of an entry on a packet that matches the entry."""

    ALLOW = "allow"
    DENY = "deny"
    CONTINUE = "continue"  # the evaluation of this stage ends, and later stages decide
    PASS = "pass"  # the evaluation continues with the next tier
    LOG = "log"  # the entry is recorded, and the evaluation continues with the next entry


EFFECTS = {Action.ALLOW: Effect.ALLOW, Action.DENY: Effect.DENY, Action.PASS: Effect.PASS, Action.LOG: Effect.LOG}


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """One entry of a rule.

    ``family``: 4, 6, or 0 for both.  ``peer`` has the same family, unless its terms match one family only; then
    ``peer`` has family 0.
    ``domains``: if not empty, a name that the endpoint learned for the peer's address must match one of these patterns.
    """

    effect: Effect
    cause: Cause
    peer: AddressMatch
    own: AddressMatch
    l4: Intervals
    source: Intervals
    family: int
    domains: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Clause:
    """The conditions on a packet from one field of a rule, or from several fields joined (`_join`).

    ``family``: 4, 6, or 0 for both.
    ``positive``, ``negative``: the terms that must be true, and those that must be false, for the address of one side.
    """

    l4: Intervals = ANY_L4
    source: Intervals = ANY_SOURCE
    family: int = 0
    positive: frozenset[Term] = frozenset()
    negative: frozenset[Term] = frozenset()


_NO_CLAUSE = (_Clause(),)


def expand(rule: Rule, direction: Direction, effect: Effect, cause: Cause, resolver: Resolver) -> tuple[RuleEntry, ...]:
    """The entries of a rule for one direction, with the given effect and cause.

    Empty if no packet can match the rule.
    """
    if rule.unsupported or rule.source.impossible or rule.destination.impossible:
        return ()
    if rule.source.domains or (rule.destination.domains and direction is Direction.INGRESS):
        return ()  # names count for the destination of egress alone
    found = dict.fromkeys(_entries(rule, direction, effect, cause, resolver))
    selector = rule.destination.selector
    if rule.action is Action.ALLOW and direction is Direction.EGRESS and selector and not rule.destination.domains:
        # By the names of a network set, the rule matches addresses that the set's nets do not contain.
        patterns = resolver.domains(selector)
        if patterns:
            by_name = replace(rule, destination=replace(rule.destination, selector=None, domains=patterns))
            found.update(dict.fromkeys(_entries(by_name, direction, effect, cause, resolver)))
    return tuple(found)


def _entries(rule: Rule, direction: Direction, effect: Effect, cause: Cause, resolver: Resolver) -> Iterator[RuleEntry]:
    """The entries of a rule, as `expand`, without those by the names of network sets."""
    whole = _rule_clause(rule)
    sources = tuple(_side(rule.source, rule.protocol, resolver, is_source=True))
    destinations = tuple(_side(rule.destination, rule.protocol, resolver, is_source=False))
    for source, destination in product(sources, destinations):
        l4 = intersection(intersection(whole.l4, source.l4), destination.l4)
        ports_ = intersection(source.source, destination.source)
        families = {whole.family, source.family, destination.family} - {0}
        if not l4 or not ports_ or len(families) > 1:
            continue
        family = families.pop() if families else 0
        peer, own = (source, destination) if direction is Direction.INGRESS else (destination, source)
        negative = peer.negative | {ObjectTerm()} if rule.destination.domains else peer.negative
        yield RuleEntry(
            effect,
            cause,
            AddressMatch(0 if _implies_family(peer.positive) else family, peer.positive, negative),
            AddressMatch(0, own.positive, own.negative),
            l4,
            ports_,
            family,
            rule.destination.domains,
        )


def _rule_clause(rule: Rule) -> _Clause:
    """The conditions from the rule's fields for IP version, protocol and ICMP."""
    l4 = ANY_L4 if rule.protocol is None else protocol(rule.protocol)
    family = rule.ip_version or 0
    if rule.not_protocol is not None:
        l4 = difference(l4, protocol(rule.not_protocol))
    if rule.protocol in (ICMP, ICMPV6):
        own = 4 if rule.protocol == ICMP else 6
        if family not in (0, own):
            return _Clause(l4=())
        family = own
    if rule.icmp is not None:
        l4 = intersection(l4, _icmp(rule.icmp))
    if rule.not_icmp is not None:
        l4 = difference(l4, _icmp(rule.not_icmp))
    return _Clause(l4=l4, family=family)


def _icmp(wanted: IcmpType) -> Intervals:
    """The positions of packets of ICMP and ICMPv6 with a type and code. If ``wanted`` has no code, any code matches."""
    return normalise(chain.from_iterable(icmp(number, wanted.type, wanted.code) for number in (ICMP, ICMPV6)))


def _implies_family(positive: frozenset[Term]) -> bool:
    """Whether some positive term has nets of one family only, so that no address of the other family can match."""
    return any(isinstance(term, NetsTerm) and len({net.version for net in term.nets}) == 1 for term in positive)


def _side(entity: Entity, number: int | None, resolver: Resolver, *, is_source: bool) -> Iterator[_Clause]:
    """The alternatives of an entity: a packet matches the entity if it matches one of the alternatives.

    ``number``: the rule's protocol; None for any protocol.
    """
    clauses = (
        (_labels(entity),),
        tuple(_nets(entity.nets)) if entity.nets else _NO_CLAUSE,
        _not_nets(entity.not_nets),
        tuple(_ports(entity, number, resolver, is_source=is_source)) if entity.ports is not None else _NO_CLAUSE,
        tuple(_not_ports(entity, number, resolver, is_source=is_source))
        if entity.not_ports is not None
        else _NO_CLAUSE,
        tuple(_service(entity, resolver, is_source=is_source)) if entity.service is not None else _NO_CLAUSE,
    )
    for combination in product(*clauses):
        joined = _join(combination)
        if joined is not None:
            yield joined


def _join(combination: tuple[_Clause, ...]) -> _Clause | None:
    """The conjunction of clauses of one side.

    None if no packet can match all of them, for example if one clause needs IPv4 and another IPv6.
    """
    l4, source = ANY_L4, ANY_SOURCE
    for clause in combination:
        l4 = intersection(l4, clause.l4)
        source = intersection(source, clause.source)
    families = {clause.family for clause in combination} - {0}
    positive = frozenset(chain.from_iterable(clause.positive for clause in combination))
    negative = frozenset(chain.from_iterable(clause.negative for clause in combination))
    if not l4 or not source or len(families) > 1 or positive & negative:
        return None
    return _Clause(l4, source, families.pop() if families else 0, positive, negative)


def _labels(entity: Entity) -> _Clause:
    positive: set[Term] = set()
    if entity.selector is not None:
        positive.add(SelectorTerm(entity.selector))
    if entity.nodes is not None:
        positive.add(NodeTerm(entity.nodes))
    negative: set[Term] = set() if entity.not_selector is None else {SelectorTerm(entity.not_selector)}
    return _Clause(positive=frozenset(positive), negative=frozenset(negative))


def _nets(nets: tuple[IPNetwork, ...]) -> Iterator[_Clause]:
    """The alternatives of a list of nets.

    A net with prefix length 0 becomes a condition on the family.  All other nets become one term, which all rules with
    the same list share.
    """
    lists: dict[int, list[IPNetwork]] = {
        4: list(collapse_addresses(net for net in nets if isinstance(net, IPv4Network))),
        6: list(collapse_addresses(net for net in nets if isinstance(net, IPv6Network))),
    }
    whole = [version for version, found in lists.items() if found and found[0].prefixlen == 0]
    if len(whole) == len(lists):
        yield _Clause()
        return
    for version in whole:
        yield _Clause(family=version)
    rest = [net for version, found in lists.items() if version not in whole for net in found]
    if rest:
        versions = {net.version for net in rest}
        yield _Clause(
            family=versions.pop() if len(versions) == 1 else 0, positive=frozenset((NetsTerm(frozenset(rest)),))
        )


def _not_nets(nets: tuple[IPNetwork, ...]) -> tuple[_Clause, ...]:
    if not nets:
        return _NO_CLAUSE
    excluded = tuple(_nets(nets))
    families = {clause.family for clause in excluded if not clause.positive}
    if 0 in families:
        return ()
    negative = frozenset(chain.from_iterable(clause.positive for clause in excluded))
    return (_Clause(family=10 - families.pop() if families else 0, negative=negative),)


def _named(entity: Entity, names: Ports, number: int | None, resolver: Resolver) -> dict[PortPair, set[str]]:
    """Maps each (protocol, port) to those of ``names`` that stand for it.

    ``number``: the rule's protocol; ports of other protocols are left out.  If it is None, ports of all protocols are
    included.
    """
    found: dict[PortPair, set[str]] = {}
    for name in names.names:
        for pair in resolver.named(entity.selector, name):
            if pair[0] in PORT_PROTOCOLS and number in (None, pair[0]):
                found.setdefault(pair, set()).add(name)
    return found


def _numeric(ranges: tuple[tuple[int, int], ...], *, is_source: bool) -> _Clause:
    if is_source:
        return _Clause(l4=WITH_PORTS, source=intersection(normalise(ranges), ANY_SOURCE))
    return _Clause(l4=ports(PORT_PROTOCOLS, ranges))


def _point(pair: PortPair, *, is_source: bool) -> _Clause:
    number, port = pair
    if is_source:
        return _Clause(l4=protocol(number), source=((port, port),))
    return _Clause(l4=ports((number,), ((port, port),)))


def _ports(entity: Entity, number: int | None, resolver: Resolver, *, is_source: bool) -> Iterator[_Clause]:
    """The alternatives of an entity's ports: the numeric ranges, and each name with each port for which it stands."""
    wanted = entity.ports
    if wanted is None:
        return
    if wanted.ranges:
        yield _numeric(wanted.ranges, is_source=is_source)
    for pair, names in sorted(_named(entity, wanted, number, resolver).items()):
        point = _point(pair, is_source=is_source)
        for name in sorted(names):
            term = NamedPortTerm(entity.selector, name, *pair)
            yield _Clause(point.l4, point.source, positive=frozenset((term,)))


def _not_ports(entity: Entity, number: int | None, resolver: Resolver, *, is_source: bool) -> Iterator[_Clause]:
    """The alternatives of an entity's negated ports. They are disjoint.

    For each port that some endpoint declares by one of the names, one alternative has the packets with this port and an
    address for which no endpoint declares the port by that name.  The other alternatives have all other packets.
    """
    unwanted = entity.not_ports
    if unwanted is None:
        return
    named = _named(entity, unwanted, number, resolver)
    if is_source:
        yield _Clause(l4=WITHOUT_PORTS)
        allowed = difference(ANY_SOURCE, normalise(unwanted.ranges))
        for each in sorted(PORT_PROTOCOLS):
            taken = normalise((port, port) for protocol_, port in named if protocol_ == each)
            yield _Clause(l4=protocol(each), source=difference(allowed, taken))
    else:
        taken = normalise(chain.from_iterable(ports((pair[0],), ((pair[1], pair[1]),)) for pair in named))
        allowed = difference(ANY_L4, ports(PORT_PROTOCOLS, unwanted.ranges))
        yield _Clause(l4=difference(allowed, taken))
    for pair, names in sorted(named.items()):
        point = _point(pair, is_source=is_source)
        negative = frozenset(NamedPortTerm(entity.selector, name, *pair) for name in names)
        if is_source:
            yield _Clause(point.l4, intersection(point.source, allowed), negative=negative)
        else:
            yield _Clause(intersection(point.l4, allowed), point.source, negative=negative)


def _service(entity: Entity, resolver: Resolver, *, is_source: bool) -> Iterator[_Clause]:
    wanted = entity.service
    if wanted is None:
        return
    if not wanted.match_ports:
        yield _Clause(positive=frozenset((ServiceTerm(wanted.namespace, wanted.name),)))
        return
    for number, port in sorted(resolver.service(wanted.namespace, wanted.name)):
        if number not in PORT_PROTOCOLS or not port:
            continue
        point = _point((number, port), is_source=is_source)
        term = ServiceTerm(wanted.namespace, wanted.name, number, port)
        yield _Clause(point.l4, point.source, positive=frozenset((term,)))
