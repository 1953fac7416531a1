# SPDX-License-Identifier: Apache-2.0
"""Headers that change later: a packet arrives as judged, even if a device or a later fragment writes into it."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, Scene
from border_scene import (
    NARROW,
    OPEN_PORT,
    PATIENCE_S,
    Station,
    address_of,
    border,
    datagram,
    ear,
    finish_checksums_at,
    framed,
    ip,
    network,
    port_of,
    put,
    say,
    say_unfinished,
    station,
    token,
    udp_socket,
)
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6, IPv6ExtHdrFragment
from scapy.packet import Raw

from netpol_ebpf.lab.laboratory import Lab

pytestmark = pytest.mark.netns

ETHERNET = 14
NETWORK = {4: 20, 6: 40}
UNFINISHED_PORT = 4242
AMOUNT = 4_000_000
OPTIONS = b"\x01" * 40
"""The largest options of a TCP header, all no-ops."""
TCP_TOO = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: tcp-too, namespace: shop}}
spec:
  podSelector: {{}}
  policyTypes: [Ingress, Egress]
  ingress: [{{ports: [{{port: 5432}}, {{protocol: UDP, port: {OPEN_PORT}}}, {{protocol: UDP, port: 4789}}]}}]
  egress: [{{ports: [{{port: 5432}}, {{protocol: UDP, port: {OPEN_PORT}}}, {{protocol: UDP, port: 4789}}]}}]
"""


def prepare(lab: Lab) -> None:
    """Write a checksum that a pod leaves to the device when the packet leaves the node for the other pod."""
    finish_checksums_at(lab, NODE, port_of("db"))


@pytest.fixture(scope="module", params=["routed", "bridged"])
def lasting_scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    home = tmp_path_factory.mktemp("headers")
    with border(home, is_bridged=request.param == "bridged", prepare=prepare) as one:
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    put(lasting_scene, NARROW)
    return lasting_scene


def ends(scene: Scene) -> tuple[Station, str]:
    """The sending pod, and the hardware address to which it sends."""
    is_bridged = scene.lab.run(NODE, ["ip", "link", "show", "br0"], check=False).returncode == 0
    web = station(scene.lab, "web", is_bridged=is_bridged)
    return web, station(scene.lab, "db", is_bridged=is_bridged).mac if is_bridged else web.hop


def aimed(frame: bytes, start: int, at: int, value: int) -> bytes:
    """The frame with its last two bytes chosen so that the checksum from ``start`` on has this value at ``at``."""
    assert len(frame) % 2 == start % 2 == at % 2 == 0
    words = struct.unpack(f"!{(len(frame) - start) // 2 - 1}H", frame[start:-2])
    return frame[:-2] + struct.pack("!H", (~value - sum(words)) % 0xFFFF)


AIMS = {
    "source port": (0, 0, 53),
    "destination port": (0, 2, 22),
    "length": (0, 4, 9),
    "destination address": (-4, -2, 3),
    "source address": (-8, -6, 3),
}
"""(where the sum begins, where it is written, both from the transport header on; the wanted value)."""


@pytest.mark.parametrize(("version", "aim"), [(4, "protocol"), *((version, aim) for version in (4, 6) for aim in AIMS)])
@pytest.mark.parametrize("is_open", [False, True], ids=["new", "open"])
def test_checksum_changes_nothing_that_was_judged(scene: Scene, version: int, aim: str, *, is_open: bool) -> None:
    """A datagram to an allowed port is not changed into another one, be it the first or one of an open connection."""
    lab, (web, mac) = scene.lab, ends(scene)
    header = ETHERNET + NETWORK[version]
    if aim == "protocol":  # the kernel requires the sum to begin where a network header may end
        start, at, value = ETHERNET + 6, ETHERNET + 8, 0x4006
    elif version == 6 and aim == "source address":
        start, at, value = header - 20, header - 18, 3
    else:
        from_start, from_at, value = AIMS[aim]
        start, at = header + from_start, header + from_at
    attack, control = token(), token()
    sport = 4100 + list(AIMS).index(aim) if aim in AIMS else 4200
    own, to = web.address[version], address_of("db", version)
    packet = datagram(own, to, OPEN_PORT, attack + bytes(8), sport)
    frame = aimed(bytes(framed(packet, web.mac, mac)), start, at, value)
    plain = framed(datagram(own, to, OPEN_PORT, control, sport), web.mac, mac)
    with ear(lab, "shop/db") as hearing:
        if is_open:
            with ear(lab, "shop/web") as back:
                for one in (token(), token()):
                    say(lab, web.host, framed(datagram(own, to, OPEN_PORT, one, sport), web.mac, mac))
                    assert back.hears(one)  # the server echoes
        say_unfinished(lab, web.host, frame, start, at - start)
        say(lab, web.host, plain)
        assert hearing.heard([attack], control) == set()


