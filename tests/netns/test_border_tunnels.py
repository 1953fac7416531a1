# SPDX-License-Identifier: Apache-2.0
"""Tunnels: no pod can use those of its node, and nobody outside can send as a pod.

And devices that are not Ethernet.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, Scene, wait_for
from border_scene import (
    FAR,
    FAR_NODE_ADDRESS,
    GATEWAY,
    NARROW,
    NODE_ADDRESS,
    OPEN_PORT,
    PODS,
    WORLD,
    Station,
    address_of,
    border,
    counted,
    datagram,
    ear,
    framed,
    gets,
    has_device,
    inside,
    ip,
    network,
    put,
    raw,
    reads,
    say,
    soon,
    station,
    token,
    tun,
    udp_socket,
)
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import GRE, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_loader.host.links import EXTERNAL, list_links

pytestmark = pytest.mark.netns

PORT, VNI = 8472, 7
DEVICE, DEVICE_MAC = "vx0", "02:00:00:00:00:77"
CLOSED_PORT = 7000
WEB_MAY_ALL = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-may-all, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{}]}
"""
DB_FROM_OTHERS = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: db-from-others, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: db}}}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{{podSelector: {{matchLabels: {{app: other}}}}}}, {{podSelector: {{matchLabels: {{app: far}}}}}}]
  - ports: [{{protocol: UDP, port: {OPEN_PORT}}}]
"""
"""A policy by which only packets with the source of another pod, of this or the other node, and controls enter."""
DB_FROM_NODE = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: db-from-node, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: db}}}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{{ipBlock: {{cidr: {NODE_ADDRESS[4]}/32}}}}, {{ipBlock: {{cidr: "{NODE_ADDRESS[6]}/128"}}}}]
  - ports: [{{protocol: UDP, port: {OPEN_PORT}}}]
"""
THIRD_NODE_ADDRESS = {4: "172.30.0.30", 6: "fd00:30::30"}
THIRD_NODE = f"""\
---
apiVersion: v1
kind: Node
metadata: {{name: node-3}}
status:
  addresses:
  - {{type: InternalIP, address: {THIRD_NODE_ADDRESS[4]}}}
  - {{type: InternalIP, address: "{THIRD_NODE_ADDRESS[6]}"}}
"""
THREE_NODES = PODS + THIRD_NODE
FAR_NODE = '{type: InternalIP, address: 172.30.0.20}, {type: InternalIP, address: "fd00:30::20"}'
"""The addresses of the other node in the manifests."""
DB_FROM_FAR_NODE = DB_FROM_OTHERS.replace("db-from-others", "db-from-far-node").replace(
    "from: [",
    f'from: [{{ipBlock: {{cidr: {FAR_NODE_ADDRESS[4]}/32}}}}, {{ipBlock: {{cidr: "{FAR_NODE_ADDRESS[6]}/128"}}}}, ',
)
TELLING, TELLING_PORT = "vx9", 4790
"""A tunnel device of the node that gives the outer addresses of its packets (``external``)."""
TELLING_ENDPOINT = f"""\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {{name: overlay, labels: {{role: overlay}}}}
spec: {{node: node-1, interfaceName: {TELLING}}}
"""
TELLING_POLICY = """\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: overlay}
spec: {selector: role == 'overlay', applyOnForward: true, types: [Ingress], ingress: [{action: Allow}]}
"""
VPN, VPN_PEER = {4: "10.8.0.1", 6: "fd00:8::1"}, {4: "10.8.0.2", 6: "fd00:8::2"}
HOST_TUN = """\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: vpn, labels: {role: vpn}}
spec: {node: node-1, interfaceName: tun0}
"""
VPN_POLICY = f"""\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {{name: vpn}}
spec:
  selector: role == 'vpn'
  types: [Ingress, Egress]
  ingress: [{{action: Allow, protocol: UDP, destination: {{ports: [{OPEN_PORT}]}}}}]
  egress: [{{action: Allow, protocol: UDP, destination: {{ports: [{OPEN_PORT}]}}}}]
"""
EVERY_INTERFACE = HOST_TUN.replace("name: vpn, labels: {role: vpn}", "name: all, labels: {role: all}").replace(
    "interfaceName: tun0", "interfaceName: '*'"
)
DENY_ALL = """\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: deny-all}
spec: {selector: role == 'all', types: [Ingress, Egress], ingress: [{action: Deny}], egress: [{action: Deny}]}
"""
WITHOUT_THE_OTHER_NODE = "---\n".join(
    one for one in PODS.split("---\n") if "kind: Node\nmetadata: {name: node-2}" not in one
)
BALANCED = {4: "203.0.113.80", 6: "2001:db8:80::80"}
BALANCER = f"""\
apiVersion: v1
kind: Service
metadata: {{name: balanced, namespace: shop}}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.80, "fd00:96::80"]
  externalIPs: ["{BALANCED[4]}", "{BALANCED[6]}"]
  ports: [{{name: u, protocol: UDP, port: 80, targetPort: 5353}}]
"""
INFINIBAND = 32
"""ARPHRD_* of devices with a link header that the program does not parse."""
MACHINE = {4: "10.1.0.9", 6: "fd00:1::9"}
WORKLOAD = """\
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: vm, namespace: shop, labels: {app: vm}}
spec:
  node: node-1
  orchestrator: vms
  workload: vm
  endpoint: eth0
  interfaceName: tun0
  ipNetworks: [10.1.0.9/32, "fd00:1::9/128"]
  profiles: [kns.shop]
"""


