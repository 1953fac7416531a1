# SPDX-License-Identifier: Apache-2.0
"""The pods of deploy/manifests, run as a kubelet runs them, on a node of network namespaces, at a real API server.

A container has a mount namespace with a read-only root, the mounts, environment, capabilities and command of its
manifest, and the token of the manifest's account. It runs this machine's programs in place of the image's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_objects import DEPLOY, documents
from test_source import OwnServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "netns"))

from agent_scene import Scene, lab_for, scene_in, to_db, wait_for, with_capabilities
from test_agent_at_server import NODE, Relay, in_force, kubeconfig, own_server
from test_privilege import bpffs

from netpol_ebpf.lab import guard

__all__ = ["bpffs", "own_server"]  # fixtures

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root: network namespaces cannot be made")

ROOT = DEPLOY.parent
PROGRAMS = {"netpol-agent": "netpol_ebpf.agent.main", "netpolctl": "netpol_ebpf.cli.main"}
ENTER = """
set -e
lower=$1 root=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$root"
mkdir "$root/upper" "$root/work" "$root/inside"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$root/upper,workdir=$root/work" "$root/inside"
root=$root/inside
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t sysfs sysfs "$root/sys"
mkdir -p "$root/usr/lib/netpol-ebpf"  # where the image has its compiled file
mount --bind /var/cache/netpol-ebpf "$root/usr/lib/netpol-ebpf"
mount -t tmpfs tmpfs "$root/var/cache"
while [ "$1" != -- ]; do
    mkdir -p "$root/$2"
    mount --bind "$1" "$root/$2"
    shift 2
done
shift
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""
"""A shell script. Arguments: the directory with the root's content, an empty directory, pairs of (directory, its path
in the container), ``--``, and the command."""


@dataclass
class PodScene(Scene):
    """A node whose directories are below the scene's own, and the containers of its pods.

    ``port``: that of the API server. ``bpf``: the node's BPF file system.
    """

    port: int = 0
    bpf: Path = Path()

    @property
    def state_dir(self) -> Path:
        return self.of_node(Path("/run/netpol-ebpf"))

    def of_node(self, path: Path) -> Path:
        """The path of a directory of the node."""
        return self.bpf if path == Path("/sys/fs/bpf") else self.home / "node" / path.relative_to("/")

    def command(self, *_options: str) -> list[str]:
        return self.container("agent-flannel", "agent")

    def container(self, manifest: str, name: str) -> list[str]:
        """The command line of a container of a manifest."""
        objects = {one["kind"]: one for one in documents(DEPLOY / "manifests" / f"{manifest}.yaml")}
        pod = objects["DaemonSet"]["spec"]["template"]["spec"]
        every = {one["name"]: one for one in (*pod.get("initContainers", ()), *pod["containers"])}
        volumes = {one["name"]: self._volume(one, objects) for one in pod["volumes"]}
        mounts: list[str] = []
        for mount in every[name]["volumeMounts"]:
            place = mount["mountPath"].replace("/var/run/", "/run/")  # /var/run is a link
            mounts += [str(volumes[mount["name"]]), place]
        security = every[name]["securityContext"]
        assert security["readOnlyRootFilesystem"]
        capabilities = [one.lower() for one in security["capabilities"].get("add", ())]
        program, *arguments = every[name]["command"]
        root = self.home / f"root-{manifest}-{name}"
        root.mkdir(exist_ok=True)
        return [
            "unshare", "--mount", "sh", "-c", ENTER, "sh", "/", str(root), *mounts, "--",
            *with_capabilities(capabilities),
            "env", "--ignore-environment", f"--chdir={ROOT}", f"PYTHONPATH={ROOT}:{ROOT / 'loader'}", f"NODE_NAME={NODE}",
            "KUBERNETES_SERVICE_HOST=127.0.0.1", f"KUBERNETES_SERVICE_PORT={self.port}",
            sys.executable, "-m", PROGRAMS[program], *arguments,
        ]  # fmt: skip

    def _volume(self, volume: dict[str, Any], objects: dict[str, Any]) -> Path:
        """The directory of a volume. It is created if the type of the volume permits this."""
        if "hostPath" in volume:
            path = self.of_node(Path(volume["hostPath"]["path"]))
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True)
        elif "configMap" in volume:
            path = self.home / volume["name"]
            path.mkdir(exist_ok=True)
            assert objects["ConfigMap"]["metadata"]["name"] == volume["configMap"]["name"]
            for name, text in objects["ConfigMap"]["data"].items():
                (path / name).write_text(text)
        else:
            path = self.home / "account"
        return path


