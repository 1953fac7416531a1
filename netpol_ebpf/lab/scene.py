# SPDX-License-Identifier: Apache-2.0
"""A laboratory for a set of manifests: its pods on its nodes, and hosts outside the cluster.

Invariant: the plan follows from the manifests alone (addresses, declared ports, nodes); the caller adds only the hosts
outside the cluster, which the manifests cannot name.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.lab.topology import TCP, UDP, Host, Listen, Plan
from netpol_ebpf.resources.types import Node, Pod, Resource

INTERNET = "internet"
INTERNET_ADDRESSES = (ip_address("192.0.2.1"), ip_address("2001:db8::1"))


def plan_for(resources: Iterable[Resource], outside: Iterable[Host] = ()) -> Plan:
    """The plan: nodes below the internet, running pods below their nodes, ``outside`` unchanged.

    A pod listens on its declared TCP and UDP ports. Raises InvalidInputError for a pod on a node without a Node object.
    Pods of the host's network are left out, since they share the node's namespace.
    """
    resources = list(resources)
    hosts = [Host(INTERNET, None, INTERNET_ADDRESSES)]
    nodes = [resource for resource in resources if isinstance(resource, Node)]
    hosts += [
        Host(node.meta.name, INTERNET, node.addresses, interface=f"node{place}") for place, node in enumerate(nodes)
    ]
    names = {node.meta.name for node in nodes}
    pods = [resource for resource in resources if isinstance(resource, Pod)]
    hosts += [_pod_host(pod, names) for pod in pods if pod.addresses and not pod.host_network]
    hosts += outside
    return Plan(hosts)


def _pod_host(pod: Pod, nodes: set[str]) -> Host:
    if pod.node not in nodes:
        raise InvalidInputError(
            f"{pod.meta.location}: Pod/{pod.meta.namespace}/{pod.meta.name}: spec.nodeName: "
            f"{pod.node or 'absent'}: there is no Node object of that name",
            hint="The laboratory places each pod on its node; add the Node with its addresses.",
        )
    listens = tuple(Listen(port.protocol, port.port) for port in pod.ports if port.protocol in {TCP, UDP})
    return Host(f"{pod.meta.namespace}/{pod.meta.name}", pod.node, pod.addresses, listens)
