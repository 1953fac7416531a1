# SPDX-License-Identifier: Apache-2.0
"""Locks of this very process: they end with it, whatever children it leaves.

Invariant: a fork has no copy of a lock's descriptor, so it keeps nobody waiting after its parent has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

_descriptors: set[int] = set()


@contextlib.contextmanager
def locked_alone(descriptor: int) -> Iterator[None]:
    """Hold the lock (flock(2)) of an open file or directory, and own its descriptor, until the block ends.

    Raises BlockingIOError when another process holds it; then, too, the descriptor is closed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    _descriptors.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _descriptors:  # not in a fork that leaves the block
            _descriptors.discard(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go)
