# SPDX-License-Identifier: Apache-2.0
"""Memory and pauses of a process that holds a whole cluster: two calls, before it grows and when it has grown.

Invariant: nothing is judged by this; without it the same happens, with more memory and longer pauses.
"""

from __future__ import annotations

import ctypes
import gc

LARGE_BLOCK_BYTES = 1 << 20
"""Arbitrary: tables of thousands of rows are larger, what a single change allocates is smaller."""
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def give_back_large_blocks() -> None:
    """Have tables that were outgrown or done with returned to the kernel at once. To be called first.

    By itself glibc raises its threshold with the first of them, up to 32 MiB, and then keeps them as holes.  Another C library may do
    as it likes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def freeze() -> None:
    """Leave what is there now out of all later garbage collections: it stays, and going through it is a pause of half a second."""
    gc.collect()
    gc.freeze()
