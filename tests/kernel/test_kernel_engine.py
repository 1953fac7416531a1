# SPDX-License-Identifier: Apache-2.0
"""The program in the kernel against the reference model, through the kernel engine: real maps, real packets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, assume, given, settings

sys.path.insert(0, str(Path(__file__).parent.parent / "property"))

from strategies import packets, questions_about, worlds
from test_names_agree import asked as asked_with_names
from test_names_agree import named_worlds
from test_names_agree import names as some_names

from netpol_ebpf.apply.kernel_engine import KernelEngine, NotJudgedError, abandoned
from netpol_ebpf.cases.case import load_cases
from netpol_ebpf.cases.runner import run_cases
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.journey import Flow, Topology
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    IPV6_HEADERS,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    Direction,
    EndpointKey,
    EndpointKind,
    Outcome,
    Packet,
    Question,
    Stage,
    World,
)
from netpol_ebpf.resources.load import parse_documents

pytestmark = pytest.mark.kernel

REPOSITORY = Path(__file__).parent.parent.parent
EXAMPLES = int(os.environ.get("NETPOL_KERNEL_EXAMPLES", "40"))
"""Worlds per property; each costs some 100 packets."""

SHOP = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.2}, {ip: "fd00::2"}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{protocol: UDP, port: 53}]}]
"""
WEB, DB = (EndpointKey("Pod", "shop", name) for name in ("web", "db"))


@pytest.fixture(scope="module")
def engine() -> Iterator[KernelEngine]:
    with KernelEngine() as one:
        yield one


def question(
    endpoint: EndpointKey, direction: Direction, source: str, destination: str, protocol: int, *ports: int
) -> Question:
    packet = Packet(ip_address(source), ip_address(destination), protocol, *ports)
    return Question(endpoint, direction, Stage.NORMAL, packet)


def is_asked(world: World, asked: Question) -> bool:
    """Whether the packet can be the endpoint's at all, and whether policy judges it."""
    packet = asked.packet
    version = packet.source.version
    if (packet.protocol, version) in ((ICMP, 6), (ICMPV6, 4)) or (packet.protocol, packet.icmp_type) == (ICMPV6, 135):
        return False
    endpoint = world.endpoints.get(asked.endpoint)
    if endpoint is None or endpoint.kind is EndpointKind.HOST:
        return True
    own = packet.destination if asked.direction is Direction.INGRESS else packet.source
    owners = [key for key, one in world.endpoints.items() if own in one.addresses]
    return owners == [asked.endpoint]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(worlds(max_policies=3), min_size=1, max_size=3), drawn=st.lists(packets(), min_size=1, max_size=5)
)
def test_kernel_agrees_with_the_model(engine: KernelEngine, steps: list[World], drawn: list[Packet]) -> None:
    """Clusters one after another, as changes of live maps: verdict, cause, pending verdict and logs equal the model's."""
    for world in steps:
        engine.load(world)
        model = ReferenceModel(world)
        for asked in questions_about(world, drawn):
            if is_asked(world, asked):
                assert engine.decide(asked) == model.decide(asked), asked


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(named_worlds(max_policies=3), min_size=1, max_size=3),
    drawn=st.lists(packets(), min_size=1, max_size=4),
    known=some_names,
)
def test_kernel_agrees_with_the_model_on_names(
    engine: KernelEngine, steps: list[World], drawn: list[Packet], known: frozenset[str]
) -> None:
    """Domain names beside everything else, learned and not: the program says the same as the model after each change."""
    for world in steps:
        engine.load(world)
        model = ReferenceModel(world)
        for asked in asked_with_names(world, drawn, known):
            if is_asked(world, asked):
                assert engine.decide(asked) == model.decide(asked), asked


NAMED = """\
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: names}
spec:
  selector: app == 'web'
  types: [Egress]
  egress:
  - {action: Allow, protocol: TCP, destination: {domains: ["*.example.com", "api.*.org"], ports: [443]}}
"""


@pytest.mark.parametrize(("web", "site"), [("10.0.0.1", "192.0.2.1"), ("fd00::1", "2001:db8::1")], ids=["ipv4", "ipv6"])
def test_names_of_a_question_count_for_it_alone(engine: KernelEngine, web: str, site: str) -> None:
    """The engine lets the endpoint know the names of a question, and nothing of them at the next one."""
    engine.load(derive(parse_documents(SHOP + NAMED, "shop.yaml").check()))
    nameless = question(WEB, Direction.EGRESS, web, site, TCP, 4000, 443)
    for name, outcome in (
        ("www.example.com", Outcome.ALLOW), ("example.com", Outcome.DENY), ("api.a.b.org", Outcome.ALLOW),
        ("api.org", Outcome.DENY), ("xapi.a.org", Outcome.DENY),
    ):  # fmt: skip
        assert engine.decide(replace(nameless, names=frozenset({name}))).outcome is outcome
        assert engine.decide(nameless).outcome is Outcome.DENY
    both = frozenset({"other.net", "a.example.com"})
    assert engine.decide(replace(nameless, names=both)).outcome is Outcome.ALLOW
    ingress = question(WEB, Direction.INGRESS, site, web, TCP, 4000, 443)
    assert engine.decide(replace(ingress, names=both)) == engine.decide(ingress)


