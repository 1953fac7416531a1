# SPDX-License-Identifier: Apache-2.0
"""The CNI plugin on a node, after real plugins: policy is in force when ADD returns, and not before.

When a pod's interface is made, its object has no address, and often does not exist yet. The first packets to and from
the pod are sent as soon as ADD returns. Allowed packets arrive, so the interface is open; denied ones do not, so it
never was open too early.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import DEADLINE_S, NODE, Scene, lab_for, render_nodes, scene_in, wait_for
from border_scene import NODE_ADDRESS, WORLD, has_device, ip
from cni_chain import CniError, PluginList, Sandbox
from network_scene import PLUGINS_DIR

from netpol_ebpf.agent.control_socket import SOCKET_NAME, ask
from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import SETTINGS_ROUTER, Lab
from netpol_ebpf.lab.scene import INTERNET

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
ROUNDS = 1000 if os.environ.get("NETPOL_FAULTS") == "long" else 24
GROUP = 8
"""Number of pods that are added at the same time."""
TIMEOUT_S = 50
"""Time limit of an ADD in seconds. The plugin gives up, with its reason, before its caller does."""
ALLOWED, DENIED = 5432, 5433
POLICY = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: narrow, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: narrow}}}}
  policyTypes: [Ingress, Egress]
  ingress: [{{ports: [{{port: {ALLOWED}, protocol: UDP}}]}}]
  egress: [{{ports: [{{port: {ALLOWED}, protocol: UDP}}]}}]
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, uid: "{uid}", labels: {{app: narrow}}}}
spec: {{nodeName: node-1, containers: [{{name: c, image: x}}]}}
status: {{phase: Pending}}
"""
NETWORKS = {
    "bridge": {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True},
    "ptp": {"type": "ptp"},
}


def render(*sandboxes: Sandbox) -> str:
    """The pods' objects, as they are before the kubelet knows an address."""
    return "".join(POD.format(name=one.pod, uid=one.uid) for one in sandboxes)


