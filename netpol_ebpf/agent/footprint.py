# SPDX-License-Identifier: Apache-2.0
"""Memory and pauses of a process that has a whole cluster's objects: a call before it allocates, and one afterwards.

Invariant: no verdict depends on this module; without it the agent does the same with more memory and longer pauses.
"""

from __future__ import annotations

import ctypes
import gc

LARGE_BLOCK_BYTES = 1 << 20
"""Threshold in bytes; arbitrary: tables of thousands of rows are larger, allocations of a single change are smaller."""
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def give_back_large_blocks() -> None:
    """Make glibc return large freed blocks to the kernel at once. Must be called first.

    By default glibc raises its mmap threshold with the first large block, up to 32 MiB, and keeps later blocks as
    holes.  Another C library may ignore the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def freeze() -> None:
    """Exclude all present objects from later garbage collections.

    They live on anyway, and a collection that visits them pauses the process for half a second.
    """
    gc.collect()
    gc.freeze()
