# SPDX-License-Identifier: Apache-2.0
"""The factor by which slow machines lengthen every time limit of the laboratory and the demonstration.

An emulated processor is ten to thirty times slower than real hardware. A denial is observed as silence until the time
limit. So with one limit for both machines, every denial on real hardware would take seconds. The polling interval is
multiplied as well, because each poll also costs CPU time of the observed process.

Invariant: `scaled` multiplies each limit once, where the limit is set. Measurements are never multiplied.
"""

from __future__ import annotations

import functools
import os

from netpol_ebpf.errors import UsageError

VARIABLE = "NETPOL_TIMEOUT_FACTOR"
LARGEST = 1000.0  # arbitrary; with it a limit of 0.4 s becomes minutes


def scaled(seconds: float) -> float:
    """Multiply a time limit or polling interval by the factor in NETPOL_TIMEOUT_FACTOR (1 if the variable is not set).

    Raises UsageError if the variable is not a number from 1 to LARGEST.
    """
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
