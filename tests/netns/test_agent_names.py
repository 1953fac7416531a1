# SPDX-License-Identifier: Apache-2.0
"""An agent and a rule with domain names: pods ask a real DNS server behind a service, and connect to what it answers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import ALL_PODS, NODE, Scene, lab_for, render_nodes, scene_in, wait_for

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import TCP, Host, Listen

DNSMASQ = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin")
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(DNSMASQ is None, reason="dnsmasq: scripts/setup.sh --dev installs it"),
]

SERVICE, BACKEND = "10.96.0.10", "10.1.0.53"
WEB_PORT = 8080
NAMES = {f"n{last}.example.test": f"198.51.100.{last}" for last in range(1, 10)}
OTHER_NAME, OTHER_ADDRESS = "www.other.test", "198.51.100.99"
POD_NAME = "pod.example.test"
"""A name that the server gives the address of a pod."""
DB_ADDRESS = "10.1.0.2"
WORLD = Host(
    "world",
    INTERNET,
    tuple(map(ip_address, (*NAMES.values(), OTHER_ADDRESS))),
    (Listen(TCP, WEB_PORT),),
    interface="world0",
)

DNS = f"""\
---
apiVersion: v1
kind: Namespace
metadata: {{name: kube-system}}
---
apiVersion: v1
kind: Pod
metadata: {{name: dns, namespace: kube-system, labels: {{app: dns}}}}
spec: {{nodeName: node-2, containers: [{{name: c, image: x}}]}}
status: {{podIPs: [{{ip: {BACKEND}}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system}}
spec:
  clusterIPs: [{SERVICE}]
  ports: [{{name: dns, protocol: UDP, port: 53}}, {{name: dns-tcp, protocol: TCP, port: 53}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns-4, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: IPv4
endpoints: [{{addresses: [{BACKEND}]}}]
ports: [{{name: dns, protocol: UDP, port: 53}}, {{name: dns-tcp, protocol: TCP, port: 53}}]
"""
CLUSTER = render_nodes("172.30.0.{}") + ALL_PODS + DNS
POLICY = f"""\
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {{name: names, namespace: shop}}
spec:
  selector: app in {{'web', 'other'}}
  types: [Egress]
  egress:
  - {{action: Allow, protocol: UDP, destination: {{ports: [53]}}}}
  - action: Allow
    protocol: TCP
    destination: {{domains: ["*.example.test"], ports: [{WEB_PORT}, 5432]}}
"""
PROXY = f"""\
table ip proxy {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    ip daddr {SERVICE} udp dport 53 dnat to {BACKEND}:53
  }}
}}
"""
ASK_AND_CONNECT = """\
import socket, struct, sys
server, name, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split(".")) + b"\\0"
question = struct.pack("!6H", 4711, 0x100, 1, 0, 0, 0) + labels + struct.pack("!2H", 1, 1)
asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asker.settimeout(10)
asker.connect((server, 53))
asker.send(question)
answer = asker.recv(4096)
address = socket.inet_ntoa(answer[-4:])
try:
    socket.create_connection((address, port), timeout=float(sys.argv[4])).close()
    print(address, "reached")
except TimeoutError:
    print(address, "silent")
