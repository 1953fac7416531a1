# SPDX-License-Identifier: Apache-2.0
"""The laboratory's plan for a set of manifests: the pods on their nodes, and hosts outside the cluster.

Invariant: addresses, ports and nodes of the plan come from the manifests alone. The caller adds only the hosts outside
the cluster, which manifests cannot describe.
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
    """The plan for ``resources``: nodes are children of the host ``internet``, and pods are children of their nodes.

    A pod listens on its declared TCP and UDP ports. ``outside``: hosts to add unchanged. Pods without an address, and
    pods of the host's network, which share the node's namespace, are left out. Raises InvalidInputError if there is no
    Node object for the node of a pod.
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
