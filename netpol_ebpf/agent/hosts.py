# SPDX-License-Identifier: Apache-2.0
"""Plans which of the node's own interfaces get the programs, and which host endpoint applies to each.

An own interface is any interface that is not a workload's. A host endpoint applies to the interface that it names. If
it names none, it applies to the interfaces that have one of its addresses. A wildcard host endpoint applies to all
interfaces without another host endpoint. If several host endpoints name an interface or have its addresses, the first
by `claim_order` gets it, and the others are reported as problems.

All own interfaces get the programs, except bridges and the loopback. The reason is that a packet to a service can leave
by any interface, and a packet with a forged source address of a local workload can arrive by any. On an interface
without a host endpoint the programs check only these two kinds of packets and let all others pass. A bridge gets the
programs only if a host endpoint names it or has one of its addresses, because every packet through a bridge also passes
one of its ports.

The plan is a pure function of one snapshot of the node. This module makes no system call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from netpol_ebpf.agent.wiring import BRIDGE_KIND, Wiring
from netpol_ebpf.policy.journey import WILDCARD, claim_order
from netpol_ebpf.policy.types import Endpoint, EndpointKey

LOOPBACK = 1
"""The interface index of the loopback, which is the same in every network namespace."""


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The result of `plan_hosts`.

    ``interfaces``: the host endpoint of each own interface that must have the programs, by interface index; None: no
    policy applies there. ``wildcard``: the host endpoint of all other interfaces, None if there is none. ``problems``:
    host endpoints that are not in force as written, each with the reason.
    """

    interfaces: Mapping[int, EndpointKey | None] = field(default_factory=dict)
    wildcard: EndpointKey | None = None
    problems: Mapping[EndpointKey, str] = field(default_factory=dict)

    @property
    def in_force(self) -> set[EndpointKey]:
        """The host endpoints that need rows in the kernel's maps."""
        found = {key for key in self.interfaces.values() if key is not None}
        return found | ({self.wildcard} if self.wildcard is not None else set())


def own_interfaces(wiring: Wiring, workloads: Collection[int]) -> set[int]:
    """Indices of the node's own interfaces: all but the loopback and workloads' interfaces."""
    return wiring.links.keys() - set(workloads) - {LOOPBACK}


def plan_hosts(wiring: Wiring, endpoints: Iterable[Endpoint], workloads: Collection[int]) -> HostPlan:
    """Plan which host endpoint applies to each own interface.

    ``endpoints``: the host endpoints of this node. ``workloads``: indices of workloads' interfaces.
    """
    own = own_interfaces(wiring, workloads)
    by_name = {wiring.links[ifindex].name: ifindex for ifindex in own}
    wildcard: EndpointKey | None = None
    taken: dict[int, EndpointKey] = {}
    problems: dict[EndpointKey, str] = {}
    for endpoint in sorted(endpoints, key=claim_order):
        if endpoint.interface == WILDCARD:
            if wildcard is None:
                wildcard = endpoint.key
            else:
                problems[endpoint.key] = f"{wildcard} is the host endpoint of all interfaces already"
            continue
        if endpoint.interface is not None:
            wanted = {by_name[endpoint.interface]} if endpoint.interface in by_name else set()
            what = f"its interface {endpoint.interface} is not one of the node's own"
        else:
            wanted = {wiring.addresses[one] for one in endpoint.addresses if one in wiring.addresses} & own
            what = "none of its addresses is on an interface of the node"
        if not wanted:
            problems[endpoint.key] = what
        for ifindex in sorted(wanted):
            holder = taken.setdefault(ifindex, endpoint.key)
            if holder != endpoint.key:
                problems[endpoint.key] = f"interface {wiring.links[ifindex].name} has the host endpoint {holder}"
    interfaces: dict[int, EndpointKey | None] = dict(taken)
    for ifindex in own:
        if wiring.links[ifindex].kind != BRIDGE_KIND:
            interfaces.setdefault(ifindex, wildcard)
    return HostPlan(interfaces, wildcard, problems)
