# SPDX-License-Identifier: Apache-2.0
"""Compares the maps with the compiled tables, a few rows at a time, and restores rows that differ.

The comparison has two directions: rows that must be in the map and, in maps that are no arrays, rows that must not (an
array's row that nothing refers to has no effect).

Invariants: a correct row is not written; a difference is repaired before it is reported, and then every open connection
is judged again, since the wrong row may have allowed it.  Cost of a step: the rows it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from netpol_ebpf.apply.applier import ARRAYS, Applier, KernelMap
from netpol_ebpf.apply.encode import ENCODERS, Element, decode_key, elements
from netpol_ebpf.apply.surroundings import SurroundingsWriter
from netpol_ebpf.compiler.tables import CompiledTables
from netpol_ebpf.errors import MapFullError
from netpol_loader import abi
from netpol_loader.pins.drift import Drift

ROWS = 2000
"""Rows compared in one step: some 10 ms; arbitrary."""

BY_ENDPOINT = abi.maps_with_rows(abi.MapRole.ENDPOINT)
BY_NODE = abi.maps_with_rows(abi.MapRole.NODE)
"""Maps in which surplus rows are searched; a surplus bit of np_vip_filter costs look-ups, nothing else."""
BY_TABLE = abi.maps_with_rows(abi.MapRole.TABLE)


class Audit:
    """Compares the maps that ``applier`` and ``node`` write with ``tables``, in rounds.

    A step must only run between changes.
    """

    def __init__(
        self, maps: Mapping[str, KernelMap], tables: CompiledTables, applier: Applier, node: SurroundingsWriter
    ) -> None:
        self._maps = maps
        self._tables = {table.name: table for table in tables.all()}
        self._applier = applier
        self._node = node
        self._round: Iterator[Drift | None] | None = None
        self.rounds = 0
        """How many times every row has been compared."""

    @property
    def is_between_rounds(self) -> bool:
        """Whether the next step begins a new round."""
        return self._round is None

    def step(self, rows: int = ROWS) -> list[Drift]:
        """Compare the configuration and the next rows. Returns what differed and was restored."""
        found = []
        if self._applier.mend_config():
            found.append(Drift("configuration", "np_config", "changed"))
        looked = 0
        self._round = self._round or self._look_round()
        for drift in islice(self._round, rows):
            looked += 1
            if drift is not None:
                found.append(drift)
        if looked < rows:
            self.rounds += 1
            self._round = None
        if found:
            self._applier.bump_generation()
        return found

    def _look_round(self) -> Iterator[Drift | None]:
        """One round: endpoint rows, then surplus rows, then the rows of the tables."""
        for key in list(self._applier.bindings):
            # All of one endpoint at once: in a pause it might get another row.
            yield from [self._compare(element) for element in self._applier.endpoint_elements(key)]
        for (name, raw), value in list(self._node.rows.items()):
            if self._node.rows.get((name, raw)) == value:  # else it changed since the list was made
                yield self._compare((name, raw, value))
        ours = self._of_endpoints()
        for name in (*BY_ENDPOINT, *BY_NODE):
            for raw in self._keys(name):
                # Asked again, since a row may have come since.
                is_ours = (name, raw) in ours or (name, raw) in self._of_endpoints()
                yield None if is_ours else self._remove(name, raw)
        for name in BY_TABLE:
            for raw in self._keys(name):
                table, place = decode_key(name, raw)
                yield None if place in self._tables[table] else self._remove(name, raw)
        for name in ENCODERS:
            rows = self._tables[name]
            for place in list(rows):
                row = rows.get(place)
                if row is not None:  # else it went since the list was made
                    for element in elements(name, {place: row}):
                        yield self._compare(element)

    def _keys(self, name: str) -> Iterator[bytes]:
        for key, _value in self._maps[name].items():  # noqa: PERF102 - a map, no dict
            yield key

    def _of_endpoints(self) -> set[tuple[str, bytes]]:
        return self._node.rows.keys() | {
            (name, key)
            for endpoint in self._applier.bindings
            for name, key, _ in self._applier.endpoint_elements(endpoint)
        }

    def _compare(self, element: Element) -> Drift | None:
        name, key, value = element
        found = self._maps[name].get(key)
        if found == value:
            return None
        try:
            self._maps[name].put(key, value)
        except MapFullError:
            return None  # of rows that are too much; they go in this round, and the next one tells of this row
        is_missing = found is None or (name in ARRAYS and not any(found))
        return Drift("row", f"{key.hex()} of {name}", "missing" if is_missing else "changed")

    def _remove(self, name: str, key: bytes) -> Drift | None:
        """Delete a surplus row, unless it went since it was read."""
        return Drift("row", f"{key.hex()} of {name}", "foreign") if self._maps[name].delete(key) else None
