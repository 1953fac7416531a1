# SPDX-License-Identifier: Apache-2.0
"""The second barrier: it drops packets of a workload that bypass its program, and no others.

The attack is a real one: frames that wait in the queue of an ifb while the classifier is removed bypass the node's TC
hook.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, POD, Scene, wait_for
from border_scene import (
    BRIDGE,
    BRIDGE_ADDRESS,
    NODE_ADDRESS,
    OPEN_PORT,
    PODS,
    WORLD,
    Station,
    address_of,
    border,
    datagram,
    ear,
    framed,
    gets,
    inside,
    ip,
    port_of,
    put,
    say,
    station,
    token,
    track_connections,
    udp_socket,
)
from scapy.packet import Packet

from netpol_ebpf.lab.attempt import Attempt, Reachability
from netpol_ebpf.lab.laboratory import SETTINGS_ALL, Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import ICMP, ICMPV6, PARENT_MAC, UDP, Listen
from netpol_ebpf.lab.topology import TCP as TCP_NUMBER
from netpol_loader.kernel import syscall

pytestmark = pytest.mark.netns

CLOSED = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
"""
"""A policy by which the attacker's pod may send and receive nothing. The other pods are open."""
FRAMES = 12
"""Number of frames. The first ones fit into the queue's bucket and take the normal path."""
PATTERN = "cali*"
MARKS = {"seen": "0x20", "node": "0x40", "due": "0x10"}


@pytest.fixture(scope="module", params=["routed", "bridged"])
def lasting_scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    home = tmp_path_factory.mktemp("barrier")
    with border(home, is_bridged=request.param == "bridged") as one:
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """An agent with the default settings of the barrier, and one closed pod."""
    scene = lasting_scene
    if scene.options:
        scene.stop()
        scene.options = ()
    if scene.process is None or scene.process.poll() is not None:
        scene.start()
    put(scene, CLOSED)
    wait_for(lambda: scene.state()["barrier"]["installed"], "the barrier is in force")
    return scene


def is_bridged(scene: Scene) -> bool:
    return scene.lab.run(NODE, ["ip", "link", "show", BRIDGE], check=False).returncode == 0


def attacker(scene: Scene) -> Station:
    return station(scene.lab, "web", is_bridged=is_bridged(scene))


def hop_to(scene: Scene, me: Station) -> str:
    """The hardware address of the next hop to the database's pod."""
    return station(scene.lab, "db").mac if is_bridged(scene) else me.hop


def ruleset(lab: Lab) -> dict[tuple[str, str], dict[str, Any]]:
    """The node's tables by family and name, with the names of their chains."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in json.loads(lab.run(NODE, ["nft", "-j", "list", "ruleset"]).stdout)["nftables"]:
        if "table" in one:
            found[one["table"]["family"], one["table"]["name"]] = {**one["table"], "chains": set()}
        elif "chain" in one:
            found[one["chain"]["family"], one["chain"]["table"]]["chains"].add(one["chain"]["name"])
    return found


def unsigned(scene: Scene) -> int:
    """The number of packets that were dropped without the sign."""
    return sum(scene.state()["barrier"]["packets"].get("unsigned", {}).values())


def skip_the_hook(lab: Lab, host: str, frames: list[Packet]) -> None:
    """Send frames so that they bypass the TC hook at the other end of the pod's link, as root in the pod can."""
    ip(lab, host, "link add ifb0 type ifb", "link set ifb0 up")
    tc = [
        "tc",
        "filter",
        "add",
        "dev",
        "eth0",
        "egress",
        "protocol",
        "all",
        "prio",
        "1",
        "u32",
        "match",
        "u32",
        "0",
        "0",
    ]
    try:
        lab.run(
            host, ["tc", "qdisc", "add", "dev", "ifb0", "root", "tbf", "rate", "4kbit", "burst", "300", "limit", "100k"]
        )
        lab.run(host, ["tc", "qdisc", "add", "dev", "eth0", "clsact"])
        lab.run(host, [*tc, "action", "mirred", "egress", "redirect", "dev", "ifb0"])
        say(lab, host, *frames)
        lab.run(host, ["tc", "qdisc", "del", "dev", "eth0", "clsact"])  # while the frames wait in the queue
        wait_for(lambda: _is_empty(lab, host), "the queue is empty")
    finally:
        lab.run(host, ["tc", "qdisc", "del", "dev", "eth0", "clsact"], check=False)
        ip(lab, host, "link del ifb0")


