# SPDX-License-Identifier: Apache-2.0
"""Closed workloads: endpoints that the agent makes for workloads' interfaces while it knows no objects.

After a reboot without an API server, the agent knows the interfaces of workloads but no pods. An interface without an
endpoint denies everything, including the node's own packets. So the kubelet's probes would fail, and it would end the
containers of running pods. Therefore the agent gives each such interface a WorkloadEndpoint without profile and policy.
Policy then denies all packets in both directions, except connections that the node opens, which may reach every
workload.

Invariant: the first objects of the source replace these endpoints in one change. This module does not find addresses:
`LocalInterfaces.with_evident_addresses` does.
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
"""The value of the field ``orchestrator`` in the endpoints of closed workloads. A pod's endpoint has the value
``k8s``."""


class ClosedWorkloads:
    """The WorkloadEndpoints for workloads whose pods are not known, as events."""

    def __init__(self, node: str | None) -> None:
        """``node``: the name of this node; None: not known."""
        self._node = node or ""
        self._made: dict[ResourceKey, WorkloadEndpoint] = {}

    def __bool__(self) -> bool:
        return bool(self._made)

    @property
    def keys(self) -> Collection[EndpointKey]:
        """The keys of the endpoints that exist now."""
        return {EndpointKey(*key) for key in self._made}

    def update(self, interfaces: Iterable[tuple[Interface, tuple[IPAddress, ...]]]) -> tuple[ObjectEvent, ...]:
        """Make one endpoint for each interface; returns the resulting events, removals first.

        ``interfaces``: each interface with its addresses.
        """
        before = self._made
        wanted = [_endpoint(link.name, addresses, self._node) for link, addresses in interfaces]
        self._made = {key_of(one): one for one in wanted}
        removed = [_remove(key, one) for key, one in before.items() if key not in self._made]
        new = [Upsert(one, key, _version(one)) for key, one in self._made.items() if before.get(key) != one]
        return (*removed, *new)

    def release(self) -> tuple[ObjectEvent, ...]:
        """Remove all endpoints; returns the resulting events."""
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
