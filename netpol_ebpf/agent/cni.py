# SPDX-License-Identifier: Apache-2.0
"""What plugins of container networks left on the node about the interfaces that they made: libcni's cache of results.

Runtimes (containerd, CRI-O, podman) keep each plugin's result in a directory, a file for each interface of each pod, until the pod
goes.  It names pod and interface, and no pod can write it.

Invariant: only what root alone can write counts; a file that cannot be read is told and counts for nothing.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.types import EndpointKey, IPAddress

DEFAULT_DIR = Path("/var/lib/cni/results")
POD = "Pod"
NAMES = ("K8S_POD_NAMESPACE", "K8S_POD_NAME")
"""Arguments that runtimes give to plugins, whatever the plugin."""
UNSEEN_TYPES = frozenset({"macvlan", "ipvlan", "vlan", "host-device", "sriov", "ib-sriov", "tap"})
"""Plugins whose interfaces have no end of their own on the node, or none that packets pass."""
MOST_BYTES = 1 << 20
"""Of one file; arbitrary, real ones have some kilobytes."""

_Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Result:
    """One interface of a pod. ``names``: of interfaces on the node; ``inside``: its name in the pod; ``plugin``: its type."""

    pod: EndpointKey
    names: frozenset[str]
    addresses: frozenset[IPAddress]
    inside: str
    plugin: str

    @property
    def is_unseen(self) -> bool:
        """Whether its packets pass no interface of the node on which a program could see them."""
        return self.plugin in UNSEEN_TYPES


@dataclass(slots=True)
class PluginResults:
    """Follows the directory; ``problems``: what of it could not be read."""

    directory: Path
    problems: tuple[Problem, ...] = ()
    _read: dict[str, tuple[_Signature, Result | None]] = field(default_factory=dict)
    _faulty: dict[str, Problem] = field(default_factory=dict)

    def look(self) -> list[Result]:
        """What there is now, nothing where there is no directory; only files that changed are read."""
        try:
            if not _is_trusted(self.directory.stat()):
                raise PermissionError(0, "others than root may write it", str(self.directory))
            with os.scandir(self.directory) as entries:
                found = {one.name: one for one in entries if not one.name.startswith(".")}
        except (FileNotFoundError, NotADirectoryError):
            found = {}
        except OSError as error:
            self._read.clear()
            self.problems = (_problem(self.directory, error.strerror or str(error)),)
            return []
        for name in self._read.keys() - found.keys():
            del self._read[name]
            self._faulty.pop(name, None)
        for name, entry in found.items():
            self._look_at(name, Path(entry.path))
        self.problems = tuple(self._faulty.values())
        return [result for _, result in self._read.values() if result is not None]

    def _look_at(self, name: str, path: Path) -> None:
        try:
            status = path.lstat()
            signature = (status.st_ino, status.st_size, status.st_mtime_ns)
            if name in self._read and self._read[name][0] == signature:
                return
            self._faulty.pop(name, None)
            self._read[name] = (signature, None)
            if not stat.S_ISREG(status.st_mode) or not _is_trusted(status) or status.st_size > MOST_BYTES:
                raise ValueError("it is no file of root's alone, or too large")  # noqa: TRY301 - told like all others
            self._read[name] = (signature, parse_result(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            self._read.pop(name, None)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._faulty[name] = _problem(path, str(error))


def parse_result(text: str) -> Result | None:
    """One file of libcni's cache; None for what is no pod's. Raises ValueError, LookupError, TypeError or AttributeError for nonsense."""
    document: Mapping[str, Any] = json.loads(text)
    arguments = {str(key): str(value) for key, value in document.get("cniArgs") or ()}
    if not all(arguments.get(name) for name in NAMES):
        return None
    config = json.loads(base64.b64decode(document.get("config") or "e30="))
    plugins = config.get("plugins") or [config]
    result = document.get("result") or {}
    return Result(
        EndpointKey(POD, *(arguments[name] for name in NAMES)),
        frozenset(str(one["name"]) for one in result.get("interfaces") or () if not one.get("sandbox")),
        frozenset(ip_interface(one["address"]).ip for one in result.get("ips") or ()),
        str(document.get("ifName", "")),
        str(plugins[0].get("type", "")),
    )


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _problem(path: Path, why: str) -> Problem:
    message = f"cannot be read ({why}): interfaces are found without it"
    return Problem(Location(str(path)), "", message, severity="warning", slug="cni-results")
