# SPDX-License-Identifier: Apache-2.0
"""Link-local messages: no data hides in them, no pod speaks for another, and everything that a link needs passes."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, Scene, wait_for
from border_scene import (
    BRIDGE,
    BRIDGE_ADDRESS,
    BRIDGE_MAC,
    GATEWAY,
    NARROW,
    OPEN_PORT,
    PODS,
    WORLD,
    Station,
    border,
    counted,
    datagram,
    ear,
    framed,
    gets,
    ip,
    network,
    port_of,
    put,
    say,
    station,
    token,
    udp_socket,
)
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import DHCP6_Advertise
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6NDOptUnknown,
    ICMPv6Unknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import ICMP as ICMP4
from netpol_ebpf.lab.topology import ICMPV6, TCP
from netpol_ebpf.lab.topology import UDP as UDP_PROTOCOL

pytestmark = pytest.mark.netns

ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"
BROADCAST_MAC = "ff:ff:ff:ff:ff:ff"
NONCE = 14
"""The number of the option with six bytes of the sender's choice (RFC 3971, 7527)."""
DISCOVERY, LISTENERS = (133, 135, 136), (130, 131, 132, 143)
ANYTHING = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: anything, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}
"""
ONLY_WORLD = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: only-world, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  policyTypes: [Egress]
  egress:
  - to:
    - ipBlock: {{cidr: 192.0.2.1/32}}
    - ipBlock: {{cidr: "2001:db8::1/128"}}
    - ipBlock: {{cidr: 10.1.0.254/32}}
    - ipBlock: {{cidr: "fd00:1::fe/128"}}
  - ports: [{{protocol: UDP, port: {OPEN_PORT}}}]
"""
NOT_FROM_WEB = """\
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: not-from-web, namespace: shop}
spec:
  selector: app == 'db'
  types: [Ingress]
  ingress: [{action: Deny, source: {selector: app == 'web'}}, {action: Allow}]
"""
NARROW_OF_CALICO = f"""\
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {{name: control, namespace: shop}}
spec:
  selector: app == 'db'
  order: 1
  types: [Ingress]
  ingress: [{{action: Allow, protocol: UDP, destination: {{ports: [{OPEN_PORT}]}}}}]
"""
LENDING = PODS.replace(
    "{name: web, namespace: shop,",
    "{name: web, namespace: shop, annotations: "
    """{cni.projectcalico.org/allowedSourcePrefixes: '["198.51.100.0/24","2001:db8:5::/48"]'},""",
)
LENT = {4: "198.51.100.7", 6: "2001:db8:5::7"}


@pytest.fixture(scope="module")
def routed_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with border(tmp_path_factory.mktemp("routed")) as one:
        yield one


@pytest.fixture(scope="module")
def bridged_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with border(tmp_path_factory.mktemp("bridged"), is_bridged=True, options=("--allow-source-prefixes",)) as one:
        yield one


@pytest.fixture
def routed(routed_scene: Scene) -> Scene:
    put(routed_scene, NARROW)
    return routed_scene


@pytest.fixture
def bridged(bridged_scene: Scene) -> Scene:
    put(bridged_scene, NARROW)
    return bridged_scene


def web_and_db(scene: Scene, *, is_bridged: bool = True) -> tuple[Station, Station]:
    return station(scene.lab, "web", is_bridged=is_bridged), station(scene.lab, "db", is_bridged=is_bridged)


def arrived(
    scene: Scene, web: Station, listener: str, control: Packet, attacks: Mapping[str, tuple[bytes, Packet]]
) -> set[str]:
    """The names of the attacks of a pod whose tokens arrive at a host."""
    last = token()
    with ear(scene.lab, listener) as hearing:
        say(scene.lab, web.host, *(frame for _, frame in attacks.values()), control / last)
        heard = hearing.heard([one for one, _ in attacks.values()], last)
    return {name for name, (one, _) in attacks.items() if one in heard}


def control_to(web: Station, destination: str, mac: str) -> Packet:
    """A packet that `NARROW` allows, without its payload."""
    return framed(datagram(web.address[ip_address(destination).version], destination, OPEN_PORT, b""), web.mac, mac)


def solicitation(
    source: str, destination: str, target: str, *options: Packet, hops: int = 255, code: int = 0
) -> Packet:
    message = IPv6(src=source, dst=destination, hlim=hops) / ICMPv6ND_NS(tgt=target, code=code)
    for one in options:
        message /= one
    return message


