# SPDX-License-Identifier: Apache-2.0
"""Namespace, ServiceAccount, Pod, Node, Service and EndpointSlice: objects of Kubernetes itself.

Objects of these kinds are large, and get more fields with every release.  So unknown fields are ignored, and only the
fields that this module reads are checked.  SEMANTICS 1.3 defines from which fields a pod's addresses are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.reader import Reader, describe
from netpol_ebpf.resources.sharing import share, share_text
from netpol_ebpf.resources.syntax import MAX_PORT, PROTOCOLS, check_port_name, parse_address, parse_network
from netpol_ebpf.resources.types import (
    ContainerPort,
    EndpointSlice,
    IPAddress,
    IPNetwork,
    Meta,
    Namespace,
    Node,
    NodeInterface,
    Pod,
    Service,
    ServiceAccount,
    ServicePort,
    SlicePort,
)
from netpol_ebpf.resources.yamltree import Path

NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"

_POD_IPS = "cni.projectcalico.org/podIPs"
_POD_IP = "cni.projectcalico.org/podIP"
_AWS_POD_IPS = "vpc.amazonaws.com/pod-ips"
# The kubelet makes the API object of a static pod, with another UID.  This annotation has the pod's UID in the
# container runtime.
_MIRRORED_UID = "kubernetes.io/config.mirror"
_SOURCE_PREFIXES = "cni.projectcalico.org/allowedSourcePrefixes"

# Annotations in which Calico writes a node's addresses (with a prefix length) and those of its tunnel devices, from
# which the node may send to remote pods.
_NODE_ADDRESS_ANNOTATIONS = (
    "projectcalico.org/IPv4Address",
    "projectcalico.org/IPv6Address",
    "projectcalico.org/IPv4IPIPTunnelAddr",
    "projectcalico.org/IPv4VXLANTunnelAddr",
    "projectcalico.org/IPv6VXLANTunnelAddr",
    "projectcalico.org/IPv4WireguardInterfaceAddr",
    "projectcalico.org/IPv6WireguardInterfaceAddr",
)

_NODE_INTERFACES = "projectcalico.org/Interfaces"


def _namespace(obj: Reader, meta: Meta) -> Namespace:
    seen = meta.labels.get(NAMESPACE_NAME_LABEL)
    if seen is None:
        meta = replace(meta, labels={**meta.labels, NAMESPACE_NAME_LABEL: meta.name})
    elif seen != meta.name:
        path = ("metadata", "labels", NAMESPACE_NAME_LABEL)
        obj.report.error(path, f'must be the namespace\'s own name "{meta.name}", is "{seen}"; remove the label')
    return Namespace(meta)


def _service_account(obj: Reader, meta: Meta) -> ServiceAccount:
    del obj
    return ServiceAccount(meta)


def _pod(obj: Reader, meta: Meta) -> Pod:
    metadata = obj.mapping("metadata")
    annotations = _annotations(metadata)
    deleting = metadata is not None and metadata.has("deletionTimestamp")
    status = obj.mapping("status")
    phase = status.string("phase") if status is not None else None
    # A CNI plugin that has released the address of a deleted pod sets the pod's annotation to an empty text.
    taken_back = deleting and "" in (annotations.get(_POD_IP), annotations.get(_AWS_POD_IPS))
    finished = phase in ("Succeeded", "Failed") or taken_back
    addresses = _pod_addresses(obj, annotations, status)
    return replace(
        read_template(obj, meta),
        finished=finished,
        addresses=() if finished else addresses,
        allowed_source_prefixes=_source_prefixes(obj, annotations),
        uid=annotations.get(_MIRRORED_UID) or (metadata.string("uid") if metadata is not None else None) or "",
    )


def read_template(template: Reader, meta: Meta) -> Pod:
    """Parse a pod template (the metadata and spec of a pod) to a pod without address.

    The template may also be a part of another object, such as a Deployment.
    """
    spec = template.mapping("spec") or Reader({}, (*template.path, "spec"), template.report)
    ports: list[ContainerPort] = []
    for containers in ("initContainers", "containers"):
        for container in spec.mappings(containers):
            ports.extend(_container_ports(container))
    node = spec.string("nodeName")
    account = spec.string("serviceAccountName") or spec.string("serviceAccount") or "default"
    return Pod(
        meta=meta,
        node=share_text(node) if node else None,
        service_account=share_text(account),
        host_network=spec.boolean("hostNetwork"),
        finished=False,
        addresses=(),
        ports=share(tuple(ports)),
    )


def _annotations(metadata: Reader | None) -> Mapping[str, str]:
    return {} if metadata is None else metadata.string_map("annotations")


def _container_ports(container: Reader) -> Iterable[ContainerPort]:
    for port in container.mappings("ports"):
        name = port.string("name") or ""
        if name and (message := check_port_name(name)) is not None:
            port.error("name", message)
        number = port.integer("containerPort", 1, MAX_PORT)
        protocol = _protocol(port)
        if number is None:
            if not port.has("containerPort"):
                port.missing("containerPort")
            continue
        host_port = port.integer("hostPort", 0, MAX_PORT) or 0
        host_text = port.string("hostIP")
        host = _addresses(port, [((*port.path, "hostIP"), host_text)]) if host_port and host_text else ()
        every = not host or host[0].is_unspecified
        yield ContainerPort(name, protocol, number, host_port, None if every else host[0])


def _protocol(port: Reader) -> int:
    return PROTOCOLS[port.enum("protocol", tuple(PROTOCOLS)) or "TCP"]


def _pod_addresses(obj: Reader, annotations: Mapping[str, str], status: Reader | None) -> tuple[IPAddress, ...]:
    """A pod's addresses: from status.podIPs, else from status.podIP, else from annotations of CNI plugins."""
    if status is not None:
        entries = [(entry.path, entry.string("ip")) for entry in status.mappings("podIPs")]
        found = _addresses(obj, [((*path, "ip"), ip) for path, ip in entries if ip])
        single = status.string("podIP")
        if not found and single:
            found = _addresses(obj, [((*status.path, "podIP"), single)])
        if found:
            return found
    for annotation in (_POD_IPS, _POD_IP, _AWS_POD_IPS):
        path = ("metadata", "annotations", annotation)
        texts = [text.strip().partition("/")[0] for text in annotations.get(annotation, "").split(",")]
        found = _addresses(obj, [(path, text) for text in texts if text])
        if found:
            return found
    return ()


