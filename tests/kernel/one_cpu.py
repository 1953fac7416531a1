# SPDX-License-Identifier: Apache-2.0
"""One CPU for tests that run the program in their own process: what it remembers per CPU is part of what they test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Keep the calling process, and what it starts, on one of its CPUs: another one for each process of pytest-xdist."""
    before = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
