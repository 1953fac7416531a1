# SPDX-License-Identifier: Apache-2.0
"""The rendered manifests fit the program: its capabilities, options and paths; and the chart says the same everywhere.

`scripts/render_manifests.py --check` proves that the manifests are the chart's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf import __version__
from netpol_ebpf.agent.barrier import parse_barrier
from netpol_ebpf.agent.cni import DEFAULT_DIR
from netpol_ebpf.agent.configuration import CONFIG_VARIABLE, DEFAULT_FILE, parse_arguments, settings_of
from netpol_ebpf.agent.health import parse_health_address
from netpol_ebpf.agent.main import BARRIER_MARKS, DEFAULT_STATE_DIR, build_parser
from netpol_ebpf.agent.source_options import DEFAULT_SAVED_STATE, NODE_VARIABLE
from netpol_ebpf.cli import main as netpolctl
from netpol_ebpf.cli.uninstall import AGENTS, CLEANUP, STEPS
from netpol_ebpf.cni.installation import DEFAULT_BIN_DIR, DEFAULT_CONF_DIR
from netpol_ebpf.sources.kubernetes.client import SERVICE_ACCOUNT
from netpol_loader.pins.doctor import BPFFS, CAPABILITIES

ROOT = Path(__file__).parents[2]
CHART, MANIFESTS = ROOT / "deploy" / "chart", ROOT / "deploy" / "manifests"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
NETWORKS: list[str] = SCHEMA["properties"]["network"]["enum"]
THREE = {
    "runAsUser": 0,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"], "add": [one.name.removeprefix("CAP_") for one in CAPABILITIES]},
}


def daemonset(name: str) -> dict[str, Any]:
    """The DaemonSet of a manifest."""
    (found,) = (
        one for one in yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()) if one["kind"] == "DaemonSet"
    )
    return dict(found)


def config(network: str) -> str:
    """The configuration file that the agent's pod has."""
    first, *_ = yaml.safe_load_all((MANIFESTS / f"agent-{network}.yaml").read_text())
    (volume,) = (one for one in pod_of(f"agent-{network}")["volumes"] if "configMap" in one)
    assert (first["kind"], first["metadata"]["name"]) == ("ConfigMap", volume["configMap"]["name"])
    (mount,) = (one for one in containers(f"agent-{network}")["agent"]["volumeMounts"] if one["name"] == volume["name"])
    ((name, text),) = first["data"].items()
    assert Path(mount["mountPath"]) / name == DEFAULT_FILE
    return str(text)


def pod_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = daemonset(name)["spec"]["template"]["spec"]
    return spec


def containers(name: str) -> dict[str, dict[str, Any]]:
    spec = pod_of(name)
    return {one["name"]: one for one in (*spec.get("initContainers", ()), *spec["containers"])}


def mounts(name: str, container: str) -> dict[Path, Path]:
    """The node's directory by the container's."""
    of_node = {one["name"]: Path(one["hostPath"]["path"]) for one in pod_of(name)["volumes"] if "hostPath" in one}
    found = containers(name)[container]["volumeMounts"]
    return {Path(one["mountPath"]): of_node[one["name"]] for one in found if one["name"] in of_node}


@pytest.mark.parametrize("network", NETWORKS)
def test_agent_of_each_network(network: str, tmp_path: Path) -> None:
    """Its configuration is valid, and the names of interfaces are ones that the barrier can close."""
    (tmp_path / "config.yaml").write_text(config(network))
    assert containers(f"agent-{network}")["agent"]["command"] == ["netpol-agent"]
    parsed = parse_arguments(build_parser(), [], {CONFIG_VARIABLE: str(tmp_path / "config.yaml")})
    assert parsed.kubernetes
    (variable,) = containers(f"agent-{network}")["agent"]["env"]
    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert variable["name"] == NODE_VARIABLE
    host, port = parse_health_address(parsed.health_address) or ("", 0)
    probes = {name: one["httpGet"] for name, one in containers(f"agent-{network}")["agent"].items() if "Probe" in name}
    assert {name: one["path"] for name, one in probes.items()} == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    assert {(one["host"], one["port"]) for one in probes.values()} == {(host, port)}
    assert (parsed.state_dir, parsed.saved_state) == (DEFAULT_STATE_DIR, DEFAULT_SAVED_STATE)
    barrier = parse_barrier(parsed.barrier, parsed.barrier_interfaces, BARRIER_MARKS, 0)
    assert bool(barrier.patterns) == (network != "other")


def test_agent_has_the_three_capabilities_and_its_directories() -> None:
    """Exactly those with which tests/netns/test_privilege.py runs it, and each directory of the node under its own name."""
    agent = containers("agent-other")["agent"]
    assert agent["securityContext"] == THREE
    seen = mounts("agent-other", "agent")
    assert seen == {path: path for path in seen}
    assert set(seen) == {BPFFS, DEFAULT_STATE_DIR, DEFAULT_SAVED_STATE.parent, DEFAULT_DIR}
    spec = pod_of("agent-other")
    assert spec["hostNetwork"]
    assert not spec.keys() & {"hostPID", "hostIPC"}