def prepare(lab: Lab) -> None:
    """A tunnel between the nodes, as in an overlay. The other node's pod is also behind it."""
    for host, version_of, mac, last in (
        (NODE, NODE_ADDRESS, DEVICE_MAC, 1),
        ("node-2", FAR_NODE_ADDRESS, "02:00:00:00:00:78", 2),
    ):
        ip(
            lab, host, f"link add {DEVICE} address {mac} type vxlan id {VNI} dstport {PORT} local {version_of[4]} nolearning",
            f"address add 10.77.0.{last}/32 dev {DEVICE}", f"link set {DEVICE} up",
        )  # fmt: skip
    for host, peer, mac, last in (
        (NODE, FAR_NODE_ADDRESS, "02:00:00:00:00:78", 2),
        ("node-2", NODE_ADDRESS, DEVICE_MAC, 1),
    ):
        lab.run(host, ["bridge", "fdb", "append", mac, "dev", DEVICE, "dst", peer[4]])
        for version, hop in ((4, f"10.77.0.{last}"), (6, f"fd00:77::{last}")):
            ip(lab, host, f"-{version} neighbour add {hop} lladdr {mac} dev {DEVICE} nud permanent")


@pytest.fixture(scope="module")
def lasting_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with border(tmp_path_factory.mktemp("tunnels"), prepare=prepare) as one:
        yield one


@pytest.fixture(scope="module")
def bridged_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with border(tmp_path_factory.mktemp("bridged"), prepare=prepare, is_bridged=True) as one:
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    lasting_scene.write("extra.yaml", "")
    put(lasting_scene, WEB_MAY_ALL, DB_FROM_OTHERS)
    return lasting_scene


@pytest.fixture
def bridged(bridged_scene: Scene) -> Scene:
    put(bridged_scene, WEB_MAY_ALL, DB_FROM_OTHERS)
    return bridged_scene


def as_pod(source: str, payload: bytes) -> Packet:
    """The packet that an attacker wants to reach the database."""
    to = address_of("db", ip_address(source).version)
    return datagram(source, to, CLOSED_PORT, payload)


def in_vxlan(own: str, node: str, inner: Packet, port: int = PORT) -> Packet:
    frame = Ether(src="02:00:00:00:00:78", dst=DEVICE_MAC) / inner
    udp = UDP(sport=4000, dport=port, **({"chksum": 0} if ip_address(node).version == 4 else {}))
    return network(own, node) / udp / VXLAN(vni=VNI, flags="Instance") / frame


def arrived_at_db(scene: Scene, speaker: Station, packets: Mapping[str, tuple[bytes, Packet]]) -> set[str]:
    """The names of the packets whose content reaches the database."""
    control = token()
    with ear(scene.lab, "shop/db") as hearing:
        frames = [framed(packet, speaker.mac, speaker.hop) for _, packet in packets.values()]
        last = datagram(speaker.address[4], address_of("db"), OPEN_PORT, control)
        say(scene.lab, speaker.host, *frames, framed(last, speaker.mac, speaker.hop))
        heard = hearing.heard([one for one, _ in packets.values()], control)
    return {name for name, (one, _) in packets.items() if one in heard}


# --- from inside -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["scene", "bridged"])
def test_pod_speaks_as_no_other_through_the_nodes_tunnel(request: pytest.FixtureRequest, topology: str) -> None:
    """With open egress, to every address of its node: packets in the cluster's encapsulation are not decapsulated."""
    scene: Scene = request.getfixturevalue(topology)
    web = station(scene.lab, "web", is_bridged=topology == "bridged")
    nodes = [NODE_ADDRESS[4], "10.77.0.1", *(["10.1.0.254"] if topology == "bridged" else [GATEWAY[4]])]
    sources = {"a pod of this node": address_of("other"), "a pod of another": FAR[4], "a pod, IPv6": FAR[6]}
    attacks = {}
    for node in nodes:
        for what, source in sources.items():
            one = token()
            attacks[f"as {what} to {node}"] = (one, in_vxlan(web.address[4], node, as_pod(source, one)))
    assert arrived_at_db(scene, web, attacks) == set()


