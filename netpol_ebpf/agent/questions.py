# SPDX-License-Identifier: Apache-2.0
"""Answers `netpolctl explain` in the agent, from the objects in force on this node and the agent's settings.

Invariant: a question is rejected with the reason if something besides policy decides on this node, or if the node's
behaviour is unknown. This module only reads; it runs in a child process of the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.analysis.explanation import explain, names_of, parse_engine, parse_request
from netpol_ebpf.cases.engines import open_engine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.policy.journey import Flow, FlowEnd, FlowEndKind, Journey, Topology
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    UDP,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    Packet,
    World,
)

BROADCAST = ip_address("255.255.255.255")
ICMP_ERRORS = frozenset({*((ICMP, kind) for kind in (3, 4, 5, 11, 12)), *((ICMPV6, kind) for kind in (1, 2, 3, 4))})
"""(protocol, type) of ICMP errors, which report on another packet (bpf/np_parse.h)."""
STATUS_HINT = "`netpolctl status` says what is in the way."


def answer_question(agent: Agent, request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one ``explain`` request. Raises NetpolError.

    The field ``ways`` of the answer is the result of `netpol_ebpf.analysis.explanation.explain`.
    """
    probe, name = parse_request(request), parse_engine(request)
    if (probe.protocol, probe.icmp_type) in ICMP_ERRORS:
        raise InvalidInputError(
            "an ICMP error begins no connection: it passes with the connection that it is about, else it is dropped",
            hint="Ask about that connection.",
        )
    world = _enforced(agent)
    topology = NodeTopology(world, agent)
    resources = agent.objects.derivation.resources()
    cast = Cast(resources, world, borrow_sources=agent.settings.borrow_sources, topology=topology)
    learned = agent.domain_names.known()
    with open_engine(name) as engine:
        engine.load(world, {*names_of(probe), *learned.all_names()})
        ways = explain(cast, world, probe, engine, lambda journey: _require_enforced(agent, journey), learned)
    return {"node": agent.settings.node, "ways": ways}


class NodeTopology(Topology):
    """The topology of the policy model, with this node's addresses, devices and interfaces added.

    A packet is assumed to pass the interface by which the node would send packets to the address at the other end.
    """

    def __init__(self, world: World, agent: Agent) -> None:
        super().__init__(world)
        self._world = world
        self._agent = agent
        self._takes = agent.interfaces.wiring.tunnels | agent.settings.tunnels
        self._own = frozenset(agent.interfaces.wiring.addresses)
        self._bound: frozenset[tuple[int, IPAddress, int]] | None = None  # read if an answer depends on it

    def locate(self, address: IPAddress) -> FlowEnd:
        """See `Topology`."""
        place = super().locate(address)
        if place.kind is FlowEndKind.OUTSIDE and address in self._own and self._agent.settings.node is not None:
            return FlowEnd(FlowEndKind.HOST, node=self._agent.settings.node)
        return place

    def is_bound(self, flow: Flow) -> bool:
        """See `Topology`.

        False for a sender on another node, because that node translates and its sockets are not known.

        Raises PlatformError if the kernel does not list the node's sockets.
        """
        packet = flow.packet
        source = flow.source or self.locate(packet.source)
        if packet.destination not in self._own or source.node not in (None, self._agent.settings.node):
            return False
        if self._bound is None:
            self._bound = self._agent.interfaces.bound_sockets()
        return (packet.protocol, packet.destination, packet.destination_port) in self._bound

    def is_tunnelled(self, packet: Packet) -> bool:
        """See `Topology`."""
        port = packet.destination_port if packet.protocol == UDP else 0
        if (packet.protocol, port) not in self._takes:
            return False
        destination = packet.destination
        is_many = destination.is_multicast or destination == BROADCAST
        return is_many or self.locate(destination).kind is FlowEndKind.HOST

    def uplink_of(self, node: str, direction: Direction, wire: Packet, *, is_local: bool) -> Endpoint | None:
        """See `Topology`."""
        remote = wire.source if direction is Direction.INGRESS else wire.destination
        ifindex = self._agent.interfaces.interface_towards(remote) if node == self._agent.settings.node else None
        if ifindex is None:
            return super().uplink_of(node, direction, wire, is_local=is_local)
        key = self._agent.own_interfaces.plan.interfaces.get(ifindex)
        return None if key is None else self._world.endpoints.get(key)


def _enforced(agent: Agent) -> World:
    """The world in force, without host endpoints of this node that apply to none of its interfaces."""
    world, here = agent.objects.world_in_force, agent.own_interfaces.plan.in_force

    def is_absent(key: EndpointKey) -> bool:
        one = world.endpoints[key]
        return one.kind is EndpointKind.HOST and one.node == agent.settings.node and key not in here

    return replace(world, endpoints={key: one for key, one in world.endpoints.items() if not is_absent(key)})


def _require_enforced(agent: Agent, journey: Journey) -> None:
    """Raise InvalidInputError if the answer depends on policy that this node does not enforce.

    The same holds if the node currently denies all packets of workloads to services, and the journey is to a service.
    """
    no_exit = agent.own_interfaces.no_exit
    for key in dict.fromkeys(question.endpoint for question in journey.questions()):
        reason = _unenforced(agent, key)
        if reason:
            raise InvalidInputError(f"policy of {key} is NOT enforced: {reason}", hint=STATUS_HINT)
        if no_exit is not None and journey.flow.dnat_to is not None and key in agent.enforcement.applier.bindings:
            raise InvalidInputError(no_exit.message, hint=STATUS_HINT)


def _unenforced(agent: Agent, key: EndpointKey) -> str:
    """Why this node does not enforce an endpoint's policy; "" if it does, or if the endpoint is on another node."""
    own = agent.own_interfaces.plan.interfaces
    bearing = {ifindex for ifindex, one in own.items() if one == key}
    binding = agent.enforcement.applier.bindings.get(key)
    if binding is not None and agent.enforcement.applier.is_enforced(key):
        bearing |= {binding.ifindex} if binding.kind is EndpointKind.WORKLOAD else set()
        missing = sorted(agent.interfaces.wiring.name_of(ifindex) for ifindex in bearing - agent.attachments.interfaces)
        return f"{', '.join(missing)} has no program" if missing else ""
    # Without a node's name, a workload that has no interface here may be on any node.
    is_here = agent.settings.node is not None and any(one.key == key for one in agent.objects.local.values())
    return "no interface of this node is known to belong to it" if is_here else ""
