# SPDX-License-Identifier: Apache-2.0
"""Endpoints, network sets, nodes, services, and the profiles of namespaces and service accounts (SEMANTICS 1.3).

Invariants: labels are effective: they are the object's own labels, and labels inherited from its profiles. If a key
occurs several times, the object's own label counts, else the label of the first profile that has the key. An own label
cannot replace the inherited labels of a namespace or service account, because the prefixes of these labels are
reserved.  A pod in the host's network, or a finished pod, is no endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache

from netpol_ebpf.policy.translate.composition import (
    INHERITED_PREFIXES,
    NAME,
    NAMESPACE,
    NAMESPACE_PREFIX,
    ORCHESTRATOR,
    SERVICE_ACCOUNT,
    SERVICE_ACCOUNT_PREFIX,
)
from netpol_ebpf.policy.types import (
    Action,
    Backend,
    ClusterNode,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    LabelledNets,
    NamedPort,
    ProfileRules,
    Rule,
    Vip,
    VipKey,
)
from netpol_ebpf.resources import types as resources
from netpol_ebpf.resources.sharing import REMEMBERED, share_texts

HOST_ENDPOINT = "HostEndpoint"

ProfileLabels = Callable[[str], Mapping[str, str]]
"""Maps the name of a profile to the labels that endpoints inherit from it. A missing profile has no labels."""

_ALLOW = (Rule(Action.ALLOW, 0),)

DEFAULT_ALLOW = "projectcalico-default-allow"
"""The built-in profile of automatic host endpoints."""


def allow_all(name: str) -> ProfileRules:
    """A profile with this name that allows everything. The profile of a namespace is such a profile."""
    return ProfileRules(name, _ALLOW, _ALLOW)


def namespace_profile(namespace: str) -> str:
    """The name of the profile of a namespace."""
    return f"kns.{namespace}"


def service_account_profile(namespace: str, name: str) -> str:
    """The name of the profile of a service account. This profile has labels and no rules."""
    return f"ksa.{namespace}.{name}"


def namespace_labels(meta: resources.Meta) -> dict[str, str]:
    """The labels that endpoints inherit from a namespace."""
    return _prefixed(meta, NAMESPACE_PREFIX)


def service_account_labels(meta: resources.Meta) -> dict[str, str]:
    """The labels that endpoints inherit from a service account."""
    return _prefixed(meta, SERVICE_ACCOUNT_PREFIX)


def _prefixed(meta: resources.Meta, prefix: str) -> dict[str, str]:
    return {**{prefix + key: value for key, value in meta.labels.items()}, prefix + NAME: meta.name}


def pod_profiles(pod: resources.Pod) -> tuple[str, ...]:
    """A pod's profiles in order: the namespace's, then the service account's."""
    return _profiles(pod.meta.namespace, pod.service_account)


@lru_cache(maxsize=REMEMBERED)
def _profiles(namespace: str, service_account: str) -> tuple[str, ...]:
    if not service_account:
        return (namespace_profile(namespace),)
    return (namespace_profile(namespace), service_account_profile(namespace, service_account))


def pod_endpoint(key: EndpointKey, pod: resources.Pod, labels_of: ProfileLabels) -> Endpoint | None:
    """The workload endpoint of a pod. None for a pod in the host's network and for a finished pod."""
    if pod.host_network or pod.finished:
        return None
    profiles = pod_profiles(pod)
    own = _without_inherited(pod.meta.labels) | {NAMESPACE: pod.meta.namespace, ORCHESTRATOR: "k8s"}
    if pod.service_account:
        own[SERVICE_ACCOUNT] = pod.service_account
    else:
        own.pop(SERVICE_ACCOUNT, None)
    return Endpoint(
        key=key,
        kind=EndpointKind.WORKLOAD,
        labels=_effective(own, profiles, labels_of),
        addresses=pod.addresses,
        ports=_named_ports(pod.ports),
        profiles=profiles,
        node=pod.node,
        allowed_sources=pod.allowed_source_prefixes,
    )


def workload_endpoint(key: EndpointKey, workload: resources.WorkloadEndpoint, labels_of: ProfileLabels) -> Endpoint:
    """The endpoint of a WorkloadEndpoint object, with the profiles that the object names."""
    own = _without_inherited(workload.meta.labels)
    own |= {NAMESPACE: workload.meta.namespace, ORCHESTRATOR: workload.orchestrator}
    if workload.service_account:
        own[SERVICE_ACCOUNT] = workload.service_account
    else:
        own.pop(SERVICE_ACCOUNT, None)
    return Endpoint(
        key=key,
        kind=EndpointKind.WORKLOAD,
        labels=_effective(own, workload.profiles, labels_of),
        addresses=workload.addresses,
        ports=_named_ports(workload.ports),
        profiles=workload.profiles,
        node=workload.node,
        interface=workload.interface,
        allowed_sources=workload.allowed_source_prefixes,
    )


