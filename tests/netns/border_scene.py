# SPDX-License-Identifier: Apache-2.0
"""Pods whose root sends any frame, and the frames that arrive: the scene of the tests `test_border_*`.

Each attack carries a token. A packet socket after the last program shows whether the token arrived, never a counter. A
control that policy allows follows the attacks on the same path, so "nothing arrived" cannot mean "not yet".
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from agent_scene import NODE, OPEN_PORT, PODS, Scene, lab_for, scene_in, wait_for
from scapy.compat import raw
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import PARENT_MAC, Host

T = TypeVar("T")

QUIET_S, PATIENCE_S = 0.3, 10.0
ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/if_packet.h
PACKET_OUTGOING = 4
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17  # linux/sockios.h, linux/ethtool.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
BRIDGE, BRIDGE_MAC = "br0", "02:00:00:00:00:fe"
BRIDGE_ADDRESS = {4: "10.1.0.254", 6: "fd00:1::fe"}
NODE_ADDRESS = {4: "172.30.0.10", 6: "fd00:30::10"}
FAR_NODE_ADDRESS = {4: "172.30.0.20", 6: "fd00:30::20"}
WORLD = {4: "192.0.2.1", 6: "2001:db8::1"}
GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
FAR = {4: "10.1.0.4", 6: "fd00:1::4"}
UPSTREAM = {INTERNET: "node0"}
"""The interface towards the node, of hosts with several interfaces."""
LAST = {"web": 1, "db": 2, "other": 3}

NARROW = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: narrow, namespace: shop}}
spec:
  podSelector: {{}}
  policyTypes: [Ingress, Egress]
  ingress: [{{ports: [{{protocol: UDP, port: {OPEN_PORT}}}]}}]
  egress: [{{ports: [{{protocol: UDP, port: {OPEN_PORT}}}]}}]
"""
"""A policy by which every pod may send and receive UDP datagrams to one port, and nothing else."""


@dataclass(frozen=True)
class Station:
    """A pod as others on its link know it. ``hop``: the hardware address of its gateway."""

    host: str
    mac: str
    address: Mapping[int, str]
    link_local: str
    hop: str


def address_of(name: str, version: int = 4) -> str:
    """The address of a pod."""
    return f"10.1.0.{LAST[name]}" if version == 4 else f"fd00:1::{LAST[name]}"


def port_of(name: str) -> str:
    """The name of the node's end of a pod's link."""
    return Host(f"shop/{name}", NODE, ()).parent_interface


def token() -> bytes:
    """Random bytes that no other sender has."""
    return secrets.token_hex(8).encode()


def ip(lab: Lab, host: str, *lines: str) -> None:
    """Run `ip` in a host, once with each of these lines."""
    for line in lines:
        lab.run(host, ["ip", *line.split()])


def network(source: str, destination: str, **fields: Any) -> Packet:
    """An IP header of the addresses' family. ``hops``: its TTL or hop limit."""
    hops = fields.pop("hops", 64)
    if ip_address(destination).version == 4:
        return IP(src=source, dst=destination, ttl=hops, **fields)
    return IPv6(src=source, dst=destination, hlim=hops, **fields)


def datagram(source: str, destination: str, port: int, payload: bytes, sport: int = 4000) -> Packet:
    """An IP packet with a UDP datagram."""
    return network(source, destination) / UDP(sport=sport, dport=port) / payload


def framed(packet: Packet, source: str, destination: str) -> Packet:
    """A packet in an Ethernet frame. ``source``, ``destination``: hardware addresses."""
    return Ether(src=source, dst=destination) / packet