def _is_empty(lab: Lab, host: str) -> bool:
    (queue,) = json.loads(lab.run(host, ["tc", "-j", "-s", "qdisc", "show", "dev", "ifb0"]).stdout)
    return int(queue["qlen"]) == 0


def attack(scene: Scene, version: int) -> dict[str, int]:
    """The frames that bypass the hook and arrive at a pod, at the node and outside."""
    lab, me = scene.lab, attacker(scene)
    sign = token()
    ways = {
        "pod": (address_of("db", version), hop_to(scene, me)),
        "node": (NODE_ADDRESS[version], me.hop),
        "outside": (WORLD[version], me.hop),
    }
    frames = [
        framed(datagram(me.address[version], address, 7000, sign + bytes([place, at])), me.mac, hop)
        for at in range(FRAMES)
        for place, (address, hop) in enumerate(ways.values())
    ]
    with ear(lab, "shop/db") as pod, udp_socket(lab, NODE, version, 7000) as node, ear(lab, INTERNET) as outside:
        skip_the_hook(lab, "shop/web", frames)
        received = 0
        while gets(node, sign, 0.5):
            received += 1
        pod.hears(b"never", 0.5)
        outside.hears(b"never", 0.5)
        heard = {
            name: sum(sign + bytes([place]) in frame for frame in one.frames)
            for place, (name, one) in enumerate([("pod", pod), ("", pod), ("outside", outside)])
            if name
        }
    return {**heard, "node": received}


@pytest.mark.parametrize("version", [4, 6])
def test_what_skips_the_hook_is_dropped_and_told(scene: Scene, version: int) -> None:
    """Frames that no program saw reach no pod, no process of the node and no host outside.

    The pod's interface is named.
    """
    before = unsigned(scene)
    assert attack(scene, version) == {"pod": 0, "node": 0, "outside": 0}
    assert unsigned(scene) >= before + FRAMES
    state = scene.await_status(
        lambda state: any(one["slug"] == "unsigned" for one in state["problems"]), "the status tells of it"
    )
    (told,) = [one["message"] for one in state["problems"] if one["slug"] == "unsigned"]
    assert port_of("web") in told
    assert state["in_force"]
    assert state["barrier"]["unsigned"][port_of("web")] >= FRAMES


def test_off_leaves_out_what_closes_and_nothing_else(scene: Scene) -> None:
    """With `--barrier off` the same frames arrive.

    The tables still mark the node's own packets, and status reports this.
    """
    scene.stop()
    scene.options = ("--barrier", "off")
    state = scene.start()
    tables = ruleset(scene.lab)
    assert tables["inet", "np_barrier"]["chains"] == {"input", "output"}
    assert ("bridge", "np_barrier") not in tables
    assert state["barrier"]["mode"] == "off"
    assert any("--barrier off" in one for one in state["barrier"]["open"])
    assert state["barrier"]["marks"] == {**MARKS, "seen": "0x0"}
    for version in (4, 6):
        arrived = attack(scene, version)
        assert min(arrived.values()) > 0, arrived


# --- what is not to be dropped ------------------------------------------------------------------------------------------


def traffic(scene: Scene, version: int) -> list[Attempt]:
    """Connections between pods, the node and outside, as many as policy allows."""
    db, echo = ip_address(address_of("db", version)), ICMP if version == 4 else ICMPV6
    node, world = ip_address(NODE_ADDRESS[version]), ip_address(WORLD[version])
    sources = ["shop/other", NODE, INTERNET]
    if not is_bridged(scene):  # on a bridge, the other node's pod would be on the link by its address
        sources.append("shop/far")
    return [
        *(Attempt(source, db, TCP_NUMBER, 5432) for source in sources),
        *(Attempt(source, db, UDP, OPEN_PORT) for source in sources),
        *(Attempt(source, db, echo, 0) for source in sources),
        Attempt("shop/other", node, echo, 0),
        Attempt("shop/other", world, echo, 0),
    ]


def everything(scene: Scene) -> list[Attempt]:
    """The connections of both families."""
    return traffic(scene, 4) + traffic(scene, 6)


