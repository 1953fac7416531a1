# SPDX-License-Identifier: Apache-2.0
"""The agent's access to the kernel: the network of this node, and the programs and maps of the dataplane.

The agent changes the kernel only through this module. Invariant: enforcement outlives a `KernelNode`; only `netpolctl
cleanup` ends it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from netpol_ebpf.agent.adoption import LiveConnections, look_at_connections
from netpol_ebpf.agent.kernel_network import KernelNetwork
from netpol_ebpf.agent.timeouts import set_timeouts
from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.apply.encode import decode_endpoint, endpoint_key
from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.host.barrier import BarrierTables
from netpol_loader.host.links import find_link
from netpol_loader.pins import access, attach
from netpol_loader.pins.drift import Drift, PartlyMendedError, mend_attachments, mend_pins
from netpol_loader.pins.others import Other, OtherPrograms
from netpol_loader.pins.renewal import Renewal
from netpol_loader.pins.turns import Turns
from netpol_loader.pins.upgrade import Upgrade, open_dataplane
from netpol_loader.tables.events import EventRecord

POLICY_MAPS = frozenset(
    abi.maps_of(abi.MapRole.ENDPOINT, abi.MapRole.ENDPOINT_CACHE, abi.MapRole.NODE, abi.MapRole.TABLE)
)
"""The maps that contain policy, and the program's caches of policy.

