# SPDX-License-Identifier: Apache-2.0
"""How many jiffies the kernel counts in a second.

The program's one clock is bpf_jiffies64, which costs nothing; its rate is a build option of the kernel that nothing
reliable reports (sysconf's clock tick is another number).  So a program of two instructions is asked, twice.
"""

from __future__ import annotations

import os
import struct
import time

from netpol_ebpf.errors import PlatformError
from netpol_loader import syscall

KNOWN_RATES = (100, 250, 300, 1000)
"""The choices of CONFIG_HZ on every architecture supported."""

TICKS = 12
"""Long enough to tell 250 from 300 with an error of a tick; 120 ms at the slowest rate."""

FUNC_JIFFIES64 = 118
CALL = struct.pack("<BBhi", 0x85, 0, 0, FUNC_JIFFIES64)
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)

DEADLINE_S = 5.0


def measure_jiffies_per_second() -> int:
    """The kernel's CONFIG_HZ. Takes 12 ticks. Raises PlatformError when the clock stands still or fits no known rate."""
    prog_fd = syscall.prog_load(CALL + EXIT)
    try:
        return _measure(prog_fd)
    finally:
        os.close(prog_fd)


def _measure(prog_fd: int) -> int:
    deadline = time.monotonic() + DEADLINE_S

    def next_tick(after: int) -> tuple[int, float]:
        while time.monotonic() < deadline:
            ticks = syscall.prog_test_run(prog_fd, bytes(64), b"", 1)[0] & 0xFFFF_FFFF
            if ticks != after:
                return ticks, time.monotonic()
        raise PlatformError("the kernel's jiffies do not advance")

    first, _ = next_tick(-1)
    begin, begin_s = next_tick(first)
    end, end_s = begin, begin_s
    while (end - begin) & 0xFFFF_FFFF < TICKS:
        end, end_s = next_tick(end)
    measured = ((end - begin) & 0xFFFF_FFFF) / (end_s - begin_s)
    rate = min(KNOWN_RATES, key=lambda known: abs(known - measured))
    if abs(rate - measured) > rate / 10:
        raise PlatformError(f"the kernel counts {measured:.0f} jiffies a second, which is no known rate")
    return rate
