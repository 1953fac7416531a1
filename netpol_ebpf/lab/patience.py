# SPDX-License-Identifier: Apache-2.0
"""One factor for every time limit of the laboratory and the demonstration, for slow machines.

An emulated processor is ten to thirty times slower. A limit for both it and real hardware would make every denial on
real hardware take seconds, since a denial is observed as silence until the limit.  The interval of polling is scaled,
too: each poll costs the observed process as much as the observer.

Invariant: each limit is scaled once, where it is set, by `scaled`.  Measurements are never scaled.
"""

from __future__ import annotations

import functools
import os

from netpol_ebpf.errors import UsageError

VARIABLE = "NETPOL_TIMEOUT_FACTOR"
LARGEST = 1000.0  # arbitrary: a limit of 0.4 s becomes minutes


def scaled(seconds: float) -> float:
    """A time limit or polling interval times the factor (environment NETPOL_TIMEOUT_FACTOR, 1 when unset).

    Raises UsageError when the variable is no valid factor.
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