def advertisement(source: str, destination: str, target: str, mac: str) -> Packet:
    body = ICMPv6ND_NA(tgt=target, R=0, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    return IPv6(src=source, dst=destination, hlim=255) / body


# --- nothing hides in a message of the link -----------------------------------------------------------------------------


def bare(source: str, destination: str, kind: int, hops: int, payload: bytes) -> Packet:
    """A message of a link-local type, without the fields that its type requires."""
    return IPv6(src=source, dst=destination, hlim=hops) / ICMPv6Unknown(type=kind, code=0, msgbody=bytes(20) + payload)


def test_link_types_are_no_way_out(routed: Scene) -> None:
    """By the types of neighbour and listener discovery an isolated pod reaches no host outside, by any hop limit."""
    web, _ = web_and_db(routed, is_bridged=False)
    attacks = {}
    for kind in (*DISCOVERY, *LISTENERS):
        for hops in (1 + 1, 64, 255):
            one = token()
            attacks[f"type {kind}, hop limit {hops}"] = (
                one, framed(bare(web.address[6], WORLD[6], kind, hops, one), web.mac, web.hop)
            )  # fmt: skip
    control = control_to(web, WORLD[6], web.hop)
    assert arrived(routed, web, INTERNET, control, attacks) == set()


def test_link_types_reach_no_pod_behind_a_router(routed: Scene) -> None:
    """The same to another pod of the node, which is on another link even if the hop limit is 255."""
    web, db = web_and_db(routed, is_bridged=False)
    attacks = {}
    for kind in (*DISCOVERY, *LISTENERS):
        for hops in (2, 64, 255):
            one = token()
            packet = bare(web.address[6], db.address[6], kind, hops, one)
            attacks[f"type {kind}, hop limit {hops}"] = (one, framed(packet, web.mac, web.hop))
    control = control_to(web, db.address[6], web.hop)
    assert arrived(routed, web, db.host, control, attacks) == set()


def test_link_types_carry_nothing_to_a_pod_of_the_same_link(bridged: Scene) -> None:
    """On a bridge: with another hop limit, an unknown option, bytes after the last one, a code, or a foreign source."""
    web, db = web_and_db(bridged)
    own, to = web.address[6], db.address[6]
    packets: dict[str, Callable[[bytes], Packet]] = {
        f"type {kind}, hop limit 64": lambda one, kind=kind: bare(own, to, kind, 64, one)
        for kind in (*DISCOVERY, *LISTENERS)
    }
    packets |= {
        "listener report to one pod": lambda one: bare(web.link_local, to, 131, 1, one),
        "listener report from a global address": lambda one: bare(own, ALL_NODES, 131, 1, one),
        "listener report that a router passes on": lambda one: bare(web.link_local, ALL_NODES, 143, 64, one),
        "unknown option": lambda one: solicitation(
            own, to, to, ICMPv6NDOptUnknown(type=200, len=3, data=one + bytes(6))
        ),
        "bytes behind the message": lambda one: solicitation(own, to, to) / one,
        "bytes behind the options": lambda one: solicitation(own, to, to, ICMPv6NDOptSrcLLAddr(lladdr=web.mac)) / one,
        "a code": lambda one: solicitation(own, to, to, code=1) / one,
        "foreign source": lambda one: solicitation("fd00:1::3", to, to) / one,
        "target elsewhere": lambda one: solicitation(own, to, WORLD[6]) / one,
        "advertisement with bytes behind it": lambda one: advertisement(own, to, own, web.mac) / one,
        "router solicitation with bytes behind it": lambda one: IPv6(src=own, dst=to, hlim=255) / ICMPv6ND_RS() / one,
    }
    attacks = {}
    for name, make in packets.items():
        one = token()
        packet = make(one)
        mac = ALL_NODES_MAC if packet[IPv6].dst == ALL_NODES else db.mac
        attacks[name] = (one, framed(packet, web.mac, mac))
    assert arrived(bridged, web, db.host, control_to(web, to, db.mac), attacks) == set()


def test_nothing_travels_around_a_well_formed_message(bridged: Scene) -> None:
    """A correct neighbour solicitation has no headers with content before it, and no bytes after it in the frame."""
    web, db = web_and_db(bridged)
    own, to = web.address[6], db.address[6]
    question = ICMPv6ND_NS(tgt=to) / ICMPv6NDOptSrcLLAddr(lladdr=web.mac)
    attacks = {}
    for name, header in (("destination", IPv6ExtHdrDestOpt), ("hop-by-hop", IPv6ExtHdrHopByHop)):
        one = token()
        packet = IPv6(src=own, dst=to, hlim=255) / header(options=[PadN(optdata=one + bytes(4))]) / question
        attacks[f"{name} options"] = (one, framed(packet, web.mac, db.mac))
    one = token()
    plain = framed(IPv6(src=own, dst=to, hlim=255) / question, web.mac, db.mac)
    attacks["behind the packet"] = (one, Ether(bytes(plain) + bytes(64) + one))
    one = token()
    report = listener_report(web.link_local, bytes(14)) / one
    attacks["behind a listener report"] = (one, framed(report, web.mac, ALL_NODES_MAC))
    one = token()
    ask = Ether(src=web.mac, dst=db.mac) / ARP(
        op=1, hwsrc=web.mac, psrc=web.address[4], hwdst=db.mac, pdst=db.address[4]
    )
    attacks["behind ARP"] = (one, ask / (bytes(64) + one))
    assert arrived(bridged, web, db.host, control_to(web, to, db.mac), attacks) == set()


def asked(source: str, destination: str, target: str, one: bytes, **fields: int) -> Packet:
    """A neighbour solicitation that carries six bytes in its nonce, the only place for free bytes."""
    return solicitation(source, destination, target, ICMPv6NDOptUnknown(type=NONCE, len=1, data=one), **fields)


def test_one_condition_is_enough_for_policy_to_decide(bridged: Scene) -> None:
    """If a message violates any one condition of a link-local message, policy judges it."""
    web, db = web_and_db(bridged)
    own, to = web.address[6], db.address[6]
    foreign = ICMPv6NDOptSrcLLAddr(lladdr="02:bb:bb:bb:bb:bb")
    packets: dict[str, Callable[[bytes], Packet]] = {
        "hop limit": lambda one: asked(own, to, to, one, hops=64),
        "code": lambda one: asked(own, to, to, one, code=1),
        "source": lambda one: asked("fd00:1::3", to, to, one),
        "target": lambda one: asked(own, to, WORLD[6], one),
        "length of an option": lambda one: solicitation(
            own, to, to, ICMPv6NDOptUnknown(type=NONCE, len=2, data=one + bytes(8))
        ),
        "kind of an option": lambda one: solicitation(own, to, to, ICMPv6NDOptUnknown(type=200, len=1, data=one)),
        "hardware address": lambda one: asked(own, to, to, one) / foreign,
        "number of options": lambda one: asked(own, to, to, one)
        / ICMPv6NDOptUnknown(type=NONCE, len=1, data=bytes(6))
        / ICMPv6NDOptUnknown(type=NONCE, len=1, data=bytes(6))
        / ICMPv6NDOptUnknown(type=NONCE, len=1, data=bytes(6)),
    }
    good, attacks = secrets.token_bytes(6), {}
    for name, make in packets.items():
        one = secrets.token_bytes(6)
        attacks[name] = (one, framed(make(one), web.mac, db.mac))
    attacks["none"] = (good, framed(asked(own, to, to, good), web.mac, db.mac))
    assert arrived(bridged, web, db.host, control_to(web, to, db.mac), attacks) == {"none"}


def test_link_ends_at_the_router(routed: Scene) -> None:
    """A correct solicitation about the sender's own address to a host off the link is no link-local message."""
    web, _ = web_and_db(routed, is_bridged=False)
    one = secrets.token_bytes(6)
    attack = framed(asked(web.address[6], WORLD[6], web.address[6], one), web.mac, web.hop)
    control = control_to(web, WORLD[6], web.hop)
    assert arrived(routed, web, INTERNET, control, {"question": (one, attack)}) == set()


def listener_report(source: str, one: bytes, *, hops: int = 1) -> Packet:
    """A report about a site-local group with these 14 bytes in its address."""
    body = bytes(4) + bytes.fromhex("ff15") + one
    return IPv6(src=source, dst=ALL_NODES, hlim=hops) / ICMPv6Unknown(type=131, code=0, msgbody=body)


@pytest.mark.parametrize("hops", [1, 64])
def test_listeners_report_to_the_link_alone(bridged: Scene, hops: int) -> None:
    """A report with hop limit 1 passes, and no other report does."""
    web, db = web_and_db(bridged)
    one = secrets.token_bytes(14)
    report = framed(listener_report(web.link_local, one, hops=hops), web.mac, ALL_NODES_MAC)
    control = control_to(web, db.address[6], db.mac)
    assert arrived(bridged, web, db.host, control, {"report": (one, report)}) == ({"report"} if hops == 1 else set())


# --- nobody speaks for another -------------------------------------------------------------------------------------------


def forgeries(web: Station, db: Station) -> dict[str, Packet]:
    """Messages that only routers, DHCP servers or other pods may send, without a token."""
    own, other, router = web.address, {4: "10.1.0.3", 6: "fd00:1::3"}, BRIDGE_ADDRESS
    prefix = ICMPv6NDOptPrefixInfo(prefix="2001:db8:bad::", prefixlen=64)
    to_all = Ether(src=web.mac, dst=ALL_NODES_MAC)
    to_db = Ether(src=web.mac, dst=db.mac)

    def says(source: str, destination: str, body: Packet) -> Packet:
        return IPv6(src=source, dst=destination, hlim=255) / body

    redirect = ICMPv6ND_Redirect(tgt=web.link_local, dst=WORLD[6])
    offer = BOOTP(op=2, yiaddr=db.address[4], siaddr=own[4]) / DHCP(options=[("message-type", "offer"), "end"])
    kinds = {
        "router advertisement": to_all / says(web.link_local, ALL_NODES, ICMPv6ND_RA() / prefix),
        "router advertisement to one": to_db / says(web.link_local, db.address[6], ICMPv6ND_RA() / prefix),
        "router advertisement from a global address": to_db / says(own[6], db.address[6], ICMPv6ND_RA() / prefix),
        "redirect": to_db / says(web.link_local, db.address[6], redirect),
        "advertisement for another": to_db / advertisement(own[6], db.address[6], other[6], web.mac),
        "advertisement for the gateway": to_db / advertisement(own[6], db.address[6], router[6], web.mac),
        "advertisement for the gateway to all": to_all / advertisement(own[6], ALL_NODES, router[6], web.mac),
        "claim of another's address": to_all / solicitation("::", "ff02::1", other[6]),
        "redirect of IPv4": to_db
        / IP(src=own[4], dst=db.address[4])
        / ICMP(type=5, code=1, gw=own[4])
        / IP(src=db.address[4], dst=WORLD[4])
        / UDP(sport=1, dport=2),
        "DHCP offer": to_db / IP(src=own[4], dst=db.address[4]) / UDP(sport=67, dport=68) / offer,
        "DHCP offer to all": Ether(src=web.mac, dst=BROADCAST_MAC)
        / IP(src=own[4], dst="255.255.255.255") / UDP(sport=67, dport=68) / offer,
        "DHCPv6 advertisement": to_db / IPv6(src=own[6], dst=db.address[6]) / UDP(sport=547, dport=546) / DHCP6_Advertise(),
    }  # fmt: skip
    for name, psrc, hwsrc in (
        ("another", other[4], web.mac),
        ("the gateway", router[4], web.mac),
        ("another's hardware", own[4], "02:bb:bb:bb:bb:bb"),
    ):
        for op, what in ((1, "request"), (2, "reply")):
            body = ARP(op=op, hwsrc=hwsrc, psrc=psrc, hwdst=db.mac, pdst=db.address[4])
            kinds[f"ARP {what} as {name}"] = to_db / body
    return kinds


def test_nobody_speaks_for_another(bridged: Scene) -> None:
    """Even if policy allows everything, a pod sends no message in the name of a router, a server or another pod."""
    put(bridged, ANYTHING)
    web, db = web_and_db(bridged)
    attacks = {}
    for name, frame in forgeries(web, db).items():
        one = token()
        attacks[name] = (one, frame / one)
    assert arrived(bridged, web, db.host, control_to(web, db.address[6], db.mac), attacks) == set()


def cache_of(scene: Scene, host: str, address: str) -> str | None:
    """The hardware address that a host has cached for a neighbour."""
    version = ip_address(address).version
    out = scene.lab.run(host, ["ip", f"-{version}", "-j", "neighbour", "show", "to", address]).stdout
    return next((one["lladdr"] for one in json.loads(out or "[]") if "lladdr" in one), None)


@pytest.mark.parametrize("version", [4, 6])
def test_gateway_of_another_pod_is_not_taken_over(bridged: Scene, version: int) -> None:
    """A pod that talks with its gateway keeps the gateway's hardware address, whatever its neighbour sends."""
    put(bridged, ANYTHING)
    web, db = web_and_db(bridged)
    lab, router = bridged.lab, BRIDGE_ADDRESS[version]
    ping = Attempt(db.host, ip_address(router), ICMP4 if version == 4 else ICMPV6)
    assert bridged.reached(ping) == [True]
    assert cache_of(bridged, db.host, router) == BRIDGE_MAC
    if version == 4:
        body = ARP(op=2, hwsrc=web.mac, psrc=router, hwdst=db.mac, pdst=db.address[4])
        forged = Ether(src=web.mac, dst=db.mac) / body
    else:
        forged = framed(advertisement(web.address[6], db.address[6], router, web.mac), web.mac, db.mac)
    assert (
        arrived(bridged, web, db.host, control_to(web, db.address[version], db.mac), {"x": (b"no token", forged)})
        == set()
    )
    assert cache_of(bridged, db.host, router) == BRIDGE_MAC
    assert bridged.reached(ping) == [True]
    lab.run(db.host, ["ip", "neighbour", "flush", "dev", "eth0"])


@pytest.mark.parametrize("destination", ["its own link-local", "global"])
def test_link_local_source_evades_no_label(bridged: Scene, destination: str) -> None:
    """A pod that a rule denies by label cannot enter from its link-local address."""
    put(bridged, NOT_FROM_WEB, NARROW_OF_CALICO)
    web, db = web_and_db(bridged)
    to = db.link_local if destination == "its own link-local" else db.address[6]
    one = token()
    attack = framed(datagram(web.link_local, to, 7000, one), web.mac, db.mac)
    assert arrived(bridged, web, db.host, control_to(web, db.address[6], db.mac), {"x": (one, attack)}) == set()


@pytest.mark.parametrize("whose", ["the world's", "the node's"])
@pytest.mark.parametrize("version", [4, 6])
def test_what_is_for_another_is_not_delivered(bridged: Scene, version: int, whose: str) -> None:
    """A pod that may only talk with the world or its node cannot pass such packets to its neighbour."""
    put(bridged, ONLY_WORLD)
    web, db = web_and_db(bridged)
    one = token()
    to = WORLD[version] if whose == "the world's" else BRIDGE_ADDRESS[version]
    attack = framed(datagram(web.address[version], to, 7000, one), web.mac, db.mac)
    assert arrived(bridged, web, db.host, control_to(web, db.address[6], db.mac), {"x": (one, attack)}) == set()


@pytest.mark.parametrize("version", [4, 6])
def test_question_for_an_address_reaches_no_other_pod(bridged: Scene, version: int) -> None:
    """An isolated pod's request to DHCP servers reaches no pod, not even one that accepts everything."""
    put(bridged, ONLY_WORLD)
    web, db = web_and_db(bridged)
    one = token()
    if version == 4:
        packet = IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / one
        attack = framed(packet, web.mac, BROADCAST_MAC)
    else:
        packet = IPv6(src=web.link_local, dst="ff02::1:2") / UDP(sport=546, dport=547) / one
        attack = framed(packet, web.mac, "33:33:00:01:00:02")
    assert arrived(bridged, web, db.host, control_to(web, db.address[6], db.mac), {"x": (one, attack)}) == set()


# --- what a link needs goes on --------------------------------------------------------------------------------------------


def addresses(scene: Scene, host: str) -> dict[str, dict[str, object]]:
    (link,) = json.loads(scene.lab.run(host, ["ip", "-6", "-j", "address", "show", "dev", "eth0"]).stdout)
    return {one["local"]: one for one in link["addr_info"]}


def test_duplicates_are_found_on_a_bridge(bridged: Scene) -> None:
    """An isolated pod detects that its neighbour already has the link-local address, and can use a free one."""
    lab = bridged.lab
    settings = [("ipv6/conf/eth0/accept_dad", "1"), ("ipv6/conf/eth0/dad_transmits", "1")]
    lab.prober.write_settings("shop/web", settings)
    ip(lab, "shop/db", "address add fe80::42/64 dev eth0 nodad")
    ip(lab, "shop/web", "address add fe80::42/64 dev eth0", "address add fe80::43/64 dev eth0")
    seen = wait_for(
        lambda: (
            (now := addresses(bridged, "shop/web"))
            and not now["fe80::43"].get("tentative")
            and now["fe80::42"].get("dadfailed")
            and now
        ),
        "the check of both addresses ends",
    )
    assert not seen["fe80::43"].get("dadfailed")
    for host, last in (("shop/web", 42), ("shop/web", 43), ("shop/db", 42)):
        ip(lab, host, f"address del fe80::{last}/64 dev eth0")
    lab.prober.write_settings("shop/web", [(name, "0") for name, _ in settings])


@pytest.mark.parametrize("topology", ["routed", "bridged"])
@pytest.mark.parametrize("version", [4, 6])
def test_neighbours_find_each_other(request: pytest.FixtureRequest, topology: str, version: int) -> None:
    """Pods and node learn hardware addresses anew, and probe known ones again."""
    scene: Scene = request.getfixturevalue(topology)
    lab = scene.lab
    lab.run("shop/web", ["ip", "neighbour", "flush", "dev", "eth0"])
    for device in (BRIDGE,) if topology == "bridged" else (port_of("web"), port_of("db")):
        lab.run(NODE, ["ip", "neighbour", "flush", "dev", device])
    for source in ("shop/web", NODE):
        to = ip_address("10.1.0.2" if version == 4 else "fd00:1::2")
        assert scene.reached(Attempt(source, to, 17, OPEN_PORT)) == [True]


def test_neighbour_probe_of_a_global_address_is_answered(bridged: Scene) -> None:
    """A unicast probe between global addresses of one link, as the kernel sends it, passes as a link-local message."""
    web, db = web_and_db(bridged)
    probe = solicitation(web.address[6], db.address[6], db.address[6], ICMPv6NDOptSrcLLAddr(lladdr=web.mac))
    with ear(bridged.lab, web.host) as hearing:
        say(bridged.lab, web.host, framed(probe, web.mac, db.mac))
        wait_for(
            lambda: hearing.hears(ip_address(db.address[6]).packed, 0.1)
            and any(Ether(frame).haslayer(ICMPv6ND_NA) for frame in hearing.frames),
            "the neighbour answers",
        )


def test_snooping_bridge_learns_who_listens(bridged: Scene) -> None:
    """A bridge with a querier asks, isolated pods answer, and packets to the group reach only them."""
    lab, group = bridged.lab, "ff15::4242"
    ip(lab, NODE, f"link set {BRIDGE} type bridge mcast_querier 1 mcast_snooping 1")
    with ExitStack() as stack:
        sock = stack.enter_context(udp_socket(lab, "shop/web", 6, 7100))
        (link,) = json.loads(lab.run("shop/web", ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)
        index = link["ifindex"]
        sock.setsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, IPv6Address(group).packed + struct.pack("=I", index)
        )

        def known() -> bool:
            out = lab.run(NODE, ["bridge", "-j", "mdb", "show", "dev", BRIDGE]).stdout
            entries = json.loads(out)[0]["mdb"]
            return any(one["grp"] == group and one["port"] == port_of("web") for one in entries)

        wait_for(known, "the bridge knows the listener")
    ip(lab, NODE, f"link set {BRIDGE} type bridge mcast_querier 0")


@pytest.mark.parametrize("topology", ["routed", "bridged"])
def test_router_is_asked_and_answers(request: pytest.FixtureRequest, topology: str) -> None:
    """A pod's solicitation reaches its node. The node's advertisements reach the pod, by multicast and by unicast."""
    scene: Scene = request.getfixturevalue(topology)
    lab, web = scene.lab, station(scene.lab, "web", is_bridged=topology == "bridged")
    device = BRIDGE if topology == "bridged" else port_of("web")
    ask = IPv6(src=web.link_local, dst="ff02::2", hlim=255) / ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=web.mac)
    with icmp6_socket(lab, NODE, device) as sock, ear(lab, web.host) as hearing:
        say(lab, web.host, framed(ask, web.mac, "33:33:00:00:00:02"))
        assert gets(sock, bytes([133, 0]))
        silent = []
        for destination in (ALL_NODES, web.link_local):
            one = token()
            answer = IPv6(src="fe80::1", dst=destination) / ICMPv6ND_RA() / ICMPv6NDOptUnknown(type=200, data=one)
            with contextlib.suppress(OSError):  # the program dropped it
                sock.sendto(bytes(answer[ICMPv6ND_RA]), (destination, 0))
            if not hearing.hears(one, 2.0):
                silent.append(destination)
        assert silent == []


