# SPDX-License-Identifier: Apache-2.0
"""The health endpoint of a real agent: its answers while the agent starts, works and loses its source."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import DB_POLICY, NODE, OTHER_ALLOWED, Scene, scene_in, to_db, wait_for
from border_scene import port_of

from netpol_ebpf.lab.laboratory import Lab

parser = pytest.importorskip("prometheus_client.parser", reason="the extra [metrics] is not installed")

pytestmark = pytest.mark.netns

PORT = 9976
LOOPBACK = f"127.0.0.1:{PORT}"
NODE_ADDRESS = "172.30.0.10"
UNTRANSLATED, TRANSLATED, OPEN = 9001, 9002, 9003
GET = """\
import http.client, json, sys
host, port, path = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=20)
try:
    connection.request("GET", path)
    response = connection.getresponse()
    print(json.dumps([response.status, response.read().decode()]))
except OSError as error:
    print(json.dumps([0, type(error).__name__]))
"""
CONNECT = """\
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2)
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: u, user: {token: t}}]
"""


def get(lab: Lab, path: str, *, host: str = NODE, address: str = "127.0.0.1", port: int = PORT) -> tuple[int, str]:
    """The status and body of a page; without an answer, status 0 and the error."""
    done = lab.run(host, [sys.executable, "-c", GET, address, str(port), path])
    status, body = json.loads(done.stdout)
    return int(status), str(body)


def connects(lab: Lab, host: str, address: str, port: int) -> bool:
    """Whether a host can open a TCP connection."""
    return lab.run(host, [sys.executable, "-c", CONNECT, address, str(port)]).stdout == "connected\n"


@pytest.fixture
def health(lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    """An agent that is not started yet, with its endpoint at the loopback address."""
    with scene_in(lab, tmp_path / "home", options=("--health-address", LOOPBACK)) as one:
        yield one


def test_states_from_start_to_lost_source(health: Scene) -> None:
    """Live while it waits for a source; ready with the objects in force; not fresh without its source; ready again."""
    lab = health.lab
    kubeconfig = health.home / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG)
    options = health.options
    health.options = (*options, "--kubeconfig", str(kubeconfig), "--saved-state", str(health.home / "cluster"))
    health.launch()
    wait_for(lambda: get(lab, "/livez")[0] == 200, "the endpoint answers")
    status, body = wait_for(lambda: (found := get(lab, "/readyz"))[1].count("\n") > 3 and found, "the loop turns")
    assert status == 503
    assert "[-]synced failed: waiting for all objects of http://127.0.0.1:1" in body
    assert "[-]programmed failed: " in body
    assert get(lab, "/metrics")[1].count("netpol_in_force 0.0\n") == 1
    health.stop()

    health.options = options
    health.launch()
    wait_for(lambda: get(lab, "/readyz")[0] == 200, "the manifests are in force")
    assert health.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    aside = health.home / "aside"
    health.manifests.rename(aside)
    status, body = wait_for(lambda: (found := get(lab, "/readyz"))[0] == 503 and found, "the loss is seen")
    assert f"[-]fresh failed: {health.manifests}" in body
    assert "[+]programmed ok" in body
    assert get(lab, "/livez")[0] == 200
    assert health.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    aside.rename(health.manifests)
    wait_for(lambda: get(lab, "/readyz")[0] == 200, "the source is back")

    log = health.stop()
    assert "health is served at 127.0.0.1 port 9976" in log
    assert not connects(lab, NODE, "127.0.0.1", PORT), "the server ends with the agent"


def test_killed_agent_leaves_no_server(health: Scene) -> None:
    """The next agent can listen at the address, however the previous one ended."""
    health.start()
    wait_for(lambda: get(health.lab, "/readyz")[0] == 200, "it is ready")
    health.kill()
    wait_for(lambda: not connects(health.lab, NODE, "127.0.0.1", PORT), "the server has ended")
    health.start()
    wait_for(lambda: get(health.lab, "/readyz")[0] == 200, "the next one is ready")


def test_scrapes_while_policies_change(health: Scene) -> None:
    """Every scrape is complete, counters never decrease, and every change comes into force meanwhile."""
    lab = health.lab
    health.start()
    wait_for(lambda: get(lab, "/readyz")[0] == 200, "it is ready")
    texts: list[tuple[int, str]] = []
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.is_set():
            texts.append(get(lab, "/metrics"))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for turn in range(6):
            policies = (DB_POLICY, OTHER_ALLOWED) if turn % 2 else (DB_POLICY,)
            health.write("db.yaml", "---\n".join(policies))
            health.await_reached(to_db("shop/other"), expected=bool(turn % 2))
    finally:
        is_over.set()
        thread.join()
    assert {status for status, _ in texts} == {200}
    applied = []
    for _, text in texts:
        series = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
        assert len(series) == len(set(series))
        values = {one.name: one.value for family in parser.text_string_to_metric_families(text) for one in family.samples
                  if not one.labels}  # fmt: skip
        assert values["netpol_change_duration_seconds_count"] == values["netpol_changes_applied_total"]
        applied.append(values["netpol_changes_applied_total"])
    assert applied == sorted(applied)
    # A scrape within a second of another one gets the same text.
    ((labels, packets),) = wait_for(lambda: rules_of(lab, "other"), "the last policy has its series")
    assert (labels["tier"], labels["namespace"], labels["direction"], labels["action"]) == (
        "default", "shop", "ingress", "allow",
    )  # fmt: skip
    assert (labels["rule"], packets > 0) == ("0", True)
    assert "in force changes=" in health.stop()


def rules_of(lab: Lab, policy: str) -> list[tuple[dict[str, str], float]]:
    """The rules of a policy that have decided packets, as (labels, number of packets)."""
    families = parser.text_string_to_metric_families(get(lab, "/metrics")[1])
    found = (one for family in families for one in family.samples if one.name == "netpol_rule_packets_total")
    return [(one.labels, one.value) for one in found if one.labels["policy"] == policy and one.value]


@pytest.fixture
def translated(lab: Lab) -> Iterator[Lab]:
    """A node that redirects pods' packets to two of its ports to its loopback address, as kube-proxy can."""
    port = port_of("web")
    lab.prober.write_settings(NODE, [(f"ipv4/conf/{port}/route_localnet", "1")])
    table = f"""\
table ip test_health {{
  chain pre {{
    type nat hook prerouting priority dstnat;
    ip daddr {NODE_ADDRESS} tcp dport {TRANSLATED} dnat to 127.0.0.1:{PORT}
    ip daddr {NODE_ADDRESS} tcp dport {OPEN} dnat to 127.0.0.1:{UNTRANSLATED}
  }}
}}
"""
    lab.run(NODE, ["nft", table])
    try:
        yield lab
    finally:
        lab.run(NODE, ["nft", "delete table ip test_health"])
        lab.prober.write_settings(NODE, [(f"ipv4/conf/{port}/route_localnet", "0")])


