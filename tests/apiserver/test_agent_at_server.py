# SPDX-License-Identifier: Apache-2.0
"""An agent on a node of network namespaces, with the rights of deploy/manifests/rbac.yaml at a real API server.

Real connections show which policy is in force.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from server import TOKEN, Server
from test_source import OwnServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "netns"))

from agent_scene import CLUSTER, DB_POLICY, NODE, ClusterScene, Scene, lab_for, scene_in, to_db, wait_for

from netpol_ebpf.lab import guard

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root: network namespaces cannot be made")

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = "/api/v1/namespaces/kube-system/serviceaccounts/netpol-agent"
POLICY = "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies/db"
REPORTS = "/apis/netpol-ebpf.io/v1alpha1/nodereports"
MERGE = "application/merge-patch+json"
CLONE_NEWNET = 0x40000000  # linux/sched.h


class Relay:
    """Forwards connections from a port of loopback in another network namespace to the same port here."""

    def __init__(self, namespace: Path, port: int) -> None:
        self._port = port
        self._threads: list[threading.Thread] = []
        opening = threading.Thread(target=self._listen, args=(namespace,))
        opening.start()
        opening.join()
        accepting = threading.Thread(target=self._accept, daemon=True)
        accepting.start()
        self._threads.append(accepting)

    def _listen(self, namespace: Path) -> None:
        """Listen in the other namespace. Runs in a thread that then ends, because it has entered that namespace."""
        descriptor = os.open(namespace, os.O_RDONLY)
        try:
            assert ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) == 0
        finally:
            os.close(descriptor)
        self._listener = socket.create_server(("127.0.0.1", self._port))

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                near, _ = self._listener.accept()
                thread = threading.Thread(target=self._carry, args=(near,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as far:
            other = {near: far, far: near}
            while True:
                for one in select.select([near, far], [], [], 1.0)[0]:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    other[one].sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def put(server: Server, obj: dict[str, Any]) -> None:
    """Apply an object and its status, which is a subresource."""
    answer = server.apply(obj)
    assert answer.status in (200, 201), answer.message
    if "status" in obj:
        kind = {"Pod": f"namespaces/{obj['metadata'].get('namespace')}/pods", "Node": "nodes"}[obj["kind"]]
        path = f"/api/v1/{kind}/{obj['metadata']['name']}/status"
        answer = server.request("PATCH", path, {"status": obj["status"]}, content_type=MERGE)
        assert answer.status == 200, answer.message


def give_rights(server: Server) -> None:
    """Apply deploy/manifests/rbac.yaml."""
    for one in yaml.safe_load_all((ROOT / "deploy" / "manifests" / "rbac.yaml").read_text(encoding="utf-8")):
        put(server, one)


def kubeconfig(server: Server, token: str = "") -> str:
    """A kubeconfig with a token. Without ``token``, it has a token of the agent's account that is valid for an hour."""
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    answer = server.request("POST", f"{ACCOUNT}/token", request)
    assert answer.status == 201, answer.message
    cluster = {"server": f"https://127.0.0.1:{server.port}", "certificate-authority": str(server._authority)}
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "agent",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token or answer.body["status"]["token"]}}],
        "contexts": [{"name": "agent", "context": {"cluster": "c", "user": "u"}}],
    })  # fmt: skip


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[OwnServer]:
    """A server with the objects of the scene."""
    made = OwnServer(Path(os.environ["KUBE_APISERVER"]), Path(os.environ["ETCD"]), tmp_path / "server")
    try:
        give_rights(made)
        reports = ROOT / "deploy" / "chart" / "crds" / "nodereports.netpol-ebpf.io.yaml"
        put(made, yaml.safe_load(reports.read_text(encoding="utf-8")))
        made.wait_for(lambda: made.get(REPORTS).status == 200, "reports are served")
        for one in yaml.safe_load_all(CLUSTER + "---\n" + DB_POLICY):
            put(made, one)
            if one["kind"] == "Namespace":  # no controller creates it
                account = {
                    "apiVersion": "v1",
                    "kind": "ServiceAccount",
                    "metadata": {"name": "default", "namespace": "shop"},
                }
                put(made, account)
        yield made
    finally:
        made.close()


