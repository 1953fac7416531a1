# SPDX-License-Identifier: Apache-2.0
"""FelixConfiguration and KubeControllersConfiguration: what is read of them, and what is refused or warned of."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from netpol_ebpf.errors import Problem
from netpol_ebpf.resources.load import LoadResult, parse_documents
from netpol_ebpf.resources.types import (
    FailsafePort,
    FelixConfiguration,
    HostEndpointTemplate,
    KubeControllersConfiguration,
    Node,
    NodeInterface,
)
from netpol_ebpf.selector import parse

FELIX, CONTROLLERS = "FelixConfiguration", "KubeControllersConfiguration"


def load(kind: str, spec: str, name: str = "default") -> LoadResult:
    """One object of projectcalico.org/v3."""
    return parse_documents(
        f"apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n", "f.yaml"
    )


def one(kind: str, spec: str, name: str = "default") -> Any:
    """The same, which must be valid."""
    (resource,) = load(kind, spec, name).check()
    return resource


def templates(text: str) -> str:
    """A spec that creates host endpoints by templates."""
    return f"{{controllers: {{node: {{hostEndpoint: {{autoCreate: Enabled, templates: [{text}]}}}}}}}}"


def test_failsafe_ports() -> None:
    """Protocols in any case, nets of both families, masked; what is not given is None and what is empty is empty."""
    felix = one(
        FELIX,
        "{failsafeInboundHostPorts: [{protocol: tcp, port: 22}, {protocol: UDP, port: 68, net: 10.0.0.0/8}, "
        "{protocol: TCP, port: 179, net: 'fd00::/64'}, {protocol: TCP, port: 1, net: 192.0.2.1}]}",
    )
    assert isinstance(felix, FelixConfiguration)
    assert felix.failsafe_inbound == (
        FailsafePort(6, 22),
        FailsafePort(17, 68, ip_network("10.0.0.0/8")),
        FailsafePort(6, 179, ip_network("fd00::/64")),
        FailsafePort(6, 1, ip_network("192.0.2.1/32")),
    )
    assert felix.failsafe_outbound is None
    empty = one(FELIX, "{failsafeInboundHostPorts: [], failsafeOutboundHostPorts: null}", "node.n1")
    assert (empty.failsafe_inbound, empty.failsafe_outbound) == ((), None)


def test_fields_for_other_programs_are_accepted() -> None:
    """There are over a hundred, and more with each release."""
    felix = one(FELIX, "{logSeverityScreen: Info, bpfEnabled: true, reportingInterval: 0s, floatingIPs: Disabled}")
    assert (felix.failsafe_inbound, felix.failsafe_outbound) == (None, None)
    assert one(CONTROLLERS, "{logSeverityScreen: Info, controllers: {policy: {reconcilerPeriod: 5m}}}") == (
        one(CONTROLLERS, "{controllers: {node: {syncLabels: Enabled, leakGracePeriod: 15m}}}")
    )


def test_what_decides_elsewhere_is_told() -> None:
    """A field that changes verdicts in the origin and is not followed is a warning that says what decides."""
    (warning,) = load(FELIX, "{defaultEndpointToHostAction: ACCEPT}").problems
    assert (warning.severity, warning.slug, warning.path) == (
        "warning",
        "not-followed",
        "spec.defaultEndpointToHostAction",
    )
    assert "--workload-to-host" in warning.message


def paths(problems: list[Problem]) -> list[str]:
    return [problem.path for problem in problems if problem.severity == "error"]


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("{failsafeInboundHostPorts: [{protocol: ICMP, port: 1}]}", "spec.failsafeInboundHostPorts[0].protocol"),
        ("{failsafeInboundHostPorts: [{protocol: SCTP, port: 1}]}", "spec.failsafeInboundHostPorts[0].protocol"),
        ("{failsafeInboundHostPorts: [{port: 1}]}", "spec.failsafeInboundHostPorts[0]"),
        ("{failsafeInboundHostPorts: [{protocol: TCP}]}", "spec.failsafeInboundHostPorts[0]"),
        ("{failsafeInboundHostPorts: [{protocol: TCP, port: 0}]}", "spec.failsafeInboundHostPorts[0].port"),
        ("{failsafeInboundHostPorts: [{protocol: TCP, port: 65536}]}", "spec.failsafeInboundHostPorts[0].port"),
        ("{failsafeInboundHostPorts: [{protocol: TCP, port: 1, net: x}]}", "spec.failsafeInboundHostPorts[0].net"),
        ("{failsafeInboundHostPorts: [{protocol: TCP, port: 1, nets: x}]}", "spec.failsafeInboundHostPorts[0].nets"),
        ("{failsafeInboundHostPorts: none}", "spec.failsafeInboundHostPorts"),
        ("{failsafeInboundHostPort: []}", "spec.failsafeInboundHostPort"),
        ("{failSafeOutboundHostPorts: []}", "spec.failSafeOutboundHostPorts"),
    ],
)
def test_what_is_refused_in_failsafe_ports(spec: str, path: str) -> None:
    """Anything of which the meaning is not certain: the ports in force stay those of before."""
    result = load(FELIX, spec)
    assert paths(result.problems) == [path]
    assert result.resources == []


@pytest.mark.parametrize(
    ("kind", "name", "valid"),
    [
        (FELIX, "default", True),
        (FELIX, "node.worker-1.example.com", True),
        (FELIX, "node.", False),
        (FELIX, "node", False),
        (FELIX, "other", False),
        (CONTROLLERS, "default", True),
        (CONTROLLERS, "node.x", False),
    ],
)
def test_names_of_configurations(kind: str, name: str, valid: bool) -> None:  # noqa: FBT001 - a table's column
    """Any other name would be configuration of nothing."""
    assert [problem.slug for problem in load(kind, "{}", name).problems] == ([] if valid else ["name"])


def test_templates() -> None:
    """Every field, and the defaults."""
    spec = templates(
        "{generateName: lan, interfaceCIDRs: [10.0.0.0/8, 'fd00::/8'], interfacePattern: 'eth0|bond[0-9]+', "
        "nodeSelector: has(lan), labels: {a: b}}, {generateName: wan, interfaceCIDRs: [192.0.2.0/24]}"
    )
    found = one(CONTROLLERS, spec)
    assert isinstance(found, KubeControllersConfiguration)
    assert (found.creates_hosts, found.creates_default) == (True, True)
    assert found.templates == (
        HostEndpointTemplate(
            "lan", (ip_network("10.0.0.0/8"), ip_network("fd00::/8")), "eth0|bond[0-9]+", parse("has(lan)"), {"a": "b"}
        ),
        HostEndpointTemplate("wan", (ip_network("192.0.2.0/24"),)),
    )


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("{}", (False, True)),
        ("{autoCreate: Disabled}", (False, True)),
        ("{autoCreate: Enabled}", (True, True)),
        ("{autoCreate: Enabled, createDefaultHostEndpoint: Enabled}", (True, True)),
        ("{autoCreate: Enabled, createDefaultHostEndpoint: Disabled}", (True, False)),
    ],
)
def test_what_creates_host_endpoints(hosts: str, expected: tuple[bool, bool]) -> None:
    """Nothing by default; with autoCreate the one of all interfaces, unless that is disabled."""
    found = one(CONTROLLERS, f"{{controllers: {{node: {{hostEndpoint: {hosts}}}}}}}")
    assert (found.creates_hosts, found.creates_default) == expected


_TEMPLATES = "spec.controllers.node.hostEndpoint.templates"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("{controller: {}}", "spec.controller"),
        ("{controllers: {nodes: {}}}", "spec.controllers.nodes"),
        ("{controllers: {node: {hostEndpoints: {}}}}", "spec.controllers.node.hostEndpoints"),
        (
            "{controllers: {node: {hostEndpoint: {autoCreate: true}}}}",
            "spec.controllers.node.hostEndpoint.autoCreate",
        ),
        (
            "{controllers: {node: {hostEndpoint: {autoCreate: enabled}}}}",
            "spec.controllers.node.hostEndpoint.autoCreate",
        ),
        ("{controllers: {node: {hostEndpoint: {template: []}}}}", "spec.controllers.node.hostEndpoint.template"),
        (templates("{interfaceCIDRs: [10.0.0.0/8]}"), f"{_TEMPLATES}[0]"),
        (templates("{generateName: x}"), f"{_TEMPLATES}[0]"),
        (templates("{generateName: X, interfacePattern: eth0}"), f"{_TEMPLATES}[0].generateName"),
        (templates("{generateName: x, interfaceCIDRs: [x]}"), f"{_TEMPLATES}[0].interfaceCIDRs[0]"),
        (templates("{generateName: x, interfacePattern: 'eth('}"), f"{_TEMPLATES}[0].interfacePattern"),
        (templates("{generateName: x, interfacePattern: '(?=eth)'}"), f"{_TEMPLATES}[0].interfacePattern"),
        (templates("{generateName: x, interfacePattern: '[[:alpha:]]+'}"), f"{_TEMPLATES}[0].interfacePattern"),
        (templates("{generateName: x, interfacePattern: '(e)\\1'}"), f"{_TEMPLATES}[0].interfacePattern"),
        (templates("{generateName: x, interfacePattern: eth0, nodeSelector: '!'}"), f"{_TEMPLATES}[0].nodeSelector"),
        (templates("{generateName: x, interfacePattern: eth0, labels: {'a b': c}}"), f"{_TEMPLATES}[0].labels[a b]"),
        (templates("{generateName: x, interfacePattern: eth0, label: {}}"), f"{_TEMPLATES}[0].label"),
        (
            templates("{generateName: x, interfacePattern: a}, {generateName: x, interfacePattern: b}"),
            f"{_TEMPLATES}[1].generateName",
        ),
    ],
)
def test_what_is_refused_in_automatic_host_endpoints(spec: str, path: str) -> None:
    """One problem at the field that is wrong."""
    result = load(CONTROLLERS, spec)
    assert paths(result.problems) == [path]
    assert result.resources == []


NODE = """\
apiVersion: v1
kind: Node
metadata:
  name: n1
  annotations: {{projectcalico.org/IPv4Address: 10.0.0.1/24, projectcalico.org/Interfaces: '{interfaces}'}}