def test_no_pod_connects_to_the_loopback_address(health: Scene, translated: Lab) -> None:
    """By translation to a loopback address a pod reaches another process of the node, but never the health endpoint."""
    health.start()
    wait_for(lambda: get(translated, "/readyz")[0] == 200, "it is ready")
    with contextlib.closing(translated.prober.open_socket(NODE, 2, 1)) as other:
        other.bind(("127.0.0.1", UNTRANSLATED))
        other.listen()
        wait_for(lambda: connects(translated, "shop/web", NODE_ADDRESS, OPEN), "the translation works")
        assert not connects(translated, "shop/web", NODE_ADDRESS, TRANSLATED)
        assert not connects(translated, "shop/web", NODE_ADDRESS, PORT)
    assert get(translated, "/livez")[0] == 200


def test_pods_reach_an_address_of_the_node_as_policy_says(lab: Lab, tmp_path: Path) -> None:
    """At an address of the uplink, hosts outside can connect. So can a workload, unless it may not reach its node."""
    address = f"{NODE_ADDRESS}:{PORT}"
    for to_host, expected in (("allow", True), ("deny", False)):
        options = ("--health-address", address, "--workload-to-host", to_host)
        with scene_in(lab, tmp_path / to_host, options=options) as scene:
            scene.start()
            wait_for(lambda: get(lab, "/readyz", address=NODE_ADDRESS)[0] == 200, "it is ready")
            assert get(lab, "/readyz", host="node-2", address=NODE_ADDRESS)[0] == 200
            assert connects(lab, "shop/web", NODE_ADDRESS, PORT) == expected
