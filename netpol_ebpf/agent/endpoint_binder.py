# SPDX-License-Identifier: Apache-2.0
"""Attaches the programs to workloads' interfaces, and writes the rows of their endpoints.

The program closes a workload's interface; the row opens the interface to the policy of its workload. Invariants: a
workload's interface has the programs before it has a row, so it is never open without policy. A row that does not fit
closes only its own endpoint. This module does not assign interfaces to workloads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from netpol_ebpf.agent.adoption import Adoption, NodeAddresses, Workload
from netpol_ebpf.agent.attachments import Attachments
from netpol_ebpf.agent.barrier import Barrier
from netpol_ebpf.agent.enforcement import Enforcement
from netpol_ebpf.agent.local_interfaces import LocalInterfaces
from netpol_ebpf.agent.node_access import NodeAccess
from netpol_ebpf.agent.objects import ClusterObjects
from netpol_ebpf.agent.own_interfaces import OwnInterfaces
from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.errors import MapFullError, Problem
from netpol_ebpf.policy.types import EndpointKey, EndpointKind


class EndpointBinder:
    """Binds endpoints to interfaces.

    Callers call `take_over` once, then `reconcile` whenever interfaces, objects or policy changed.
    """

    def __init__(
        self,
        node: NodeAccess,
        objects: ClusterObjects,
        interfaces: LocalInterfaces,
        enforcement: Enforcement,
        attachments: Attachments,
        own: OwnInterfaces,
        barrier: Barrier,
    ) -> None:
        self._node = node
        self._objects = objects
        self._interfaces = interfaces
        self._enforcement = enforcement
        self._attachments = attachments
        self._own = own
        self._barrier = barrier
        self._adoption = Adoption()
        self._no_room: dict[EndpointKey, Problem] = {}  # endpoints with a row that did not fit

    @property
    def problems(self) -> Iterable[Problem]:
        """The problems of endpoints whose row does not fit into its map."""
        return self._no_room.values()

    @property
    def warnings(self) -> Iterable[Problem]:
        """Warnings about connections older than enforcement that the program may cut."""
        return self._adoption.warnings.values()

    # --- the first set of maps --------------------------------------------------------------------------------------

    def close_workloads(self) -> None:
        """Attach the programs of an earlier agent to workloads' interfaces that lack them.

        Must be called before the first set of maps exists. The earlier agent's maps have no row of such an interface,
        so the interface is closed. Its old connections are adopted when its workload is known.
        """
        self._attachments.begin_round(self._interfaces.wiring.links.keys())
        uncovered = self._interfaces.wanted() - self._attachments.interfaces
        self._adoption.expect(uncovered)
        for ifindex in uncovered:
            self._attach(ifindex)

    def find_attached(self) -> None:
        """Find the programs of an earlier agent, and the interfaces that may have old connections.

        Must be called before the first set of maps is made.
        """
        for ifindex in self._node.attached() - self._interfaces.wiring.links.keys():
            # While no agent ran, the interface moved to another network namespace; the kernel leaves tcx programs
            # attached.
            self._attachments.detach(ifindex, f"{ifindex}, which is not in this network namespace any more,")
        self._attachments.find()
        self._adoption.expect(self._interfaces.wanted() - self._attachments.interfaces)

    def take_over(self) -> None:
        """Attach the programs to workloads' interfaces and call `reconcile`. The first set of maps must be in force."""
        self._adoption.go_ahead(self._node, *self._adoptable())
        for ifindex in self._interfaces.wanted():
            self._attach(ifindex)
        self._attachments.find()
        self.reconcile()

    def expect_old_connections(self, former: Collection[EndpointKey]) -> None:
        """Adopt the connections of these endpoints' interfaces again when the interfaces get other endpoints."""
        located = self._interfaces.located
        self._adoption.expect(located[key] for key in former if key in located)

    # --- the maps in force ------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Attach programs to new interfaces, write rows of located endpoints, and remove rows of vanished endpoints."""
        wiring, applier = self._interfaces.wiring, self._enforcement.applier
        self._attachments.begin_round(wiring.links.keys())
        wanted = self._interfaces.wanted()
        for ifindex in wanted - self._attachments.interfaces:
            self._attach(ifindex)
        # Before programs are detached from own interfaces.
        self._barrier.reconcile(wiring, wanted, self._attachments.interfaces)
        bindings = self._interfaces.bindings()
        for key in applier.bindings.keys() - bindings.keys():
            if applier.bindings[key].kind is EndpointKind.WORKLOAD:
                applier.unbind(key)
        self._no_room.clear()
        self._adoption.go_ahead(self._node, *self._adoptable())
        written = applier.bindings
        for key, binding in bindings.items():
            if written.get(key) is binding:
                continue
            try:
                applier.bind(key, binding)
            except MapFullError as error:  # one failure must not stop the other endpoints
                message = f"its interface {wiring.name_of(binding.ifindex)} stays as it is: {error.message}"
                self._no_room[key] = Problem(
                    self._objects.location(key), "", message, obj=str(key), slug=error.slug
                )  # fmt: skip
        self._own.reconcile(wiring, wanted)
        self._barrier.reconcile(wiring, wanted, self._attachments.interfaces)
        self._adoption.go_behind(self._node, *self._adoptable())

    def close_newborn(self, link: Interface) -> None:
        """Attach the programs to an interface that just appeared, if it may be a workload's."""
        if link.ifindex not in self._attachments.interfaces and self._interfaces.close_newborn(link):
            self._attachments.attach(link.ifindex, link.name, is_newborn=True)

    def gone(self) -> set[int]:
        """Indices of interfaces that vanished since the last call.

        If notifications were lost: interfaces that no longer have our programs.
        """
        gone = self._node.network.take_gone()
        return self._attachments.interfaces - self._node.attached() if gone is None else gone

    def is_bound(self, key: EndpointKey, ifindex: int) -> bool:
        """Whether an interface has the row of a workload, and the workload's policy in force is up to date."""
        binding = self._enforcement.applier.bindings.get(key)
        return self._objects.is_in_force(key) and binding is not None and binding.ifindex == ifindex

    def why_unbound(self, key: EndpointKey) -> str:
        """Why a workload has no row yet, as text."""
        problem = self._no_room.get(key)
        if problem is not None:
            return problem.message
        return self._interfaces.problem_of(key) or "its policy is not in the kernel yet"

    def forget(self, gone: Collection[int]) -> None:
        """Remove rows and programs of interfaces that no longer exist.

        This is right even if new interfaces have the same indices now.
        """
        if not gone:
            return
        self._attachments.forget(gone)
        self._adoption.forget(gone)
        self._enforcement.unbind(gone)
        self._node.prune()

    def is_waiting(self) -> bool:
        """Whether there are workloads without an interface, and also interfaces without a workload."""
        return not self._objects.local.keys() <= self._enforcement.applier.bindings.keys() and bool(
            self._attachments.interfaces - self._enforcement.bound - set(self._own.interfaces)
        )

    def _attach(self, ifindex: int) -> None:
        self._attachments.attach(ifindex, self._interfaces.wiring.name_of(ifindex))

    def _adoptable(self) -> tuple[dict[int, Workload], NodeAddresses]:
        """The workloads whose old connections must be written, by interface, and the node's addresses and services.

        A workload counts only if its policy is compiled.
        """
        workloads, concerned, tables = {}, self._adoption.concerned, self._enforcement.tables
        wiring = self._interfaces.wiring
        for key, ifindex in self._interfaces.located.items() if concerned else ():
            if ifindex in concerned and key in tables.endpoints:
                peer = wiring.links[ifindex].peer
                number, addresses = tables.endpoints[key].number, self._objects.local[key].addresses
                workloads[ifindex] = Workload(number, addresses, None if peer is None else peer[0])
        return workloads, NodeAddresses(wiring.addresses, self._own.inputs.vips)
