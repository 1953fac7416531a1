# SPDX-License-Identifier: Apache-2.0
"""The addresses of services: what a node translates, and what is behind it."""

from __future__ import annotations

from ipaddress import ip_address

from netpol_ebpf.apply.encode import vip_elements
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import TCP, UDP, VipKey
from netpol_ebpf.resources.load import parse_documents
from netpol_loader import abi

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: shop}
spec:
  clusterIP: CLUSTER
  externalIPs: [198.51.100.1]
  ports: [{name: web, port: PORT, targetPort: 8080, nodePort: 30080}, {name: dns, protocol: UDP, port: 53}]
status: {loadBalancer: {ingress: [{ip: 198.51.100.2}]}}
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: NAME-1, namespace: shop, labels: {kubernetes.io/service-name: NAME}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1, 192.0.2.9]}]
ports: [{name: web, port: 8080}]
"""


def service(name: str = "a", cluster: str = "10.96.0.1", port: int = 80) -> str:
    """A service."""
    return SERVICE.replace("NAME", name).replace("CLUSTER", cluster).replace("PORT", str(port))


def derived(*texts: str) -> Derivation:
    """The derivation of these objects."""
    derivation = Derivation()
    for text in texts:
        for resource in parse_documents(text, "x.yaml").check():
            derivation.upsert(resource)
    return derivation


def test_every_address_and_port_of_a_service() -> None:
    """Cluster, external and balancer addresses with each port, and node ports with each address of a node."""
    keys = derived(service()).world.vips.keys()
    addresses = [ip_address(text) for text in ("10.96.0.1", "198.51.100.1", "198.51.100.2")]
    wanted = {VipKey(address, protocol, port) for address in addresses for protocol, port in ((TCP, 80), (UDP, 53))}
    assert keys == wanted | {VipKey(None, TCP, 30080)}


def test_headless_services_have_none() -> None:
    """A service without addresses is only its backends."""
    text = service(cluster="None").replace("externalIPs: [198.51.100.1]", "externalIPs: []")
    text = text.replace(", nodePort: 30080", "").split("status")[0]
    assert derived(text).world.vips == {}


def test_backends_are_those_of_the_port() -> None:
    """A slice's ports go with the service's by name and protocol, whatever came first."""
    for order in ((service(), SLICE.replace("NAME", "a")), (SLICE.replace("NAME", "a"), service())):
        vips = derived(*order).world.vips
        behind = {(ip_address("10.0.0.1"), 8080), (ip_address("192.0.2.9"), 8080)}
        assert vips[VipKey(ip_address("10.96.0.1"), TCP, 80)].backends == behind
        assert vips[VipKey(None, TCP, 30080)].backends == behind
        assert vips[VipKey(ip_address("10.96.0.1"), UDP, 53)].backends == frozenset()


def test_shared_addresses_and_what_goes() -> None:
    """An address of two services stays while one of them has it; changes tell what came and went."""
    derivation = derived(service(), service("b", "10.96.0.2"))
    derivation.take_changes()
    derivation.remove("Service", "shop", "a")
    assert derivation.take_changes().vips.keys() == {
        VipKey(ip_address("10.96.0.1"), *one) for one in ((TCP, 80), (UDP, 53))
    }
    assert VipKey(ip_address("198.51.100.1"), TCP, 80) in derivation.world.vips
    derivation.remove("Service", "shop", "b")
    assert derivation.world.vips == {}


def test_backend_on_the_node_itself_is_in_the_row() -> None:
    """One process of this node behind a service is judged at once; of several it is not known which."""
    vip = derived(service(), SLICE.replace("NAME", "a")).world.vips[VipKey(ip_address("10.96.0.1"), TCP, 80)]
    rows = []
    for local in ([], ["192.0.2.9"], ["192.0.2.9", "10.0.0.1"]):
        ((name, _, value),) = vip_elements(vip, {ip_address(text) for text in local}.__contains__)
        assert name == "np_vip4"
        rows.append(abi.np_vip.from_buffer_copy(value))
    assert [row.flags for row in rows] == [0, abi.NP_VIP_LOCAL, abi.NP_VIP_MANY]
    assert (rows[1].local_port, bytes(rows[1].local)[:4]) == (8080, ip_address("192.0.2.9").packed)


POD = """\
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec:
  nodeName: here
  hostNetwork: false
  containers:
  - name: a
    ports:
    - {containerPort: 80, hostPort: 8080}
    - {containerPort: 53, hostPort: 53, protocol: UDP, hostIP: 192.0.2.1}
    - {containerPort: 81, hostPort: 8081, hostIP: 0.0.0.0}
    - {containerPort: 82}
status: {podIPs: [{ip: 10.0.0.7}, {ip: "fd00::7"}]}
"""


def test_host_ports_are_translated_by_their_node() -> None:
    """At all of its addresses or at one, to the pod's; they go with the pod, and one in the node's network has none."""
    derivation = derived(POD)
    behind = {port: {(ip_address("10.0.0.7"), port), (ip_address("fd00::7"), port)} for port in (80, 53, 81)}
    assert {key: vip.backends for key, vip in derivation.world.vips.items()} == {
        VipKey(None, TCP, 8080, "here"): behind[80],
        VipKey(ip_address("192.0.2.1"), UDP, 53, "here"): behind[53],
        VipKey(None, TCP, 8081, "here"): behind[81],
    }
    derivation.remove("Pod", "shop", "web")
    assert derivation.world.vips == {}
    assert derived(POD.replace("hostNetwork: false", "hostNetwork: true")).world.vips == {}
