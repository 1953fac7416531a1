# SPDX-License-Identifier: Apache-2.0
"""The part of a container runtime in CNI: a list of plugins as in a configuration file, run for pods as libcni does."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from agent_scene import NODE

from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.topology import IPAddress

DEADLINE_S = 60.0


class CniError(Exception):
    """A plugin failed. ``error``: its error object."""

    def __init__(self, plugin: str, error: Mapping[str, Any]) -> None:
        super().__init__(f"{plugin}: {error}")
        self.error = error


@dataclass(slots=True)
class Sandbox:
    """A pod's namespace, and what the plugins made of it. ``namespace``: its name. ``uid``: of the pod; "": none."""

    pod: str
    namespace: str
    uid: str = ""
    container: str = field(default_factory=lambda: secrets.token_hex(32))
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        return tuple(ip_interface(one["address"]).ip for one in self.result["ips"])


@dataclass(frozen=True, slots=True)
class PluginList:
    """A file of a runtime's configuration directory. ``path``: the directories with plugins."""

    lab: Lab
    file: Path
    path: Sequence[Path]

    def add(self, sandbox: Sandbox) -> dict[str, Any]:
        """ADD of all plugins, each with the result of the one before.

        If one fails, those before are undone by DEL, and CniError is raised.
        """
        document = json.loads(self.file.read_text())
        for number, plugin in enumerate(document["plugins"]):
            try:
                result = self._call("ADD", document, plugin, sandbox, result=sandbox.result)
            except CniError:
                for one in reversed(document["plugins"][: number + 1]):
                    self._call("DEL", document, one, sandbox, result=sandbox.result)
                raise
            assert result is not None
            sandbox.result = result
        return sandbox.result

    def delete(self, sandbox: Sandbox) -> None:
        """DEL of all plugins, the last one first."""
        document = json.loads(self.file.read_text())
        for plugin in reversed(document["plugins"]):
            self._call("DEL", document, plugin, sandbox, result=sandbox.result)

    def call_last(self, command: str, sandbox: Sandbox, *, version: str | None = None, **more: Any) -> Any:
        """Run a command of the last plugin only, by another version of the specification if given. Raises CniError."""
        document = json.loads(self.file.read_text())
        if version is not None:
            document["cniVersion"] = version
        return self._call(command, document, {**document["plugins"][-1], **more}, sandbox, result=sandbox.result)

    def _call(
        self, command: str, document: Mapping[str, Any], plugin: Mapping[str, Any], sandbox: Sandbox, *, result: Any
    ) -> dict[str, Any] | None:
        """Run a plugin in the node's namespace. Returns its output."""
        config = {**plugin, "cniVersion": document["cniVersion"], "name": document["name"]}
        if result:
            config["prevResult"] = result
        arguments = {
            "IgnoreUnknown": "1", "K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": sandbox.pod,
            "K8S_POD_INFRA_CONTAINER_ID": sandbox.container, **({"K8S_POD_UID": sandbox.uid} if sandbox.uid else {}),
        }  # fmt: skip
        environment = {
            "CNI_COMMAND": command, "CNI_CONTAINERID": sandbox.container, "CNI_NETNS": str(NETNS_DIR / sandbox.namespace),
            "CNI_IFNAME": "eth0", "CNI_PATH": ":".join(map(str, self.path)),
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in arguments.items()),
        }  # fmt: skip
        programs = [one / str(plugin["type"]) for one in self.path]
        program = next((one for one in programs if one.exists()), None)
        assert program is not None, f"there is no plugin {plugin['type']}: apt install containernetworking-plugins"
        done = subprocess.run(
            self.lab.command(NODE, [str(program)]),
            input=json.dumps(config), env={**os.environ, **environment},
            check=False, capture_output=True, text=True, timeout=scaled(DEADLINE_S),
        )  # fmt: skip
        if done.returncode != 0:
            raise CniError(program.name, json.loads(done.stdout))
        return json.loads(done.stdout) if done.stdout else None
