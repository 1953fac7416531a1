# SPDX-License-Identifier: Apache-2.0
"""Compares the maps with the compiled tables, some rows at a time, and restores rows that differ.

The comparison finds missing and changed rows in all maps, and surplus rows in all maps but arrays.  A surplus row of an
array has no effect, because no row refers to it.

Invariants: a correct row is not written.  A difference is repaired before it is reported.  After a repair policy
evaluates every open connection again, because the wrong row may have allowed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from netpol_ebpf.apply.applier import ARRAYS, Applier, Binding, KernelMap
from netpol_ebpf.apply.encode import ENCODERS, Element, decode_key, elements
from netpol_ebpf.apply.surroundings import SurroundingsWriter
from netpol_ebpf.compiler.tables import CompiledTables
from netpol_ebpf.errors import MapFullError
from netpol_ebpf.policy.types import EndpointKey
from netpol_loader import abi
from netpol_loader.pins.drift import Drift

ROWS = 2000
"""How many rows one step compares; arbitrary. It takes some 10 ms."""

BY_ENDPOINT = abi.maps_with_rows(abi.MapRole.ENDPOINT)
BY_NODE = abi.maps_with_rows(abi.MapRole.NODE)
"""Maps of the node in which surplus rows are searched.

np_vip_filter is not one of them: a surplus bit there only causes needless look-ups.
"""
BY_TABLE = abi.maps_with_rows(abi.MapRole.TABLE)


class Audit:
    """Compares the kernel's maps with the rows that ``tables``, ``applier`` and ``node`` require.

    Each `step` compares a part of the rows; the steps of a round compare all rows.  A step must not run while a change
    of the tables is being applied.
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
        """How many rounds are complete. Every row was compared once in each round."""

    @property
    def is_between_rounds(self) -> bool:
        """Whether the next step begins a new round."""
        return self._round is None

    def step(self, rows: int = ROWS) -> list[Drift]:
        """Compare the configuration and the next ``rows`` rows. Returns the differences, which are restored already.

        Cost: linear in ``rows``.
        """
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
        """One round, row by row: endpoint rows, rows of the node, surplus rows, rows of the tables.

        Yields for each row the difference that was restored, or None if the row was correct.
        """
        ours: set[tuple[str, bytes]] = set()
        encoded: dict[EndpointKey, Binding] = {}
        for key, binding in list(self._applier.bindings.items()):
            # The elements of one endpoint are compared in one step, because between two steps its row may change.
            written = list(self._applier.endpoint_elements(key))
            ours.update((name, raw) for name, raw, _ in written)
            encoded[key] = binding
            yield from [self._compare(element) for element in written]
        for (name, raw), value in list(self._node.rows.items()):
            if self._node.rows.get((name, raw)) == value:  # otherwise the row changed after the list was made
                yield self._compare((name, raw, value))
        ours |= self._node.rows.keys()
        for name in (*BY_ENDPOINT, *BY_NODE):
            for raw in self._keys(name):
                if (name, raw) not in ours:  # it may be a newer row, most often of an endpoint with a new binding
                    ours |= self._rows_of_endpoints(encoded)
                    encoded = dict(self._applier.bindings)
                if (name, raw) not in ours:
                    ours = self._rows_of_endpoints({})
                yield None if (name, raw) in ours else self._remove(name, raw)
        for name in BY_TABLE:
            for raw in self._keys(name):
                table, place = decode_key(name, raw)
                yield None if place in self._tables[table] else self._remove(name, raw)
        for name in ENCODERS:
            rows = self._tables[name]
            for place in list(rows):
                row = rows.get(place)
                if row is not None:  # otherwise the row was deleted after the list was made
                    for element in elements(name, {place: row}):
                        yield self._compare(element)

    def _keys(self, name: str) -> Iterator[bytes]:
        for key, _value in self._maps[name].items():  # noqa: PERF102 - a map, no dict
            yield key

    def _rows_of_endpoints(self, encoded: Mapping[EndpointKey, Binding]) -> set[tuple[str, bytes]]:
        """Map and key of the node's rows, and of the rows of endpoints with another binding than in ``encoded``."""
        return self._node.rows.keys() | {
            (name, raw)
            for key, binding in self._applier.bindings.items()
            if encoded.get(key) is not binding
            for name, raw, _ in self._applier.endpoint_elements(key)
        }

    def _compare(self, element: Element) -> Drift | None:
        name, key, value = element
        found = self._maps[name].get(key)
        if found == value:
            return None
        try:
            self._maps[name].put(key, value)
        except MapFullError:
            return None  # surplus rows fill the map: this round removes them, and the next round restores this row
        is_missing = found is None or (name in ARRAYS and not any(found))
        return Drift("row", f"{key.hex()} of {name}", "missing" if is_missing else "changed")

    def _remove(self, name: str, key: bytes) -> Drift | None:
        """Delete a surplus row. Returns None if the row no longer exists."""
        return Drift("row", f"{key.hex()} of {name}", "foreign") if self._maps[name].delete(key) else None