def test_agent_alone_has_the_token() -> None:
    """Mounted where the agent reads it, and nowhere else."""
    assert not pod_of("agent-other")["automountServiceAccountToken"]
    places = {
        (container["name"], mount["mountPath"])
        for container in containers("agent-other").values()
        for mount in container["volumeMounts"]
        if mount["name"] == "account"
    }
    assert places == {("agent", str(SERVICE_ACCOUNT))}
    (volume,) = (one for one in pod_of("agent-other")["volumes"] if one["name"] == "account")
    token, authority = volume["projected"]["sources"]
    assert (token["serviceAccountToken"]["path"], authority["configMap"]["items"][0]["path"]) == ("token", "ca.crt")


def test_plugin_is_kept_installed_without_a_capability() -> None:
    """The container that follows the network's configuration has the two directories and nothing else."""
    cni = containers("agent-other")["cni"]
    assert cni["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert cni["securityContext"]["readOnlyRootFilesystem"]
    parsed = netpolctl.build_parser().parse_args(cni["command"][1:])
    assert (parsed.action, parsed.follow, parsed.timeout, parsed.posture) == ("install", True, 30, "closed")
    assert mounts("agent-other", "cni") == {
        parsed.bin_dir: DEFAULT_BIN_DIR,
        parsed.conf_dir: DEFAULT_CONF_DIR,
    }


def test_nothing_is_removed_at_the_end_of_the_agent() -> None:
    """No container has a hook, and only one agent runs on a node at a time."""
    assert all("lifecycle" not in one for one in containers("agent-other").values())
    update = daemonset("agent-other")["spec"]["updateStrategy"]
    assert update == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}}


@pytest.mark.parametrize("name", ["agent-other", "cleanup"])
def test_pods_run_on_every_node_and_may_pin(name: str) -> None:
    """Whatever a node's taints are, before all other pods, and where AppArmor and SELinux would forbid pins."""
    spec = pod_of(name)
    assert spec["enableServiceLinks"] is False, "a Service named netpol-ebpf-... would set variables with our prefix"
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["securityContext"] == {
        "appArmorProfile": {"type": "Unconfined"},
        "seccompProfile": {"type": "Unconfined"},
        "seLinuxOptions": {"type": "spc_t"},
    }


def test_cleanup_can_remove_every_directory() -> None:
    """It sees the parents of the directories that the agent made, and runs as the agent does."""
    cleanup = containers("cleanup")["cleanup"]
    assert cleanup["securityContext"] == THREE
    assert cleanup["command"] == ["netpolctl", "cleanup"]
    parsed = netpolctl.build_parser().parse_args(["cleanup"])
    seen = mounts("cleanup", "cleanup")
    assert seen == {path: path for path in seen}
    assert set(seen) == {
        *(DEFAULT_STATE_DIR.parent, DEFAULT_SAVED_STATE.parent.parent, BPFFS),
        *(parsed.bin_dir, parsed.conf_dir),
    }
    assert not pod_of("cleanup")["automountServiceAccountToken"]


def test_uninstallation_names_the_daemonsets() -> None:
    """The steps of the hooks are those of the command, and their role names what it deletes and reads."""
    assert daemonset("agent-other")["metadata"]["name"] == AGENTS
    assert daemonset("cleanup")["metadata"]["name"] == CLEANUP
    text = (CHART / "templates" / "uninstall.yaml").read_text()
    assert re.findall(r"resourceNames: \[(\S+)\]\n  verbs: \[(.+)\]", text) == [
        (AGENTS, "get, delete"),
        (CLEANUP, "get"),
    ]
    assert set(re.findall(r'"([a-z]+-[a-z]+)" \d', text)) == STEPS.keys()


def test_versions_are_one() -> None:
    """The program's, the chart's and the image's."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert values["image"] == f"netpol-ebpf:{__version__}"
    assert values.keys() == set(SCHEMA["required"])


def test_paths_are_no_values() -> None:
    """Every option that names a path, or where the agent runs, is refused: the pod's mounts are made for the defaults."""
    settings = settings_of(build_parser())
    paths = {one.key for one in settings.values() if isinstance(one.default, Path) or one.action.type is Path}
    refused = set(SCHEMA["properties"]["config"]["propertyNames"]["not"]["enum"])
    assert paths <= refused
    assert refused - {one.key for one in settings.values()} == {"apiVersion", "kind"}


def test_each_network_has_names_and_a_page() -> None:
    """The schema, the template and the documents know the same networks."""
    text = (CHART / "templates" / "_helpers.tpl").read_text()
    block = text.split('define "netpol.barrierInterfaces" -}}\n')[1].split("{{- end")[0]
    assert list(yaml.safe_load(block)) == NETWORKS
    pages = {path.stem.removeprefix("beside-") for path in (ROOT / "docs").glob("beside-*.md")}
    assert pages == set(NETWORKS) - {"other"}