def test_pod_sends_no_tunnel_packets_to_another_node(scene: Scene) -> None:
    """The same to the other node, which would decapsulate them."""
    lab, web = scene.lab, station(scene.lab, "web")
    one, control = token(), token()
    with ear(lab, "node-2", "eth0") as hearing:
        say(
            lab, web.host,
            framed(in_vxlan(web.address[4], FAR_NODE_ADDRESS[4], as_pod(address_of("other"), one)), web.mac, web.hop),
            framed(datagram(web.address[4], FAR_NODE_ADDRESS[4], OPEN_PORT, control), web.mac, web.hop),
        )  # fmt: skip
        assert hearing.heard([one], control) == set()


def test_fragments_hide_no_tunnel(scene: Scene) -> None:
    """Fragments of a tunnel's datagram are dropped, too."""
    lab, web = scene.lab, station(scene.lab, "web")
    one = token()
    whole = in_vxlan(web.address[4], NODE_ADDRESS[4], as_pod(FAR[4], bytes(64) + one))
    body = raw(whole[UDP])
    parts = [
        IP(src=web.address[4], dst=NODE_ADDRESS[4], id=4711, flags="MF", proto=17) / body[:32],
        IP(src=web.address[4], dst=NODE_ADDRESS[4], id=4711, frag=4, proto=17) / body[32:],
    ]
    control = token()
    with ear(lab, "shop/db") as hearing:
        say(lab, web.host, *(framed(part, web.mac, web.hop) for part in parts))
        last = datagram(web.address[4], address_of("db"), OPEN_PORT, control)
        say(lab, web.host, framed(last, web.mac, web.hop))
        assert hearing.heard([one], control) == set()


def test_tunnel_that_comes_later_takes_no_open_connection(scene: Scene) -> None:
    """A pod that sends to the port before the device exists does not get through when it exists."""
    lab, web = scene.lab, station(scene.lab, "web")
    port, device = 8473, "vx1"
    before = in_vxlan(web.address[4], NODE_ADDRESS[4], as_pod(FAR[4], token()), port)
    with udp_socket(lab, NODE, 4, port) as server:
        one = token()
        warm = datagram(web.address[4], NODE_ADDRESS[4], port, one)
        say(lab, web.host, framed(warm, web.mac, web.hop), framed(before, web.mac, web.hop))
        assert gets(server, one)
        server.sendto(b"answer", (web.address[4], 4000))
        say(lab, web.host, framed(warm, web.mac, web.hop))
        assert gets(server, one)
    local = f"local {NODE_ADDRESS[4]} nolearning"
    ip(lab, NODE, f"link add {device} address {DEVICE_MAC} type vxlan id {VNI} dstport {port} {local}")
    try:
        ip(lab, NODE, f"link set {device} up")
        wait_for(lambda: device in scene.attached(), "the agent knows the device")
        one = token()
        attack = in_vxlan(web.address[4], NODE_ADDRESS[4], as_pod(FAR[4], one), port)
        assert arrived_at_db(scene, web, {"x": (one, attack)}) == set()
    finally:
        ip(lab, NODE, f"link del {device}")


KINDS = {
    "ipip": (4, "local 172.30.0.10 remote 172.30.0.20"),
    "gre": (4, "local 172.30.0.10 remote 172.30.0.20"),
    "sit": (4, "local 172.30.0.10 remote 172.30.0.20"),
    "ip6tnl": (6, "mode any local fd00:30::10 remote fd00:30::20"),
    "geneve": (4, "id 7 remote 172.30.0.20"),
}


def test_other_tunnels_of_the_node(scene: Scene, record_property: Callable[[str, object], None]) -> None:
    """IPIP, GRE, 6in4, 4in6 and Geneve, if the kernel has them. The report lists those that it has."""
    kinds = [kind for kind, (_, options) in KINDS.items() if has_device(scene.lab, kind, *options.split())]
    record_property("kinds of tunnels", ", ".join(kinds) or "none")
    for kind in kinds:
        nothing_is_unpacked(scene, kind)


