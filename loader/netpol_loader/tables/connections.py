# SPDX-License-Identifier: Apache-2.0
"""The connection tables as maps from key to row: the established connections of a table, or its unreplied ones.

A table is in buckets with tags (`bpf/np_table.h`). A tag identifies the connection in a slot. This module computes the
same hashes and tags as the program.

The program writes at the same time. It uses compare-and-swap, which Python does not have. So this module first reserves
a slot: it stores a tag of its own, and waits for a grace period. After the wait, every program run that began before
the reservation has ended, and every later run sees the tag. If an earlier run has replaced the tag, this module gives
the slot up. A removal is one store, which also removes what the program writes into the slot at that moment.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import MapFullError
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.clock import read_jiffies
from netpol_loader.kernel.grace import order_stores, wait_for_readers
from netpol_loader.kernel.maps import Map

ROWS_PER_BUCKET = 4
"""Connections for each bucket when a table is sized: half of the bucket's slots, because buckets fill unevenly."""

_WAYS = abi.NP_CONN_WAYS
_STEP_SHIFTS = (0, 8, 16, 24)
"""Possible lowest bits of a value that counts up within a 32-bit word of the key.

Ports are half words. Addresses are in network order, so their last byte may be the highest byte of a word.
"""
_TIME_SHIFT, _TIME_BITS = abi.NP_TAG_TIME_SHIFT, abi.NP_TAG_TIME_BITS
_TIME_MASK = (1 << _TIME_BITS) - 1
_SUM_SHIFT = 32
"""The hash is the upper half of a sum of products. The bits of this half are as good as random."""
_ASSUMED_JIFFIES = 360_000
"""Assumed remaining life of a connection of which no packet was seen yet, when a connection is chosen for eviction.

This is an hour at the lowest rate of jiffies, and less at higher ones. So such a connection is never preferred to one
of which packets were seen.
"""
_MASK64 = (1 << 64) - 1
_INDEX = struct.Struct("=I")
_PART_BYTES = 8 * _WAYS * 8
"""Size of the parts in which tags are counted, in bytes: the tags of eight buckets. The value is arbitrary."""
_LOWER_HALF = int(sys.byteorder == "big")
"""Index of a tag's lower half, which has everything but the hash, among its two halves."""


class Tags:
    """The tags of a table, by slot number. They are mapped into memory at the first use."""

    def __init__(self, tags: Map) -> None:
        """``tags``: the map of tags, which the caller continues to own."""
        self.buckets = tags.max_entries
        self._map = tags
        self._words: memoryview | None = None

    @property
    def words(self) -> memoryview:
        """The tags in memory. A load or store of one word reads or writes one tag.

        Raises OSError if the map cannot be mapped.
        """
        if self._words is None:
            self._words = memoryview(mmap.mmap(self._map.fd, self.buckets * self._map.value_size)).cast("Q")
        return self._words


