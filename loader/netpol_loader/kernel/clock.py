# SPDX-License-Identifier: Apache-2.0
"""CONFIG_HZ: the number of jiffies that the kernel counts in a second.

The packet path uses only the clock bpf_jiffies64, because a read of this clock costs too little to be measured. The
clock's rate is a build option of the kernel. No interface reports this option reliably (sysconf's clock tick is another
number). So this module reads the clock twice, by a BPF program of two instructions, and computes the rate.
"""

from __future__ import annotations

import os
import struct
import time

from netpol_ebpf.errors import PlatformError
from netpol_loader.kernel import syscall

KNOWN_RATES = (100, 250, 300, 1000)
"""The possible values of CONFIG_HZ on every supported architecture."""

TICKS = 40
"""Least number of ticks between the two reads.

Each read is exact to one tick, so this number distinguishes 250 from 300 Hz. It takes 400 ms at the lowest rate.
"""

LOOK_S = 0.0005
"""Longest valid duration of a read, half a tick at the highest rate. A longer read was interrupted, and is repeated."""

FUNC_JIFFIES64 = 118
CALL = struct.pack("<BBhi", 0x85, 0, 0, FUNC_JIFFIES64)
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)

UPPER_HALF = struct.pack("<BBhi", 0x77, 0, 0, 32)  # r0 >>= 32

DEADLINE_S = 10.0


def read_jiffies() -> int:
    """The kernel's count of jiffies (bpf_jiffies64).

    A program can return only 32 bits, so two programs read the count: one returns the lower half, the other one the
    upper half.
    """
    lower_fd = syscall.prog_load(CALL + EXIT)
    try:
        upper_fd = syscall.prog_load(CALL + UPPER_HALF + EXIT)
        try:
            while True:
                upper, lower, again = (
                    syscall.prog_test_run(fd, bytes(64), b"", 1)[0] & 0xFFFF_FFFF
                    for fd in (upper_fd, lower_fd, upper_fd)
                )
                if upper == again:
                    return upper << 32 | lower
        finally:
            os.close(upper_fd)
    finally:
        os.close(lower_fd)


def measure_jiffies_per_second() -> int:
    """Measure the kernel's CONFIG_HZ. This takes 40 ticks.

    Raises PlatformError if the clock does not advance, or if its rate is not near a known one.
    """
    prog_fd = syscall.prog_load(CALL + EXIT)
    try:
        return _measure(prog_fd)
    finally:
        os.close(prog_fd)


def _measure(prog_fd: int) -> int:
    deadline = time.monotonic() + DEADLINE_S

    def look() -> tuple[int, float]:
        while True:
            before_s = time.monotonic()
            ticks = syscall.prog_test_run(prog_fd, bytes(64), b"", 1)[0]
            now_s = time.monotonic()
            if now_s - before_s < LOOK_S:
                return ticks, now_s
            if now_s > deadline:
                raise PlatformError("this machine is too busy to measure the rate of the kernel's jiffies")

    begin, begin_s = look()
    while True:
        end, end_s = look()
        elapsed = (end - begin) & 0xFFFF_FFFF
        if elapsed >= TICKS:
            break
        if end_s > deadline:
            raise PlatformError("the kernel's jiffies do not advance")
    measured = elapsed / (end_s - begin_s)
    rate = min(KNOWN_RATES, key=lambda known: abs(known - measured))
    if abs(rate - measured) > rate / 12:  # a little less than half the distance from 250 to 300
        raise PlatformError(f"the kernel counts {measured:.0f} jiffies a second, which is no known rate")
    return rate