def nothing_is_unpacked(scene: Scene, kind: str) -> None:
    """Check that a pod's packets to a tunnel device of this kind do not come out of it."""
    lab, web = scene.lab, station(scene.lab, "web")
    outer_version, options = KINDS[kind]
    ip(lab, NODE, f"link add tnl0 type {kind} {options}", "link set tnl0 up")
    try:
        wait_for(lambda: "tnl0" in scene.attached(), "the agent knows the device")
        one = token()
        inner = as_pod(FAR[6] if kind == "sit" else FAR[4], one)
        outer = network(web.address[outer_version], NODE_ADDRESS[outer_version])
        # Most tunnels require their remote end as the source. Even this source must not help.
        packet = {
            "ipip": lambda: outer / inner,
            "sit": lambda: outer / inner,
            "ip6tnl": lambda: outer / inner,
            "gre": lambda: outer / GRE() / inner,
            "geneve": lambda: outer / UDP(sport=4000, dport=6081) / bytes.fromhex("0000080000000700") / inner,
        }[kind]()
        control = token()
        with ear(lab, NODE, "tnl0") as unpacked:
            say(lab, web.host, framed(packet, web.mac, web.hop))
            assert not unpacked.hears(one, 1.0)
        assert control
    finally:
        ip(lab, NODE, "link del tnl0")


# --- from outside ----------------------------------------------------------------------------------------------------------


def macs_of_uplink(lab: Lab) -> tuple[str, str]:
    """The hardware addresses of the link between the world and the node: (the world's, the node's)."""
    (ours,) = json.loads(lab.run(INTERNET, ["ip", "-j", "link", "show", "dev", "node0"]).stdout)
    (theirs,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)
    return ours["address"], theirs["address"]


@pytest.mark.parametrize("version", [4, 6])
def test_nobody_outside_is_a_pod_of_this_node(scene: Scene, version: int) -> None:
    """Packets with the source of one of the node's pods enter neither by the uplink nor by a tunnel."""
    lab, macs = scene.lab, macs_of_uplink(scene.lab)
    plain, packed, control = token(), token(), token()
    other = address_of("other", version)
    with ear(lab, "shop/db") as hearing:
        say(
            lab, INTERNET, framed(as_pod(other, plain), *macs),
            framed(in_vxlan(FAR_NODE_ADDRESS[4], NODE_ADDRESS[4], as_pod(other, packed)), *macs),
            framed(datagram(WORLD[version], address_of("db", version), OPEN_PORT, control), *macs),
        )  # fmt: skip
        assert hearing.heard([plain, packed], control) == set()


@pytest.mark.parametrize("version", [4, 6])
def test_nobody_outside_is_the_node(scene: Scene, version: int) -> None:
    """The same with the source of the node itself, which a pod's rule may name."""
    put(scene, DB_FROM_NODE)
    lab, macs = scene.lab, macs_of_uplink(scene.lab)
    attack, control = token(), token()
    with ear(lab, "shop/db") as hearing:
        say(
            lab, INTERNET, framed(as_pod(NODE_ADDRESS[version], attack), *macs),
            framed(datagram(WORLD[version], address_of("db", version), OPEN_PORT, control), *macs),
        )  # fmt: skip
        assert hearing.heard([attack], control) == set()


# --- out of a tunnel that tells who sent it ---------------------------------------------------------------------------------


@pytest.fixture
def telling(scene: Scene) -> Iterator[Scene]:
    put(scene, WEB_MAY_ALL, DB_FROM_OTHERS, cluster=THREE_NODES)
    with device(scene, TELLING, f"address {DEVICE_MAC} type vxlan external dstport {TELLING_PORT}"):
        yield scene


@contextlib.contextmanager
def device(scene: Scene, name: str, options: str) -> Iterator[None]:
    """A device of the node that the agent knows."""
    ip(scene.lab, NODE, f"link add {name} {options}", f"link set {name} up")
    try:
        wait_for(lambda: name in scene.attached(), "the agent knows the device")
        yield
    finally:
        ip(scene.lab, NODE, f"link del {name}")


Wrap = Callable[[str, str, Packet], Packet]
"""(outer source, outer destination, inner packet) -> packet."""


def in_telling(outer: str, node: str, inner: Packet) -> Packet:
    return in_vxlan(outer, node, inner, TELLING_PORT)


def arrived_from(
    scene: Scene,
    right: str,
    *wrong: str,
    source: str,
    port: int = CLOSED_PORT,
    wrap: Wrap = in_telling,
    rounds: int = 1,
) -> set[str]:
    """The outer sources in ``wrong`` from which a packet of ``source`` reaches the database.

    From ``right`` it must arrive first.
    """
    lab, macs = scene.lab, macs_of_uplink(scene.lab)
    to = address_of("db", ip_address(source).version)
    tokens = {outer: token() for outer in wrong}
    firsts, control = [token() for _ in range(rounds)], token()

    def packed(outer: str, payload: bytes) -> Packet:
        return framed(wrap(outer, NODE_ADDRESS[ip_address(outer).version], datagram(source, to, port, payload)), *macs)

    with ear(lab, "shop/db") as hearing:
        for one in firsts:
            say(lab, INTERNET, packed(right, one))
            assert hearing.hears(one), f"{source} from {right}"
        say(lab, INTERNET, *(packed(outer, one) for outer, one in tokens.items()), packed(right, control))
        heard = hearing.heard(tokens.values(), control)
    return {outer for outer, one in tokens.items() if one in heard}


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("outer", [4, 6])
def test_nobody_speaks_for_a_pod_of_another_node(telling: Scene, outer: int, inner: int) -> None:
    """Neither the world, nor another node, nor a pod of that node (not even the pod itself) can; only that node can."""
    before = counted(telling, "tunnel-source")
    wrong = [WORLD[outer], THIRD_NODE_ADDRESS[outer], FAR[outer], {4: "10.1.0.77", 6: "fd00:1::77"}[outer]]
    assert arrived_from(telling, FAR_NODE_ADDRESS[outer], *wrong, source=FAR[inner]) == set()
    assert counted(telling, "tunnel-source") - before == len(wrong)


