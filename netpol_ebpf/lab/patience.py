# SPDX-License-Identifier: Apache-2.0
"""One factor for every time limit of the laboratory and the demonstration, for machines on which everything takes longer.

An emulated processor is ten to thirty times slower, and a limit that fits both it and real hardware would make every denial on
real hardware take seconds: a denial is a silence that is waited out.

The time between two looks is scaled as well: each look costs the process that is waited for as much as it costs the watcher.

Invariant: limits are scaled where they are set, by `scaled`, and nowhere twice.  What is measured is never scaled.
"""

from __future__ import annotations

import functools
import os

from netpol_ebpf.errors import UsageError

VARIABLE = "NETPOL_TIMEOUT_FACTOR"
LARGEST = 1000.0  # arbitrary: a limit of 0.4 s becomes minutes


def scaled(seconds: float) -> float:
    """A time limit, or the time between two looks, times the factor (environment NETPOL_TIMEOUT_FACTOR, 1 when unset). Raises UsageError when that is none."""
    return seconds * _factor(os.environ.get(VARIABLE, ""))


@functools.cache
def _factor(text: str) -> float:
    if not text:
        return 1.0
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1.0 <= factor <= LARGEST:
        raise UsageError(f"{VARIABLE}={text}: expected a number from 1 to {LARGEST:g}")
    return factor
