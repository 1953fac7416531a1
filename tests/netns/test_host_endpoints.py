# SPDX-License-Identifier: Apache-2.0
"""Host endpoints on the interfaces of a real node: what they protect, what is forwarded, and what they never cut."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, PODS, Scene, lab_for, scene_in, wait_for

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import TCP, UDP, Listen

pytestmark = pytest.mark.netns

NODE_ADDRESS = {4: ip_address("172.30.0.10"), 6: ip_address("fd00:30::10")}
WORLD_ADDRESS = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}
POD_ADDRESS = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
SSH, WEB, STATELESS, NODE_PORT, VXLAN = 22, 8080, 9000, 30080, 4789
OTHER_NODE, OTHER_ADDRESS = "node-2", {4: ip_address("172.30.0.20"), 6: ip_address("fd00:30::20")}

HOST_ENDPOINT = """\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: uplink, labels: {role: node}}
spec: {node: node-1, interfaceName: eth0}
"""
BY_ADDRESS = HOST_ENDPOINT.replace("interfaceName: eth0", 'expectedIPs: ["172.30.0.10", "fd00:30::10"]')
WILDCARD = HOST_ENDPOINT.replace("interfaceName: eth0", 'interfaceName: "*"')
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec:
  type: NodePort
  clusterIPs: [10.96.0.2, "fd00:96::2"]
  ports: [{name: t, port: 80, targetPort: 5432, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-4, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.2]}]
ports: [{name: t, port: 5432}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-6, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
endpoints: [{addresses: ["fd00:1::2"]}]
ports: [{name: t, port: 5432}]
"""
NODE_PORT_RULES = """\
flush ruleset
table ip proxy {
  chain prerouting {
    type nat hook prerouting priority dstnat;
    ip daddr 172.30.0.10 tcp dport 30080 dnat to 10.1.0.2:5432
  }
}
table ip6 proxy {
  chain prerouting {
    type nat hook prerouting priority dstnat;
    ip6 daddr fd00:30::10 tcp dport 30080 dnat to [fd00:1::2]:5432
  }
}
"""


def policy(name: str, spec: str) -> str:
    """A global policy for the node's host endpoints."""
    return (
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\n"
        f"metadata: {{name: {name}}}\nspec:\n  selector: role == 'node'\n{spec}"
    )


DENY_ALL = policy(
    "deny-all", "  order: 1\n  types: [Ingress, Egress]\n  ingress: [{action: Deny}]\n  egress: [{action: Deny}]\n"
)
ALLOW_WEB = policy(
    "allow-web", f"  types: [Ingress]\n  ingress: [{{action: Allow, protocol: TCP, destination: {{ports: [{WEB}]}}}}]\n"
)
NO_FORWARD = policy(
    "no-forward", "  applyOnForward: true\n  types: [Ingress]\n  ingress: [{action: Allow, protocol: UDP}]\n"
)
NO_NODE_PORT = policy(
    "no-node-port",
    "  preDNAT: true\n  applyOnForward: true\n  types: [Ingress]\n"
    f"  ingress: [{{action: Deny, protocol: TCP, destination: {{ports: [{NODE_PORT}, {SSH}]}}}}]\n",
)
NO_TUNNEL_BEFORE = policy(
    "no-tunnel-before",
    "  preDNAT: true\n  applyOnForward: true\n  types: [Ingress]\n"
    f"  ingress: [{{action: Deny, protocol: UDP, destination: {{ports: [{VXLAN}]}}}}]\n",
)
FAILSAFES = f"""\
apiVersion: projectcalico.org/v3
kind: FelixConfiguration
metadata: {{name: node.node-1}}
spec: {{failsafeInboundHostPorts: [{{protocol: TCP, port: {WEB}, net: 192.0.2.0/24}}]}}
"""
AUTOMATIC = """\
apiVersion: projectcalico.org/v3
kind: KubeControllersConfiguration
metadata: {name: default}
spec: {controllers: {node: {hostEndpoint: {autoCreate: Enabled}}}}
"""
STATELESS_IN = policy(
    "stateless-in",
    "  doNotTrack: true\n  applyOnForward: true\n  types: [Ingress]\n"
    f"  ingress: [{{action: Allow, protocol: TCP, destination: {{ports: [{STATELESS}]}}}}]\n",
)
STATELESS_BOTH = STATELESS_IN.replace("types: [Ingress]", "types: [Ingress, Egress]") + (
    f"  egress: [{{action: Allow, protocol: TCP, source: {{ports: [{STATELESS}]}}}}]\n"
)