def _addresses(obj: Reader, texts: Iterable[tuple[Path, str]]) -> tuple[IPAddress, ...]:
    """Parse addresses.

    Returns the distinct addresses in the given order.
    ``texts``: pairs (path for messages, text of an address).
    """
    found: dict[IPAddress, None] = {}
    for path, text in texts:
        try:
            found[parse_address(text)] = None
        except ValueError as error:  # noqa: PERF203 - every wrong address must be reported
            obj.report.error(path, str(error), slug="address")
    return tuple(found)


def _source_prefixes(obj: Reader, annotations: Mapping[str, str]) -> tuple[IPNetwork, ...]:
    """Parse the annotation with the prefixes from which a pod may send although it does not have the addresses.

    The annotation is a JSON list of CIDRs.  An address without a prefix length is a /32 or /128.
    """
    text = annotations.get(_SOURCE_PREFIXES)
    if not text:
        return ()
    path = ("metadata", "annotations", _SOURCE_PREFIXES)
    try:
        prefixes = json.loads(text)
    except (ValueError, RecursionError):
        prefixes = None
    if not isinstance(prefixes, list) or not all(isinstance(prefix, str) for prefix in prefixes):
        obj.report.error(path, f'must be a JSON list of CIDRs such as ["192.0.2.0/24"]; is {describe(text)}')
        return ()
    found = []
    for prefix in prefixes:
        bare = "/" not in prefix
        try:
            found.append(parse_network(prefix + ("/128" if ":" in prefix else "/32") if bare else prefix)[0])
        except ValueError as error:
            obj.report.error(path, str(error), slug="cidr")
    return tuple(found)


def _node(obj: Reader, meta: Meta) -> Node:
    texts: list[tuple[Path, str]] = []
    own: list[tuple[Path, str]] = []
    status = obj.mapping("status")
    if status is not None:
        for entry in status.mappings("addresses"):
            address = entry.string("address")
            kind = entry.string("type")
            if kind in ("InternalIP", "ExternalIP") and address:
                texts.append(((*entry.path, "address"), address))
                own += texts[-1:] if kind == "InternalIP" else ()
    annotations = _annotations(obj.mapping("metadata"))
    for annotation in _NODE_ADDRESS_ANNOTATIONS:
        address = annotations.get(annotation, "").partition("/")[0]
        if address:
            texts.append((("metadata", "annotations", annotation), address))
            own += texts[-1:]
    addresses = _addresses(obj, texts)
    external = frozenset(addresses).difference(_addresses(obj, own))
    return Node(meta, addresses, external, tuple(_node_interfaces(obj, annotations)))


