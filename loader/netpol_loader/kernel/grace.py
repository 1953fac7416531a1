# SPDX-License-Identifier: Apache-2.0
"""Grace periods: wait until no program run can use what was unlinked before, or miss what was written before.

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
from netpol_loader.kernel import syscall


def is_strongly_ordered(machine: str) -> bool:
    """Whether each processor sees the stores of another in the order in which that one made them, and loads in its own order.

    ``machine``: as `uname -m` says.
    """
    return machine == "x86_64"


IS_STRONGLY_ORDERED = is_strongly_ordered(platform.machine())

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""System call numbers (asm/unistd.h)."""
_CMD_GLOBAL = 1  # include/uapi/linux/membarrier.h

_WORD = struct.Struct("=I")


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
        raise PlatformError(f"cannot wait for a grace period: {error.strerror}") from error


def order_stores() -> None:
    """Order stores: call it after data is written and before the flag that publishes the data.

    On x86-64 it does nothing: stores become visible in their order.  Elsewhere it is a grace period, which orders both sides: a
    packet that sees the flag began after the data was written, whatever the order of its loads.  (An acquire, with which the program could order its
    own loads, is in no kernel before 6.15.)
    """
    if not IS_STRONGLY_ORDERED:
        wait_for_readers()


@functools.cache
def _maps() -> tuple[int, int] | None:
    """Descriptors of a map of one map, and of that one, for the life of the process; None: it may not make maps."""
    try:
        inner = syscall.map_create("array", "np_grace_inner", _WORD.size, _WORD.size, 1)
        try:
            return syscall.map_create("array_of_maps", "np_grace", _WORD.size, _WORD.size, 1, inner_map_fd=inner), inner
        except OSError:
            os.close(inner)
            raise
    except OSError as error:
        if error.errno == errno.EPERM:
            return None
        raise PlatformError(f"cannot make the map that grace periods need: {error.strerror}") from error


def _wait_without_maps() -> None:
    number = _MEMBARRIER.get(platform.machine())
    if number is None or ctypes.CDLL(None).syscall(number, _CMD_GLOBAL, 0, 0) != 0:
        raise PrivilegeError("cannot wait for a grace period: this process may not make maps")
