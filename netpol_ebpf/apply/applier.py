# SPDX-License-Identifier: Apache-2.0
"""Writes the compiled tables to the kernel's maps: first all rows, then each change.

Invariants: a row is written before other rows refer to it.  A row is deleted only when no row refers to it any more and
a grace period of the kernel has passed.  The update of one map element changes an endpoint's policy.  When a change
that removes an endpoint is complete, no row of learned addresses has the endpoint's number any more.  A change that
does not fit is rejected before its first write.  A change that fails later is rolled back.  In both cases the previous
policy stays in force.

This module must not decide policy, nor which interface an endpoint has; the caller states the interface
(`Applier.bind`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from netpol_ebpf.apply.encode import (
    ENCODERS,
    Element,
    EndpointFlag,
    EndpointSets,
    elements,
    endpoint_element,
    endpoint_of_learned,
    host_element,
    map_and_key,
    place_element,
    source_element,
)
from netpol_ebpf.compiler.tables import Change, CompiledTables, Delta, EndpointRow
from netpol_ebpf.errors import MapFullError, PlatformError
from netpol_ebpf.policy.types import EndpointKey, EndpointKind, IPNetwork
from netpol_loader import abi
from netpol_loader.host.barrier import Marks
from netpol_loader.kernel.grace import order_stores, wait_for_readers
from netpol_loader.pins.dataplane import following

ARRAYS = frozenset(name for name, spec in abi.MAP_SPECS.items() if spec.has_elements)
"""BPF arrays. Their elements always exist, so a row is deleted by writing zeros, which deny."""
OWNERS = frozenset(abi.maps_with(abi.MapTrait.REFERRING))
"""Maps with rows that refer to ranges in other maps."""
FILL_ROWS = 8192
"""How many rows are encoded at a time when whole tables are written; arbitrary. They need some megabytes."""
SHARED, OWN_ROWS = "np_endpoint", 64
"""The map to which `netpol_ebpf.apply.surroundings` writes as well, and the number of its rows that the applier
assumes. The applier counts the actual rows of the map only if the map may be full with that number. The number is
arbitrary.
"""
REMEMBERED = frozenset(abi.maps_with(abi.MapTrait.CACHED))
"""Maps whose rows the program caches for an epoch."""
LEARNED = ("np_learned4", "np_learned6")
"""Maps of what endpoints learned. Their rows outlive programs and agents, but not the endpoint with the number."""


class KernelMap(Protocol):
    """The methods of `netpol_loader.kernel.maps.Map` that the applier calls."""

    @property
    def name(self) -> str: ...  # noqa: D102 - the same in all maps
    @property
    def max_entries(self) -> int: ...  # noqa: D102
    @property
    def value_size(self) -> int: ...  # noqa: D102
    @property
    def cell_bytes(self) -> int: ...  # noqa: D102 - in a per-CPU map, of the values of all CPUs

    def get(self, key: bytes) -> bytes | None: ...  # noqa: D102
    def put(self, key: bytes, value: bytes) -> None: ...  # noqa: D102
    def delete(self, key: bytes) -> bool: ...  # noqa: D102
    def items(self) -> Iterator[tuple[bytes, bytes]]: ...  # noqa: D102
    def put_many(self, pairs: Sequence[tuple[bytes, bytes]]) -> None: ...  # noqa: D102
    def delete_many(self, keys: Sequence[bytes]) -> None: ...  # noqa: D102
    def end_grace_period(self) -> None: ...  # noqa: D102 - a grace period has passed


@dataclass(frozen=True, slots=True)
class Binding:
    """The interface of an endpoint.

    ``ifindex``: unused for a host endpoint, because `netpol_ebpf.apply.surroundings` writes the rows of a host's
    interfaces.
    ``allowed_sources``: prefixes from which the workload may send although the addresses are not its own.
    ``link``: the ifindex of the bridge of which the interface is a port; 0 if it is not a bridge port.
    ``flags``: further properties of the interface.
    """

    ifindex: int
    kind: EndpointKind = EndpointKind.WORKLOAD
    allowed_sources: tuple[IPNetwork, ...] = ()
    link: int = 0
    flags: EndpointFlag = EndpointFlag.NONE


@dataclass(slots=True)
class _Step:
    """The map writes of one batch: upserts in the order in which they were added, then deletions.

    ``renews``: True if an endpoint's row is deleted or gets another number.  Then a new generation must begin, because
    the program caches the number for a generation.
    ``frees``: True if an endpoint's number is no longer in use.
    """

    puts: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    deletes: dict[str, list[bytes]] = field(default_factory=dict)
    renews: bool = False
    frees: bool = False

    def put(self, element: Element) -> None:
        name, key, value = element
        self.puts.setdefault(name, {})[key] = value

    def delete(self, name: str, key: bytes) -> None:
        self.deletes.setdefault(name, []).append(key)

    def touches(self, names: frozenset[str]) -> bool:
        return not (names.isdisjoint(self.puts) and names.isdisjoint(self.deletes))

    def __bool__(self) -> bool:
        return bool(self.puts or self.deletes)


class _Undo:
    """The values that map elements had before each write. They are restored in reverse order."""

    def __init__(self, maps: Mapping[str, KernelMap]) -> None:
        self._maps = maps
        self._before: list[tuple[str, bytes, bytes | None]] = []

    def note(self, name: str, keys: Iterable[bytes]) -> int:
        """Record the present values of keys that are about to change.

        Returns how many of the keys are new to the map.
        """
        one = self._maps[name]
        values = [(name, key, one.get(key)) for key in keys]
        self._before += values
        return sum(value is None for _, _, value in values)

    def roll_back(self, left: Callable[[], None]) -> bool:
        """Restore all recorded values, endpoint rows first.

        Returns whether there was anything to restore.
        ``left``: a function that waits until no packet uses the endpoint rows that are replaced here.
        """
        was_written = bool(self._before)
        owners = [one for one in self._before if one[0] in OWNERS]
        self._put_back(owners)
        if owners:
            left()
        self._put_back([one for one in self._before if one[0] not in OWNERS])
        self._before.clear()
        return was_written

    def _put_back(self, rows: Sequence[tuple[str, bytes, bytes | None]]) -> None:
        for name, key, value in reversed(rows):
            if value is None:
                self._maps[name].delete(key)
            else:
                self._maps[name].put(key, value)


class Applier:
    """The only writer of a dataplane's policy maps.

    Not thread-safe.
    ``maps``: by name.  They must be empty, or have only rows that `fill` writes.
    ``wait``: a function that waits for a grace period of the kernel.
    """

    def __init__(self, maps: Mapping[str, KernelMap], wait: Callable[[], None] = wait_for_readers) -> None:
        self._maps = maps
        self._wait = wait
        self._rows: dict[EndpointKey, EndpointRow] = {}
        self._bindings: dict[EndpointKey, Binding] = {}
        self._counts: Counter[str] = Counter()
        self._written_config: bytes | None = None

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def bindings(self) -> Mapping[EndpointKey, Binding]:
        """The binding of each endpoint with a known interface."""
        return self._bindings

    @property
    def counts(self) -> Mapping[str, int]:
        """How many elements this applier has in each policy map that is not an array."""
        return self._counts

    @property
    def generation(self) -> int:
        """The generation in force."""
        return self._config().generation

    @property
    def config_flags(self) -> int:
        """The flags in force (``abi.NP_CONFIG_*``)."""
        return self._config().flags

    def is_enforced(self, key: EndpointKey) -> bool:
        """Whether the endpoint's row is in the kernel: the tables have a row for it, and its interface is known."""
        return key in self._rows and key in self._bindings

    def endpoint_elements(self, key: EndpointKey) -> Iterator[Element]:
        """The map elements of an endpoint, its row in np_endpoint last. Empty if `is_enforced` is false."""
        return self._elements(key)

    def mend_config(self) -> bool:
        """Restore the configuration if it differs from the configuration that this applier wrote last.

        Returns whether it differed.
        """
        written = self._written_config
        if written is None or self._maps["np_config"].get(_FIRST) == written:
            return False
        self._put_config(abi.np_config.from_buffer_copy(written))
        return True

    # --- whole tables ---------------------------------------------------------------------------------------------

    def fill(self, tables: CompiledTables) -> None:
        """Write all rows into empty maps, rows of endpoints last.

        No attached program may use these maps yet.  Raises MapFullError before the first write if the rows do not fit.
        """
        require_room(tables, {name: one.max_entries for name, one in self._maps.items()}, self._bindings)
        self._rows = dict(tables.endpoints.items())
        owners = _Step()
        for key in self._bindings:
            self._put_endpoint(owners, key)
        for table in tables.all():
            encoder = ENCODERS.get(table.name)
            if encoder is not None:
                written = (encoder(key, row) for key, row in table.items())
                # Rows are written in portions, because all elements at once would be the agent's peak memory use.
                while chunk := list(islice(written, FILL_ROWS)):
                    step = _Step()
                    for element in chunk:
                        step.put(element)
                    self._fill(step)
        self._fill(owners)
        self._forget_learned()  # of endpoints that went while no agent ran

    def _fill(self, step: _Step) -> None:
        for name, rows in step.puts.items():
            self._maps[name].put_many(list(rows.items()))
            if name not in ARRAYS:
                self._counts[name] += len(rows)

    # --- one change -----------------------------------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Apply a change, batch by batch. On return the change is complete, grace periods included.

        If anything was revoked, a new generation begins after the flip.  A grace period precedes the shrink batch.
        Another grace period follows the prepare batch if that batch writes endpoint rows.  Such a row refers to ranges
        of elements in other maps, and a packet with the old row must not see what the grow batch writes for the new
        one.

        Raises MapFullError if the change does not fit.  Then no verdict has changed, and the compiled tables already
        have the change that the kernel's maps lack.
        """
        rows, counts = dict(self._rows), self._counts.copy()
        prepare, grow, flip, shrink = (self._step(batch) for _, batch in change.batches())
        undo = _Undo(self._maps)
        try:
            self._check_room(prepare, grow, flip)
            self._write(prepare, undo)
            if prepare.touches(OWNERS):
                self._leave()  # a packet with an old endpoint row must not see what `grow` writes for the new one
            self._write(grow, undo)
            self._write(flip, undo)
        except PlatformError:
            if undo.roll_back(self._leave):
                self.bump_epoch()  # the program may have cached an address row that was rolled back
            self._rows, self._counts = rows, counts
            raise
        if change.revokes or prepare.renews or flip.renews:
            self.bump_generation()
        elif flip.touches(REMEMBERED):
            self.bump_epoch()
        frees = any(step.frees for step in (prepare, grow, flip, shrink))
        if shrink or (frees and self.config_flags & abi.NP_CONFIG_NAMES):  # else no program learns anything
            self._grace()
            self._write(shrink, None)
        if frees:
            self._forget_learned()

    def _step(self, batch: Mapping[str, Any]) -> _Step:
        """Translate one batch of a change into map writes. ``batch``: maps table names to Deltas."""
        step = _Step()
        for name in _TABLES:
            delta = batch.get(name)
            if delta is not None and name != "endpoints":
                for element in elements(name, delta.upserts):
                    step.put(element)
        if "endpoints" in batch:
            self._change_endpoints(step, batch["endpoints"])
        for name in reversed(_TABLES):
            delta = batch.get(name)
            if delta is not None and name in ENCODERS:
                for key in delta.deletes:
                    step.delete(*map_and_key(name, key))
        return step

    def _change_endpoints(self, step: _Step, delta: Delta[EndpointKey, EndpointRow]) -> None:
        """Add the writes for changed endpoint rows to ``step``."""
        for key, row in delta.upserts.items():
            before, old = self._rows.get(key), self._keys(key)
            step.renews |= before is not None and before.number != row.number
            step.frees |= before is not None and before.number != row.number
            self._rows[key] = row
            self._put_endpoint(step, key)
            self._delete_all(step, old - self._keys(key))
        for key in delta.deletes:
            old = self._keys(key)
            step.renews |= bool(old)
            self._delete_all(step, old)
            step.frees |= self._rows.pop(key, None) is not None

    def _forget_learned(self) -> None:
        """Delete what endpoints learned that no longer exist. Must be called before their numbers are given away.

        Cost: linear in the rows of learned addresses.
        """
        present = {row.number for row in self._rows.values()}
        for name in LEARNED:
            one = self._maps[name]
            one.delete_many([key for key, _ in one.items() if endpoint_of_learned(key) not in present])

    def _put_endpoint(self, step: _Step, key: EndpointKey) -> None:
        for element in self._elements(key):
            step.put(element)

    def _keys(self, key: EndpointKey) -> set[tuple[str, bytes]]:
        return {(name, map_key) for name, map_key, _ in self._elements(key)}

    @staticmethod
    def _delete_all(step: _Step, keys: Iterable[tuple[str, bytes]]) -> None:
        for name, key in sorted(keys):
            step.delete(name, key)

    def _elements(self, key: EndpointKey) -> Iterator[Element]:
        """All map elements by which the program judges packets of the endpoint's interface, the endpoint row last.

        Empty if the tables have no row for the endpoint, or if its interface is unknown.
        """
        row, binding = self._rows.get(key), self._bindings.get(key)
        return iter(()) if row is None or binding is None else _endpoint_elements(row, binding)

    # --- interfaces -----------------------------------------------------------------------------------------------

    def bind(self, key: EndpointKey, binding: Binding) -> None:
        """Set the interface of an endpoint. If the tables have a row for the endpoint, the row is written.

        If the endpoint had another interface, its row there is deleted afterwards.  Raises MapFullError if the row does
        not fit.
        """
        before = self._bindings.get(key)
        if before == binding:
            return
        old = self._keys(key)
        self._bindings[key] = binding
        step = _Step()
        self._put_endpoint(step, key)
        self._delete_all(step, old - self._keys(key))
        undo, counts = _Undo(self._maps), self._counts.copy()
        try:
            self._check_room(step)
            self._write(step, undo)
        except PlatformError:
            undo.roll_back(self._leave)
            self._counts = counts
            if before is None:
                del self._bindings[key]
            else:
                self._bindings[key] = before
            raise
        if before is not None:
            self.bump_generation()
        else:
            self.bump_epoch()

    def unbind(self, key: EndpointKey) -> None:
        """Delete an endpoint's rows. From then on the program denies all packets on the endpoint's interface."""
        old = self._keys(key)
        self._bindings.pop(key, None)
        if old:
            step = _Step()
            self._delete_all(step, old)
            self._write(step, None)
            self.bump_generation()

    # --- the kernel -----------------------------------------------------------------------------------------------

    def _config(self) -> abi.np_config:
        value = self._maps["np_config"].get(_FIRST)
        if value is None:  # an array element always exists
            raise AssertionError("np_config has no element 0")
        return abi.np_config.from_buffer_copy(value)

    def bump_generation(self) -> int:
        """Begin a new generation and epoch: policy evaluates every open connection again at its next packet.

        Returns the new generation.  The epoch changes first, in an update of its own.  Otherwise a packet could have
        the new generation and an endpoint row cached under the old epoch, and the program would record the old verdict
        under the new generation.
        """
        self.bump_epoch()
        config = self._config()
        config.generation = following(config.generation)
        self._put_config(config)
        return config.generation

    def bump_epoch(self) -> None:
        """Begin a new epoch. It invalidates all endpoint and address rows that the program has cached."""
        config = self._config()
        config.epoch = following(config.epoch)
        self._put_config(config)

    def _leave(self) -> None:
        """Wait until no packet uses endpoint rows as they were before their last change."""
        self.bump_epoch()
        self._grace()

    def _grace(self) -> None:
        self._wait()
        for name in abi.OVERFLOW_MAPS:
            self._maps[name].end_grace_period()

    def reset_counters(self, rules: Iterable[int]) -> None:
        """Set the packet counters of ``rules`` to zero. Must be called before these rule numbers are reused."""
        numbers = list(rules)
        for counted in (self._maps["np_rule_count"], self._maps["np_staged_count"]):
            zeros = bytes(counted.cell_bytes)
            keys = [number.to_bytes(4, sys.byteorder) for number in numbers if number < counted.max_entries]
            counted.put_many([(key, zeros) for key in keys])

    def set_flags(self, *, on: int = 0, off: int = 0) -> None:
        """Set the flags ``on`` and clear the flags ``off`` of the configuration (``abi.NP_CONFIG_*``)."""
        config = self._config()
        config.flags = (config.flags | on) & ~off
        self._put_config(config)

    def set_sender_tag_bits(self, mark_shift: int) -> None:
        """Choose the 16 bits of the packet mark that have the sender tag of a packet to a service.

        ``mark_shift``: the lowest of these bits; 0 if the mark must not have the sender tag.
        """
        config = self._config()
        config.mark_shift = mark_shift
        self._put_config(config)

    def set_learning(self, *, floor_s: int, extra_s: int, unread_dns: int, ports: Sequence[int], is_used: bool) -> None:
        """Set how the program learns addresses of domain names.

        ``floor_s``, ``extra_s``: the shortest life of a learned address, and what is added to each life, in seconds.
        ``unread_dns``: ``abi.NP_UNREAD_DNS_*``.  ``ports``: at most four ports of DNS servers besides 53.
        ``is_used``: whether some endpoint learns.  When that begins, a new generation begins as well, because packets of
        DNS must leave the flow cache.
        """
        config = self._config()
        before = bytes(config)
        was_used = bool(config.flags & abi.NP_CONFIG_NAMES)
        config.name_floor_s, config.name_extra_s, config.unread_dns = floor_s, extra_s, unread_dns
        config.dns_ports = sum(port << 16 * place for place, port in enumerate(ports))
        config.flags = config.flags | abi.NP_CONFIG_NAMES if is_used else config.flags & ~abi.NP_CONFIG_NAMES
        if bytes(config) != before:
            self._put_config(config)
        if is_used and not was_used:
            self.bump_generation()

    @property
    def marks(self) -> Marks:
        """The bits of the packet mark that the programs use."""
        config = self._config()
        return Marks(config.seen_mark, config.node_mark, config.due_mark)

    def set_marks(self, marks: Marks) -> None:
        """Set the bits of the packet mark that the programs use.

        If the bit for deferred verdicts changes, a new generation begins, so policy evaluates open connections again.
        """
        config = self._config()
        is_another_question = config.due_mark != marks.due
        config.seen_mark, config.node_mark, config.due_mark = marks.seen, marks.node, marks.due
        self._put_config(config)
        if is_another_question:
            self.bump_generation()

    def set_wildcard(self, key: EndpointKey | None) -> None:
        """Set the wildcard host endpoint, which must already have a binding and a row. ``key`` None: there is none."""
        number = 0 if key is None else self._rows[key].number
        config = self._config()
        if config.wildcard != number:
            config.wildcard = number
            self._put_config(config)
            self.bump_generation()

    def _put_config(self, config: abi.np_config) -> None:
        order_stores()  # a processor that sees the new configuration also sees the rows written before it
        self._written_config = bytes(config)
        self._maps["np_config"].put(_FIRST, self._written_config)

    def _check_room(self, *steps: _Step) -> None:
        """Raise MapFullError, naming the map, its size and the needed size, if the steps together do not fit."""
        keys: dict[str, dict[bytes, None]] = {}
        for step in steps:
            for name, rows in step.puts.items():
                keys.setdefault(name, {}).update(dict.fromkeys(rows))
        for name, wanted in keys.items():
            one = self._maps[name]
            if name in ARRAYS:
                last = max(int.from_bytes(key, sys.byteorder) for key in wanted)
                if last >= one.max_entries:
                    message = f"map {name} has {one.max_entries} rows; the change needs {last + 1}"
                    raise MapFullError(message, map_name=name)
            elif self._counts[name] + len(wanted) + (OWN_ROWS if name == SHARED else 0) > one.max_entries:
                present = {key for key, _ in one.items()}  # an exact count takes time
                need = len(present | wanted.keys())
                if need > one.max_entries:
                    raise too_small(name, one.max_entries, need)

    def _write(self, step: _Step, undo: _Undo | None) -> None:
        for name, rows in step.puts.items():
            new = undo.note(name, rows) if undo is not None else 0
            self._maps[name].put_many(list(rows.items()))
            order_stores()  # the order of the tables is such that a row refers only to rows written before it
            if name not in ARRAYS:
                self._counts[name] += new
        for name, keys in step.deletes.items():
            if undo is not None:
                undo.note(name, keys)
            if name in ARRAYS:
                zeros = bytes(self._maps[name].value_size)
                self._maps[name].put_many([(key, zeros) for key in keys])
            else:
                self._maps[name].delete_many(keys)
                self._counts[name] -= len(keys)


def _endpoint_elements(row: EndpointRow, binding: Binding) -> Iterator[Element]:
    if binding.kind is EndpointKind.HOST:
        yield host_element(row.number, row.sets)
        return
    for net in binding.allowed_sources:
        yield source_element(row.number, net)
    flags = binding.flags | (EndpointFlag.SOURCES if binding.allowed_sources else EndpointFlag.NONE)
    yield place_element(row.number, binding.ifindex)
    yield endpoint_element(binding.ifindex, row.number, EndpointSets.of(row), flags, binding.link)


def require_room(
    tables: CompiledTables,
    sizes: Mapping[str, int],
    bindings: Mapping[EndpointKey, Binding],
    others: Iterable[Element] = (),
) -> None:
    """Raise MapFullError, naming the map, if the rows do not fit into empty maps of these sizes.

    ``sizes``: max_entries by map name.
    ``bindings``: the interfaces of the endpoints.
    ``others``: rows of another writer in the same maps.

    Only the maps with rows of addresses, prefixes, endpoints, peer classes, atoms, columns, verdicts, domain lists, names
    and rules are checked.  Cost: linear in addresses, prefixes, bindings and others.
    """
    keys = {(name, key) for name, key, _ in others}
    for key, binding in bindings.items():
        row = tables.endpoints.get(key)
        if row is not None:
            keys.update((name, map_key) for name, map_key, _ in _endpoint_elements(row, binding))
    need = Counter(name for name, _ in keys)
    need.update(f"np_addr{address.version}" for address in tables.addresses)
    need.update(f"np_cidr{net.version}" for net in tables.cidrs)
    need.update(np_peer_class=len(tables.peer_classes), np_rule=len(tables.rules))
    need.update(np_domain=len(tables.domains), np_name=len(tables.names))
    need["np_l4_atom"] = max(tables.l4_atoms, default=-1) + 1
    need["np_l4_col"] = max(tables.l4_columns, default=-1) + 1
    need["np_verdict"] = max(tables.verdicts, default=-1) + 1
    for name, rows in need.items():
        if rows > sizes[name]:
            raise too_small(name, sizes[name], rows)


def too_small(name: str, size: int, need: int) -> MapFullError:
    """The error for a map ``name`` that has room for ``size`` entries and would need room for ``need``."""
    return MapFullError(f"map {name} has room for {size} rows; the change needs {need}", map_name=name)


_FIRST = bytes(4)
_TABLES = tuple(table.name for table in CompiledTables().all())
