# SPDX-License-Identifier: Apache-2.0
"""One BPF map in Python. Keys and values are bytes; calls are for single elements or for many.

Invariant: a call that returns has done everything; a call that raises reports how much it did. The module must not know
the meaning of the bytes (`netpol_loader.abi` does).
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from netpol_ebpf.errors import MapFullError, PlatformError
from netpol_loader.kernel import syscall

BATCH = 4096
"""Elements of one batch command. The value is arbitrary, and gives buffers of a few hundred kB."""

NO_BATCH = frozenset({errno.EINVAL, 524})
"""The errnos of a map type without batch commands; 524 is the kernel's internal ENOTSUPP."""

FULL = frozenset({errno.E2BIG, errno.ENOSPC, errno.ENOMEM})


@functools.cache
def possible_cpus() -> int:
    """The number of possible CPUs, which may be larger than that of online ones.

    A per-CPU element has a value for each.
    """
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


class Map:
    """A BPF map. It owns its file descriptor ``fd``.

    A value of a per-CPU map is the values of all CPUs, each padded to 8 bytes.
    """

    def __init__(self, fd: int) -> None:
        info = syscall.map_info(fd)
        self.fd = fd
        self.name = info.name
        self.type = info.kind
        self.key_size = info.key_size
        self.value_size = info.value_size
        self.max_entries = info.max_entries
        self.has_btf = info.has_btf
        self.is_per_cpu = info.kind in syscall.PER_CPU_KINDS
        self._room = -(-info.value_size // 8) * 8 * possible_cpus() if self.is_per_cpu else info.value_size

    def __repr__(self) -> str:
        return f"<Map {self.name} {self.type} fd {self.fd}>"

    @property
    def cell_bytes(self) -> int:
        """The size in bytes of one value in the system call. In a per-CPU map, a value is the values of all CPUs."""
        return self._room

    def get(self, key: bytes) -> bytes | None:
        """The value of ``key``. None if there is no such element."""
        value = syscall.empty(self._room)
        try:
            syscall.map_lookup(self.fd, self._key(key), value)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise self._failure("read", error, 1) from error
        return value.raw[: self._room]

    def put(self, key: bytes, value: bytes) -> None:
        """Insert or replace one element. Raises MapFullError."""
        try:
            syscall.map_update(self.fd, self._key(key), self._value(value))
        except OSError as error:
            raise self._failure("write", error, 1) from error

    def delete(self, key: bytes) -> bool:
        """Remove one element. Returns False if no element has this key."""
        try:
            syscall.map_delete(self.fd, self._key(key))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise self._failure("delete from", error, 1) from error
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All elements. They are read in batches if the map type allows batches.

        Concurrent changes may be missed or included.
        """
        start: syscall.Buffer | None = None
        count = BATCH
        while True:
            keys, values = syscall.empty(count * self.key_size), syscall.empty(count * self._room)
            position = syscall.empty(max(self.key_size, 4))
            done, error = syscall.map_batch(
                syscall.MAP_LOOKUP_BATCH, self.fd, keys, values, count, start=start, position=position
            )
            if error in NO_BATCH and start is None:
                yield from self._items_one_by_one()
                return
            if error == errno.ENOSPC:  # a hash bucket has more elements than fit; nothing was returned
                count *= 2
                continue
            if error not in {0, errno.ENOENT}:
                raise self._failure("read", OSError(error, ""), count)
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(done):
                at, value_at = index * self.key_size, index * self._room
                yield raw_keys[at : at + self.key_size], raw_values[value_at : value_at + self._room]
            if error:
                return
            start = position

    def put_many(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Insert or replace all elements. Raises MapFullError with the number of elements that were written."""
        for at in range(0, len(pairs), BATCH):
            chunk = pairs[at : at + BATCH]
            for key, value in chunk:
                self._check(key, value)
            keys = syscall.buffer(b"".join(key for key, _ in chunk))
            values = syscall.buffer(b"".join(value for _, value in chunk))
            done, error = syscall.map_batch(syscall.MAP_UPDATE_BATCH, self.fd, keys, values, len(chunk))
            if error in NO_BATCH and at == 0:
                for key, value in pairs:
                    self.put(key, value)
                return
            if error:
                raise self._failure("write", OSError(error, ""), len(pairs), at + done)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all elements with these keys. A key that the map lacks is not an error."""
        at = 0
        while at < len(keys):
            chunk = keys[at : at + BATCH]
            for key in chunk:
                self._check(key, None)
            joined = syscall.buffer(b"".join(chunk))
            done, error = syscall.map_batch(syscall.MAP_DELETE_BATCH, self.fd, joined, None, len(chunk))
            if error in NO_BATCH and at == 0:
                for key in keys:
                    self.delete(key)
                return
            if error == errno.ENOENT:
                done += 1  # the batch stops at an absent key; continue after it
            elif error:
                raise self._failure("delete from", OSError(error, ""), len(keys), at + done)
            at += done

    def clear(self) -> None:
        """Remove all elements one by one, which suits only small maps. The elements of an array cannot be removed."""
        key = syscall.empty(self.key_size)
        while True:
            try:
                syscall.map_next_key(self.fd, None, key)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise self._failure("read", error, 1) from error
            self.delete(key.raw[: self.key_size])

    def end_grace_period(self) -> None:
        """Tell the map that a grace period has passed since the last removal. Only a `BucketMap` needs this call."""

    def close(self) -> None:
        """Close the descriptor. The kernel keeps the map as long as it is pinned or a program uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _items_one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        key: syscall.Buffer | None = None
        while True:
            following = syscall.empty(self.key_size)
            try:
                syscall.map_next_key(self.fd, key, following)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise self._failure("read", error, 1) from error
            key = following
            raw = following.raw[: self.key_size]
            value = self.get(raw)
            if value is not None:  # otherwise the element was removed between the two calls
                yield raw, value

    def _check(self, key: bytes, value: bytes | None) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"{self.name}: a key has {self.key_size} bytes, not {len(key)}")
        if value is not None and len(value) != self._room:
            raise ValueError(f"{self.name}: a value has {self._room} bytes, not {len(value)}")

    def _key(self, key: bytes) -> syscall.Buffer:
        self._check(key, None)
        return syscall.buffer(key)

    def _value(self, value: bytes) -> syscall.Buffer:
        self._check(b"\0" * self.key_size, value)
        return syscall.buffer(value)

    def _failure(self, verb: str, error: OSError, wanted: int, done: int = 0) -> PlatformError:
        progress = f"; {done} of {wanted} elements were done" if wanted > 1 else ""
        if error.errno in FULL:
            message = f"map {self.name} is full: it holds at most {self.max_entries} elements{progress}"
            return MapFullError(message, map_name=self.name)
        reason = os.strerror(error.errno or 0)
        return PlatformError(f"cannot {verb} map {self.name}: {reason} (errno {error.errno}){progress}")