@pytest.mark.parametrize("version", [4, 6])
def test_checksum_changes_no_packet_that_an_error_is_about(scene: Scene, version: int) -> None:
    """An error about an open connection passes. It does not become one about another connection."""
    lab, (web, mac) = scene.lab, ends(scene)
    db, own = address_of("db", version), web.address[version]
    with ear(lab, "shop/db") as hearing, ear(lab, "shop/web") as back:
        first, control, attack = token(), token(), token()
        say(lab, web.host, framed(datagram(own, db, OPEN_PORT, first), web.mac, mac))
        assert hearing.hears(first)
        assert back.hears(first)
        about = network(db, own) / UDP(sport=OPEN_PORT, dport=4000) / (attack + bytes(8))
        error = ICMP(type=3, code=3) if version == 4 else ICMPv6DestUnreach(code=4)
        frame = bytes(framed(network(own, db) / error / about, web.mac, mac))
        inner = ETHERNET + NETWORK[version] + 8
        at = inner + NETWORK[version] - 2  # the lower half of the destination becomes that of another pod
        say_unfinished(lab, web.host, aimed(frame, at, at, 3), at, 0)
        say(lab, web.host, framed(datagram(own, db, OPEN_PORT, control), web.mac, mac))
        assert hearing.heard([attack], control) == set()


def test_mobility_header_is_no_extension_header(scene: Scene) -> None:
    """The kernel treats this header as a protocol, so a packet with it has no UDP port, whatever follows the header."""
    lab, (web, mac) = scene.lab, ends(scene)
    attack, control = token(), token()
    inner = bytes(UDP(sport=4000, dport=OPEN_PORT, len=8 + len(attack)) / attack)
    mobility = struct.pack("!BBBBHH", 17, 0, 0, 0, 0, 0)  # next header UDP, eight bytes
    packet = IPv6(src=web.address[6], dst=address_of("db", 6), nh=135) / Raw(mobility + inner)
    with ear(lab, "shop/db") as hearing:
        say(lab, web.host, framed(packet, web.mac, mac))
        say(lab, web.host, framed(datagram(web.address[6], address_of("db", 6), OPEN_PORT, control), web.mac, mac))
        assert hearing.heard([attack], control) == set()


