# SPDX-License-Identifier: Apache-2.0
"""Locks of pin roots, against concurrent changes. A lock ends with its process, even if child processes live on.

Invariant: a forked child has no copy of a lock's descriptor, so the child holds no lock after its parent has ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from netpol_ebpf.errors import PlatformError

log = logging.getLogger(__name__)

_descriptors: set[int] = set()


@contextlib.contextmanager
def locked_alone(descriptor: int) -> Iterator[None]:
    """Hold the lock (flock(2)) of an open file or directory until the block ends, and then close its descriptor.

    Raises BlockingIOError if another process holds the lock. The descriptor is closed in that case too.
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
        if descriptor in _descriptors:  # not so in a forked child that leaves the block
            _descriptors.discard(descriptor)
            os.close(descriptor)


_held: set[Path] = set()
"""The pin roots whose lock this process holds by `held`."""


@contextlib.contextmanager
def held(pin_root: Path, *, hint: str) -> Iterator[None]:
    """Hold the lock of an existing pin root until the block or the process ends.

    No other process then works under the root.

    Meanwhile, `locked` does not wait in this process. Raises PlatformError, with the hint, if another process holds the
    lock. Raises FileNotFoundError if the root is removed meanwhile.
    """
    place = pin_root.absolute()
    while True:
        fd = os.open(pin_root, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_alone(fd))
            except BlockingIOError as error:
                raise PlatformError(
                    f"another netpol-agent, or `netpolctl cleanup`, is at work on {pin_root}", hint=hint
                ) from error
            if not os.path.samestat(os.fstat(fd), pin_root.stat()):  # the last holder has replaced the directory
                continue
            _held.add(place)
            stack.callback(_held.discard, place)
            yield
            return


@contextlib.contextmanager
def locked(pin_root: Path) -> Iterator[None]:
    """Hold the lock for changes of a root's pins until the block ends. Waits while another process holds the lock."""
    if pin_root.absolute() in _held:
        yield
        return
    fd = os.open(pin_root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            log.info("waiting for another process that changes the pins in %s", pin_root)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _let_go() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go)
