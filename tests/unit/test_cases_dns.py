# SPDX-License-Identifier: Apache-2.0
"""DNS answers of case files: what is read, what is refused, and who knows which name when."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from netpol_ebpf.cases.answers import DnsAnswer, DomainName
from netpol_ebpf.cases.case import LoadedCases, parse_cases
from netpol_ebpf.cases.runner import Cast, run_cases
from netpol_ebpf.policy.learned_names import LearnedNames
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import EndpointKey

POD = "{{apiVersion: v1, kind: Pod, metadata: {{name: {0}, namespace: 'n'}}, status: {{podIPs: [{1}]}}, spec: {{nodeName: n1{2}}}}}"
WEB, JOB = EndpointKey("Pod", "n", "web"), EndpointKey("Pod", "n", "job")
HOST = EndpointKey("HostEndpoint", "", "h")
MANIFESTS = [
    POD.format("web", "{ip: 10.0.0.1}, {ip: fd00::1}", ""),
    POD.format("job", "{ip: 10.0.0.2}", ""),
    POD.format("agent", "{ip: 172.16.0.1}", ", hostNetwork: true"),
    "{apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 172.16.0.1}]}}",
    "{apiVersion: projectcalico.org/v3, kind: HostEndpoint, metadata: {name: h}, spec: {node: n1, interfaceName: eth0, expectedIPs: [172.16.0.1]}}",
    "{apiVersion: projectcalico.org/v3, kind: NetworkPolicy, metadata: {name: p, namespace: 'n'}, spec: {types: [Egress], "
    "egress: [{action: Allow, destination: {domains: [api.example.com]}}]}}",
]
PROBE = "{from: n/web, to: 192.0.2.1, protocol: TCP, port: 443, expect: allow}"
A, B = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def case(dns: str, *probes: str) -> LoadedCases:
    loaded = LoadedCases()
    parts = ["name: c", "manifests:", *(f"- {one}" for one in MANIFESTS), f"dns: {dns}", "probes:"]
    parse_cases("\n".join([*parts, *(f"- {one}" for one in probes or (PROBE,))]), "c.yaml", loaded)
    return loaded


def failures(dns: str, *probes: str) -> list[str]:
    """The verdicts of the probes that did not go as expected, and the errors of a case that is not valid."""
    report = run_cases(case(dns, *probes))
    return [failure.got for failure in report.failed] + [invalid.error for invalid in report.invalid]


def test_answers_in_full() -> None:
    """Client, name, chain, addresses, time to live and time; names are written as they are compared."""
    text = (
        "[{client: n/web, name: API.Example.com., cnames: [a.cdn.net, B.cdn.net], addresses: [192.0.2.1, '2001:db8::1'], "
        "ttl: 300, at: 1.5}, {client: 172.16.0.1, name: x.org, addresses: [192.0.2.2]}]"
    )
    assert case(text).cases[0].answers == (
        DnsAnswer(
            ("n", "web"), ("api.example.com", "a.cdn.net", "b.cdn.net"), (A, ip_address("2001:db8::1")), 300, 1.5
        ),
        DnsAnswer(ip_address("172.16.0.1"), ("x.org",), (B,), 60, 0),
    )


def test_answers_in_short() -> None:
    """A mapping of names to addresses is what everybody asked for."""
    assert case("{api.example.com: [192.0.2.1], x.org: [192.0.2.2]}").cases[0].answers == (
        DnsAnswer(None, ("api.example.com",), (A,)),
        DnsAnswer(None, ("x.org",), (B,)),
    )


@pytest.mark.parametrize(
    ("dns", "message"),
    [
        ("[{addresses: [192.0.2.1]}]", "dns[0]: the field `name` is required"),
        ("[{name: '*.b.c', addresses: [192.0.2.1]}]", 'dns[0].name: must be a domain name such as "example.com"'),
        ("[{name: a.b, cnames: ['x y'], addresses: [192.0.2.1]}]", "dns[0].cnames[0]: must be a domain name"),
        ("[{name: a.b}]", "dns[0].addresses: must be a list of at least one IP address"),
        ("[{name: a.b, addresses: []}]", "dns[0].addresses: must be a list of at least one IP address"),
        ("[{name: a.b, addresses: [192.0.2.300]}]", "dns[0].addresses[0]: must be an IP address"),
        ("[{name: a.b, addresses: [192.0.2.1], ttl: -1}]", "dns[0].ttl: must be from 0"),
        ("[{name: a.b, addresses: [192.0.2.1], at: -1}]", "dns[0].at: must be a number of seconds"),
        ("[{name: a.b, addresses: [192.0.2.1], client: web}]", "dns[0].client: must be a pod as namespace/name or"),
        ("[{name: a.b, addresses: [192.0.2.1], TTL: 3}]", "unknown field `TTL`"),
        ("{192.0.2.1: [192.0.2.1]}", "must be a domain name"),
        ("{a.b: 192.0.2.1}", "dns[a.b]: must be a list of at least one IP address"),
        ("[a.b]", "dns[0]: must be a mapping"),
        ("a.b", "dns: must be a list"),
    ],
)
def test_what_is_refused(dns: str, message: str) -> None:
    """Each fault makes the case invalid, and says where it is."""
    loaded = case(dns)
    assert loaded.cases == []
    assert message in loaded.invalid[0].error


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("n/gone", "n/gone, which asks for a name, does not exist"),
        ("192.0.2.9", "192.0.2.9, which asks for a name, is the address of no workload and no host"),
    ],
)
def test_clients_that_do_not_exist(client: str, message: str) -> None:
    """A client must be a workload or a host of the case."""
    (error,) = failures(f"[{{client: {client}, name: a.b, addresses: [192.0.2.1]}}]")
    assert error.endswith(message)


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (None, (None,)),
        (("n", "web"), {WEB}),
        (ip_address("10.0.0.2"), {JOB}),
        (ip_address("172.16.0.1"), {HOST}),
        (("n", "agent"), {HOST}),
    ],
)
def test_who_learns(client: object, expected: object) -> None:
    """A workload, the host endpoint of an address, a pod of the host's network, or everybody."""
    (given,) = case("{}").cases
    assert Cast(given.resources, derive(given.resources)).learners(client) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ttl", "at", "expected"),
    [
        (0, 9.9, False),
        (0, 10, True),
        (0, 39.9, True),
        (0, 40, False),
        (60, 69.9, True),
        (60, 70, False),
        (0, None, True),
    ],
)
def test_how_long_an_answer_counts(ttl: int, at: float | None, expected: bool) -> None:  # noqa: FBT001 - a table
    """From its time on, for its time to live or 30 seconds, whichever is longer; without a time always."""
    assert DnsAnswer(None, ("a.b",), (A,), ttl, 10).is_valid(at) is expected