def host_endpoint(key: EndpointKey, host: resources.HostEndpoint, labels_of: ProfileLabels) -> Endpoint:
    """The endpoint of a HostEndpoint object."""
    return Endpoint(
        key=key,
        kind=EndpointKind.HOST,
        labels=_effective(_without_reserved(host.meta.labels), host.profiles, labels_of),
        addresses=host.expected_ips,
        ports=_named_ports(host.ports),
        profiles=host.profiles,
        node=host.node,
        interface=host.interface,
    )


def network_set_profiles(network_set: resources.NetworkSet) -> tuple[str, ...]:
    """The profiles from which a network set inherits labels: that of its namespace; none for a GlobalNetworkSet."""
    return (namespace_profile(network_set.meta.namespace),) if network_set.meta.namespace else ()


def network_set(resource: resources.NetworkSet, labels_of: ProfileLabels) -> LabelledNets:
    """The labelled nets of a NetworkSet, or of a GlobalNetworkSet (without a namespace)."""
    meta = resource.meta
    own = _without_reserved(meta.labels)
    if meta.namespace:
        own = _without_inherited(own) | {NAMESPACE: meta.namespace}
    return LabelledNets(
        key=network_set_key(meta.namespace, meta.name),
        labels=_effective(own, network_set_profiles(resource), labels_of),
        nets=resource.nets,
        domains=frozenset(resource.allowed_egress_domains),
    )


def network_set_key(namespace: str, name: str) -> str:
    """The key of a network set (see `LabelledNets.key`)."""
    return f"{namespace}/{name}" if namespace else name


def node(resource: resources.Node) -> ClusterNode:
    """The `ClusterNode` of a Node object. Only peers that select nodes use its labels."""
    return ClusterNode(resource.meta.name, dict(resource.meta.labels), resource.addresses)


def backends(endpoint_slice: resources.EndpointSlice) -> frozenset[Backend]:
    """The backends of an EndpointSlice: each address with each port that has a number.

    If no port has a number, each address is a backend with port 0.
    """
    ports = [(port.protocol, port.port) for port in endpoint_slice.ports if port.port is not None] or [(0, 0)]
    return frozenset(
        Backend(address, protocol, port) for address in endpoint_slice.addresses for protocol, port in ports
    )


def vips(service: resources.Resource | None, slices: Collection[resources.Resource]) -> Iterator[Vip]:
    """The addresses and node ports of a Service, each once, with the backends of ``slices``.

    Empty if ``service`` is not a Service.
    """
    if not isinstance(service, resources.Service):
        return
    found: dict[VipKey, set[tuple[IPAddress, int]]] = {}
    for port in service.ports:
        behind = {
            (address, one.port)
            for each in slices
            if isinstance(each, resources.EndpointSlice)
            for one in each.ports
            if (one.name, one.protocol) == (port.name, port.protocol) and one.port is not None
            for address in each.addresses
        }
        for address in (*service.cluster_ips, *service.external_ips):
            found.setdefault(VipKey(address, port.protocol, port.port), set()).update(behind)
        if port.node_port is not None:
            found.setdefault(VipKey(None, port.protocol, port.node_port), set()).update(behind)
    for key, behind in found.items():
        yield Vip(key, frozenset(behind))


def host_ports(pod: resources.Resource | None) -> Iterator[Vip]:
    """The ports of the node that are translated to ports of a pod (hostPort).

    Empty if ``pod`` is not a Pod, or is in the host's network.
    """
    if not isinstance(pod, resources.Pod) or pod.host_network:
        return
    found: dict[VipKey, set[tuple[IPAddress, int]]] = {}
    for port in pod.ports:
        if port.host_port:
            key = VipKey(port.host_address, port.protocol, port.host_port, pod.node or "")
            found.setdefault(key, set()).update((address, port.port) for address in pod.addresses)
    for key, behind in found.items():
        yield Vip(key, frozenset(behind))


def _without_inherited(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels without those that have the prefix of an inherited label.

    Labels with such a prefix must come from namespaces and service accounts only.
    """
    return {key: value for key, value in labels.items() if not key.startswith(INHERITED_PREFIXES)}


def _without_reserved(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels of a host or a network set, without labels that would make the object look like a pod to selectors."""
    return {key: value for key, value in labels.items() if key not in (NAMESPACE, ORCHESTRATOR, SERVICE_ACCOUNT)}


def _effective(own: Mapping[str, str], profiles: Iterable[str], labels_of: ProfileLabels) -> Mapping[str, str]:
    """Own labels and labels inherited from ``profiles``.

    If a key occurs several times, the own label counts, else the label of the first profile that has the key.
    """
    effective: dict[str, str] = {}
    for profile in reversed(tuple(profiles)):
        effective.update(labels_of(profile))
    effective.update(own)
    return share_texts(effective)


@lru_cache(maxsize=REMEMBERED)
def _named_ports(ports: tuple[resources.ContainerPort | resources.EndpointPort, ...]) -> tuple[NamedPort, ...]:
    return tuple(dict.fromkeys(NamedPort(port.name, port.protocol, port.port) for port in ports if port.name))
