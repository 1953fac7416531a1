# SPDX-License-Identifier: Apache-2.0
"""Objects the cluster writes of itself: which of their fields count, and from where."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.resources.types import (
    ContainerPort,
    EndpointSlice,
    Namespace,
    Node,
    Pod,
    Service,
    ServicePort,
    SlicePort,
)


def _one(text: str) -> Any:
    (resource,) = parse_documents(text, "f.yaml").check()
    return resource


def _pod(**fields: object) -> Pod:
    obj: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **fields}
    pod = _one(yaml.safe_dump(obj))
    assert isinstance(pod, Pod)
    return pod


def _addresses(pod: Pod) -> list[str]:
    return [str(address) for address in pod.addresses]


def test_namespace_carries_its_name_as_a_label() -> None:
    """The immutable label is added when a manifest lacks it, and must be right when it is there."""
    namespace = _one("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {a: b}}\n")
    assert isinstance(namespace, Namespace)
    assert namespace.meta.labels == {"a": "b", "kubernetes.io/metadata.name": "shop"}
    wrong = (
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels:\n    kubernetes.io/metadata.name: other\n"
    )
    (problem,) = parse_documents(wrong, "f").problems
    assert problem.location.line == 6


def test_pod_addresses_follow_their_precedence() -> None:
    """status.podIPs, status.podIP, then the annotations of the CNI plugins, Calico's before Amazon's."""
    annotations = {
        "cni.projectcalico.org/podIPs": "10.0.0.3/32,fd00::3/128",
        "cni.projectcalico.org/podIP": "10.0.0.4/32",
        "vpc.amazonaws.com/pod-ips": "10.0.0.5, 10.0.0.6",
    }
    metadata = {"name": "p", "annotations": annotations}
    status = {"podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}, {"ip": "10.0.0.1"}, {}]}
    assert _addresses(_pod(metadata=metadata, status=status)) == ["10.0.0.1", "fd00::1"]
    assert _addresses(_pod(metadata=metadata, status={"podIP": "10.0.0.2", "podIPs": []})) == ["10.0.0.2"]
    assert _addresses(_pod(metadata=metadata, status={"podIP": ""})) == ["10.0.0.3", "fd00::3"]
    del annotations["cni.projectcalico.org/podIPs"]
    assert _addresses(_pod(metadata=metadata)) == ["10.0.0.4"]
    del annotations["cni.projectcalico.org/podIP"]
    assert _addresses(_pod(metadata=metadata)) == ["10.0.0.5", "10.0.0.6"]
    assert _addresses(_pod()) == []
    assert _addresses(_pod(status={"podIP": "::ffff:10.0.0.7"})) == ["10.0.0.7"]


def test_uid_of_a_pod_is_the_runtime_s() -> None:
    """That of the object; of a static pod's mirror, that of the static pod; none in a manifest that has none."""
    uid, mirror = {"uid": "12"}, {"annotations": {"kubernetes.io/config.mirror": "abc"}}
    found = [_pod(metadata={"name": "p", **fields}).uid for fields in ({}, uid, mirror, uid | mirror)]
    assert found == ["", "12", "abc", "abc"]


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_finished_pods_have_no_address(phase: str) -> None:
    """Their addresses may belong to another pod by now."""
    pod = _pod(status={"phase": phase, "podIP": "10.0.0.1"})
    assert pod.finished
    assert pod.addresses == ()


@pytest.mark.parametrize("annotation", ["cni.projectcalico.org/podIP", "vpc.amazonaws.com/pod-ips"])
def test_pod_being_deleted_is_finished_once_the_plugin_took_its_address_back(annotation: str) -> None:
    """The plugin's emptied annotation on a pod under deletion says so; on a living pod, or without it, nothing does."""
    emptied = {annotation: ""}
    status = {"phase": "Running", "podIP": "10.0.0.1"}
    deleting = {"name": "p", "deletionTimestamp": "2026-01-01T00:00:00Z"}
    assert _pod(metadata={**deleting, "annotations": emptied}, status=status).finished
    assert not _pod(metadata=deleting, status=status).finished
    assert not _pod(metadata={"name": "p", "annotations": emptied}, status=status).finished


def test_pod_fields_and_ports_of_all_containers() -> None:
    """Init containers first; TCP unless said; ports without a name are kept."""
    pod = _pod(
        spec={
            "nodeName": "n1",
            "hostNetwork": True,
            "serviceAccountName": "web",
            "initContainers": [{"name": "i", "ports": [{"name": "admin", "containerPort": 9}]}],
            "containers": [
                {
                    "name": "c",
                    "ports": [
                        {"containerPort": 53, "protocol": "UDP"},
                        {"name": "s", "containerPort": 7, "protocol": "SCTP"},
                    ],
                },
                {"name": "d"},
            ],
        },
    )
    assert (pod.node, pod.host_network, pod.service_account) == ("n1", True, "web")
    assert pod.ports == (ContainerPort("admin", 6, 9), ContainerPort("", 17, 53), ContainerPort("s", 132, 7))
    bare = _pod()
    assert (bare.node, bare.host_network, bare.service_account, bare.ports) == (None, False, "default", ())


