# SPDX-License-Identifier: Apache-2.0
"""The compiled tables give the verdicts of the reference model: outcome, cause, pending verdict and logs, for every question."""

from __future__ import annotations

from ipaddress import ip_address

import hypothesis.strategies as st
import yaml
from calico_manifests import calico_clusters, calico_pairs, calico_probes_between
from hypothesis import given, settings
from manifests import Manifest
from strategies import packets, questions_about, worlds

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.interpreter import Interpreter
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import ICMP, ICMPV6, Packet, Question, World
from netpol_ebpf.resources.load import parse_documents

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