NODES = """\
---
{apiVersion: v1, kind: Node, metadata: {name: 'n'}, status: {addresses: [{type: InternalIP, address: 172.16.0.1}, {type: InternalIP, address: "fd16::1"}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: m}, status: {addresses: [{type: InternalIP, address: 172.16.0.2}, {type: InternalIP, address: "fd16::2"}]}}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: any}
spec: {node: 'n', interfaceName: "*", expectedIPs: [172.16.0.1, "fd16::1"], profiles: [projectcalico-default-allow]}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: eth0}
spec: {node: m, interfaceName: eth0, expectedIPs: [172.16.0.2, "fd16::2"]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: forward}
spec: {applyOnForward: true, types: [Ingress, Egress], ingress: [{action: Allow, protocol: UDP}], egress: [{action: Allow}]}
"""
ENDS = {
    4: ("10.0.0.1", "10.0.0.2", "172.16.0.1", "172.16.0.2", "192.0.2.1", "10.96.0.1", "224.0.0.1", "255.255.255.255"),
    6: ("fd00::1", "fd00::2", "fd16::1", "fd16::2", "2001:db8::1", "fd96::1", "ff02::1", "fe80::1"),
}


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Any protocol between any two ends, with or without translation."""
    version = draw(st.sampled_from((4, 6)))
    source, destination, behind = (ip_address(draw(st.sampled_from(ENDS[version][:ends]))) for ends in (5, 8, 5))
    protocol = draw(st.sampled_from((TCP, UDP, SCTP, ICMP, ICMPV6)) | st.integers(0, 255))
    assume(version == 4 or protocol not in IPV6_HEADERS)
    packet = Packet(source, destination, protocol)
    if protocol in PORT_PROTOCOLS:
        ports = st.sampled_from((0, 22, 53, 67, 68, 80, 546, 547, 4789, 40000))
        packet = replace(packet, source_port=draw(ports), destination_port=draw(ports))
    elif (protocol, version) in ((ICMP, 4), (ICMPV6, 6)):
        kinds = st.sampled_from((3, 5, 8, 128, 130, 133, 134, 135, 136, 137, 143)) | st.integers(0, 255)
        packet = replace(packet, icmp_type=draw(kinds), icmp_code=draw(st.sampled_from((0, 1))))
    has_ports = protocol in PORT_PROTOCOLS
    return Flow(packet, (behind, 8080 if has_ports else 0) if draw(st.booleans()) else None)


def test_every_question_of_a_journey_is_answered(engine: KernelEngine) -> None:
    """For any packet between any two ends, each question of its journey is about a packet that policy judges."""
    world = derive(parse_documents(SHOP + NODES, "shop.yaml").check())
    engine.load(world)
    topology, model = Topology(world), ReferenceModel(world)

    @settings(max_examples=20 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(flow=flows())
    def is_answered(flow: Flow) -> None:
        for asked in topology.plan(flow).questions():
            assert engine.decide(asked) == model.decide(asked), asked

    is_answered()


def test_case_files_of_the_repository_pass() -> None:
    """Every case file of the repository has the expected verdict in kernel, tables and model, by the same rule."""
    paths = [path for path in (REPOSITORY / "examples" / "cases", REPOSITORY / "tests" / "cases") if path.is_dir()]
    report = run_cases(load_cases(paths), "all")
    assert report.probes > 100
    assert [(failure.case, failure.got, failure.rule) for failure in report.failed] == []
    assert report.invalid == []


def test_questions_do_not_see_each_other(engine: KernelEngine) -> None:
    """An allowed packet influences no later question: not its reply, nor the same packet under another policy."""
    engine.load(derive(parse_documents(SHOP, "shop.yaml").check()))
    there = question(DB, Direction.INGRESS, "10.0.0.1", "10.0.0.2", UDP, 4000, 53)
    back = question(DB, Direction.EGRESS, "10.0.0.2", "10.0.0.1", UDP, 53, 4000)
    first = engine.decide(there)
    assert first.outcome is Outcome.ALLOW
    assert engine.decide(back).cause.direction is Direction.EGRESS
    assert engine.decide(there) == first
    engine.load(derive(parse_documents(SHOP.replace("port: 53", "port: 54"), "shop.yaml").check()))
    assert engine.decide(there).outcome is Outcome.DENY


def test_staged_policy_is_reported_beside_the_enforced_one(engine: KernelEngine) -> None:
    """The pending verdict, too, comes from the program."""
    staged = SHOP.replace(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy", "apiVersion: projectcalico.org/v3\nkind: StagedKubernetesNetworkPolicy"
    )  # fmt: skip
    engine.load(derive(parse_documents(staged, "shop.yaml").check()))
    verdict = engine.decide(question(DB, Direction.INGRESS, "10.0.0.1", "10.0.0.2", TCP, 4000, 53))
    assert (verdict.outcome, verdict.staged_outcome) == (Outcome.ALLOW, Outcome.DENY)


def test_packets_that_policy_is_not_asked_about_are_told_apart(engine: KernelEngine) -> None:
    """Neighbour discovery and a borrowed source give no verdict of policy."""
    engine.load(derive(parse_documents(SHOP, "shop.yaml").check()))
    solicitation = Packet(ip_address("fd00::1"), ip_address("ff02::1:ff00:2"), ICMPV6, icmp_type=135)
    for asked, reason, passed in (
        (Question(WEB, Direction.EGRESS, Stage.NORMAL, solicitation), "passed without an event", True),
        (question(WEB, Direction.EGRESS, "10.0.0.2", "192.0.2.1", TCP, 1, 2), "spoofed", False),
    ):
        with pytest.raises(NotJudgedError) as caught:
            engine.decide(asked)
        assert (caught.value.reason, caught.value.passed) == (reason, passed)


@pytest.mark.parametrize("over_veth", [False, True])
@pytest.mark.parametrize("destination", ["10.0.0.1", "fd00::1"])
def test_what_a_workload_sends_to_itself_through_a_service_is_judged(destination: str, over_veth: bool) -> None:  # noqa: FBT001
    """Egress policy judges what a workload sends to itself through a service, with pending verdict and logs."""
    egress = """\
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: log}
spec: {order: 1, selector: app == 'web', types: [Egress], egress: [{action: Log}]}
---
apiVersion: projectcalico.org/v3
kind: StagedGlobalNetworkPolicy
metadata: {name: staged}
spec: {order: 2, selector: app == 'web', types: [Egress], egress: [{action: Deny}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: web}
spec: {order: 3, selector: app == 'web', types: [Egress], egress: [{action: Allow, protocol: UDP, destination: {ports: [80]}}]}
"""
    world = derive(parse_documents(SHOP + egress, "shop.yaml").check())
    model = ReferenceModel(world)
    with KernelEngine(over_veth=over_veth) as one:
        one.load(world)
        for source_port, port in ((4000, 80), (4000, 81), (80, 80), (81, 81)):
            asked = question(WEB, Direction.EGRESS, destination, destination, UDP, source_port, port)
            assert one.decide(asked) == model.decide(asked)
            assert model.decide(asked).outcome is (Outcome.ALLOW if port == 80 else Outcome.DENY)
            back = question(WEB, Direction.INGRESS, destination, destination, UDP, source_port, port)
            assert one.decide(back) == model.decide(back)


def test_unknown_endpoint_is_denied(engine: KernelEngine) -> None:
    """An unknown endpoint passes nothing, and the cause says that nothing decided."""
    engine.load(derive(parse_documents(SHOP, "shop.yaml").check()))
    asked = question(EndpointKey("Pod", "shop", "ghost"), Direction.INGRESS, "10.0.0.1", "10.0.0.9", TCP, 1, 2)
    assert engine.decide(asked) == ReferenceModel(World()).decide(asked)


def own_roots() -> set[str]:
    """The pin roots of this process's engines."""
    return {path.name for path in Path("/sys/fs/bpf").glob(f"netpol-engine-{os.getpid()}-*")}


def test_engine_leaves_nothing(tmp_path: Path) -> None:
    """The pin directory goes with the engine, even if its start fails; one of a killed process is found."""
    before = own_roots()
    with KernelEngine():
        assert len(own_roots() - before) == 1
    assert own_roots() == before
    with pytest.raises(PlatformError), KernelEngine(tmp_path / "elsewhere"):
        pass
    (tmp_path / "netpol-engine-4194999-0").mkdir()
    (tmp_path / f"netpol-engine-{os.getpid()}-0").mkdir()
    assert [path.name for path in abandoned(tmp_path)] == ["netpol-engine-4194999-0"]