@pytest.mark.parametrize("version", [4, 6])
def test_nobody_speaks_for_another_node(telling: Scene, version: int) -> None:
    """The same for the addresses of that node itself, which a pod's rule may name."""
    put(telling, DB_FROM_FAR_NODE, cluster=THREE_NODES)
    wrong = (WORLD[version], THIRD_NODE_ADDRESS[version])
    assert arrived_from(telling, FAR_NODE_ADDRESS[version], *wrong, source=FAR_NODE_ADDRESS[version]) == set()


@pytest.mark.parametrize("version", [4, 6])
def test_pod_that_moved_speaks_from_its_new_node(telling: Scene, version: int) -> None:
    """It can send only from its new node, also after it moved back."""
    moved = PODS.replace("{nodeName: node-2,", "{nodeName: node-3,") + THIRD_NODE
    assert moved != THREE_NODES
    places = FAR_NODE_ADDRESS[version], THIRD_NODE_ADDRESS[version]
    for cluster, (right, wrong) in ((moved, places[::-1]), (THREE_NODES, places)):
        put(telling, DB_FROM_OTHERS, cluster=cluster)
        assert arrived_from(telling, right, wrong, source=FAR[version]) == set()


def test_node_that_changed_its_address_speaks_from_that(telling: Scene) -> None:
    """The former address belongs to no node, and may become another node's."""
    other = "172.30.0.40"
    assert FAR_NODE in PODS
    for cluster in (PODS + THIRD_NODE, PODS + THIRD_NODE.replace(THIRD_NODE_ADDRESS[4], FAR_NODE_ADDRESS[4])):
        put(telling, DB_FROM_OTHERS, cluster=cluster.replace(FAR_NODE, f"{{type: InternalIP, address: {other}}}"))
        assert arrived_from(telling, other, FAR_NODE_ADDRESS[4], source=FAR[4]) == set()


@pytest.mark.parametrize("unknown", ["no address", "no node", "another's address"])
def test_pod_on_a_node_that_is_not_known_speaks_from_anywhere(telling: Scene, unknown: str) -> None:
    """If a node has no known address, the origin of its pods' packets cannot be checked, so they are not denied."""
    cluster = {
        "no address": THREE_NODES.replace(FAR_NODE, ""),
        "no node": THREE_NODES.replace("metadata: {name: node-2}", "metadata: {name: node-4}"),
        "another's address": THREE_NODES.replace(
            f"address: {THIRD_NODE_ADDRESS[4]}", f"address: {FAR_NODE_ADDRESS[4]}"
        ),
    }[unknown]
    assert cluster != THREE_NODES
    put(telling, DB_FROM_OTHERS, cluster=cluster)
    assert arrived_from(telling, FAR_NODE_ADDRESS[4], WORLD[4], source=FAR[4]) == {WORLD[4]}


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_no_pods_comes_out_of_a_tunnel(telling: Scene, version: int) -> None:
    """A source with no known node is judged by policy, whoever sends it."""
    wrong = THIRD_NODE_ADDRESS[version]
    assert arrived_from(telling, WORLD[version], wrong, source="192.0.2.77", port=OPEN_PORT) == {wrong}


@pytest.mark.parametrize("version", [4, 6])
def test_nobody_speaks_in_an_open_connection_of_another_node(telling: Scene, version: int) -> None:
    """Even if a host endpoint's policy tracks the connection, each of its packets must come from that node."""
    put(telling, DB_FROM_OTHERS, TELLING_ENDPOINT, TELLING_POLICY, cluster=THREE_NODES)
    right, wrong = FAR_NODE_ADDRESS[version], THIRD_NODE_ADDRESS[version]
    assert arrived_from(telling, right, wrong, source=FAR[version], rounds=4) == set()


def in_geneve(outer: str, node: str, inner: Packet) -> Packet:
    frame = Ether(src="02:00:00:00:00:78", dst=DEVICE_MAC) / inner
    return network(outer, node) / UDP(sport=4000, dport=6081, chksum=0) / bytes.fromhex("0000655800000700") / frame