def test_what_endpoints_know() -> None:
    """Own names and everybody's, of each address; addresses that no answer can teach are nobody's."""
    learned = LearnedNames()
    learned.learn(WEB, ("a.b", "c.d"), A)
    learned.learn(None, ("e.f",), A)
    learned.learn(None, ("a.b",), ip_address("127.0.0.1"))
    assert learned.names(WEB, A) == {"a.b", "c.d", "e.f"}
    assert learned.names(JOB, A) == {"e.f"}
    assert learned.names(WEB, ip_address("127.0.0.1")) == learned.names(WEB, B) == frozenset()
    assert (learned.addresses(WEB, "a.b"), learned.addresses(JOB, "a.b")) == ((A,), ())


def test_probes_to_a_name() -> None:
    """Every address that answers gave the name is probed, in the families of the sender; another name's is not."""
    dns = "[{name: api.example.com, addresses: [192.0.2.1, '2001:db8::1']}, {name: x.org, addresses: [192.0.2.2]}]"
    to = "{{from: n/{0}, to: {1}, protocol: TCP, port: 443, expect: {2}}}"
    assert failures(dns, to.format("web", "api.example.com", "allow"), to.format("job", "x.org", "deny")) == []
    assert failures(dns, to.format("job", "api.example.com", "allow")) == []
    assert "no DNS answer has an address" in failures(dns, to.format("web", "y.org", "deny"))[0]
    assert case(dns, to.format("web", "API.example.com.", "allow")).cases[0].probes[0].destination == DomainName(
        "api.example.com"
    )


def test_one_address_of_a_name_that_is_denied_denies_the_probe() -> None:
    """The verdict of a probe to a name must be that of each address."""
    dns = "[{client: n/web, name: api.example.com, addresses: [192.0.2.1]}, {client: n/job, name: api.example.com, addresses: [192.0.2.2]}]"
    probe = "{from: n/web, to: api.example.com, protocol: TCP, port: 443, expect: allow}"
    assert failures(dns, probe) == ["deny"]


def test_names_reach_questions_about_egress_only() -> None:
    """Each hop's question carries what its own endpoint knows for the destination that it sees."""
    (given,) = case("[{client: n/web, name: a.b, addresses: [10.0.0.2]}]").cases
    cast = Cast(given.resources, derive(given.resources))
    probe = case("{}", PROBE.replace("192.0.2.1", "10.0.0.2")).cases[0].probes[0]
    (journey,) = cast.journeys(probe, cast.learned(given.answers, None))
    assert [(question.endpoint, set(question.names)) for question in journey.questions()] == [
        (WEB, {"a.b"}),
        (JOB, set()),
    ]
