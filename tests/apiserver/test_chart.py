# SPDX-License-Identifier: Apache-2.0
"""deploy/chart with the real Helm, and the plain manifests with the real kubectl, at a real API server.

There is no controller and no kubelet. `Controllers` does their part of an uninstallation, and runs the commands of its
Jobs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_objects import CHART, DEPLOY, documents
from server import TOKEN, Server

ROOT = DEPLOY.parent
MERGE = "application/merge-patch+json"
DAEMONSETS = "/apis/apps/v1/namespaces/kube-system/daemonsets"
JOBS = "/apis/batch/v1/namespaces/kube-system/jobs"
CONFIG = "/api/v1/namespaces/kube-system/configmaps/netpol-agent"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
"""The search path: the directory into which scripts/setup.sh --dev installs helm and kubectl, then the machine's
own."""
NODES = 3
INSTALL = ("install", "netpol-ebpf", str(CHART), "--namespace=kube-system")
FOREIGN = "tiers.projectcalico.org"
"""A definition that the cluster has before the chart, as with Calico."""


def config(server: Server, token: str) -> str:
    """A kubeconfig."""
    cluster = {"server": f"https://127.0.0.1:{server.port}", "certificate-authority": str(server._authority)}
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    })  # fmt: skip


class Tools:
    """Runs Helm and kubectl as the administrator."""

    def __init__(self, server: Server, home: Path) -> None:
        self._home = home
        self.kubeconfig = home / "kubeconfig"
        self.kubeconfig.write_text(config(server, TOKEN))

    def run(self, *command: str, is_ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command, which must succeed (``is_ok``) or must fail."""
        environment = {"PATH": TOOLS, "HOME": str(self._home), "KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
        assert (done.returncode == 0) == is_ok, done.stdout + done.stderr
        return done

    def helm(self, *arguments: str, is_ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run helm."""
        return self.run("helm", *arguments, is_ok=is_ok)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server without any object of ours."""
    made = Server(Path(os.environ["KUBE_APISERVER"]), Path(os.environ["ETCD"]), tmp_path / "server")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def tools(own_server: Server, tmp_path: Path) -> Tools:
    """The tools for `own_server`."""
    return Tools(own_server, tmp_path)


def names(server: Server, path: str) -> set[str]:
    """The names of the objects in a collection."""
    answer = server.get(path)
    assert answer.status == 200, answer.message
    return {one["metadata"]["name"] for one in answer.body["items"]}


class Controllers(threading.Thread):
    """The controllers of DaemonSets and Jobs, the garbage collector and the kubelets, as an uninstallation needs them.

    ``seen``: the events, in order. ``faults``: the errors of the API server and of the Jobs' commands.
    """

    def __init__(self, server: Server, home: Path) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._home = home
        self._done = threading.Event()
        self._jobs: dict[str, threading.Thread] = {}
        self.seen: list[str] = []
        self.faults: list[str] = []

    def __enter__(self) -> Controllers:  # noqa: PYI034 - typing.Self is of 3.11
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
        for thread in self._jobs.values():
            thread.join()

    def run(self) -> None:
        """Look at the objects again and again until the test is done."""
        with self._server.for_thread() as server:
            while not self._done.wait(0.1):
                for one in server.get(DAEMONSETS).body["items"]:
                    self._look_at_daemonset(server, one)
                for one in server.get(JOBS).body["items"]:
                    if one["metadata"]["uid"] not in self._jobs:
                        thread = threading.Thread(target=self._run_job, args=(one,))
                        self._jobs[one["metadata"]["uid"]] = thread
                        thread.start()

    def _look_at_daemonset(self, server: Server, one: dict[str, Any]) -> None:
        path = f"{DAEMONSETS}/{one['metadata']['name']}"
        if "foregroundDeletion" in one["metadata"].get("finalizers", ()):
            self.seen.append(f"pods of {one['metadata']['name']} end")
            self._patch(server, path, {"metadata": {"finalizers": None}})
        elif one["metadata"]["name"] == "netpol-cleanup" and not one["status"].get("observedGeneration"):
            self.seen.append("nodes are cleaned")
            numbers = ("desiredNumberScheduled", "currentNumberScheduled", "numberReady", "numberAvailable")
            status = {"observedGeneration": 1, "numberMisscheduled": 0, **dict.fromkeys(numbers, NODES)}
            self._patch(server, f"{path}/status", {"status": status})

    def _run_job(self, job: dict[str, Any]) -> None:
        with self._server.for_thread() as server:
            self._run_command(server, job)

    def _run_command(self, server: Server, job: dict[str, Any]) -> None:
        """Run the command of the Job's container, with the account of its pod."""
        name, spec = job["metadata"]["name"], job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600},
        }
        account = f"/api/v1/namespaces/kube-system/serviceaccounts/{spec['serviceAccountName']}/token"
        kubeconfig = self._home / f"{name}.kubeconfig"
        kubeconfig.write_text(config(server, server.request("POST", account, request).body["status"]["token"]))
        program, *arguments = container["command"]
        assert program == "netpolctl"
        command = [sys.executable, "-m", "netpol_ebpf.cli.main", *arguments, "--kubeconfig", str(kubeconfig)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            self.faults.append(done.stderr)
            return
        self.seen.append(f"{name} is complete")
        now = job["metadata"]["creationTimestamp"]
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": now, "lastProbeTime": now}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        status = {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions}
        self._patch(server, f"{JOBS}/{name}/status", {"status": status})

    def _patch(self, server: Server, path: str, change: dict[str, Any]) -> None:
        answer = server.request("PATCH", path, change, content_type=MERGE)
        if answer.status not in (200, 404):
            self.faults.append(answer.message)


@pytest.mark.parametrize("network", ["flannel", "aws-vpc"])
def test_life_of_a_release(own_server: Server, tools: Tools, tmp_path: Path, network: str) -> None:
    """The release is installed, upgraded, and removed by the hooks; earlier objects and those of users stay."""
    (foreign,) = documents(CHART / "crds" / f"{FOREIGN}.yaml")
    foreign["metadata"]["labels"] = {"whose": "another"}
    assert own_server.apply(foreign).status == 201
    before = names(own_server, DAEMONSETS)

    tools.helm(*INSTALL, f"--set=network={network}")
    assert names(own_server, DAEMONSETS) == before | {"netpol-agent"}
    assert {path.stem for path in (CHART / "crds").glob("*.*.yaml")} <= names(own_server, DEFINITIONS)
    assert own_server.get(f"{DEFINITIONS}/{FOREIGN}").body["metadata"]["labels"] == {"whose": "another"}
    policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
    assert {"tier-rights.projectcalico.org", "built-in-tiers.projectcalico.org"} <= names(own_server, policies)
    rendered, _daemonset = documents(DEPLOY / "manifests" / f"agent-{network}.yaml")
    before_upgrade = own_server.get(CONFIG).body["data"]
    assert before_upgrade == rendered["data"]

    tools.helm(
        "upgrade",
        "netpol-ebpf",
        str(CHART),
        "--namespace=kube-system",
        "--reset-then-reuse-values",
        "--set=config.keepRevoked=true",
    )
    wanted = {**yaml.safe_load(before_upgrade["config.yaml"]), "keepRevoked": True}
    assert yaml.safe_load(own_server.get(CONFIG).body["data"]["config.yaml"]) == wanted
    assert own_server.get(f"{DAEMONSETS}/netpol-agent").body["metadata"]["generation"] == 2, "the agents are replaced"

    tier = {"apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": "ours"}, "spec": {"order": 5}}
    own_server.wait_for(lambda: own_server.apply(tier).status in (200, 201), "a tier is taken")
    with Controllers(own_server, tmp_path) as controllers:
        tools.helm("uninstall", "netpol-ebpf", "--namespace=kube-system", "--timeout=100s")
    assert controllers.faults == []
    assert controllers.seen[:4] == [
        "pods of netpol-agent end",
        "netpol-agents-gone is complete",
        "nodes are cleaned",
        "netpol-nodes-clean is complete",
    ]
    own_server.wait_for(lambda: not names(own_server, JOBS), "the Jobs are deleted")
    own_server.wait_for(lambda: names(own_server, DAEMONSETS) == before, "the DaemonSets are deleted")
    for kind in (
        "clusterroles",
        "clusterrolebindings",
        "namespaces/kube-system/roles",
        "namespaces/kube-system/rolebindings",
    ):
        assert not {
            one for one in names(own_server, f"/apis/rbac.authorization.k8s.io/v1/{kind}") if one.startswith("netpol")
        }
    accounts = names(own_server, "/api/v1/namespaces/kube-system/serviceaccounts")
    assert not {one for one in accounts if one.startswith("netpol")}
    assert "tier-rights.projectcalico.org" not in names(own_server, policies)
    assert {path.stem for path in (CHART / "crds").glob("*.*.yaml")} <= names(own_server, DEFINITIONS)
    assert "ours" in names(own_server, "/apis/projectcalico.org/v3/tiers")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((), "network"),
        (("--set=network=weave",), "network"),
        (("--set=network=flannel", "--set=cni.timeout=0"), "timeout"),
        (("--set=network=flannel", "--set=cni.delay=9"), "delay"),
        (("--set=network=flannel", "--set=config.stateDir=/tmp"), "stateDir"),
    ],
)
def test_wrong_values_are_refused(own_server: Server, tools: Tools, values: tuple[str, ...], words: str) -> None:
    """The message names the values, and nothing is created."""
    done = tools.helm(*INSTALL, *values, is_ok=False)
    assert words in done.stderr
    assert "netpol-agent" not in names(own_server, DAEMONSETS)


def test_plain_manifests_are_taken(own_server: Server, tools: Tools) -> None:
    """The API server stores exactly each file: kubectl's strict validation rejects unknown and repeated fields."""
    tools.run("kubectl", "apply", "--server-side", "-k", str(CHART / "crds"))
    tools.run("kubectl", "apply", "-k", str(CHART / "admission"))
    for path in sorted((DEPLOY / "manifests").glob("*.yaml")):
        tools.run("kubectl", "apply", "--server-side", "--validate=strict", "-f", str(path))
        for obj in documents(path):
            assert obj["kind"] != "DaemonSet" or obj["metadata"]["name"] in names(own_server, DAEMONSETS), path
    own_server.wait_for(lambda: own_server.get("/apis/projectcalico.org/v3/tiers").status == 200, "tiers are served")
    for name in ("shop", "blue"):  # the namespaces of the examples
        assert own_server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}).status == 201
    tools.run("kubectl", "apply", "--validate=strict", "-f", str(DEPLOY / "tiers.yaml"), "-f", str(DEPLOY / "roles"))