def to_node(port: int, version: int = 4, source: str = INTERNET) -> Attempt:
    """A connection to a process of the node."""
    return Attempt(source, NODE_ADDRESS[version], TCP, port)


def to_pod(version: int = 4) -> Attempt:
    """A connection from outside that the node forwards."""
    return Attempt(INTERNET, POD_ADDRESS[version], TCP, 5432)


def from_node(version: int = 4, port: int = WEB, protocol: int = TCP) -> Attempt:
    """A connection of a process of the node."""
    return Attempt(NODE, WORLD_ADDRESS[version], protocol, port)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for(PODS) as one:
        one.prober.listen(NODE, NODE_ADDRESS.values(), [Listen(TCP, port) for port in (SSH, WEB, STATELESS)])
        one.prober.listen(NODE, NODE_ADDRESS.values(), [Listen(UDP, VXLAN)])
        one.prober.listen(INTERNET, WORLD_ADDRESS.values(), [Listen(TCP, WEB), Listen(UDP, 53), Listen(UDP, VXLAN)])
        one.prober.listen(OTHER_NODE, OTHER_ADDRESS.values(), [Listen(TCP, WEB), Listen(UDP, VXLAN)])
        yield one


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_in(lab, tmp_path_factory.mktemp("hosts") / "home", {"cluster.yaml": PODS}) as one:
        rules = one.home / "rules.nft"
        rules.write_text(NODE_PORT_RULES)
        lab.run(NODE, ["nft", "-f", str(rules)])
        one.start()
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """An agent without a host endpoint in force."""
    scene = lasting_scene
    for path in scene.manifests.iterdir():
        if path.name != "cluster.yaml":
            path.unlink()
    settle(scene, policies=0)
    wait_for(lambda: scene.reached(to_node(WEB), from_node()) == [True, True], "nothing is policed")
    return scene


def settle(scene: Scene, *, policies: int) -> None:
    """Wait until the manifests are in force."""
    scene.await_status(
        lambda state: state["in_force"] and state["objects"]["policies"] == policies, "the manifests are in force"
    )


@pytest.mark.parametrize("manifest", [HOST_ENDPOINT, BY_ADDRESS, WILDCARD], ids=["named", "by address", "wildcard"])
def test_host_endpoint_closes_the_node_but_for_failsafes_and_forwarding(scene: Scene, manifest: str) -> None:
    """Without policy a host endpoint denies packets to the node's processes.

    It keeps ssh open and forwarding as it was.
    """
    assert scene.reached(to_node(SSH), to_node(WEB), to_pod()) == [True] * 3
    scene.write("host.yaml", manifest)
    scene.await_reached(to_node(WEB), expected=False)
    for version in (4, 6):
        attempts = [to_node(SSH, version), to_node(WEB, version), to_pod(version), from_node(version)]
        assert scene.reached(*attempts) == [True, False, True, False], version
    assert scene.reached(from_node(port=53, protocol=UDP)) == [True]
    assert scene.attached()["eth0"] == {"ingress", "egress"}
    (scene.manifests / "host.yaml").unlink()
    scene.await_reached(to_node(WEB), expected=True)
    scene.await_status(
        lambda state: {one["interface"]: one["endpoint"] for one in state["interfaces"]}["eth0"] is None,
        "the interface has no policy of its own",
    )
    assert scene.reached(to_node(SSH), from_node(), to_pod(6)) == [True] * 3


def test_deny_all_never_cuts_ssh(scene: Scene) -> None:
    """An open connection to port 22 survives a policy that denies everything, and new ones can be opened."""
    held = scene.lab.prober.hold(to_node(SSH))
    assert held is not None
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.write("deny.yaml", DENY_ALL)
    scene.await_reached(to_node(WEB), expected=False)
    settle(scene, policies=1)
    assert held.exchange(5.0)
    assert scene.reached(to_node(SSH), to_node(SSH, 6), from_node()) == [True, True, False]
    held.close()