"""
"""Asks for a name, and connects at once to the address in the answer's last record, with the first packet that can be sent."""
SOON_S, LATE_S = "0.5", "10"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes, a DNS server on the second one, and a world outside with the addresses of the names."""
    with lab_for(CLUSTER, outside=[WORLD]) as one:
        yield one


@pytest.fixture
def scene(lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    """An agent that has the policy in force, and a server that answers."""
    with scene_in(lab, tmp_path / "home", {"cluster.yaml": CLUSTER, "names.yaml": POLICY}) as one:
        rules = tmp_path / "rules.nft"
        rules.write_text("flush ruleset\n" + PROXY)
        lab.run(NODE, ["nft", "-f", str(rules)])
        records = {**NAMES, OTHER_NAME: OTHER_ADDRESS, POD_NAME: DB_ADDRESS}
        (tmp_path / "hosts").write_text("".join(f"{address} {name}\n" for name, address in records.items()))
        server = lab.start(
            "kube-system/dns",
            [str(DNSMASQ), "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
             f"--addn-hosts={tmp_path}/hosts", "--local-ttl=60", f"--listen-address={BACKEND}", "--bind-interfaces", "--pid-file",
             "--local=/test/"],
        )  # fmt: skip
        one.start()
        wait_for(lambda: asked(one, "far", OTHER_NAME).endswith("reached"), "the server answers")
        yield one
        lab.stop(server)


def asked(
    scene: Scene, pod: str, name: str, *, server: str = BACKEND, port: int = WEB_PORT, is_slow: bool = True
) -> str:
    """The address that a pod gets for a name, and what came of its first connection there; "" if no answer came."""
    patience = LATE_S if is_slow else SOON_S
    command = [sys.executable, "-c", ASK_AND_CONNECT, server, name, str(port), patience]
    return scene.lab.run(f"shop/{pod}", command, check=False).stdout.strip()


def reaches(scene: Scene, pod: str, name: str) -> bool:
    """Whether a pod reaches the address of a name without asking for the name."""
    return scene.reached(Attempt(f"shop/{pod}", ip_address(NAMES[name]), TCP, WEB_PORT))[0]


def problems_of(state: dict[str, Any]) -> list[str]:
    """The messages of all problems in a status."""
    return [str(one["message"]) for one in state["problems"]]


def test_first_connection_after_the_answer(scene: Scene) -> None:
    """The service and its backend are servers; each answer counts at once, for the pod that asked and the names of the rule alone."""
    one, two, three = list(NAMES)[:3]
    assert not reaches(scene, "web", one)
    assert asked(scene, "web", one) == f"{NAMES[one]} reached"
    assert asked(scene, "web", two, server=SERVICE) == f"{NAMES[two]} reached"
    assert reaches(scene, "web", one)
    assert not reaches(scene, "other", one)
    assert not reaches(scene, "web", three)
    assert asked(scene, "web", OTHER_NAME, is_slow=False) == f"{OTHER_ADDRESS} silent"
    assert asked(scene, "web", POD_NAME, port=5432, is_slow=False) == f"{DB_ADDRESS} silent"
    assert problems_of(scene.state()) == []


def test_no_agent_is_needed(scene: Scene) -> None:
    """While no agent runs a new name works; the next agent keeps what was learned, for the pod that learned it."""
    one, two, three = list(NAMES)[3:6]
    assert asked(scene, "web", one) == f"{NAMES[one]} reached"
    scene.kill()
    assert asked(scene, "web", two) == f"{NAMES[two]} reached"
    scene.start()
    assert reaches(scene, "web", one)
    assert reaches(scene, "web", two)
    assert not reaches(scene, "other", two)
    assert asked(scene, "other", three) == f"{NAMES[three]} reached"


def test_policy_comes_and_goes(scene: Scene) -> None:
    """Without the rule the address is denied; a rule that comes back finds what the pod learned, or has the pod ask again."""
    one, two = list(NAMES)[6:8]
    assert asked(scene, "web", one) == f"{NAMES[one]} reached"
    scene.write("names.yaml", POLICY.replace('domains: ["*.example.test"]', "nets: [203.0.113.0/24]"))
    wait_for(lambda: not reaches(scene, "web", one), "no rule has the name")
    assert asked(scene, "web", two, is_slow=False) == f"{NAMES[two]} silent"
    scene.write("names.yaml", POLICY)
    wait_for(lambda: asked(scene, "web", two, is_slow=False).endswith("reached"), "a rule has the name again")


def test_star_inside_a_pattern_that_is_newer_than_the_name(scene: Scene) -> None:
    """The agent gives a name that it already knows a row, also if the pod asks for it again and again."""
    name = list(NAMES)[4]
    assert asked(scene, "web", name) == f"{NAMES[name]} reached"
    scene.write("names.yaml", POLICY.replace("*.example.test", "*.elsewhere.test"))
    wait_for(lambda: not reaches(scene, "web", name), "no rule has the name")
    scene.write("names.yaml", POLICY.replace("*.example.test", "n5.*.test"))
    wait_for(lambda: asked(scene, "web", name, is_slow=False).endswith("reached"), "the name has a row")
    scene.kill()
    scene.start()
    wait_for(lambda: asked(scene, "web", name, is_slow=False).endswith("reached"), "the name has a row again")


def test_service_that_does_not_exist_is_a_problem(scene: Scene) -> None:
    """Without the service and its backends nothing is learned, and the status says so; when they come back, names work again."""
    (name,) = list(NAMES)[8:9]
    scene.write("cluster.yaml", CLUSTER.replace(DNS, ""))
    state = scene.await_status(lambda state: bool(problems_of(state)), "the missing service is reported")
    assert any("k8s-service:kube-system/kube-dns" in message for message in problems_of(state))
    assert asked(scene, "web", name, is_slow=False) == f"{NAMES[name]} silent"
    scene.write("cluster.yaml", CLUSTER)
    wait_for(lambda: asked(scene, "web", name, is_slow=False).endswith("reached"), "the server is known again")
    assert problems_of(scene.state()) == []
