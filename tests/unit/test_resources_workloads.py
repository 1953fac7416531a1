# SPDX-License-Identifier: Apache-2.0
"""Deployments and the like stand for pods in `check`, `explain` and `test`, and for nothing in the agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf.cli.main import main
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import EndpointKey
from netpol_ebpf.resources.load import load_paths, parse_documents
from netpol_ebpf.resources.types import Namespace, Pod
from netpol_ebpf.resources.workloads import STAND_INS, as_cluster

TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"app": "web"}},
    "spec": {
        "serviceAccountName": "robot",
        "containers": [{"name": "c", "image": "x", "ports": [{"name": "http", "containerPort": 8080}]}],
    },
}
WORKLOADS: list[tuple[str, str, dict[str, Any]]] = [
    ("apps/v1", "Deployment", {"spec": {"replicas": 2, "template": TEMPLATE}}),
    ("apps/v1", "DaemonSet", {"spec": {"template": TEMPLATE}}),
    ("apps/v1", "StatefulSet", {"spec": {"serviceName": "web", "template": TEMPLATE}}),
    ("apps/v1", "ReplicaSet", {"spec": {"template": TEMPLATE}}),
    ("batch/v1", "Job", {"spec": {"template": TEMPLATE}}),
    ("batch/v1", "CronJob", {"spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": TEMPLATE}}}}),
    ("v1", "PodTemplate", {"template": TEMPLATE}),
    ("v1", "ReplicationController", {"spec": {"template": TEMPLATE}}),
]


def _workload(version: str, kind: str, body: dict[str, Any], name: str = "web", namespace: str = "shop") -> str:
    return json.dumps({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, **body})


DEPLOYMENT = _workload(*WORKLOADS[0])
DB = """\
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
status: {podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: http}]}]
"""


def _write(tmp_path: Path, *texts: str) -> Path:
    file = tmp_path / "all.yaml"
    file.write_text("\n---\n".join(texts), encoding="utf-8")
    return file


@pytest.mark.parametrize(("version", "kind", "body"), WORKLOADS, ids=[kind for _, kind, _ in WORKLOADS])
def test_every_workload_is_an_endpoint_without_address(
    tmp_path: Path, version: str, kind: str, body: dict[str, Any]
) -> None:
    """Labels, service account, namespace and named ports of the template; under a name that no pod can have."""
    (pod,) = load_paths([_write(tmp_path, _workload(version, kind, body))]).check()
    assert isinstance(pod, Pod)
    assert (pod.meta.namespace, pod.meta.name, pod.service_account, pod.addresses) == (
        "shop",
        f"{kind}/web",
        "robot",
        (),
    )
    assert pod.meta.labels["app"] == "web"
    endpoint = derive(as_cluster([pod])).endpoints[EndpointKey("Pod", "shop", f"{kind}/web")]
    assert [(port.name, port.port) for port in endpoint.ports] == [("http", 8080)]
    assert endpoint.labels["pcns.projectcalico.org/name"] == "shop"
    assert endpoint.labels["projectcalico.org/serviceaccount"] == "robot"


@pytest.mark.parametrize(("version", "kind", "body"), WORKLOADS, ids=[kind for _, kind, _ in WORKLOADS])
def test_the_agent_skips_every_workload(version: str, kind: str, body: dict[str, Any]) -> None:
    """Their pods come from elsewhere."""
    result = parse_documents(_workload(version, kind, body), "f")
    assert (result.resources, result.problems, result.skipped) == ([], [], {f"{version} {kind}": 1})


def test_the_pods_of_a_job_have_its_name_as_a_label(tmp_path: Path) -> None:
    """Its controller adds the labels, and policies select by them."""
    (pod,) = load_paths([_write(tmp_path, _workload(*WORKLOADS[4]))]).check()
    assert pod.meta.labels == {"app": "web", "job-name": "web", "batch.kubernetes.io/job-name": "web"}


def test_a_template_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the API server would refuse in it is said with its place."""
    text = (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  template:\n    metadata:\n      labels:\n"
        "        version: 1.10\n    spec:\n      containers:\n      - ports: [{containerPort: 0}]\n"
    )
    assert main(["check", str(_write(tmp_path, text))]) == 3
    out = capsys.readouterr().out
    assert (
        "all.yaml:8: error: Deployment/default/web: spec.template.metadata.labels.version: must be text, is the value 1.10"
        in out
    )
    assert "all.yaml:11: error: Deployment/default/web: spec.template.spec.containers[0].ports[0].containerPort" in out