class ConnectionMap(Map):
    """Maps keys to struct np_conn. It owns the array of entries. ``max_entries``: ROWS_PER_BUCKET for each bucket."""

    def __init__(self, array: Map, tags: Tags, secret: Map, *, is_unreplied: bool = False) -> None:
        """Take over ``array``. ``tags``: those of the same table.

        ``secret``: the map of the hash's random numbers, read once.
        """
        layout: Any = abi.np_conn4_entry if array.name == "np_conn4" else abi.np_conn6_entry
        self.fd, self.type = array.fd, "buckets"
        self.name = abi.UNREPLIED_VIEWS[array.name] if is_unreplied else array.name
        self.has_btf, self.is_per_cpu = array.has_btf, False
        self.key_size, self.value_size = layout.key.size, layout.conn.size
        self.max_entries = tags.buckets * ROWS_PER_BUCKET
        self._room = self.value_size
        self._array = array
        self._tags = tags
        self._who = abi.NP_TAG_UNREPLIED if is_unreplied else 0
        self._layout = layout
        self._numbers = list(abi.np_secret.from_buffer_copy(secret.get(bytes(4)) or b"").number)
        self._words = struct.Struct(f"={self.key_size // 4}I")

    def get(self, key: bytes) -> bytes | None:
        """The row that a packet would find. None if there is none."""
        bucket, who = self._hash(key)
        number = self._seek(bucket, who, key)
        return None if number is None else self._entry(number)[1]

    def put(self, key: bytes, value: bytes) -> None:
        """Insert or replace a connection. This takes a grace period. Raises MapFullError."""
        self.put_many([(key, value)])

    def put_many(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Insert or replace connections, in one grace period.

        Raises MapFullError if rows of this call did not fit into their buckets. All other rows are written.
        """
        for key, value in pairs:
            self._check(key, value)
        tags = self._tags.words
        now = read_jiffies() // abi.NP_TAG_JIFFIES
        owned = (now + abi.NP_TAG_OWNED_UNITS & _TIME_MASK) << _TIME_SHIFT | abi.NP_RANK_NONE
        taken = {}
        for key, value in pairs:
            bucket, who = self._hash(key)
            number = self._seek(bucket, who, key)
            if number is None:
                number = self._least(bucket, now)
            if number is not None:
                taken[number] = who, key, value
                tags[number] = owned
        wait_for_readers()
        ours = [number for number in taken if tags[number] == owned]
        self._array.put_many([(_INDEX.pack(number), self._packed(*taken[number][1:])) for number in ours])
        order_stores()
        ours = [number for number in ours if tags[number] == owned]  # a reservation may have expired
        for number in ours:
            tags[number] = self._tag(*taken[number])
        if len(ours) < len(pairs):
            raise MapFullError(
                f"map {self.name} had no room for {len(pairs) - len(ours)} of {len(pairs)} connections",
                map_name=self.name,
            )

    def delete(self, key: bytes) -> bool:
        """Remove the connection of ``key``. Returns False if there is none."""
        bucket, who = self._hash(key)
        number = self._seek(bucket, who, key)
        if number is not None:
            self._tags.words[number] = 0
        return number is not None

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all connections with these keys. A key without a connection is not an error."""
        for key in keys:
            self.delete(key)

    def clear(self) -> None:
        """Remove all connections of this map."""
        for number in self._used():
            self._tags.words[number] = 0

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys with their rows, also those of expired connections. Concurrent changes may be missed or included."""
        for number in self._used():
            yield self._entry(number)

    @property
    def slots(self) -> int:
        """Number of slots of the whole table, for connections of both forms."""
        return self._tags.buckets * _WAYS

    def count_live(self) -> tuple[int, int]:
        """Numbers of established and of unreplied connections in the whole table that have not expired.

        Cost: a pass over the tags, in which empty parts cost next to nothing.
        """
        raw = self._tags.words.tobytes()
        empty, now = bytes(_PART_BYTES), read_jiffies() // abi.NP_TAG_JIFFIES
        tags: Counter[int] = Counter()
        for start in range(0, len(raw), _PART_BYTES):
            part = raw[start : start + _PART_BYTES]
            if part != empty:
                tags.update(memoryview(part).cast("I").tolist()[_LOWER_HALF::2])
        established = unreplied = 0
        for tag, count in tags.items():
            left = ((tag >> _TIME_SHIFT) - now) & _TIME_MASK
            if tag & abi.NP_TAG_RANK_MASK and not left >> (_TIME_BITS - 1):
                if tag & abi.NP_TAG_UNREPLIED:
                    unreplied += count
                else:
                    established += count
        return established, unreplied

    def name_classes(self) -> set[int]:
        """The classes of domain names by which policy allowed connections of the whole table, without 0.

        Cost: one system call for each connection.
        """
        at, found = self._layout.name_class, set()
        for number, tag in enumerate(self._tags.words.tolist()):
            if tag & abi.NP_TAG_RANK_MASK:
                raw = self._array.get(_INDEX.pack(number)) or b""
                found.add(int.from_bytes(raw[at.offset : at.offset + at.size], sys.byteorder))
        return found - {0}

    def close(self) -> None:
        """Close the descriptor. The kernel keeps the map as long as it is pinned or a program uses it."""
        self._array.close()
        self.fd = -1

    # --- slots, by their number in the whole table ---------------------------------------------------------------------

    def _hash(self, key: bytes) -> tuple[int, int]:
        """The bucket of a key, and the bits of a tag that identify the key.

        These bits are the hash, and whether the connection is unreplied.
        """
        self._check(key, None)
        words = self._words.unpack(key)
        total = self._numbers[-1] + sum(number * word for number, word in zip(self._numbers, words, strict=False))
        hashed = (total & _MASK64) >> _SUM_SHIFT | abi.NP_HASH_BIT
        return hashed & self._tags.buckets - 1, hashed << abi.NP_TAG_HASH_SHIFT | self._who

    def _entry(self, number: int) -> tuple[bytes, bytes]:
        """The key and the row in a slot."""
        raw = self._array.get(_INDEX.pack(number)) or b""
        row = self._layout.conn.offset
        return raw[: self.key_size], raw[row : row + self.value_size]

    def _packed(self, key: bytes, value: bytes) -> bytes:
        """Encode a key and a row as the entry of a slot."""
        row = self._layout.conn.offset
        return (key.ljust(row, b"\0") + value).ljust(self._array.value_size, b"\0")

    def _seek(self, bucket: int, who: int, key: bytes) -> int | None:
        """The slot that has a key; None: no slot has it. ``who``: the bits of a tag that identify the key."""
        for number in range(bucket * _WAYS, (bucket + 1) * _WAYS):
            if (self._tags.words[number] ^ who) >> (_TIME_SHIFT + _TIME_BITS) == 0:
                return number if self._entry(number)[0] == key else None
        return None

    def _least(self, bucket: int, now: int) -> int | None:
        """The slot whose connection has the lowest worth (np_tag_worth). None: CPUs are writing to all slots."""
        numbers = range(bucket * _WAYS, (bucket + 1) * _WAYS)
        worths = [(self._worth(self._tags.words[number], now), number) for number in numbers]
        return min(((worth, number) for worth, number in worths if worth is not None), default=(0, None))[1]

    @staticmethod
    def _worth(tag: int, now: int) -> int | None:
        rank, left = tag & abi.NP_TAG_RANK_MASK, ((tag >> _TIME_SHIFT) - now) & _TIME_MASK
        if not tag:
            return 0
        if left >> (_TIME_BITS - 1):
            return 1
        return None if rank == abi.NP_RANK_NONE else rank << _TIME_BITS | left

    def _tag(self, who: int, _key: bytes, value: bytes) -> int:
        """The tag for a connection of which no packet was seen yet."""
        expires = (abi.np_conn.from_buffer_copy(value).seen_jiffies + _ASSUMED_JIFFIES) // abi.NP_TAG_JIFFIES
        rank = abi.NP_RANK_UNREPLIED if self._who else abi.NP_RANK_ESTABLISHED
        return who | (expires & _TIME_MASK) << _TIME_SHIFT | rank

    def _used(self) -> Iterator[int]:
        """The slots with connections of this map: unreplied ones, or established ones."""
        for number, tag in enumerate(self._tags.words.tolist()):
            if tag & abi.NP_TAG_RANK_MASK and tag & abi.NP_TAG_UNREPLIED == self._who:
                yield number


def viewed(maps: Mapping[str, Map]) -> dict[str, Map]:
    """The same maps, with each connection table as two: its established connections and its unreplied ones.

    The map of the unreplied connections has the name that bpf/np_maps.h gives to it ("views NAME").
    """
    result = dict(maps)
    for name, unreplied in abi.UNREPLIED_VIEWS.items():
        if name in maps:
            tags, secret = Tags(maps[abi.TAG_MAPS[name]]), maps["np_secret"]
            result[unreplied] = ConnectionMap(Map(os.dup(maps[name].fd)), tags, secret, is_unreplied=True)
            result[name] = ConnectionMap(maps[name], tags, secret)
    return result


def choose_secret(pin_dir: Path) -> None:
    """Draw the random numbers of the hash, if they are not set yet. Must be called before `viewed`. Raises OSError."""
    secret = Map(syscall.obj_get(pin_dir / "np_secret"))
    try:
        if not any(secret.get(bytes(4)) or b""):
            buckets = {_max_entries(pin_dir / name) for name in abi.TAG_MAPS.values()}
            numbers = [draw_number(buckets) for _ in range(abi.NP_HASH_WORDS)]
            secret.put(bytes(4), struct.pack(f"={abi.NP_HASH_WORDS}Q", *numbers))
    finally:
        secret.close()


def spreads(number: int, buckets: int) -> bool:
    """Whether consecutive ports or addresses fill the buckets evenly, if the hash multiplies them by ``number``.

    The hashes of consecutive values are an arithmetic progression. A bucket has eight slots. So among as many keys as
    the table is sized for, no nine keys at one distance may have hashes within the width of one bucket. The best
    approximations of the progression's step are the convergents of its continued fraction, so their denominators are
    the distances to try. ``number``: 64 bits. ``buckets``: a power of two.
    """
    distances = ROWS_PER_BUCKET * buckets // _WAYS
    for shift in _STEP_SHIFTS:
        before, left = buckets << _SUM_SHIFT, (number << shift) % (buckets << _SUM_SHIFT)
        earlier, distance = 0, 1
        while distance <= distances:
            if left * _WAYS < 1 << _SUM_SHIFT:
                return False
            times = before // left
            before, left = left, before - times * left
            earlier, distance = distance, earlier + times * distance
    return True


def draw_number(buckets: Iterable[int]) -> int:
    """Draw a random number that spreads consecutive values well in all tables with these numbers of buckets.

    With two tables, two of three random numbers are suitable.
    """
    while True:
        number = int.from_bytes(os.urandom(8), sys.byteorder)
        if all(spreads(number, one) for one in buckets):
            return number


def _max_entries(path: Path) -> int:
    one = Map(syscall.obj_get(path))
    try:
        return one.max_entries
    finally:
        one.close()