def assert_that_everything_passes(scene: Scene) -> None:
    """Check that each attempt is answered. The error names the failed ones."""
    results = scene.lab.attempt(everything(scene))
    assert [str(one) for one in results if not one.reached] == []


def echoes_large(scene: Scene, version: int) -> bool:
    """Whether a datagram that needs fragments comes back in fragments."""
    whole = token() + bytes(3000)
    with udp_socket(scene.lab, "shop/other", version) as sock:
        sock.sendto(whole, (address_of("db", version), OPEN_PORT))
        return gets(sock, whole)


def test_everything_else_goes_on(scene: Scene) -> None:
    """Pods, the node and outside communicate, whole and in fragments, with and without connection tracking."""
    before = scene.state()["barrier"]["unsigned"]
    assert_that_everything_passes(scene)
    refused = [Attempt("shop/other", ip_address(NODE_ADDRESS[version]), TCP_NUMBER, 9) for version in (4, 6)]
    assert [one.outcome for one in scene.lab.attempt(refused)] == [Reachability.REFUSED] * 2
    for version in (4, 6):
        assert echoes_large(scene, version)
    track_connections(scene.lab, scene.home)
    try:
        for version in (4, 6):
            assert echoes_large(scene, version)
        if is_bridged(scene):  # the bridge also passes its packets to netfilter's IP hooks
            settings = [f"bridge/bridge-nf-call-{table}" for table in ("iptables", "ip6tables")]
            scene.lab.prober.write_settings(NODE, [(one, "1") for one in settings])
            assert_that_everything_passes(scene)
            for version in (4, 6):
                assert echoes_large(scene, version)
            scene.lab.prober.write_settings(NODE, [(one, "0") for one in settings])
    finally:
        scene.lab.run(NODE, ["nft", "delete", "table", "inet", "track"])
    assert scene.state()["barrier"]["unsigned"] == before


def test_the_nodes_own_packets_reach_closed_pods(scene: Scene) -> None:
    """Packets from the node arrive at a pod that may receive nothing.

    This includes packets that a bridge floods, which have lost their socket.
    """
    lab = scene.lab
    put(scene, CLOSED.replace("{matchLabels: {app: web}}", "{}"))
    wait_for(
        lambda: scene.reached(Attempt("shop/other", ip_address(address_of("db")), UDP, OPEN_PORT)) == [False], "closed"
    )
    for version in (4, 6):
        with ear(lab, "shop/web") as pod, udp_socket(lab, NODE, version) as sock:
            wanted = token()
            sock.sendto(wanted, (address_of("web", version), 7000))
            assert pod.hears(wanted)
    if is_bridged(scene):
        assert len(flooded(scene)) == 3


def flooded(scene: Scene) -> set[str]:
    """The pods that a broadcast of the node reaches."""
    with contextlib.ExitStack() as stack:
        names = ("web", "db", "other")
        ears = {name: stack.enter_context(ear(scene.lab, f"shop/{name}")) for name in names}
        sock = stack.enter_context(udp_socket(scene.lab, NODE, 4))
        wanted = token()
        sock.sendto(wanted, ("10.1.0.255", 7000))
        return {name for name, one in ears.items() if one.hears(wanted, 2.0)}


# --- the hook that is not there -----------------------------------------------------------------------------------------


def arrives(scene: Scene, version: int, send: Callable[[Lab, str, list[Packet]], None]) -> set[str]:
    """The places at which frames of the attacker's pod arrive."""
    lab, me, sign = scene.lab, attacker(scene), token()
    ways = [(address_of("db", version), hop_to(scene, me)), (NODE_ADDRESS[version], me.hop), (WORLD[version], me.hop)]
    frames = [framed(datagram(me.address[version], address, 7000, sign), me.mac, hop) for address, hop in ways]
    with ear(lab, "shop/db") as pod, udp_socket(lab, NODE, version, 7000) as node, ear(lab, INTERNET) as outside:
        send(lab, "shop/web", frames)
        found = {"node"} if gets(node, sign, 1.0) else set()
        return found | {name for name, one in (("pod", pod), ("outside", outside)) if one.hears(sign, 1.0)}


