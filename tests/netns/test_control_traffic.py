# SPDX-License-Identifier: Apache-2.0
"""The messages that a link needs under a default deny in both directions, and the source addresses of pods."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import frames
from agent_scene import CLUSTER, NODE, Scene, scene_in, to_db, wait_for

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import PARENT_MAC, TCP, Host, IPAddress

pytestmark = pytest.mark.netns

ANY, ALL = IPv4Address("0.0.0.0"), IPv4Address("255.255.255.255")
QUIET_S, PATIENCE_S = 0.4, 5.0
DHCP = (68, 67)
"""Ports of a DHCP client and server."""
GATEWAY = {4: ip_address("169.254.1.1"), 6: ip_address("fe80::1")}
POD = {"web": 1, "db": 2, "other": 3}
LENT = {4: ip_address("198.51.100.7"), 6: ip_address("2001:db8:5::7")}
FOREIGN = {4: ip_address("198.51.101.7"), 6: ip_address("2001:db8:6::7")}
"""Addresses next to the lent ones."""

DENY_ALL = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
"""
EGRESS = """\
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: web, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  policyTypes: [Egress]
  egress: [{{to: [{{ipBlock: {{cidr: "{net}"}}}}], ports: [{{protocol: UDP, port: {port}}}]}}]
"""
FROM_OTHER = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: other}}}], ports: [{protocol: UDP, port: 5353}]}]
"""
HOST_DENY = """\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: uplink, labels: {role: node}}
spec: {node: node-1, interfaceName: eth0}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: deny-all}
spec: {selector: role == 'node', order: 1, types: [Ingress, Egress], ingress: [{action: Deny}], egress: [{action: Deny}]}
"""


def lending(*nets: str) -> str:
    """The manifests of the cluster, with one pod that may send from other addresses."""
    quoted = ",".join(f'"{net}"' for net in nets)
    return CLUSTER.replace(
        "{name: web, namespace: shop,",
        f"{{name: web, namespace: shop, annotations: {{cni.projectcalico.org/allowedSourcePrefixes: '[{quoted}]'}},",
    )


LENDING = lending("198.51.100.0/24", "2001:db8:5::/48")


def address_of(name: str, version: int = 4) -> IPAddress:
    return ip_address(f"10.1.0.{POD[name]}" if version == 4 else f"fd00:1::{POD[name]}")


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    home = tmp_path_factory.mktemp("control") / "home"
    with scene_in(lab, home, {"cluster.yaml": CLUSTER}, options=("--allow-source-prefixes",)) as one:
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """A scene with every pod isolated in both directions."""
    if lasting_scene.process is None or lasting_scene.process.poll() is not None:
        lasting_scene.start()
    lasting_scene.enforce(DENY_ALL)
    wait_for(lambda: lasting_scene.reached(to_db("shop/web")) == [False], "nothing is allowed")
    return lasting_scene


def interface_of(name: str) -> str:
    """The node's end of a pod's link."""
    return Host(f"shop/{name}", NODE, ()).parent_interface


def counted(scene: Scene, reason: str) -> int:
    """The number of packets counted under a reason."""
    return int(scene.state()["packets"].get(reason, 0))


def addresses(lab: Lab, host: str, device: str) -> dict[str, dict[str, Any]]:
    """The IPv6 addresses of an interface, with their flags."""
    (link,) = json.loads(lab.run(host, ["ip", "-6", "-j", "address", "show", "dev", device]).stdout)
    return {one["local"]: one for one in link["addr_info"]}


def link_local(lab: Lab, host: str, device: str = "eth0") -> str:
    """The automatic link-local address, when it is usable."""

    def look() -> str | None:
        ready = [
            name
            for name, one in addresses(lab, host, device).items()
            if name.startswith("fe80") and not one.get("tentative")
        ]
        return ready[0] if ready else None

    return str(wait_for(look, f"{host} has a link-local address"))


def neighbour(lab: Lab, host: str, device: str, address: IPAddress) -> str | None:
    """The hardware address of a neighbour that answered; None before that."""
    command = ["ip", f"-{address.version}", "-j", "neighbour", "show", "to", str(address), "dev", device]
    for one in json.loads(lab.run(host, command).stdout or "[]"):
        if not {"FAILED", "INCOMPLETE"} & set(one["state"]):
            return str(one["lladdr"])
    return None


def datagram_socket(lab: Lab, host: str, address: str, port: int, device: str | None = None) -> socket.socket:
    """A UDP socket in a host's namespace, with broadcasts allowed. ``device``: binds it to that interface."""
    sock = lab.prober.open_socket(host, socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    if device is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    sock.bind((address, port))
    return sock


def wire_socket(lab: Lab, host: str, device: str = "eth0") -> socket.socket:
    """A socket that sends whole frames by an interface. It receives none."""
    sock = lab.prober.open_socket(host, socket.AF_PACKET, socket.SOCK_RAW)
    sock.bind((device, 0))
    return sock


def received(sock: socket.socket, at_least: int = 0) -> list[bytes]:
    """The datagrams that arrive until there is a pause. ``at_least``: wait longer until there are so many."""
    found: list[bytes] = []
    try:
        while True:
            sock.settimeout(QUIET_S if len(found) >= at_least else PATIENCE_S)
            found.append(sock.recv(2048))
    except TimeoutError:
        return found


# --- what a link needs --------------------------------------------------------------------------------------------------


def test_duplicate_address_detection(scene: Scene) -> None:
    """An isolated pod's address becomes usable unless the other end has it.

    The pod may not probe another pod's address.
    """
    lab, ours = scene.lab, interface_of("web")
    own, name = str(address_of("web", 6)), "shop/web"
    lab.prober.write_settings("shop/web", [("ipv6/conf/eth0/accept_dad", "1"), ("ipv6/conf/eth0/dad_transmits", "1")])
    before = counted(scene, "neighbour")
    with ExitStack() as stack:
        lab.run(name, ["ip", "address", "del", f"{own}/128", "dev", "eth0"])
        stack.callback(lab.run, name, ["ip", "address", "replace", f"{own}/128", "dev", "eth0", "nodad"])
        lab.run(NODE, ["ip", "address", "add", f"{own}/128", "dev", ours, "nodad"])
        duplicate = stack.enter_context(ExitStack())
        duplicate.callback(lab.run, NODE, ["ip", "address", "del", f"{own}/128", "dev", ours])
        lab.run(name, ["ip", "address", "add", f"{own}/128", "dev", "eth0"])
        wait_for(lambda: addresses(lab, name, "eth0")[own].get("dadfailed"), "the address is found to be a duplicate")
        lab.run(name, ["ip", "address", "del", f"{own}/128", "dev", "eth0"])
        duplicate.close()
        lab.run(name, ["ip", "address", "add", f"{own}/128", "dev", "eth0"])
        seen = wait_for(
            lambda: (now := addresses(lab, name, "eth0")[own]) and not now.get("tentative") and now,
            "the check of the address ends",
        )
        assert not seen.get("dadfailed")
    assert counted(scene, "neighbour") > before
    forged = counted(scene, "link-forged")
    lab.run(name, ["ip", "address", "add", "fd00:5::1/64", "dev", "eth0"])
    wait_for(lambda: not addresses(lab, name, "eth0")["fd00:5::1"].get("tentative"), "nobody has answered")
    assert counted(scene, "link-forged") > forged
    lab.run(name, ["ip", "address", "del", "fd00:5::1/64", "dev", "eth0"])


@pytest.mark.parametrize("version", [4, 6])
def test_neighbours_are_found_while_packets_are_denied(scene: Scene, version: int) -> None:
    """An isolated pod and its node learn each other's hardware addresses, although all the pod's packets are denied."""
    lab, ours = scene.lab, interface_of("web")
    lab.run("shop/web", ["ip", f"-{version}", "neighbour", "flush", "dev", "eth0"])
    lab.run(NODE, ["ip", f"-{version}", "neighbour", "flush", "dev", ours])
    denied = counted(scene, "policy-deny")
    assert scene.reached(to_db("shop/web", version)) == [False]
    assert counted(scene, "policy-deny") > denied
    gateway = wait_for(lambda: neighbour(lab, "shop/web", "eth0", GATEWAY[version]), "the gateway answers")
    assert gateway == PARENT_MAC
    lab.run(NODE, ["ip", f"-{version}", "neighbour", "flush", "dev", ours])
    assert scene.reached(Attempt(NODE, address_of("web", version), TCP, 5432)) == [True]
    assert neighbour(lab, NODE, ours, address_of("web", version)) is not None


def test_link_local_addresses_are_subject_to_policy(scene: Scene) -> None:
    """Between a pod and its node's link-local address only connections of the node are exempt.

    Such sources are not spoofed.
    """
    lab, ours = scene.lab, interface_of("web")
    spoofed = counted(scene, "spoofed")
    pod = link_local(lab, "shop/web")
    with ExitStack() as stack:
        server = stack.enter_context(datagram_socket(lab, NODE, "::", 7000, ours))
        client = stack.enter_context(datagram_socket(lab, "shop/web", "::", 7001, "eth0"))
        client.sendto(b"denied", ("fe80::1", 7000))
        assert received(server) == []
        server.sendto(b"from the node", (pod, 7001))
        assert received(client, 1) == [b"from the node"]
        scene.enforce(DENY_ALL, EGRESS.format(net="fe80::/10", port=7000))

        def answered() -> bool:
            client.sendto(b"allowed", ("fe80::1", 7000))
            return b"allowed" in received(server)

        wait_for(answered, "policy allows it")
        server.sendto(b"answer", (pod, 7001))
        assert b"answer" in received(client, 1)
    assert counted(scene, "spoofed") == spoofed


# --- DHCP ---------------------------------------------------------------------------------------------------------------


def discover(lab: Lab, host: str) -> None:
    """Send the DHCP message of a client without an address."""
    with wire_socket(lab, host) as wire:
        packet = frames.udp(ANY, ALL, DHCP, b"discover")
        wire.send(frames.frame_of(packet, frames.mac("02:00:00:00:00:01"), frames.BROADCAST_MAC))


def offered(server: socket.socket, client: socket.socket) -> list[bytes]:
    """The packets of a server's broadcast that reached the client."""
    server.sendto(b"offer", (str(ALL), DHCP[0]))
    return received(client, 1)


def test_dhcp_of_the_node_under_default_deny(scene: Scene) -> None:
    """A DHCP exchange with source 0.0.0.0 and broadcasts works on an interface of the node that denies everything."""
    lab = scene.lab
    scene.enforce(DENY_ALL, HOST_DENY)
    wait_for(lambda: scene.reached(Attempt(NODE, ip_address("192.0.2.1"), TCP, 9)) == [False], "the node is closed")
    with ExitStack() as stack:
        server = stack.enter_context(datagram_socket(lab, INTERNET, "", DHCP[1], "node0"))
        client = stack.enter_context(datagram_socket(lab, NODE, "", DHCP[0], "eth0"))

        def exchanged() -> bool:
            discover(lab, NODE)
            return received(server, 1) == [b"discover"] and offered(server, client) == [b"offer"]

        wait_for(exchanged, "the exchange takes place")


def test_dhcp_of_a_workload_under_default_deny(scene: Scene) -> None:
    """A workload without an address gets one from its node. As a DHCP server it reaches nobody."""
    lab, ours = scene.lab, interface_of("web")
    scene.enforce(DENY_ALL)
    wait_for(lambda: scene.reached(Attempt("shop/web", address_of("db", 4), TCP, 5432)) == [False], "the pod is closed")
    with ExitStack() as stack:
        server = stack.enter_context(datagram_socket(lab, NODE, "", DHCP[1], ours))
        client = stack.enter_context(datagram_socket(lab, "shop/web", "", DHCP[0], "eth0"))
        other = stack.enter_context(datagram_socket(lab, NODE, "", DHCP[0], ours))

        def exchanged() -> bool:
            discover(lab, "shop/web")
            return received(server, 1) == [b"discover"] and offered(server, client) == [b"offer"]

        wait_for(exchanged, "the exchange takes place")
        before = counted(scene, "link-forged")
        with wire_socket(lab, "shop/web") as wire:
            packet = frames.udp(ANY, ALL, (DHCP[1], DHCP[0]), b"offer")
            wire.send(frames.frame_of(packet, frames.mac("02:00:00:00:00:01"), frames.BROADCAST_MAC))
        assert received(other) == []
        assert counted(scene, "link-forged") == before + 1


# --- sources ------------------------------------------------------------------------------------------------------------


def send_as(lab: Lab, name: str, *sources: tuple[IPAddress, bytes]) -> None:
    """Send datagrams with chosen sources from a pod to the database."""
    with wire_socket(lab, f"shop/{name}") as wire:
        for source, payload in sources:
            packet = frames.udp(source, address_of("db", source.version), (4000, 5353), payload)
            wire.send(frames.frame_of(packet, frames.mac("02:00:00:00:00:01"), frames.mac(PARENT_MAC)))


@pytest.mark.parametrize("version", [4, 6])
def test_spoofed_sources_are_dropped_and_counted(scene: Scene, version: int) -> None:
    """With the address of an allowed pod, of the node, or an unknown one, a pod reaches nothing.

    Each packet is counted.
    """
    lab = scene.lab
    scene.enforce(FROM_OTHER)
    other, nobody = address_of("other", version), ip_address("203.0.113.9" if version == 4 else "2001:db8:9::9")
    with datagram_socket(lab, "shop/db", "" if version == 4 else "::", 5353) as server:
        before = counted(scene, "spoofed")
        sources = [other, nobody, GATEWAY[4] if version == 4 else ip_address("fd00:30::10")]
        send_as(lab, "web", *((source, b"spoofed") for source in sources))
        send_as(lab, "other", (other, b"honest"))
        assert received(server, 1) == [b"honest"]
        assert counted(scene, "spoofed") == before + len(sources)


@pytest.mark.parametrize("version", [4, 6])
def test_lent_sources_pass_and_no_others(scene: Scene, version: int) -> None:
    """A pod may send from the prefixes of its annotation, subject to policy; not from a neighbouring address.

    Other pods may not.
    """
    lab = scene.lab
    scene.enforce(cluster=LENDING)
    with datagram_socket(lab, "shop/db", "" if version == 4 else "::", 5353) as server:
        before = counted(scene, "spoofed")
        send_as(lab, "other", (LENT[version], b"not lent to it"))
        send_as(lab, "web", (FOREIGN[version], b"next to it"), (LENT[version], b"lent"))
        assert received(server, 1) == [b"lent"]
        assert counted(scene, "spoofed") == before + 2

        scene.enforce(FROM_OTHER, cluster=LENDING)
        wait_for(lambda: scene.reached(to_db("shop/web")) == [False], "the policy is in force")
        send_as(lab, "web", (LENT[version], b"denied"))
        assert received(server) == []
        assert counted(scene, "spoofed") == before + 2


def test_prefixes_count_only_where_the_agent_honours_them(lasting_scene: Scene, lab: Lab, tmp_path: Path) -> None:
    """Without `--allow-source-prefixes` the annotation has no effect: writers of pods do not decide about sources."""
    lasting_scene.retire()
    with scene_in(lab, tmp_path / "home", {"cluster.yaml": LENDING}) as scene:
        scene.start()
        scene.await_status(
            lambda state: state["in_force"] and state["objects"]["enforced_endpoints"] == len(POD), "it is in force"
        )
        with datagram_socket(lab, "shop/db", "", 5353) as server:
            send_as(lab, "web", (LENT[4], b"lent"), (address_of("web"), b"own"))
            assert received(server, 1) == [b"own"]
        assert counted(scene, "spoofed") == 1
