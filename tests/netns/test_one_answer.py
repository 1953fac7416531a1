# SPDX-License-Identifier: Apache-2.0
"""`netpolctl explain`, `test` and `flows` give the same answer as real sockets, for each kind of destination."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, PODS, Scene, lab_for, scene_in, wait_for
from test_host_endpoints import NODE_ADDRESS, OTHER_ADDRESS, OTHER_NODE, WORLD_ADDRESS, policy
from test_services import BACKENDS, SERVICES, nft_rules

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import ICMP, ICMPV6, TCP, UDP, Host, IPAddress, Listen

pytestmark = pytest.mark.netns

OPEN, SHUT = 8080, 8081
"""Ports with a listener: policy allows the first and denies the second, wherever the address alone does not decide."""
NODE_PORTS, HOST_PORTS = {"db": 30080, "other": 30081}, {"db": 31080, "other": 31081}
"""Of the services, and of the pods, with these names."""
EXTERNAL = {4: "203.0.113.{}", 6: "2001:db8:1::{}"}
"""Addresses of services outside the cluster's ranges. ``{}``: the last part of their pod's address."""

ALL_SERVICES, PODS_WITH_PORTS = SERVICES, PODS
for _name, _port in NODE_PORTS.items():
    _last = BACKENDS[_name]
    _ips = f'clusterIPs: [10.96.0.{_last}, "fd00:96::{_last}"]\n  ports:\n  - {{name: t,'
    _external = f'externalIPs: [{EXTERNAL[4].format(_last)}, "{EXTERNAL[6].format(_last)}"]'
    ALL_SERVICES = ALL_SERVICES.replace(
        _ips, _ips.replace("]\n", f"]\n  {_external}\n", 1).replace("{name: t,", f"{{name: t, nodePort: {_port},")
    )
    _pod = re.compile(rf"(name: {_name}, namespace: shop, .*\n.*containerPort: 5432)(}})")
    PODS_WITH_PORTS = _pod.sub(rf"\1, hostPort: {HOST_PORTS[_name]}\2", PODS_WITH_PORTS, count=1)
WEB = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: web, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  policyTypes: [Egress]
  egress:
  - to: [{{podSelector: {{matchLabels: {{app: db}}}}}}]
  - ports: [{{port: {OPEN}}}]
"""
DB = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]
"""
HOST = f"""\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {{name: uplink, labels: {{role: node}}}}
spec: {{node: {NODE}, interfaceName: eth0}}
---
""" + policy(
    "host",
    f"  types: [Ingress, Egress]\n  ingress: [{{action: Allow, protocol: TCP, destination: {{ports: [{OPEN}]}}}}]\n"
    f"  egress: [{{action: Allow, protocol: TCP, destination: {{ports: [{OPEN}]}}}}]\n",
)
MANIFESTS = {
    "cluster.yaml": PODS_WITH_PORTS,
    "services.yaml": ALL_SERVICES,
    "web.yaml": WEB,
    "db.yaml": DB,
    "host.yaml": HOST,
}


def pod(name: str, version: int) -> IPAddress:
    return ip_address(f"10.1.0.{BACKENDS[name]}" if version == 4 else f"fd00:1::{BACKENDS[name]}")


def service(name: str, version: int) -> IPAddress:
    return ip_address(f"10.96.0.{BACKENDS[name]}" if version == 4 else f"fd00:96::{BACKENDS[name]}")


def external(name: str, version: int) -> IPAddress:
    return ip_address(EXTERNAL[version].format(BACKENDS[name]))


@dataclass(frozen=True)
class Pair:
    """An allowed and a denied connection to one kind of destination, in one family."""

    allowed: tuple[Attempt, ...]
    denied: tuple[Attempt, ...]


def pair(kind: str, version: int) -> Pair:
    """The connections to a kind of destination that the policies above allow and deny."""
    echo = ICMP if version == 4 else ICMPV6

    def to(address: IPAddress, port: int, protocol: int = TCP, source: str = "shop/web") -> Attempt:
        return Attempt(source, address, protocol, port)

    if kind == "pod":
        return Pair(
            (to(pod("db", version), 5432), to(pod("db", version), 5353, UDP), to(pod("db", version), 0, echo)),
            (to(pod("other", version), 5432), to(pod("other", version), 5353, UDP), to(pod("far", version), 5432),
             to(pod("db", version), 5432, source="shop/other"), to(pod("other", version), 0, echo)),
        )  # fmt: skip
    if kind == "service":
        return Pair(
            (to(service("db", version), 80), to(service("db", version), 80, UDP), to(service("far", version), 80, source="shop/other"),
             to(external("db", version), 80), to(external("other", version), 80, source=INTERNET)),
            (to(external("other", version), 80), to(external("db", version), 80, source=INTERNET), to(service("other", version), 80), to(service("far", version), 80, UDP), to(service("db", version), 80, source="shop/other")),
        )  # fmt: skip
    if kind == "node port":
        here, ports = NODE_ADDRESS[version], (NODE_PORTS, HOST_PORTS)
        return Pair(
            (*(to(here, one["db"]) for one in ports), *(to(here, one["other"], source=INTERNET) for one in ports)),
            (*(to(here, one["other"]) for one in ports), *(to(here, one["db"], source=INTERNET) for one in ports)),
        )
    if kind == "itself":  # directly always allowed; through a service as policy says
        return Pair(
            (to(pod("web", version), 5432),), (to(service("web", version), 80), to(service("web", version), 80, UDP))
        )
    if kind == "host process":
        return Pair(
            (to(NODE_ADDRESS[version], OPEN, source=INTERNET), to(WORLD_ADDRESS[version], OPEN, source=NODE), to(pod("db", version), 5432, source=NODE)),
            (to(NODE_ADDRESS[version], SHUT, source=INTERNET), to(WORLD_ADDRESS[version], SHUT, source=NODE)),
        )  # fmt: skip
    address = {"external address": WORLD_ADDRESS, "own node": NODE_ADDRESS, "other node": OTHER_ADDRESS}[kind][version]
    return Pair((to(address, OPEN),), (to(address, SHUT),))


KINDS = ("pod", "service", "node port", "external address", "own node", "other node", "host process", "itself")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab_for(PODS) as one:
        ports = [Listen(TCP, OPEN), Listen(TCP, SHUT)]
        for host, addresses in ((NODE, NODE_ADDRESS), (OTHER_NODE, OTHER_ADDRESS), (INTERNET, WORLD_ADDRESS)):
            one.prober.listen(host, addresses.values(), ports)
        rules = nft_rules()
        for family, version, behind in (("ip", 4, "10.1.0.{}"), ("ip6", 6, "[fd00:1::{}]")):
            here = NODE_ADDRESS[version]
            for name in NODE_PORTS:
                there = external(name, version)
                for address, port in ((here, NODE_PORTS[name]), (here, HOST_PORTS[name]), (there, 80)):
                    rules += f"add rule {family} proxy prerouting {family} daddr {address} tcp dport {port} "
                    rules += f"dnat to {behind.format(BACKENDS[name])}:5432\n"
                way = f"-{version} route add {there} via {here} dev node0 onlink"  # as other hosts do
                one.run(INTERNET, ["ip", *way.split()])
        file = tmp_path_factory.mktemp("rules") / "rules.nft"
        file.write_text(rules)
        one.run(NODE, ["nft", "-f", str(file)])
        yield one


@pytest.fixture(scope="module")
def scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_in(lab, tmp_path_factory.mktemp("answer") / "home", MANIFESTS) as one:
        one.start()
        begin(one)
        yield one


def begin(scene: Scene) -> None:
    """Wait until the policies are in force."""
    scene.await_status(
        lambda state: (
            state["in_force"] and state["objects"]["policies"] == 3 and state["objects"]["enforced_endpoints"] == 3
        ),
        "the manifests are in force",
    )


def source_of(scene: Scene, attempt: Attempt) -> str:
    """The attempt's source in the form of the tools: a pod by its name, a host by its address."""
    host: Host = scene.lab.plan.hosts[attempt.source]
    if "/" in host.name:
        return host.name
    return str(next(one for one in host.addresses if one.version == attempt.destination.version))


