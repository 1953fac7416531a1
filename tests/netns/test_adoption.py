# SPDX-License-Identifier: Apache-2.0
"""Connections that are older than the first agent of a node: allowed ones continue, others are cut.

All pods are closed in both directions except for what one direction allows. So an answer that is mistaken for a request
is dropped.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import CLUSTER, NODE, Scene, scene_in

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import IPAddress

pytestmark = pytest.mark.netns

PORT = 7000
ARRIVAL_S = 20.0
"""Time limit in seconds for what takes microseconds, or one or two retransmissions on a busy machine."""
SILENCE_S = 0.5
"""Seconds of silence after which a connection counts as cut. An answer takes microseconds."""
LAST = {"shop/web": 1, "shop/db": 2, "shop/other": 3, "shop/far": 4}

POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: db}}}, {podSelector: {matchLabels: {app: far}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: other, namespace: shop}
spec:
  podSelector: {matchLabels: {app: other}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}, {podSelector: {matchLabels: {app: far}}}]}]
"""
TRACK = "add table inet track; add chain inet track pass { type filter hook forward priority 0; }; add rule inet track pass ct state new"
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIPs: [10.96.0.2], ports: [{port: 80, targetPort: 7000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-4, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.2]}]
ports: [{port: 7000}]
"""
OTHER_SERVICE = (
    SERVICE.replace("name: db", "name: other").replace("10.96.0.2", "10.96.0.3").replace("10.1.0.2", "10.1.0.3")
)
TRANSLATE = (
    "add table ip track; add chain ip track pre { type nat hook prerouting priority -100; }; "
    "add rule ip track pre ip daddr 10.96.0.2 tcp dport 80 dnat to 10.1.0.2:7000; "
    "add rule ip track pre ip daddr 10.96.0.3 tcp dport 80 dnat to 10.1.0.3:7000"
)


def address_of(host: str, version: int = 4) -> IPAddress:
    """The address of a pod."""
    return ip_address(f"10.1.0.{LAST[host]}" if version == 4 else f"fd00:1::{LAST[host]}")


@dataclass(frozen=True)
class Pair:
    """Both ends of an open connection."""

    client: socket.socket
    server: socket.socket

    def speaks(self, *, server_first: bool, is_cut: bool = False) -> bool:
        """Whether bytes from one end arrive at the other, and an answer comes back.

        ``is_cut``: expect nothing, so wait briefly.
        """
        first, second = (self.server, self.client) if server_first else (self.client, self.server)
        for sender, receiver in ((first, second), (second, first)):
            token = secrets.token_bytes(16)
            receiver.settimeout(SILENCE_S if is_cut else ARRIVAL_S)
            sender.sendall(token)
            try:
                received = receiver.recv(4096)
            except TimeoutError:
                return False
            if not received.endswith(token):
                return False
        return True


class Opener:
    """Opens connections between hosts of a laboratory."""

    def __init__(self, lab: Lab, stack: contextlib.ExitStack) -> None:
        self._lab = lab
        self._stack = stack
        self._listeners: dict[tuple[str, int], socket.socket] = {}

    def _socket(self, host: str, version: int, kind: int) -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        one = self._stack.enter_context(self._lab.prober.open_socket(host, family, kind))
        one.settimeout(ARRIVAL_S)
        return one

    def tcp(
        self,
        source: str,
        destination: str,
        version: int = 4,
        *,
        by: tuple[str, int] | None = None,
        forgets: bool = False,
    ) -> Pair:
        """Open a connection.

        ``by``: the address and port to which the client connects. ``forgets``: the server no longer listens afterwards.
        """
        at = (str(address_of(destination, version)), PORT)
        listener = self._listeners.get((destination, version))
        if listener is None:
            listener = self._socket(destination, version, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(at)
            listener.listen()
            self._listeners[destination, version] = listener
        client = self._socket(source, version, socket.SOCK_STREAM)
        client.connect(by or at)
        server = self._stack.enter_context(listener.accept()[0])
        if forgets:
            self._listeners.pop((destination, version)).close()
        pair = Pair(client, server)
        assert pair.speaks(server_first=True)
        return pair

    def udp(self, source: str, destination: str) -> Pair:
        """A flow with packets in both directions."""
        server = self._socket(destination, 4, socket.SOCK_DGRAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((str(address_of(destination)), PORT))
        client = self._socket(source, 4, socket.SOCK_DGRAM)
        client.connect((str(address_of(destination)), PORT))
        client.sendall(b"first")
        _, peer = server.recvfrom(4096)
        server.connect(peer)
        pair = Pair(client, server)
        assert pair.speaks(server_first=True)
        return pair


@pytest.fixture
def scene(lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    """A node that never had an agent, and tracks no connections."""
    with scene_in(lab, tmp_path / "home", {"cluster.yaml": CLUSTER, "db.yaml": POLICY}) as one:
        yield one
    lab.run(NODE, ["nft", "flush", "ruleset"])


@pytest.fixture
def opener(lab: Lab) -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:
        yield Opener(lab, stack)


@pytest.mark.parametrize("is_tracked", [True, False], ids=["tracked", "sockets"])
def test_old_connections_are_judged_in_the_direction_they_were_opened_in(
    scene: Scene, opener: Opener, *, is_tracked: bool
) -> None:
    """Pod to pod, from and to outside, from the node: both families, whichever end speaks first.

    Denied connections are cut.
    """
    if is_tracked:
        scene.lab.run(NODE, ["nft", TRACK])
    # The socket of a server that no longer listens looks like a client's, so only tracking shows the direction.
    pairs = {
        (source, destination, version, server_first): opener.tcp(source, destination, version, forgets=is_tracked)
        for source, destination in (
            ("shop/web", "shop/db"), ("shop/web", "shop/far"), ("shop/far", "shop/db"), (NODE, "shop/db"),
            ("shop/other", "shop/db"), ("shop/db", "shop/other"), ("shop/far", "shop/other"),
        )
        for version in ((4,) if {source, destination} & {NODE, "shop/far"} else (4, 6))
        for server_first in (True, False)
    }  # fmt: skip
    assert scene.start()["problems"] == []
    allowed = {("shop/web", "shop/db"), ("shop/web", "shop/far"), ("shop/far", "shop/db"), (NODE, "shop/db")}
    lives = {
        place for place, pair in pairs.items() if pair.speaks(server_first=place[3], is_cut=place[:2] not in allowed)
    }
    assert lives == {place for place in pairs if place[:2] in allowed}
    assert all(pairs[place].speaks(server_first=not place[3]) for place in lives)


def test_old_datagrams_are_judged_in_the_direction_of_the_first(scene: Scene, opener: Opener) -> None:
    """The answer of a tracked UDP flow passes only if policy allows the request."""
    scene.lab.run(NODE, ["nft", TRACK])
    pairs = {source: opener.udp(source, "shop/db") for source in ("shop/web", "shop/other", "shop/far")}
    scene.start()
    assert {source: pair.speaks(server_first=True, is_cut=source == "shop/other") for source, pair in pairs.items()} == {
        "shop/web": True, "shop/other": False, "shop/far": True,
    }  # fmt: skip


def test_old_connections_to_services_are_judged_by_their_backends(scene: Scene, opener: Opener) -> None:
    """A translated connection continues if policy allows the pod behind the service, and is cut otherwise."""
    scene.lab.run(NODE, ["nft", TRANSLATE])
    scene.write("services.yaml", SERVICE + "---\n" + OTHER_SERVICE)
    pairs = {
        (name, server_first): opener.tcp("shop/web", f"shop/{name}", by=(f"10.96.0.{LAST[f'shop/{name}']}", 80))
        for name in ("db", "other")
        for server_first in (True, False)
    }
    scene.start()
    assert {place: pair.speaks(server_first=place[1], is_cut=place[0] == "other") for place, pair in pairs.items()} == {
        ("db", True): True, ("db", False): True, ("other", True): False, ("other", False): False,
    }  # fmt: skip
    assert all(pairs["db", first].speaks(server_first=not first) for first in (True, False))


def test_old_connections_wait_for_their_pods_manifest(scene: Scene, opener: Opener) -> None:
    """If the manifests name a pod only after the start, its connections are adopted then."""
    kept, cut, waiting = (opener.tcp(source, "shop/db") for source in ("shop/web", "shop/other", "shop/far"))
    scene.write("cluster.yaml", "---\n".join(one for one in CLUSTER.split("---\n") if "name: db," not in one))
    scene.start()
    assert not waiting.speaks(server_first=True, is_cut=True)
    scene.write("cluster.yaml", CLUSTER)
    scene.await_status(
        lambda state: "Pod/shop/db" in {one["endpoint"] for one in state["interfaces"]}, "the pod has its interface"
    )
    assert kept.speaks(server_first=True)
    assert not cut.speaks(server_first=True, is_cut=True)
