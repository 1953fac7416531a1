# SPDX-License-Identifier: Apache-2.0
"""Reads libcni's cache: the results in which CNI plugins report the interfaces that they made for pods.

Container runtimes (containerd, CRI-O, podman) keep one file for each interface of each pod until the pod is removed.
The file names the pod and the interface, and no pod can write it.

Invariant: a file is used only if no user but root can write it. A file that cannot be read is a problem, and nothing of
its content is used.
"""

from __future__ import annotations

import base64
import os
import stat
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from netpol_ebpf.apply.records import checked, checked_list, load_regular, parse_json, reason_of
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.types import EndpointKey, IPAddress

DEFAULT_DIR = Path("/var/lib/cni/results")
POD = "Pod"
NAMES = ("K8S_POD_NAMESPACE", "K8S_POD_NAME")
"""The CNI arguments that identify the pod. Runtimes pass them to every plugin."""
UNSEEN_TYPES = frozenset({"macvlan", "ipvlan", "vlan", "host-device", "sriov", "ib-sriov", "tap"})
"""Types of plugins whose interfaces have no end on the node, or an end on the node that packets do not pass."""
MOST_BYTES = 1 << 20
"""Largest file that is read, in bytes. The number is arbitrary; real files have some kilobytes."""

_Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class CniResult:
    """One interface of a pod, as its CNI plugin reported it.

    ``names``: names of the interfaces on the node that belong to it. ``inside``: the interface's name in the pod.
    ``plugin``: the type of the plugin.
    """

    pod: EndpointKey
    names: frozenset[str]
    addresses: frozenset[IPAddress]
    inside: str
    plugin: str

    @property
    def is_unseen(self) -> bool:
        """Whether the pod's packets pass no interface of the node at which a program could see them."""
        return self.plugin in UNSEEN_TYPES


@dataclass(slots=True)
class CniResultCache:
    """A reader of the cache directory. ``problems``: files that the last `look` could not read."""

    directory: Path
    problems: tuple[Problem, ...] = ()
    _read: dict[str, tuple[_Signature, CniResult | None]] = field(default_factory=dict)
    _faulty: dict[str, Problem] = field(default_factory=dict)

    def look(self) -> list[CniResult]:
        """Read the present results; [] if the directory does not exist. Unchanged files are not read again."""
        try:
            if not _is_trusted(self.directory.stat()):
                raise PermissionError(0, "users other than root may write it", str(self.directory))
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
            if not _is_trusted(status):
                raise ValueError("users other than root may write it")  # noqa: TRY301 - reported like all others
            self._read[name] = (signature, parse_result(load_regular(path, MOST_BYTES)))
        except FileNotFoundError:
            self._read.pop(name, None)
        except (OSError, ValueError) as error:
            self._faulty[name] = _problem(path, reason_of(error))


def parse_result(text: bytes) -> CniResult | None:
    """Parse one file of libcni's cache; None if the file is not about a pod.

    Raises ValueError if libcni would not have written such a file.
    """
    document = checked(parse_json(text), dict, "the file")
    given = (
        checked_list(one, str, "an argument", 2) for one in checked_list(document.get("cniArgs") or [], list, "cniArgs")
    )
    arguments = {key: value for key, value in given}  # noqa: C416 - mypy takes no lists for pairs
    if not all(arguments.get(name) for name in NAMES):
        return None
    config = checked(parse_json(base64.b64decode(_text(document, "config") or "e30=")), dict, "config")
    plugins = checked_list(config.get("plugins") or [config], dict, "plugins")
    result = checked(document.get("result") or {}, dict, "result")
    interfaces = checked_list(result.get("interfaces") or [], dict, "interfaces")
    addresses = checked_list(result.get("ips") or [], dict, "ips")
    return CniResult(
        EndpointKey(POD, *(arguments[name] for name in NAMES)),
        frozenset(checked(one.get("name"), str, "name") for one in interfaces if not _text(one, "sandbox")),
        frozenset(ip_interface(checked(one.get("address"), str, "address")).ip for one in addresses),
        _text(document, "ifName"),
        _text(plugins[0], "type"),
    )


def _text(document: dict[Any, Any], name: str) -> str:
    """A string field of ``document``; "" if the field is absent or null, as in Go."""
    return checked(document.get(name) or "", str, name)


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _problem(path: Path, why: str) -> Problem:
    message = f"cannot be read ({why}): the agent locates interfaces without it"
    return Problem(Location(str(path)), "", message, severity="warning", slug="cni-results")
