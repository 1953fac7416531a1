# SPDX-License-Identifier: Apache-2.0
"""Finds the interface of each local workload in the last snapshot of the node's network.

`InterfaceAssignments` decides the assignments. This module takes the snapshot, stores the assignments and reports
missing interfaces. Invariant: an assignment is in its file before the kernel has a row for it. This module does not
attach programs or write maps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from netpol_ebpf.agent.assignments import Evidence, InterfaceAssignments, LocatedEndpoints
from netpol_ebpf.agent.cni import CniResult
from netpol_ebpf.agent.handover import Handover
from netpol_ebpf.agent.node_access import NetworkAccess
from netpol_ebpf.agent.objects import ClusterObjects
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.wiring import NOWHERE, Interface, Wiring, device_flags
from netpol_ebpf.apply.applier import Binding
from netpol_ebpf.apply.encode import EndpointFlag
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.types import Endpoint, EndpointKey, IPAddress

log = logging.getLogger(__name__)

SEARCH_S = 0.5
"""Seconds between two searches for changes of which the kernel does not notify, such as addresses in a pod's namespace.
The number is arbitrary."""
AUDIT_S = 5.0
"""Least time in seconds between two audits of assignments. The number is arbitrary."""
MISSING_S = 5.0
"""Seconds that a workload may have no interface before that is reported as a problem. The number is arbitrary."""
SHOWN = 5
"""Largest number of interfaces that a message names. The number is arbitrary."""


class LocalInterfaces:
    """Finds the interfaces of local workloads.

    `look` takes a new snapshot and searches it. `locate` searches the last one, which is enough if no interface
    changed. ``wiring``: the last snapshot; read-only for callers. ``has_looked``: whether `look` ran since the caller
    last reset this to False. ``has_recalled``: whether `recall` ran.
    """

    def __init__(
        self,
        settings: AgentSettings,
        network: NetworkAccess,
        objects: ClusterObjects,
        clock: Callable[[], float],
        assignments_file: Path | None = None,
    ) -> None:
        """``assignments_file``: the file that keeps assignments across restarts; None: they are not kept.

        ``clock``: returns the time in seconds.
        """
        self.wiring = Wiring()
        self.has_looked = False
        self.has_recalled = False
        self._settings = settings
        self._network = network
        self._objects = objects
        self._clock = clock
        self._assignments = InterfaceAssignments(settings.interfaces, settings.own_interfaces)
        self._file = assignments_file
        self._damage: tuple[Problem, ...] = ()
        self._unsaved: tuple[Problem, ...] = ()
        self._located = LocatedEndpoints()
        # The inputs of each binding (workload, its interface, that interface's bridge or VRF), and the binding.
        self._bindings: dict[EndpointKey, tuple[Endpoint, Interface | None, Interface | None, Binding]] = {}
        self._missed_s: dict[EndpointKey, float] = {}  # since when a workload has had no interface
        self._looked_at_s = self._audited_s = clock()
        self._is_unaudited = False  # interfaces were located since the last audit
        self._wrong: tuple[Problem, ...] = ()  # of the last audit that found a difference

    # --- what was found ---------------------------------------------------------------------------------------------

    @property
    def located(self) -> Mapping[EndpointKey, int]:
        """The interface index of each local workload whose interface was found."""
        return self._located.interfaces

    @property
    def evidence(self) -> Mapping[EndpointKey, Evidence]:
        """The evidence by which each workload's interface was found."""
        return self._located.evidence

    def is_workload(self, ifindex: int) -> bool:
        """Whether an interface counts as a workload's, so that it is closed until its workload is known."""
        return self._assignments.is_workload(ifindex)

    def wanted(self) -> set[int]:
        """Indices of workloads' interfaces. Each of these interfaces must have the programs."""
        return (self._assignments.workloads & self.wiring.links.keys()) | set(self.located.values())

    def bindings(self) -> dict[EndpointKey, Binding]:
        """The binding of each local workload that has an interface."""
        before, self._bindings = self._bindings, {}
        links, local = self.wiring.links, self._objects.local
        found = {}
        for key, ifindex in self.located.items():
            endpoint, link = local[key], links.get(ifindex)
            master = links.get(link.master) if link is not None and link.master else None
            known = before.get(key)
            is_known = known is not None and known[0] is endpoint and known[1] is link and known[2] is master
            if known is None or link is None or not is_known:
                known = endpoint, link, master, self._binding(endpoint, ifindex)
            self._bindings[key] = known
            found[key] = known[3]
        return found

    def _binding(self, endpoint: Endpoint, ifindex: int) -> Binding:
        flags = device_flags(self.wiring.links.get(ifindex))
        if self._settings.is_router(endpoint.key):
            flags |= EndpointFlag.ROUTES
        sources = endpoint.allowed_sources if self._settings.borrow_sources else ()
        return Binding(ifindex, allowed_sources=sources, link=self.wiring.link_of(ifindex), flags=flags)

    def bound_sockets(self) -> frozenset[tuple[int, IPAddress, int]]:
        """See `NetworkAccess`."""
        return self._network.bound_sockets()

    def interface_towards(self, address: IPAddress) -> int | None:
        """The interface by which the node would now send to an address; None if there is no route."""
        return self._network.interface_towards(address)

    def with_evident_addresses(self) -> Iterator[tuple[Interface, tuple[IPAddress, ...]]]:
        """Workloads' interfaces for which the node has evidence of addresses, each with these addresses.

        The strongest evidence counts: the CNI plugin's handover, the result that the plugin left on the node, host
        routes, or the first addresses at the other end. First addresses of an interface on a bridge do not count: the
        workload chose them, and could answer ARP on the bridge for another host's address.
        """
        handed = {
            one.ifindex: one.addresses
            for pod in self._objects.handovers.pods
            for one in self._objects.handovers.of(pod)
        }
        results = {name: one.addresses for one in self.wiring.results for name in one.names}
        routed: dict[int, list[IPAddress]] = {}
        for address, ifindex in self.wiring.host_routes.items():
            routed.setdefault(ifindex, []).append(address)
        for ifindex, link in sorted(self.wiring.links.items()):
            if not self.is_workload(ifindex):
                continue
            first = self._assignments.first_addresses(ifindex) if self.wiring.link_of(ifindex) == ifindex else ()
            found = handed.get(ifindex) or results.get(link.name) or routed.get(ifindex) or first
            addresses = {address for address in found if address not in self.wiring.addresses}
            if addresses:
                yield link, tuple(sorted(addresses, key=lambda one: (one.version, one.packed)))

    # --- looking ----------------------------------------------------------------------------------------------------

    def look(self, bound: Collection[int] = ()) -> None:
        """Take a new snapshot and find the workloads' interfaces in it. ``bound``: interfaces with a workload's row."""
        self._looked_at_s, self.has_looked = self._clock(), True
        self.wiring = self._network.snapshot(set(bound))
        self._objects.set_tunnels(self.wiring.tunnels | self._settings.tunnels)
        self.locate()

    def look_for_roles(self) -> None:
        """Take a new snapshot and decide which interfaces are workloads', before the objects are known.

        Assignments of an earlier agent stay.
        """
        self._looked_at_s = self._clock()
        self.wiring = self._network.snapshot(self._assignments.assigned)
        doubts = set(self._assignments.doubts.values())
        self._assignments.decide_roles(self.wiring)
        self._log_doubts(doubts)
        self._save()

    def locate(self) -> None:
        """Find the local workloads' interfaces in the last snapshot."""
        before, doubts = self._located, set(self._assignments.doubts.values())
        self._located = self._looking()(self._assignments)
        self._is_unaudited = True
        for key, message in self._located.problems.items() - before.problems.items():
            log.warning("%s: interface: %s", key, message)
        self._log_doubts(doubts)
        self._note_missing()
        self._save()

    def _looking(self) -> Callable[[InterfaceAssignments], LocatedEndpoints]:
        """`InterfaceAssignments.look` with arguments from the last snapshot and the present objects.

        The caller gives only the assignments.
        """
        return partial(
            InterfaceAssignments.look,
            wiring=self.wiring,
            endpoints=self._objects.local.values(),
            node_addresses=[address for node in self._objects.nodes_here() for address in node.addresses],
            results=self._plugin_names(),
            is_contested=self._objects.is_contested,
        )

    def audit(self) -> bool:
        """Search with settled assignments and without, and compare the results. Returns whether they differ.

        This is done only if interfaces were located since the last audit, and that was at least AUDIT_S ago. If the
        results differ, the one without settled assignments is used, and the difference is reported.
        """
        if not self._is_unaudited or self._clock() - self._audited_s < AUDIT_S:
            return False
        self._is_unaudited, self._audited_s = False, self._clock()
        afresh, look = self._assignments.unsettled(), self._looking()
        located, self._located = look(self._assignments), look(afresh)
        wrong = self._assignments.differences(afresh) + located.differences(self._located)
        if wrong:
            message = (
                f"a look at what changed and a look at everything assigned interfaces differently ({', '.join(wrong[:SHOWN])}): what "
                "the latter found is in force now, and policy may have been wrong for some seconds; this is a bug, please report it"
            )
            log.error("%s", message)
            self._wrong = (Problem(Location(""), "", message, slug="interface-audit"),)
            self._assignments = afresh
        self._save()
        return bool(wrong)

    def _log_doubts(self, before: Collection[str]) -> None:
        for message in set(self._assignments.doubts.values()) - set(before):
            log.error("%s", message)

    def is_there(self, handed: Handover) -> bool:
        """Whether the node has the interface of a handover, with the reported name and other end."""
        link = self.wiring.links.get(handed.ifindex)
        return link is not None and (link.name, link.peer) == (handed.name, handed.peer)

    def problem_of(self, key: EndpointKey) -> str | None:
        """Why a workload has no interface although there is evidence of one; None if that is not so."""
        return self._located.problems.get(key)

    def is_search_due(self) -> bool:
        """Whether it is time to search for changes of which the kernel does not notify."""
        return self._clock() - self._looked_at_s >= SEARCH_S

    def is_curious(self) -> bool:
        """See `InterfaceAssignments.is_curious`."""
        return self._assignments.is_curious(self.wiring)

    def close_newborn(self, link: Interface) -> bool:
        """See `InterfaceAssignments.close_newborn`."""
        return link.ifindex not in self.wiring.links and self._assignments.close_newborn(link)

    def forget(self, gone: Collection[int]) -> None:
        """Remove interfaces that no longer exist, even if new interfaces have the same indices now."""
        self._objects.handovers.forget(gone)
        self._assignments.forget(gone)

    def is_idle(self, key: EndpointKey) -> bool:
        """Whether a local workload has no interface."""
        return bool(self.wiring.links) and key in self._objects.local and key not in self.located

    def recall_handovers(self) -> None:
        """Restore the handovers that an earlier agent stored, for interfaces that still exist."""
        handovers = self._objects.handovers
        handovers.recall()
        known = [one for pod in handovers.pods for one in handovers.of(pod)]
        handovers.forget([one.ifindex for one in known if not self.is_there(one)])

    def forget_missing(self) -> None:
        """Stop waiting for the interfaces of workloads that are no longer local."""
        self._missed_s = {key: since_s for key, since_s in self._missed_s.items() if key in self._objects.local}

    def _plugin_names(self) -> dict[EndpointKey, set[str]]:
        """Names of the node's interfaces that CNI plugins made for local workloads.

        The set of a workload is empty if the plugin left no interface on the node.
        """
        found: dict[EndpointKey, set[str]] = {}
        for one in self.wiring.results:
            endpoint = self._objects.local.get(one.pod)
            if endpoint is not None and _is_first(one, endpoint) and (one.names or one.is_unseen):
                found.setdefault(one.pod, set()).update(() if one.is_unseen else one.names)
        for key in self._objects.handovers.pods:
            handed = self._objects.handed(key)
            if handed is not None and key in self._objects.local and self.is_there(handed):
                found[key] = {handed.name}  # a handover is newer than the cached result of an earlier interface
        return found

    def _note_missing(self) -> None:
        now_s = self._clock()
        located = self.located
        missed = [key for key, one in self._objects.local.items() if key not in located and self._is_expected(one)]
        self._missed_s = {key: self._missed_s.get(key, now_s) for key in missed}

    def _is_expected(self, endpoint: Endpoint) -> bool:
        """Whether a workload must have an interface on this node.

        This is not known without the name of this node, because a workload may then be on another node. A workload
        without an address does not run.
        """
        return endpoint.node is not None and endpoint.node == self._settings.node and bool(endpoint.addresses)

    # --- beyond the process -----------------------------------------------------------------------------------------

    def recall(self, former: Mapping[EndpointKey, int], attached: Collection[int]) -> None:
        """Restore the assignments of an earlier agent: from its file, and missing ones from the rows in the kernel.

        ``former``: the interface in each of these rows, by workload. ``attached``: interfaces with the programs; if a
        row's interface is not among them, it no longer exists.
        """
        self.has_recalled = True
        if self._file is not None:
            problem = self._assignments.load(self._file)
            if problem is not None:
                log.warning("%s", problem)
                self._damage = (problem,)
        for key, ifindex in former.items():
            self._assignments.expect(key, ifindex if ifindex in attached else NOWHERE)

    def _save(self) -> None:
        """Write the assignments, if they changed, before the kernel has their rows.

        A failure is reported, and the next call writes again.
        """
        if self._file is None or not self._assignments.is_dirty:
            return
        self._unsaved = ()
        try:
            self._assignments.save(self._file)
        except OSError as error:
            message = (
                f"the assignments of interfaces cannot be written ({error.strerror}): the next agent decides them anew"
            )
            place = Location(str(self._file))
            self._unsaved = (Problem(place, "", message, severity="warning", slug="interfaces-file"),)

    # --- problems ---------------------------------------------------------------------------------------------------

    def conflicts(self) -> Iterable[Problem]:
        """Problems of workloads that get no interface although there is evidence of one.

        Also problems of interfaces that may be the node's own or a workload's.
        """
        for key, message in sorted(self._located.problems.items()):
            yield Problem(self._objects.location(key), "", f"interface: {message}", obj=str(key), slug="interface")
        for message in self._assignments.doubts.values():
            yield Problem(Location(""), "", message, slug="interface-doubt")
        yield from self._wrong

    def unenforced(self, attached: Collection[int], bound: Collection[int]) -> list[Problem]:
        """Problems of this node's workloads on which policy is not enforced as written.

        ``attached``: interfaces with the programs. ``bound``: interfaces with the row of an endpoint.
        """
        return [*self._missing(attached, bound), *self._further_interfaces()]

    @property
    def file_problems(self) -> tuple[Problem, ...]:
        """Problems of CNI results that could not be read, and of the file of assignments."""
        return (*self.wiring.problems, *self._damage, *self._unsaved)

    def _missing(self, attached: Collection[int], bound: Collection[int]) -> Iterable[Problem]:
        """Problems of this node's workloads that have had no interface for at least MISSING_S."""
        closed = sorted(
            self.wiring.name_of(ifindex) for ifindex in set(attached) - set(bound) if self.is_workload(ifindex)
        )
        where = f"; closed interfaces that may belong to it: {', '.join(closed[:SHOWN])}" if closed else ""
        for key, since_s in sorted(self._missed_s.items()):
            if self._clock() - since_s >= MISSING_S and key not in self._located.problems:
                message = f"policy is NOT enforced on this workload: no interface of this node is known to belong to it{where}"
                yield Problem(self._objects.location(key), "", message, obj=str(key), slug="not-found")

    def _further_interfaces(self) -> Iterable[Problem]:
        """Problems of further interfaces of local workloads, on which policy is not enforced."""
        for one in self.wiring.results:
            endpoint = self._objects.local.get(one.pod)
            if endpoint is None:
                continue
            message = ""
            if one.is_unseen:
                message = f"policy is NOT enforced on its interface {one.inside}: packets of {one.plugin} interfaces pass no program on the node"
            elif not _is_first(one, endpoint):
                names = ", ".join(sorted(one.names))
                message = f"its further interface {one.inside} ({names} on the node) is closed: policy applies to the first interface of a workload"
            if message:
                location = self._objects.location(one.pod)
                yield Problem(location, "", message, obj=str(one.pod), slug="further-interface")


def _is_first(result: CniResult, endpoint: Endpoint) -> bool:
    """Whether a CNI result is about the workload's first interface.

    Only that interface has the addresses in the workload's object.
    """
    return not result.addresses or bool(result.addresses & set(endpoint.addresses))
