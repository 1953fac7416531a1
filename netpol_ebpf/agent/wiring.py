# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the node's interfaces, addresses and routes, as data.

From the snapshot `netpol_ebpf.agent.assignments` decides which interface belongs to which workload. This module makes
no system call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol_ebpf.agent.cni import CniResult
from netpol_ebpf.apply.encode import EndpointFlag, Meaning
from netpol_ebpf.errors import Problem
from netpol_ebpf.policy.types import IPAddress, IPNetwork

ETHERNET = 1
LAYER3_HARDWARE = frozenset({519, 512, 768, 769, 776, 778, 823, 65534})
"""ARPHRD_* numbers of devices without a link-layer header: raw IP, PPP, IPIP, ip6tnl, sit, GRE, IPv6 GRE, and none
(tun, WireGuard, xfrm)."""
BRIDGE_KIND = "bridge"
PAIR_KINDS = frozenset({"veth", "netkit"})
"""Kinds of devices that come in pairs. A CNI plugin moves one end into the workload's namespace."""
TAP_KINDS = frozenset({"tun"})
"""The kernel's kind for tap and tun devices. A tap device is the interface of a virtual machine."""
MOST_STACKED = 8
"""Largest number of devices stacked on each other: the kernel's MAX_NEST_DEV."""
NOWHERE = 0
"""The value of an interface index that means: no interface."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface.

    ``peer``: (namespace id, interface index there) of the other end of a veth or netkit pair; None if that end is in
    this namespace. ``master``: index of its bridge or VRF. ``hardware``: its ARPHRD_* number. ``takes``: tunnels, as
    (IP protocol, port), that the device decapsulates from any sender. ``is_external``: it is a tunnel device in
    metadata mode, which gets the outer addresses with each packet. ``lower``: index of the device in this namespace
    under a VLAN, macvlan or ipvlan device.
    """

    ifindex: int
    name: str
    kind: str = ""
    peer: tuple[int, int] | None = None
    master: int = NOWHERE
    hardware: int = ETHERNET
    takes: tuple[tuple[int, int], ...] = ()
    is_external: bool = False
    lower: int = NOWHERE


@dataclass(frozen=True, slots=True)
class Wiring:
    """A snapshot of the node's network. Interfaces are given by index.

    ``host_routes``: the interface to each directly connected single address. ``subnets``: the interfaces to each
    directly connected prefix. ``uplinks``: interfaces of default routes. ``next_hops``: interfaces of other routes with
    a next hop. ``shared``: interfaces on which an address of the node has a prefix. ``uplinks``, ``next_hops`` and
    ``shared`` leave out routes and prefixes of router advertisements.

    ``peer_addresses``: addresses at the other end of a pair, by (namespace id, interface index there), in the order in
    which they were added. ``addresses``: the interface of each of the node's addresses. ``meanings``: the role of each
    single address at the node. ``local_nets``: prefixes that are the node's own. ``results``: interfaces that CNI
    plugins made for pods. ``problems``: results that could not be read.
    """

    links: Mapping[int, Interface] = field(default_factory=dict)
    host_routes: Mapping[IPAddress, int] = field(default_factory=dict)
    uplinks: frozenset[int] = frozenset()
    peer_addresses: Mapping[tuple[int, int], tuple[IPAddress, ...]] = field(default_factory=dict)
    addresses: Mapping[IPAddress, int] = field(default_factory=dict)
    meanings: Mapping[IPAddress, Meaning] = field(default_factory=dict)
    local_nets: frozenset[IPNetwork] = frozenset()
    subnets: Mapping[IPNetwork, frozenset[int]] = field(default_factory=dict)
    next_hops: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()
    results: tuple[CniResult, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def tunnels(self) -> frozenset[tuple[int, int]]:
        """Tunnels, as (IP protocol, port), that the node's devices decapsulate from any sender."""
        return frozenset(one for link in self.links.values() for one in link.takes)

    def link_of(self, ifindex: int) -> int:
        """The index of the interface that has the node's addresses on a link.

        That is the bridge if the interface is a port of one, otherwise the interface itself.
        """
        link = self.links.get(ifindex)
        master = self.links.get(link.master) if link is not None else None
        return master.ifindex if master is not None and master.kind == BRIDGE_KIND else ifindex

    def lowest(self, link: Interface) -> Interface:
        """The device at the bottom of a stack of devices, where packets enter the node.

        ``link`` itself if it is not stacked.
        """
        for _ in range(MOST_STACKED):
            link = self.links.get(link.lower, link)
        return link

    def name_of(self, ifindex: int) -> str:
        """The name of an interface; its index as text if the interface no longer exists."""
        link = self.links.get(ifindex)
        return str(ifindex) if link is None else link.name


def device_flags(link: Interface | None) -> EndpointFlag:
    """The endpoint flags by which the program knows how to parse the packets of a device."""
    if link is None or link.hardware == ETHERNET:
        return EndpointFlag.NONE
    return EndpointFlag.LAYER3 if link.hardware in LAYER3_HARDWARE else EndpointFlag.UNREADABLE
