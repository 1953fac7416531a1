# SPDX-License-Identifier: Apache-2.0
"""Waiting until no packet can still be using a row that was just unlinked.

A program's run is one RCU read-side section, so the kernel's own grace period is the exact answer: membarrier(2) with
MEMBARRIER_CMD_GLOBAL returns after one.  A fixed sleep was rejected: too long in the usual case, too short in the worst.
"""

from __future__ import annotations

import ctypes
import platform
import time

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""System call numbers (asm/unistd.h)."""
_CMD_GLOBAL = 1  # include/uapi/linux/membarrier.h

FALLBACK_S = 0.1
"""Where membarrier is missing (nohz_full processors, other architectures): arbitrary, far above one program run."""


def wait_for_readers() -> None:
    """Return when every packet that was being judged at the time of the call has its verdict. Takes some 10 ms."""
    number = _MEMBARRIER.get(platform.machine())
    if number is None or ctypes.CDLL(None, use_errno=True).syscall(number, _CMD_GLOBAL, 0, 0) != 0:
        time.sleep(FALLBACK_S)