TELLING_KINDS: dict[str, tuple[str, Wrap]] = {
    "geneve": (f"address {DEVICE_MAC} ", in_geneve),
    "gre": ("", lambda outer, node, inner: network(outer, node) / GRE() / inner),
    "ipip": ("", lambda outer, node, inner: network(outer, node) / inner),
}
"""By kind of device: (the options before the kind, the function that wraps a packet)."""


def test_other_tunnels_that_tell(telling: Scene, record_property: Callable[[str, object], None]) -> None:
    """Geneve, GRE and IPIP, if the kernel has them. The report lists those that it has."""
    kinds = [kind for kind in TELLING_KINDS if has_device(telling.lab, kind, "external")]
    record_property("kinds of tunnels that tell", ", ".join(kinds) or "none")
    for kind in kinds:
        before, wrap = TELLING_KINDS[kind]
        with device(telling, "tell0", f"{before}type {kind} external"):
            wrong = (WORLD[4], THIRD_NODE_ADDRESS[4])
            assert arrived_from(telling, FAR_NODE_ADDRESS[4], *wrong, source=FAR[4], wrap=wrap) == set(), kind


PLAIN = {"vxlan": "id 9 dstport 8481", "geneve": "id 9 remote 172.30.0.20", "gretap": KINDS["gre"][1]}


def test_which_devices_tell(scene: Scene) -> None:
    """Each kind that the kernel has is recognised with `external`, and only then."""
    found = {}
    for kind in EXTERNAL:
        told = "external dstport 8481" if kind == "vxlan" else "external"
        plain = PLAIN.get(kind) or KINDS.get(kind, ("", ""))[1]
        for words, tells in ((told, True), (plain, False)):
            if has_device(scene.lab, kind, *words.split()):
                ip(scene.lab, NODE, f"link add tell0 type {kind} {words}")
                links = inside(scene.lab, NODE, list_links)
                ip(scene.lab, NODE, "link del tell0")
                (found[kind, tells],) = [one.is_external for one in links if one.name == "tell0"]
    assert {("vxlan", True), ("vxlan", False)} <= found.keys()
    assert found == {(kind, tells): tells for kind, tells in found}


# --- what tunnels there may be ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def overlay(lab: Lab, version: int) -> Iterator[None]:
    """Routes by which packets between the pods of two nodes use the nodes' tunnel."""
    hop = {4: "10.77.0.{}", 6: "fd00:77::{}"}[version]
    routes = [
        (NODE, FAR[version], hop.format(2)),
        *(("node-2", address_of(n, version), hop.format(1)) for n in ("web", "db")),
    ]
    was = {}
    try:
        for host, to, via in routes:
            was[host, to] = lab.run(host, ["ip", f"-{version}", "route", "show", to]).stdout.strip()
            ip(lab, host, f"-{version} route replace {to} via {via} dev {DEVICE} onlink")
        yield
    finally:
        for host, to, via in routes:
            ip(lab, host, f"-{version} route del {to} via {via} dev {DEVICE}")
            if was.get((host, to)):
                ip(lab, host, f"-{version} route replace {was[host, to]}")