@pytest.fixture
def scene(own_server: OwnServer, tmp_path: Path) -> Iterator[ClusterScene]:
    """The nodes and pods, an agent that is not started yet, and the API server, which the node can reach."""
    with lab_for() as lab, scene_in(lab, tmp_path / "home", {}, kind=ClusterScene) as one:
        assert isinstance(one, ClusterScene)
        relay = Relay(guard.NETNS_DIR / lab.namespace_of[NODE], own_server.port)
        (one.home / "kubeconfig").write_text(kubeconfig(own_server))
        yield one
        relay.close()


def in_force(scene: Scene) -> dict[str, Any]:
    return scene.await_status(lambda state: bool(state["in_force"]), "everything is in force")


def allow_other(server: Server, *, allowed: bool) -> None:
    """Change which pod the policy allows."""
    apps = ["web", "other"] if allowed else ["web"]
    peers = [{"podSelector": {"matchLabels": {"app": app}}} for app in apps]
    body = {"spec": {"ingress": [{"from": peers, "ports": [{"port": 5432}]}]}}
    answer = server.request("PATCH", POLICY, body, content_type=MERGE)
    assert answer.status == 200, answer.message


def test_cluster_is_enforced_through_edits_a_crash_and_a_restart(scene: ClusterScene, own_server: OwnServer) -> None:
    """An edit is enforced.

    A killed server changes no policy and is reported. Objects that were deleted while no agent ran are gone after its
    start.
    """
    web, other = to_db("shop/web"), to_db("shop/other")
    assert scene.reached(web, other) == [True, True]
    began = time.monotonic()
    scene.start()
    state = in_force(scene)
    print(f"from the agent's start to enforcement: {time.monotonic() - began:.2f} s")
    (source,) = state["sources"]
    assert source["type"] == "kubernetes"
    assert source["synced"]
    assert {one["kind"]: one["state"] for one in source["kinds"]}["pods"] == "watching"
    assert scene.reached(web, other) == [True, False]

    for allowed in (True, False):
        began = time.monotonic()
        allow_other(own_server, allowed=allowed)
        scene.await_reached(other, expected=allowed)
        print(f"from an edit to a connection that tells of it: {time.monotonic() - began:.2f} s")

    own_server.kill()
    scene.await_status(lambda now: "unreachable" in {one["slug"] for one in now["problems"]}, "the crash is told")
    assert scene.ctl("status", "--state-dir", str(scene.state_dir)).returncode == 1
    assert scene.reached(web, other) == [True, False]
    scene.stop()  # an agent that starts without its server keeps policy in force, too
    scene.launch()
    waiting = scene.await_status(lambda now: "waiting" in now, "the agent waits")
    assert "what an earlier agent put in force stays" in waiting["waiting"]
    assert scene.reached(web, other) == [True, False]
    own_server.revive()
    in_force(scene)
    assert scene.reached(web, other) == [True, False]

    scene.stop()
    assert own_server.request("DELETE", POLICY).status == 200
    assert scene.reached(web, other) == [True, False]
    scene.start()
    assert in_force(scene)["objects"]["policies"] == 0
    assert scene.reached(web, other) == [True, True]