def say_all(lab: Lab, host: str, frames: list[Packet]) -> None:
    say(lab, host, *frames)


def take_off(scene: Scene, interface: str) -> None:
    """Remove the ingress program from an interface, as a process with access to the pins can."""
    pins = list(scene.pin_root.glob(f"v*/links/{ifindex_of(scene, interface)}_in"))
    if not pins:  # the kernel has no tcx
        scene.lab.run(NODE, ["tc", "filter", "del", "dev", interface, "ingress", "prio", "1"])
    for pin in pins:
        fd = syscall.obj_get(pin)
        syscall.link_detach(fd)
        os.close(fd)


def ifindex_of(scene: Scene, interface: str) -> int:
    """The index of an interface of the node."""
    (link,) = json.loads(scene.lab.run(NODE, ["ip", "-j", "link", "show", interface]).stdout)
    return int(link["ifindex"])


def test_an_interface_that_lost_its_program_is_closed(scene: Scene) -> None:
    """Without an agent nothing passes. With an agent the program is restored, and other pods are not disturbed."""
    scene.kill()
    take_off(scene, port_of("web"))
    for version in (4, 6):
        assert arrives(scene, version, say_all) == set()
    take_off(scene, port_of("other"))
    assert scene.reached(Attempt("shop/other", ip_address(address_of("db")), TCP_NUMBER, 5432)) == [False]
    spared = [one for one in everything(scene) if one.source != "shop/other"]
    assert scene.reached(*spared) == [True] * len(spared)
    scene.start()
    wait_for(lambda: all(scene.reached(*everything(scene))), "the program is put back")
    assert arrives(scene, 4, say_all) == set()


NEW_ADDRESS = {4: "10.1.0.8", 6: "fd00:1::8"}


def plug_in(scene: Scene) -> None:
    """Add a pod as a container network does."""
    lab, namespace, port = scene.lab, f"{scene.lab.token}-new", "calinew"
    lab.record(namespaces=[namespace])
    lab.namespace_of["shop/new"] = namespace
    ip(
        lab,
        NODE,
        f"netns add {namespace}",
        f"link add {port} address {PARENT_MAC} type veth peer name eth0 netns {namespace}",
    )
    lab.prober.write_settings("shop/new", SETTINGS_ALL)
    ip(lab, "shop/new", "link set lo up", "link set eth0 up")
    for version, address in NEW_ADDRESS.items():
        back = f"-{version} route replace {address} via {NODE_ADDRESS[version]} dev node0 onlink src {WORLD[version]}"
        ip(lab, INTERNET, back)
    if is_bridged(scene):
        ip(lab, NODE, f"link set {port} address 02:00:00:00:01:08 master {BRIDGE} up")
        ip(
            lab, "shop/new", f"address add {NEW_ADDRESS[4]}/24 dev eth0", f"address add {NEW_ADDRESS[6]}/64 dev eth0 nodad",
            f"-4 route add default via {BRIDGE_ADDRESS[4]}", f"-6 route add default via {BRIDGE_ADDRESS[6]}",
        )  # fmt: skip
        return
    ip(
        lab, NODE, f"link set {port} up", f"address add 169.254.1.1/32 dev {port} scope link",
        f"address add fe80::1/64 dev {port} scope link nodad",
        f"-4 route add {NEW_ADDRESS[4]}/32 dev {port} src {NODE_ADDRESS[4]}",
        f"-6 route add {NEW_ADDRESS[6]}/128 dev {port} src {NODE_ADDRESS[6]}",
    )  # fmt: skip
    ip(
        lab, "shop/new", f"address add {NEW_ADDRESS[4]}/32 dev eth0", f"address add {NEW_ADDRESS[6]}/128 dev eth0 nodad",
        "-4 route add default via 169.254.1.1 dev eth0 onlink", "-6 route add default via fe80::1 dev eth0",
    )  # fmt: skip


