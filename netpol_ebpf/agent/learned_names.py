# SPDX-License-Identifier: Apache-2.0
"""The domain names that this node's endpoints learned, as the program reports them, and what later patterns need of them.

The program learns addresses by itself, before the endpoint has the answer (docs/adr/0024-dns-in-the-packet-path.md).  It
stores classes of names and no names.  From its reports the agent keeps the names: to show them, to give addresses the
classes of patterns that are newer than the answer, and to give names that only an inner wildcard (``x.*.com``) matches a
row of their own.

Invariants: enforcement does not depend on this module; without the agent the program learns as before.  What one
endpoint learned counts for that endpoint alone.  The number of kept names is bounded; what is evicted is counted.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.apply.encode import learned_element, learned_key
from netpol_ebpf.apply.events import LearnedAddress
from netpol_ebpf.apply.records import EntryFile, checked, checked_list
from netpol_ebpf.compiler.domains import is_inner, most_specific
from netpol_ebpf.compiler.tables import CompiledTables
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.types import EndpointKey, IPAddress
from netpol_loader import abi
from netpol_loader.tables.connections import ConnectionMap

MOST_NAMES = 65_536
"""Largest number of kept (endpoint, address, name); as many as np_learned4 has rows."""
MOST_OF_ENDPOINT = 8_192
"""Largest number of these of one endpoint, so that no endpoint evicts the names of all others; arbitrary."""
SAVE_S = 60.0
"""Seconds between two writes of the file; arbitrary. What an agent learned since is lost if it is killed, and is then
shown without its name."""
MOST_BYTES = 1 << 26
FORMAT = 1
LATEST_S = 1 << 40
"""A later time in the file counts as this one, in seconds since 1970; arbitrary."""
EVENTS_LOST = "dns-event-lost"


class LearnedName(NamedTuple):
    """One name that one endpoint learned for one address."""

    endpoint: EndpointKey
    address: IPAddress
    name: str


@dataclass(slots=True)
class Lifetime:
    """What is known of a `LearnedName`.

    ``until_s``: when it expires, in seconds since the boot.
    ``server``: the DNS server that answered.
    """

    until_s: float
    server: IPAddress


class NameStore:
    """Keeps the reported names.

    ``evicted``: how many names were dropped before they expired, because too many were kept.
    """

    def __init__(self, clock: Callable[[], float], file: Path | None, *, boot: str, floor_s: int, extra_s: int) -> None:
        """``clock``: seconds since the boot. ``file``: keeps the names across restarts; None: they are not kept.

        ``boot``: the identity of this boot. Names of another boot are not read, because the kernel has lost them too.
        ``floor_s``, ``extra_s``: shortest life of a learned address, and seconds added to each life.
        """
        self.evicted = 0
        self._clock = clock
        self._boot = boot
        self._floor_s, self._extra_s = floor_s, extra_s
        self._file = None if file is None else EntryFile(file, "names", FORMAT, MOST_BYTES)
        self._file_problem = ""
        self._saved_s = clock()
        self._names: OrderedDict[LearnedName, Lifetime] = OrderedDict()  # the one that was reported last comes last
        self._of_endpoint: defaultdict[EndpointKey, OrderedDict[LearnedName, None]] = defaultdict(
            OrderedDict
        )  # likewise
        self._by_address: defaultdict[tuple[EndpointKey, IPAddress], set[str]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[tuple[LearnedName, Lifetime]]:
        """All names that have not expired."""
        now_s = self._clock()
        return ((key, one) for key, one in self._names.items() if one.until_s > now_s)

    def take(
        self, events: Iterable[LearnedAddress], age_s: Callable[[LearnedAddress], float] = lambda _: 0.0
    ) -> list[LearnedName]:
        """Add reported names. Returns those that are new or had expired.

        ``age_s``: how long ago the answer came. Reports wait while no agent runs, and the names expire meanwhile.
        """
        now_s = self._clock()
        new = []
        for event in events:
            if event.endpoint is None:
                continue  # the endpoint is gone
            key = LearnedName(event.endpoint, event.address, event.name)
            until_s = now_s - max(0.0, age_s(event)) + max(event.ttl_s, self._floor_s) + self._extra_s
            before = self._names.get(key)
            if before is None or before.until_s <= now_s:
                new.append(key)
            self._put(key, Lifetime(max(until_s, 0.0 if before is None else before.until_s), event.server))
        return new

    def _put(self, key: LearnedName, learned: Lifetime) -> None:
        own = self._of_endpoint[key.endpoint]
        if key not in self._names:
            own[key] = None
            self._by_address[key.endpoint, key.address].add(key.name)
        self._names[key] = learned
        self._names.move_to_end(key)
        own.move_to_end(key)
        if len(own) > MOST_OF_ENDPOINT:
            self._evict(next(iter(own)))
        elif len(self._names) > MOST_NAMES:
            self._evict(next(iter(self._names)))

    def _evict(self, key: LearnedName) -> None:
        if self._names[key].until_s > self._clock():
            self.evicted += 1
        self._remove(key)

    def _remove(self, key: LearnedName) -> None:
        del self._names[key]
        own = self._of_endpoint[key.endpoint]
        del own[key]
        if not own:
            del self._of_endpoint[key.endpoint]
        names = self._by_address[key.endpoint, key.address]
        names.discard(key.name)
        if not names:
            del self._by_address[key.endpoint, key.address]

    def names_of(self, endpoint: EndpointKey, address: IPAddress) -> frozenset[str]:
        """The names for which the endpoint learned the address, without expired ones."""
        now_s = self._clock()
        names = self._by_address.get((endpoint, address), ())
        return frozenset(name for name in names if self._names[LearnedName(endpoint, address, name)].until_s > now_s)

    def keep_only(self, endpoints: Collection[EndpointKey]) -> None:
        """Remove the names of endpoints that no longer exist. ``endpoints``: those that exist."""
        for endpoint in self._of_endpoint.keys() - set(endpoints):
            for key in list(self._of_endpoint[endpoint]):
                self._remove(key)

    def expire(self) -> None:
        """Remove expired names, and write the file if it is due."""
        now_s = self._clock()
        if now_s < self._saved_s + SAVE_S:
            return
        self._saved_s = now_s
        for key in [key for key, one in self._names.items() if one.until_s <= now_s]:
            self._remove(key)
        self.save()

    # --- the file ---------------------------------------------------------------------------------------------------

    def load(self, present: Callable[[EndpointKey], bool]) -> None:
        """Read the names of an earlier agent. ``present``: whether an endpoint is still on this node."""
        if self._file is None:
            return

        def take(entry: Any) -> None:
            *texts, until = checked(entry, list, "a name") or [None]
            kind, namespace, name, address, domain, server, boot = checked_list(texts, str, "a name")
            until_s = float(min(checked(until, int, "the time"), LATEST_S))
            key = LearnedName(EndpointKey(kind, namespace, name), ip_address(address), domain)
            if boot == self._boot and present(key.endpoint) and until_s > self._clock():
                self._put(key, Lifetime(until_s, ip_address(server)))

        damage = self._file.load(take)
        self._file_problem = f"the file of learned names is {damage}" if damage else ""

    def save(self) -> None:
        """Write the names to the file, if there is one. A failure becomes a problem."""
        if self._file is None:
            return
        try:
            self._file.save(
                json.dumps([*key.endpoint, str(key.address), key.name, str(one.server), self._boot, int(one.until_s)])
                for key, one in self
            )
            self._file_problem = ""
        except OSError as error:
            self._file_problem = (
                f"learned names cannot be written down ({error.strerror}): enforcement goes on, and after a restart "
                "`netpolctl get dns` does not show them"
            )

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the kept names."""
        found = [self._file_problem] if self._file_problem else []
        if self.evicted:
            found.append(
                f"{self.evicted} learned names were dropped because endpoints learned more than the agent keeps "
                f"({MOST_OF_ENDPOINT} of an endpoint, {MOST_NAMES} in all): a policy that is added later does not know them"
            )
        return [Problem(Location(""), "", message, slug="learned-names", severity="warning") for message in found]