def test_agent_tells_where_policies_are_in_force(scene: ClusterScene, own_server: OwnServer) -> None:
    """`wait` reads the agent's report with a user's kubeconfig; an edit is soon in force; one agent leads."""
    scene.start()
    in_force(scene)
    user = scene.home / "user"
    user.write_text(kubeconfig(own_server, TOKEN))
    command = ("wait", "--for=programmed", "shop/db", "--kubeconfig", str(user), "--timeout", "60s", "-o", "json")
    done = scene.ctl(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["generation"], [one["node"] for one in found["nodes"]]) == (1, [NODE])

    began = time.monotonic()
    allow_other(own_server, allowed=True)
    done = scene.ctl(*command)
    print(f"from an edit to `wait --for=programmed`: {time.monotonic() - began:.2f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)[0]["generation"] == 2
    assert scene.reached(to_db("shop/other")) == [True]

    done = scene.ctl("status", "--policy", "shop/db", "--local", "--state-dir", str(scene.state_dir), "-o", "json")
    assert (done.returncode, json.loads(done.stdout)[0]["generation"]) == (0, 2)
    lease = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/netpol-status"
    wait_for(lambda: own_server.get(lease).status == 200, "the agent leads")
    assert own_server.get(lease).body["spec"]["holderIdentity"] == NODE
    assert "status-report" not in {one["slug"] for one in in_force(scene)["problems"]}


def test_node_that_starts_without_its_server_is_closed_or_as_it_was(scene: ClusterScene, own_server: OwnServer) -> None:
    """Without pins, as after a reboot, workloads are closed and the node works.

    The saved state puts policy in force.
    """
    web, other = to_db("shop/web"), to_db("shop/other")
    own_server.kill()
    scene.launch()
    state = scene.await_status(lambda now: "waiting" not in now, "the workloads are closed")
    assert not state["in_force"]
    assert "not-synced" in {one["slug"] for one in state["problems"]}
    assert [one["state"] for one in state["interfaces"]].count("closed") == 3
    assert scene.reached(web, other, to_db(NODE)) == [False, False, True]
    own_server.revive()
    in_force(scene)
    assert scene.reached(web, other) == [True, False]
    wait_for((scene.home / "cluster").exists, "the state is saved")

    scene.stop()
    assert scene.cleanup().returncode == 0
    own_server.kill()
    scene.start()
    state = scene.await_status(lambda now: "waiting" not in now, "the saved state is in force")
    assert state["sources"][0]["restored"]
    wait_for(lambda: scene.reached(web, other) == [True, False], "the saved state is in force")
    own_server.revive()
    in_force(scene)


GLOBAL_POLICIES = "globalnetworkpolicies.projectcalico.org"
DEFINITION = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{GLOBAL_POLICIES}"
CLOSED = {
    "apiVersion": "projectcalico.org/v3",
    "kind": "GlobalNetworkPolicy",
    "metadata": {"name": "closed"},
    "spec": {"order": 1, "selector": "app == 'db'", "types": ["Ingress"], "ingress": [{"action": "Deny"}]},
}


def test_policy_of_a_deleted_definition_ends_by_release(scene: ClusterScene, own_server: OwnServer) -> None:
    """The policy stays in force and is reported. A dry run ends nothing. After the release it is no longer in force."""
    (definition,) = yaml.safe_load_all((ROOT / "deploy" / "crds" / f"{GLOBAL_POLICIES}.yaml").read_text())
    put(own_server, definition)
    own_server.wait_for(lambda: own_server.create(CLOSED).status in (201, 409), "the definition is served")
    web = to_db("shop/web")
    scene.start()
    in_force(scene)
    assert scene.reached(web) == [False]
    assert own_server.request("DELETE", DEFINITION).status == 200
    scene.await_status(lambda now: "crd-deleted" in {one["slug"] for one in now["problems"]}, "the deletion is told")
    assert scene.reached(web) == [False]
    arguments = ("release", GLOBAL_POLICIES, "--state-dir", str(scene.state_dir))
    done = scene.ctl(*arguments, "--dry-run")
    assert (done.returncode, "GlobalNetworkPolicy/closed" in done.stdout) == (0, True), done
    assert scene.reached(web) == [False]
    done = scene.ctl(*arguments)
    assert (done.returncode, "released: 1 objects" in done.stdout) == (0, True), done
    assert scene.reached(web) == [True]
    in_force(scene)
    assert scene.ctl(*arguments).returncode == 3
