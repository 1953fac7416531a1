# SPDX-License-Identifier: Apache-2.0
"""Interfaces that the CNI plugin hands over: which is whose, and with which addresses, before the cluster says so.

When a runtime makes a pod's interface, the Pod object has no address yet and may not have arrived.  What the plugin says is
evidence like the results that runtimes keep (`netpol_ebpf.agent.cni`), and the addresses count until the object has its own.

Invariant: a handover speaks for one pod, by its UID where both sides have one, and for one interface as long as it exists.
Knows no interface and no policy; `netpol_ebpf.agent.core` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from netpol_ebpf.apply.records import checked, checked_list
from netpol_ebpf.errors import UsageError
from netpol_ebpf.policy.types import EndpointKey, IPAddress

POD = "Pod"
LONGEST_S = 600
"""As the plugin has it (cni/netpol_cni.c)."""


@dataclass(frozen=True, slots=True)
class Handover:
    """A pod's interface. ``peer``: as of `wiring.Interface`; ``inside``: its name in the pod; ``uid``: empty where nobody said it."""

    pod: EndpointKey
    uid: str
    ifindex: int
    name: str
    peer: tuple[int, int]
    inside: str
    addresses: tuple[IPAddress, ...]

    def is_of(self, uid: str) -> bool:
        """Whether the pod with this UID can be the one that was meant."""
        return not self.uid or not uid or self.uid == uid


class Handovers:
    """Those of interfaces that exist."""

    def __init__(self) -> None:
        self._by_pod: dict[EndpointKey, dict[str, Handover]] = {}  # by the interface's name inside
        self._changed: set[EndpointKey] = set()

    @property
    def is_changed(self) -> bool:
        """Whether there is something for `take_changed`."""
        return bool(self._changed)

    @property
    def pods(self) -> Iterable[EndpointKey]:
        """Those that have any; to be read only."""
        return self._by_pod.keys()

    def of(self, pod: EndpointKey) -> list[Handover]:
        """A pod's, in the order in which they came."""
        return [*self._by_pod.get(pod, {}).values()]

    def add(self, handover: Handover) -> None:
        """Take one up, in place of one for the same interface of the pod, which was made anew."""
        if handover in self.of(handover.pod):
            return
        self.forget([handover.ifindex])
        self._by_pod.setdefault(handover.pod, {})[handover.inside] = handover
        self._changed.add(handover.pod)

    def forget(self, gone: Collection[int]) -> None:
        """These interfaces are no more. Cost: linear in the interfaces that there are."""
        old = [one for pod in self._by_pod for one in self.of(pod) if one.ifindex in gone]
        for one in old:
            del self._by_pod[one.pod][one.inside]
            if not self._by_pod[one.pod]:
                del self._by_pod[one.pod]
            self._changed.add(one.pod)

    def take_changed(self) -> set[EndpointKey]:
        """The pods of which one came or went since the last call."""
        changed, self._changed = self._changed, set()
        return changed


def parse_attach(request: Mapping[str, Any]) -> tuple[Handover, int]:
    """What the plugin asks for, and for how many seconds it waits. Raises UsageError."""
    try:
        text = {name: checked(request.get(name), str, name) for name in ("namespace", "name", "inside", "interface")}
        if not all(text.values()):
            raise ValueError("a name is empty")  # noqa: TRY301 - told like all others
        wait_s = checked(request.get("timeout_s"), int, "timeout_s")
        if not 0 <= wait_s <= LONGEST_S:
            raise ValueError("timeout_s is out of its range")  # noqa: TRY301 - the same
        nsid, inner = checked_list(request.get("peer"), int, "peer", 2)
        addresses = checked_list(request.get("addresses"), str, "addresses")
        handover = Handover(
            EndpointKey(POD, text["namespace"], text["name"]),
            checked(request.get("uid", ""), str, "uid"),
            checked(request.get("ifindex"), int, "ifindex"),
            text["interface"],
            (nsid, inner),
            text["inside"],
            tuple(dict.fromkeys(ip_interface(one).ip for one in addresses)),
        )
        if not handover.addresses:
            raise ValueError("there is no address")  # noqa: TRY301 - the same
    except ValueError as error:
        raise UsageError(f"not an interface to attach: {error}") from error
    return handover, wait_s