def test_normal_policy_opens_a_port(scene: Scene) -> None:
    """A normal policy decides what reaches the node's processes. It does not apply to forwarded packets."""
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.write("web.yaml", ALLOW_WEB)
    scene.await_reached(to_node(STATELESS), expected=False)
    wait_for(lambda: scene.reached(to_node(WEB), to_node(WEB, 6)) == [True, True], "the port is open")
    assert scene.reached(to_node(STATELESS), to_pod(), from_node()) == [False, True, False]


def test_policy_for_what_passes_through(scene: Scene) -> None:
    """With a policy that applies on forward, forwarded packets are subject to it, until the end of its tier."""
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.write("forward.yaml", NO_FORWARD)
    scene.await_reached(to_pod(), expected=False)
    assert scene.reached(to_pod(6), to_node(SSH)) == [False, True]
    udp = Attempt(INTERNET, POD_ADDRESS[4], UDP, 5353)
    assert scene.reached(udp) == [True]
    outwards = Attempt("shop/db", WORLD_ADDRESS[4], TCP, WEB)
    assert scene.reached(outwards) == [True]


@pytest.mark.parametrize("version", [4, 6])
def test_node_port_is_protected_from_outside(scene: Scene, version: int) -> None:
    """A pre-DNAT policy closes a node port. The pod behind it, and ssh, stay reachable."""
    node_port = to_node(NODE_PORT, version)
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.write("service.yaml", SERVICE)
    scene.await_reached(node_port, expected=True)
    scene.write("predat.yaml", NO_NODE_PORT)
    scene.await_reached(node_port, expected=False)
    assert scene.reached(to_pod(version), to_node(SSH, version)) == [True, True]


def test_forward_policy_sees_what_is_behind_a_node_port(scene: Scene) -> None:
    """A forward policy judges a node port's packets by the pod's address and port."""
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.write("service.yaml", SERVICE)
    scene.await_reached(to_node(NODE_PORT), expected=True)
    behind = "ingress: [{action: Allow, protocol: TCP, destination: {nets: [10.1.0.2/32], ports: [PORT]}}]\n"
    header = "  applyOnForward: true\n  types: [Ingress]\n  "
    scene.write("forward.yaml", policy("forward", header + behind.replace("PORT", "80")))
    scene.await_reached(to_node(NODE_PORT), expected=False)
    scene.write("forward.yaml", policy("forward", header + behind.replace("PORT", "5432")))
    scene.await_reached(to_node(NODE_PORT), expected=True)


def test_untracked_policy_is_stateless(scene: Scene) -> None:
    """If untracked policy allows a packet in, the answer must also be allowed out, because there is no connection."""
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.write("stateless.yaml", STATELESS_IN)
    scene.await_reached(to_node(WEB), expected=False)
    settle(scene, policies=1)
    assert scene.reached(to_node(STATELESS)) == [False]
    scene.write("stateless.yaml", STATELESS_BOTH)
    scene.await_reached(to_node(STATELESS), expected=True)
    assert scene.reached(to_node(STATELESS, 6), to_node(WEB), to_node(SSH)) == [True, False, True]


@pytest.mark.parametrize("manifest", [HOST_ENDPOINT, WILDCARD], ids=["named", "wildcard"])
def test_tunnel_ports_are_open_between_known_nodes(scene: Scene, manifest: str) -> None:
    """The port is open to and from the other node, whatever policy denies.

    Its other ports, and this port for others, are judged.
    """
    others = [
        attempt
        for version in (4, 6)
        for attempt in (
            Attempt(INTERNET, NODE_ADDRESS[version], UDP, VXLAN),
            Attempt(NODE, WORLD_ADDRESS[version], UDP, VXLAN),
            Attempt(OTHER_NODE, NODE_ADDRESS[version], TCP, WEB),
            Attempt(NODE, OTHER_ADDRESS[version], TCP, WEB),
        )
    ]
    tunnels = [
        attempt
        for version in (4, 6)
        for attempt in (
            Attempt(OTHER_NODE, NODE_ADDRESS[version], UDP, VXLAN),
            Attempt(NODE, OTHER_ADDRESS[version], UDP, VXLAN),
        )
    ]
    assert scene.reached(*others, *tunnels) == [True] * 12
    scene.write("host.yaml", manifest)
    scene.write("deny.yaml", DENY_ALL)
    scene.write("before.yaml", NO_TUNNEL_BEFORE)
    settle(scene, policies=2)
    scene.await_reached(to_node(WEB), expected=False)
    assert scene.reached(*others, *tunnels) == [False] * 8 + [True] * 4


