# SPDX-License-Identifier: Apache-2.0
"""Searches a directory for manifests, and reads files.

The agent and the command line use the same search, so `netpolctl check DIR` reads the same files as the agent.

Invariants: every existing file that may be a manifest, and every directory that may contain manifests, is either found
or reported as hidden.  Each directory is listed once, however many links lead to it.  The search does not wait for
other processes, because it opens no pipe and no device.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".yaml", ".yml", ".json")
MOST_ENTRIES = 200_000
"""The largest number of directory entries in one search; arbitrary. Each entry costs some 10 microseconds."""
PAUSE_ENTRIES = 250
"""How many directory entries are read between two pauses of a search; arbitrary. They take a few milliseconds."""
MOST_BYTES = 64 << 20
"""The size limit of a file in bytes; arbitrary.

The output of `kubectl get all --all-namespaces -o yaml` for some thousand pods has tens of MiB.
"""

DirectoryId = tuple[int, int]
"""(device, inode) of a directory. It is the same for all paths to the directory."""


def never_pause() -> None:
    """Do nothing: the ``pause`` of a search without interruptions."""


@dataclass(frozen=True, slots=True)
class ManifestFiles:
    """The result of a search.

    Its keys are paths relative to the root of the search, with ``/`` between the parts.
    ``files``: the status of each file with a manifest's suffix.  The file may be a pipe or a device.
    ``hidden``: the reason why a link, a directory, or a file with a manifest's suffix could not be read.
    ``directories``: the identity of each directory, including the root ("").  If a directory has several paths, its
    files are under one of them.
    """

    files: dict[str, os.stat_result] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    directories: dict[str, DirectoryId] = field(default_factory=dict)

    def readable(self) -> tuple[list[str], dict[str, str]]:
        """The files that can be read, sorted, and the paths that may be or contain a manifest but cannot be read.

        The second result maps each such path to the reason why it cannot be read.  Only regular files can be read.
        """
        others = {name: "it is no regular file" for name, one in self.files.items() if not stat.S_ISREG(one.st_mode)}
        return sorted(self.files.keys() - others.keys()), {**self.hidden, **others}


def find_manifests(root: Path, pause: Callable[[], None] = never_pause) -> ManifestFiles:
    """Search a directory and everything below it, links included. Names that begin with a dot are left out.

    If a directory has several paths, the search lists it under its real path if that path is below ``root``, else under
    the first link by name.
    ``pause``: a function that is called every few milliseconds.

    Raises OSError if ``root`` cannot be listed, or if the search finds more than MOST_ENTRIES directory entries.
    """
    search = _Search(root, pause)
    search.run()
    return search.found


class _Search:
    """The state of one search: its result so far, and the directories that it must still list.

    Directories reached by links are listed after all others, sorted by name.
    """

    def __init__(self, root: Path, pause: Callable[[], None]) -> None:
        self.root = root
        self.found = ManifestFiles()
        self._pause = pause
        self._listed: set[DirectoryId] = set()
        self._entries = 0
        self._directories = [""]
        self._links: list[str] = []

    def run(self) -> None:
        status = self.root.stat()
        self.found.directories[""] = status.st_dev, status.st_ino
        while self._directories or self._links:
            name = self._directories.pop() if self._directories else heapq.heappop(self._links)
            identity = self.found.directories[name]
            if identity not in self._listed:
                self._listed.add(identity)
                self._list(name)

    def _list(self, name: str) -> None:
        path = os.path.join(self.root, name) if name else os.fspath(self.root)  # noqa: PTH118 - a Path for each costs more than the rest
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    self._count()
                    if not entry.name.startswith(
                        "."
                    ):  # this includes the ..data and timestamp directories of mounted ConfigMaps
                        self._look_at(f"{name}/{entry.name}" if name else entry.name, entry)
        except OSError as error:
            if not name or error.errno == errno.E2BIG:
                raise
            if not isinstance(error, FileNotFoundError):  # else the directory was removed meanwhile
                self.found.hidden[name] = error.strerror or str(error)

    def _count(self) -> None:
        self._entries += 1
        if self._entries % PAUSE_ENTRIES == 0:
            self._pause()
        if self._entries > MOST_ENTRIES:
            raise OSError(errno.E2BIG, f"it has more than {MOST_ENTRIES} names", str(self.root))

    def _look_at(self, name: str, entry: os.DirEntry[str]) -> None:
        is_manifest = entry.name.lower().endswith(SUFFIXES)
        try:
            status = entry.stat()
            if stat.S_ISDIR(status.st_mode):
                self.found.directories[name] = status.st_dev, status.st_ino
                if entry.is_symlink():
                    heapq.heappush(self._links, name)
                else:
                    self._directories.append(name)
            elif is_manifest:
                self.found.files[name] = status
        except FileNotFoundError:
            if entry.is_symlink():
                self.found.hidden[name] = "a link to what is not there"
            # else the file was removed during the search
        except OSError as error:
            if is_manifest or _may_be_directory(entry):
                self.found.hidden[name] = error.strerror or str(error)


def _may_be_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() or entry.is_dir(follow_symlinks=False)
    except OSError:  # the file system's directory entries have no type
        return True


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file.

    Other files are not opened, because a pipe might never end, and opening a device can have side effects.  A file of
    size 0 counts as empty and is not read: files of procfs and tracefs have size 0, whatever their content.

    Raises OSError if the file cannot be read, is not a regular file, or has more than ``most_bytes``.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(place)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if status.st_size > most_bytes:
            raise _too_large(most_bytes)
        if status.st_size == 0:
            return b""
        file = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # the file checked above
    finally:
        os.close(place)
    try:
        read = bytearray()
        while block := os.read(file, status.st_size + 1 if not read else 1 << 16):  # an error, not a wait
            read += block
            if len(read) > most_bytes:
                raise _too_large(most_bytes)
        return bytes(read)
    finally:
        os.close(file)


def _too_large(most_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {most_bytes >> 20} MiB; write its objects into several files")
