# SPDX-License-Identifier: Apache-2.0
"""The compiled tables give the verdicts of the reference model: outcome, cause, pending verdict and logs, for every question."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import hypothesis.strategies as st
import yaml
from calico_manifests import calico_clusters, calico_pairs, calico_probes_between
from hypothesis import given, settings
from manifests import Manifest
from strategies import WORKLOADS, packets, questions_about, worlds

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.interpreter import Interpreter
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    TCP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Entity,
    LabelledNets,
    Outcome,
    Packet,
    Policy,
    PolicyKey,
    Question,
    Rule,
    Stage,
    World,
)
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.selector import EVERYTHING, equals

some_packets = st.lists(packets(), min_size=1, max_size=8)


def assert_agreement(compiler: Compiler, world: World, questions: list[Question]) -> None:
    """Both engines say the same of each question."""
    model, tables = ReferenceModel(world), Interpreter(compiler.tables)
    for question in questions:
        assert tables.decide(question) == model.decide(question), question


@settings(max_examples=2 * settings().max_examples)
@given(worlds(), some_packets)
def test_tables_agree_with_the_model(world: World, drawn: list[Packet]) -> None:
    """A world compiled at once."""
    compiler = Compiler()
    compiler.replace(world)
    compiler.commit()
    assert_agreement(compiler, world, questions_about(world, drawn))


@given(st.lists(worlds(max_policies=3), min_size=2, max_size=4), some_packets)
def test_tables_agree_after_each_change(steps: list[World], drawn: list[Packet]) -> None:
    """Worlds one after the other in one compiler, each as a change to the one before."""
    compiler = Compiler()
    for world in steps:
        compiler.replace(world)
        compiler.commit()
        assert_agreement(compiler, world, questions_about(world, drawn))


@given(worlds(), some_packets, st.data())
def test_local_endpoints_alone_have_rows(world: World, drawn: list[Packet], data: st.DataObject) -> None:
    """With some endpoints on another node, those that are local are judged as before, and only they have rows."""
    away = data.draw(st.sets(st.sampled_from(sorted(world.endpoints))))
    compiler = Compiler(lambda endpoint: endpoint.key not in away)
    compiler.replace(world)
    compiler.commit()
    assert set(compiler.tables.endpoints) == world.endpoints.keys() - away
    here = [question for question in questions_about(world, drawn) if question.endpoint not in away]
    assert_agreement(compiler, world, here)


def _without_own_labels(rule: Rule) -> Rule:
    """The rule with nothing but nets and port numbers asked of the destination."""
    destination = rule.destination
    return replace(
        rule,
        destination=Entity(
            nets=destination.nets,
            not_nets=destination.not_nets,
            ports=None if destination.ports is None else replace(destination.ports, names=()),
            not_ports=None if destination.not_ports is None else replace(destination.not_ports, names=()),
        ),
    )


@given(worlds(), some_packets)
def test_own_nets_are_asked_of_the_packet(world: World, drawn: list[Packet]) -> None:
    """A packet that comes to a workload for another address (multicast, routed) is judged by that address's nets."""
    for table in (world.policies, world.profiles):
        for key, obj in table.items():
            table[key] = replace(obj, ingress=tuple(map(_without_own_labels, obj.ingress)))  # type: ignore[index,assignment]
    compiler = Compiler()
    compiler.replace(world)
    compiler.commit()
    questions = [Question(key, Direction.INGRESS, Stage.NORMAL, packet) for key in world.endpoints for packet in drawn]
    assert_agreement(compiler, world, questions)


def test_own_addresses_with_other_owners_are_told_apart() -> None:
    """One of a pod's two addresses is in a network set that a rule selects as its destination, the other is not."""
    addresses = (ip_address("10.0.0.1"), ip_address("10.0.0.4"))
    pod = Endpoint(WORKLOADS[0], EndpointKind.WORKLOAD, {}, addresses)
    key = PolicyKey("GlobalNetworkPolicy", "", "p")
    rule = Rule(Action.ALLOW, 0, destination=Entity(selector=equals("app", "a")))
    world = World(
        policies={key: Policy(key, "default", 1.0, EVERYTHING, frozenset({Direction.INGRESS}), (rule,))},
        endpoints={pod.key: pod},
        network_sets={"s": LabelledNets("s", {"app": "a"}, (ip_network("10.0.0.4/31"),))},
    )
    compiler = Compiler()
    compiler.replace(world)
    compiler.commit()
    interpreter = Interpreter(compiler.tables)
    packets_to_it = [Packet(ip_address("192.0.2.9"), address, TCP, 1, 1) for address in addresses]
    questions = [Question(pod.key, Direction.INGRESS, Stage.NORMAL, packet) for packet in packets_to_it]
    assert [interpreter.decide(question).outcome for question in questions] == [Outcome.DENY, Outcome.ALLOW]
    assert_agreement(compiler, world, questions)


def _packet(probe: tuple[str, str, str, int, int]) -> Packet:
    source, destination = ip_address(probe[0]), ip_address(probe[1])
    if probe[2] == "ICMP":
        six = source.version == 6
        return Packet(source, destination, ICMPV6 if six else ICMP, icmp_type=128 if six else 8)
    numbers = {"TCP": 6, "UDP": 17, "SCTP": 132, "UDPLite": 136, "47": 47}
    return Packet(source, destination, numbers[probe[2]], probe[3], probe[4])


@given(calico_clusters(), st.lists(calico_pairs(), min_size=2, max_size=2))
def test_tables_agree_on_manifests(manifests: list[Manifest], between: list[tuple[str, str, int]]) -> None:
    """Worlds as they come from manifests, with every protocol and port between two pairs of addresses."""
    world = derive(parse_documents(yaml.safe_dump_all(manifests, sort_keys=False), "cluster.yaml").check())
    compiler = Compiler()
    compiler.replace(world)
    compiler.commit()
    drawn = [_packet(probe) for pair in between for probe in calico_probes_between(*pair)]
    assert_agreement(compiler, world, questions_about(world, drawn))