def test_check_knows_what_a_template_selects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No warning of a selector, a namespace, a port name or a missing Namespace that the template answers; real ones stay."""
    policies = "---\n".join(DB.split("---\n")[2:])
    assert main(["check", "--strict", str(_write(tmp_path, DEPLOYMENT, policies.replace("app: db", "app: web")))]) == 0
    assert capsys.readouterr().out == "3 objects valid: 0 errors, 0 warnings\n"
    assert main(["check", "--strict", str(_write(tmp_path, DEPLOYMENT, policies))]) == 3
    assert "NetworkPolicy/shop/db: spec: it selects no endpoint of those given" in capsys.readouterr().out


def test_check_knows_the_namespace_of_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chart has no Namespace object; its policies may select by the namespace's name all the same."""
    policy = (
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: g}\n"
        "spec: {namespaceSelector: projectcalico.org/name == 'NAME', selector: app == 'web', types: [Ingress]}\n"
    )
    assert main(["check", "--strict", str(_write(tmp_path, DEPLOYMENT, policy.replace("NAME", "shop")))]) == 0
    assert main(["check", "--strict", str(_write(tmp_path, DEPLOYMENT, policy.replace("NAME", "other")))]) == 3
    assert "it selects no endpoint" in capsys.readouterr().out


def test_nothing_is_said_about_addresses_of_templates(tmp_path: Path) -> None:
    """They have none in `check`: a CIDR that holds all pods given is warned of, with templates beside them too."""
    pods = "".join(
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p{number}, namespace: shop}}\nstatus: {{podIPs: [{{ip: 10.0.0.{number}}}]}}\n---\n"
        for number in (3, 4)
    )
    policy = (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: cidr, namespace: shop}\n"
        "spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}\n"
    )
    file = _write(tmp_path, DEPLOYMENT, pods + policy)
    assert all(not pod.addresses for pod in as_cluster(load_paths([file]).check()) if pod.meta.name == "Deployment/web")
    assert main(["check", "--strict", str(file)]) == 3


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_explain_of_a_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    """By the workload's name, both ways, with a note that addresses stand in."""
    file = str(_write(tmp_path, DEPLOYMENT, DB))
    arguments = ["explain", "--manifests", file, "--engine", engine]
    assert main([*arguments, "--from", "shop/web", "--to", "shop/db", "--port", "5432"]) == 0
    shown = capsys.readouterr()
    assert "egress of Pod/shop/web: allow" in shown.out
    assert "note: shop/web is a workload without a pod here: 240.0.0.1 and 100::1 stand for the addresses" in shown.err
    assert main([*arguments, "--from", "shop/web", "--to", "shop/db", "--port", "80"]) == 1
    assert main([*arguments, "--from", "shop/db", "--to", "shop/web", "--port", "8080"]) == 0
    assert main([*arguments, "--from", "shop/db", "--to", "shop/web", "--port", "8081"]) == 1
    capsys.readouterr()
    assert main([*arguments, "--from", "shop/db", "--to", "10.9.9.9", "--port", "80"]) == 0
    assert "stand for" not in capsys.readouterr().err


