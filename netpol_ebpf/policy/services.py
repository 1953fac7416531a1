# SPDX-License-Identifier: Apache-2.0
"""The destination translation of nodes: the backends of services, node ports and host ports.

Backends are read from EndpointSlices, as in kube-proxy.  If a service has no EndpointSlice, the pods that its selector
selects are its backends.

Invariant: the result has every backend that a node may choose.  This module cannot determine which backend a node
chooses, nor whether the node translates at all.  It evaluates no policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from netpol_ebpf.policy.translate import endpoints
from netpol_ebpf.policy.types import PORT_PROTOCOLS, IPAddress, Packet, Vip, VipKey
from netpol_ebpf.resources.types import EndpointSlice, Pod, Resource, Service, SlicePort

BackendAddress = tuple[IPAddress, int]
"""(address, port) of a backend."""


@dataclass(frozen=True, slots=True)
class Translation:
    """The backends of a packet's destination.

    ``owners``: the names of the objects that cause the translation, such as ``Service/shop/db``.
    """

    owners: tuple[str, ...]
    backends: tuple[BackendAddress, ...]


class ServiceAddresses:
    """The addresses and ports that nodes translate. Cost to create: linear in the resources."""

    def __init__(self, vips: Mapping[VipKey, Vip], resources: Iterable[Resource]) -> None:
        """Find, for each destination, the objects that cause its translation.

        ``vips``: the destinations of a world that nodes translate.
        ``resources``: the objects from which ``vips`` was derived.  They give the names of the owners.
        """
        services: list[Service] = []
        pods: defaultdict[str, list[Pod]] = defaultdict(list)
        sliced: set[tuple[str, str]] = set()
        self._vips = vips
        self._owners: defaultdict[VipKey, list[str]] = defaultdict(list)
        self._selected: defaultdict[VipKey, set[BackendAddress]] = defaultdict(set)  # services without EndpointSlice
        for one in resources:
            if isinstance(one, Service):
                services.append(one)
            elif isinstance(one, Pod):
                pods[one.meta.namespace].append(one)
                for vip in endpoints.host_ports(one):
                    self._owners[vip.key].append(f"Pod/{one.meta.namespace}/{one.meta.name}")
            elif isinstance(one, EndpointSlice) and one.service:
                sliced.add((one.meta.namespace, one.service))
        for service in services:
            name = service.meta.namespace, service.meta.name
            stand_ins = () if name in sliced else tuple(_slices_of(service, pods[name[0]]))
            for vip in endpoints.vips(service, stand_ins):
                self._owners[vip.key].append("/".join(("Service", *name)))
                self._selected[vip.key] |= vip.backends

    def find(self, packet: Packet, node: str | None) -> Translation | None:
        """The services and backends of a packet's destination.

        None if no node translates that destination.
        ``node``: the node that has the destination address; None if no node has it.
        """
        if packet.protocol not in PORT_PROTOCOLS:
            return None
        addresses = (packet.destination,) if node is None else (packet.destination, None)
        nodes = ("",) if node is None else ("", node)
        keys = [VipKey(address, packet.protocol, packet.destination_port, at) for address in addresses for at in nodes]
        found = [key for key in keys if key in self._vips]
        if not found:
            return None
        behind = {one for key in found for one in self._vips[key].backends | self._selected.get(key, set())}
        version = packet.destination.version
        owners = dict.fromkeys(owner for key in found for owner in sorted(self._owners.get(key, ())))
        return Translation(tuple(owners), tuple(sorted(one for one in behind if one[0].version == version)))


def _slices_of(service: Service, pods: Iterable[Pod]) -> Iterator[EndpointSlice]:
    """The EndpointSlices that the cluster would write for a service: one for each selected pod.

    ``pods``: all pods of the service's namespace.
    """
    if not service.selector:
        return
    for pod in pods:
        if service.selector.items() <= pod.meta.labels.items() and pod.addresses:
            ports = tuple(
                SlicePort(port.name, port.protocol, _target(port.target_port or port.port, port.protocol, pod))
                for port in service.ports
            )
            yield EndpointSlice(replace(pod.meta, name=service.meta.name), service.meta.name, pod.addresses, ports)


def _target(target: int | str, protocol: int, pod: Pod) -> int | None:
    """The port number of a service's ``targetPort`` at a pod. None if the pod declares no port by that name."""
    if isinstance(target, int):
        return target
    return next((one.port for one in pod.ports if (one.name, one.protocol) == (target, protocol)), None)
