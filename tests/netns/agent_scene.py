# SPDX-License-Identifier: Apache-2.0
"""The scene of every test with an agent: two nodes with pods, an agent on one node, and the manifests that it reads.

`lab_for` builds the nodes and pods of manifests, and `scene_in` puts an agent's directories into that laboratory. Real
connections show what policy does; the agent's own answers show what it reports.

Invariant: an agent pins below the laboratory's own directory, which is removed with it, so scenes of several processes
never collide.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import SOCKET_NAME, ask
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.scene import plan_for
from netpol_ebpf.lab.topology import TCP, Host
from netpol_ebpf.resources.load import parse_documents
from netpol_loader.kernel import syscall

NODE = "node-1"
ATTACH_TYPES = {syscall.TCX_INGRESS: "ingress", syscall.TCX_EGRESS: "egress"}
HOOKS = tuple(ATTACH_TYPES.values())
DEADLINE_S = scaled(180.0)
"""Time limit in seconds for events that take milliseconds, or the seconds of a compilation. Only a fault or a stalled
machine exceeds it."""

POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: x, ports: [{{containerPort: 5432}}]}}]}}
status: {{podIPs: [{{ip: 10.1.0.{last}}}, {{ip: "fd00:1::{last}"}}]}}
"""
NODE_OBJECT = """\
apiVersion: v1
kind: Node
metadata: {{name: {name}}}
status: {{addresses: [{addresses}]}}
---
"""
SHOP = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
"""


def with_capabilities(names: Iterable[str]) -> list[str]:
    """The beginning of a command line whose process has only these capabilities and cannot get others."""
    only = ",".join(("-all", *(f"+{name}" for name in names)))
    return ["setpriv", "--no-new-privs", "--bounding-set", only, "--inh-caps", only]


def render_nodes(*addresses: str) -> str:
    """The nodes with these addresses, and the namespace of the pods.

    ``{}``: 10 for the first node, 20 for the second.
    """
    internal = ", ".join(f"{{type: InternalIP, address: {one}}}" for one in addresses)
    nodes = [(NODE, 10), ("node-2", 20)]
    return (
        "".join(NODE_OBJECT.format(name=name, addresses=internal.replace("{}", str(last))) for name, last in nodes)
        + SHOP
    )


ALL_PODS = "".join(
    POD.format(name=name, node=node, last=last)
    for last, (name, node) in enumerate([("web", NODE), ("db", NODE), ("other", NODE), ("far", "node-2")], 1)
)
CLUSTER = render_nodes("172.30.0.{}") + ALL_PODS
NODES = render_nodes("172.30.0.{}", '"fd00:30::{}"')
"""Nodes with an address of each family, and no pods."""
OPEN_PORT = 5353
PODS = NODES + ALL_PODS.replace(
    "{containerPort: 5432}", f"{{containerPort: 5432}}, {{containerPort: {OPEN_PORT}, protocol: UDP}}"
)
"""The same nodes, with pods that also listen on the UDP port `OPEN_PORT`."""
LATE = Host("shop/late", NODE, (ip_address("10.1.0.9"), ip_address("fd00:1::9")))
"""A pod that exists from the start, but not in the manifests."""
DB_POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 5432}]
"""
OTHER_ALLOWED = DB_POLICY.replace("name: db,", "name: other,").replace("app: web", "app: other")

DEFAULTS = {"cluster.yaml": CLUSTER, "db.yaml": DB_POLICY}

DB = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}


def to_db(source: str, version: int = 4) -> Attempt:
    """An attempt to connect to the database's port."""
    return Attempt(source, DB[version], TCP, 5432)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true, and return its value. Fails after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")


