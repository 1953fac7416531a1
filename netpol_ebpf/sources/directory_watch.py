# SPDX-License-Identifier: Apache-2.0
"""A file descriptor that becomes readable when something changes in one of several directories.

The watch uses inotify(7) only as a wake-up. It does not read which file changed, or how: after each wake-up the source
scans the directories. So neither a queue overflow nor the order of events can lead to a wrong state.

Invariant: `DirectoryWatch.is_complete` is True only if the kernel reports every change of the directories' entries. The
kernel does not report changes on network and FUSE file systems that other machines or processes make.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Iterable
from pathlib import Path

IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF and
IN_MOVE_SELF of linux/inotify.h. Reading a file causes none of them."""
READ_BYTES = 1 << 16
LOCAL_FILE_SYSTEMS = frozenset({
    0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x01021994, 0x858458F6, 0x794C7630,
})  # fmt: skip
"""File systems on which inotify reports every change: ext2 to ext4, XFS, Btrfs, F2FS, ZFS, bcachefs, tmpfs, ramfs and
overlayfs. The numbers are from linux/magic.h, or from the file system's own source."""
_STATFS_BYTES = 256
"""Size in bytes of a buffer for struct statfs. It is larger than the structure on every architecture."""


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
    libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return libc


class DirectoryWatch:
    """Watches the directories and single files of the last call of `watch`."""

    def __init__(self) -> None:
        """Raises OSError if the user has too many inotify instances (fs.inotify.max_user_instances)."""
        self._descriptor = _checked(_libc().inotify_init1(IN_NONBLOCK | IN_CLOEXEC), None)
        self._local: dict[int, bool] = {}  # watch descriptor -> whether the kernel reports every change there

    def fileno(self) -> int:
        """The file descriptor, which is readable when something changed."""
        return self._descriptor

    @property
    def is_complete(self) -> bool:
        """Whether at least one path is watched, and the kernel reports every change of the watched paths."""
        return bool(self._local) and all(self._local.values())

    def watch(self, paths: Iterable[Path]) -> bool:
        """Watch these paths and no others. A path that does not exist is left out.

        Returns whether one of them was not watched before, so that a change there may have been missed. Raises OSError
        if the user has too many watches (fs.inotify.max_user_watches) or may not read a directory; then nothing is
        watched.
        """
        before, self._local = self._local, {}
        found: dict[int, bool] = {}
        try:
            for path in paths:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    number = _checked(_libc().inotify_add_watch(self._descriptor, os.fsencode(path), CHANGES), path)
                    found[number] = before[number] if number in before else _is_local(path)
        finally:
            for number in before.keys() - found.keys():
                _libc().inotify_rm_watch(
                    self._descriptor, number
                )  # the kernel itself removes watches of directories that are gone
        self._local = found
        return not found.keys() <= before.keys()

    def drain(self) -> None:
        """Read all queued events, so that the descriptor is no longer readable."""
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(self._descriptor, READ_BYTES)

    def close(self) -> None:
        """Close the descriptor. Calling it again has no effect."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _is_local(path: Path) -> bool:
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    _checked(_libc().statfs(os.fsencode(path), status), path)
    return ctypes.c_ulong.from_buffer(status).value in LOCAL_FILE_SYSTEMS  # f_type is the first field, a long


def _checked(result: int, path: Path | None) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno() or errno.EIO
    raise OSError(number, os.strerror(number), None if path is None else str(path))