@contextlib.contextmanager
def icmp6_socket(lab: Lab, host: str, device: str) -> Iterator[socket.socket]:
    """A socket for ICMPv6 messages of one interface, with hop limit 255."""
    with lab.prober.open_socket(host, socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        for option in (socket.IPV6_UNICAST_HOPS, socket.IPV6_MULTICAST_HOPS):
            sock.setsockopt(socket.IPPROTO_IPV6, option, 255)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        yield sock


def test_dhcp6_of_a_workload(routed: Scene) -> None:
    """A pod with only a link-local address requests an address. The node's answer to the link-local address arrives."""
    lab, web = routed.lab, station(routed.lab, "web")
    ours = port_of("web")
    with udp_socket(lab, NODE, 6, 547) as server, ear(lab, web.host) as hearing:
        one, two = token(), token()
        (link,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", "dev", ours]).stdout)
        group = IPv6Address("ff02::1:2").packed + struct.pack("=I", link["ifindex"])
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, ours.encode())
        packet = IPv6(src=web.link_local, dst="ff02::1:2") / UDP(sport=546, dport=547) / one
        say(lab, web.host, framed(packet, web.mac, "33:33:00:01:00:02"))
        assert gets(server, one)
        server.sendto(two, (web.link_local, 546))
        assert hearing.hears(two)


@pytest.mark.parametrize("version", [4, 6])
def test_gateway_address_answers(routed: Scene, version: int) -> None:
    """The link-local address of a routed pod's gateway is found, and answers if policy allows the pod to ask."""
    put(routed, ANYTHING)
    lab = routed.lab
    lab.run("shop/web", ["ip", "neighbour", "flush", "dev", "eth0"])
    if version == 4:
        assert routed.reached(Attempt("shop/web", ip_address(GATEWAY[4]), ICMP4)) == [True]
    else:
        assert routed.reached(Attempt("shop/web", ip_address(WORLD[6]), ICMPV6)) == [True]
        assert cache_of(routed, "shop/web", GATEWAY[6]) is not None


@pytest.mark.parametrize("version", [4, 6])
def test_borrowed_address_is_found_and_reached(bridged: Scene, version: int) -> None:
    """A pod that may send from a prefix takes an address of it, announces it on the link, and gets packets to it."""
    put(bridged, ANYTHING, cluster=LENDING)
    lab, bits = bridged.lab, 32 if version == 4 else 128
    ip(lab, "shop/web", f"address add {LENT[version]}/{bits} dev eth0" + (" nodad" if version == 6 else ""))
    ip(lab, "shop/other", f"-{version} route add {LENT[version]} dev eth0")
    ip(lab, NODE, f"-{version} route add {LENT[version]} dev {BRIDGE}")
    ping = ICMP4 if version == 4 else ICMPV6
    try:
        lab.prober.listen("shop/web", [ip_address(LENT[version])], bridged.lab.plan.hosts["shop/web"].listens)
        for source in ("shop/other", NODE):
            for attempt in (
                Attempt(source, ip_address(LENT[version]), ping),
                Attempt(source, ip_address(LENT[version]), TCP, 5432),
            ):
                assert bridged.reached(attempt) == [True], attempt
        web = station(lab, "web", is_bridged=True)
        one = token()
        with ear(lab, "shop/db") as hearing:  # as keepalived does when it takes an address over
            if version == 4:
                body = ARP(op=2, hwsrc=web.mac, psrc=LENT[4], hwdst=BROADCAST_MAC, pdst=LENT[4])
                say(lab, web.host, Ether(src=web.mac, dst=BROADCAST_MAC) / body)
                assert hearing.hears(ip_address(LENT[4]).packed * 1)
            else:
                say(lab, web.host, framed(advertisement(LENT[6], ALL_NODES, LENT[6], web.mac), web.mac, ALL_NODES_MAC))
                assert hearing.hears(ip_address(LENT[6]).packed)
            vrrp = network(web.address[version], "224.0.0.18" if version == 4 else "ff02::12", hops=255)
            vrrp.fields["proto" if version == 4 else "nh"] = 112
            mac = "01:00:5e:00:00:12" if version == 4 else "33:33:00:00:00:12"
            say(lab, web.host, framed(vrrp / one, web.mac, mac))
            assert hearing.hears(one)
    finally:
        ip(lab, "shop/web", f"address del {LENT[version]}/{bits} dev eth0")
        ip(lab, "shop/other", f"-{version} route del {LENT[version]} dev eth0")
        ip(lab, NODE, f"-{version} route del {LENT[version]} dev {BRIDGE}")


@pytest.mark.parametrize("version", [4, 6])
def test_groups_and_broadcasts_are_delivered(bridged: Scene, version: int) -> None:
    """Multicast and broadcast packets reach a pod if policy allows it."""
    put(bridged, ANYTHING)
    web, db = web_and_db(bridged)
    many = {
        4: [("255.255.255.255", BROADCAST_MAC), ("10.1.0.255", BROADCAST_MAC), ("239.1.2.3", "01:00:5e:01:02:03")],
        6: [("ff02::1", ALL_NODES_MAC), ("ff02::fb", "33:33:00:00:00:fb")],
    }
    for destination, mac in many[version]:
        one = token()
        with ear(bridged.lab, db.host) as hearing:
            say(bridged.lab, web.host, framed(datagram(web.address[version], destination, 7000, one), web.mac, mac))
            assert hearing.hears(one), destination


def place_of(scene: Scene, mac: str) -> str | None:
    """The bridge port of a hardware address."""
    rows = json.loads(scene.lab.run(NODE, ["bridge", "-j", "fdb", "show", "br", BRIDGE]).stdout)
    return next((one["ifname"] for one in rows if one["mac"] == mac and one.get("master") == BRIDGE), None)


def test_pod_that_takes_a_neighbour_s_hardware_address_is_told_by_a_count(bridged: Scene) -> None:
    """The bridge sends the neighbour's packets to the thief, and the program drops them.

    The count and the flows name the interface.

    The neighbour's next frame ends this.
    """
    put(bridged, NARROW)
    lab, (thief, db), other = bridged.lab, web_and_db(bridged), station(bridged.lab, "other", is_bridged=True)
    attempt = Attempt(other.host, ip_address(db.address[4]), UDP_PROTOCOL, OPEN_PORT)
    assert bridged.reached(attempt) == [True]
    assert place_of(bridged, db.mac) == port_of("db")
    before, one, control = counted(bridged, "misdelivered"), token(), token()
    with ear(lab, thief.host) as listening:
        say(lab, thief.host, framed(datagram(thief.address[4], BRIDGE_ADDRESS[4], OPEN_PORT, b"x"), db.mac, BRIDGE_MAC))
        wait_for(lambda: place_of(bridged, db.mac) == port_of("web"), "the bridge has learned it")
        say(lab, other.host, framed(datagram(other.address[4], db.address[4], OPEN_PORT, one), other.mac, db.mac))
        say(
            lab,
            other.host,
            framed(datagram(other.address[4], thief.address[4], OPEN_PORT, control), other.mac, thief.mac),
        )
        assert listening.heard([one], control) == set()
    assert counted(bridged, "misdelivered") == before + 1
    flows = [
        json.loads(line)
        for line in bridged.ctl("flows", "-o", "json", "--state-dir", str(bridged.state_dir)).stdout.splitlines()
    ]
    assert any(
        (flow["reason"], flow["endpoint"], flow.get("destination_name"))
        == ("misdelivered", "Pod/shop/web", "Pod/shop/db")
        for flow in flows
    )
    assert bridged.reached(Attempt(db.host, ip_address(other.address[4]), UDP_PROTOCOL, OPEN_PORT), attempt) == [
        True,
        True,
    ]


@pytest.mark.parametrize("remedy", ["sticky", "learning off"])
def test_bridge_that_learns_nothing_from_the_thief(bridged: Scene, remedy: str) -> None:
    """An administrator can prevent this by a static entry, or by a port without learning."""
    put(bridged, NARROW)
    lab, (thief, db) = bridged.lab, web_and_db(bridged)
    lab.run(
        NODE,
        [
            "bridge",
            "fdb",
            "replace",
            db.mac,
            "dev",
            port_of("db"),
            "master",
            "static",
            *(["sticky"] if remedy == "sticky" else []),
        ],
    )
    if remedy == "learning off":
        lab.run(NODE, ["bridge", "link", "set", "dev", port_of("web"), "learning", "off"])
    try:
        one = token()
        with ear(lab, NODE, BRIDGE) as listening:
            say(
                lab,
                thief.host,
                framed(datagram(thief.address[4], BRIDGE_ADDRESS[4], OPEN_PORT, one), db.mac, BRIDGE_MAC),
            )
            assert listening.hears(one)
        assert place_of(bridged, db.mac) == port_of("db")
    finally:
        lab.run(NODE, ["bridge", "fdb", "del", db.mac, "dev", port_of("db"), "master"])
        lab.run(NODE, ["bridge", "link", "set", "dev", port_of("web"), "learning", "on"])
