# SPDX-License-Identifier: Apache-2.0
"""Pods and services: the node translates the service's address as kube-proxy does, and policy judges the backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, PODS, Scene, lab_for, scene_in, wait_for

from netpol_ebpf.agent.control_socket import SOCKET_NAME, ask
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import TCP, UDP

pytestmark = pytest.mark.netns

BACKENDS = {"web": 1, "db": 2, "other": 3, "far": 4}
"""The last part of each pod's address, and of the address of its service."""
SERVICE_PORT, NODE_PORT = 80, 30080

SERVICE = """\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  clusterIPs: [10.96.0.{last}, "fd00:96::{last}"]
  ports:
  - {{name: t, port: 80, targetPort: 5432}}
  - {{name: u, protocol: UDP, port: 80, targetPort: 5353}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-4, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
endpoints: [{{addresses: [10.1.0.{last}]}}]
ports: [{{name: t, port: 5432}}, {{name: u, protocol: UDP, port: 5353}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-6, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv6
endpoints: [{{addresses: ["fd00:1::{last}"]}}]
ports: [{{name: t, port: 5432}}, {{name: u, protocol: UDP, port: 5353}}]
"""
SERVICES = "".join(SERVICE.format(name=name, last=last) for name, last in BACKENDS.items())

WEB_EGRESS = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: db}}}]
    ports: [{port: 5432}, {port: 5353, protocol: UDP}]
"""
WEB_TO_ALL = WEB_EGRESS.replace("{podSelector: {matchLabels: {app: db}}}", "{podSelector: {}}")
DB_INGRESS = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
"""


def nft_rules(*, masquerade_all: bool = False) -> str:
    """The rules of kube-proxy in nftables mode: they translate forwarded and own packets, and masquerade hairpins."""
    lines = ["flush ruleset"]
    for family, service, pod in (("ip", "10.96.0.{}", "10.1.0.{}"), ("ip6", "fd00:96::{}", "fd00:1::{}")):
        lines.append(f"add table {family} proxy")
        lines += [
            f"add chain {family} proxy {name} {{ type nat hook {name} priority {priority}; }}"
            for name, priority in (("prerouting", "dstnat"), ("output", "-100"), ("postrouting", "srcnat"))
        ]
        for last in BACKENDS.values():
            here, there = service.format(last), pod.format(last)
            there = there if family == "ip" else f"[{there}]"
            for name in ("prerouting", "output"):
                lines.append(f"add rule {family} proxy {name} {family} daddr {here} tcp dport 80 dnat to {there}:5432")
                lines.append(f"add rule {family} proxy {name} {family} daddr {here} udp dport 80 dnat to {there}:5353")
            plain = pod.format(last)
            lines.append(
                f"add rule {family} proxy postrouting {family} saddr {plain} {family} daddr {plain} masquerade"
            )
        if masquerade_all:
            lines.append(f"add rule {family} proxy postrouting ct status dnat masquerade")
    return "\n".join(lines) + "\n"


def translate(lab: Lab, home: Path, **options: bool) -> None:
    """Install the rules on the node."""
    file = home / "rules.nft"
    file.write_text(nft_rules(**options))
    lab.run(NODE, ["nft", "-f", str(file)])


def to(name: str, protocol: int = TCP, version: int = 4, source: str = "shop/web") -> Attempt:
    """A connection to a service."""
    prefix = "10.96.0." if version == 4 else "fd00:96::"
    return Attempt(source, ip_address(f"{prefix}{BACKENDS[name]}"), protocol, SERVICE_PORT)


def everyhow(name: str, source: str = "shop/web") -> list[Attempt]:
    """Such connections by both protocols and both families."""
    return [to(name, protocol, version, source) for protocol in (TCP, UDP) for version in (4, 6)]


MANIFESTS = {"cluster.yaml": PODS, "services.yaml": SERVICES, "web.yaml": WEB_EGRESS, "db.yaml": DB_INGRESS}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for(PODS) as one:
        yield one


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_in(lab, tmp_path_factory.mktemp("services") / "home", MANIFESTS) as one:
        one.start()
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """The services, the initial policies, and plain translation."""
    scene = lasting_scene
    translate(scene.lab, scene.home)
    for name, text in (("services.yaml", SERVICES), ("web.yaml", WEB_EGRESS), ("db.yaml", DB_INGRESS)):
        scene.write(name, text)
    scene.await_status(lambda state: state["in_force"], "the manifests are in force")
    wait_for(lambda: scene.reached(to("db"), to("other")) == [True, False], "the policies of the beginning")
    return scene


def denials(scene: Scene, source: str) -> list[dict[str, Any]]:
    """The denied flows from a pod, as the agent reports them."""
    flows = ask(scene.state_dir / SOCKET_NAME, {"op": "flows"})
    return [flow for flow in flows if flow["kind"] == "deny" and flow.get("source_name") == f"Pod/{source}"]


