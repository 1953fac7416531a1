# SPDX-License-Identifier: Apache-2.0
"""Grace periods: wait until no program run can still use rows that were removed before the wait.

A run of a program is one RCU read-side section, so the kernel's own grace period is exact: at the end of the grace
period, every run that began before it is over, and every later run sees all rows that were written before it. The
kernel waits for a grace period when an element of a map of maps is updated, "so that user space, when we return to it,
knows that all programs that could be running use the new map value" (maybe_wait_bpf_programs in kernel/bpf/syscall.c,
4.20 and its stable predecessors); since 6.19 the kernel waits for an expedited one.

A process without the privilege to make maps (a test) writes no row that a packet meets. Such a process waits by
membarrier(2) with MEMBARRIER_CMD_GLOBAL. membarrier(2) is only the second choice, for three reasons. It takes as long
as the update of a map of maps before 6.19, and a hundred times as long since then. The kernel refuses membarrier(2) if
a processor is nohz_full. If only one processor is online, membarrier(2) does not wait, although a real-time kernel can
interrupt a program. Rejected: a fixed sleep, which is too long in the usual case and too short in the worst.
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
    """Whether a processor's stores become visible in program order, and its loads happen in program order.

    ``machine``: the name of the architecture, as `uname -m` prints it.
    """
    return machine == "x86_64"


IS_STRONGLY_ORDERED = is_strongly_ordered(platform.machine())

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""Number of the system call membarrier(2), by architecture (asm/unistd.h)."""
_CMD_GLOBAL = 1  # include/uapi/linux/membarrier.h

_WORD = struct.Struct("=I")


def wait_for_readers() -> None:
    """Wait for a grace period. When the call returns, every program run that began before the call has ended.

    This takes some 10 ms, since Linux 6.19 some 0.1 ms. It is also a full memory barrier. Raises PrivilegeError and
    PlatformError.
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
    """Order stores. Call this after a row is written, and before the flag that makes the row valid.

    On x86-64 it does nothing, because stores become visible in program order. Elsewhere it waits for a grace period. A
    program run that sees the flag then began after the row was written, so it sees the row, whatever the order of its
    loads. (The program could order its own loads with a load-acquire instruction, but no kernel before 6.15 has one.)
    """
    if not IS_STRONGLY_ORDERED:
        wait_for_readers()


@functools.cache
def _maps() -> tuple[int, int] | None:
    """The descriptors of a map of maps with one element, and of the map that is this element.

    None: this process may not make maps. The maps are made once for the life of the process.
    """
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
