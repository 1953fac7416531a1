# SPDX-License-Identifier: Apache-2.0
"""Maps in memory that behave as the kernel's: fixed sizes, arrays that are always full, and a log of the writes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from netpol_ebpf.apply.applier import ARRAYS
from netpol_ebpf.errors import MapFullError
from netpol_loader import abi

CPUS = 3
PER_CPU = frozenset(name for name, spec in abi.MAP_SPECS.items() if spec.kind.startswith("percpu"))
CONNECTION_BYTES = ctypes.sizeof(abi.np_conn)


@dataclass
class MemoryMap:
    """A map in memory.

    ``hard_limit``: the size at which the kernel would reject an element, if less than ``max_entries``.
    """

    name: str
    max_entries: int
    value_size: int
    log: list[tuple[str, str, bytes]]
    rows: dict[bytes, bytes] = field(default_factory=dict)
    hard_limit: int | None = None

    @property
    def cell_bytes(self) -> int:
        return self.value_size * (CPUS if self.name in PER_CPU else 1)

    def get(self, key: bytes) -> bytes | None:
        if self.name in ARRAYS:
            return self.rows.get(key, bytes(self.cell_bytes))
        return self.rows.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        assert len(value) == self.cell_bytes
        limit = self.max_entries if self.hard_limit is None else self.hard_limit
        if key not in self.rows and len(self.rows) >= limit:
            raise MapFullError(f"map {self.name} is full", map_name=self.name)
        self.log.append(("put", self.name, key))
        self.rows[key] = value

    def delete(self, key: bytes) -> bool:
        assert self.name not in ARRAYS
        self.log.append(("delete", self.name, key))
        return self.rows.pop(key, None) is not None

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(list(self.rows.items()))  # a copy, because the map may change meanwhile, as in the kernel

    def put_many(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        for key, value in pairs:
            self.put(key, value)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            assert self.delete(key), f"{self.name} has no {key!r} to delete"

    def end_grace_period(self) -> None:
        pass


def memory_maps(log: list[tuple[str, str, bytes]]) -> dict[str, MemoryMap]:
    """All maps of the program, empty. They record their writes in one log."""
    specs = {name: abi.MAP_SPECS[abi.OVERFLOW_MAPS.get(name, name)] for name in abi.MAP_SPECS}
    specs |= {unreplied: specs[name] for name, unreplied in abi.UNREPLIED_VIEWS.items()}
    sizes = {
        name: CONNECTION_BYTES if name in {*abi.UNREPLIED_VIEWS, *abi.UNREPLIED_VIEWS.values()} else spec.value_size
        for name, spec in specs.items()
    }
    return {name: MemoryMap(name, spec.max_entries, sizes[name], log) for name, spec in specs.items()}
