# SPDX-License-Identifier: Apache-2.0
"""The connection tables, seen as maps from key to row: the open connections of one, or the young.

`bpf/np_table.h` keeps them, in buckets whose tags say what is where; here are the same hash and the same tags.

Programs write while this does, and by compare-and-swap, which Python has not.  So a place is first marked as owned; after a
grace period nobody can be writing there who had not seen the mark, and whoever began earlier has put a mark of its own over
it.  Removing is one store: what a program writes into the place at that very moment goes with it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import MapFullError
from netpol_loader import abi, syscall
from netpol_loader.clock import read_jiffies
from netpol_loader.grace import wait_for_readers
from netpol_loader.maps import Map

TAG_NAMES: Mapping[str, str] = {"np_conn4": "np_conn4_tag", "np_conn6": "np_conn6_tag"}
"""The tables, each with the map of its tags."""

YOUNG_NAMES: Mapping[str, str] = {"np_conn4": "np_young4", "np_conn6": "np_young6"}
"""The tables, each with the name of the view of its young connections, which is no map of the kernel's."""

ROWS_PER_BUCKET = 4
"""How many connections a bucket is there for: half of its places, for buckets fill unevenly."""

_WAYS = abi.NP_CONN_WAYS
_YOUNG = 1 << 31
_HASH_SHIFT, _HASH_BIT = 32, 1 << 31
_TIME_SHIFT, _TIME_BITS = 2, 29
_TIME_MASK, _RANK_MASK = (1 << _TIME_BITS) - 1, 3
_JIFFIES = 64
_OWNED_UNITS = 64
_ASSUMED_JIFFIES = 360_000
"""How long after it was seen a connection counts in the choice of what goes, until its first packet tells better: an hour where a
second has the fewest jiffies, less elsewhere, so never longer than one that had packets."""
_MASK64 = (1 << 64) - 1


