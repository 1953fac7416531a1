# SPDX-License-Identifier: Apache-2.0
"""One CPU for tests that run the program in their own process, because its per-CPU caches are part of what they test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Pin the calling process and its children to one of its CPUs, a different one for each process of pytest-xdist."""
    before = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
