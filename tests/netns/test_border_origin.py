# SPDX-License-Identifier: Apache-2.0
"""The origin of a packet: one that the stack or a bridge sends anew does not count as the node's own.

The node's own packets do. Also packets to a service with a deferred verdict that leave untranslated.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, Scene, wait_for
from border_scene import (
    BRIDGE,
    BRIDGE_ADDRESS,
    FAR,
    LAST,
    NARROW,
    NODE_ADDRESS,
    OPEN_PORT,
    WORLD,
    Ear,
    Station,
    address_of,
    border,
    datagram,
    ear,
    framed,
    gets,
    ip,
    network,
    port_of,
    put,
    raw,
    say,
    station,
    token,
    track_connections,
    udp_socket,
)
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, PadN
from scapy.packet import Packet, Raw

from netpol_ebpf.lab.attempt import Attempt, Reachability
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import ICMP, ICMPV6
from netpol_ebpf.lab.topology import TCP as TCP_NUMBER

pytestmark = pytest.mark.netns

CLOSED_PORT = 7000
"""A UDP port that no policy here allows."""
BALANCED = {4: "203.0.113.80", 6: "2001:db8:80::80"}
"""The addresses of a load balancer, which nothing on the node translates."""
BALANCER = f"""\
apiVersion: v1
kind: Service
metadata: {{name: balanced, namespace: shop}}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.80, "fd00:96::80"]
  externalIPs: ["{BALANCED[4]}", "{BALANCED[6]}"]
  ports:
  - {{name: u, protocol: UDP, port: 80, targetPort: 5353}}
  - {{name: t, protocol: TCP, port: 80, targetPort: 5432}}
"""
TO_BALANCER = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: balanced, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  policyTypes: [Egress]
  egress: [{{to: [{{ipBlock: {{cidr: {BALANCED[4]}/32}}}}, {{ipBlock: {{cidr: "{BALANCED[6]}/128"}}}}]}}]
"""
HOST = """\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: uplink, labels: {role: node}}
spec: {node: node-1, interfaceName: eth0}
"""
NODE_MAY_ALL = """\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: node-may-all}
spec: {selector: role == 'node', order: 0, types: [Ingress, Egress], ingress: [{action: Allow}], egress: [{action: Allow}]}
"""
NOTHING_PASSES = f"""\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {{name: nothing-passes}}
spec:
  selector: role == 'node'
  applyOnForward: true
  order: 1
  types: [Egress]
  egress:
  - {{action: Allow, protocol: UDP, destination: {{ports: [{OPEN_PORT}]}}}}
  - {{action: Deny, source: {{nets: ["fd00:1::/64"]}}}}
"""
ANYTHING = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: anything, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}
"""
WEB_MAY_ALL = ANYTHING.replace("podSelector: {}", "podSelector: {matchLabels: {app: web}}")
OUT_ONLY = ANYTHING.replace("ingress: [{}], ", "")


@pytest.fixture(scope="module")
def routed_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    home = tmp_path_factory.mktemp("routed")

    def prepare(lab: Lab) -> None:
        track_connections(lab, home)
        for version, address in BALANCED.items():
            bits = 32 if version == 4 else 128
            ip(lab, INTERNET, f"address add {address}/{bits} dev lo" + (" nodad" if version == 6 else ""))

    with border(home, prepare=prepare) as one:
        yield one


@pytest.fixture(scope="module")
def bridged_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A bridge whose packets pass the node's netfilter, which tracks connections."""
    home = tmp_path_factory.mktemp("bridged")
    with border(home, is_bridged=True, prepare=lambda lab: track_connections(lab, home)) as one:
        one.lab.prober.write_settings(
            NODE, [(f"bridge/bridge-nf-call-{table}", "1") for table in ("iptables", "ip6tables")]
        )
        yield one


@pytest.fixture
def routed(routed_scene: Scene) -> Scene:
    routed_scene.write("extra.yaml", "")
    put(routed_scene, NARROW)
    return routed_scene


@pytest.fixture
def bridged(bridged_scene: Scene) -> Scene:
    put(bridged_scene, NARROW)
    return bridged_scene


