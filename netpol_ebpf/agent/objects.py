# SPDX-License-Identifier: Apache-2.0
"""The translated objects of the source, the holder of each contested address, and the world in force.

Invariants: an address that several workloads claim counts only for its holder (`AddressClaims`).
`ClusterObjects.world_in_force` is the world after the last change that was applied whole. This module does not know
interfaces or maps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from netpol_ebpf.agent.change_record import ObjectCounts
from netpol_ebpf.agent.claims import AddressClaims
from netpol_ebpf.agent.handover import Handover, Handovers
from netpol_ebpf.agent.in_force import WorldInForce
from netpol_ebpf.agent.problem_log import ProblemLog
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import (
    TUNNELS,
    Changes,
    ClusterNode,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    PolicySettings,
    ResourceKey,
    Tunnel,
    World,
)
from netpol_ebpf.resources.types import Pod, Resource
from netpol_ebpf.sources.source import SourceUpdate, Upsert

log = logging.getLogger(__name__)


class ClusterObjects:
    """The objects of the source.

    Callers call `take` with an update, then `take_changes`, and `accept` when the changes are in force. ``derivation``:
    the translated objects; read-only for callers. ``local``: the workloads of this node with the addresses that they
    hold; read-only for callers. ``handovers``: interfaces that the CNI plugin handed over.
    """

    def __init__(self, settings: AgentSettings, handovers_file: Path | None = None) -> None:
        """``handovers_file``: the file that keeps handovers across restarts; None: they are not kept."""
        self.derivation = Derivation(PolicySettings(workload_to_host=settings.workload_to_host))
        self.local: dict[EndpointKey, Endpoint] = {}
        self._settings = settings
        self.handovers = Handovers(handovers_file)
        self._claims = AddressClaims(self.derivation.world)
        self._in_force = WorldInForce()
        self._source_problems = ProblemLog(log)
        self._other_owners: dict[IPAddress, str] | None = None  # hosts and nodes; None: must be computed

    @property
    def world(self) -> World:
        """The objects as the source has them; read-only for callers."""
        return self.derivation.world

    @property
    def world_in_force(self) -> World:
        """The world from which the rows in force were made; each address belongs only to its holder.

        Read-only for callers.
        """
        return self._in_force.world

    # --- changes ----------------------------------------------------------------------------------------------------

    def take(self, update: SourceUpdate) -> None:
        """Translate the changed objects of an update, and log new problems.

        No reference to the update is kept, because it is large.
        """
        self.note_problems(update.problems)
        for event in update.events:
            if isinstance(event, Upsert):
                self.derivation.upsert(event.resource, event.key)
            else:
                self.derivation.remove(*event.key)

    def note_problems(self, problems: tuple[Problem, ...]) -> None:
        """Replace the problems of the source by ``problems``. Log those that began and those that ended."""
        self._source_problems.note(problems)

    def take_changes(self, older: Collection[EndpointKey], is_idle: Callable[[EndpointKey], bool]) -> Changes:
        """The changes since the last call. A contested address belongs only to its holder.

        ``older``, ``is_idle``: see `AddressClaims.apply_changes`.
        """
        changes = self.derivation.take_changes()
        before = set(self._claims.disputes())
        self._lend_addresses(changes)
        self._claims.apply_changes(changes, older, is_idle)
        for key, endpoint in changes.endpoints.items():
            if endpoint is not None and self.is_local(endpoint):
                self.local[key] = endpoint
            else:
                self.local.pop(key, None)
            if endpoint is None or endpoint.kind is EndpointKind.HOST:
                self._other_owners = None
        if changes.nodes:
            self._other_owners = None
        self._in_force.expect(changes)
        for dispute in self._claims.disputes():
            if dispute not in before:
                log.log(logging.ERROR if dispute[2] in self.local else logging.WARNING, "%s", _dispute(*dispute))
        return changes

    @property
    def is_changed(self) -> bool:
        """Whether `take_changes` would return something."""
        return self.derivation.is_changed or self.handovers.is_changed

    def _lend_addresses(self, changes: Changes) -> None:
        """Lend pods the addresses that the CNI plugin handed over. Changed endpoints are added to ``changes``."""
        changed = self.handovers.take_changed()
        for key in {*changed, *self.handovers.pods, *self._claims.borrowers}:
            handed = self.handed(key)
            is_news = self._claims.lend(key, () if handed is None else handed.addresses)
            endpoint = self.world.endpoints.get(key)
            if endpoint is not None and (is_news or key in changed):
                changes.endpoints.setdefault(key, endpoint)

    def accept(self) -> dict[str, ObjectCounts]:
        """Note that all changes that `take_changes` returned are in force; returns the numbers of objects by table."""
        return self._in_force.accept()

    def set_tunnels(self, encapsulations: Iterable[tuple[int, int]]) -> None:
        """Set which tunnels, as (IP protocol, UDP port), nodes accept from any sender.

        Those in `TUNNELS` always count.
        """
        self.derivation.set_tunnels(TUNNELS.union(Tunnel(*one) for one in encapsulations))

    # --- questions --------------------------------------------------------------------------------------------------

    def is_local(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint is a workload of this node."""
        return endpoint.kind is EndpointKind.WORKLOAD and self.is_ours(endpoint)

    def is_ours(self, endpoint: Endpoint) -> bool:
        """Whether policy must be compiled for an endpoint: a workload or host endpoint of this node.

        Without a node name, every endpoint counts. In that case the agent finds by the addresses of a host endpoint
        whether the host endpoint is of this node.
        """
        return self._settings.node in (None, endpoint.node)

    def is_contested(self, key: EndpointKey) -> bool:
        """See `AddressClaims.is_contested`."""
        return self._claims.is_contested(key)

    def effective_world(self) -> World:
        """See `AddressClaims.effective_world`."""
        return self._claims.effective_world()

    def nodes_here(self) -> list[ClusterNode]:
        """The Node object of this node; all Node objects if this node's name is not known."""
        nodes = self.world.nodes
        if self._settings.node is None:
            return list(nodes.values())
        return [nodes[one] for one in (self._settings.node,) if one in nodes]

    def owner_of(self, address: IPAddress) -> str | None:
        """The name of the workload that holds an address, otherwise of a host endpoint or node with this address.

        Of several host endpoints or nodes the first by name counts; a host endpoint comes before a node.
        """
        holder = self._claims.holder(address)
        if holder is not None:
            return str(holder)
        if self._other_owners is None:
            hosts = [(key, one) for key, one in self.world.endpoints.items() if one.kind is EndpointKind.HOST]
            named = [(node.addresses, f"Node/{name}") for name, node in sorted(self.world.nodes.items())]
            named += [(one.addresses, str(key)) for key, one in sorted(hosts, reverse=True)]
            self._other_owners = {each: name for addresses, name in named for each in addresses}
        return self._other_owners.get(address)

    def handed(self, key: EndpointKey) -> Handover | None:
        """The handover of a pod's first interface; None if there is none for the pod that has this name now."""
        pod = self._resource(key)
        first = (one for one in self.handovers.of(key) if one.is_first)
        return next((one for one in first if isinstance(pod, Pod) and one.is_of(pod.uid)), None)

    def missing_for(self, handed: Handover) -> str:
        """Why policy cannot be in force yet on an interface that was handed over; "" if it can."""
        key = handed.pod
        if not handed.is_first:
            return f"{handed.inside} is a further interface, and policy knows a workload by its first"
        if self.handed(key) != handed:
            other = "" if self._resource(key) is None else ", only another one's of its name"
            return f"its Pod object has not arrived{other}"
        if key not in self.local:
            return "its Pod object is that of a pod of another node, of the host's network, or of one that has ended"
        if self.derivation.get(ResourceKey("Namespace", "", key.namespace)) is None:
            return f"its Namespace {key.namespace} has not arrived"
        others = [
            f"{one} is {holder}'s"
            for one in handed.addresses
            if (holder := self._claims.holder(one)) not in (None, key)
        ]
        return "; ".join(others)

    def is_in_force(self, key: EndpointKey) -> bool:
        """Whether the world in force has a local workload exactly as the objects describe it now."""
        return self.world_in_force.endpoints.get(key) == self.local.get(key)

    def _resource(self, key: EndpointKey) -> Resource | None:
        """The resource from which an endpoint was translated; None if there is none."""
        return self.derivation.get(ResourceKey(key.kind, key.namespace, key.name))

    def location(self, key: EndpointKey) -> Location:
        """The position of an endpoint's resource: file and line, or the name of the cluster."""
        resource = self._resource(key)
        return Location("") if resource is None else resource.meta.location

    # --- problems ---------------------------------------------------------------------------------------------------

    @property
    def source_problems(self) -> tuple[Problem, ...]:
        """The problems that the source reported with its last update."""
        return self._source_problems.present

    def disputes(self) -> Iterable[Problem]:
        """The problems of addresses that several workloads claim."""
        for address, holder, other in self._claims.disputes():
            message = _dispute(address, holder, other)
            severity = "error" if other in self.local else "warning"  # the other workload's node reports the error
            yield Problem(self.location(other), "", message, obj=str(other), severity=severity, slug="address-claimed")

    def without_namespace(self) -> Iterable[Problem]:
        """The problems of local workloads without a Namespace object, which rules on namespace labels cannot match."""
        for key in sorted(self.local):
            if key.namespace and self.derivation.get(ResourceKey("Namespace", "", key.namespace)) is None:
                message = f"its Namespace {key.namespace} is missing: no rule that selects by labels of the namespace matches it"
                yield Problem(self.location(key), "", message, obj=str(key), slug="no-namespace")


def _dispute(address: IPAddress, holder: EndpointKey, other: EndpointKey) -> str:
    return f"{holder} and {other} both claim {address}: {holder} had it first and keeps it, and {other} may not use it"
