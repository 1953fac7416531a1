# SPDX-License-Identifier: Apache-2.0
"""A virtual machine behind a tap. The test acts as the machine: it writes frames and answers for its address."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import frames
from agent_scene import CLUSTER, NODE, Scene, lab_for, scene_in, wait_for
from border_scene import inside

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import PARENT_MAC, UDP, IPAddress, Listen

pytestmark = pytest.mark.netns

TAP = "vnet7"
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
MACHINE_MAC = frames.mac("02:00:00:00:00:07")
MACHINE: dict[int, IPAddress] = {4: ip_address("10.1.0.7"), 6: ip_address("fd00:1::7")}
WEB: dict[int, IPAddress] = {4: ip_address("10.1.0.1"), 6: ip_address("fd00:1::1")}
OTHER: dict[int, IPAddress] = {4: ip_address("10.1.0.3"), 6: ip_address("fd00:1::3")}
PORT = 5353

WORKLOAD = f"""\
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {{name: vm, namespace: shop, labels: {{app: vm}}}}
spec:
  node: node-1
  orchestrator: vms
  workload: vm
  endpoint: eth0
  interfaceName: {TAP}
  ipNetworks: [10.1.0.7/32, "fd00:1::7/128"]
  profiles: [kns.shop]
"""
ONLY_WEB = """\
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: vm, namespace: shop}
spec:
  selector: app == 'vm'
  types: [Ingress, Egress]
  ingress: [{action: Allow, protocol: UDP, source: {selector: app == 'web'}}]
  egress: [{action: Allow, protocol: UDP, destination: {selector: app == 'web', ports: [5353]}}]
"""


class Machine:
    """The machine's side of a tap: sends and receives frames, and answers requests for its addresses."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, frame: bytes) -> None:
        """Send a frame."""
        os.write(self._fd, frame)

    def send(self, destination: IPAddress, payload: bytes, *, source: IPAddress | None = None) -> None:
        """Send a datagram to the gateway for a destination."""
        packet = frames.udp(source or MACHINE[destination.version], destination, (4000, PORT), payload)
        self.write(frames.frame_of(packet, MACHINE_MAC, frames.mac(PARENT_MAC)))

    def receive(self, seconds: float) -> list[frames.Datagram]:
        """The datagrams for the machine until there is a pause."""
        found = []
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._fd], [], [], left)[0]:
                break
            frame = os.read(self._fd, 65536)
            self._answer(frame)
            datagram = frames.read_udp(frame)
            if datagram is not None and datagram.destination in MACHINE.values():
                found.append(datagram)
        return found

    def _answer(self, frame: bytes) -> None:
        asked = frames.asks_for(frame)
        if asked is None or asked[0] not in MACHINE.values():
            return
        address, hardware, asker = asked
        if isinstance(address, IPv4Address) and isinstance(asker, IPv4Address):
            self.write(frames.arp(frames.ARP_REPLY, (MACHINE_MAC, address), (hardware, asker)))
        elif isinstance(address, IPv6Address) and isinstance(asker, IPv6Address):
            self.write(frames.advertisement(MACHINE_MAC, address, (hardware, asker)))

    def asks(self, destination: IPAddress, payload: bytes, *, source: IPAddress | None = None) -> bool:
        """Whether the echo of a datagram comes back."""
        self.send(destination, payload, source=source)
        return payload in [one.payload for one in self.receive(0.4)]


def open_tap() -> int:
    """A new tap. The kernel removes it when its descriptor is closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), IFF_TAP | IFF_NO_PI))
    return fd


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for() as one:
        for name, addresses in (("web", WEB), ("other", OTHER)):
            one.prober.listen(f"shop/{name}", addresses.values(), [Listen(UDP, PORT)])
        yield one


@pytest.fixture(scope="module")
def machine(lab: Lab) -> Iterator[Machine]:
    """A tap of the node, with routes to the machine's addresses."""
    fd = inside(lab, NODE, open_tap)
    lines = [
        f"link set {TAP} address {PARENT_MAC} addrgenmode none",
        f"link set {TAP} up",
        f"address add fe80::1/64 dev {TAP} scope link nodad",
        *(f"route add {address} dev {TAP}" for address in MACHINE.values()),
    ]
    for line in lines:
        lab.run(NODE, ["ip", *line.split()])
    yield Machine(fd)
    os.close(fd)


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    assert machine.asks(WEB[4], b"before the agent")
    with scene_in(lab, tmp_path_factory.mktemp("taps") / "home", {"cluster.yaml": CLUSTER}) as one:
        one.start()
        yield one


def closed(scene: Scene) -> None:
    """Wait until the tap has no endpoint and is closed."""
    scene.await_status(
        lambda state: state["in_force"] and not any("vm" in one["endpoint"] for one in state["endpoints"]),
        "nobody's",
    )


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    for name in ("vm.yaml", "policy.yaml"):
        (lasting_scene.manifests / name).unlink(missing_ok=True)
    closed(lasting_scene)
    return lasting_scene


def enforce(scene: Scene, *policies: str) -> None:
    """Make the machine a workload with these policies."""
    scene.write("policy.yaml", "---\n".join(policies))
    scene.write("vm.yaml", WORKLOAD)
    scene.await_status(
        lambda state: (
            state["in_force"]
            and state["objects"]["policies"] == len(policies)
            and any("vm" in one["endpoint"] and one["state"] == "enforced" for one in state["endpoints"])
        ),
        "the machine is a workload",
    )


def counted(scene: Scene, reason: str) -> int:
    """The number of packets counted under a reason."""
    return int(scene.state()["packets"].get(reason, 0))


def test_tap_is_closed_until_an_endpoint_names_it(scene: Scene, machine: Machine) -> None:
    """A tap without an endpoint passes nothing.

    With a WorkloadEndpoint and no policy it passes everything, in both families.
    """
    assert scene.attached()[TAP] == {"ingress", "egress"}
    before = counted(scene, "unknown-endpoint")
    assert not machine.asks(WEB[4], b"closed")
    assert counted(scene, "unknown-endpoint") > before
    enforce(scene)
    wait_for(lambda: machine.asks(WEB[4], b"open"), "IPv4 is open")
    wait_for(lambda: machine.asks(WEB[6], b"open"), "IPv6 is open")
    (scene.manifests / "vm.yaml").unlink()
    closed(scene)
    wait_for(lambda: not machine.asks(WEB[4], b"closed again"), "the tap is closed again")


@pytest.mark.parametrize("version", [4, 6])
def test_policy_of_a_machine(scene: Scene, machine: Machine, version: int) -> None:
    """Its policy holds for packets from and to it. A source that is not its own is spoofed."""
    enforce(scene, ONLY_WEB)
    wait_for(lambda: machine.asks(WEB[version], b"allowed"), "what is allowed passes")
    denied, spoofed = counted(scene, "policy-deny"), counted(scene, "spoofed")
    assert not machine.asks(OTHER[version], b"denied")
    assert counted(scene, "policy-deny") == denied + 1
    assert not machine.asks(WEB[version], b"spoofed", source=OTHER[version])
    assert counted(scene, "spoofed") == spoofed + 1

    family = socket.AF_INET if version == 4 else socket.AF_INET6
    for name, expected in (("web", [b"to the machine"]), ("other", [])):
        with scene.lab.prober.open_socket(f"shop/{name}", family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"to the machine", (str(MACHINE[version]), 7000))
            assert [one.payload for one in machine.receive(2.0 if expected else 0.4)] == expected, name
