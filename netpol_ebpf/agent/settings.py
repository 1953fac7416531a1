# SPDX-License-Identifier: Apache-2.0
"""Settings of the agent, as its options give them.

Invariant: settings do not change while an agent runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from netpol_ebpf.agent.barrier import BarrierSettings
from netpol_ebpf.agent.dns_servers import DEFAULT_SERVERS, DnsServer, parse_dns_server
from netpol_ebpf.policy.types import Action, EndpointKey, IPNetwork


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The agent's options, parsed.

    ``node``: the name of this node; None: every workload with an interface here is local. ``interfaces``: name patterns
    of workloads' interfaces; (): the built-in rule (`assignments.may_be_workloads`). ``own_interfaces``: name patterns
    of the node's own interfaces. ``borrow_sources``: a pod may send from its allowed source prefixes. ``keep_revoked``:
    a connection that policy no longer allows continues until it ends. ``workload_to_host``: the action on packets from
    workloads to their own node; PASS: the policy of a wildcard host endpoint decides. ``mark_shift``: the position of
    the lowest of the 16 bits of the packet mark for the sender tag; 0: there is no sender tag. ``tunnels``: (IP
    protocol, UDP port) of encapsulations that the nodes accept from any sender, besides those of this node's devices; a
    host endpoint's policy does not apply to them between known nodes. ``routers``: patterns of ``NAMESPACE/NAME`` of
    workloads that forward packets for other hosts. ``hairpin``: a packet from outside may have the source address of a
    local workload. ``barrier``: options of the second barrier. ``name_ttl_floor_s``, ``name_extra_ttl_s``: the shortest
    life of an address that a workload learned for a domain name, and seconds added to each life. ``dns_servers``: the
    servers whose answers count. ``unlearned_nets``: further prefixes that no answer can teach. ``unread_dns``: "pass" or
    "drop", what happens to an answer that the program cannot read.
    """

    node: str | None = None
    interfaces: Sequence[str] = ()
    own_interfaces: Sequence[str] = ()
    borrow_sources: bool = False
    keep_revoked: bool = False
    workload_to_host: Action = Action.ALLOW
    mark_shift: int = 0
    tunnels: frozenset[tuple[int, int]] = frozenset()
    routers: Sequence[str] = ()
    hairpin: bool = False
    barrier: BarrierSettings = BarrierSettings()
    name_ttl_floor_s: int = 30
    name_extra_ttl_s: int = 0
    dns_servers: Sequence[DnsServer] = tuple(map(parse_dns_server, DEFAULT_SERVERS))
    unlearned_nets: Sequence[IPNetwork] = ()
    unread_dns: str = "pass"

    def is_router(self, key: EndpointKey) -> bool:
        """Whether a workload forwards packets for other hosts."""
        return any(fnmatchcase(f"{key.namespace}/{key.name}", pattern) for pattern in self.routers)