def test_an_interface_that_is_born_while_no_agent_runs_is_closed(scene: Scene) -> None:
    """It is closed in both directions, except for packets of the node itself.

    Other pods continue. The next agent opens it.
    """
    scene.stop()
    scene.options = ("--barrier-interfaces", PATTERN)
    scene.start()
    lab = scene.lab
    put(scene, CLOSED, cluster=PODS + POD.format(name="new", node=NODE, last=8))
    assert_that_everything_passes(scene)
    scene.kill()
    plug_in(scene)
    try:
        outwards = [
            Attempt("shop/new", ip_address(address), protocol, port)
            for version in (4, 6)
            for address, protocol, port in (
                (address_of("db", version), TCP_NUMBER, 5432),
                (NODE_ADDRESS[version], ICMP if version == 4 else ICMPV6, 0),
                (WORLD[version], ICMP if version == 4 else ICMPV6, 0),
            )
        ]
        inwards = [
            Attempt("shop/other", ip_address(NEW_ADDRESS[version]), ICMP if version == 4 else ICMPV6, 0)
            for version in (4, 6)
        ]
        with ear(lab, "shop/new") as pod, udp_socket(lab, "shop/other", 4) as other, udp_socket(lab, NODE, 4) as node:
            assert scene.reached(*outwards, *inwards) == [False] * 8
            stranger, own = token(), token()
            other.sendto(stranger, (NEW_ADDRESS[4], 7000))
            node.sendto(own, (NEW_ADDRESS[4], 7000))
            if not is_bridged(scene):  # on a bridge, the answer to the node's ARP request is dropped
                assert pod.hears(own)
            assert not pod.hears(stranger, 0.5)
        assert_that_everything_passes(scene)
        state = scene.start()
        assert state["barrier"]["patterns"] == [PATTERN]
        assert not any("born" in one for one in state["barrier"]["open"])
        wait_for(lambda: scene.reached(*outwards, *inwards) == [True] * 8, "the next agent opens it")
    finally:
        ip(lab, NODE, "link del calinew", f"netns del {lab.namespace_of.pop('shop/new')}")


# --- the life of the tables ---------------------------------------------------------------------------------------------


def test_agents_come_and_go(scene: Scene) -> None:
    """The end and the start of agents disturb no connection.

    While one lives, nobody can flush the tables. Counters stay.
    """
    lab = scene.lab
    held = lab.prober.hold(Attempt("shop/other", ip_address(address_of("db", 6)), TCP_NUMBER, 5432))
    assert held is not None
    assert arrives(scene, 4, say_all) == set()
    before = ruleset(lab)
    lab.run(NODE, ["nft", "flush", "ruleset"])
    if scene.state()["barrier"]["held"]:
        assert ruleset(lab).keys() == before.keys()
    wait_for(lambda: ruleset(lab).keys() == before.keys(), "what was flushed is put back")
    dropped = unsigned(scene)
    for end in (scene.kill, scene.stop):
        end()
        assert ruleset(lab).keys() == before.keys()
        assert held.exchange(5.0)
        assert_that_everything_passes(scene)
        state = scene.start()
        assert state["barrier"]["installed"]
        assert unsigned(scene) == dropped
        assert held.exchange(5.0)
    scene.kill()
    lab.run(NODE, ["nft", "flush", "ruleset"])  # no process owns the tables now
    assert ruleset(lab) == {}
    assert held.exchange(5.0)
    scene.start()
    assert ruleset(lab).keys() == before.keys()
    assert held.exchange(5.0)
    held.close()


def test_other_marks_take_over_without_a_gap(scene: Scene) -> None:
    """An agent with other bits changes to them under traffic.

    Packets with the older sign are accepted as long as they come.
    """
    marks = "0x100000,0x200000,0x400000"
    held = scene.lab.prober.hold(Attempt("shop/other", ip_address(address_of("db")), TCP_NUMBER, 5432))
    assert held is not None
    before = scene.state()["barrier"]["unsigned"]
    for options in (("--barrier-marks", marks), ()):
        scene.stop()
        scene.options = options
        scene.launch()
        while scene.status() is None:
            assert held.exchange(5.0)
        state = scene.state()
        assert ",".join(state["barrier"]["marks"].values()) == (marks if options else ",".join(MARKS.values()))
        assert state["barrier"]["unsigned"] == before
        assert_that_everything_passes(scene)
    held.close()


