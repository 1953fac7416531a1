# SPDX-License-Identifier: Apache-2.0
"""What `explain` answers about domain names: for a case's answers, and for a name whose addresses are not known."""

from __future__ import annotations

import argparse
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from worlds import read

from netpol_ebpf.analysis.explanation import UNKNOWN_ADDRESS, Ways, as_request, explain, names_of, parse_request
from netpol_ebpf.analysis.names import stand_ins
from netpol_ebpf.cases.answers import DomainName
from netpol_ebpf.cases.case import Probe, load_cases
from netpol_ebpf.cases.engines import open_engine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.cli.explain import parse_destination, render
from netpol_ebpf.errors import InvalidInputError, UsageError
from netpol_ebpf.policy.learned_names import LearnedNames
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import TCP, EndpointKey

CASES = load_cases([Path(__file__).parents[1] / "cases" / "names"]).cases
CLUSTER = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: a, labels: {app: web}}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: cdn, namespace: a, labels: {for: cdn}}
spec: {allowedEgressDomains: ["*.example.com"]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: p, namespace: a}
spec:
  egress:
  - {action: Deny, destination: {nets: [192.0.2.0/24]}}
  - {action: Allow, protocol: TCP, destination: {domains: [api.example.com], ports: [443]}}
  - {action: Allow, protocol: TCP, destination: {selector: for == 'cdn', ports: [8443]}}
  types: [Egress]
