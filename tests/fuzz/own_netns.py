# SPDX-License-Identifier: Apache-2.0
"""An empty network namespace, in which the program finds no routes, and only the fuzzer's socket.

Invariant: outside the `with` block the thread is in its original namespace.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h; os.unshare and os.setns come with Python 3.12
CURRENT = Path("/proc/thread-self/ns/net")


class OwnNamespace:
    """A namespace that `with` enters. It ends when it is closed and no socket is in it."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._home = os.open(CURRENT, os.O_RDONLY)
        self._check(self._libc.unshare(CLONE_NEWNET))
        self._own = os.open(CURRENT, os.O_RDONLY)
        self.__exit__()

    def __enter__(self) -> None:
        self._check(self._libc.setns(self._own, CLONE_NEWNET))

    def __exit__(self, *_: object) -> None:
        self._check(self._libc.setns(self._home, CLONE_NEWNET))

    def close(self) -> None:
        """Release the namespace. The thread must be outside the `with` block."""
        os.close(self._own)
        os.close(self._home)

    @staticmethod
    def _check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "cannot change the network namespace")