def socket_in(namespace: str, port: int = 0) -> socket.socket:
    """A non-blocking UDP socket of a network namespace, bound to a port if given."""
    found: list[socket.socket] = []

    def make() -> None:
        with (NETNS_DIR / namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        found.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (one,) = found
    one.setblocking(False)  # noqa: FBT003 - the library's
    one.bind(("0.0.0.0", port))
    return one


def receive_all(one: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(one.recv(1000))
    return found


@dataclass
class Plugged:
    """A node whose runtime has a list of plugins that ends with ours. ``world``: sockets outside, by port."""

    scene: Scene
    plugins: PluginList
    world: dict[int, socket.socket]
    _sandboxes: list[Sandbox] = field(default_factory=list)

    @property
    def lab(self) -> Lab:
        return self.scene.lab

    def sandbox(self, pod: str) -> Sandbox:
        """Create a namespace, as a runtime does before it calls a plugin."""
        namespace = f"{self.lab.token}-shop.{pod}"
        self.lab.record(namespaces=[namespace])
        ip(self.lab, NODE, f"netns add {namespace}", f"-n {namespace} link set lo up")
        one = Sandbox(pod, namespace, secrets.token_hex(8))
        self._sandboxes.append(one)
        return one

    def remove(self) -> None:
        """Remove all pods."""
        for one in self._sandboxes:
            self.plugins.delete(one)
            ip(self.lab, NODE, f"netns del {one.namespace}")
        self._sandboxes.clear()
        self.scene.write("pods.yaml", "")
        wait_for(lambda: not self.endpoints(), "the agent has forgotten the pods")

    def endpoints(self) -> dict[str, dict[str, Any]]:
        state = self.scene.state()
        return {one["endpoint"]: one for one in state["endpoints"]}

    def configure(self, **fields: Any) -> None:
        """Change the configuration of our plugin."""
        document = json.loads(self.plugins.file.read_text())
        document["plugins"][-1] = {**document["plugins"][-1], **fields}
        self.plugins.file.write_text(json.dumps(document))


@contextlib.contextmanager
def plugged(home: Path, network: str) -> Iterator[Plugged]:
    """A node with an agent, and a runtime with a network and our plugin."""
    cluster = render_nodes("172.30.0.{}")
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(lab_for(cluster))
        lab.prober.write_settings(NODE, SETTINGS_ROUTER)
        ip(lab, INTERNET, f"route add 10.41.0.0/16 via {NODE_ADDRESS[4]} dev node0 onlink src {WORLD[4]}")
        binaries, configurations = home / "bin", home / "net.d"
        configurations.mkdir()
        subprocess.run(["make", "-s", "-C", ROOT / "cni"], check=True)
        manifests = {"cluster.yaml": cluster, "policy.yaml": POLICY}
        scene = stack.enter_context(scene_in(lab, home / "home", manifests))
        ipam = {
            "type": "host-local", "ranges": [[{"subnet": "10.41.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(home / "ipam"),
        }  # fmt: skip
        chain = {
            "cniVersion": "1.0.0", "name": "pods",
            "plugins": [
                {**NETWORKS[network], "ipam": ipam}, {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }  # fmt: skip
        file = configurations / "10-pods.conflist"
        file.write_text(json.dumps(chain))
        places = ("--dir", str(binaries), "--conf-dir", str(configurations))
        done = scene.ctl("cni", "install", *places, "--state-dir", str(scene.state_dir), "--timeout", str(TIMEOUT_S))
        assert done.returncode == 0, done.stderr
        scene.start()
        world = {port: stack.enter_context(socket_in(lab.namespace_of[INTERNET], port)) for port in (ALLOWED, DENIED)}
        found = Plugged(scene, PluginList(lab, file, [PLUGINS_DIR, binaries]), world)
        yield found
        done = scene.ctl("cni", "remove", *places)
        assert done.returncode == 0, done.stderr
        assert json.loads(file.read_text()) == chain


@pytest.fixture(scope="module", params=NETWORKS)
def lasting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugged]:
    with plugged(tmp_path_factory.mktemp("cni"), request.param) as one:
        yield one


@pytest.fixture
def node(lasting: Plugged) -> Iterator[Plugged]:
    """A node without pods."""
    before = lasting.plugins.file.read_text()
    for one in lasting.world.values():
        receive_all(one)  # removes late packets of an earlier test
    yield lasting
    lasting.plugins.file.write_text(before)
    if lasting.scene.process is None or lasting.scene.process.poll() is not None:
        lasting.scene.start()
    lasting.remove()


def test_the_first_packet_is_judged(node: Plugged, record_property: Callable[[str, object], None]) -> None:
    """As soon as ADD returns, allowed packets pass in both directions and denied ones do not, for every pod."""
    world = ip_address(WORLD[4])
    taken_ms: list[float] = []
    stray: list[bytes] = []
    for first in range(0, ROUNDS, GROUP):
        numbers = range(first, min(first + GROUP, ROUNDS))
        pods = [node.sandbox(f"p{number}") for number in numbers]
        inside = {one.pod: {port: socket_in(one.namespace, port) for port in (ALLOWED, DENIED)} for one in pods}
        # The agent applies a file some tenths of a second later, so some ADDs come before the objects and some after.
        node.scene.write("pods.yaml", render(*pods))
        for number, one in zip(numbers, pods, strict=True):
            order = (DENIED, ALLOWED) if number % 2 else (ALLOWED, DENIED)
            sockets, text = inside[one.pod], one.pod.encode()
            begun_s = time.monotonic()
            node.plugins.add(one)
            for port in order:
                sockets[port].sendto(text, (str(world), port))
                node.world[port].sendto(text, (str(one.addresses[0]), port))
            taken_ms.append((time.monotonic() - begun_s) * 1000)
            for receiver, what in ((node.world[ALLOWED], "out of"), (sockets[ALLOWED], "into")):
                assert select.select([receiver], [], [], DEADLINE_S)[0], f"nothing came {what} {one.pod}"
                assert receive_all(receiver) == [text], f"{what} {one.pod}"
        for one in inside.values():
            stray += receive_all(one[DENIED])
            for each in one.values():
                each.close()
        node.remove()
    stray += receive_all(node.world[DENIED])
    assert stray == []
    record_property("add_ms", taken_ms)
    print(
        f"{len(taken_ms)} pods; the chain took {statistics.median(taken_ms):.0f} ms (median), {max(taken_ms):.0f} ms (most)"
    )


def test_add_waits_for_the_object(node: Plugged) -> None:
    """ADD does not return before the Pod object arrives. Until then the interface is closed."""
    one = node.sandbox("late")
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(node.plugins.add(one)))
    thread.start()
    with socket_in(one.namespace) as sender:
        address = wait_for(lambda: address_of(node, one), "the pod has a way out")

        def is_denied() -> bool:
            sender.sendto(b"early", (WORLD[4], ALLOWED))
            flows = ask(node.scene.state_dir / SOCKET_NAME, {"op": "flows"})
            return any((flow.get("source"), flow["reason"]) == (address, "unknown-endpoint") for flow in flows)

        wait_for(is_denied, "what the pod sends is denied, because it is nobody yet")
        receive_all(node.world[ALLOWED])  # an interface is open until the agent has seen it
        for _ in range(10):
            sender.sendto(b"early", (WORLD[4], ALLOWED))
        assert receive_all(node.world[ALLOWED]) == []
        assert not done
        node.scene.write("pods.yaml", render(one))
        thread.join(DEADLINE_S)
        assert done
        sender.sendto(b"late", (WORLD[4], ALLOWED))
        assert select.select([node.world[ALLOWED]], [], [], DEADLINE_S)[0]
        assert receive_all(node.world[ALLOWED]) == [b"late"]
    shown = node.endpoints()["Pod/shop/late"]
    assert (shown["state"], shown["evidence"]) == ("enforced", "cni")


def address_of(node: Plugged, one: Sandbox) -> str | None:
    """The pod's address, after it has a gateway with a known hardware address, so that nothing waits for ARP."""
    routes = json.loads(node.lab.run(NODE, ["ip", "-n", one.namespace, "-j", "route"]).stdout)
    gateway = next((each["gateway"] for each in routes if each["dst"] == "default"), None)
    if gateway is None:
        return None
    (device,) = json.loads(node.lab.run(NODE, ["ip", "-n", one.namespace, "-j", "address", "show", "eth0"]).stdout)
    (address,) = (each["local"] for each in device["addr_info"] if each["family"] == "inet")
    (way,) = json.loads(node.lab.run(NODE, ["ip", "-j", "route", "get", address]).stdout)
    (link,) = json.loads(node.lab.run(NODE, ["ip", "-j", "link", "show", way["dev"]]).stdout)
    ip(
        node.lab, NODE,
        f"-n {one.namespace} neigh replace {gateway} lladdr {link['address']} dev eth0 nud permanent",
    )  # fmt: skip
    return str(address)


def ask_ifnames(node: Plugged, one: Sandbox) -> list[str]:
    """The node's ends of a pod's interfaces."""
    done = subprocess.run(["ip", "-n", one.namespace, "-j", "link"], check=True, capture_output=True, text=True)
    indexes = {each.get("link_index") for each in json.loads(done.stdout or "[]") if each["ifname"] == "eth0"}
    return [
        each["ifname"]
        for each in json.loads(node.lab.run(NODE, ["ip", "-j", "link"]).stdout)
        if each["ifindex"] in indexes
    ]


def test_the_object_catches_up(node: Plugged) -> None:
    """When the object finally has its address, nothing changes: no packet is lost, and the evidence stays the same."""
    one = node.sandbox("settled")
    node.scene.write("pods.yaml", render(one))
    node.plugins.add(one)
    (address,) = one.addresses
    node.scene.write("pods.yaml", render(one).replace("phase: Pending", f"phase: Running, podIPs: [{{ip: {address}}}]"))
    wait_for(lambda: node.scene.state()["in_force"], "all is in force")
    assert node.plugins.call_last("CHECK", one) is None
    assert node.endpoints()["Pod/shop/settled"]["evidence"] == "cni"


def test_an_object_that_never_comes(node: Plugged) -> None:
    """ADD ends with an error that states what was missing. The runtime undoes the work of the earlier plugins."""
    node.configure(timeout=1)
    one = node.sandbox("void")
    with pytest.raises(CniError) as caught:
        node.plugins.add(one)
    assert caught.value.error["code"] == 11
    assert (
        "Pod/shop/void is not under policy within 1 s: its Pod object has not arrived" in caught.value.error["details"]
    )
    assert ask_ifnames(node, one) == []


@pytest.mark.parametrize("posture", ["closed", "open"])
def test_no_agent(node: Plugged, posture: str) -> None:
    """Without an agent ADD fails, or succeeds if the configuration says so. The interface is closed, or unseen."""
    node.configure(timeout=1, posture=posture)
    one = node.sandbox("alone")
    node.scene.kill()
    if posture == "open":
        node.plugins.add(one)
        return
    with pytest.raises(CniError) as caught:
        node.plugins.add(one)
    assert caught.value.error["code"] == 11
    assert "no agent answers" in caught.value.error["details"]


def test_an_agent_that_is_late(node: Plugged) -> None:
    """An ADD without an agent waits for one, so the restart of an agent fails no pod."""
    one = node.sandbox("patient")
    node.scene.write("pods.yaml", render(one))
    node.scene.kill()
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(node.plugins.add(one)))
    thread.start()
    node.scene.start()
    thread.join(DEADLINE_S)
    assert done
    assert node.endpoints()["Pod/shop/patient"]["state"] == "enforced"


def test_the_next_agent_keeps_the_pod_open(node: Plugged) -> None:
    """The agent is killed before the object has an address. The next agent still knows the pod."""
    one = node.sandbox("kept")
    node.scene.write("pods.yaml", render(one))
    node.plugins.add(one)
    node.scene.kill()
    node.scene.start()
    assert node.plugins.call_last("CHECK", one) is None
    assert node.endpoints()["Pod/shop/kept"]["evidence"] == "cni"
    with socket_in(one.namespace) as sender:
        for port in (DENIED, ALLOWED):
            sender.sendto(b"kept", (WORLD[4], port))
        assert select.select([node.world[ALLOWED]], [], [], DEADLINE_S)[0]
    assert [receive_all(node.world[port]) for port in (ALLOWED, DENIED)] == [[b"kept"], []]


def test_without_the_plugin(node: Plugged, record_property: Callable[[str, object], None]) -> None:
    """Measure how long a pod waits for its network if ADD does not wait for policy.

    The test only asserts that it ends.
    """
    document = json.loads(node.plugins.file.read_text())
    node.plugins.file.write_text(json.dumps({**document, "plugins": document["plugins"][:-1]}))
    taken_ms: list[float] = []
    for number in range(5):
        one = node.sandbox(f"bare{number}")
        node.scene.write("pods.yaml", render(one))
        node.plugins.add(one)
        (address,) = one.addresses
        added_s = time.monotonic()
        status = f"phase: Running, podIPs: [{{ip: {address}}}]"
        node.scene.write("pods.yaml", render(one).replace("phase: Pending", status))
        with socket_in(one.namespace) as sender:
            wait_for(lambda: passes(node, sender), "the pod has its network")
        taken_ms.append((time.monotonic() - added_s) * 1000)
    record_property("closed_ms", taken_ms)
    print(
        f"without the plugin: closed for {statistics.median(taken_ms):.0f} ms (median), {max(taken_ms):.0f} ms (most)"
    )


def passes(node: Plugged, sender: socket.socket) -> bool:
    """Whether a packet of a pod that policy allows arrives outside."""
    sender.sendto(b"bare", (WORLD[4], ALLOWED))
    return bool(select.select([node.world[ALLOWED]], [], [], 0.01)[0] and receive_all(node.world[ALLOWED]))


def test_check_gc_and_status(node: Plugged) -> None:
    """CHECK reports whether policy is in force, GC does nothing, and STATUS reports whether there is an agent."""
    one = node.sandbox("checked")
    node.scene.write("pods.yaml", render(one))
    node.plugins.add(one)
    for version in ("0.4.0", "1.0.0", "1.1.0"):
        assert node.plugins.call_last("CHECK", one, version=version) is None
    assert node.plugins.call_last("GC", one, version="1.1.0", **{"cni.dev/valid-attachments": []}) is None
    assert node.plugins.call_last("STATUS", one, version="1.1.0") is None
    node.scene.write("pods.yaml", "")
    wait_for(lambda: not node.endpoints(), "the pod is forgotten")
    with pytest.raises(CniError) as caught:
        node.plugins.call_last("CHECK", one, timeout=1)
    assert caught.value.error["code"] == 11
    node.scene.kill()
    with pytest.raises(CniError) as caught:
        node.plugins.call_last("STATUS", one, version="1.1.0")
    assert caught.value.error["code"] == 50


def test_another_namespace(node: Plugged, record_property: Callable[[str, object], None]) -> None:
    """A wrong namespace path, a missing interface, and an interface without a peer are errors in any posture."""
    node.configure(posture="open")
    one = node.sandbox("other")
    node.scene.write("pods.yaml", render(one))
    node.plugins.add(one)
    for namespace in ("/dev/null", "/proc/self/ns/mnt", f"{NETNS_DIR}/{node.lab.token}-none"):
        with pytest.raises(CniError) as caught:
            node.plugins.call_last("CHECK", Sandbox(one.pod, namespace, one.uid, one.container, one.result))
        assert caught.value.error["code"] == 3
    ip(node.lab, NODE, f"-n {one.namespace} link set eth0 down", f"-n {one.namespace} link set eth0 name eth9")
    with pytest.raises(CniError) as caught:
        node.plugins.call_last("CHECK", one)
    assert (caught.value.error["code"], caught.value.error["details"]) == (3, "eth0")
    made = {
        "bridge": [f"-n {one.namespace} link add eth0 type bridge"],
        "macvlan": ["link add link eth0 name sole0 type macvlan", f"link set sole0 netns {one.namespace} name eth0"],
    }
    kinds = [kind for kind in made if has_device(node.lab, kind, below="eth0" if kind == "macvlan" else "")]
    record_property("kinds", ", ".join(kinds))
    for kind in kinds:
        ip(node.lab, NODE, *made[kind])
        with pytest.raises(CniError) as caught:
            node.plugins.call_last("CHECK", one, posture="closed")
        assert caught.value.error["code"] == 100, kind
        ip(node.lab, NODE, f"-n {one.namespace} link del eth0")