def teach(
    maps: Mapping[str, KernelMap],
    tables: CompiledTables,
    names: Iterable[tuple[LearnedName, Lifetime]],
    *,
    now_s: float,
    now_jiffies: int,
    jiffies_per_second: int,
    is_refused: Callable[[IPAddress], bool] = lambda _: False,
) -> int:
    """Give learned addresses the classes that the patterns in force now give their names. Returns how many rows changed.

    A row that has the class keeps it. The kernel may write a row at the same time: the caller repeats the call for names
    that are reported shortly afterwards.
    ``now_s``, ``now_jiffies``: the same time by both clocks. ``is_refused``: whether an address must not be learned now.
    """
    changed = 0
    for key, learned in names:
        row = tables.endpoints.get(key.endpoint)
        wanted = most_specific(key.name, tables.names)
        if row is None or not wanted or is_refused(key.address):
            continue
        map_name, map_key = learned_key(row.number, key.address)
        until = int(now_jiffies + (learned.until_s - now_s) * jiffies_per_second) // abi.NP_LEARNED_JIFFIES
        present = _classes(maps[map_name].get(map_key), now_jiffies // abi.NP_LEARNED_JIFFIES)
        if wanted in present and present[wanted] >= until - 1:
            continue
        present[wanted] = until
        kept = dict(sorted(present.items(), key=lambda item: -item[1])[: abi.NP_LEARNED_CLASSES])
        _, map_key, value = learned_element(row.number, key.address, kept)
        maps[map_name].put(map_key, value)
        changed += 1
    return changed


def _classes(value: bytes | None, now: int) -> dict[int, int]:
    """The classes of a row that have not expired, with their times. ``now``: in units of NP_LEARNED_JIFFIES."""
    if value is None:
        return {}
    row = abi.np_learned.from_buffer_copy(value)
    found = {}
    for class_, until in zip(row.name_class, row.until, strict=True):
        left = (until - now) & 0xFFFFFFFF
        if class_ and 0 < left < 1 << 31:
            found[class_] = now + left
    return found


def classes_in_use(maps: Mapping[str, KernelMap]) -> frozenset[int]:
    """The name classes that learned addresses, also expired ones, and connections have.

    Cost: linear in the rows, and a system call for each connection.
    """
    found: set[int] = set()
    for name in ("np_learned4", "np_learned6"):
        for _, value in maps[name].items():  # noqa: PERF102 - a map is no dict
            found.update(abi.np_learned.from_buffer_copy(value).name_class)
    # Connections come last: one may take a class from a row that goes meanwhile, but no row takes one from a connection.
    tables = (maps[name] for name in ("np_conn4", "np_conn6"))
    found.update(number for one in tables if isinstance(one, ConnectionMap) for number in one.name_classes())
    return frozenset(found - {0})


def names_in_kernel(
    maps: Mapping[str, KernelMap], tables: CompiledTables, *, now_jiffies: int
) -> Iterator[tuple[EndpointKey, IPAddress, frozenset[str]]]:
    """What endpoints of this node learned, by the classes in the kernel: (endpoint, address, names).

    The kernel has no names. A pattern of a class stands for the names that it matches: as a name it is matched by itself
    and by each wider pattern, like those names. Expired classes are left out. Cost: linear in the rows.
    """
    keys = {row.number: key for key, row in tables.endpoints.items()}
    for name, size in (("np_learned4", 4), ("np_learned6", 16)):
        for raw, value in maps[name].items():
            endpoint = keys.get(int.from_bytes(raw[:4], sys.byteorder))
            classes = _classes(value, now_jiffies // abi.NP_LEARNED_JIFFIES)
            contents = (tables.name_classes.get(number) or frozenset() for number in classes)
            patterns = frozenset(_as_name(pattern) for content in contents for one in content for pattern in one)
            if endpoint is not None and patterns:
                yield endpoint, ip_address(raw[4 : 4 + size]), patterns


def _as_name(pattern: str) -> str:
    """A name that a pattern stands for. The star inside a pattern becomes a label."""
    return pattern.replace(".*.", ".any.") if is_inner(pattern) else pattern