def _node_interfaces(obj: Reader, annotations: Mapping[str, str]) -> Iterable[NodeInterface]:
    """Parse the annotation with a node's interfaces.

    The annotation is a JSON list.  Each interface has a name, and addresses with or without prefix length.
    """
    text = annotations.get(_NODE_INTERFACES)
    if not text:
        return
    path = ("metadata", "annotations", _NODE_INTERFACES)
    found: list[tuple[Any, list[str]]] | None
    try:
        interfaces = json.loads(text)
        found = [(one["name"], [str(address) for address in one.get("addresses") or ()]) for one in interfaces]
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        found = None
    if (
        found is None
        or not isinstance(interfaces, list)
        or not all(isinstance(name, str) and name for name, _ in found)
    ):
        obj.report.error(path, f"must be a JSON list of interfaces with name and addresses; is {describe(text)}")
        return
    for name, addresses in found:
        yield NodeInterface(name, _addresses(obj, [(path, address.partition("/")[0]) for address in addresses]))


def _service(obj: Reader, meta: Meta) -> Service:
    spec = obj.mapping("spec") or Reader({}, (*obj.path, "spec"), obj.report)
    cluster = [((*spec.path, "clusterIP"), spec.string("clusterIP") or ""), *spec.indexed_strings("clusterIPs")]
    external = list(spec.indexed_strings("externalIPs"))
    status = obj.mapping("status")
    balancer = status.mapping("loadBalancer") if status is not None else None
    if balancer is not None:
        external += [((*entry.path, "ip"), entry.string("ip") or "") for entry in balancer.mappings("ingress")]
    ports = []
    for port in spec.mappings("ports"):
        number = port.integer("port", 1, MAX_PORT)
        target = port.raw("targetPort")
        if isinstance(target, bool) or not isinstance(target, (int, str, type(None))):
            seen = port.report.describe((*port.path, "targetPort"), target)
            port.error("targetPort", f"must be a port number or name, is {seen}", slug="type")
            target = None
        node_port = port.integer("nodePort", 0, MAX_PORT)
        protocol = _protocol(port)
        if number is not None:
            ports.append(ServicePort(port.string("name") or "", protocol, number, target or None, node_port or None))
        elif not port.has("port"):
            port.missing("port")
    return Service(
        meta=meta,
        selector=spec.string_map("selector") if spec.has("selector") else None,
        cluster_ips=_addresses(obj, [(path, text) for path, text in cluster if text and text != "None"]),
        external_ips=_addresses(obj, [(path, text) for path, text in external if text]),
        ports=tuple(ports),
    )


def _endpoint_slice(obj: Reader, meta: Meta) -> EndpointSlice:
    family = obj.enum("addressType", ("IPv4", "IPv6", "FQDN"))
    texts: list[tuple[Path, str]] = []
    for endpoint in obj.mappings("endpoints"):
        texts.extend(endpoint.indexed_strings("addresses"))
    ports = tuple(
        SlicePort(port.string("name") or "", _protocol(port), port.integer("port", 1, MAX_PORT))
        for port in obj.mappings("ports")
    )
    addresses = () if family == "FQDN" else _addresses(obj, texts)
    return EndpointSlice(meta, meta.labels.get(SERVICE_NAME_LABEL), addresses, ports)


def any_name(name: str) -> str | None:
    """Accept any name.

    This check is for objects that a cluster created, because the API server has checked their names.
    """
    del name
    return None


KINDS = (
    Kind("v1", "Namespace", namespaced=False, parse=_namespace, check_name=any_name, strict=False),
    Kind("v1", "ServiceAccount", namespaced=True, parse=_service_account, check_name=any_name, strict=False),
    Kind("v1", "Pod", namespaced=True, parse=_pod, check_name=any_name, strict=False),
    Kind("v1", "Node", namespaced=False, parse=_node, check_name=any_name, strict=False),
    Kind("v1", "Service", namespaced=True, parse=_service, check_name=any_name, strict=False),
    Kind(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        namespaced=True,
        parse=_endpoint_slice,
        check_name=any_name,
        strict=False,
    ),
)