def test_allowed_source_prefixes() -> None:
    """A JSON list of CIDRs; a bare address is a single one."""
    key = "cni.projectcalico.org/allowedSourcePrefixes"
    pod = _pod(metadata={"name": "p", "annotations": {key: '["192.0.2.0/24", "fd00::1"]'}})
    assert pod.allowed_source_prefixes == (ip_network("192.0.2.0/24"), ip_network("fd00::1/128"))


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ("status: {podIPs: [{ip: 10.0.0.300}]}", "status.podIPs[0].ip"),
        ("status: {podIP: fe80::1%eth0}", "status.podIP"),
        ("status: {podIP: 10.0.0.01}", "status.podIP"),
        ("status: {podIPs: [10.0.0.1]}", "status.podIPs[0]"),
        ("status: 3", "status"),
        ("spec: {hostNetwork: 'yes'}", "spec.hostNetwork"),
        ("spec: {containers: [{ports: [{containerPort: 0}]}]}", "spec.containers[0].ports[0].containerPort"),
        ("spec: {containers: [{ports: [{name: x}]}]}", "spec.containers[0].ports[0]"),
        ("spec: {containers: [{ports: [{containerPort: '80'}]}]}", "spec.containers[0].ports[0].containerPort"),
        ("spec: {containers: [{ports: [{containerPort: 80, protocol: tcp}]}]}", "spec.containers[0].ports[0].protocol"),
        ("spec: {containers: [{ports: [{containerPort: 80, name: Web_1}]}]}", "spec.containers[0].ports[0].name"),
    ],
)
def test_wrong_fields_of_a_pod(body: str, path: str) -> None:
    """Fields that are read are checked, although unknown ones are ignored."""
    (problem,) = parse_documents(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nother: 1\n{body}\n", "f").problems
    assert (problem.path, problem.severity, problem.location.line) == (path, "error", 5)


def test_prefixes_that_are_no_json_list() -> None:
    """The annotation is checked like a field."""
    for text in ("192.0.2.0/24", "[1]", '["x"]'):
        metadata = {"name": "p", "annotations": {"cni.projectcalico.org/allowedSourcePrefixes": text}}
        obj = yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
        (problem,) = parse_documents(obj, "f").problems
        assert problem.path == "metadata.annotations[cni.projectcalico.org/allowedSourcePrefixes]"


def test_node_addresses() -> None:
    """Internal and external addresses and those of tunnel devices; host names are none."""
    node = _one(
        """
apiVersion: v1
kind: Node
metadata:
  name: 'n'
  annotations:
    projectcalico.org/IPv4Address: 10.0.0.1/24
    projectcalico.org/IPv4VXLANTunnelAddr: 192.168.1.1
status:
  addresses:
  - {type: InternalIP, address: 10.0.0.1}
  - {type: InternalIP, address: "fd00::1"}
  - {type: ExternalIP, address: 203.0.113.1}
  - {type: Hostname, address: n.example}
"""
    )
    assert isinstance(node, Node)
    assert [str(address) for address in node.addresses] == ["10.0.0.1", "fd00::1", "203.0.113.1", "192.168.1.1"]


def test_service() -> None:
    """Headless services have no cluster address; load balancers add theirs to the external ones."""
    service = _one(
        """
apiVersion: v1
kind: Service
metadata: {name: s, namespace: 'n'}
spec:
  selector: {app: web}
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, "fd00::96"]
  externalIPs: [203.0.113.1]
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080}
  - {port: 53, protocol: UDP}
status:
  loadBalancer:
    ingress: [{ip: 203.0.113.2}, {hostname: lb.example}]
"""
    )
    assert isinstance(service, Service)
    assert service.selector == {"app": "web"}
    assert [str(address) for address in service.cluster_ips] == ["10.96.0.1", "fd00::96"]
    assert [str(address) for address in service.external_ips] == ["203.0.113.1", "203.0.113.2"]
    assert service.ports == (ServicePort("http", 6, 80, "web", 30080), ServicePort("", 17, 53, None, None))
    headless = _one(
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: None, ports: [{port: 1, targetPort: 2}]}\n"
    )
    assert isinstance(headless, Service)
    assert headless.selector is None
    assert headless.cluster_ips == ()
    assert headless.ports[0].target_port == 2


def test_service_port_must_be_right() -> None:
    """A missing number and a target of a wrong type are problems."""
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{name: x}, {port: 1, targetPort: [2]}]}\n"
    )
    assert [problem.path for problem in parse_documents(text, "f").problems] == [
        "spec.ports[0]",
        "spec.ports[1].targetPort",
    ]


def test_endpoint_slice() -> None:
    """Endpoints that are not ready count too; host names do not; a port without number is kept as such."""
    text = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: s-1
  namespace: 'n'
  labels: {kubernetes.io/service-name: s}
addressType: %s
endpoints:
- {addresses: [%s], conditions: {ready: false}}
ports:
- {name: http, port: 80, protocol: TCP}
- {name: none}
"""
    piece = _one(text % ("IPv4", "10.0.0.1, 10.0.0.2"))
    assert isinstance(piece, EndpointSlice)
    assert piece.service == "s"
    assert piece.addresses == (ip_address("10.0.0.1"), ip_address("10.0.0.2"))
    assert piece.ports == (SlicePort("http", 6, 80), SlicePort("none", 6, None))
    assert _one(text % ("FQDN", "a.example")).addresses == ()