"""


def ask(
    name: str,
    port: int = 443,
    learned: LearnedNames | None = None,
    source: Any = ("a", "web"),
    cluster: str = CLUSTER,
    engine: str = "model",
) -> Ways:
    resources = read(cluster)
    world = derive(resources)
    probe = Probe(source, DomainName(name), TCP, expect_allow=True, port=port)
    with open_engine(engine) as judge:
        judge.load(world, names_of(probe))
        return explain(Cast(resources, world), world, probe, judge, learned=learned)


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_each_probe_with_names_is_explained_as_its_case_expects(engine: str) -> None:
    """Every way is allowed, or denied, as the case says, and a rule that matched by a name says by which."""
    wrong, named = [], 0
    with open_engine(engine) as judge:
        for case in CASES:
            world = derive(case.resources)
            cast = Cast(case.resources, world)
            judge.load(world, {name for answer in case.answers for name in answer.names})
            for probe in case.probes:
                if isinstance(probe.destination, DomainName):
                    continue
                for way in explain(cast, world, probe, judge, learned=cast.learned(case.answers, probe.at_s)):
                    names = [name for step in way["steps"] for name in step["names"]]
                    named += bool(names)
                    if way["allowed"] != probe.expect_allow or not all(name in str(way["steps"]) for name in names):
                        wrong.append((case.name, probe.written))
    assert wrong == []
    assert named > 30


def test_a_name_without_a_known_address() -> None:
    """The answer is for an address in no CIDR of a rule, it names the rules for the name, and says so."""
    (way,) = ask("api.example.com")
    assert (way["allowed"], way["name"], way["address_known"]) == (True, "api.example.com", False)
    assert way["destination"] == way["steps"][0]["destination"] == "api.example.com"
    assert way["note"] == UNKNOWN_ADDRESS
    assert way["steps"][0]["sentence"].endswith("for the name api.example.com")
    assert [(one["rule"], one["patterns"], one["sets"]) for one in way["named_rules"]] == [
        (1, ["api.example.com"], []),
        (2, ["*.example.com"], ["a/cdn"]),
    ]
    text = render(way)
    assert text.startswith("ALLOWED  10.0.0.1 -> api.example.com TCP port 443\n")
    assert "api.example.com matches *.example.com of the network set a/cdn: egress rule 2 of NetworkPolicy/a/p" in text


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_a_name_that_a_wildcard_inside_matches(engine: str) -> None:
    """Compiled tables have a row for the name, as they have it in the agent once it has seen the name."""
    (way,) = ask("s3.eu.example.org", cluster=CLUSTER.replace("api.example.com", "s3.*.example.org"), engine=engine)
    assert (way["allowed"], way["named_rules"][0]["patterns"]) == (True, ["s3.*.example.org"])


@pytest.mark.parametrize(
    ("name", "port", "allowed", "rules"),
    [
        ("www.example.com", 8443, True, 1),
        ("www.example.com", 443, False, 1),
        ("example.org", 443, False, 0),
    ],
)
def test_the_verdict_for_a_name(name: str, port: int, allowed: bool, rules: int) -> None:  # noqa: FBT001
    """Names of sets count, ports count, and a name without a rule is denied."""
    (way,) = ask(name, port)
    assert (way["allowed"], len(way["named_rules"])) == (allowed, rules)
    assert ("No rule with names" in render(way)) is not bool(rules)


def test_learned_addresses_are_judged_one_by_one() -> None:
    """With addresses that the sender knows, each has its own answer: here a Deny of a CIDR comes before the name."""
    learned = LearnedNames()
    for address in ("192.0.2.7", "203.0.113.7", "2001:db8::7"):
        learned.learn(EndpointKey("Pod", "a", "web"), ("api.example.com",), ip_address(address))
    ways = ask("api.example.com", learned=learned)
    assert [(way["destination"], way["allowed"], way["note"]) for way in ways] == [
        ("192.0.2.7", False, None),
        ("203.0.113.7", True, None),
    ]
    assert render(ways[1]).startswith("ALLOWED  10.0.0.1 -> api.example.com (203.0.113.7) TCP port 443\n")


def test_what_another_endpoint_learned_is_unknown() -> None:
    """Only what the sender itself learned is taken."""
    learned = LearnedNames()
    learned.learn(EndpointKey("Pod", "a", "other"), ("api.example.com",), ip_address("192.0.2.7"))
    assert [way["address_known"] for way in ask("api.example.com", learned=learned)] == [False]


def test_who_asks_for_a_name() -> None:
    """An address outside the cluster learns no names."""
    with pytest.raises(InvalidInputError, match="asks for a name"):
        ask("api.example.com", source=ip_address("192.0.2.1"))


def test_an_address_that_stands_for_an_unknown_one() -> None:
    """It is in no net of a rule, if any address is in none, and outside the cluster."""
    world = derive(read(CLUSTER))
    v4, v6 = stand_ins(world, lambda _: True)
    assert v4 not in world.policies[next(iter(world.policies))].egress[0].destination.nets[0]
    assert v6 == ip_address("2001:db8::1")
    crowded = derive(read(CLUSTER.replace("192.0.2.0/24", "192.0.0.0/2, 128.0.0.0/2, 0.0.0.0/1")))
    assert stand_ins(crowded, lambda _: True)[0] == ip_address("192.0.2.1")
    assert stand_ins(crowded, lambda address: address != v4)[0] not in (v4, v6)
    cast = Cast(read(CLUSTER), world)
    assert [cast.is_outside(ip_address(one)) for one in ("10.0.0.1", "192.0.2.1")] == [False, True]


def test_requests_carry_names() -> None:
    """What netpolctl sends is what the agent reads."""
    probe = Probe(("a", "web"), DomainName("api.example.com"), TCP, expect_allow=True, port=443)
    assert parse_request(as_request(probe)).destination == DomainName("api.example.com")
    with pytest.raises(UsageError, match="domain name"):
        parse_request(as_request(probe) | {"destination": "nowhere"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("API.Example.com.", DomainName("api.example.com")),
        ("a/web", ("a", "web")),
        ("192.0.2.1", ip_address("192.0.2.1")),
    ],
)
def test_destinations(text: str, expected: object) -> None:
    """A name, a workload or an address."""
    assert parse_destination(text) == expected


@pytest.mark.parametrize("text", ["web", "192.0.2.300", "*.example.com", "a b.c", "a/b/c"])
def test_what_is_no_destination(text: str) -> None:
    """A word without a dot, a wrong address, a pattern."""
    with pytest.raises(argparse.ArgumentTypeError):
        parse_destination(text)