def test_tables_of_others_are_left_alone_and_told(scene: Scene) -> None:
    """A table of our name with another owner stays, and status reports what is open.

    When it is gone, ours replaces it.
    """
    lab = scene.lab
    scene.stop()
    for family in ("inet", "bridge"):
        lab.run(NODE, ["nft", "delete", "table", family, "np_barrier"])
    lab.run(NODE, ["nft", 'add table inet np_barrier { comment "mine" ; }'])
    state = scene.start()
    told = [one["message"] for one in state["problems"] if one["slug"] == "barrier"]
    assert len(told) == 1
    assert "mine" in told[0]
    assert state["in_force"]
    assert not state["barrier"]["installed"]
    assert ruleset(lab)["inet", "np_barrier"]["chains"] == set()
    assert_that_everything_passes(scene)
    if is_bridged(scene):  # without the mark, the sender of some packets is unknown
        put(scene, CLOSED.replace("{matchLabels: {app: web}}", "{}"))
        assert len(flooded(scene)) < 3
    lab.run(NODE, ["nft", "delete", "table", "inet", "np_barrier"])
    scene.await_status(lambda state: state["barrier"]["installed"] and not state["problems"], "it is tried again")
    assert ruleset(lab)["inet", "np_barrier"]["chains"] == {"prerouting", "input", "output"}


def test_two_agents_do_not_fight(scene: Scene, tmp_path: Path) -> None:
    """A second agent, with pins of its own, reports who owns the barrier.

    Its cleanup leaves the barrier to the first agent.
    """
    second = Scene(scene.lab, tmp_path / "second", scene.pin_root.parent / "second")
    second.manifests.mkdir(parents=True)
    second.write("cluster.yaml", PODS)
    before = ruleset(scene.lab)
    try:
        state = second.start()
        assert [one["slug"] for one in state["problems"] if one["slug"] == "barrier"] == ["barrier"]
        assert ruleset(scene.lab) == before
        if any(scene.pin_root.glob("v*/links/*_in")):  # without tcx, a hook has only one place for our filter
            assert_that_everything_passes(scene)
    finally:
        second.retire()
    assert ruleset(scene.lab) == before
    assert scene.state()["barrier"]["installed"]


@contextlib.contextmanager
def wiping_program(scene: Scene, interface: str, kind: str) -> Iterator[str]:
    """Another program after ours that zeroes the mark of incoming packets. Yields its name in the status."""
    code = ((0xB7, 0x02, 0, 0), (0x63, 0x21, 8, 0), (0xB7, 0x00, 0, -1), (0x95, 0, 0, 0))  # mark = 0, go on
    fd, number = syscall.prog_load(b"".join(struct.pack("=BBhi", *one) for one in code)), ifindex_of(scene, interface)
    try:
        if kind == "tcx":
            try:
                hook = inside(scene.lab, NODE, lambda: syscall.link_create(fd, number, syscall.TCX_INGRESS))
            except OSError as error:
                pytest.skip(f"this kernel has no tcx (6.6): {error}")
            try:
                yield f"tcx program {syscall.prog_info(fd).id}"
            finally:
                os.close(hook)
            return
        pin = scene.pin_root.parent / "wiping"
        syscall.obj_pin(fd, pin)
        tc = ["tc", "filter", "add", "dev", interface, "ingress", "prio", "50", "handle", "1"]
        try:
            scene.lab.run(NODE, ["tc", "qdisc", "add", "dev", interface, "clsact"], check=False)
            scene.lab.run(NODE, [*tc, "bpf", "direct-action", "object-pinned", str(pin)])
            yield "filter "
            scene.lab.run(NODE, ["tc", "filter", "del", "dev", interface, "ingress", "prio", "50"])
        finally:
            pin.unlink()
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["tcx", "clsact"])
def test_a_program_that_wipes_the_sign_is_named(scene: Scene, kind: str) -> None:
    """After our program, it cuts the pod off. Status names the interface, and the other program on that hook."""
    attempt = Attempt("shop/other", ip_address(address_of("db")), TCP_NUMBER, 5432)
    with wiping_program(scene, port_of("other"), kind) as named:
        assert scene.reached(attempt) == [False]
        scene.await_status(
            lambda state: any(
                named in one["message"] and port_of("other") in one["message"]
                for one in state["problems"]
                if one["slug"] == "unsigned"
            ),
            "it is named",
        )
    scene.await_reached(attempt, expected=True)


