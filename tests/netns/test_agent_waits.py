# SPDX-License-Identifier: Apache-2.0
"""An agent that waits for an API server which does not answer: real pods and connections show what is open."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import DB_POLICY, LATE, NODE, PODS, ClusterScene, lab_for, scene_in, to_db, wait_for
from other_version import WIDER_CONFIG, VersionedScene, make_version, schema

from netpol_ebpf.agent import core
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import ICMP, TCP, UDP

pytestmark = pytest.mark.netns
pytest.importorskip("msgspec", reason="the extra [kubernetes] is not installed")

NEW = "10.1.0.8"
NOBODY = {
    "apiVersion": "v1", "kind": "Config", "current-context": "c",
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
    "contexts": [{"name": "c", "context": {"cluster": "c"}}],
}  # fmt: skip
"""A kubeconfig of a server at a port without a listener."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for(PODS, outside=[LATE]) as one:
        yield one


@dataclass
class WaitingScene(ClusterScene, VersionedScene):
    """A scene of any version, with or without an API server."""


@pytest.fixture
def scene(lab: Lab, tmp_path: Path) -> Iterator[WaitingScene]:
    """An agent that is not started yet, with an API server that does not answer."""
    with scene_in(lab, tmp_path / "home", {"cluster.yaml": PODS, "db.yaml": DB_POLICY}, kind=WaitingScene) as one:
        assert isinstance(one, WaitingScene)
        (one.home / "kubeconfig").write_text(json.dumps(NOBODY))
        yield one
        one.tree = None


@pytest.fixture
def new_pod(lab: Lab) -> Iterator[Callable[[], None]]:
    """Yields a function that adds a pod with the address `NEW`, routed like the others. The pod answers pings."""
    namespace = f"{lab.token}-new"
    lab.record(namespaces=[namespace])

    def plug() -> None:
        for arguments in (
            ["ip", "netns", "add", namespace],
            ["ip", "link", "add", "newpod", "type", "veth", "peer", "name", "eth0", "netns", namespace],
            ["ip", "-n", namespace, "link", "set", "eth0", "up"],
            ["ip", "-n", namespace, "address", "add", f"{NEW}/32", "dev", "eth0"],
            ["ip", "-n", namespace, "route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink"],
            ["ip", "link", "set", "newpod", "up"],
            ["ip", "address", "add", "169.254.1.1/32", "dev", "newpod", "scope", "link"],
            ["ip", "route", "add", f"{NEW}/32", "dev", "newpod"],
        ):
            lab.run(NODE, arguments)

    yield plug
    lab.run(NODE, ["ip", "link", "del", "newpod"], check=False)
    lab.run(NODE, ["ip", "netns", "del", namespace], check=False)


def pings(scene: ClusterScene, host: str, address: str) -> bool:
    """Whether a host gets an answer to its ping."""
    return scene.reached(Attempt(host, ip_address(address), ICMP, 0)) == [True]


@pytest.mark.parametrize("is_older", [False, True], ids=["same version", "older schema"])
def test_pod_that_appears_while_the_agent_waits_is_closed(
    scene: WaitingScene, new_pod: Callable[[], None], tmp_path: Path, *, is_older: bool
) -> None:
    """The pins are of this version or an older one. Old pods, their connections, the node and its probes continue."""
    if is_older:
        scene.tree = make_version(tmp_path / "older", (schema(-1), WIDER_CONFIG))
    scene.is_of_files = True
    scene.start()
    wait_for(lambda: scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False], "policy is in force")
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    before = scene.attached()
    scene.stop()

    scene.is_of_files, scene.tree = False, None
    scene.launch()
    scene.await_status(lambda state: "waiting" in state, "the agent waits")
    new_pod()
    wait_for(lambda: scene.attached().get("newpod") == {"ingress", "egress"}, "the new interface has the programs")
    assert {name: hooks for name, hooks in scene.attached().items() if name != "newpod"} == before
    assert not pings(scene, "shop/other", NEW)
    lab = scene.lab
    done = lab.run(NODE, ["ip", "netns", "exec", f"{lab.token}-new", "ping", "-c1", "-W1", "10.1.0.3"], check=False)
    assert done.returncode != 0, done.stdout
    assert held.exchange(5.0)
    assert scene.reached(to_db("shop/web"), to_db("shop/other"), to_db(NODE)) == [True, False, True]
    state = scene.await_status(lambda now: "newpod" in now["waiting"], "the closed interface is told")
    assert "what an earlier agent put in force stays" in state["waiting"]

    scene.stop()
    scene.is_of_files = True
    scene.start()
    assert held.exchange(5.0)
    held.close()
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]


def test_node_reaches_its_pods_while_nothing_is_known(scene: WaitingScene) -> None:
    """Without pins, saved state and server, only the node's probes of every family and protocol pass."""
    scene.launch()
    state = scene.await_status(lambda now: "waiting" not in now, "the workloads are closed")
    assert not state["in_force"]
    (waits,) = (one for one in state["problems"] if one["slug"] == core.NOT_SYNCED)
    assert "the workloads of this node are closed, except for connections of the node" in waits["message"]
    assert [one["state"] for one in state["interfaces"]].count("closed") == 4
    assert state["endpoints"] == []
    web = ip_address("10.1.0.1")
    probes = [
        to_db(NODE), to_db(NODE, 6), Attempt(NODE, web, UDP, 5353), Attempt(NODE, web, ICMP, 0),
        Attempt(NODE, LATE.addresses[0], ICMP, 0),
    ]  # fmt: skip
    assert scene.reached(*probes) == [True] * len(probes)
    between = [
        to_db("shop/web"), to_db("shop/web", 6), to_db("shop/other"), to_db("shop/far"), to_db("node-2"),
        Attempt("shop/web", ip_address("172.30.0.10"), TCP, 5432),
    ]  # fmt: skip
    assert scene.reached(*between) == [False] * len(between)
    # The node's own traffic continues when the objects arrive, and so does its open connection to a pod.
    held = scene.lab.prober.hold(to_db(NODE))
    assert held is not None
    scene.stop()
    scene.is_of_files = True
    scene.start()
    wait_for(lambda: scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False], "policy is in force")
    assert held.exchange(5.0)
    held.close()
