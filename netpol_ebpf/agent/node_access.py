# SPDX-License-Identifier: Apache-2.0
"""The agent's view of the node: one protocol for each subject.

`netpol_ebpf.agent.node` implements it on the kernel; tests have another implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from netpol_ebpf.agent.adoption import ConnectionAccess
from netpol_ebpf.agent.barrier import BarrierAccess
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.policy.types import IPAddress
from netpol_loader.pins.drift import Drift
from netpol_loader.pins.others import Other
from netpol_loader.tables.events import EventRecord


class NetworkAccess(Protocol):
    """Interfaces, addresses and routes of the node, and changes of them."""

    def snapshot(self, bound: Collection[int] = ()) -> Wiring:
        """Interfaces, routes and addresses as they are now.

        ``bound``: interfaces with the row of a workload. Addresses at their other ends are not listed again.
        """

    def has_news(self) -> bool:
        """Whether interfaces, routes or addresses may have changed since the last call."""

    def take_born(self) -> list[Interface]:
        """Interfaces that the kernel reported since the last call, new ones included.

        All other notifications stay queued.
        """

    def take_gone(self) -> set[int] | None:
        """Interfaces that vanished since the last call, even if new interfaces have their indices now.

        None: notifications were lost.
        """

    def interface_towards(self, address: IPAddress) -> int | None:
        """The interface by which the node would send to ``address``; None if there is no route."""


class ProgramAccess(Protocol):
    """Our programs on interfaces."""

    def attached(self) -> set[int]:
        """Interfaces with our programs on them."""

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> bool:
        """Attach our programs to an interface; False when it is gone. ``is_newborn``: the interface just appeared."""

    def detach(self, ifindex: int) -> None:
        """Detach our programs from an interface."""

    def prune(self) -> None:
        """Remove pins of interfaces that are gone; detach programs from interfaces that left this network namespace."""


class MapAccess(Protocol):
    """The maps that hold policy, and their exchange for new maps."""

    def renewal(self) -> contextlib.AbstractContextManager[Mapping[str, KernelMap]]:
        """A context manager that gives empty policy maps to fill.

        At the end of the block, unless it raised, they are in force everywhere.
        """

    def renewal_sizes(self) -> Mapping[str, int]:
        """The sizes in rows of the maps that the next `renewal` gives."""

    def former_numbers(self) -> Mapping[int, int]:
        """Endpoint numbers of the rows in force, by interface; also of an agent of another version."""

    def drop_rows(self, gone: Collection[int]) -> None:
        """Delete the rows in force of interfaces that are gone, so that no new interface with such an index has one."""


class RepairAccess(Protocol):
    """Detection and repair of changes by other programs."""

    def mend(self, ifindexes: Collection[int]) -> list[Drift]:
        """Restore pins, and our programs on the next of these interfaces, where something removed or changed them.

        Returns what was restored. Raises PlatformError, or PartlyMendedError with what was restored, when something
        could not be restored.
        """

    def other_programs(self, attached: Collection[int]) -> list[Other]:
        """Other parties' programs on the node's interfaces, as last read.

        ``attached``: interfaces with our programs.
        """


class NodeAccess(ProgramAccess, MapAccess, RepairAccess, ConnectionAccess, Protocol):
    """All access to the node; `Agent` passes the parts of it to its own parts."""

    @property
    def network(self) -> NetworkAccess:
        """The node's network."""

    @property
    def barrier(self) -> BarrierAccess:
        """The tables of the second barrier in this node's network namespace."""

    def others(self, ifindex: int) -> list[str]:
        """Other parties' programs on the TC ingress hook of an interface, as text for messages."""

    def read_events(self, consume: Callable[[EventRecord], None]) -> int:
        """Pass queued events to ``consume``, at most a bounded number; returns how many."""