def explained(scene: Scene, attempt: Attempt) -> tuple[bool, list[dict[str, Any]]]:
    """The agent's answer to `netpolctl explain`."""
    port = [] if attempt.protocol in (ICMP, ICMPV6) else ["--port", str(attempt.port)]
    done = scene.ctl(
        "explain", "--state-dir", str(scene.state_dir), "--from", source_of(scene, attempt), "--to", str(attempt.destination),
        "--protocol", str(attempt.protocol), *port, "-o", "json",
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    ways = json.loads(done.stdout)
    assert (done.returncode == 0) == all(way["allowed"] for way in ways)
    return done.returncode == 0, ways


def as_probe(scene: Scene, attempt: Attempt, *, reached: bool) -> dict[str, Any]:
    """The attempt as a probe of a case file."""
    port = {} if attempt.protocol in (ICMP, ICMPV6) else {"port": attempt.port}
    return {
        "from": source_of(scene, attempt), "to": str(attempt.destination), "protocol": attempt.protocol, **port,
        "expect": "allow" if reached else "deny",
    }  # fmt: skip


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_tools_say_what_sockets_see(scene: Scene, kind: str, version: int, tmp_path: Path) -> None:
    """For an allowed and a denied connection, the agent and a case file give the same answer as sockets."""
    wanted = pair(kind, version)
    attempts = [*wanted.allowed, *wanted.denied]
    seen = scene.reached(*attempts)
    assert seen == [True] * len(wanted.allowed) + [False] * len(wanted.denied)
    assert [explained(scene, attempt)[0] for attempt in attempts] == seen
    case = {
        "name": kind,
        "manifests": [one for text in MANIFESTS.values() for one in yaml.safe_load_all(text)],
        "probes": [as_probe(scene, attempt, reached=reached) for attempt, reached in zip(attempts, seen, strict=True)],
    }
    file = tmp_path / "case.yaml"
    file.write_text(yaml.safe_dump(case))
    tested = scene.ctl("test", str(file), "-o", "wide")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_flows_of_what_was_dropped_name_no_rule_that_allows(scene: Scene) -> None:
    """Each denied connection is reported as denied, with the rule that the explanation names."""
    attempt = pair("service", 4).denied[0]
    assert scene.reached(attempt) == [False]
    allowed, (way,) = explained(scene, attempt)
    assert not allowed

    def told() -> list[str]:
        lines = scene.ctl("flows", "--state-dir", str(scene.state_dir)).stdout.splitlines()
        return [line for line in lines if "shop/web" in line and "10.1.0.3:5432" in line]

    assert all(way["decided_by"]["sentence"] in line for line in wait_for(told, "the denial is told"))
    lines = scene.ctl("flows", "--state-dir", str(scene.state_dir)).stdout.splitlines()
    assert lines
    assert [line for line in lines if re.match(r"deny\b.*\ballowed\b", line)] == []


def test_broken_file_changes_neither_sockets_nor_answers(scene: Scene) -> None:
    """The agent answers for the policy in force, whatever its files contain now."""
    attempts = [*pair("service", 4).allowed, *pair("service", 4).denied]
    scene.write("web.yaml", "kind: [")
    scene.await_status(lambda state: not state["in_force"], "the file is reported")
    assert scene.reached(*attempts) == [explained(scene, attempt)[0] for attempt in attempts]
    scene.write("web.yaml", WEB)
    begin(scene)


def test_settings_of_the_agent_count(lab: Lab, scene: Scene) -> None:
    """Workloads to their own node: the agent's option decides, for sockets and answers alike."""
    assert scene.lab is lab
    scene.stop()
    scene.options = ("--workload-to-host", "deny")
    try:
        scene.start()
        begin(scene)
        for version in (4, 6):
            (attempt,) = pair("own node", version).allowed
            assert scene.reached(attempt) == [False]
            allowed, (way,) = explained(scene, attempt)
            assert not allowed
            assert "workload_to_host" in way["decided_by"]["sentence"]
    finally:
        scene.stop()
        scene.options = ()
        scene.start()
        begin(scene)


CACHE = {4: "10.96.0.70", 6: "fd00:96::70"}
BOUND = f"""\
apiVersion: v1
kind: Service
metadata: {{name: cache, namespace: shop}}
spec:
  clusterIPs: ["{CACHE[4]}", "{CACHE[6]}"]
  ports: [{{name: open, port: {OPEN}, targetPort: 5432}}, {{name: shut, port: {SHUT}, targetPort: 5432}}]
  selector: {{app: db}}
"""


def test_a_service_address_that_a_process_of_the_node_has_bound(lab: Lab, scene: Scene) -> None:
    """As with a node-local DNS cache: policy judges the address itself, even if every backend is allowed."""
    for version, address in CACHE.items():
        lab.run(NODE, ["ip", f"-{version}", "address", "add", address, "dev", "lo"])
    lab.prober.listen(NODE, map(ip_address, CACHE.values()), [Listen(TCP, OPEN), Listen(TCP, SHUT)])
    attempts = [Attempt("shop/web", ip_address(one), TCP, port) for one in CACHE.values() for port in (OPEN, SHUT)]
    scene.write("cache.yaml", BOUND)
    scene.await_status(lambda state: state["in_force"], "the service is known")

    def answers() -> list[dict[str, Any]] | None:
        found = [way for attempt in attempts for way in explained(scene, attempt)[1]]
        return found if [way["allowed"] for way in found] == [True, False] * 2 else None

    found = wait_for(answers, "the policy of the address is in force, and the agent sees the sockets")
    assert all("a process of this node has bound" in way["note"] for way in found)
    assert scene.reached(*attempts) == [True, False] * 2
    read = [str(scene.manifests), "--from", "shop/web", "--to", CACHE[4], "--port", str(SHUT)]
    files = scene.ctl("explain", "--manifests", *read)
    assert (files.returncode, "assumes that the node translates" in files.stderr) == (0, True)