def test_policy_of_the_sender_sees_what_is_behind_the_service(scene: Scene) -> None:
    """A service with an allowed pod is reached, one with another pod is not: both nodes, TCP and UDP, v4 and v6."""
    assert scene.reached(*everyhow("db")) == [True] * 4
    assert scene.reached(*everyhow("other")) == [False] * 4
    assert scene.reached(*everyhow("far")) == [False] * 4
    scene.write("web.yaml", WEB_TO_ALL)
    scene.await_reached(to("far"), expected=True)
    for name in ("db", "other", "far"):
        assert scene.reached(*everyhow(name)) == [True] * 4, name


def test_denial_names_the_senders_rule_and_the_backend(scene: Scene) -> None:
    """If the sender's policy denies a packet where it leaves, the flow has the sender's rule and the backend pod."""
    assert scene.reached(to("other"), to("far")) == [False, False]

    def told() -> bool:
        seen = {
            (one["endpoint"], one["direction"], one.get("destination_name"), one["destination_port"])
            for one in denials(scene, "shop/web")
            if "end of tier" in (one["rule"] or "")
        }
        return {
            ("Pod/shop/web", "egress", "Pod/shop/other", 5432),
            ("Pod/shop/web", "egress", "Pod/shop/far", 5432),
        } <= seen

    wait_for(told, "the denials are told")


def test_policy_of_the_receiver_applies_after_that_of_the_sender(scene: Scene) -> None:
    """A sender whose policy allows everything is still stopped by the policy of the pod behind the service."""
    assert scene.reached(*everyhow("db", "shop/other")) == [False] * 4
    assert scene.reached(*everyhow("far", "shop/other")) == [True] * 4

    def told() -> bool:
        return ("Pod/shop/db", "ingress") in {
            (one["endpoint"], one["direction"]) for one in denials(scene, "shop/other")
        }

    wait_for(told, "the denial is told")


def test_hairpin_is_subject_to_the_pods_own_egress_policy(scene: Scene) -> None:
    """Its egress policy decides whether a pod reaches itself through a service.

    On the way back the packet has the node's address.
    """
    assert scene.reached(*everyhow("web")) == [False] * 4
    scene.write("web.yaml", WEB_TO_ALL)
    scene.await_reached(to("web"), expected=True)
    assert scene.reached(*everyhow("web")) == [True] * 4
    scene.write(
        "db.yaml",
        DB_INGRESS.replace("app: db", "app: web").replace("{app: web}}\n  policyTypes", "{app: web}}\n  policyTypes"),
    )
    wait_for(lambda: scene.reached(*everyhow("web")) == [True] * 4, "isolation does not matter for it")


def test_masqueraded_connections(scene: Scene) -> None:
    """If the node replaces the sender's address by its own, the sender's policy still decides."""
    translate(scene.lab, scene.home, masquerade_all=True)
    assert scene.reached(*everyhow("far")) == [False] * 4
    scene.write("web.yaml", WEB_TO_ALL)
    scene.await_reached(to("far"), expected=True)
    assert scene.reached(*everyhow("far")) == [True] * 4


def test_open_connection_through_a_service_is_cut_when_policy_revokes_it(scene: Scene) -> None:
    """A change of policy cuts connections with a deferred verdict that it revokes, and no others."""
    scene.write("web.yaml", WEB_TO_ALL)
    scene.await_reached(to("far"), expected=True)
    lost, kept = (scene.lab.prober.hold(to(name)) for name in ("far", "db"))
    assert lost is not None
    assert kept is not None
    assert lost.exchange(5.0)
    scene.write("web.yaml", WEB_EGRESS)
    wait_for(lambda: not lost.exchange(), "the connection is cut")
    assert kept.exchange(5.0)
    for one in (lost, kept):
        one.close()


def test_uplinks_bear_the_programs_with_and_without_services(scene: Scene) -> None:
    """Every interface by which a packet to a service may leave has the hook.

    Without services the hook lets everything pass.
    """
    assert scene.attached()["eth0"] == {"ingress", "egress"}
    before = scene.state()["changes_applied"]
    scene.write("services.yaml", "")
    scene.await_status(lambda state: state["changes_applied"] > before, "the services are gone")
    assert scene.attached()["eth0"] == {"ingress", "egress"}
    assert scene.reached(Attempt("shop/other", ip_address("10.1.0.4"), TCP, 5432)) == [True]


def test_killed_agent_leaves_services_judged(scene: Scene) -> None:
    """Without an agent, verdicts on services stay the same. The next agent takes them over."""
    held = scene.lab.prober.hold(to("db"))
    assert held is not None
    scene.kill()
    assert scene.reached(to("db"), to("other"), to("far")) == [True, False, False]
    scene.start()
    assert scene.reached(to("db"), to("other"), to("far")) == [True, False, False]
    assert held.exchange(5.0)
    held.close()
