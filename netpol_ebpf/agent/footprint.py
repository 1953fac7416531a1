# SPDX-License-Identifier: Apache-2.0
"""Settings of memory allocation and garbage collection for a process that holds all objects of a cluster.

Invariant: no verdict depends on this module. Without it the agent behaves the same, but needs more memory and pauses
longer.
"""

from __future__ import annotations

import ctypes
import gc

LARGE_BLOCK_BYTES = 1 << 20
"""Size in bytes from which a block counts as large, so that freeing it returns it to the kernel. The number is
arbitrary: tables of thousands of rows are larger, and the allocations for a single change are smaller."""
RARE = (50_000, 20, 100)
"""Thresholds of the collector's generations while a cluster is read; arbitrary."""
_USUAL = gc.get_threshold()
_M_MMAP_THRESHOLD = -3  # from malloc.h of glibc


def give_back_large_blocks() -> None:
    """Make glibc return a large block to the kernel when it is freed. Must be called before any large allocation.

    By default, freeing a large block raises glibc's mmap threshold, up to 32 MiB; smaller blocks then stay in the heap
    as holes. On another C library the call may have no effect.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def collect_rarely() -> None:
    """Collect garbage rarely until `freeze` is called.

    While the agent reads a cluster, nearly all new objects live as long as the process. With Python's own thresholds
    much of the time goes into collections that find nothing.
    """
    gc.set_threshold(*RARE)


def freeze() -> None:
    """Exclude all present objects from later garbage collections, and collect as often as by default from then on.

    These objects live as long as the process, and a collection that visits them would pause it for half a second.
    """
    gc.set_threshold(*_USUAL)
    gc.collect()
    gc.freeze()