class ConnectionMap(Map):
    """Keys to struct np_conn. Owns the array's descriptor and the mappings. ``max_entries``: see ROWS_PER_BUCKET."""

    def __init__(self, array: Map, tags: Map, secret: Map, *, is_young: bool = False) -> None:
        """Take over the array; ``tags``: of the same table; ``secret``: the numbers of the hash, read once."""
        layout: Any = abi.np_conn4_entry if array.name == "np_conn4" else abi.np_conn6_entry
        self.fd, self.type = array.fd, "buckets"
        self.name = YOUNG_NAMES[array.name] if is_young else array.name
        self.has_btf, self.is_per_cpu = array.has_btf, False
        self.key_size, self.value_size = layout.key.size, layout.conn.size
        self.max_entries = tags.max_entries * ROWS_PER_BUCKET
        self._room = self.value_size
        self._who = _YOUNG if is_young else 0
        self._mask = tags.max_entries - 1
        self._entry_bytes, self._row_at = array.value_size, layout.conn.offset
        self._numbers = list(abi.np_secret.from_buffer_copy(secret.get(bytes(4)) or b"").number)
        self._words = struct.Struct(f"={self.key_size // 4}I")
        self._memory = mmap.mmap(array.fd, array.max_entries * array.value_size)
        self._tag_memory = mmap.mmap(tags.fd, tags.max_entries * tags.value_size)
        self._tags = memoryview(self._tag_memory).cast("Q")

    def get(self, key: bytes) -> bytes | None:
        """The row that a packet would find, or None."""
        bucket, who = self._hash(key)
        place = self._seek(bucket, who, key)
        return None if place is None else self._row(self._entry(bucket, place))

    def put(self, key: bytes, value: bytes) -> None:
        """Insert or replace. Takes a grace period. Raises MapFullError."""
        self.put_many([(key, value)])

    def put_many(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Insert or replace all, in a grace period. Raises MapFullError when buckets were full of rows of this call; all others are written."""
        for key, value in pairs:
            self._check(key, value)
        now = read_jiffies() // _JIFFIES
        owned = (now + _OWNED_UNITS & _TIME_MASK) << _TIME_SHIFT | abi.NP_RANK_NONE
        taken = {}
        for key, value in pairs:
            bucket, who = self._hash(key)
            place = self._seek(bucket, who, key)
            if place is None:
                place = self._least(bucket, now)
            if place is not None:
                taken[bucket, place] = who, key, value
                self._tags[self._tag(bucket, place)] = owned
        wait_for_readers()
        written = 0
        for (bucket, place), (who, key, value) in taken.items():
            if self._tags[self._tag(bucket, place)] == owned:
                self._write(bucket, place, who, key, value)
                written += 1
        if written < len(pairs):
            raise MapFullError(
                f"map {self.name} had no room for {len(pairs) - written} of {len(pairs)} connections",
                map_name=self.name,
            )

    def delete(self, key: bytes) -> bool:
        """Remove; False when there was nothing."""
        bucket, who = self._hash(key)
        place = self._seek(bucket, who, key)
        if place is not None:
            self._tags[self._tag(bucket, place)] = 0
        return place is not None

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all; absent keys are no error."""
        for key in keys:
            self.delete(key)

    def clear(self) -> None:
        """Remove every connection there is now."""
        for bucket, place in self._used():
            self._tags[self._tag(bucket, place)] = 0

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All connections, expired ones too. What changes meanwhile may be missed or seen."""
        for bucket, place in self._used():
            entry = self._entry(bucket, place)
            yield self._memory[entry : entry + self.key_size], self._row(entry)

    def close(self) -> None:
        """Close the descriptor and the mapping; the map lives on while it is pinned or used."""
        if self.fd >= 0:
            self._tags.release()
            self._tag_memory.close()
            self._memory.close()
        super().close()

    # --- places -------------------------------------------------------------------------------------------------------

    def _hash(self, key: bytes) -> tuple[int, int]:
        """The bucket, and the part of a tag that says whose it is."""
        self._check(key, None)
        words = self._words.unpack(key)
        total = self._numbers[-1] + sum(number * word for number, word in zip(self._numbers, words, strict=False))
        hashed = (total & _MASK64) >> _HASH_SHIFT | _HASH_BIT
        return hashed & self._mask, hashed << _HASH_SHIFT | self._who

    @staticmethod
    def _tag(bucket: int, place: int) -> int:
        """Number of a tag in `_tags`, and of the entry."""
        return bucket * _WAYS + place

    def _entry(self, bucket: int, place: int) -> int:
        """Offset of an entry."""
        return (bucket * _WAYS + place) * self._entry_bytes

    def _row(self, entry: int) -> bytes:
        return self._memory[entry + self._row_at : entry + self._row_at + self.value_size]

    def _seek(self, bucket: int, who: int, key: bytes) -> int | None:
        """The place of a key."""
        for place in range(_WAYS):
            if (self._tags[self._tag(bucket, place)] ^ who) >> (_TIME_SHIFT + _TIME_BITS) == 0:
                entry = self._entry(bucket, place)
                return place if self._memory[entry : entry + self.key_size] == key else None
        return None

    def _least(self, bucket: int, now: int) -> int | None:
        """The place that is worth least (np_tag_worth); None: all are being written."""
        first = self._tag(bucket, 0)
        worths = [(self._worth(tag, now), place) for place, tag in enumerate(self._tags[first : first + _WAYS])]
        return min(((worth, place) for worth, place in worths if worth is not None), default=(0, None))[1]

    @staticmethod
    def _worth(tag: int, now: int) -> int | None:
        rank, left = tag & _RANK_MASK, ((tag >> _TIME_SHIFT) - now) & _TIME_MASK
        if not tag:
            return 0
        if left >> (_TIME_BITS - 1):
            return 1
        return None if rank == abi.NP_RANK_NONE else rank << _TIME_BITS | left

    def _write(self, bucket: int, place: int, who: int, key: bytes, value: bytes) -> None:
        """Into a place that is owned: the entry, then its tag."""
        entry = self._entry(bucket, place)
        self._memory[entry : entry + self.key_size] = key
        self._memory[entry + self._row_at : entry + self._row_at + self.value_size] = value
        expires = (abi.np_conn.from_buffer_copy(value).seen_jiffies + _ASSUMED_JIFFIES) // _JIFFIES
        rank = abi.NP_RANK_YOUNG if self._who else abi.NP_RANK_OPEN
        self._tags[self._tag(bucket, place)] = who | (expires & _TIME_MASK) << _TIME_SHIFT | rank

    def _used(self) -> Iterator[tuple[int, int]]:
        """Bucket and place of each connection of this form."""
        for number, tag in enumerate(self._tags.tolist()):
            if tag & _RANK_MASK and tag & _YOUNG == self._who:
                yield divmod(number, _WAYS)


def viewed(maps: Mapping[str, Map]) -> dict[str, Map]:
    """The same maps, each connection table as its open connections and, under another name, its young ones."""
    result = dict(maps)
    for name, young in YOUNG_NAMES.items():
        if name in maps:
            tags, secret = maps[TAG_NAMES[name]], maps["np_secret"]
            result[young] = ConnectionMap(Map(os.dup(maps[name].fd)), tags, secret, is_young=True)
            result[name] = ConnectionMap(maps[name], tags, secret)
    return result


def choose_secret(pin_dir: Path) -> None:
    """Draw the numbers of the hash, unless they are there. Before `viewed`. Raises OSError."""
    secret = Map(syscall.obj_get(pin_dir / "np_secret"))
    try:
        if not any(secret.get(bytes(4)) or b""):
            secret.put(bytes(4), os.urandom(secret.value_size))
    finally:
        secret.close()
