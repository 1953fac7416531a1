# SPDX-License-Identifier: Apache-2.0
"""Copies of the last good text of each manifest file, so that a restart with a broken file changes no policy.

Invariant: a copy is either complete or does not exist. A special file in the directory of copies, such as a pipe,
cannot block a reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.resources.manifest_files import DirectoryId, read_regular

DIRECTORIES = "directories"
"""Name of the file with the identities of directories. It cannot be the name of a copy, which is a hash."""


@dataclass(slots=True)
class LastGoodCopies:
    """The copies in one directory, which the first copy creates.

    The file name of a copy is a hash of the manifest's name, because a manifest may have any name. A file beside each
    copy has the manifest's name. All methods except `directories` may raise OSError.
    """

    directory: Path

    def _path(self, name: str) -> Path:
        return self.directory / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    def load(self, name: str) -> str | None:
        """Load the copy of the manifest ``name``; None if it has no copy. Raises OSError, UnicodeDecodeError."""
        try:
            return read_regular(self._path(name)).decode("utf-8")
        except FileNotFoundError:
            return None

    def store(self, name: str, text: str) -> None:
        """Write or replace the copy of the manifest ``name``, atomically."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(name)
        _replace(path, text.encode("utf-8"))
        beside, raw = path.with_suffix(".name"), name.encode(errors="surrogateescape")
        if _content(beside) != raw:
            _replace(beside, raw)

    def names(self) -> list[str]:
        """Names of the manifests that have a copy, whether or not the manifest still exists."""
        if not self.directory.is_dir():
            return []
        found = [(_content(path) or b"").decode(errors="surrogateescape") for path in self.directory.glob("*.name")]
        return [name for name in found if self._path(name).exists()]  # a damaged .name file names no copy

    def forget(self, name: str) -> None:
        """Remove the copy of the manifest ``name``, if there is one."""
        for path in (self._path(name), self._path(name).with_suffix(".name")):
            path.unlink(missing_ok=True)

    def keep_only(self, names: Mapping[str, object]) -> None:
        """Remove all copies except those of the manifests in ``names``."""
        if not self.directory.is_dir():
            return
        wanted = {self._path(name).name for name in names}
        for path in self.directory.iterdir():
            if path.name.removesuffix(".name") not in wanted and path.name != DIRECTORIES:
                path.unlink()

    def store_directories(self, directories: Mapping[str, DirectoryId]) -> None:
        """Store the identities of the directories with manifests, by path below the root.

        After a restart the source compares them with the directories that it finds. So it notices if another directory
        is at the path of one of them.
        """
        path = self.directory / DIRECTORIES
        if directories:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(path, json.dumps(directories).encode())
        else:
            path.unlink(missing_ok=True)

    def directories(self) -> dict[str, DirectoryId] | None:
        """Load the identities that `store_directories` stored; {} if none are stored; None if the file is damaged."""
        path = self.directory / DIRECTORIES
        if not path.exists():
            return {}
        try:
            return {
                str(name): (int(device), int(inode)) for name, (device, inode) in json.loads(read_regular(path)).items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def _content(path: Path) -> bytes | None:
    """The content of a regular file; None if the path is anything else or cannot be read."""
    with contextlib.suppress(OSError):
        return read_regular(path)
    return None


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically, by renaming a new temporary file.

    An existing file with the temporary name is removed first, because it may be a pipe.
    """
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)
