# SPDX-License-Identifier: Apache-2.0
"""Which interface belongs to which endpoint, and which interfaces are workloads' at all: pure reasoning over one snapshot.

A pod's interface is the one that the node's own host route to its address leads to; without such a route (bridges) it is
the veth whose other end, in another network namespace, has the address.  An endpoint that names its interface has that one.

Invariants: the node's own uplinks are never a workload's, unless an endpoint names one; two endpoints never get one interface,
nor one endpoint two: then neither is found, and the reason is told.  Runs nothing and asks no kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from netpol_ebpf.apply.encode import EndpointFlag, Meaning
from netpol_ebpf.policy.types import Endpoint, EndpointKey, IPAddress, IPNetwork

ETHERNET = 1
LAYER3_HARDWARE = frozenset({519, 512, 768, 769, 776, 778, 823, 65534})
"""ARPHRD_* of devices whose packets begin with the network header: raw IP, PPP, IPIP, ip6tnl, sit, GRE, IPv6 GRE, none (tun,
WireGuard, xfrm)."""
BRIDGE_KIND = "bridge"
TAP_KINDS = frozenset({"tun"})
"""What the kernel calls a tap or tun device; a tap is a virtual machine's interface."""
NOWHERE = 0
"""In place of an interface's number: none."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface.

    ``peer``: (namespace id, interface index there) of a veth whose other end is in another namespace.  ``master``: the bridge
    or VRF that it belongs to.  ``hardware``: ARPHRD_*.  ``takes``: encapsulation that it takes from anyone, as protocol and port;
    ``is_external``: it keeps the outer addresses of what it takes.
    """

    ifindex: int
    name: str
    kind: str = ""
    peer: tuple[int, int] | None = None
    master: int = NOWHERE
    hardware: int = ETHERNET
    takes: tuple[tuple[int, int], ...] = ()
    is_external: bool = False


@dataclass(frozen=True, slots=True)
class Wiring:
    """A snapshot of the node.

    ``host_routes``: interface of each directly connected single address.  ``uplinks``: interfaces of the node's own
    traffic.  ``peer_addresses``: by (namespace id, interface index there).  ``addresses``: the node's own and the interface
    each is on; ``meanings``: all single addresses that mean the node; ``local_nets``: prefixes that are its own.
    """

    links: Mapping[int, Link] = field(default_factory=dict)
    host_routes: Mapping[IPAddress, int] = field(default_factory=dict)
    uplinks: frozenset[int] = frozenset()
    peer_addresses: Mapping[tuple[int, int], tuple[IPAddress, ...]] = field(default_factory=dict)
    addresses: Mapping[IPAddress, int] = field(default_factory=dict)
    meanings: Mapping[IPAddress, Meaning] = field(default_factory=dict)
    local_nets: frozenset[IPNetwork] = frozenset()

    @property
    def tunnels(self) -> frozenset[tuple[int, int]]:
        """Encapsulation that the node's devices take from anyone, as protocol and port."""
        return frozenset(one for link in self.links.values() for one in link.takes)

    def link_of(self, ifindex: int) -> int:
        """The interface that has the addresses of an interface's link: its bridge, or itself."""
        link = self.links.get(ifindex)
        master = self.links.get(link.master) if link is not None else None
        return master.ifindex if master is not None and master.kind == BRIDGE_KIND else ifindex

    def name_of(self, ifindex: int) -> str:
        """An interface's name; its number when it is gone."""
        link = self.links.get(ifindex)
        return str(ifindex) if link is None else link.name


@dataclass(frozen=True, slots=True)
class Located:
    """What was found. ``problems``: endpoints that could not be given an interface although there is a trace of one, and why.

    Endpoints in neither are not here (yet).
    """

    interfaces: Mapping[EndpointKey, int]
    problems: Mapping[EndpointKey, str]


def device_flags(link: Link | None) -> EndpointFlag:
    """What the program has to know of a device to read its packets."""
    if link is None or link.hardware == ETHERNET:
        return EndpointFlag.NONE
    return EndpointFlag.LAYER3 if link.hardware in LAYER3_HARDWARE else EndpointFlag.UNREADABLE


def is_candidate(link: Link, wiring: Wiring, patterns: Sequence[str] = ()) -> bool:
    """Whether an interface is to be taken for a workload's, and so closed while nothing is known about it.

    With ``patterns`` (shell wildcards) exactly what matches one of them.
    """
    if patterns:
        return any(fnmatchcase(link.name, pattern) for pattern in patterns)
    is_tap = link.kind in TAP_KINDS and link.hardware == ETHERNET  # else it is a tunnel of the node's own
    return (link.peer is not None or is_tap) and link.ifindex not in wiring.uplinks


def locate(wiring: Wiring, endpoints: Iterable[Endpoint]) -> Located:
    """Find the interface of each endpoint. Cost: linear in endpoints, links and addresses."""
    by_name = {link.name: link.ifindex for link in wiring.links.values()}
    by_peer_address: dict[IPAddress, list[int]] = {}
    for link in wiring.links.values():
        if link.peer is not None and link.ifindex not in wiring.uplinks:
            for address in wiring.peer_addresses.get(link.peer, ()):
                by_peer_address.setdefault(address, []).append(link.ifindex)

    problems: dict[EndpointKey, str] = {}
    owners: dict[int, list[EndpointKey]] = {}
    for endpoint in endpoints:
        if endpoint.interface is not None:
            found = {by_name[endpoint.interface]} if endpoint.interface in by_name else set()
        else:
            found = _by_address(endpoint.addresses, wiring, by_peer_address)
        if len(found) > 1:
            names = ", ".join(sorted(wiring.links[ifindex].name for ifindex in found))
            problems[endpoint.key] = f"its addresses lead to several interfaces: {names}"
        for ifindex in found if len(found) == 1 else ():
            owners.setdefault(ifindex, []).append(endpoint.key)

    interfaces: dict[EndpointKey, int] = {}
    for ifindex, keys in owners.items():
        if len(keys) == 1:
            interfaces[keys[0]] = ifindex
        else:
            others = ", ".join(str(key) for key in sorted(keys))
            problems |= {
                key: f"interface {wiring.links[ifindex].name} would belong to several: {others}" for key in keys
            }
    return Located(interfaces, problems)


def _by_address(
    addresses: Collection[IPAddress], wiring: Wiring, by_peer_address: Mapping[IPAddress, Sequence[int]]
) -> set[int]:
    """Every interface that one of the addresses leads to; a host route tells more than a peer's address."""
    found: set[int] = set()
    for address in addresses:
        routed = wiring.host_routes.get(address)
        if routed is not None and routed in wiring.links and routed not in wiring.uplinks:
            found.add(routed)
        else:
            found.update(by_peer_address.get(address, ()))
    return found