class Ear:
    """The frames that arrive at an interface, after all programs at the other end of its link."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.frames: list[bytes] = []

    def _listen(self, seconds: float, wanted: bytes | None) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._sock], [], [], left)[0]:
                return False
            frame, sender = self._sock.recvfrom(65536)
            if sender[2] == PACKET_OUTGOING:
                continue
            self.frames.append(frame)
            if wanted is not None and wanted in frame:
                return True
        return False

    def hears(self, wanted: bytes, seconds: float = PATIENCE_S) -> bool:
        """Whether a frame with these bytes has arrived, or arrives in time."""
        return any(wanted in frame for frame in self.frames) or self._listen(seconds, wanted)

    def heard(self, tokens: Iterable[bytes], control: bytes) -> set[bytes]:
        """The tokens that have arrived shortly after the control did."""
        assert self.hears(control), "the control did not arrive"
        self._listen(QUIET_S, None)
        return {one for one in tokens if any(one in frame for frame in self.frames)}


@contextlib.contextmanager
def ear(lab: Lab, host: str, device: str | None = None) -> Iterator[Ear]:
    """Listen at an interface. Without a name: at the only one; at the world's interface towards the node."""
    with lab.prober.open_socket(host, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((device or UPSTREAM.get(host, "eth0"), ETH_P_ALL))
        yield Ear(sock)


def say(lab: Lab, host: str, *frames: Packet | bytes, device: str | None = None) -> None:
    """Send frames on a link (see `ear`), as root in a pod can."""
    with lab.prober.open_socket(host, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((device or UPSTREAM.get(host, "eth0"), 0))
        for one in frames:
            sock.send(raw(one))


def say_unfinished(lab: Lab, host: str, frame: bytes, start: int, offset: int, device: str = "eth0") -> None:
    """Send a frame with an unfinished checksum.

    It covers all bytes from ``start`` on, and is written at ``start + offset``.
    """
    with lab.prober.open_socket(host, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.bind((device, 0))
        sock.send(struct.pack("=BBHHHH", 1, 0, 0, 0, start, offset) + frame)  # 1: VIRTIO_NET_HDR_F_NEEDS_CSUM


def finish_checksums_at(lab: Lab, host: str, device: str) -> None:
    """Switch off checksum offload of a device, so that an unfinished checksum is written when a frame leaves by it."""
    with lab.prober.open_socket(host, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, 0))
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", device.encode(), ctypes.addressof(value)) + bytes(16))


@contextlib.contextmanager
def udp_socket(lab: Lab, host: str, version: int, port: int = 0, address: str = "") -> Iterator[socket.socket]:
    """A UDP socket in a host, for all its addresses unless one is given."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.prober.open_socket(host, family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind((address, port))
        yield sock


def gets(sock: socket.socket, wanted: bytes, seconds: float = PATIENCE_S) -> bool:
    """Whether a datagram with these bytes arrives at a socket."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if wanted in sock.recv(65536):
                return True
        except TimeoutError:
            return False
    return False


def inside(lab: Lab, host: str, work: Callable[[], T]) -> T:
    """Call a function in a host's network namespace."""

    def body() -> T:
        fd = os.open(NETNS_DIR / lab.namespace_of[host], os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)
        return work()

    with ThreadPoolExecutor(1) as thread:  # on a thread of its own, so that this thread stays in its namespace
        return thread.submit(body).result()


@contextlib.contextmanager
def tun(lab: Lab, name: str, *, hardware: int | None = None) -> Iterator[int]:
    """A tun device of the node.

    Yields the descriptor of its far end. ``hardware``: an ARPHRD_* other than that of a tun device.
    """
    set_link = 0x400454CD  # TUNSETLINK

    def make() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        if hardware is not None:
            fcntl.ioctl(fd, set_link, hardware)
        return fd

    fd = inside(lab, NODE, make)
    try:
        yield fd
    finally:
        os.close(fd)


def reads(fd: int, wanted: bytes, seconds: float = PATIENCE_S) -> bool:
    """Whether a packet with these bytes comes out of a tun device."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            return False
        if wanted in os.read(fd, 65536):
            return True
    return False


def has_device(lab: Lab, kind: str, *options: str, below: str = "") -> bool:
    """Whether the kernel has devices of this kind. ``below``: a device on which such a device must be made."""
    link = ["link", below] if below else []
    if lab.run(NODE, ["ip", "link", "add", *link, "name", "probe0", "type", kind, *options], check=False).returncode:
        return False
    ip(lab, NODE, "link del probe0")
    return True


def track_connections(lab: Lab, home: Path, *, host: str = NODE) -> None:
    """Switch on the kernel's connection tracking for all packets. It reassembles fragments."""
    file = home / "track.nft"
    file.write_text(
        "table inet track { chain seen { type filter hook prerouting priority 0; ct state new accept; }; }\n"
    )
    lab.run(host, ["nft", "-f", str(file)])


def build_bridge(lab: Lab) -> None:
    """Put the node's pods on one bridge with the pods' gateway, instead of a routed link for each."""
    prober = lab.prober
    ip(
        lab, NODE, f"link add {BRIDGE} address {BRIDGE_MAC} type bridge mcast_snooping 1",
        f"address add {BRIDGE_ADDRESS[4]}/24 broadcast 10.1.0.255 dev {BRIDGE}",
        f"address add {BRIDGE_ADDRESS[6]}/64 dev {BRIDGE} nodad",
    )  # fmt: skip
    prober.write_settings(NODE, [(f"bridge/bridge-nf-call-{table}", "0") for table in ("iptables", "ip6tables")])
    for name, last in LAST.items():
        port = port_of(name)
        ip(
            lab, NODE, f"-4 route del {address_of(name)}", f"-6 route del {address_of(name, 6)}/128",
            f"address flush dev {port}", f"link set {port} address 02:00:00:00:01:{last:02x} master {BRIDGE}",
        )  # fmt: skip
        ip(
            lab, f"shop/{name}", "address flush dev eth0 scope global",
            f"address add {address_of(name)}/24 broadcast 10.1.0.255 dev eth0",
            f"address add {address_of(name, 6)}/64 dev eth0 nodad",
            f"-4 route replace default via {BRIDGE_ADDRESS[4]}", f"-6 route replace default via {BRIDGE_ADDRESS[6]} dev eth0",
        )  # fmt: skip
    ip(lab, NODE, f"link set {BRIDGE} up")
    wait_for(lambda: _is_forwarding(lab), "the bridge forwards")


def _is_forwarding(lab: Lab) -> bool:
    ports = json.loads(lab.run(NODE, ["bridge", "-j", "link", "show"]).stdout)
    return len(ports) == len(LAST) and all(one["state"] == "forwarding" for one in ports)


def station(lab: Lab, name: str, *, is_bridged: bool = False) -> Station:
    """The addresses of a pod's link."""
    host = f"shop/{name}"
    (link,) = json.loads(lab.run(host, ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)

    def own() -> str | None:
        (found,) = json.loads(lab.run(host, ["ip", "-6", "-j", "address", "show", "dev", "eth0"]).stdout)
        ready = [one["local"] for one in found["addr_info"] if not one.get("tentative")]
        return next((address for address in ready if address.startswith("fe80")), None)

    addresses = {version: address_of(name, version) for version in (4, 6)}
    hop = BRIDGE_MAC if is_bridged else PARENT_MAC
    return Station(host, link["address"], addresses, wait_for(own, f"{host} has a link-local address"), hop)


def soon(condition: Callable[[], object], what: str) -> None:
    """Poll a condition that packets soon make true. Without the guard under test, it never becomes true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def counted(scene: Scene, reason: str) -> int:
    """The number of packets counted under a reason."""
    return int(scene.state()["packets"].get(reason, 0))


def put(scene: Scene, *policies: str, cluster: str = PODS) -> None:
    """Put exactly these policies and this cluster in force for the node's pods."""
    scene.enforce(*policies, cluster=cluster, endpoints=[f"Pod/shop/{name}" for name in LAST])


@contextlib.contextmanager
def border(
    home: Path, *, is_bridged: bool = False, options: tuple[str, ...] = (), prepare: Callable[[Lab], None] | None = None
) -> Iterator[Scene]:
    """A laboratory, and an agent with `NARROW` in force.

    ``prepare``: changes the laboratory before the agent starts.
    """
    with lab_for(PODS) as lab:
        if is_bridged:
            build_bridge(lab)
        if prepare is not None:
            prepare(lab)
        with scene_in(lab, home / "home", {"cluster.yaml": PODS}, options=options) as scene:
            scene.start()
            put(scene, NARROW)
            yield scene
