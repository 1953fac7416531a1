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

    ``node``: name of this node, None: every workload that is found here is local.  ``interfaces``: patterns of workload
    interfaces, () for the built-in rule (`assignments.may_be_workloads`); ``own_interfaces``: patterns of those that are the node's.
    ``borrow_sources``: honour a pod's allowed source prefixes.
    ``keep_revoked``: connections that policy no longer allows live on until they end.  ``workload_to_host``: what becomes of
    packets of workloads to their own node, PASS: a wildcard host endpoint's policy decides.  ``mark_shift``: lowest of 16
    bits of the packets' mark that are ours, 0: none.  ``tunnels``: encapsulation, as IP protocol and UDP port, that nodes take
    from anyone, besides that of this node's devices; between known nodes it passes host endpoints.  ``routers``: patterns of ``NAMESPACE/NAME`` of workloads that others
    route through.  ``hairpin``: what comes from outside may have the source of a workload of this node.  ``barrier``: what
    stands behind the programs.
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
        """Whether others route through a workload."""
        return any(fnmatchcase(f"{key.namespace}/{key.name}", pattern) for pattern in self.routers)
