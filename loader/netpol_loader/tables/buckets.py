# SPDX-License-Identifier: Apache-2.0
"""The bucketed tables of policy, as maps from key to row. A table is an array of buckets and an overflow map.

The program reads the tables with `bpf/np_bucket.h`. Rows whose keys have the same hash are side by side in one bucket,
which has one or two cache lines. Rows that do not fit into their bucket are in the overflow map, and the bucket has a
flag for this case. The array is mapped into memory, so that a write is a store.

Invariants: a row is complete before a bit or tag makes it valid (`order_stores`). A freed slot is not reused before
`end_grace_period`, because a packet may still read the slot. A key is in its bucket or in the overflow map, never in
both. The module must not know the meaning of rows.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.grace import order_stores
from netpol_loader.kernel.maps import Map
from netpol_loader.tables.connections import viewed

_MASK64 = (1 << 64) - 1
_WORD = 4
_WORDS2, _WORDS4 = struct.Struct("=2I"), struct.Struct("=4I")
_U16, _U32, _U64 = struct.Struct("@H"), struct.Struct("@I"), struct.Struct("@Q")

SIZED = tuple(
    name
    for name, spec in abi.MAP_SPECS.items()
    if abi.MapTrait.FIXED not in spec.traits and not spec.overflow_of and not spec.tags_of
)
"""The maps whose size an option may set. The size of a bucketed table is its number of rows."""


def _hash4(key: bytes) -> int:
    return (int.from_bytes(key, sys.byteorder) * abi.NP_HASH_MULTIPLIER & _MASK64) >> 32


def _hash6(key: bytes) -> int:
    one, two, three, four = _WORDS4.unpack(key)
    mixed: int = (four << 32 | three) ^ ((two << 32 | one) * abi.NP_HASH_MULTIPLIER & _MASK64)
    return (mixed * abi.NP_HASH_MULTIPLIER & _MASK64) >> 32


@lru_cache(maxsize=1 << 16)  # after each change of addresses, the bits of all addresses are computed again
def vip_filter_bit(address: bytes) -> tuple[int, int]:
    """The place of an address in np_vip_filter, as (row, bit). ``address``: packed."""
    hashed = _hash4(address) if len(address) == 4 else _hash6(address)  # noqa: PLR2004 - an IPv4 address
    row, bit = divmod(hashed, 8 * ctypes.sizeof(abi.np_vip_filter))
    return row & (abi.MAP_SPECS["np_vip_filter"].max_entries - 1), bit


def buckets_for(name: str, rows: int) -> int:
    """The number of buckets for ``rows`` rows, a power of two.

    There is at least one bucket for each four addresses, sixteen peer classes or four connections.
    """
    each = 16 if name == "np_peer_class" else 4
    return 1 << (max(-(-rows // each), 1) - 1).bit_length()


def bucketed(maps: Mapping[str, Map]) -> dict[str, Map]:
    """The same maps, with each bucketed table as a `BucketMap`.

    Raises OSError if an array cannot be mapped into memory.
    """
    result = dict(maps)
    for name, more in abi.OVERFLOW_MAPS.items():
        if name not in maps:
            continue
        kind = PeerClassMap if name == "np_peer_class" else AddressMap
        result[name] = kind(maps[name], maps[more])
    return result


def open_map(pin_dir: Path, name: str) -> Map:
    """Open a pinned map, or a view of a connection table, by its name. Also opens the maps that the table consists of.

    Raises OSError.
    """
    table = next((table for table, unreplied in abi.UNREPLIED_VIEWS.items() if name in (table, unreplied)), name)
    names = [
        table,
        *([abi.OVERFLOW_MAPS[name]] if name in abi.OVERFLOW_MAPS else []),
        *([abi.TAG_MAPS[table], "np_secret"] if table in abi.TAG_MAPS else []),
    ]
    return viewed(bucketed({one: Map(syscall.obj_get(pin_dir / one)) for one in names}))[name]


class BucketMap(Map):
    """A bucketed table. It owns the array's descriptor and memory mapping, but not the overflow map.

    ``max_entries``: the number of rows that always fit, whatever their hashes. More rows may fit.
    """

    def __init__(self, array: Map, more: Map) -> None:
        """Take over ``array``, which has the buckets. ``more``: the overflow map, which the caller continues to own."""
        self.fd, self.name, self.type = array.fd, array.name, "buckets"
        self.has_btf, self.is_per_cpu = array.has_btf, False
        self.key_size, self.value_size, self.max_entries = more.key_size, more.value_size, more.max_entries
        self._room = more.value_size
        self._more = more
        self._mask = array.max_entries - 1
        self._bytes = array.value_size
        self._memory = mmap.mmap(array.fd, array.max_entries * array.value_size)
        self._words = memoryview(self._memory).cast("I")
        self._resting: set[int] = set()  # offsets of slots that became free since the last `end_grace_period`
        self._untold: dict[int, int] = {}  # words that `_tell` must store, by index

    @abstractmethod
    def get(self, key: bytes) -> bytes | None:
        """The row that a packet would find. None if there is none."""

    @abstractmethod
    def delete(self, key: bytes) -> bool:
        """Remove the row of ``key``. Returns False if there is none."""

    @abstractmethod
    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys with their rows. Concurrent changes may be missed or included."""

    def put(self, key: bytes, value: bytes) -> None:
        """Insert or replace a row. Raises MapFullError."""
        self.put_many([(key, value)])

    def put_many(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Insert or replace rows. Raises MapFullError; the rows before the failed one are then written.

        All rows are written first, then the bits and tags that make them valid. Between the two, a weakly ordered
        machine needs one grace period.
        """
        try:
            for key, value in pairs:
                self._write(key, value)
        finally:
            if self._untold:
                order_stores()
                self._tell()
                self._untold.clear()

    @abstractmethod
    def _write(self, key: bytes, value: bytes) -> None:
        """Replace a row, or write a new row to a free slot.

        Note in ``_untold`` the word that will make a new row valid.
        """

    @abstractmethod
    def _tell(self) -> None:
        """Make the written rows valid: store all words in ``_untold``."""

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all rows with these keys. A key without a row is not an error."""
        for key in keys:
            self.delete(key)

    def clear(self) -> None:
        """Remove all rows."""
        self.delete_many([key for key, _ in self.items()])

    def end_grace_period(self) -> None:
        """Allow the slots of removed rows to be reused.

        The caller must have waited for a grace period since the removal, so that no packet still reads these slots.
        """
        self._resting.clear()

    def close(self) -> None:
        """Close the descriptor and the mapping.

        The kernel keeps the map as long as it is pinned or a program uses it.
        """
        if self.fd >= 0:
            self._words.release()
            self._memory.close()
        super().close()


_ROWS = abi.NP_BUCKET_ROWS
_ALL_ROWS = (1 << _ROWS) - 1
_LOWEST = tuple(next((i for i in range(_ROWS) if bits >> i & 1), _ROWS) for bits in range(_ALL_ROWS + 1))
"""For each number of _ROWS bits, the index of its lowest set bit; _ROWS if no bit is set."""


class AddressMap(BucketMap):
    """Maps addresses to struct np_addr."""

    def __init__(self, array: Map, more: Map) -> None:
        """Take over the array, as `BucketMap` does."""
        super().__init__(array, more)
        layout: Any = abi.np_addr4_bucket if self.key_size == 4 else abi.np_addr6_bucket  # noqa: PLR2004 - an IPv4 address
        self._hash = _hash4 if self.key_size == 4 else _hash6  # noqa: PLR2004
        self._key_at, self._row_at = layout.key.offset, layout.row.offset
        self._others = Counter(
            self._bucket(key) for key, _ in more.items()
        )  # offset of a bucket -> its rows in the overflow map

    def _bucket(self, key: bytes) -> int:
        """The offset of a key's bucket, in bytes."""
        if len(key) != self.key_size:
            raise ValueError(f"{self.name}: a key has {self.key_size} bytes, not {len(key)}")
        return (self._hash(key) & self._mask) * self._bytes

    def _seek(self, key: bytes, at: int, used: int) -> int:
        """The row in the bucket at offset ``at`` that has the key; -1: there is none.

        ``used``: the bucket's word with a bit for each valid row.
        """
        size, memory = self.key_size, self._memory
        first, left = at + self._key_at, used & _ALL_ROWS
        while left:
            i = _LOWEST[left]
            if memory[first + i * size : first + (i + 1) * size] == key:
                return i
            left &= left - 1
        return -1

    def get(self, key: bytes) -> bytes | None:
        """See `BucketMap`."""
        at = self._bucket(key)
        used = self._words[at // _WORD]
        i = self._seek(key, at, used)
        if i >= 0:
            start = at + self._row_at + i * self.value_size
            return self._memory[start : start + self.value_size]
        return self._more.get(key) if used & abi.NP_BUCKET_MORE else None

    def _write(self, key: bytes, value: bytes) -> None:
        if len(value) != self.value_size:
            raise ValueError(f"{self.name}: a value has {self.value_size} bytes, not {len(value)}")
        at = self._bucket(key)
        flags = at // _WORD
        used = self._untold[flags] if flags in self._untold else self._words[flags]
        i = self._seek(key, at, used)
        if i >= 0:
            self._store_row(at, i, value)
            return
        is_elsewhere = at in self._others and self._more.get(key) is not None
        if not is_elsewhere:
            for i in range(_ROWS):
                if not used >> i & 1 and at + i not in self._resting:
                    for offset in range(0, self.key_size, _WORD):
                        self._words[(at + self._key_at + i * self.key_size + offset) // _WORD] = _U32.unpack_from(
                            key, offset
                        )[0]
                    self._store_row(at, i, value)
                    self._untold[flags] = used | 1 << i
                    return
        self._more.put(key, value)
        self._others[at] += not is_elsewhere
        self._untold[flags] = used | abi.NP_BUCKET_MORE

    def _tell(self) -> None:
        for index, used in self._untold.items():
            self._words[index] = used

    def _store_row(self, at: int, i: int, value: bytes) -> None:
        """Store a row by a single store of the CPU, so that no packet sees half a row."""
        _U64.pack_into(self._memory, at + self._row_at + i * self.value_size, _U64.unpack(value)[0])

    def delete(self, key: bytes) -> bool:
        """See `BucketMap`."""
        at = self._bucket(key)
        used = self._words[at // _WORD]
        i = self._seek(key, at, used)
        if i >= 0:
            self._words[at // _WORD] = used & ~(1 << i)
            self._resting.add(at + i)
            return True
        if at not in self._others or not self._more.delete(key):
            return False
        self._others[at] -= 1
        if not self._others[at]:
            del self._others[at]
            self._words[at // _WORD] = used & ~abi.NP_BUCKET_MORE
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """See `BucketMap`."""
        memory = self._memory
        for bucket, used in enumerate(self._words[:: self._bytes // _WORD].tolist()):
            at, left = bucket * self._bytes, used & _ALL_ROWS
            while left:
                i = _LOWEST[left]
                key, row = at + self._key_at + i * self.key_size, at + self._row_at + i * self.value_size
                yield memory[key : key + self.key_size], memory[row : row + self.value_size]
                left &= left - 1
        yield from self._more.items()


_CLASSES = abi.NP_LINE_CLASSES
_LINE_BYTES = ctypes.sizeof(abi.np_class_line)
_CLASSES_AT: int = abi.np_class_line.peer_class.offset  # type: ignore[attr-defined]
_SET_WORD: int = abi.np_class_line.set.offset // _WORD  # type: ignore[attr-defined]
_BLOCK_WORD: int = abi.np_class_line.block.offset // _WORD  # type: ignore[attr-defined]
_FLAGS_WORD: int = abi.np_class_line.flags.offset // _WORD  # type: ignore[attr-defined]
_NO_CLASSES = _U16.pack(abi.NP_CLASS_NONE) * _CLASSES


class PeerClassMap(BucketMap):
    """Maps (policy set, identity) to struct np_peer_class. A class must be below NP_CLASS_NONE; a set is never 0."""

    def __init__(self, array: Map, more: Map) -> None:
        """Take over the array, as `BucketMap` does."""
        super().__init__(array, more)
        self._others: Counter[tuple[int, int]] = Counter()  # set and block -> their rows in the overflow map
        self._buckets: Counter[int] = Counter()  # offset of a bucket -> its rows in the overflow map
        for key, _ in more.items():  # noqa: PERF102 - a map, no dict
            self._count(*self._place(key)[:2], 1)
        self._untold.clear()  # the bits of these rows are set already

    def _place(self, key: bytes) -> tuple[tuple[int, int], int, int]:
        """Where a key's class is, as ((set, block), offset of the bucket in bytes, index in the line)."""
        if len(key) != self.key_size:
            raise ValueError(f"{self.name}: a key has {self.key_size} bytes, not {len(key)}")
        policy_set, identity = _WORDS2.unpack(key)
        block, index = divmod(identity, _CLASSES)
        hashed = ((block << 32 | policy_set) * abi.NP_HASH_MULTIPLIER & _MASK64) >> 32
        return (policy_set, block), (hashed & self._mask) * self._bytes, index

    def _line(self, tag: tuple[int, int], at: int) -> int:
        """The offset of the line of a set and block in the bucket at offset ``at``; -1: there is none."""
        words = self._words
        for line in range(at, at + self._bytes, _LINE_BYTES):
            index = line // _WORD
            owner = self._untold.get(index + _SET_WORD, words[index + _SET_WORD])
            if (owner, words[index + _BLOCK_WORD]) == tag:
                return line
        return -1

    def _tell(self) -> None:
        for index, policy_set in self._untold.items():
            self._words[index] = policy_set

    def _count(self, tag: tuple[int, int], at: int, step: int) -> None:
        """Update the number of rows that the bucket has in the overflow map, and the bucket's flag for them."""
        self._others[tag] += step
        self._buckets[at] += step
        if not self._others[tag]:
            del self._others[tag]
        flags = at // _WORD + _FLAGS_WORD
        if not self._buckets[at]:
            del self._buckets[at]
            self._untold.pop(flags, None)
            self._words[flags] = 0
        elif step > 0:
            self._untold[flags] = abi.NP_BUCKET_MORE

    def get(self, key: bytes) -> bytes | None:
        """See `BucketMap`."""
        tag, at, index = self._place(key)
        line = self._line(tag, at)
        if line >= 0:
            found = _U16.unpack_from(self._memory, line + _CLASSES_AT + 2 * index)[0]
            return None if found == abi.NP_CLASS_NONE else _U32.pack(found)
        return self._more.get(key) if self._words[at // _WORD + _FLAGS_WORD] & abi.NP_BUCKET_MORE else None

    def _write(self, key: bytes, value: bytes) -> None:
        (number,) = _U32.unpack(value)
        tag, at, index = self._place(key)
        if number >= abi.NP_CLASS_NONE or not tag[0]:
            raise ValueError(f"{self.name}: no such class or set: {number} of {tag[0]}")
        line = self._line(tag, at)
        if line < 0 and tag not in self._others:
            line = self._claim(tag, at)
        if line >= 0:
            _U16.pack_into(self._memory, line + _CLASSES_AT + 2 * index, number)
            return
        is_new = self._more.get(key) is None
        self._more.put(key, value)
        if is_new:
            self._count(tag, at, 1)

    def _claim(self, tag: tuple[int, int], at: int) -> int:
        """Assign an unused line of the bucket to a set and block. Returns the line's offset; -1: no line is unused."""
        for line in range(at, at + self._bytes, _LINE_BYTES):
            owner = line // _WORD + _SET_WORD
            if not self._words[owner] and owner not in self._untold and line not in self._resting:
                self._memory[line + _CLASSES_AT : line + _CLASSES_AT + len(_NO_CLASSES)] = _NO_CLASSES
                self._words[line // _WORD + _BLOCK_WORD] = tag[1]
                self._untold[owner] = tag[0]
                return line
        return -1

    def delete(self, key: bytes) -> bool:
        """See `BucketMap`."""
        tag, at, index = self._place(key)
        line = self._line(tag, at)
        if line < 0:
            if tag not in self._others or not self._more.delete(key):
                return False
            self._count(tag, at, -1)
            return True
        place = line + _CLASSES_AT + 2 * index
        if _U16.unpack_from(self._memory, place)[0] == abi.NP_CLASS_NONE:
            return False
        _U16.pack_into(self._memory, place, abi.NP_CLASS_NONE)
        if self._memory[line + _CLASSES_AT : line + _CLASSES_AT + len(_NO_CLASSES)] == _NO_CLASSES:
            self._words[line // _WORD + _SET_WORD] = 0
            self._resting.add(line)
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """See `BucketMap`."""
        step = _LINE_BYTES // _WORD
        for number, policy_set in enumerate(self._words[_SET_WORD::step].tolist()):
            if not policy_set:
                continue
            line = number * _LINE_BYTES
            first = self._words[line // _WORD + _BLOCK_WORD] * _CLASSES
            classes = struct.unpack_from(f"={_CLASSES}H", self._memory, line + _CLASSES_AT)
            for index, one in enumerate(classes):
                if one != abi.NP_CLASS_NONE:
                    yield _WORDS2.pack(policy_set, first + index), _U32.pack(one)
        yield from self._more.items()
