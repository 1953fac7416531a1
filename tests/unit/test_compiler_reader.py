# SPDX-License-Identifier: Apache-2.0
"""The reader of compiled tables: their content for whole classes of packets, in the terms of users."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from worlds import ALLOW, DENY, HOST, POD, by_rule, packet, policy, world

from netpol_ebpf.compiler import Compiler, TableReader
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE
from netpol_ebpf.compiler.reader import AddressesOfClass, Cell, ProtocolPorts, protocol_ports
from netpol_ebpf.compiler.terms import NetsTerm, ServiceTerm
from netpol_ebpf.policy.provenance import trace
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import (
    ICMP,
    SCTP,
    TCP,
    UDP,
    Action,
    Backend,
    BackendMatch,
    CauseKind,
    Direction,
    EndpointKey,
    Entity,
    IcmpType,
    Outcome,
    Ports,
    Rule,
    ServiceBackends,
    Stage,
    Staged,
    World,
)
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.selector import parse

DEMO = Path(__file__).parents[2] / "examples" / "demo"
DATABASE = EndpointKey("Pod", "shop", "database")


def compiled(objects: World) -> tuple[Compiler, TableReader]:
    """A compiler with these objects in force, and a reader of its tables."""
    compiler = Compiler()
    compiler.replace(objects)
    compiler.commit()
    return compiler, TableReader(compiler.tables)


def answers(reader: TableReader, endpoint: EndpointKey = POD, stage: Stage = Stage.NORMAL) -> list[Cell]:
    """The cells of an endpoint's ingress policy."""
    return list(reader.policy(endpoint, Direction.INGRESS, stage).answers())


def test_who_reaches_which_ports_and_which_rule_says_so() -> None:
    """Two allowed peers, by address and label, with ports and the place of each rule.

    The end of the tier denies the rest.
    """
    names = ("cluster.yaml", "pods.yaml", "database.yaml", "metrics.yaml", "default-deny.yaml")
    compiler, reader = compiled(derive(load_paths([DEMO / name for name in names]).check()))
    said = {}
    for cell in answers(reader, DATABASE):
        if cell.verdict.outcome is not Outcome.ALLOW:
            assert cell.verdict.cause.kind is CauseKind.TIER_END
            continue
        addresses = reader.addresses_of(cell.peer).addresses
        (owner,) = compiler.content_of(reader.identity_of(addresses[0])).owners
        location = trace(compiler.world, cell.verdict.cause).location
        assert location is not None
        written = Path(location.file).read_text(encoding="utf-8").splitlines()[location.line - 1]
        app = owner[1][owner[1].index("app") + 1]
        said[app] = ([*map(str, addresses)], Path(location.file).name, written.strip(), list(protocol_ports(cell.l4)))
    assert said == {
        "back-end": (
            ["10.244.1.11", "fd00:10:244:1::11"],
            "database.yaml",
            "- from:",
            [ProtocolPorts(TCP, ((5432, 5433),))],
        ),
        "prometheus": (
            ["10.244.1.20", "fd00:10:244:1::20"],
            "metrics.yaml",
            "- from:",
            [ProtocolPorts(TCP, ((9187, 9187),))],
        ),
    }


def test_addresses_of_a_class_are_networks_too() -> None:
    """A rule's nets have a class of their own. Addresses without a row are named by their family."""
    nets = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
    _, reader = compiled(world(policy("p", replace(ALLOW, source=Entity(nets=nets)))))
    allowed, denied = sorted(answers(reader), key=lambda cell: cell.verdict.outcome.value)
    assert reader.addresses_of(allowed.peer) == AddressesOfClass((), nets, ())
    known = (ip_address("10.0.0.1"), ip_address("172.16.0.1"))
    assert reader.addresses_of(denied.peer) == AddressesOfClass(known, (), (4, 6))
    assert (allowed.l4, allowed.source_ports) == (denied.l4, denied.source_ports) == (ANY_L4, ANY_SOURCE)


