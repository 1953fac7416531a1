# SPDX-License-Identifier: Apache-2.0
"""The addresses of the node: all addresses that it accepts as its own, of any origin, and no others."""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, Scene, wait_for
from border_scene import (
    GATEWAY,
    NARROW,
    NODE_ADDRESS,
    OPEN_PORT,
    WORLD,
    address_of,
    border,
    datagram,
    ear,
    framed,
    gets,
    ip,
    port_of,
    put,
    say,
    station,
    token,
    udp_socket,
)

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET

pytestmark = pytest.mark.netns

CLOSED_PORT, DNS_PORT = 7000, 53
LAN = "lan0"
GROUP = {4: "239.7.7.7", 6: "ff15::7777"}
ADDRESSES = {
    "uplink": (NODE_ADDRESS[4], NODE_ADDRESS[6]),
    "gateway of the pod": (GATEWAY[4], None),
    "address on the loopback": ("169.254.20.10", "fd00:20::10"),
    "address of a service, bound here": ("10.96.0.53", "fd00:96::53"),
    "loopback": ("127.0.0.5", None),
    "prefix": ("198.18.0.77", "2001:db8:18::77"),
    "broadcast of another link": ("10.50.0.255", None),
    "network of another link": ("10.50.0.1", "fd00:50::1"),
    "anycast of the routers": (None, "fd00:50::"),
    "group": (GROUP[4], GROUP[6]),
    "all": ("255.255.255.255", "ff02::1"),
}
CASES = [(what, version) for what, both in ADDRESSES.items() for version in (4, 6) if both[version // 3 - 1]]
FROM_OUTSIDE = [
    (what, version)
    for what, version in CASES
    if what in ("uplink", "address on the loopback", "prefix", "broadcast of another link", "anycast of the routers")
]
DNS = """\
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: shop}
spec:
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ports: [{name: dns, protocol: UDP, port: 53, targetPort: 5353}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: dns-4, namespace: shop, labels: {kubernetes.io/service-name: dns}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.3]}]
ports: [{name: dns, protocol: UDP, port: 5353}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: dns-6, namespace: shop, labels: {kubernetes.io/service-name: dns}}
addressType: IPv6
endpoints: [{addresses: ["fd00:1::3"]}]
ports: [{name: dns, protocol: UDP, port: 5353}]
"""
DNS_ADDRESS = {4: "10.96.0.10", 6: "fd00:96::10"}
TO_DNS_ADDRESS = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: dns, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress: [{to: [{ipBlock: {cidr: 10.96.0.10/32}}, {ipBlock: {cidr: "fd00:96::10/128"}}]}]
"""
TO_DNS_PODS = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: dns, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: other}}}]}]
"""
HOST = f"""\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {{name: uplink, labels: {{role: node}}}}
spec: {{node: node-1, interfaceName: eth0}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {{name: node}}
spec:
  selector: role == 'node'
  types: [Ingress]
  ingress: [{{action: Allow, protocol: UDP, destination: {{ports: [{OPEN_PORT}]}}}}]
"""


def prepare(lab: Lab) -> None:
    """Give the node addresses of all kinds."""
    ip(
        lab, NODE, "address add 169.254.20.10/32 dev lo", "address add fd00:20::10/128 dev lo nodad",
        "address add 10.96.0.53/32 dev lo", "address add fd00:96::53/128 dev lo nodad",
        "address add 10.96.0.10/32 dev lo", "address add fd00:96::10/128 dev lo nodad",
        "-4 route add local 198.18.0.0/24 dev lo", "-6 route add local 2001:db8:18::/64 dev lo",
        f"link add {LAN} type bridge", f"address add 10.50.0.1/24 broadcast 10.50.0.255 dev {LAN}",
        f"address add fd00:50::1/64 dev {LAN} nodad", f"link set {LAN} up",
    )  # fmt: skip
    lab.prober.write_settings(NODE, [(f"ipv4/conf/{port_of('web')}/route_localnet", "1")])
    for version, nets in (
        (4, ("169.254.20.10", "198.18.0.0/24", "10.50.0.0/24")),
        (6, ("fd00:20::10", "2001:db8:18::/64", "fd00:50::/64")),
    ):
        for net in nets:
            ip(lab, INTERNET, f"-{version} route add {net} via {NODE_ADDRESS[version]} dev node0 onlink")


@pytest.fixture(scope="module")
def closed_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A node that no workload may reach."""
    options = ("--workload-to-host", "deny")
    with border(tmp_path_factory.mktemp("closed"), prepare=prepare, options=options) as one, listening(one.lab):
        yield one


@pytest.fixture(scope="module")
def open_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A node that workloads may reach as policy says."""
    with border(tmp_path_factory.mktemp("open"), prepare=prepare) as one, listening(one.lab):
        yield one


def listening(lab: Lab) -> ExitStack:
    """Let processes of the node join the groups on the pod's link."""
    stack = ExitStack()
    (link,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", port_of("web")]).stdout)
    index = struct.pack("=i", link["ifindex"])
    four, six = (stack.enter_context(udp_socket(lab, NODE, version)) for version in (4, 6))
    request = IPv4Address(GROUP[4]).packed + bytes(4) + index
    four.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, IPv6Address(GROUP[6]).packed + index)
    return stack


@pytest.fixture
def closed(closed_scene: Scene) -> Scene:
    put(closed_scene, NARROW)
    return closed_scene


@pytest.fixture
def open_node(open_scene: Scene) -> Scene:
    open_scene.write("extra.yaml", "")
    put(open_scene, NARROW)
    return open_scene


def mac_for(address: str, gateway: str) -> str:
    """The destination hardware address of a frame for an address."""
    one = ip_address(address)
    if one.is_multicast and one.version == 4:
        return "01:00:5e:" + ":".join(f"{byte:02x}" for byte in (one.packed[1] & 0x7F, *one.packed[2:]))
    if one.is_multicast:
        return "33:33:" + ":".join(f"{byte:02x}" for byte in one.packed[12:])
    return "ff:ff:ff:ff:ff:ff" if address == "255.255.255.255" else gateway


def reaches(scene: Scene, what: str, version: int, port: int) -> bool:
    """Whether a pod's datagram to one of the node's addresses reaches a process of the node."""
    lab, web = scene.lab, station(scene.lab, "web")
    one, control = token(), token()
    to = ADDRESSES[what][version // 3 - 1]
    assert to is not None
    with udp_socket(lab, NODE, version, port) as server, ear(lab, "shop/db") as hearing:
        packet = datagram(web.address[version], to, port, one)
        last = datagram(web.address[version], address_of("db", version), OPEN_PORT, control)
        say(lab, web.host, framed(packet, web.mac, mac_for(to, web.hop)), framed(last, web.mac, web.hop))
        assert hearing.hears(control), "the control did not arrive"
        return gets(server, one, 0.5)


@pytest.mark.parametrize(("what", "version"), CASES)
def test_closed_node_has_no_other_door(closed: Scene, what: str, version: int) -> None:
    """If workloads may not reach their node, they cannot at any of its addresses."""
    assert not reaches(closed, what, version, OPEN_PORT)


@pytest.mark.parametrize(("what", "version"), CASES)
def test_policy_of_the_pod_decides_about_its_node(open_node: Scene, what: str, version: int) -> None:
    """If workloads may reach their node, the pod's own policy decides at which ports, at all of its addresses."""
    assert not reaches(open_node, what, version, CLOSED_PORT)
    assert reaches(open_node, what, version, OPEN_PORT)


@pytest.mark.parametrize(("what", "version"), FROM_OUTSIDE)
def test_host_endpoint_protects_all_addresses(open_node: Scene, what: str, version: int) -> None:
    """From outside, too, all addresses of the node count as the node's own."""
    put(open_node, HOST, NARROW)
    lab = open_node.lab
    to = ADDRESSES[what][version // 3 - 1]
    assert to is not None
    (ours,) = json.loads(lab.run(INTERNET, ["ip", "-j", "link", "show", "dev", "node0"]).stdout)
    (theirs,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)
    attack, control = token(), token()
    with (
        udp_socket(lab, NODE, version, CLOSED_PORT) as closed,
        udp_socket(lab, NODE, version, OPEN_PORT) as opened,
    ):
        for port, payload in ((CLOSED_PORT, attack), (OPEN_PORT, control)):
            packet = datagram(WORLD[version], to, port, payload)
            say(lab, INTERNET, framed(packet, ours["address"], theirs["address"]))
        assert gets(opened, control)
        assert not gets(closed, attack, 0.3)


@pytest.mark.parametrize("version", [4, 6])
def test_transparent_proxy_does_not_make_the_world_the_node(closed: Scene, version: int) -> None:
    """Local routes of another table are for selected packets. A closed node does not close the rest of the world."""
    lab, web = closed.lab, station(closed.lab, "web")
    everything = "0.0.0.0/0" if version == 4 else "::/0"
    lines = [
        f"-{version} rule add fwmark 0x1000000/0x1000000 lookup 100",
        f"-{version} route add local {everything} dev lo table 100",
    ]
    ip(lab, NODE, *lines)
    try:
        before = closed.state()["changes_applied"]
        ip(lab, NODE, "address add 172.30.99.1/32 dev lo", "address del 172.30.99.1/32 dev lo")  # a change to notice
        assert closed.state()["changes_applied"] >= before
        for _ in range(3):
            one = token()
            with ear(lab, INTERNET) as hearing:
                say(
                    lab,
                    web.host,
                    framed(datagram(web.address[version], WORLD[version], OPEN_PORT, one), web.mac, web.hop),
                )
                assert hearing.hears(one)
    finally:
        ip(lab, NODE, *(line.replace(" add ", " del ") for line in lines))


@pytest.mark.parametrize("version", [4, 6])
def test_name_server_of_the_node_at_a_services_address(open_node: Scene, version: int) -> None:
    """A process that is bound to a service's address is judged by rules for that address, and not by rules for pods."""
    scene = open_node
    lab, web = scene.lab, station(scene.lab, "web")
    scene.write("extra.yaml", DNS)

    def answered() -> bool:
        one, control = token(), token()
        with udp_socket(lab, NODE, version, DNS_PORT, DNS_ADDRESS[version]) as server, ear(lab, "shop/db") as hearing:
            packet = datagram(web.address[version], DNS_ADDRESS[version], DNS_PORT, one)
            last = datagram(web.address[version], address_of("db", version), OPEN_PORT, control)
            say(lab, web.host, framed(packet, web.mac, web.hop), framed(last, web.mac, web.hop))
            assert hearing.hears(control)
            return gets(server, one, 0.5)

    put(scene, NARROW)
    wait_for(lambda: "eth0" in scene.attached(), "the service is known")
    assert not answered(), "nothing allows it"
    put(scene, TO_DNS_PODS, NARROW)
    assert not answered(), "a rule for the pods behind it"
    put(scene, TO_DNS_ADDRESS, NARROW)
    assert answered(), "a rule for its address"