def in_fragments(own: str, to: str, identification: int, second_at: int, payload: bytes) -> list[bytes | object]:
    """A TCP segment with options. The first fragment has 64 bytes, the second one begins at ``second_at``."""
    version = ip_address(own).version
    segment = bytes(TCP(sport=4000, dport=5432, flags="S", dataofs=15) / (OPTIONS + bytes(4)))
    assert len(segment) == 64
    if version == 4:
        first = network(own, to, id=identification, flags="MF", proto=6) / Raw(segment)
        return [first, network(own, to, id=identification, frag=second_at // 8, proto=6) / Raw(payload)]
    first = network(own, to) / IPv6ExtHdrFragment(id=identification, m=1, nh=6) / Raw(segment)
    return [first, network(own, to) / IPv6ExtHdrFragment(id=identification, offset=second_at // 8, nh=6) / Raw(payload)]


@pytest.mark.parametrize("version", [4, 6])
def test_later_fragment_overwrites_no_options(scene: Scene, version: int) -> None:
    """A second fragment that begins within the TCP options does not arrive; one that begins after them does."""
    put(scene, TCP_TOO)
    lab, (web, mac) = scene.lab, ends(scene)
    own, to = web.address[version], address_of("db", version)
    attack, control = token(), token()
    bad = in_fragments(own, to, 4711, 24, attack)
    good = in_fragments(own, to, 4712, 64, control)
    with ear(lab, "shop/db") as hearing:
        say(lab, web.host, *(framed(one, web.mac, mac) for one in bad + good))
        assert hearing.heard([attack], control) == set()


# --- what devices finish goes on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_checksum_in_its_own_place_is_finished(scene: Scene, version: int) -> None:
    """A datagram with a checksum that the device must write arrives with the correct checksum."""
    lab, (web, mac) = scene.lab, ends(scene)
    one, header = token(), ETHERNET + NETWORK[version]
    own, to = web.address[version], address_of("db", version)
    packet = datagram(own, to, 7, one)  # the device starts with the sum of the pseudo-header
    packet[UDP].dport = OPEN_PORT
    frame = bytearray(bytes(framed(packet, web.mac, mac)))
    size = struct.pack("!HHI", 0, 17, 8 + len(one))
    words = struct.unpack(
        "!" + "H" * ((2 * len(ip_address(own).packed) + 8) // 2), ip_address(own).packed + ip_address(to).packed + size
    )
    struct.pack_into("!H", frame, header + 6, sum(words) % 0xFFFF)
    with udp_socket(lab, "shop/db", version, OPEN_PORT, address=to) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        say_unfinished(lab, web.host, bytes(frame), header, 6)
        with ear(lab, "shop/db") as hearing:
            say_unfinished(lab, web.host, bytes(frame), header, 6)
            assert hearing.hears(one)
            (found,) = [found for found in hearing.frames if one in found]
    want = bytearray(found)
    struct.pack_into("!H", want, header + 6, 0)
    body = bytes(want[header:])
    total = sum(words) + sum(struct.unpack(f"!{len(body) // 2}H", body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert struct.unpack_from("!H", found, header + 6)[0] == ~total & 0xFFFF


def transfer(lab: Lab, client: str, server: str, address: str, port: int) -> int:
    """Send much data from one pod to another. Returns the number of bytes that arrive."""
    family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
    with (
        lab.prober.open_socket(server, family, socket.SOCK_STREAM) as listener,
        lab.prober.open_socket(client, family, socket.SOCK_STREAM) as outgoing,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        for one in (listener, outgoing):
            one.settimeout(PATIENCE_S)
        outgoing.connect((address, port))
        incoming = listener.accept()[0]
        with incoming:
            incoming.settimeout(PATIENCE_S)
            thread = threading.Thread(target=outgoing.sendall, args=(bytes(AMOUNT),))
            thread.start()
            arrived = 0
            while arrived < AMOUNT and (chunk := incoming.recv(1 << 20)):
                arrived += len(chunk)
            thread.join()
    return arrived


@pytest.mark.parametrize(("client", "server"), [("web", "db"), ("web", "other")])
@pytest.mark.parametrize("version", [4, 6])
def test_large_segments_pass(scene: Scene, version: int, client: str, server: str) -> None:
    """Bulk data passes in segments that the device cuts, with checksums that the device or nobody writes."""
    put(scene, TCP_TOO.replace("port: 5432", "port: 5433"))
    assert transfer(scene.lab, f"shop/{client}", f"shop/{server}", address_of(server, version), 5433) == AMOUNT


@pytest.mark.parametrize("server", ["db", "other"])
def test_bulk_data_in_a_tunnel_of_the_pods(scene: Scene, server: str) -> None:
    """Two pods have a tunnel between them. Checksums inside it are left to devices, too."""
    put(scene, TCP_TOO)
    lab = scene.lab
    try:
        for name, peer, last in (("web", server, 1), (server, "web", 2)):
            ip(
                lab, f"shop/{name}",
                f"link add vx0 type vxlan id 9 dstport 4789 local {address_of(name)} remote {address_of(peer)}",
                f"address add 192.168.77.{last}/24 dev vx0", "link set vx0 up",
            )  # fmt: skip
        assert transfer(lab, "shop/web", f"shop/{server}", "192.168.77.2", 9000) == AMOUNT
    finally:
        for name in ("web", server):
            lab.run(f"shop/{name}", ["ip", "link", "del", "vx0"], check=False)