def test_failsafe_ports_of_a_configuration(scene: Scene) -> None:
    """They replace the built-in ones, for the remote addresses that they name.

    Without the configuration those are back.
    """
    scene.write("host.yaml", HOST_ENDPOINT)
    scene.await_reached(to_node(WEB), expected=False)
    scene.write("felix.yaml", FAILSAFES)
    scene.await_reached(to_node(WEB), expected=True)
    attempts = [to_node(WEB, 6), to_node(WEB, source=OTHER_NODE), to_node(SSH), from_node(port=53, protocol=UDP)]
    assert scene.reached(*attempts) == [False, False, False, True]
    (scene.manifests / "felix.yaml").unlink()
    scene.await_reached(to_node(WEB), expected=False)
    assert scene.reached(to_node(SSH)) == [True]


def test_automatic_host_endpoint(scene: Scene) -> None:
    """It protects every interface of the node as policy for its labels says, and its profile allows the rest."""
    before = scene.state()["changes_applied"]
    scene.write("controllers.yaml", AUTOMATIC)
    scene.await_status(lambda state: state["changes_applied"] > before, "the host endpoint is in force")
    assert scene.reached(to_node(WEB), to_node(SSH), from_node()) == [True] * 3
    scene.write(
        "web.yaml", ALLOW_WEB.replace("role == 'node'", "projectcalico.org/created-by == 'calico-kube-controllers'")
    )
    scene.await_reached(to_node(STATELESS), expected=False)
    assert scene.reached(to_node(WEB), to_node(SSH, 6), to_pod(), from_node()) == [True] * 4
    (scene.manifests / "controllers.yaml").unlink()
    scene.await_reached(to_node(STATELESS), expected=True)


def test_host_endpoint_of_an_interface_that_is_not_there_is_reported(scene: Scene) -> None:
    """A host endpoint without an interface is reported, and has no effect."""
    scene.write("host.yaml", HOST_ENDPOINT.replace("eth0", "eth9"))
    state = scene.await_status(lambda state: bool(state["problems"]), "the problem is told")
    assert state["problems"][0]["object"] == "HostEndpoint/uplink"
    assert "eth9" in state["problems"][0]["message"]
    assert scene.reached(to_node(WEB)) == [True]


WORKLOAD_TO_HOST = [
    ("allow", "", [True, True]),
    ("deny", "", [False, False]),
    ("policy", WILDCARD, [True, False]),
]


@pytest.mark.parametrize(("option", "manifest", "expected"), WORKLOAD_TO_HOST, ids=[one[0] for one in WORKLOAD_TO_HOST])
def test_workloads_to_their_own_node(
    lasting_scene: Scene, lab: Lab, tmp_path: Path, option: str, manifest: str, expected: list[bool]
) -> None:
    """The option decides what workloads may send to their node. The node reaches them in any case."""
    lasting_scene.retire()
    manifests = {"cluster.yaml": PODS, **({"host.yaml": manifest} if manifest else {})}
    with scene_in(lab, tmp_path / "home", manifests, options=("--workload-to-host", option)) as scene:
        scene.start()
        attempts = [Attempt("shop/db", NODE_ADDRESS[4], TCP, port) for port in (SSH, WEB)]
        wait_for(lambda: scene.reached(*attempts) == expected, f"{expected}")
        assert scene.reached(Attempt(NODE, POD_ADDRESS[4], TCP, 5432)) == [True]
    lasting_scene.start()
