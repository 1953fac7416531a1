# SPDX-License-Identifier: Apache-2.0
"""Closed workloads: what the node's interfaces say of workloads while no object is known and nothing is in force.

After a reboot without an API server, the agent knows workloads' interfaces and no pod.  An interface without an endpoint
denies everything, also the node's own packets, so the kubelet would end the containers of pods that run.  Therefore the
agent gives each such interface a WorkloadEndpoint of its own, without profile and without policy: policy denies all
packets in both directions, and connections of the node pass, as they do to every workload.

Invariant: the first objects of the source replace these endpoints in one change.  The module decides no addresses:
`LocalInterfaces.evident_addresses` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.errors import Location
from netpol_ebpf.policy.translate import ResourceKey, key_of
from netpol_ebpf.policy.types import EndpointKey, IPAddress
from netpol_ebpf.resources.types import Meta, WorkloadEndpoint
from netpol_ebpf.sources.source import ObjectEvent, Remove, Upsert

ORCHESTRATOR = "closed"
"""Label of these endpoints, in place of ``k8s``."""


class ClosedWorkloads:
    """The WorkloadEndpoints of workloads whose pods are not known, as events."""

    def __init__(self, node: str | None) -> None:
        """``node``: name of this node."""
        self._node = node or ""
        self._made: dict[ResourceKey, WorkloadEndpoint] = {}

    def __bool__(self) -> bool:
        return bool(self._made)

    @property
    def keys(self) -> Collection[EndpointKey]:
        """Keys of the endpoints."""
        return {EndpointKey(*key) for key in self._made}

    def update(self, interfaces: Iterable[tuple[Interface, tuple[IPAddress, ...]]]) -> tuple[ObjectEvent, ...]:
        """The events that make the endpoints those of these interfaces, removals first. ``interfaces``: with addresses."""
        before = self._made
        wanted = [_endpoint(link.name, addresses, self._node) for link, addresses in interfaces]
        self._made = {key_of(one): one for one in wanted}
        removed = [_remove(key, one) for key, one in before.items() if key not in self._made]
        new = [Upsert(one, key, _version(one)) for key, one in self._made.items() if before.get(key) != one]
        return (*removed, *new)

    def release(self) -> tuple[ObjectEvent, ...]:
        """The events that remove all endpoints."""
        return self.update(())


def _endpoint(interface: str, addresses: tuple[IPAddress, ...], node: str) -> WorkloadEndpoint:
    return WorkloadEndpoint(
        meta=Meta(interface, "", {}, Location("")),
        node=node,
        orchestrator=ORCHESTRATOR,
        workload=interface,
        interface=interface,
        addresses=addresses,
        profiles=(),
        ports=(),
    )


def _remove(key: ResourceKey, one: WorkloadEndpoint) -> ObjectEvent:
    return Remove(one, key, _version(one))


def _version(one: WorkloadEndpoint) -> str:
    return ",".join(map(str, one.addresses))