def test_cleanup_leaves_no_table(scene: Scene) -> None:
    """Cleanup lists the tables first and does not change them in a dry run.

    Afterwards packets pass as without an agent.
    """
    lab = scene.lab
    scene.stop()
    dry = scene.cleanup("--dry-run")
    assert dry.stdout.splitlines()[:2] == ["would remove table inet np_barrier", "would remove table bridge np_barrier"]
    assert ("inet", "np_barrier") in ruleset(lab)
    assert scene.cleanup().returncode == 0
    assert ruleset(lab) == {}
    assert arrives(scene, 4, say_all) == {"pod", "node", "outside"}


# --- deferred verdicts --------------------------------------------------------------------------------------------------

SERVICE = {4: "10.96.0.50", 6: "fd00:96::50"}
SERVICE_MANIFESTS = f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: cache, namespace: shop}}
spec:
  clusterIPs: [{SERVICE[4]}, "{SERVICE[6]}"]
  externalIPs: [10.96.0.51]
  ports:
  - {{name: t, port: 80, targetPort: 5432}}
  - {{name: u, protocol: UDP, port: 80, targetPort: 5353}}
"""
TO_DB = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: other, namespace: shop}
spec:
  podSelector: {matchLabels: {app: other}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: db}}}]
"""
TO_SERVICE = f"""\
{TO_DB}\
  - to: [{{ipBlock: {{cidr: 10.96.0.50/31}}}}, {{ipBlock: {{cidr: "{SERVICE[6]}/128"}}}}]
    ports: [{{port: 80}}, {{port: 80, protocol: UDP}}]
"""


def test_a_deferred_packet_reaches_no_process_that_its_sender_may_not_reach(scene: Scene) -> None:
    """A service's address is bound on the node's loopback, or redirected there.

    Only a policy that allows the address opens it.
    """
    lab = scene.lab
    ip(lab, NODE, f"address add {SERVICE[4]}/32 dev lo", f"address add {SERVICE[6]}/128 dev lo nodad")
    lab.prober.listen(
        NODE, [ip_address(SERVICE[version]) for version in (4, 6)], [Listen(TCP_NUMBER, 80), Listen(UDP, 80)]
    )
    lab.prober.listen(NODE, [ip_address("0.0.0.0")], [Listen(TCP_NUMBER, 8080)])
    try:
        for options in ((), ("--barrier", "off")):  # this drop does not depend on the barrier
            if options:
                scene.stop()
                scene.options = options
                scene.start()
            check_deferred(scene)
    finally:
        for version in (4, 6):
            ip(lab, NODE, f"address del {SERVICE[version]} dev lo")
        put(scene, CLOSED)


def dropped_as_due(scene: Scene) -> int:
    """The number of deferred packets that did not reach processes of the node because of the due mark."""
    return sum(scene.state()["barrier"]["packets"]["due"].values())


def check_deferred(scene: Scene) -> None:
    """Check an address that is bound on the loopback (both protocols, both families), then a redirected one."""
    lab, before = scene.lab, dropped_as_due(scene)
    bound = [
        Attempt("shop/other", ip_address(SERVICE[version]), protocol, 80)
        for version in (4, 6)
        for protocol in (TCP_NUMBER, UDP)
    ]
    put(scene, TO_DB, cluster=PODS + SERVICE_MANIFESTS)
    wait_for(lambda: scene.reached(*bound) == [False] * 4, "policy does not allow it")
    assert dropped_as_due(scene) >= before + 4
    put(scene, TO_SERVICE, cluster=PODS + SERVICE_MANIFESTS)
    wait_for(lambda: scene.reached(*bound) == [True] * 4, "policy allows it")
    rules = (
        "add table ip turn; add chain ip turn pre { type nat hook prerouting priority -100 ; }; "
        "add rule ip turn pre ip daddr 10.96.0.51 tcp dport 80 redirect to :8080"
    )
    lab.run(NODE, ["nft", rules])
    redirected = Attempt("shop/other", ip_address("10.96.0.51"), TCP_NUMBER, 80)
    try:
        scene.await_reached(redirected, expected=True)
        put(scene, TO_DB, cluster=PODS + SERVICE_MANIFESTS)
        scene.await_reached(redirected, expected=False)
    finally:
        lab.run(NODE, ["nft", "delete", "table", "ip", "turn"])