def test_the_content_of_an_identity() -> None:
    """The labels of the owners, and the nets and services of rules that have the address."""
    net, service = ip_network("10.0.0.0/8"), BackendMatch("ns", "db", match_ports=True)
    rules = (replace(ALLOW, source=Entity(nets=(net,))), replace(ALLOW, index=1, source=Entity(service=service)))
    objects = world(policy("p", *rules))
    backends = frozenset({Backend(ip_address("10.0.0.1"), TCP, 5432)})
    objects.services["ns", "db"] = ServiceBackends("ns", "db", backends)
    compiler, reader = compiled(objects)
    content = compiler.content_of(reader.identity_of(ip_address("10.0.0.1")))
    assert (content.family, [labels for _, labels, _ in content.owners]) == (4, [("app", "pod")])
    assert set(content.groups) == {NetsTerm(frozenset({net})), ServiceTerm("ns", "db", TCP, 5432)}
    assert compiler.content_of(reader.identity_of(ip_address("10.9.9.9"))).owners == ()
    with pytest.raises(KeyError):
        compiler.content_of(0)


def test_a_staged_policy_shows_in_the_staged_verdict() -> None:
    """Beside the enforced verdict and rule are those with the staged policy."""
    enforced = policy("p", ALLOW)
    staged = policy("s", DENY, order=0.5, staged=Staged.SET)
    _, reader = compiled(world(enforced, staged))
    (cell,) = answers(reader)
    assert (cell.verdict.outcome, cell.verdict.cause) == (Outcome.ALLOW, by_rule(enforced, 0, Action.ALLOW))
    assert (cell.verdict.staged_outcome, cell.verdict.staged_cause) == (Outcome.DENY, by_rule(staged, 0, Action.DENY))


def test_source_ports_are_of_protocols_that_have_ports() -> None:
    """Packets without ports are only in the cells with source port 0."""
    rule = replace(DENY, source=Entity(ports=Ports(((1, 1023),))))
    _, reader = compiled(world(policy("p", rule, replace(ALLOW, index=1))))
    said = {cell.source_ports: list(protocol_ports(cell.l4)) for cell in answers(reader) if cell.peer.identities}
    denied = [ProtocolPorts(number, None) for number in (TCP, UDP, SCTP)]
    assert said == {
        ((1, 1023),): denied,
        ((0, 0), (1024, 65535)): [ProtocolPorts(number, None) for number in range(256)],
    }


def test_icmp_types_are_values_of_their_protocol() -> None:
    """Type and code are one number. A cell with all values has none."""
    rule = Rule(Action.ALLOW, 0, protocol=ICMP, icmp=IcmpType(8, 0))
    _, reader = compiled(world(policy("p", rule)))
    allowed = [cell for cell in answers(reader) if cell.verdict.outcome is Outcome.ALLOW]
    assert {tuple(protocol_ports(cell.l4)) for cell in allowed} == {(ProtocolPorts(ICMP, ((2048, 2048),)),)}
    assert allowed[0].verdict.cause.index == 0


def test_where_nothing_applies_one_cell_is_everything() -> None:
    """A host's stage without policy continues. An unknown endpoint denies."""
    _, reader = compiled(world(policy("p", ALLOW)))
    (early,) = answers(reader, HOST, Stage.PRE_DNAT)
    assert (early.verdict.outcome, early.verdict.cause.kind) == (Outcome.CONTINUE, CauseKind.NO_MATCH)
    (unknown,) = answers(reader, EndpointKey("Pod", "ns", "unknown"), Stage.PRE_DNAT)
    assert (unknown.verdict.outcome, unknown.peer.identities) == (Outcome.DENY, frozenset(reader.versions))


def test_the_cell_of_a_packet() -> None:
    """The peer is the source on ingress, and the destination on egress."""
    _, reader = compiled(world(policy("p", replace(ALLOW, destination=Entity(selector=parse("app == 'pod'"))))))
    about = packet("192.0.2.1", "10.0.0.1")
    ingress = reader.policy(POD, Direction.INGRESS)
    assert reader.cell_of(ingress, Direction.INGRESS, about).verdict.outcome is Outcome.ALLOW
    egress = reader.policy(POD, Direction.EGRESS)
    assert reader.cell_of(egress, Direction.EGRESS, about).verdict.outcome is Outcome.ALLOW
    assert reader.cell_of(egress, Direction.EGRESS, packet("10.0.0.1", "192.0.2.1")).verdict.outcome is Outcome.DENY