status: {{addresses: [{{type: ExternalIP, address: 192.0.2.1}}, {{type: InternalIP, address: 10.0.0.1}}, {{type: ExternalIP, address: 10.0.0.1}}]}}
"""


def node(interfaces: str) -> LoadResult:
    """A node whose annotation says that of its interfaces."""
    return parse_documents(NODE.format(interfaces=interfaces), "n.yaml")


def test_interfaces_of_a_node() -> None:
    """The annotation lists them; an address is external when it is nothing else."""
    (found,) = node(
        '[{"name":"eth0","addresses":["10.0.0.1","fd00::1/64"]},{"name":"lan"},{"name":"wg","addresses":null}]'
    ).check()
    assert isinstance(found, Node)
    assert found.addresses == (ip_address("192.0.2.1"), ip_address("10.0.0.1"))
    assert found.external == {ip_address("192.0.2.1")}
    assert found.interfaces == (
        NodeInterface("eth0", (ip_address("10.0.0.1"), ip_address("fd00::1"))),
        NodeInterface("lan"),
        NodeInterface("wg"),
    )


@pytest.mark.parametrize(
    "text", ["x", "{}", "[1]", '[{"addresses":[]}]', '[{"name":1}]', '[{"name":"a","addresses":["x"]}]']
)
def test_interfaces_that_cannot_be_read(text: str) -> None:
    """The problem names the annotation."""
    (problem,) = node(text).errors
    assert problem.path == "metadata.annotations[projectcalico.org/Interfaces]"