def test_explain_prefers_a_pod_and_refuses_to_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pod of the name is that pod; of several workloads of one name none is taken."""
    job = _workload("batch/v1", "Job", {"spec": {"template": {"metadata": {"labels": {"app": "other"}}}}})
    arguments = ["explain", "--from", "shop/web", "--to", "shop/db", "--port", "5432", "--manifests"]
    assert main([*arguments, str(_write(tmp_path, DEPLOYMENT, job, DB))]) == 3
    assert "shop/web is ambiguous: Deployment/web and Job/web" in capsys.readouterr().err
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nstatus: {podIPs: [{ip: 10.0.0.9}]}\n"
    assert main([*arguments, str(_write(tmp_path, DEPLOYMENT, job, DB, pod))]) == 1
    shown = capsys.readouterr()
    assert "DENIED  10.0.0.9 -> 10.0.0.2" in shown.out
    assert "stand for" not in shown.err


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_case_files_may_name_workloads(tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    """Probes from and to them are judged like those of pods; a missing Namespace is implied as for pods."""
    objects = [json.loads(DEPLOYMENT), json.loads(_workload(*WORKLOADS[5], name="nightly", namespace="batch"))]
    probes = [
        {"from": "shop/web", "to": "shop/db", "protocol": "TCP", "port": 5432, "expect": "allow"},
        {"from": "batch/nightly", "to": "shop/db", "protocol": "TCP", "port": 5432, "expect": "deny"},
        {"from": "shop/db", "to": "shop/web", "protocol": "TCP", "port": 8080, "expect": "allow"},
        {"from": "batch/nightly", "to": "shop/web", "protocol": "TCP", "port": 8080, "expect": "deny"},
    ]
    rest = [json.loads(line) for line in _as_json_lines(DB)]
    case = tmp_path / "a.case.yaml"
    case.write_text(json.dumps({"name": "c", "manifests": [*objects, *rest], "probes": probes}), encoding="utf-8")
    assert main(["test", str(case), "--engine", engine]) == 0
    assert "4 probes" in capsys.readouterr().out


def _as_json_lines(text: str) -> list[str]:
    return [json.dumps(one) for one in yaml.safe_load_all(text)]


@pytest.mark.parametrize("kind", ["Pod", "NetworkSet"])
def test_a_workload_gives_nobody_a_namespace(tmp_path: Path, kind: str) -> None:
    """A pod whose Namespace is missing is denied what no policy decides, on the node; a Deployment beside it changes no answer."""
    version = "v1" if kind == "Pod" else "projectcalico.org/v3"
    other = f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\n"
    other += "status: {podIP: 10.0.0.3}\n" if kind == "Pod" else ""
    cluster = as_cluster(load_paths([_write(tmp_path, DEPLOYMENT, other)]).check(), addressed=True)
    assert not any(isinstance(one, Namespace) for one in cluster)


def test_a_pod_of_a_chart_leaves_the_namespace(tmp_path: Path) -> None:
    """A pod without address, such as a test hook of Helm, runs in no cluster yet."""
    hook = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\n"
    cluster = as_cluster(load_paths([_write(tmp_path, DEPLOYMENT, hook)]).check())
    assert [one.meta.name for one in cluster if isinstance(one, Namespace)] == ["shop"]


def test_as_cluster_without_workloads_changes_nothing(tmp_path: Path) -> None:
    """Pods keep their addresses, and no Namespace is added for them."""
    resources = load_paths([_write(tmp_path, DB)]).check()
    assert as_cluster(resources) == resources
    assert as_cluster(resources, addressed=True) == resources


def test_stand_ins_are_one_for_each_workload(tmp_path: Path) -> None:
    """No two share an address, and each has one of each family; what was given before keeps its place."""
    texts = [_workload(*workload, name=f"w{number}") for number, workload in enumerate(WORKLOADS)]
    cluster = as_cluster(load_paths([_write(tmp_path, *texts)]).check(), addressed=True)
    pods = [one for one in cluster if isinstance(one, Pod)]
    addresses = [address for pod in pods for address in pod.addresses]
    assert [pod.meta.name for pod in pods] == [f"w{number}" for number in range(len(WORKLOADS))]
    assert len(set(addresses)) == 2 * len(WORKLOADS)
    assert all(any(address in network for network in STAND_INS) for address in addresses)
    assert [one.meta.name for one in cluster if isinstance(one, Namespace)] == ["shop"]
