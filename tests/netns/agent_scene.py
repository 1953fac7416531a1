# SPDX-License-Identifier: Apache-2.0
"""A laboratory with an agent on its node: pods from manifests, real connections, and the agent's own answers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import SOCKET_NAME, ask
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import TCP
from netpol_loader.kernel import syscall

NODE = "node-1"
DEADLINE_S = 180.0
"""For what takes milliseconds, or the seconds of a compile: only a fault, or a machine that stands still, exceeds it."""

POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: x, ports: [{{containerPort: 5432}}]}}]}}
status: {{podIPs: [{{ip: 10.1.0.{last}}}, {{ip: "fd00:1::{last}"}}]}}
"""
CLUSTER = """\
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 172.30.0.10}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-2}
status: {addresses: [{type: InternalIP, address: 172.30.0.20}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
""" + "".join(
    POD.format(name=name, node=node, last=last)
    for last, (name, node) in enumerate([("web", NODE), ("db", NODE), ("other", NODE), ("far", "node-2")], 1)
)
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
    """A connection to the database's port."""
    return Attempt(source, DB[version], TCP, 5432)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true; its value. Fails after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")


@dataclass
class Scene:
    """An agent to be, its directories, and the laboratory it works in."""

    lab: Lab
    home: Path
    pin_root: Path
    node: str | None = NODE
    options: tuple[str, ...] = ()
    entry: tuple[str, ...] = ("-m", "netpol_ebpf.agent.main")
    """How Python is told what to run."""
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
        """Put a manifest in place in one step. An empty text: a file that says that it has no objects."""
        draft = self.home / "draft"
        draft.write_text(text or "---\n")
        draft.rename(self.manifests / name)

    def launch(self) -> None:
        """Start the agent and wait for nothing."""
        with (self.home / "agent.log").open("ab") as log:
            self.process = self.lab.start(NODE, self.command(), stdout=log, stderr=subprocess.STDOUT)

    def start(self) -> dict[str, Any]:
        """Start the agent and wait until it answers; its status."""
        self.launch()
        return self.state()

    def status(self) -> dict[str, Any] | None:
        """The agent's status, None while it does not answer."""
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended:\n{(self.home / 'agent.log').read_text()}"
        try:
            (state,) = ask(self.state_dir / SOCKET_NAME, {"op": "status"})
        except UnreachableError:
            return None
        return dict(state)

    def state(self) -> dict[str, Any]:
        """The status of an agent that answers."""
        return self.await_status(lambda _state: True, "the agent answers")

    def await_status(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Poll the status until it is as wanted."""

        def look() -> dict[str, Any] | None:
            state = self.status()
            return state if state is not None and condition(state) else None

        found: dict[str, Any] = wait_for(look, what)
        return found

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.lab.stop(self.process)

    def stop(self) -> str:
        """SIGTERM; what the agent had written."""
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
        """What came of real connections."""
        return [result.reached for result in self.lab.attempt(attempts)]

    def await_reached(self, attempt: Attempt, *, expected: bool) -> None:
        """Try until a new connection ends as expected."""
        wait_for(lambda: self.reached(attempt) == [expected], f"{attempt} reached: {expected}")

    def attached(self) -> dict[str, set[str]]:
        """Links on the node's interfaces: {interface: {hook, ...}}; by the kernel's word on each pinned link."""
        names = {one["ifindex"]: one["ifname"] for one in json.loads(self.lab.run(NODE, ["ip", "-j", "link"]).stdout)}
        found: dict[str, set[str]] = {}
        for pin in self.pin_root.glob("v*/links/*_*"):
            fd = syscall.obj_get(pin)
            info = syscall.link_info(fd)
            os.close(fd)
            if info.ifindex:
                hook = {syscall.TCX_INGRESS: "ingress", syscall.TCX_EGRESS: "egress"}[info.attach_type]
                found.setdefault(names[info.ifindex], set()).add(hook)
        return found

    def retire(self) -> None:
        """End the agent and its enforcement."""
        if self.process is not None and self.process.poll() is None:
            self.lab.stop(self.process)
        done = self.cleanup()
        assert done.returncode == 0, done.stderr

    def reset(self) -> None:
        """The manifests of the beginning, and an agent that has them in force."""
        for path in self.manifests.iterdir():
            if path.name not in DEFAULTS:
                path.unlink()
        for name, text in DEFAULTS.items():
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


@contextlib.contextmanager
def scene_in(lab: Lab, home: Path, pin_root: Path, *, kind: type[Scene] = Scene, **options: Any) -> Iterator[Scene]:
    """A scene with the manifests in place and no agent yet; whatever it did is undone at the end."""
    scene = kind(lab, home, pin_root, **options)
    scene.manifests.mkdir(parents=True)
    for name, text in DEFAULTS.items():
        scene.write(name, text)
    try:
        yield scene
    finally:
        scene.retire()
        shutil.rmtree(home)
