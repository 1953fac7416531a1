# SPDX-License-Identifier: Apache-2.0
"""Writes rows and attaches programs for the node's own interfaces, and writes the node's addresses into the maps.

Host endpoints and services need the rows, the programs and the addresses. `netpol_ebpf.agent.hosts` plans which
interfaces have the programs and which host endpoint applies to each; this module executes the plan.

Invariants: an own interface has its row before it has the programs, and keeps the row as long as the programs, because
the programs deny everything on an interface without a row. The programs defer verdicts on packets to services only
while every interface by which packets can leave has the programs. While the programs cannot be attached to one of them,
packets from workloads to services are denied. This module does not touch workloads' interfaces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from netpol_ebpf.agent.attachments import Attachments
from netpol_ebpf.agent.dns_servers import NO_DNS, DnsInputs
from netpol_ebpf.agent.hosts import HostPlan, own_interfaces, plan_hosts
from netpol_ebpf.agent.wiring import BRIDGE_KIND, NOWHERE, PAIR_KINDS, Interface, Wiring, device_flags
from netpol_ebpf.apply.applier import Applier, Binding, KernelMap, too_small
from netpol_ebpf.apply.encode import EndpointFlag, LocalFlag, Meaning, endpoint_key
from netpol_ebpf.apply.surroundings import UPLINK, OwnInterface, Surroundings, SurroundingsWriter
from netpol_ebpf.compiler import CompiledTables
from netpol_ebpf.errors import Location, MapFullError, Problem
from netpol_ebpf.policy.types import Endpoint, EndpointKey, EndpointKind, IPAddress, Vip, VipKey, World
from netpol_loader import abi

log = logging.getLogger(__name__)

HOST_BINDING = Binding(NOWHERE, EndpointKind.HOST)
"""The binding of every host endpoint in force. It names no interface, because `HostPlan` has the interfaces."""


@dataclass(frozen=True, slots=True)
class HostPolicyInputs:
    """The inputs of host policy that are in force on the node's own interfaces.

    ``hosts``: host endpoints; ``numbers``: their numbers; ``vips``: services; ``nodes``: addresses of all nodes, each
    with the node's number, 0 for none; ``dns``: the DNS servers. These are kept besides the objects and the compiler's tables, which are newer
    while a change is rejected.
    """

    hosts: Mapping[EndpointKey, Endpoint] = field(default_factory=dict)
    numbers: Mapping[EndpointKey, int] = field(default_factory=dict)
    vips: Mapping[VipKey, Vip] = field(default_factory=dict)
    nodes: Mapping[IPAddress, int] = field(default_factory=dict)
    dns: DnsInputs = NO_DNS

    @classmethod
    def of(cls, world: World, tables: CompiledTables, node: str | None, dns: DnsInputs = NO_DNS) -> HostPolicyInputs:
        """Derive the inputs of host policy from the objects and from the tables compiled from them.

        ``node``: the name of this node; None: not known. ``dns``: the DNS servers.
        """
        rows = tables.endpoints
        hosts = {key: one for key, one in world.endpoints.items() if one.kind is EndpointKind.HOST and key in rows}
        nodes = {address: tables.nodes.get(name) or 0 for name, one in world.nodes.items() for address in one.addresses}
        vips = {key: vip for key, vip in world.vips.items() if node is None or key.node in ("", node)}
        return cls(hosts, {key: rows[key].number for key in hosts}, vips, nodes, dns)

    def without_removed(self, after: HostPolicyInputs) -> HostPolicyInputs:
        """These inputs without host endpoints that ``after`` lacks.

        The agent uses them before it removes the rows of those host endpoints, so that no interface needs the rows any
        more. Nodes have their old and their new addresses, because rows of their workloads are written in between.
        Services and DNS servers are those of ``after``.
        """
        staying = {key: after.hosts[key] for key in self.hosts if key in after.hosts}
        return HostPolicyInputs(staying, self.numbers, after.vips, {**self.nodes, **after.nodes}, after.dns)


@dataclass(frozen=True, slots=True)
class InitialState:
    """The initial content of a new set of maps.

    ``surroundings``: the addresses to write before the programs are on every interface by which packets can leave.
    ``complete``: the addresses to write afterwards.
    """

    inputs: HostPolicyInputs
    plan: HostPlan
    surroundings: Surroundings
    complete: Surroundings

    @property
    def bindings(self) -> dict[EndpointKey, Binding]:
        """The bindings of the host endpoints in force."""
        return dict.fromkeys(self.plan.in_force, HOST_BINDING)


class OwnInterfaces:
    """The own interfaces under policy.

    `initial_state` and `take_over` fill the first maps. `place` and `reconcile` change the maps in force. ``inputs``:
    the present inputs; after changing them the caller must call `place` or `reconcile`. ``no_room``: the problem that
    the maps lack room for desired rows, or None. ``no_exit``: the problem that packets to services are denied, or None.
    """

    def __init__(self, node: str | None, attachments: Attachments, tunnels: Collection[tuple[int, int]] = ()) -> None:
        """``node``: the name of this node; None: a host endpoint is this node's if the node has one of its addresses.

        ``tunnels``: tunnels that nodes decapsulate from any sender, besides those of this node's devices.
        """
        self._tunnels = frozenset(tunnels)
        self.inputs = HostPolicyInputs()
        self.no_room: Problem | None = None
        self.no_exit: Problem | None = None
        self._node = node
        self._attachments = attachments
        self._plan = HostPlan()
        self._in_force: tuple[Mapping[str, KernelMap], Applier, SurroundingsWriter] | None = None

    @property
    def interfaces(self) -> Collection[int]:
        """Indices of the own interfaces that must have the programs."""
        return self._plan.interfaces.keys()

    @property
    def plan(self) -> HostPlan:
        """The plan in force: the own interfaces under policy, each with its host endpoint. Read-only for callers."""
        return self._plan

    def problems(
        self, endpoints: Mapping[EndpointKey, Endpoint], locate: Callable[[EndpointKey], Location]
    ) -> Iterator[Problem]:
        """The problems of host endpoints and services that are not in force as written.

        ``endpoints``: all endpoints of the objects. ``locate``: returns the file and line of an endpoint.
        """
        for key, message in self._plan.problems.items():
            yield _warning(key, message, locate)
        if self._node is None:
            for key, endpoint in endpoints.items():
                if endpoint.kind is EndpointKind.HOST and key not in self._plan.in_force:
                    message = "may belong to another node: the agent does not know the name of this one (--node)"
                    yield _warning(key, message, locate)
        if self.no_exit is not None:
            yield self.no_exit

    # --- a new set of maps ------------------------------------------------------------------------------------------

    def initial_state(
        self, inputs: HostPolicyInputs, wiring: Wiring, workloads: Collection[int], bearing: Collection[int]
    ) -> InitialState:
        """Compute the initial content of a new set of maps.

        ``bearing``: interfaces to which programs are attached, with this set of maps or an older one.
        """
        plan = self._planned(inputs, wiring, workloads)
        own = own_interfaces(wiring, workloads)
        at_first = self._known(plan, inputs, wiring, own & set(bearing))
        complete = self._known(plan, inputs, wiring, own & {*plan.interfaces, *bearing}, are_exits_known=True)
        return InitialState(inputs, plan, at_first, complete)

    def take_over(
        self, initial: InitialState, maps: Mapping[str, KernelMap], applier: Applier, surroundings: SurroundingsWriter
    ) -> None:
        """Use a new set of maps, with its writers, from now on.

        The maps were filled with ``initial`` and are in force.
        """
        self.inputs, self._plan = initial.inputs, initial.plan
        self._in_force = maps, applier, surroundings

    # --- the maps in force ------------------------------------------------------------------------------------------

    def require_room(self, inputs: HostPolicyInputs, wiring: Wiring, workloads: Collection[int]) -> None:
        """Raise MapFullError if the maps in force have no room for the rows that ``inputs`` require."""
        if inputs == self.inputs:
            return
        maps, _, surroundings = self._writers()
        wanted = self.initial_state(inputs, wiring, workloads, self._attachments.interfaces)
        surroundings.require_room(wanted.complete)
        hosts, size = len(wanted.bindings), maps["np_host"].max_entries
        if hosts > size:
            raise too_small("np_host", size, hosts)

    def reconcile(self, wiring: Wiring, workloads: Collection[int]) -> None:
        """Bring rows, programs and addresses to the desired state. A failure is reported as a problem.

        ``workloads``: interfaces of workloads; all others are the node's own.
        """
        try:
            self.place(wiring, workloads)
            for ifindex in self._attachments.interfaces - set(workloads) - self._plan.interfaces.keys():
                self._attachments.detach(ifindex, wiring.name_of(ifindex))
            self._write(wiring, workloads, self._plan.interfaces.keys())
            self.no_room = None
        except MapFullError as error:
            message = f"the maps keep the previous addresses and interfaces of the node: {error.message}"
            problem = Problem(Location(""), "", message, slug=error.slug)
            if problem != self.no_room:
                log.error("%s", message)  # noqa: TRY400 - the node's state, not this code, needs attention
            self.no_room = problem

    def place(self, wiring: Wiring, workloads: Collection[int]) -> None:
        """Write the rows of all interfaces of the plan, then attach the programs to them. Detaches no programs.

        Raises MapFullError.
        """
        (_, applier, _), attachments = self._writers(), self._attachments
        self._plan = plan = self._planned(self.inputs, wiring, workloads)
        for key in sorted(plan.in_force):
            applier.bind(key, HOST_BINDING)
        if plan.wildcard is None:
            applier.set_wildcard(None)
        self._write(wiring, workloads, {*plan.interfaces, *attachments.interfaces})
        applier.set_wildcard(plan.wildcard)
        for ifindex in plan.interfaces.keys() - attachments.interfaces:
            attachments.attach(ifindex, wiring.name_of(ifindex))
        for key in [key for key, one in applier.bindings.items() if one.kind is EndpointKind.HOST]:
            if key not in plan.in_force:
                applier.unbind(key)
        missing = sorted(wiring.name_of(ifindex) for ifindex in plan.interfaces.keys() - attachments.interfaces)
        self.no_exit = None
        has_services = bool(self.inputs.vips)
        if has_services and missing:
            message = f"packets to services are denied while these interfaces have no program: {', '.join(missing)}"
            self.no_exit = Problem(Location(""), "", message, slug="no-exit")
        if has_services and not missing:
            applier.set_flags(on=abi.NP_CONFIG_DEFER)
        else:
            applier.set_flags(off=abi.NP_CONFIG_DEFER)

    def _writers(self) -> tuple[Mapping[str, KernelMap], Applier, SurroundingsWriter]:
        if self._in_force is None:
            raise AssertionError("no maps are in force")
        return self._in_force

    def _planned(self, inputs: HostPolicyInputs, wiring: Wiring, workloads: Collection[int]) -> HostPlan:
        """Plan which own interfaces are under policy, and their host endpoints."""
        hosts = list(inputs.hosts.values())
        if self._node is None:
            hosts = [one for one in hosts if any(address in wiring.addresses for address in one.addresses)]
        return plan_hosts(wiring, hosts, workloads)

    def _known(
        self,
        plan: HostPlan,
        inputs: HostPolicyInputs,
        wiring: Wiring,
        bearing: Collection[int],
        *,
        are_exits_known: bool = False,
    ) -> Surroundings:
        """The node's addresses and services for the maps. ``bearing``: own interfaces that must have rows.

        Service addresses are included only if every interface by which packets can leave has the programs, or if the
        agent already reports which interface lacks them. Until then the program evaluates packets to services like all
        other packets.
        """
        are_exits_known |= plan.interfaces.keys() <= self._attachments.interfaces or self.no_exit is not None
        interfaces = {}
        for ifindex in bearing:
            key, link = plan.interfaces.get(ifindex), wiring.links.get(ifindex)
            flags = device_flags(link)
            if link is not None and _is_outside(wiring.lowest(link)):
                flags |= EndpointFlag.OUTSIDE | (EndpointFlag.EXTERNAL if link.is_external else EndpointFlag.NONE)
            interfaces[ifindex] = OwnInterface(UPLINK if key is None else inputs.numbers[key], flags)
        others = {address: Meaning(LocalFlag.NODE, node=number) for address, number in inputs.nodes.items()}
        return Surroundings(
            {**others, **wiring.meanings},
            interfaces,
            tuple(inputs.vips.values()) if are_exits_known else (),
            wiring.local_nets,
            wiring.tunnels | self._tunnels,
            inputs.dns.resolvers,
            inputs.dns.unlearned,
            inputs.dns.own,
        )

    def _write(self, wiring: Wiring, workloads: Collection[int], bearing: Collection[int]) -> None:
        """Write the rows of the own interfaces in ``bearing`` and the node's addresses; remove all other such rows."""
        _, applier, surroundings = self._writers()
        rows = (("np_endpoint", endpoint_key(one.ifindex)) for one in applier.bindings.values())
        own = own_interfaces(wiring, workloads) & set(bearing)
        wanted = self._known(self._plan, self.inputs, wiring, own)
        surroundings.write(wanted, keep=rows)
        nets = abi.NP_CONFIG_LOCAL_NETS
        applier.set_flags(**({"on": nets} if wanted.nets else {"off": nets}))


def _is_outside(link: Interface) -> bool:
    """Whether packets that an own interface receives come from outside the node.

    ``link``: the lowest of stacked devices.

    False for a bridge, because its ports have already evaluated the packet. False for a veth pair with both ends in
    this namespace, because the node itself sent the packet into the pair.
    """
    is_inner = link.kind in PAIR_KINDS and link.peer is None
    return link.kind != BRIDGE_KIND and not is_inner


def _warning(key: EndpointKey, message: str, locate: Callable[[EndpointKey], Location]) -> Problem:
    return Problem(locate(key), "", message, obj=str(key), severity="warning", slug="host-endpoint")
