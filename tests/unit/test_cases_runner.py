# SPDX-License-Identifier: Apache-2.0
"""The runner: the packets of a probe, the counts, and disagreements of engines."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from netpol_ebpf.cases import runner
from netpol_ebpf.cases.case import Case, LoadedCases, parse_cases
from netpol_ebpf.cases.engines import Engine, ModelEngine
from netpol_ebpf.cases.runner import NOT_JUDGED, Cast, in_order, run_cases
from netpol_ebpf.errors import InvalidInputError, NetpolError
from netpol_ebpf.policy.journey import FlowEndKind, HopReason
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import (
    IPV6_HEADERS,
    Action,
    Cause,
    CauseKind,
    Direction,
    Outcome,
    Packet,
    Question,
    Verdict,
    World,
)

MANIFESTS = """\
manifests:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 172.16.0.1}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: four, namespace: ns}, status: {podIPs: [{ip: 10.0.0.4}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: six, namespace: ns}, status: {podIPs: [{ip: 'fd00::6'}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: dual, namespace: ns}, status: {podIPs: [{ip: 10.0.0.2}, {ip: 'fd00::2'}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: twin, namespace: ns}, status: {podIPs: [{ip: 'fd00::3'}, {ip: 10.0.0.3}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: none, namespace: ns}, status: {}}
- {apiVersion: v1, kind: Pod, metadata: {name: hostly, namespace: ns}, spec: {hostNetwork: true, nodeName: n7}, status: {podIPs: [{ip: 172.16.0.7}]}}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: no-v6, namespace: ns}
  spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]}
