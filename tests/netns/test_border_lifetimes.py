# SPDX-License-Identifier: Apache-2.0
"""The end of connections: nobody outside can cut one, and one that was silent for long continues."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, Scene, wait_for
from border_scene import (
    FAR,
    NODE_ADDRESS,
    PATIENCE_S,
    address_of,
    border,
    ear,
    framed,
    network,
    put,
    say,
    station,
    token,
)
from scapy.layers.inet import TCP
from scapy.packet import Packet

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_loader import abi
from netpol_loader.pins.dataplane import default_config

pytestmark = pytest.mark.netns

IDLE_S = 2
"""Time-out in seconds of connections that seem ended, or of silent open ones."""
KEEPALIVE_S = 7200 + 9 * 75
"""Seconds after which Linux gives an idle connection up: tcp_keepalive_time plus tcp_keepalive_probes *
tcp_keepalive_intvl."""
OUT_ONLY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out-only, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  egress: [{ports: [{port: 5500}]}]
"""
CLOSED = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress]}
"""


@pytest.fixture(scope="module")
def hasty_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scene in which connections that seem ended soon expire."""
    options = ("--timeout", f"tcp-reset={IDLE_S}", "--timeout", f"tcp-closing={IDLE_S}")
    with border(tmp_path_factory.mktemp("hasty"), options=options) as one:
        yield one


@pytest.fixture(scope="module")
def forgetful_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scene in which silent connections soon expire."""
    with border(tmp_path_factory.mktemp("forgetful"), options=("--timeout", f"tcp-open={IDLE_S}")) as one:
        yield one


class Stream:
    """Both ends of a TCP connection that a client opened."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        for one in (client, server):
            one.settimeout(PATIENCE_S)

    @property
    def ports(self) -> tuple[int, int]:
        """(the client's port, the server's port)."""
        return self.client.getsockname()[1], self.server.getsockname()[1]

    def close(self) -> None:
        self.client.close()
        self.server.close()


def pushed(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether bytes arrive, possibly after a retransmission."""
    one = token()
    sender.sendall(one)
    found = b""
    receiver.settimeout(3.0)
    try:
        while not found.endswith(one):
            found += receiver.recv(4096)
    except TimeoutError:
        return False
    return True


def connect(lab: Lab, client: str, server: str, address: str, port: int) -> Stream:
    family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
    listener = lab.prober.open_socket(server, family, socket.SOCK_STREAM)
    outgoing = lab.prober.open_socket(client, family, socket.SOCK_STREAM)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        for one in (listener, outgoing):
            one.settimeout(PATIENCE_S)
        outgoing.connect((address, port))
        return Stream(outgoing, listener.accept()[0])


def wait_out(seconds: float) -> None:
    """Wait until a time-out of the program is over. A poll would need packets, which would prevent the time-out."""
    ends = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > ends, "time passes")


def segment(source: str, destination: str, ports: tuple[int, int], flags: str) -> Packet:
    """A segment with sequence numbers outside every receiver's window."""
    return network(source, destination) / TCP(
        sport=ports[0], dport=ports[1], flags=flags, seq=0xDEAD, ack=0xBEEF, window=0
    )


@pytest.mark.parametrize("end", ["reset", "ends of both"])
@pytest.mark.parametrize("version", [4, 6])
def test_forged_end_cuts_no_connection(hasty_scene: Scene, version: int, end: str) -> None:
    """After a forged reset, or forged FINs of both sides, the next data arrive, and those after them."""
    put(hasty_scene, OUT_ONLY)
    lab, web = hasty_scene.lab, station(hasty_scene.lab, "web")
    stream = connect(lab, "shop/web", "shop/far", FAR[version], 5500)
    try:
        assert pushed(stream.server, stream.client)
        (ours,) = json.loads(lab.run(INTERNET, ["ip", "-j", "link", "show", "dev", "node0"]).stdout)
        (theirs,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)
        there = stream.ports[::-1]
        kinds = ["R"] if end == "reset" else ["FA"]
        with ear(lab, web.host) as hearing:
            for flags in kinds:
                forged = segment(FAR[version], web.address[version], there, flags)
                say(lab, INTERNET, framed(forged, ours["address"], theirs["address"]))
            assert hearing.hears(bytes(forged[TCP])[:8]), "the forged end did not arrive"
        if end == "ends of both":
            say(
                lab, web.host, framed(segment(web.address[version], FAR[version], stream.ports, "FA"), web.mac, web.hop)
            )
        wait_out(IDLE_S + 1.5)
        assert pushed(stream.server, stream.client)
        wait_out(IDLE_S + 1.5)
        assert pushed(stream.server, stream.client)
        assert pushed(stream.client, stream.server)
    finally:
        stream.close()


@pytest.mark.parametrize("version", [4, 6])
def test_idle_connection_of_the_node_revives(forgetful_scene: Scene, version: int) -> None:
    """A connection of the node to a closed pod that was silent until it expired continues in both directions."""
    put(forgetful_scene, CLOSED)
    to = address_of("db", version)
    stream = connect(forgetful_scene.lab, NODE, "shop/db", to, 5501)
    try:
        assert pushed(stream.client, stream.server)
        wait_out(IDLE_S + 1.5)
        assert pushed(stream.client, stream.server)
        assert pushed(stream.server, stream.client)
    finally:
        stream.close()


def test_tail_of_a_closed_pods_connection_does_not_revive(forgetful_scene: Scene) -> None:
    """A packet of a pod, and the node's answer to it, do not become a connection that the node opened."""
    put(forgetful_scene, CLOSED)
    lab, db = forgetful_scene.lab, station(forgetful_scene.lab, "db")
    one, control = token(), token()
    with ear(lab, NODE, "lo") as nothing, ear(lab, db.host) as hearing:
        packet = segment(db.address[4], NODE_ADDRESS[4], (4000, 5502), "PA") / one
        say(lab, db.host, framed(packet, db.mac, db.hop))
        assert not hearing.hears(b"\x15\x7e\x0f\xa0", 0.5)  # a reset of the node, from port 5502 to 4000
        assert nothing.frames == []
    assert control


def test_time_outs_outlast_keep_alive() -> None:
    """An open connection is kept for longer than Linux probes whether the other side still exists."""
    config = default_config(1000)
    assert config.timeout_jiffies[abi.NP_CONN_TCP_OPEN] / 1000 > KEEPALIVE_S
