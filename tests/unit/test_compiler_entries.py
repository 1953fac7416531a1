# SPDX-License-Identifier: Apache-2.0
"""Rules as entries in product form."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

import pytest

from netpol_ebpf.compiler.entries import Effect, PortPair, RuleEntry, expand
from netpol_ebpf.compiler.intervals import contains
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE, WITH_PORTS, WITHOUT_PORTS, icmp, ports, protocol
from netpol_ebpf.compiler.terms import (
    ANYONE,
    AddressMatch,
    NamedPortTerm,
    NetsTerm,
    NodeTerm,
    SelectorTerm,
    ServiceTerm,
)
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    Action,
    BackendMatch,
    Cause,
    CauseKind,
    Direction,
    Entity,
    IcmpType,
    Ports,
    Rule,
)
from netpol_ebpf.selector import Selector, parse

CAUSE = Cause(CauseKind.RULE, Direction.INGRESS, index=0)
A, B = parse("app == 'a'"), parse("app == 'b'")
V4, V6 = ip_network("0.0.0.0/0"), ip_network("::/0")


class Resolutions:
    """Names and services with fixed ports."""

    def named(self, selector: Selector | None, name: str) -> Iterable[PortPair]:
        """The name http is TCP 80 and 8080, and UDP 80. With selector B there is none."""
        return () if name != "http" or selector == B else ((TCP, 80), (TCP, 8080), (UDP, 80))

    def service(self, namespace: str, name: str) -> Iterable[PortPair]:
        """The service n/s has TCP 443, UDP 53, and a backend without a port."""
        return ((TCP, 443), (UDP, 53), (TCP, 0)) if (namespace, name) == ("n", "s") else ()

    def domains(self, selector: Selector) -> frozenset[str]:
        """No network set has names."""
        del selector
        return frozenset()


def entries(rule: Rule, direction: Direction = Direction.INGRESS) -> tuple[RuleEntry, ...]:
    """The rule's entries."""
    return expand(rule, direction, Effect.ALLOW, CAUSE, Resolutions())


def rule(**fields: object) -> Rule:
    """An Allow rule."""
    return Rule(Action.ALLOW, 0, **fields)  # type: ignore[arg-type]


def test_rule_without_clauses_is_one_entry_for_everything() -> None:
    """There is no constraint on either side, and any family matches."""
    assert entries(rule()) == (RuleEntry(Effect.ALLOW, CAUSE, ANYONE, ANYONE, ANY_L4, ANY_SOURCE, 0),)


@pytest.mark.parametrize("direction", Direction)
def test_own_side_is_the_destination_of_ingress(direction: Direction) -> None:
    """On egress it is the source."""
    one = rule(source=Entity(selector=A), destination=Entity(not_selector=B))
    (entry,) = entries(one, direction)
    source = AddressMatch(positive=frozenset({SelectorTerm(A)}))
    destination = AddressMatch(negative=frozenset({SelectorTerm(B)}))
    assert (entry.peer, entry.own) == (
        (source, destination) if direction is Direction.INGRESS else (destination, source)
    )


@pytest.mark.parametrize(
    "one",
    [
        rule(unsupported="http"),
        rule(source=Entity(impossible=True)),
        rule(destination=Entity(impossible=True)),
        rule(protocol=TCP, icmp=IcmpType(8)),
        rule(protocol=ICMP, ip_version=6),
        rule(protocol=ICMPV6, source=Entity(nets=(ip_network("10.0.0.0/8"),))),
        rule(protocol=TCP, not_protocol=TCP),
        rule(source=Entity(not_nets=(V4, V6))),
        rule(source=Entity(nets=(V6,)), destination=Entity(not_nets=(V6,))),
        rule(destination=Entity(ports=Ports(names=("nobody",)))),
        rule(destination=Entity(selector=B, ports=Ports(names=("http",)))),
        rule(destination=Entity(ports=Ports())),
        rule(destination=Entity(service=BackendMatch("n", "none", match_ports=True))),
        rule(protocol=ICMP, destination=Entity(ports=Ports(((1, 2),)))),
    ],
)
def test_contradiction_is_no_entry(one: Rule) -> None:
    """A rule that can match nothing has no entries."""
    assert entries(one) == ()


def test_family_is_repeated_for_the_peer_only_where_nets_do_not_imply_it() -> None:
    """Identities of the other family then need no row for such a rule."""
    (named,) = entries(rule(ip_version=4, source=Entity(nets=(ip_network("10.0.0.0/8"),))))
    assert (named.family, named.peer.family) == (4, 0)
    (plain,) = entries(rule(protocol=ICMPV6))
    assert (plain.family, plain.peer.family, plain.l4) == (6, 6, protocol(ICMPV6))


def test_default_route_is_a_family_and_both_are_nothing() -> None:
    """This also holds if it is written as two halves."""
    (v4,) = entries(rule(source=Entity(nets=(ip_network("0.0.0.0/1"), ip_network("128.0.0.0/1")))))
    assert v4.peer == AddressMatch(family=4)
    assert entries(rule(source=Entity(nets=(V4, V6)))) == entries(rule())
    (v6,) = entries(rule(source=Entity(not_nets=(V4,))))
    assert v6.peer == AddressMatch(family=6)


def test_default_route_beside_a_net_of_the_other_family() -> None:
    """There are two entries: the whole family, and the net of the other one."""
    net = ip_network("fd00::/8")
    found = entries(rule(source=Entity(nets=(V4, net))))
    assert {entry.peer for entry in found} == {
        AddressMatch(family=4),
        AddressMatch(positive=frozenset({NetsTerm(frozenset({net}))})),
    }