All other maps contain connections, counters and settings, and are kept when policy maps are replaced."""


EVENTS_A_LOOK = 1000
"""Most events that one pass reads, so that many events do not delay everything else. The number is arbitrary."""
CLSACT_TURN = 10
"""Number of interfaces with clsact that one audit checks, because a check is slow there. The number is arbitrary."""


class KernelNode:
    """Implements `NodeAccess` for the network namespace of this process. A context manager."""

    def __init__(
        self,
        pin_root: Path,
        sizes: Mapping[str, int] | None = None,
        *,
        group: int | None = None,
        timeouts_s: Mapping[str, int] | None = None,
        plugin_results: Path | None = None,
    ) -> None:
        """``sizes``: max_entries by map name. ``group``: id of a group that may read the maps; None: no group.

        ``timeouts_s``: the time-outs that are not the default, by state (`timeouts`). ``plugin_results``: the directory
        of libcni's cache; None: the default directory.
        """
        self._network = KernelNetwork(plugin_results)
        self._pin_root = pin_root
        self._group = group
        self._timeouts_s = dict(timeouts_s or {})
        self._sizes = dict(sizes or {})
        self._stack = contextlib.ExitStack()
        self._consume: Callable[[EventRecord], None] = lambda _event: None
        self._consume_dns: Callable[[abi.np_dns_event], None] = lambda _event: None
        self._others = OtherPrograms()
        self._upgrade: Upgrade | None = None  # None after it has taken over
        self.upgraded = ""  # result of an upgrade of the pins, as text; "": none
        self._barrier = BarrierTables(str(pin_root.absolute()))

    def __enter__(self) -> KernelNode:  # noqa: PYI034 - typing.Self comes with Python 3.11
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._network)
            self._dataplane, self._upgrade = open_dataplane(self._pin_root, self._sizes)
            stack.enter_context(self._dataplane)
            if self._upgrade is not None:
                self.upgraded = self._upgrade.summary
                stack.callback(self._upgrade.discard)
            self._reader = stack.enter_context(self._dataplane.events(lambda event: self._consume(event)))
            self._dns_reader = stack.enter_context(self._dataplane.dns_events(lambda event: self._consume_dns(event)))
            self._mechanism = attach.preferred_mechanism(self._dataplane)
            self._turns = Turns(CLSACT_TURN if self._mechanism is attach.Mechanism.CLSACT else None)
            access.grant(self._dataplane, self._group)
            stack.callback(self._barrier.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pin_dir(self) -> Path:
        """The directory of the pinned maps."""
        return self._dataplane.pin_dir

    @property
    def maps(self) -> Mapping[str, KernelMap]:
        """See `NodeAccess`."""
        return self._dataplane.maps

    @property
    def barrier(self) -> BarrierTables:
        """See `NodeAccess`."""
        return self._barrier

    @property
    def network(self) -> KernelNetwork:
        """See `NodeAccess`."""
        return self._network

    @contextlib.contextmanager
    def renewal(self) -> Iterator[Mapping[str, KernelMap]]:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            yield self._dataplane.maps
            self._set_timeouts()  # before the exchange, so that no connection expires early in an upgrade
            self._upgrade.take_over()
            self._upgrade = None
            access.grant(self._dataplane, self._group)
            return
        if self._is_new():
            yield self._dataplane.maps
        else:
            with Renewal(self._dataplane, POLICY_MAPS, self._sizes) as renewal:
                yield renewal.maps
                renewal.take_over()
            access.grant(self._dataplane, self._group)
        self._set_timeouts()

    def renewal_sizes(self) -> Mapping[str, int]:
        """See `NodeAccess`."""
        sizes = {name: one.max_entries for name, one in self._dataplane.pinned.items()}
        if self._upgrade is None and not self._is_new():
            sizes |= {name: size for name, size in self._sizes.items() if name in POLICY_MAPS}
        return sizes

    def _set_timeouts(self) -> None:
        config = self._dataplane.config()
        set_timeouts(config, self._timeouts_s)
        self._dataplane.set_config(config)

    def _is_new(self) -> bool:
        """Whether there is no state to take over: no policy in these maps and no interface with the programs."""
        return next(iter(self._dataplane.maps["np_rule"].items()), None) is None and not self.attached()

    def former_numbers(self) -> Mapping[int, int]:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            return self._upgrade.numbers()
        rows = (decode_endpoint(value) for _, value in self._dataplane.maps["np_endpoint"].items())
        return {row.ifindex: row.number for row in rows}

    def drop_rows(self, gone: Collection[int]) -> None:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            self._upgrade.drop_rows(gone)
            return
        rows = self._dataplane.maps["np_endpoint"]
        stale = [one for one in map(endpoint_key, gone) if rows.delete(one)]
        if stale:
            self._dataplane.bump_generation()  # the program caches rows

    def attached(self) -> set[int]:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            return self._upgrade.attached()
        return {one.ifindex for one in attach.attachments(self._dataplane)}

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> bool:
        """See `NodeAccess`.

        Before an upgrade takes over, this attaches the programs of the older schema, which are in force.
        """
        try:
            if self._upgrade is not None:
                self._upgrade.attach(ifindex, is_newborn=is_newborn)
            else:
                attach.attach(ifindex, self._dataplane, self._mechanism, is_newborn=is_newborn)
        except PlatformError:
            if find_link(ifindex) is None:
                return False
            raise
        return True

    def detach(self, ifindex: int) -> None:
        """See `NodeAccess`."""
        attach.detach(ifindex, self._dataplane)
        self.prune()

    def prune(self) -> None:
        """See `NodeAccess`."""
        attach.prune(self._dataplane, self._network.interfaces)

    def mend(self, ifindexes: Collection[int]) -> list[Drift]:
        """See `NodeAccess`. Each call checks some of the interfaces (`Turns`).

        Of interfaces with clsact these are at most CLSACT_TURN, because checking one is slow.
        """
        found = mend_pins(self._dataplane)
        restored = {one.where for one in found}
        try:
            opened = access.grant(self._dataplane, self._group)
        except PlatformError as error:
            raise PartlyMendedError(error.message, found) from error
        found += [Drift("pin", str(path), "changed") for path in opened if str(path) not in restored]
        try:
            return found + mend_attachments(self._dataplane, self._turns.next(ifindexes))
        except PartlyMendedError as error:
            raise PartlyMendedError(error.message, [*found, *error.found]) from error

    def other_programs(self, attached: Collection[int]) -> list[Other]:
        """See `NodeAccess`."""
        return self._others.look(self._network.interfaces, attached, self._dataplane)

    def others(self, ifindex: int) -> list[str]:
        """See `NodeAccess`."""
        return attach.others(ifindex, self._dataplane)

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        """See `NodeAccess`."""
        return look_at_connections(namespaces)

    def read_events(self, consume: Callable[[EventRecord], None]) -> int:
        """See `NodeAccess`."""
        self._consume = consume
        return self._reader.consume(EVENTS_A_LOOK)

    def read_dns_events(self, consume: Callable[[abi.np_dns_event], None]) -> int:
        """See `NodeAccess`."""
        self._consume_dns = consume
        return self._dns_reader.consume(EVENTS_A_LOOK)