@pytest.fixture
def scene(own_server: OwnServer, bpffs: Path, tmp_path: Path) -> Iterator[PodScene]:
    """The node, the API server where the node can reach it, and the account's token where kubelet puts it."""
    with (
        lab_for() as lab,
        scene_in(
            lab, tmp_path / "home", {}, kind=PodScene, pin_root=bpffs / "netpol", port=own_server.port, bpf=bpffs
        ) as one,
    ):
        assert isinstance(one, PodScene)
        relay = Relay(guard.NETNS_DIR / lab.namespace_of[NODE], own_server.port)
        account = one.home / "account"
        account.mkdir()
        (account / "token").write_text(yaml.safe_load(kubeconfig(own_server))["users"][0]["user"]["token"])
        (account / "ca.crt").write_bytes(own_server._authority.read_bytes())
        for path in ("run", "var/lib"):
            (one.home / "node" / path).mkdir(parents=True)
        yield one
        relay.close()


def is_ready(scene: PodScene) -> bool:
    """Whether the readiness probe of the agent's container succeeds."""
    *_, daemonset = documents(DEPLOY / "manifests" / "agent-flannel.yaml")
    probe = daemonset["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    url = f"http://{probe['host']}:{probe['port']}{probe['path']}"
    return scene.lab.run(NODE, ["curl", "--silent", "--fail", url], check=False).returncode == 0


def test_pods_of_the_manifests(scene: PodScene) -> None:
    """The agent enforces and is replaced, the plugin is installed, and the cleanup leaves nothing on the node."""
    web, other = to_db("shop/web"), to_db("shop/other")
    assert scene.reached(web, other) == [True, True]
    scene.start()
    in_force(scene)
    wait_for(lambda: is_ready(scene), "kubelet's probe of readiness succeeds")
    assert scene.reached(web, other) == [True, False]
    scene.stop()
    assert scene.reached(web, other) == [True, False]
    scene.start()
    in_force(scene)
    assert scene.reached(web, other) == [True, False]

    configurations = scene.of_node(Path("/etc/cni/net.d"))
    configurations.mkdir(parents=True, exist_ok=True)
    before = '{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}]}'
    (configurations / "10-flannel.conflist").write_text(before)
    follower = scene.lab.start(NODE, scene.container("agent-flannel", "cni"))
    try:
        wait_for(
            lambda: "netpol-cni" in (configurations / "10-flannel.conflist").read_text(), "the plugin is installed"
        )
    finally:
        follower.terminate()
        scene.lab.stop(follower)
    program = scene.of_node(Path("/opt/cni/bin")) / "netpol-cni"
    assert os.access(program, os.X_OK)

    refused = scene.lab.run(NODE, scene.container("cleanup", "cleanup"), check=False)
    assert refused.returncode == 5, "an agent runs"
    assert scene.reached(web, other) == [True, False]
    scene.stop()
    done = scene.lab.run(NODE, scene.container("cleanup", "cleanup"), check=False)
    assert done.returncode == 0, done.stderr
    assert scene.reached(web, other) == [True, True]
    assert not scene.pin_root.exists()
    assert list(scene.of_node(Path("/run")).iterdir()) == []
    assert [one.name for one in scene.of_node(Path("/var/lib")).iterdir()] == ["cni"], "the runtime's results"
    assert not program.exists()
    assert yaml.safe_load((configurations / "10-flannel.conflist").read_text()) == yaml.safe_load(before)
    tables = subprocess.run(
        [*scene.lab.command(NODE, ["nft", "list", "tables"])], capture_output=True, text=True, check=True
    )
    assert "np_barrier" not in tables.stdout
