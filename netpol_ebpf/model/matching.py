# SPDX-License-Identifier: Apache-2.0
"""Whether a rule matches a packet: section 1 of policy/MATCHING.md in plain loops.

Invariant: every result is computed from the `World` and the packet alone.  Nothing is cached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from netpol_ebpf.policy.domain_names import matches_pattern
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    Action,
    BackendMatch,
    Endpoint,
    Entity,
    IcmpType,
    IPAddress,
    LabelledNets,
    Packet,
    Ports,
    Rule,
    World,
)
from netpol_ebpf.selector import Selector


@dataclass(frozen=True, slots=True)
class PacketSide:
    """One side of a packet: its address and port, with the objects of the world that have or contain the address.

    ``names``: the domain names that count for the address; none if an endpoint or a node has the address.
    """

    address: IPAddress
    port: int
    endpoints: tuple[Endpoint, ...]
    network_sets: tuple[LabelledNets, ...]
    names: frozenset[str] = frozenset()


def source_side(world: World, packet: Packet) -> PacketSide:
    """The source side of ``packet``."""
    return _side(world, packet.source, packet.source_port)


def destination_side(world: World, packet: Packet, names: frozenset[str] = frozenset()) -> PacketSide:
    """The destination side of ``packet``. ``names``: the names that the endpoint learned for the destination address."""
    side = _side(world, packet.destination, packet.destination_port)
    is_of_a_node = any(packet.destination in node.addresses for node in world.nodes.values())
    return side if side.endpoints or is_of_a_node else replace(side, names=names)


def _side(world: World, address: IPAddress, port: int) -> PacketSide:
    return PacketSide(
        address=address,
        port=port,
        endpoints=tuple(endpoint for endpoint in world.endpoints.values() if address in endpoint.addresses),
        network_sets=tuple(held for held in world.network_sets.values() if any(address in net for net in held.nets)),
    )


def rule_matches(world: World, rule: Rule, packet: Packet, source: PacketSide, destination: PacketSide) -> bool:
    """Whether all fields of the rule match the packet. ``source``, ``destination``: the two sides of the packet."""
    version = packet.source.version
    if rule.unsupported:
        return False
    if rule.ip_version is not None and rule.ip_version != version:
        return False
    if rule.protocol is not None and rule.protocol != packet.protocol:
        return False
    if (rule.protocol, version) in ((ICMP, 6), (ICMPV6, 4)):
        return False
    if rule.not_protocol is not None and rule.not_protocol == packet.protocol:
        return False
    if rule.icmp is not None and not _icmp_matches(rule.icmp, packet):
        return False
    if rule.not_icmp is not None and _icmp_matches(rule.not_icmp, packet):
        return False
    sets = _sets_by_name(world, rule, destination)
    return _entity_matches(world, rule.source, packet, source, ()) and _entity_matches(
        world, rule.destination, packet, destination, sets
    )


def _sets_by_name(world: World, rule: Rule, destination: PacketSide) -> tuple[LabelledNets, ...]:
    """The network sets with a pattern that matches a name of the destination.

    Only a rule with action Allow and without patterns of its own matches by them.
    """
    if rule.action is not Action.ALLOW or rule.destination.domains:
        return ()
    return tuple(held for held in world.network_sets.values() if _has_name(held.domains, destination))


def _has_name(patterns: frozenset[str], side: PacketSide) -> bool:
    return any(matches_pattern(pattern, name) for pattern in patterns for name in side.names)


def _icmp_matches(icmp: IcmpType, packet: Packet) -> bool:
    if packet.protocol not in (ICMP, ICMPV6):
        return False
    return icmp.type == packet.icmp_type and icmp.code in (None, packet.icmp_code)


def _entity_matches(
    world: World, entity: Entity, packet: Packet, side: PacketSide, sets_by_name: tuple[LabelledNets, ...]
) -> bool:
    """Whether all parts of the entity match the side.

    ``sets_by_name``: network sets that count as owners of the address for the entity's ``selector``, besides those that
    contain the address.
    """
    address = side.address
    if entity.impossible:
        return False
    if entity.nets and not any(address in net for net in entity.nets):
        return False
    if any(address in net for net in entity.not_nets):
        return False
    if entity.domains and not _has_name(entity.domains, side):
        return False
    by_name = entity.selector is not None and any(entity.selector.matches(held.labels) for held in sets_by_name)
    if entity.selector is not None and not (by_name or _is_selected(entity.selector, side)):
        return False
    if entity.not_selector is not None and _is_selected(entity.not_selector, side):
        return False
    if entity.nodes is not None and not _is_node(world, entity.nodes, address):
        return False
    if entity.ports is not None and not _ports_match(entity.ports, entity.selector, packet.protocol, side):
        return False
    if entity.not_ports is not None and _ports_match(entity.not_ports, entity.selector, packet.protocol, side):
        return False
    return entity.service is None or _is_backend(world, entity.service, packet.protocol, side)


def _is_selected(selector: Selector, side: PacketSide) -> bool:
    """Whether ``selector`` matches the labels of some owner of the side's address."""
    owners = [*(endpoint.labels for endpoint in side.endpoints), *(held.labels for held in side.network_sets)]
    return any(selector.matches(labels) for labels in owners)


def _is_node(world: World, selector: Selector, address: IPAddress) -> bool:
    return any(address in node.addresses and selector.matches(node.labels) for node in world.nodes.values())


def _ports_match(ports: Ports, selector: Selector | None, protocol: int, side: PacketSide) -> bool:
    """Whether ``ports`` match the side's port: by number, or by a name that an endpoint with the address declares.

    ``selector``: if not None, only endpoints that the selector matches count.
    """
    if protocol not in PORT_PROTOCOLS:
        return False
    if any(first <= side.port <= last for first, last in ports.ranges):
        return True
    return any(
        named.name in ports.names and named.protocol == protocol and named.port == side.port
        for endpoint in side.endpoints
        if selector is None or selector.matches(endpoint.labels)
        for named in endpoint.ports
    )


def _is_backend(world: World, match: BackendMatch, protocol: int, side: PacketSide) -> bool:
    service = world.services.get((match.namespace, match.name))
    if service is None:
        return False
    if not match.match_ports:
        return any(backend.address == side.address for backend in service.backends)
    return any(
        (backend.address, backend.protocol, backend.port) == (side.address, protocol, side.port) and backend.port != 0
        for backend in service.backends
    )
