# SPDX-License-Identifier: Apache-2.0
"""Settings of the agent from the command line.

Invariant: settings do not change while an agent runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from netpol_ebpf.agent.barrier import BarrierSettings
from netpol_ebpf.policy.types import Action, EndpointKey


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The options of the agent.

    ``node``: name of this node; None: every workload that is found here is local.  ``interfaces``: patterns of
    workloads' interfaces; (): the built-in rule (`assignments.may_be_workloads`).  ``own_interfaces``: patterns of the
    node's interfaces. ``borrow_sources``: honour a pod's allowed source prefixes.  ``keep_revoked``: connections that
    policy no longer allows live until they end.  ``workload_to_host``: the action on packets from workloads to their
    own node; PASS: a wildcard host endpoint's policy decides.  ``mark_shift``: lowest of the 16 bits of the packet mark
    for the sender tag; 0: none.  ``tunnels``: encapsulation (IP protocol, UDP port) that nodes accept from any sender,
    besides that of this node's devices; between known nodes it passes host endpoints.  ``routers``: patterns of
    ``NAMESPACE/NAME`` of workloads that are routers.  ``hairpin``: a packet from outside may have the source address of
    a local workload.  ``barrier``: options of the second barrier.
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

    def is_router(self, key: EndpointKey) -> bool:
        """Whether a workload is a router for other hosts."""
        return any(fnmatchcase(f"{key.namespace}/{key.name}", pattern) for pattern in self.routers)
