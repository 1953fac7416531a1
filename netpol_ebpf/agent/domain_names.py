# SPDX-License-Identifier: Apache-2.0
"""The agent's part in domain names: reads what the program learned, and adds what later patterns need.

Each step reads the program's reports.  When patterns changed, learned addresses get the classes of the new patterns.
Names that only an inner wildcard matches are given to the compiler, which makes rows for them.  Name classes that no
pattern gives any more are forgotten when no learned address and no open connection has them.

Invariant: a fault of this part changes no verdict: a missing class denies what only the name would allow.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.enforcement import Enforcement
from netpol_ebpf.agent.learned_names import (
    MOST_NAMES,
    LearnedName,
    Lifetime,
    NameStore,
    classes_in_use,
    names_in_kernel,
    teach,
)
from netpol_ebpf.agent.node_access import NodeAccess
from netpol_ebpf.apply.events import LearnedAddress, decode_learned
from netpol_ebpf.errors import Problem
from netpol_ebpf.policy.learned_names import LearnedNames
from netpol_ebpf.policy.types import EndpointKey, IPAddress
from netpol_loader import abi
from netpol_loader.kernel.clock import read_jiffies

FORGET_S = 300.0
"""Seconds between two looks for name classes that nothing has any more; arbitrary. A class takes one row of each domain
list that has one of its pattern sets."""
VERIFY_S = 2.0
"""Seconds for which reports about a row that the agent wrote make the agent look at the row again; arbitrary. The program
may have written the row at the same moment, and one of the two classes is then missing."""

REPORTS_IN_RING = abi.MAP_SPECS["np_dns_event"].max_entries // ctypes.sizeof(abi.np_dns_event)
"""At least as many reports as the ring buffer holds. Reports that come while the agent reads are of numbers in use."""


def seconds_since_boot() -> float:
    """The time since the kernel started, suspended time included. Nobody sets this clock back."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The identity of this boot: `seconds_since_boot` of another boot means nothing in this one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class DomainNames:
    """Keeps the names that endpoints learned, and the classes of learned addresses, up to date."""

    def __init__(
        self,
        node: NodeAccess,
        enforcement: Enforcement,
        clock: Callable[[], float],
        file: Path | None,
        *,
        floor_s: int,
        extra_s: int,
        boot_clock: Callable[[], float] = seconds_since_boot,
    ) -> None:
        """``clock``: monotonic time in seconds. ``boot_clock``: seconds since the boot, as an earlier agent counted them.

        The other parameters are those of `NameStore`.
        """
        self.learned = NameStore(boot_clock, file, boot=boot_id(), floor_s=floor_s, extra_s=extra_s)
        self._node = node
        self._enforcement = enforcement
        self._clock = clock
        self._boot_clock = boot_clock
        self._patterns_version = -1
        self._written: dict[tuple[EndpointKey, IPAddress], float] = {}
        self._forget_at_s = clock() + FORGET_S
        self._has_loaded = False
        self._received: deque[LearnedAddress] = deque(maxlen=MOST_NAMES)

    def receive(self) -> None:
        """Read all waiting reports, for the next `step`.

        Must be called before new maps are made: they may give the number of an endpoint that went to another endpoint, and
        a report names its endpoint by the number alone.
        """
        left = REPORTS_IN_RING
        while left > 0:
            events = self._read()
            if not events:
                break
            self._received.extend(events)
            left -= len(events)

    def step(self, endpoints: Collection[EndpointKey]) -> None:
        """Do all work that is due. ``endpoints``: those of this node."""
        if not self._has_loaded:
            self._has_loaded = True
            self.learned.load(set(endpoints).__contains__)
        events = [*self._received, *self._read()]
        self._received.clear()
        if events:
            now, hertz = read_jiffies(), self._hertz()
            self.learned.take(events, lambda event: (now - event.time_jiffies) / hertz)
        asked = {event.name for event in events if event.endpoint is not None}
        if self._enforcement.tables.names.version != self._patterns_version:
            asked.update(key.name for key, _ in self.learned)  # an inner wildcard may be newer than the names
        if asked:
            self._enforcement.see_names(asked)
        again = self._to_verify(events)
        version = self._enforcement.tables.names.version
        if version != self._patterns_version:
            self._patterns_version = version
            self._teach(list(self.learned))
        elif again:
            self._teach(again)
        self.learned.keep_only(endpoints)
        self.learned.expire()
        if self._clock() >= self._forget_at_s:
            self._forget_at_s = self._clock() + FORGET_S
            self._forget_classes()

    def _read(self) -> list[LearnedAddress]:
        records: list[abi.np_dns_event] = []
        self._node.read_dns_events(records.append)
        names = self._enforcement.names
        return [decode_learned(record, names) for record in records]

    def _to_verify(self, events: list[LearnedAddress]) -> list[tuple[LearnedName, Lifetime]]:
        """The names of addresses that the program reported shortly after the agent wrote their rows."""
        now_s = self._clock()
        self._written = {key: at_s for key, at_s in self._written.items() if at_s > now_s - VERIFY_S}
        rows = {(event.endpoint, event.address) for event in events if event.endpoint is not None}
        rows &= self._written.keys()
        return [(key, one) for key, one in self.learned if (key.endpoint, key.address) in rows] if rows else []

    def _teach(self, names: list[tuple[LearnedName, Lifetime]]) -> None:
        if not names:
            return
        teach(
            self._node.maps,
            self._enforcement.tables,
            names,
            now_s=self._boot_clock(),
            now_jiffies=read_jiffies(),
            jiffies_per_second=self._hertz(),
            is_refused=self._enforcement.is_never_learned,
        )
        now_s = self._clock()
        self._written.update(((key.endpoint, key.address), now_s) for key, _ in names)

    def _hertz(self) -> int:
        config = abi.np_config.from_buffer_copy(self._node.maps["np_config"].get(bytes(4)) or b"")
        return int(config.jiffies_per_second)

    def _forget_classes(self) -> None:
        unused = self._enforcement.unused_name_classes()
        if unused:
            self._enforcement.forget_name_classes(unused - classes_in_use(self._node.maps))

    def close(self) -> None:
        """Write the names down at the end."""
        self.learned.save()

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the kept names."""
        return self.learned.problems

    def known(self) -> LearnedNames:
        """What this node's endpoints learned, as questions of policy need it.

        These are the names that the program reported, and for names of which the agent knows nothing, such as those of a
        CNAME chain, the patterns that match them.
        """
        found = LearnedNames()
        for key, _ in self.learned:
            found.learn(key.endpoint, [key.name], key.address)
        rows = names_in_kernel(self._node.maps, self._enforcement.tables, now_jiffies=read_jiffies())
        for endpoint, address, names in rows:
            found.learn(endpoint, names, address)
        return found

    def report(self) -> list[dict[str, Any]]:
        """The learned names as plain values, those of an endpoint together, with the patterns of rules that match."""
        tables, now_s = self._enforcement.tables, self._boot_clock()
        found = []
        for key, one in sorted(self.learned, key=lambda item: (item[0].endpoint, item[0].name, str(item[0].address))):
            content = tables.name_classes.get(self._enforcement.class_of_name(key.name)) or frozenset()
            found.append({
                "endpoint": str(key.endpoint),
                "name": key.name,
                "address": str(key.address),
                "server": str(one.server),
                "patterns": sorted(frozenset().union(*content)),
                "expires_s": max(0, int(one.until_s - now_s)),
            })  # fmt: skip
        return found
