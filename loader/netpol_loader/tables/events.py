# SPDX-License-Identifier: Apache-2.0
"""Reads the event ring by libbpf. Nothing else uses libbpf; its reader has the right memory order.

Invariant: the callback gets every record of a known type once, in order. Records of unknown types, which another
version of the program may have written, are counted and logged. The program does not wake the reader: `poll` waits for
at most the given time, and then consumes all records.

A new type of event needs a number in ``enum np_event_kind``, a structure with that number at KIND_OFFSET, a line in
RECORDS, and a line in `netpol_ebpf.apply.events.DECODERS`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi

log = logging.getLogger(__name__)

EventRecord = abi.np_event
"""The type of all records. It becomes a union if there is a second structure."""
RECORDS: Mapping[int, type[EventRecord]] = dict.fromkeys(
    (abi.NP_EVENT_DENY, abi.NP_EVENT_ALLOW, abi.NP_EVENT_LOG), abi.np_event
)
"""The structure of a record, by type number (``enum np_event_kind``)."""
KIND_OFFSET: int = vars(abi.np_event)["kind"].offset
"""Offset of the type number in a record. The number has one byte."""

LIBRARIES = ("libbpf.so.1", "libbpf.so.0")

_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@functools.cache
def _libbpf() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name, use_errno=True)
        except OSError:
            continue
        library.ring_buffer__new.restype = ctypes.c_void_p
        library.ring_buffer__new.argtypes = [ctypes.c_int, _SAMPLE, ctypes.c_void_p, ctypes.c_void_p]
        library.ring_buffer__poll.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.ring_buffer__consume.argtypes = [ctypes.c_void_p]
        library.ring_buffer__free.argtypes = [ctypes.c_void_p]
        return library
    raise PlatformError(
        f"none of {', '.join(LIBRARIES)} can be loaded",
        hint="Install the distribution's libbpf (Debian and Ubuntu: apt install libbpf1 or libbpf0).",
    )


def parse_record(data: bytes) -> EventRecord | None:
    """Decode a record. Returns None if the type is unknown, or if the record is shorter than its structure."""
    if len(data) <= KIND_OFFSET:
        return None
    kind = RECORDS.get(data[KIND_OFFSET])
    return None if kind is None or len(data) < ctypes.sizeof(kind) else kind.from_buffer_copy(data)


def parse_dns_record(data: bytes) -> abi.np_dns_event | None:
    """Decode a record of the ring np_dns_event. Returns None if it is shorter than its structure."""
    return abi.np_dns_event.from_buffer_copy(data) if len(data) >= ctypes.sizeof(abi.np_dns_event) else None


R = TypeVar("R")


class EventReader(Generic[R]):
    """A consumer of the ring buffer ``map_fd``. Only one consumer may exist at a time.

    ``parse``: decodes a record; None for a record of an unknown type.
    ``unknown``: number of records of unknown types so far.
    """

    def __init__(self, map_fd: int, callback: Callable[[R], None], parse: Callable[[bytes], R | None]) -> None:
        self.unknown = 0
        self._callback = callback
        self._parse = parse
        self._failure: BaseException | None = None
        self._most: int | None = None
        self._handed_over = 0
        self._sample = _SAMPLE(self._on_sample)  # kept: the library has only its address
        self._ring: int | None = _libbpf().ring_buffer__new(map_fd, self._sample, None, None)
        if not self._ring:
            raise PlatformError(f"cannot open the event ring: {os.strerror(ctypes.get_errno())}")

    def poll(self, timeout_ms: int) -> int:
        """Wait for events, at most ``timeout_ms``. Returns the number of records that the callback got."""
        waited = self._check(_libbpf().ring_buffer__poll(self._ring, timeout_ms))
        return waited + self.consume()

    def consume(self, most: int | None = None) -> int:
        """Pass waiting records to the callback, at most ``most``. Returns their number.

        Reraises an error of the callback.

        Without ``most``, the call does not return while the program writes faster than the callback reads.
        """
        self._most, self._handed_over = most, 0
        result = _libbpf().ring_buffer__consume(self._ring)
        is_enough = most is not None and self._handed_over >= most
        self._most = None
        return self._check(self._handed_over if is_enough else result)

    def close(self) -> None:
        """Close the ring's reader."""
        if self._ring:
            _libbpf().ring_buffer__free(self._ring)
            self._ring = None

    def __enter__(self) -> EventReader[R]:  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_sample(self, _context: int, data: int, size: int) -> int:
        try:
            self._hand_over(ctypes.string_at(data, size))
        except BaseException as error:  # noqa: BLE001  # must not pass through C; raised again by _check
            self._failure = error
            return -1
        self._handed_over += 1
        return -1 if self._handed_over == self._most else 0  # below 0 the library stops, after this record

    def _hand_over(self, data: bytes) -> None:
        record = self._parse(data)
        if record is not None:
            self._callback(record)
            return
        if not self.unknown:
            log.warning(
                "the event ring has records of a type that this version does not know; they are counted and left out"
            )
        self.unknown += 1

    def _check(self, result: int) -> int:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if result < 0:
            raise PlatformError(f"cannot read the event ring: {os.strerror(-result)}")
        return result