@dataclass
class Scene:
    """An agent that a test can start, its directories, and the laboratory in which it works."""

    lab: Lab
    home: Path
    pin_root: Path
    node: str | None = NODE
    options: tuple[str, ...] = ()
    entry: tuple[str, ...] = ("-m", "netpol_ebpf.agent.main")
    """The arguments of the Python process."""
    beginning: Mapping[str, str] = field(default_factory=lambda: DEFAULTS)
    """The initial manifests, by file name."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def manifests(self) -> Path:
        return self.home / "manifests"

    @property
    def state_dir(self) -> Path:
        return self.home / "state"

    def command(self, *options: str) -> list[str]:
        node = ["--node", self.node] if self.node else []
        return [
            sys.executable, *self.entry, "--manifests", str(self.manifests), *node,
            "--pin-root", str(self.pin_root), "--state-dir", str(self.state_dir), *self.options, *options,
        ]  # fmt: skip

    def write(self, name: str, text: str) -> None:
        """Write a manifest atomically. An empty text: write a file that states that it has no objects."""
        draft = self.home / "draft"
        draft.write_text(text or "---\n")
        draft.rename(self.manifests / name)

    def launch(self) -> None:
        """Start the agent without waiting."""
        with (self.home / "agent.log").open("ab") as log:
            self.process = self.lab.start(NODE, self.command(), stdout=log, stderr=subprocess.STDOUT)

    def start(self) -> dict[str, Any]:
        """Start the agent, and wait until its first state is in force.

        Returns its status. If its source cannot sync, use `launch`.
        """
        self.launch()
        return self.await_status(lambda state: "waiting" not in state, "the agent's first state is in force")

    def status(self) -> dict[str, Any] | None:
        """The agent's status; None if it does not answer."""
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended:\n{(self.home / 'agent.log').read_text()}"
        try:
            (state,) = ask(self.state_dir / SOCKET_NAME, {"op": "status"})
        except UnreachableError:
            return None
        return dict(state)

    def state(self) -> dict[str, Any]:
        """The agent's status. Fails if it does not answer."""
        return self.await_status(lambda _state: True, "the agent answers")

    def await_status(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Poll the status until a condition on it is true."""

        def look() -> dict[str, Any] | None:
            state = self.status()
            return state if state is not None and condition(state) else None

        found: dict[str, Any] = wait_for(look, what)
        return found

    def kill(self) -> None:
        """End the agent by SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.lab.stop(self.process)

    def stop(self) -> str:
        """End the agent by SIGTERM. Returns its output."""
        assert self.process is not None
        assert self.lab.stop(self.process) == 0
        return (self.home / "agent.log").read_text()

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run netpolctl on the node."""
        return self.lab.run(NODE, [sys.executable, "-m", "netpol_ebpf.cli.main", *arguments], check=False)

    def cleanup(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run netpolctl cleanup for this agent."""
        return self.ctl("cleanup", "--pin-root", str(self.pin_root), "--state-dir", str(self.state_dir), *options)

    def reached(self, *attempts: Attempt) -> list[bool]:
        """Make real connections. Returns for each whether it was answered."""
        return [result.reached for result in self.lab.attempt(attempts)]

    def await_reached(self, attempt: Attempt, *, expected: bool) -> None:
        """Make new connections until one ends as expected."""
        wait_for(lambda: self.reached(attempt) == [expected], f"{attempt} reached: {expected}")

    def attached(self) -> dict[str, set[str]]:
        """The hooks with programs by the kernel's lists: {interface of the node: {"ingress", "egress"}}."""
        names = {one["ifindex"]: one["ifname"] for one in json.loads(self.lab.run(NODE, ["ip", "-j", "link"]).stdout)}
        found: dict[str, set[str]] = {}
        for pin in self.pin_root.glob("v*/links/*_*"):
            ifindex = int(pin.name.partition("_")[0])
            if pin.is_dir():  # a directory marks an interface with clsact filters
                hooks = self._filters(names[ifindex]) if ifindex in names else set()
            else:
                fd = syscall.obj_get(pin)
                info = syscall.link_info(fd)
                os.close(fd)
                hooks = {ATTACH_TYPES[info.attach_type]} if info.ifindex else set()
            if hooks:
                found.setdefault(names[ifindex], set()).update(hooks)
        return found

    def _filters(self, interface: str) -> set[str]:
        """The hooks at which clsact runs a program of the agent."""
        shown = {hook: self.lab.run(NODE, ["tc", "filter", "show", "dev", interface, hook]).stdout for hook in HOOKS}
        return {hook for hook, text in shown.items() if f"np_tc_{hook}" in text}

    def enforce(self, *policies: str, cluster: str | None = None, endpoints: Iterable[str] = ()) -> None:
        """Put exactly these policies in force.

        ``cluster``: replaces the initial cluster. ``endpoints``: wait until these are enforced.
        """
        self.write("cluster.yaml", self.beginning["cluster.yaml"] if cluster is None else cluster)
        self.write("policy.yaml", "---\n".join(policies))
        kinds = sum(one.count("NetworkPolicy\n") for one in policies)
        before = self.state()["changes_applied"]
        marker = f"marker-{secrets.token_hex(4)}"
        self.write("marker.yaml", f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {marker}}}\n")
        self.await_status(
            lambda state: (
                state["in_force"]
                and state["objects"]["policies"] == kinds
                and state["changes_applied"] > before
                and set(endpoints) <= {one["endpoint"] for one in state["endpoints"] if one["state"] == "enforced"}
            ),
            "the manifests are in force",
        )

    def retire(self) -> None:
        """End the agent and its enforcement."""
        if self.process is not None and self.process.poll() is None:
            self.lab.stop(self.process)
        done = self.cleanup()
        assert done.returncode == 0, done.stderr

    def reset(self) -> None:
        """Restore the initial manifests, and an agent that has them in force."""
        for path in self.manifests.iterdir():
            if path.name not in self.beginning:
                path.unlink()
        for name, text in self.beginning.items():
            self.write(name, text)
        if self.process is None or self.process.poll() is not None:
            self.start()
        policies = {path.name for path in self.manifests.iterdir()} - {"cluster.yaml"}
        self.await_status(
            lambda state: state["in_force"] and state["objects"]["policies"] == len(policies),
            "the manifests are in force",
        )
        wait_for(
            lambda: self.reached(to_db("shop/web"), to_db("shop/other")) == [True, False], "the policy of the beginning"
        )