def between_pods(version: int) -> list[Attempt]:
    """A connection from a pod of this node to one of the other node, and one in the other direction."""
    return [
        Attempt("shop/web", ip_address(FAR[version]), 6, 5432),
        Attempt("shop/far", ip_address(address_of("db", version)), 6, 5432),
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_overlay_of_the_nodes(scene: Scene, version: int) -> None:
    """Packets between the pods of two nodes use the nodes' tunnel in both directions, as policy says."""
    put(scene, WEB_MAY_ALL, DB_FROM_OTHERS)
    with overlay(scene.lab, version), ear(scene.lab, NODE, DEVICE) as passing:
        assert scene.reached(*between_pods(version)) == [True, True]
        passing.hears(b"nobody sends this", 0.1)
        assert passing.frames, "it went another way"


@pytest.mark.parametrize("version", [4, 6])
def test_overlay_passes_a_host_endpoint_that_denies_all(scene: Scene, version: int) -> None:
    """Tunnel packets pass if the other node is known by its Node object.

    From an unknown address they are judged, and so denied.
    """
    lab = scene.lab
    put(scene, WEB_MAY_ALL, DB_FROM_OTHERS, EVERY_INTERFACE, DENY_ALL)
    try:
        with overlay(lab, version):
            with ear(lab, NODE, DEVICE) as passing:
                assert scene.reached(*between_pods(version)) == [True, True]
                passing.hears(b"nobody sends this", 0.1)
                assert passing.frames, "it went another way"
            put(scene, WEB_MAY_ALL, DB_FROM_OTHERS, EVERY_INTERFACE, DENY_ALL, cluster=WITHOUT_THE_OTHER_NODE)
            assert scene.reached(*between_pods(version)) == [False, False]
            put(scene, WEB_MAY_ALL, DB_FROM_OTHERS, EVERY_INTERFACE, DENY_ALL)
            assert scene.reached(*between_pods(version)) == [True, True]
    finally:
        put(scene, WEB_MAY_ALL, DB_FROM_OTHERS)


def test_tunnels_between_workloads(scene: Scene) -> None:
    """A pod's own encapsulation to another pod, or to a host that is no node, arrives.

    So do packets to the node's WireGuard.
    """
    put(scene, WEB_MAY_ALL)
    lab, web = scene.lab, station(scene.lab, "web")
    for listener, to, port in (
        ("shop/db", address_of("db"), PORT),
        ("shop/db", address_of("db"), 4789),
        (INTERNET, WORLD[4], PORT),
        ("shop/far", FAR[4], PORT),
    ):
        one = token()
        with ear(lab, listener) as hearing:
            say(lab, web.host, framed(in_vxlan(web.address[4], to, as_pod(FAR[4], one), port), web.mac, web.hop))
            assert hearing.hears(one), (listener, port)
    for protocol in (4, 41, 47, 50):
        one = token()
        with ear(lab, "shop/db") as hearing:
            say(
                lab, web.host, framed(network(web.address[4], address_of("db"), proto=protocol) / one, web.mac, web.hop)
            )
            assert hearing.hears(one), protocol
    for version in (4, 6):
        with udp_socket(lab, NODE, version, 51820) as wireguard:
            one = token()
            packet = datagram(web.address[version], NODE_ADDRESS[version], 51820, one)
            say(lab, web.host, framed(packet, web.mac, web.hop))
            assert gets(wireguard, one)


# --- devices that are not Ethernet -----------------------------------------------------------------------------------------


def up(lab: Lab, *, is_shared: bool = True) -> None:
    """Give a tun device of the node its addresses.

    ``is_shared``: with a subnet; otherwise single ones, as a VPN client has.
    """
    for version in (4, 6):
        bits = {(4, True): 24, (6, True): 64, (4, False): 32, (6, False): 128}[version, is_shared]
        ip(lab, NODE, f"address add {VPN[version]}/{bits} dev tun0" + (" nodad" if version == 6 else ""))
    ip(lab, NODE, "link set tun0 up")
    for version in (4, 6):
        ip(lab, NODE, f"-{version} route replace {VPN_PEER[version]} dev tun0")


@pytest.mark.parametrize("version", [4, 6])
def test_vpn_of_the_node_itself(scene: Scene, version: int) -> None:
    """A tun device of the node with single addresses passes the node's traffic and that of pods, in both directions."""
    put(scene, WEB_MAY_ALL)
    lab, web = scene.lab, station(scene.lab, "web")
    with ExitStack() as stack:
        fd = stack.enter_context(tun(lab, "tun0"))
        up(lab, is_shared=False)
        server = stack.enter_context(udp_socket(lab, NODE, version, CLOSED_PORT))
        wait_for(lambda: scene.status() is not None, "the agent goes on")
        one, two, three, four = (token() for _ in range(4))

        def comes() -> bool:
            os.write(fd, raw(datagram(VPN_PEER[version], VPN[version], CLOSED_PORT, one)))
            return gets(server, one, 0.2)

        assert [comes() for _ in range(10)][-1], "from the peer to the node"
        server.sendto(two, (VPN_PEER[version], 4000))
        assert reads(fd, two), "from the node to the peer"
        packet = datagram(web.address[version], VPN_PEER[version], CLOSED_PORT, three)
        say(lab, web.host, framed(packet, web.mac, web.hop))
        assert reads(fd, three), "from a pod to the peer"
        with ear(lab, "shop/db") as hearing:
            os.write(fd, raw(datagram(VPN_PEER[version], address_of("db", version), CLOSED_PORT, four)))
            assert hearing.hears(four), "from the peer to a pod that nobody closed"


@pytest.mark.parametrize("version", [4, 6])
def test_host_endpoint_on_a_tun_device(scene: Scene, version: int) -> None:
    """A host endpoint's policy holds for incoming and outgoing packets that begin with the network header."""
    lab = scene.lab
    with ExitStack() as stack:
        fd = stack.enter_context(tun(lab, "tun0"))
        up(lab)
        put(scene, HOST_TUN, VPN_POLICY, NARROW)
        wait_for(lambda: scene.attached().get("tun0") == {"ingress", "egress"}, "the device bears the programs")
        closed = stack.enter_context(udp_socket(lab, NODE, version, CLOSED_PORT))
        opened = stack.enter_context(udp_socket(lab, NODE, version, OPEN_PORT))
        attack, control = token(), token()

        def enforced() -> bool:
            os.write(fd, raw(datagram(VPN_PEER[version], VPN[version], OPEN_PORT, control)))
            return gets(opened, control, 0.2)

        assert any(enforced() for _ in range(20)), "what policy allows comes in"
        os.write(fd, raw(datagram(VPN_PEER[version], VPN[version], CLOSED_PORT, attack)))
        enforced()
        assert not gets(closed, attack, 0.3)
        out, allowed = token(), token()
        with udp_socket(lab, NODE, version) as sender:
            with contextlib.suppress(OSError):  # the program dropped it
                sender.sendto(out, (VPN_PEER[version], CLOSED_PORT))
            sender.sendto(allowed, (VPN_PEER[version], OPEN_PORT))
        assert out not in read_until(fd, allowed)


def read_until(fd: int, control: bytes) -> bytes:
    """All output of a tun device until the control arrives."""
    found = bytearray()

    def is_there() -> bool:
        found.extend(read_all(fd))
        return control in found

    soon(is_there, "what policy allows goes out")
    return bytes(found)


def read_all(fd: int) -> bytes:
    """All packets that wait in a tun device."""
    found = b""
    try:
        while True:
            found += os.read(fd, 65536)
    except BlockingIOError:
        return found


@pytest.mark.parametrize("version", [4, 6])
def test_deferred_verdict_at_a_tun_device(scene: Scene, version: int) -> None:
    """A pod's packet to a service that leaves untranslated by a tun device is judged there."""
    lab, web = scene.lab, station(scene.lab, "web")
    with tun(lab, "tun0") as fd:
        up(lab)
        ip(lab, NODE, f"-{version} route add {BALANCED[version]} dev tun0")
        scene.write("extra.yaml", BALANCER)
        put(scene, NARROW)
        wait_for(lambda: scene.attached().get("tun0") == {"ingress", "egress"}, "the device bears the programs")
        attack, control = token(), token()
        for port, to, payload in ((80, BALANCED[version], attack), (OPEN_PORT, VPN_PEER[version], control)):
            packet = datagram(web.address[version], to, port, payload)
            say(lab, web.host, framed(packet, web.mac, web.hop))
        assert attack not in read_until(fd, control)


@pytest.mark.parametrize("version", [4, 6])
def test_workload_behind_a_tun_device(scene: Scene, version: int) -> None:
    """Policy and anti-spoofing hold for a workload whose interface has no link header."""
    lab = scene.lab
    with tun(lab, "tun0") as fd:
        ip(lab, NODE, "link set tun0 up")
        for one in (4, 6):
            ip(lab, NODE, f"-{one} route add {MACHINE[one]} dev tun0")
        scene.write("extra.yaml", WORKLOAD)
        put(scene, NARROW)
        attacks, control = [token(), token()], token()
        to = address_of("db", version)
        with ear(lab, "shop/db") as hearing:
            soon(
                lambda: (
                    os.write(fd, raw(datagram(MACHINE[version], to, OPEN_PORT, control)))
                    and hearing.hears(control, 0.2)
                ),
                "what policy allows arrives",
            )
            last = token()
            os.write(fd, raw(datagram(MACHINE[version], to, CLOSED_PORT, attacks[0])))
            os.write(fd, raw(datagram(address_of("other", version), to, OPEN_PORT, attacks[1])))
            os.write(fd, raw(datagram(MACHINE[version], to, OPEN_PORT, last)))
            assert hearing.heard(attacks, last) == set()


def test_unknown_link_header_is_closed_where_policy_applies(scene: Scene) -> None:
    """A device with an unknown link header passes packets that no policy concerns, and no others."""
    lab = scene.lab
    with tun(lab, "tun0", hardware=INFINIBAND) as fd, udp_socket(lab, NODE, 4, CLOSED_PORT) as server:
        up(lab)
        one = token()
        soon(
            lambda: (os.write(fd, raw(datagram(VPN_PEER[4], VPN[4], CLOSED_PORT, one))) and gets(server, one, 0.2)),
            "without a policy it is the node's own affair",
        )
        put(scene, HOST_TUN, VPN_POLICY, NARROW)
        wait_for(lambda: scene.attached().get("tun0") == {"ingress", "egress"}, "the device bears the programs")
        two, three = token(), token()
        os.write(fd, raw(datagram(VPN_PEER[4], VPN[4], CLOSED_PORT, two)))
        assert not gets(server, two, 1.0)
        assert counted(scene, "link-type")
        with udp_socket(lab, NODE, 4) as sender, contextlib.suppress(OSError):
            sender.sendto(three, (VPN_PEER[4], OPEN_PORT))
        assert three not in read_all(fd)
