# SPDX-License-Identifier: Apache-2.0
"""Handovers: messages in which the CNI plugin tells the agent a pod's interface and addresses.

When a runtime makes a pod's interface, the Pod object may have no address yet, may have addresses of an earlier
sandbox, or may not have arrived. A handover is evidence like the results that runtimes keep (`netpol_ebpf.agent.cni`).
Its addresses count until the Pod object has one of them.

Invariant: a handover is about one pod and one interface, and is kept as long as the interface exists, in a file for the
next agent. The pod is identified by its UID if both the handover and the Pod object have one. This module does not know
the node's interfaces or policy.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from netpol_ebpf.apply.records import EntryFile, checked, checked_list
from netpol_ebpf.errors import Location, Problem, UsageError
from netpol_ebpf.policy.types import EndpointKey, IPAddress

log = logging.getLogger(__name__)

FORMAT = 1
MOST_BYTES = 1 << 24
"""Largest file that is read, in bytes. The number is arbitrary: a hundred times what a full node needs."""
POD = "Pod"
FIRST = "eth0"
"""The name that containerd and CRI-O give to a pod's first interface, which has the addresses in the pod's status."""
LONGEST_S = 600
"""Longest time in seconds that the plugin may wait. It must be the same as in cni/netpol_cni.c."""


@dataclass(frozen=True, slots=True)
class Handover:
    """One message of the CNI plugin about an interface of a pod.

    ``peer``: the other end of the pair, as in `wiring.Interface`. ``inside``: the interface's name in the pod's
    namespace. ``uid``: the UID of the pod; "" if the plugin sent none.
    """

    pod: EndpointKey
    uid: str
    ifindex: int
    name: str
    peer: tuple[int, int]
    inside: str
    addresses: tuple[IPAddress, ...]

    @property
    def is_first(self) -> bool:
        """Whether this is the pod's first interface, which has the addresses in the pod's status."""
        return self.inside == FIRST

    def is_of(self, uid: str) -> bool:
        """Whether the handover may be about the pod with this UID. An unknown UID, "", matches all."""
        return not self.uid or not uid or self.uid == uid


class Handovers:
    """The handovers of interfaces that exist."""

    def __init__(self, file: Path | None = None) -> None:
        """``file``: the file that keeps handovers across restarts; None: they are not kept."""
        self._file = None if file is None else EntryFile(file, "handovers", FORMAT, MOST_BYTES)
        self._damage: tuple[Problem, ...] = ()
        self._unsaved: tuple[Problem, ...] = ()
        self._by_pod: dict[EndpointKey, dict[str, Handover]] = {}  # by pod, then by the interface's name in the pod
        self._changed: set[EndpointKey] = set()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of reading and writing the file."""
        return self._damage + self._unsaved

    @property
    def is_changed(self) -> bool:
        """Whether `take_changed` would return any pod."""
        return bool(self._changed)

    @property
    def pods(self) -> Iterable[EndpointKey]:
        """The pods that have a handover; read-only for callers."""
        return self._by_pod.keys()

    def of(self, pod: EndpointKey) -> list[Handover]:
        """The handovers of a pod's interfaces."""
        return [*self._by_pod.get(pod, {}).values()]

    def add(self, handover: Handover) -> None:
        """Add a handover.

        An earlier one for the interface of this name in the pod is replaced: the interface is new.
        """
        if handover in self.of(handover.pod):
            return
        self.forget([handover.ifindex])
        self._by_pod.setdefault(handover.pod, {})[handover.inside] = handover
        self._changed.add(handover.pod)

    def forget(self, gone: Collection[int]) -> None:
        """Remove the handovers of interfaces that no longer exist. Cost: linear in the number of handovers."""
        old = [one for pod in self._by_pod for one in self.of(pod) if one.ifindex in gone]
        for one in old:
            del self._by_pod[one.pod][one.inside]
            if not self._by_pod[one.pod]:
                del self._by_pod[one.pod]
            self._changed.add(one.pod)

    def take_changed(self) -> set[EndpointKey]:
        """The pods whose handovers changed since the last call.

        The file is written first, so that policy never uses a handover that the file lacks.
        """
        changed, self._changed = self._changed, set()
        if changed and self._file is not None:
            self._save(self._file)
        return changed

    def recall(self) -> None:
        """Read the handovers that an earlier agent stored.

        If entries cannot be read, they are reported, and the file is renamed so that nothing overwrites it.
        """
        if self._file is None:
            return
        damage = self._file.load(lambda written: self.add(_read(checked(written, dict, "an entry"))))
        if damage:
            self._damage = (_problem(self._file.path, f"is {damage}"),)
            log.warning("%s", self._damage[0])

    def _save(self, file: EntryFile) -> None:
        """Write all handovers to the file. A failure is reported, and the next change writes again."""
        self._unsaved = ()
        try:
            file.save(json.dumps(_write(one)) for pod in self._by_pod for one in self.of(pod))
        except OSError as error:
            self._unsaved = (_problem(file.path, f"cannot be kept ({error.strerror})"),)


def parse_attach(request: Mapping[str, Any]) -> tuple[Handover, int]:
    """Parse the plugin's request; returns the handover, and the seconds that the plugin waits. Raises UsageError."""
    try:
        wait_s = checked(request.get("timeout_s"), int, "timeout_s")
        if not 0 <= wait_s <= LONGEST_S:
            raise ValueError("timeout_s is out of its range")  # noqa: TRY301 - reported like all others
        return _read(request), wait_s
    except ValueError as error:
        raise UsageError(f"not an interface to attach: {error}") from error


def _problem(file: Path, what: str) -> Problem:
    """A problem with the file of handovers. ``what``: the predicate of the message's first sentence."""
    message = (
        f"what the CNI plugin handed over {what}: after a restart of the agent, pods that the cluster has no address of yet are "
        "closed until it has"
    )
    return Problem(Location(str(file)), "", message, severity="warning", slug="interfaces-file")


def _read(written: Mapping[str, Any]) -> Handover:
    """Parse one encoded entry of the file. Raises ValueError."""
    text = {name: checked(written.get(name), str, name) for name in ("namespace", "name", "inside", "interface")}
    if not all(text.values()):
        raise ValueError("a name is empty")
    nsid, inner = checked_list(written.get("peer"), int, "peer", 2)
    addresses = checked_list(written.get("addresses"), str, "addresses")
    if not addresses:
        raise ValueError("there is no address")
    return Handover(
        EndpointKey(POD, text["namespace"], text["name"]),
        checked(written.get("uid", ""), str, "uid"),
        checked(written.get("ifindex"), int, "ifindex"),
        text["interface"],
        (nsid, inner),
        text["inside"],
        tuple(dict.fromkeys(ip_interface(one).ip for one in addresses)),
    )


def _write(handed: Handover) -> dict[str, Any]:
    """Encode one handover in the form that `_read` parses."""
    return {
        "namespace": handed.pod.namespace, "name": handed.pod.name, "uid": handed.uid, "ifindex": handed.ifindex,
        "interface": handed.name, "peer": [*handed.peer], "inside": handed.inside,
        "addresses": [*map(str, handed.addresses)],
    }  # fmt: skip
