# SPDX-License-Identifier: Apache-2.0
"""The agent's access to the node, as one Python protocol for each subject.

`netpol_ebpf.agent.node` implements the protocols for the kernel; tests implement them without one.
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
from netpol_loader import abi
from netpol_loader.pins.drift import Drift
from netpol_loader.pins.others import Other
from netpol_loader.tables.events import EventRecord


class NetworkAccess(Protocol):
    """Interfaces, addresses and routes of the node, and changes of them."""

    def snapshot(self, bound: Collection[int] = ()) -> Wiring:
        """Take a snapshot of interfaces, routes and addresses.

        ``bound``: interfaces with the row of a workload; addresses at their other ends are not listed again.
        """

    def has_news(self) -> bool:
        """Whether interfaces, routes or addresses may have changed since the last call."""

    def take_born(self) -> list[Interface]:
        """Interfaces that appeared or changed since the last call, as far as notifications tell.

        Notifications of other kinds stay queued.
        """

    def take_gone(self) -> set[int] | None:
        """Indices of interfaces that vanished since the last call, even if new interfaces have the same indices now.

        None if notifications were lost.
        """

    def bound_sockets(self) -> frozenset[tuple[int, IPAddress, int]]:
        """The sockets of the node that are bound to one address, as (protocol, address, port). Raises PlatformError."""

    def interface_towards(self, address: IPAddress) -> int | None:
        """The interface by which the node would now send to ``address``; None if there is no route."""


class ProgramAccess(Protocol):
    """Attachment of our programs to interfaces."""

    def attached(self) -> set[int]:
        """Indices of the interfaces to which our programs are attached."""

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> bool:
        """Attach our programs to an interface; returns False if the interface no longer exists.

        ``is_newborn``: the interface just appeared.
        """

    def detach(self, ifindex: int) -> None:
        """Detach our programs from an interface."""

    def prune(self) -> None:
        """Clean up after interfaces that no longer exist, or that moved to another network namespace.

        Their pins are removed, and the programs are detached from those that moved.
        """


class MapAccess(Protocol):
    """The maps that contain policy, and their replacement by new maps."""

    @property
    def maps(self) -> Mapping[str, KernelMap]:
        """The maps in force, by name."""

    def renewal(self) -> contextlib.AbstractContextManager[Mapping[str, KernelMap]]:
        """A context manager that provides empty policy maps, which the caller must fill.

        When the context ends without an error, the new maps are in force on all interfaces.
        """

    def renewal_sizes(self) -> Mapping[str, int]:
        """The sizes, in rows by map name, of the maps that the next `renewal` provides."""

    def former_numbers(self) -> Mapping[int, int]:
        """The endpoint number in each interface's row in force, also if an agent of another version wrote the row."""

    def drop_rows(self, gone: Collection[int]) -> None:
        """Delete the rows in force of interfaces that no longer exist, so that new interfaces do not get them.

        A new interface may have the index of an old one.
        """


class RepairAccess(Protocol):
    """Detection and repair of changes that other programs made."""

    def mend(self, ifindexes: Collection[int]) -> list[Drift]:
        """Restore pins, and our programs on some of these interfaces, if another program removed or changed them.

        Successive calls cover all interfaces. Returns what was restored. Raises PlatformError if something could not be
        restored; PartlyMendedError also has what was restored before.
        """

    def other_programs(self, attached: Collection[int]) -> list[Other]:
        """Other software's programs on the node's interfaces, as last read.

        ``attached``: interfaces with our programs.
        """


class NodeAccess(ProgramAccess, MapAccess, RepairAccess, ConnectionAccess, Protocol):
    """All access to the node. `Agent` gives each of its parts the protocol that the part needs."""

    @property
    def network(self) -> NetworkAccess:
        """The node's network."""

    @property
    def barrier(self) -> BarrierAccess:
        """The tables of the second barrier in this node's network namespace."""

    def others(self, ifindex: int) -> list[str]:
        """Other software's programs at TC ingress of an interface, as texts for messages."""

    def read_events(self, consume: Callable[[EventRecord], None]) -> int:
        """Pass queued events to ``consume``, up to a fixed number of them; returns how many were passed."""

    def read_dns_events(self, consume: Callable[[abi.np_dns_event], None]) -> int:
        """Pass reports of learned addresses to ``consume``, up to a fixed number; returns how many were passed."""