"""


def cases(*probes: str, manifests: str = MANIFESTS, name: str = "case", extra: str = "") -> LoadedCases:
    loaded = LoadedCases()
    text = f"name: {name}\n{extra}{manifests}probes:\n" + "".join(f"- {{{probe}}}\n" for probe in probes)
    parse_cases(text, "c.yaml", loaded)
    assert not loaded.invalid, loaded.invalid
    return loaded


def packets(probe: str) -> list[Packet]:
    (case,) = cases(probe + ", expect: allow").cases
    return [journey.flow.packet for journey in Cast(case.resources, derive(case.resources)).journeys(case.probes[0])]


def test_an_address_decides_the_family() -> None:
    """The address decides for a pod with both families."""
    (packet,) = packets("from: ns/dual, to: 'fd00::9', protocol: TCP, port: 80")
    assert packet == Packet(ip_address("fd00::2"), ip_address("fd00::9"), 6, 40000, 80)
    (packet,) = packets("from: 10.0.0.9, to: ns/dual, protocol: UDP, port: 53, srcPort: 7")
    assert packet == Packet(ip_address("10.0.0.9"), ip_address("10.0.0.2"), 17, 7, 53)


def test_two_pods_with_both_families_are_probed_with_both() -> None:
    """An ICMP probe has only one of the families."""
    versions = [packet.source.version for packet in packets("from: ns/dual, to: ns/twin, protocol: TCP, port: 80")]
    assert versions == [4, 6]
    for protocol, version, icmp_type in (("ICMP", 4, 8), ("ICMPv6", 6, 128)):
        (packet,) = packets(f"from: ns/dual, to: ns/twin, protocol: {protocol}")
        assert (packet.source.version, packet.icmp_type, packet.destination_port) == (version, icmp_type, 0)


def test_numbered_protocols_have_no_ports() -> None:
    """Only ICMP has type and code."""
    (packet,) = packets("from: ns/four, to: ns/dual, protocol: 47")
    assert (packet.source_port, packet.destination_port, packet.icmp_type) == (0, 0, 0)
    (packet,) = packets("from: ns/four, to: ns/dual, protocol: 1, icmpType: 3, icmpCode: 1")
    assert (packet.icmp_type, packet.icmp_code) == (3, 1)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("from: ns/four, to: ns/gone", "c.yaml:15: the probe names the pod ns/gone, which does not exist"),
        ("from: ns/none, to: ns/four", "the pod ns/none, which has no address"),
        ("from: ns/four, to: ns/six", "no address family in common"),
        ("from: ns/four, to: ns/dual, dnatTo: {ip: 'fd00::6'}", "no address family in common"),
    ],
)
def test_a_probe_of_nothing_makes_its_case_invalid(ends: str, message: str) -> None:
    """The case is listed and not run, and the run continues."""
    report = run_cases(cases(ends + ", protocol: TCP, port: 80, expect: allow"))
    assert (report.cases, report.probes, report.failed) == (0, 0, [])
    assert message in report.invalid[0].error
    assert report.invalid[0].case == "case"


def test_host_network_pods_are_their_host() -> None:
    """Such a pod is meant by its name, by its address if no Node has it, and as the target of a translation."""
    (case,) = cases(
        "from: ns/hostly, to: ns/four, protocol: TCP, port: 80, expect: allow",
        "from: 172.16.0.7, to: ns/four, protocol: TCP, port: 80, expect: allow",
        "from: ns/four, to: 10.96.0.1, protocol: TCP, port: 80, dnatTo: {ip: 172.16.0.7}, expect: allow",
    ).cases
    cast = Cast(case.resources, derive(case.resources))
    first, second, third = (next(cast.journeys(probe)).flow for probe in case.probes)
    assert first.source is not None
    assert second.source == first.source
    assert (first.source.kind, first.source.node) == (FlowEndKind.HOST, "n7")
    assert third.destination == first.source
    assert third.dnat_to == (ip_address("172.16.0.7"), 80)


def test_the_report_counts_and_names() -> None:
    """A probe of two families fails if one of them does. The deciding rule is named."""
    report = run_cases(
        cases(
            "from: ns/four, to: ns/dual, protocol: TCP, port: 80, expect: allow",
            "from: ns/dual, to: ns/twin, protocol: TCP, port: 80, expect: allow",
            "from: ns/dual, to: ns/six, protocol: TCP, port: 80, expect: deny",
            "from: ns/dual, to: ns/four, protocol: TCP, port: 80, expect: deny",
        )
    )
    assert report.as_dict() == {
        "cases": 1,
        "probes": 4,
        "failed": [
            {
                "case": "case",
                "probe": {"from": "ns/dual", "to": "ns/twin", "protocol": "TCP", "port": 80, "expect": "allow"},
                "expected": "allow",
                "got": "deny",
                "rule": "Pod/ns/twin: default|end of tier|ingress|KubernetesNetworkPolicy/ns/no-v6|deny",
            },
            {
                "case": "case",
                "probe": {"from": "ns/dual", "to": "ns/four", "protocol": "TCP", "port": 80, "expect": "deny"},
                "expected": "deny",
                "got": "allow",
                "rule": "Pod/ns/four: default|KubernetesNetworkPolicy/ns/no-v6|ingress|0|allow",
            },
        ],
        "invalid": [],
    }
    assert [judged.got for judged in report.judged] == ["allow", "deny", "deny", "allow"]


def test_steps_of_a_sequence_run_in_order_where_the_first_of_them_stands() -> None:
    """The order of the files does not matter."""
    probe = "from: ns/four, to: ns/dual, protocol: TCP, port: 80, expect: allow"

    def one(name: str, sequence: str = "") -> Case:
        extra = f"sequence: {{{sequence}}}\n" if sequence else ""
        return cases(probe, name=name, extra=extra).cases[0]

    given = [
        one("a"),
        one("g10", "group: g, step: 10"),
        one("b"),
        one("h1", "group: h, step: 1"),
        one("g2", "group: g, step: 2"),
    ]
    assert [case.name for case in in_order(given)] == ["a", "g2", "g10", "b", "h1"]


class Contrary(ModelEngine):
    """An engine that answers like the model, except for one field of packets that one rule allows."""

    def __init__(self, change: dict[str, object]) -> None:
        super().__init__()
        self.change = change
        self.loaded: list[World] = []

    def load(self, world: World, names: Collection[str] = ()) -> None:
        """See `ModelEngine`."""
        super().load(world, names)
        self.loaded.append(world)

    def decide(self, question: Question) -> Verdict:
        """See `ModelEngine`."""
        verdict = super().decide(question)
        return replace(verdict, **self.change) if question.direction is Direction.INGRESS else verdict  # type: ignore[arg-type]


OTHER_CAUSE = Cause(CauseKind.PROFILE, Direction.INGRESS, profile="x", index=1, action=Action.ALLOW)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"outcome": Outcome.DENY}, "engines disagree (model: allow, tables: deny, kernel: allow)"),
        ({"cause": OTHER_CAUSE}, "engines disagree (model: allow, tables: allow, kernel: allow)"),
        ({"staged_outcome": Outcome.DENY}, "engines disagree (model: allow, tables: allow, kernel: allow)"),
        ({"logs": (OTHER_CAUSE,)}, "engines disagree (model: allow, tables: allow, kernel: allow)"),
    ],
)
def test_engines_that_disagree_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], got: str
) -> None:
    """They may differ in verdict, rule, staged verdict or log, even if each is as expected."""

    @contextlib.contextmanager
    def open_engine(name: str) -> Iterator[Engine]:
        yield Contrary(change) if name == "tables" else ModelEngine()

    monkeypatch.setattr(runner, "open_engine", open_engine)
    report = run_cases(cases("from: ns/four, to: ns/dual, protocol: TCP, port: 80, expect: allow"), "all")
    (failure,) = report.failed
    assert failure.got == got
    assert failure.rule.startswith("Pod/ns/dual ingress normal: model: allow by default|")
    assert "; tables: " in failure.rule


@pytest.mark.parametrize("slug", [NOT_JUDGED, NetpolError.slug])
def test_a_packet_that_an_engine_does_not_judge_is_a_failure(monkeypatch: pytest.MonkeyPatch, slug: str) -> None:
    """The packet is shown and the run continues, also if the engine has a fault."""

    class Mute(ModelEngine):
        def decide(self, question: Question) -> Verdict:
            if question.packet.destination_port == 81:
                return super().decide(question)
            error = NetpolError(f"nothing to say to {question.direction.value}")
            error.slug = slug  # type: ignore[misc]  # as the kernel engine's own error has it
            raise error

    @contextlib.contextmanager
    def open_engine(_: str) -> Iterator[Engine]:
        yield Mute()

    monkeypatch.setattr(runner, "open_engine", open_engine)
    probes = (f"from: ns/four, to: ns/dual, protocol: TCP, port: {port}, expect: allow" for port in (80, 81))
    report = run_cases(cases(*probes), "kernel")
    (failure,) = report.failed
    assert report.probes == len(report.judged) == 2
    assert (failure.got, failure.rule) == (
        "not judged by kernel",
        "Pod/ns/four egress normal: nothing to say to egress",
    )


@pytest.mark.parametrize("protocol", sorted(IPV6_HEADERS))
def test_headers_of_ipv6_are_protocols_over_ipv4_alone(protocol: int) -> None:
    """Between pods of both families, the probe is only of IPv4.

    Over IPv6 alone the case is not valid; the others run.
    """
    both = cases(f"from: ns/dual, to: ns/dual, protocol: {protocol}, expect: allow")
    (probe,) = both.cases[0].probes
    world = derive(both.cases[0].resources)
    (journey,) = Cast(both.cases[0].resources, world).journeys(probe)
    assert (journey.flow.packet.source.version, journey.flow.packet.protocol) == (4, protocol)
    both.cases.append(cases(f"from: 'fd00::9', to: 'fd00::8', protocol: {protocol}, expect: allow").cases[0])
    report = run_cases(both)
    assert (report.cases, report.failed) == (1, [])
    (invalid,) = report.invalid
    assert f"protocol {protocol} over IPv6 is a header" in invalid.error


def test_a_world_an_engine_refuses_makes_the_case_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, if a limit is exceeded."""

    class Refusing(ModelEngine):
        def load(self, world: World, names: Collection[str] = ()) -> None:  # noqa: ARG002
            raise InvalidInputError(f"too many endpoints: {len(world.endpoints)}")

    @contextlib.contextmanager
    def open_engine(_: str) -> Iterator[Engine]:
        yield Refusing()

    monkeypatch.setattr(runner, "open_engine", open_engine)
    report = run_cases(cases("from: ns/four, to: ns/dual, protocol: TCP, port: 80, expect: allow"))
    assert [(invalid.case, invalid.error) for invalid in report.invalid] == [("case", "too many endpoints: 5")]


def test_a_reason_is_shown_in_words() -> None:
    """A verdict without a rule shows its reason as text."""
    report = run_cases(cases("from: ns/four, to: ns/four, protocol: TCP, port: 80, expect: deny"))
    assert report.failed[0].rule == HopReason.TO_ITSELF.value
    assert report.failed[0].location == "c.yaml:15"
