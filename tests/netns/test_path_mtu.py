# SPDX-License-Identifier: Apache-2.0
"""A narrow link in the path of pods that are closed except for one peer: sizes are learned, and data arrives.

No policy allows ICMP. Routers report "too big" by errors about the pods' own packets, which belong to their
connections. Too big datagrams then go in fragments.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import PODS, Scene, lab_for, scene_in, to_db, wait_for

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET

pytestmark = pytest.mark.netns

NARROW = 1300
"""The MTU of the narrow link in bytes: more than IPv6's minimum, less than that of all other links."""
PORT = 5555
PATIENCE_S = 10.0
TRY_S = 0.5
AMOUNT = 200_000
DATAGRAM = bytes(range(256)) * 5 + bytes(120)
"""1400 bytes, which fit all links except the narrow one."""
ADDRESS = {
    "shop/web": {4: ip_address("10.1.0.1"), 6: ip_address("fd00:1::1")},
    "shop/far": {4: ip_address("10.1.0.4"), 6: ip_address("fd00:1::4")},
}
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
  ingress: [{from: [{podSelector: {matchLabels: {app: far}}}], ports: [{port: 5555}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: far}}}], ports: [{port: 5555}, {port: 5555, protocol: UDP}]}]
  policyTypes: [Ingress, Egress]
"""


@pytest.fixture(scope="module")
def lasting_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with lab_for(PODS) as lab:
        for host, device in ((INTERNET, lab.plan.hosts["node-2"].parent_interface), ("node-2", "eth0")):
            lab.run(host, ["ip", "link", "set", device, "mtu", str(NARROW)])
        manifests = {"cluster.yaml": PODS, "db.yaml": POLICY}
        with scene_in(lab, tmp_path_factory.mktemp("mtu") / "home", manifests) as one:
            one.start()
            one.await_reached(to_db("shop/web"), expected=False)
            yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """Pods that do not know the path's MTU yet."""
    for host in ADDRESS:
        for family in ("-4", "-6"):
            lasting_scene.lab.run(host, ["ip", family, "route", "flush", "cache"])
    return lasting_scene


def opened(lab: Lab, host: str, version: int, kind: socket.SocketKind) -> socket.socket:
    """A socket of a pod."""
    sock = lab.prober.open_socket(host, socket.AF_INET if version == 4 else socket.AF_INET6, kind)
    sock.settimeout(PATIENCE_S)
    return sock


def learned(lab: Lab, host: str, peer: str, version: int) -> int | None:
    """The path MTU that a pod has learned for a peer."""
    command = ["ip", "-j", f"-{version}", "route", "get", str(ADDRESS[peer][version])]
    (route,) = json.loads(lab.run(host, command).stdout)
    for one in route.get("metrics", ()):
        if "mtu" in one:
            return int(one["mtu"])
    return None


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("client", "server"), [("shop/web", "shop/far"), ("shop/far", "shop/web")])
def test_bulk_data_passes_a_narrow_link(scene: Scene, client: str, server: str, version: int) -> None:
    """The pod under default deny, as client or server, learns that its segments are too big, and sends smaller ones."""
    lab = scene.lab
    before = scene.state()["packets"].get("related", 0)
    with ExitStack() as stack:
        listener = stack.enter_context(opened(lab, server, version, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(ADDRESS[server][version]), PORT))
        listener.listen()
        outgoing = stack.enter_context(opened(lab, client, version, socket.SOCK_STREAM))
        outgoing.connect((str(ADDRESS[server][version]), PORT))
        incoming = stack.enter_context(listener.accept()[0])
        incoming.settimeout(PATIENCE_S)
        sender, receiver = (outgoing, incoming) if client == "shop/web" else (incoming, outgoing)
        thread = threading.Thread(target=sender.sendall, args=(bytes(AMOUNT),))
        assert learned(lab, "shop/web", "shop/far", version) is None
        thread.start()
        arrived = 0
        while arrived < AMOUNT:
            arrived += len(receiver.recv(AMOUNT))
        thread.join()
    assert learned(lab, "shop/web", "shop/far", version) == NARROW
    assert scene.state()["packets"]["related"] > before


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_pass_a_narrow_link_in_fragments(scene: Scene, version: int) -> None:
    """The first datagram is lost and answered by an error. The next ones, and their answers, arrive in fragments."""
    lab = scene.lab
    before = scene.state()["packets"]
    with (
        opened(lab, "shop/web", version, socket.SOCK_DGRAM) as ours,
        opened(lab, "shop/far", version, socket.SOCK_DGRAM) as theirs,
    ):
        theirs.bind((str(ADDRESS["shop/far"][version]), PORT))
        ours.connect((str(ADDRESS["shop/far"][version]), PORT))
        for one in (ours, theirs):
            one.settimeout(TRY_S)

        def exchange() -> bool:
            try:
                ours.send(DATAGRAM)
                asked, sender = theirs.recvfrom(2000)
                theirs.sendto(asked, sender)
                return ours.recv(2000) == asked == DATAGRAM
            except OSError:  # nothing came; or "message too long", from the ICMP error
                return False

        wait_for(exchange, "a datagram of 1400 bytes comes back")
    assert learned(lab, "shop/web", "shop/far", version) == NARROW
    after = scene.state()["packets"]
    assert after["related"] > before.get("related", 0)
    assert after.get("fragment", 0) == before.get("fragment", 0)