@dataclass
class ClusterScene(Scene):
    """A scene with an agent that watches the API server of a kubeconfig.

    While ``is_of_files`` is set, it reads the manifests.
    """

    is_of_files: bool = False

    def command(self, *options: str) -> list[str]:
        kept = super().command(*options)
        if self.is_of_files:
            return kept
        at = kept.index("--manifests")
        kubeconfig = ("--kubeconfig", str(self.home / "kubeconfig"), "--saved-state", str(self.home / "cluster"))
        return [*kept[:at], *kubeconfig, *kept[at + 2 :]]


@contextlib.contextmanager
def lab_for(cluster: str = CLUSTER, *, outside: Iterable[Host] = ()) -> Iterator[Lab]:
    """The nodes and pods of a manifest, the hosts ``outside``, and a directory for pins."""
    pin_root = Path(f"/sys/fs/bpf/netpol-test-{os.getpid()}-{secrets.token_hex(3)}")
    plan = plan_for(parse_documents(cluster, "cluster.yaml").check(), outside)
    with Lab(plan, directories=[pin_root]) as lab:
        yield lab


@contextlib.contextmanager
def scene_in(
    lab: Lab,
    home: Path,
    manifests: Mapping[str, str] = DEFAULTS,
    *,
    kind: type[Scene] = Scene,
    pin_root: Path | None = None,
    **options: Any,
) -> Iterator[Scene]:
    """A scene with the manifests written and no agent yet. At the end, everything that an agent did is undone.

    ``home``: a directory that is created here and removed. ``pin_root``: the directory of the pins; None: one below the
    laboratory's directory.
    """
    pin_root = pin_root or lab.directories[0] / secrets.token_hex(3)
    scene = kind(lab, home, pin_root, beginning=manifests, **options)
    scene.manifests.mkdir(parents=True)
    for name, text in manifests.items():
        scene.write(name, text)
    try:
        yield scene
    finally:
        scene.retire()
        shutil.rmtree(home)
