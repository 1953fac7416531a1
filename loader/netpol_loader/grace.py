# SPDX-License-Identifier: Apache-2.0
"""Waiting until no packet can still be using what was just unlinked, or can miss what was just written.

A program's run is one RCU read-side section, so the kernel's own grace period is the exact answer: every run that began before
it is over when it ends, and every run that ends after it began after everything that was written before it.  The kernel
waits for one before it returns from the update of an element that is a map, "so that user space, when we return to it, knows
that all programs that could be running use the new map value" (maybe_wait_bpf_programs in kernel/bpf/syscall.c, 4.20 and
its stable predecessors); since 6.19 for an expedited one.

A process that may make no maps, and so writes none that a packet meets (a test), waits by membarrier(2) with
MEMBARRIER_CMD_GLOBAL.  That is not the first choice: it takes as long before 6.19 and a hundred times as long since, is refused
where a processor is nohz_full, and does not wait where one processor is online, although a real-time kernel interrupts
programs.  Rejected: a fixed sleep, which is too long in the usual case and too short in the worst.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader import syscall

IS_STRONGLY_ORDERED = platform.machine() == "x86_64"
"""Whether every processor sees the stores of another in the order in which that one made them, and loads in its own order."""

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""System call numbers (asm/unistd.h)."""
_CMD_GLOBAL = 1  # include/uapi/linux/membarrier.h

_ARRAY, _ARRAY_OF_MAPS = 2, 12  # enum bpf_map_type
_WORD = struct.Struct("=I")


class _MapCreateAttr(syscall._Attr):  # noqa: SLF001 - a command of bpf(2) that nothing else needs in this form
    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
    )


def wait_for_readers() -> None:
    """Return when every packet that was being judged at the time of the call has its verdict.

    Takes some 10 ms, since 6.19 some 0.1 ms.  A full memory barrier.  Raises PrivilegeError, PlatformError.
    """
    maps = _maps()
    if maps is None:
        _wait_without_maps()
        return
    outer, inner = maps
    try:
        syscall.map_update(outer, syscall.buffer(_WORD.pack(0)), syscall.buffer(_WORD.pack(inner)))
    except OSError as error:
        raise PlatformError(f"cannot wait for the packets on their way: {error.strerror}") from error


def order_stores() -> None:
    """Between what was written and the flag that says so: a packet that sees the flag sees all that was written before.

    Nothing on x86-64, where stores are seen in their order.  Elsewhere a grace period, which orders both sides: a packet that
    sees the flag began after the writing, whatever the order of its loads.  (An acquire, with which the program could order its
    own loads, is in no kernel before 6.15.)
    """
    if not IS_STRONGLY_ORDERED:
        wait_for_readers()


@functools.cache
def _maps() -> tuple[int, int] | None:
    """Descriptors of a map of one map, and of that one, for the life of the process; None: it may not make maps."""
    try:
        inner = _create(_ARRAY)
        try:
            return _create(_ARRAY_OF_MAPS, inner), inner
        except OSError:
            os.close(inner)
            raise
    except OSError as error:
        if error.errno == errno.EPERM:
            return None
        raise PlatformError(
            f"cannot make the map by which to wait for the packets on their way: {error.strerror}"
        ) from error


def _create(kind: int, inner: int = 0) -> int:
    attr = _MapCreateAttr(
        map_type=kind, key_size=_WORD.size, value_size=_WORD.size, max_entries=1, inner_map_fd=inner
    )  # fmt: skip
    return syscall._bpf(0, attr)  # noqa: SLF001 - BPF_MAP_CREATE


def _wait_without_maps() -> None:
    number = _MEMBARRIER.get(platform.machine())
    if number is None or ctypes.CDLL(None).syscall(number, _CMD_GLOBAL, 0, 0) != 0:
        raise PrivilegeError("cannot wait for the packets on their way: this process may not make maps")