def test_nets_are_one_term_whatever_their_order_and_nesting() -> None:
    """A net inside another one adds nothing, so equal lists share an atom."""
    inner, outer, other = (ip_network(text) for text in ("10.1.0.0/16", "10.0.0.0/8", "192.0.2.0/24"))
    (entry,) = entries(rule(source=Entity(nets=(inner, outer, other))))
    assert entry.peer.positive == {NetsTerm(frozenset({outer, other}))}
    assert entries(rule(source=Entity(nets=(other, outer)))) == (entry,)


def test_nodes_are_a_term_of_their_own() -> None:
    """It is never combined with selectors of endpoints."""
    (entry,) = entries(rule(destination=Entity(nodes=A)), Direction.EGRESS)
    assert entry.peer.positive == {NodeTerm(A)}


def test_icmp_without_protocol_means_either() -> None:
    """It is type and code of ICMP or ICMPv6. The negation excludes both."""
    (entry,) = entries(rule(icmp=IcmpType(3, 1)))
    assert entry.l4 == (*icmp(ICMP, 3, 1), *icmp(ICMPV6, 3, 1))
    (negated,) = entries(rule(not_icmp=IcmpType(3)))
    assert not contains(negated.l4, icmp(ICMPV6, 3, None)[0][0])
    assert contains(negated.l4, icmp(ICMPV6, 4, None)[0][0])
    assert contains(negated.l4, protocol(47)[0][0])


def test_numeric_ports_are_of_the_protocols_with_ports() -> None:
    """There is one entry, also for several ranges."""
    (entry,) = entries(rule(destination=Entity(ports=Ports(((80, 81), (443, 443))))))
    assert entry.l4 == ports(PORT_PROTOCOLS, ((80, 81), (443, 443)))


def test_numeric_ports_that_are_excluded_leave_other_protocols() -> None:
    """A packet without ports has none of these ports."""
    (entry,) = entries(rule(destination=Entity(not_ports=Ports(((0, 65535),)))))
    assert entry.l4 == WITHOUT_PORTS


def test_named_port_is_an_entry_for_each_resolution() -> None:
    """The rule's protocol restricts the ports. The term keeps the peer's selector."""
    found = entries(
        rule(protocol=TCP, destination=Entity(selector=A, ports=Ports(((22, 22),), ("http",)))), Direction.EGRESS
    )
    selector = SelectorTerm(A)
    assert {(entry.l4, entry.peer.positive) for entry in found} == {
        (ports((TCP,), ((22, 22),)), frozenset({selector})),
        (ports((TCP,), ((80, 80),)), frozenset({selector, NamedPortTerm(A, "http", TCP, 80)})),
        (ports((TCP,), ((8080, 8080),)), frozenset({selector, NamedPortTerm(A, "http", TCP, 8080)})),
    }


def test_named_port_that_is_excluded_depends_on_the_address() -> None:
    """On these ports the address must not declare the name. On all other ports there is no condition."""
    found = entries(rule(destination=Entity(not_ports=Ports(names=("http",)))), Direction.EGRESS)
    by_negative = {entry.peer.negative: entry.l4 for entry in found}
    pairs = ((TCP, 80), (TCP, 8080), (UDP, 80))
    for number, port in pairs:
        term = NamedPortTerm(None, "http", number, port)
        assert by_negative.pop(frozenset({term})) == ports((number,), ((port, port),))
    (rest,) = by_negative.values()
    assert not any(contains(rest, ports((number,), ((port, port),))[0][0]) for number, port in pairs)
    assert contains(rest, ports((SCTP,), ((80, 80),))[0][0])


def test_source_ports_are_a_dimension_of_their_own() -> None:
    """Ranges restrict the protocol to those with ports. A name restricts it to the declared protocol."""
    (entry,) = entries(rule(source=Entity(ports=Ports(((53, 53),)))))
    assert entry.source == ((53, 53),)
    assert entry.l4 == WITH_PORTS
    found = entries(rule(source=Entity(ports=Ports(names=("http",)))))
    assert {(each.l4, each.source) for each in found} == {
        (protocol(TCP), ((80, 80),)), (protocol(TCP), ((8080, 8080),)), (protocol(UDP), ((80, 80),)),
    }  # fmt: skip


def test_source_ports_that_are_excluded() -> None:
    """Each protocol with ports has its remaining ports. Other protocols are not restricted."""
    found = entries(rule(source=Entity(not_ports=Ports(((1, 10),), ("http",)))))
    free = {(each.l4, each.source) for each in found if not each.peer.negative}
    assert free == {
        (WITHOUT_PORTS, ANY_SOURCE),
        (protocol(TCP), ((0, 0), (11, 79), (81, 8079), (8081, 65535))),
        (protocol(UDP), ((0, 0), (11, 79), (81, 65535))),
        (protocol(SCTP), ((0, 0), (11, 65535))),
    }
    asked = {(each.l4, each.source, *each.peer.negative) for each in found if each.peer.negative}
    assert asked == {
        (protocol(number), ((port, port),), NamedPortTerm(None, "http", number, port))
        for number, port in ((TCP, 80), (TCP, 8080), (UDP, 80))
    }


def test_service_by_address_and_by_triple() -> None:
    """With ports, each (protocol, port) is an entry. A backend without a port has none."""
    (plain,) = entries(rule(source=Entity(service=BackendMatch("n", "s", match_ports=False))))
    assert plain.peer.positive == {ServiceTerm("n", "s")}
    found = entries(rule(destination=Entity(service=BackendMatch("n", "s", match_ports=True))), Direction.EGRESS)
    assert {(each.l4, each.peer.positive) for each in found} == {
        (ports((number,), ((port, port),)), frozenset({ServiceTerm("n", "s", number, port)}))
        for number, port in ((TCP, 443), (UDP, 53))
    }