def refragmented(source: str, destination: str, payload: bytes, *, port: int = CLOSED_PORT) -> list[Packet]:
    """A datagram in two fragments that a node, after reassembly, cannot split at the same place."""
    whole = datagram(source, destination, port, payload)
    body = raw(whole[UDP])
    cut = (8 + len(payload) // 2) // 8 * 8
    options = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(52))])
    head = IPv6(src=source, dst=destination)
    return [
        head / options / IPv6ExtHdrFragment(id=4711, m=1, nh=17) / Raw(body[:cut]),
        head / IPv6ExtHdrFragment(id=4711, offset=cut // 8, nh=17) / Raw(body[cut:]),
    ]


# --- what the stack made anew ---------------------------------------------------------------------------------------------


def assert_closed(scene: Scene, host: str, listener: str, ends: tuple[str, str], macs: tuple[str, str]) -> None:
    """Check that neither reassembled fragments nor later packets arrive, but allowed packets do."""
    lab, (source, destination) = scene.lab, ends
    first, second, after, control, allowed = (token() for _ in range(5))
    payload = first + bytes(104) + second + bytes(104)
    good = allowed + bytes(216)
    with ear(lab, listener) as hearing:
        say(lab, host, *(framed(one, *macs) for one in refragmented(source, destination, payload)))
        say(lab, host, framed(datagram(source, destination, CLOSED_PORT, after), *macs))
        say(lab, host, framed(datagram(source, destination, OPEN_PORT, control), *macs))
        assert hearing.heard([first, second, after], control) == set()
        say(lab, host, *(framed(one, *macs) for one in refragmented(source, destination, good, port=OPEN_PORT)))
        assert hearing.hears(allowed), "fragments of what policy allows"


def test_fragments_of_a_pod_to_a_closed_pod(routed: Scene) -> None:
    """From one pod to another on a node that tracks connections."""
    web = station(routed.lab, "web")
    put(routed, WEB_MAY_ALL, NARROW)
    assert_closed(routed, web.host, "shop/db", (web.address[6], address_of("db", 6)), (web.mac, web.hop))


def test_fragments_of_the_world_to_a_closed_pod(routed: Scene) -> None:
    """From outside the cluster."""
    assert_closed(routed, INTERNET, "shop/db", (WORLD[6], address_of("db", 6)), macs_of_uplink(routed.lab))


def test_fragments_over_a_bridge_to_a_closed_pod(bridged: Scene) -> None:
    """From one pod to another on a bridge with netfilter. A bridge keeps the sender's socket in a packet."""
    web, db = station(bridged.lab, "web", is_bridged=True), station(bridged.lab, "db", is_bridged=True)
    put(bridged, WEB_MAY_ALL, NARROW)
    assert_closed(bridged, web.host, db.host, (web.address[6], db.address[6]), (web.mac, db.mac))


def test_fragments_out_of_a_host_endpoint(routed: Scene) -> None:
    """A pod's packet through the node does not count as the node's own where it leaves."""
    web = station(routed.lab, "web")
    put(routed, HOST, NODE_MAY_ALL, NOTHING_PASSES, ANYTHING)
    assert_closed(routed, web.host, INTERNET, (web.address[6], WORLD[6]), (web.mac, web.hop))


def macs_of_uplink(lab: Lab) -> tuple[str, str]:
    """The hardware addresses of the link between the world and the node: (the world's, the node's)."""
    (ours,) = json.loads(lab.run(INTERNET, ["ip", "-j", "link", "show", "dev", "node0"]).stdout)
    (theirs,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)
    return ours["address"], theirs["address"]


@pytest.fixture
def unfiltered(bridged: Scene) -> Iterator[Scene]:
    """The bridge, whose packets bypass netfilter, which would remove their socket."""
    settings = [f"bridge/bridge-nf-call-{table}" for table in ("iptables", "ip6tables")]
    bridged.lab.prober.write_settings(NODE, [(one, "0") for one in settings])
    yield bridged
    bridged.lab.prober.write_settings(NODE, [(one, "1") for one in settings])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("how", ["datagram socket", "packet socket"])
def test_socket_that_a_bridge_leaves_is_no_sign_of_the_node(unfiltered: Scene, version: int, how: str) -> None:
    """A pod's packet that a bridge forwards has its sender's socket, and is judged nevertheless."""
    lab, web = unfiltered.lab, station(unfiltered.lab, "web", is_bridged=True)
    db = station(lab, "db", is_bridged=True)
    put(unfiltered, WEB_MAY_ALL, NARROW)
    attack, control = token(), token()
    with ear(lab, db.host) as hearing:
        if how == "packet socket":
            for port, payload in ((CLOSED_PORT, attack), (OPEN_PORT, control)):
                packet = datagram(web.address[version], db.address[version], port, payload)
                say(lab, web.host, framed(packet, web.mac, db.mac))
        else:
            with udp_socket(lab, web.host, version) as sock:
                for port, payload in ((CLOSED_PORT, attack), (OPEN_PORT, control)):
                    sock.sendto(payload, (db.address[version], port))
        assert hearing.heard([attack], control) == set()


# --- what the node sends goes on --------------------------------------------------------------------------------------------

CLOSED = ANYTHING.replace(", ingress: [{}], egress: [{}]", "")


def node_addresses(topology: str, version: int) -> list[str]:
    """The addresses from which a node may probe its pods: its uplink's, the pods' gateway, and a service of its own."""
    extra = {4: "172.30.9.9", 6: "fd00:30::99"}
    return [NODE_ADDRESS[version], extra[version], *([BRIDGE_ADDRESS[version]] if topology == "bridged" else [])]


@pytest.mark.parametrize("topology", ["routed", "bridged"])
@pytest.mark.parametrize("version", [4, 6])
def test_node_reaches_closed_pods_from_all_its_addresses(
    request: pytest.FixtureRequest, topology: str, version: int
) -> None:
    """Probes of a node reach a closed pod: small and large datagrams, connections, echo requests."""
    scene: Scene = request.getfixturevalue(topology)
    put(scene, CLOSED)
    lab, to = scene.lab, address_of("db", version)
    extra = f"{node_addresses(topology, version)[1]}/{32 if version == 4 else 128} dev eth0"
    ip(lab, NODE, f"address add {extra}" + (" nodad" if version == 6 else ""))
    ping = ICMP if version == 4 else ICMPV6
    try:
        for source in node_addresses(topology, version):
            with ear(lab, "shop/db") as hearing, udp_socket(lab, NODE, version, address=source) as sock:
                small, large = token(), token()
                sock.sendto(small, (to, CLOSED_PORT))
                assert hearing.hears(small), source
                sock.sendto(bytes(4000) + large, (to, CLOSED_PORT))
                assert hearing.hears(large), f"large from {source}"
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            with lab.prober.open_socket(NODE, family, socket.SOCK_STREAM) as sock:
                sock.settimeout(5)
                sock.bind((source, 0))
                sock.connect((to, 5432))
                sock.sendall(small)
                assert sock.recv(100) == small, source
        assert scene.reached(Attempt(NODE, ip_address(to), ping)) == [True]
    finally:
        ip(lab, NODE, f"address del {extra}")


@pytest.mark.parametrize("topology", ["routed", "bridged"])
@pytest.mark.parametrize("version", [4, 6])
def test_node_resets_and_refuses(request: pytest.FixtureRequest, topology: str, version: int) -> None:
    """A pod that may send and that nobody may reach gets the node's resets and ICMP errors (also a spent hop limit)."""
    scene: Scene = request.getfixturevalue(topology)
    put(scene, OUT_ONLY)
    lab = scene.lab
    node = ip_address(NODE_ADDRESS[version])
    (result,) = lab.attempt([Attempt("shop/web", node, TCP_NUMBER, 9)])
    assert result.outcome is Reachability.REFUSED
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.prober.open_socket("shop/web", family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((str(node), 9))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
    web = station(lab, "web", is_bridged=topology == "bridged")
    one = token()
    spent = network(web.address[version], WORLD[version], hops=1) / UDP(sport=4001, dport=33434) / one
    with ear(lab, web.host) as hearing:
        say(lab, web.host, framed(spent, web.mac, web.hop))
        assert hearing.hears(one), "the error with the packet in it"


@pytest.mark.parametrize("topology", ["routed", "bridged"])
def test_node_resets_a_connection_that_it_opened(request: pytest.FixtureRequest, topology: str) -> None:
    """A probe that ends with a reset, as many health checks do, also ends so at the closed pod."""
    scene: Scene = request.getfixturevalue(topology)
    put(scene, CLOSED)
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with ear(scene.lab, "shop/db") as hearing:
            with scene.lab.prober.open_socket(NODE, family, socket.SOCK_STREAM) as sock:
                sock.settimeout(5)
                sock.connect((address_of("db", version), 5432))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                ports = struct.pack("!HH", sock.getsockname()[1], 5432)
            wait_for(lambda hearing=hearing, ports=ports: hears_reset(hearing, ports), "the reset")


def hears_reset(hearing: Ear, ports: bytes) -> bool:
    """Whether a reset between these ports has arrived."""
    hearing.hears(b"nobody sends this", 0.1)
    return any(is_reset(frame, ports) for frame in hearing.frames)


def is_reset(frame: bytes, ports: bytes) -> bool:
    """Whether a frame is a reset between these ports."""
    at = frame.find(ports, 34)
    return at >= 0 and len(frame) > at + 13 and bool(frame[at + 13] & 4)


@pytest.mark.parametrize("version", [4, 6])
def test_node_speaks_to_groups_on_a_bridge(bridged: Scene, version: int) -> None:
    """A node's packet that a bridge floods has lost its socket, and still counts as the node's own."""
    put(bridged, CLOSED)
    lab, one = bridged.lab, token()
    with ExitStack() as stack:
        hearing = [stack.enter_context(ear(lab, f"shop/{name}")) for name in LAST]
        sock = stack.enter_context(udp_socket(lab, NODE, version))
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, IPv4Address(BRIDGE_ADDRESS[4]).packed)
            sock.sendto(one, ("224.0.0.251", 5355))
        else:
            (link,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", BRIDGE]).stdout)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, struct.pack("=I", link["ifindex"]))
            sock.sendto(one, ("ff02::fb", 5355))
        assert [pod.hears(one, 2.0) for pod in hearing] == [True] * len(LAST)


# --- a verdict that was put off ---------------------------------------------------------------------------------------------


@pytest.fixture
def balanced(routed: Scene) -> Scene:
    """A service at a load balancer's address that no proxy of the node knows."""
    routed.write("extra.yaml", BALANCER)
    put(routed, NARROW)
    return routed


def to_balanced(web: Station, version: int, kind: str, payload: bytes) -> Packet:
    head = network(web.address[version], BALANCED[version])
    if kind == "UDP":
        return head / UDP(sport=4000, dport=80) / payload
    return head / TCP(sport=4000, dport=80, flags="PA", seq=7, ack=7) / payload


@pytest.mark.parametrize("kind", ["UDP", "TCP"])
@pytest.mark.parametrize("version", [4, 6])
def test_untranslated_service_is_judged_where_it_leaves(balanced: Scene, version: int, kind: str) -> None:
    """A packet to a service's address that leaves untranslated is judged, the second packet like the first."""
    lab, web = balanced.lab, station(balanced.lab, "web")
    attacks, control = [token(), token()], token()
    with ear(lab, INTERNET) as hearing:
        for one in attacks:
            say(lab, web.host, framed(to_balanced(web, version, kind, one), web.mac, web.hop))
        say(lab, web.host, framed(datagram(web.address[version], WORLD[version], OPEN_PORT, control), web.mac, web.hop))
        assert hearing.heard(attacks, control) == set()


@pytest.mark.parametrize("version", [4, 6])
def test_untranslated_service_that_policy_allows(balanced: Scene, version: int) -> None:
    """If policy names the service's address, datagrams arrive there, answers come back, and connections work."""
    put(balanced, TO_BALANCER, NARROW)
    lab = balanced.lab
    with ExitStack() as stack:
        server = stack.enter_context(udp_socket(lab, INTERNET, version, 80, BALANCED[version]))
        client = stack.enter_context(udp_socket(lab, "shop/web", version))
        for _ in range(3):
            one, two = token(), token()
            client.sendto(one, (BALANCED[version], 80))
            assert gets(server, one)
            server.sendto(two, (address_of("web", version), client.getsockname()[1]))
            assert gets(client, two)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        listener = stack.enter_context(lab.prober.open_socket(INTERNET, family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((BALANCED[version], 80))
        listener.listen()
        stream = stack.enter_context(lab.prober.open_socket("shop/web", family, socket.SOCK_STREAM))
        stream.settimeout(5)
        stream.connect((BALANCED[version], 80))
        stream.sendall(one)
        incoming = stack.enter_context(listener.accept()[0])
        incoming.settimeout(5)
        assert incoming.recv(100) == one


def test_direct_routing_goes_on(routed: Scene) -> None:
    """Pods of two nodes without a tunnel reach each other in both directions as policy allows."""
    for version in (4, 6):
        for source, to in (("shop/web", FAR[version]), ("shop/far", address_of("web", version))):
            assert routed.reached(Attempt(source, ip_address(to), 17, OPEN_PORT)) == [True]
        assert routed.reached(Attempt("shop/far", ip_address(address_of("web", version)), 17, CLOSED_PORT)) == [False]
    assert port_of("web") in routed.attached()
