# SPDX-License-Identifier: Apache-2.0
"""Which files below a directory are manifests, and which places could not be looked at.

The agent and the command line share this search, so `netpolctl check DIR` reads what the agent would read.

Invariant: everything that may be a manifest, or a directory of manifests, is either found or named as hidden.  Only what is not
there is neither.  Reads no file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class ManifestFiles:
    """Both by the path relative to the directory of the search, with ``/`` between its parts.

    ``files``: the status of each file with a manifest's suffix; it may be a pipe or a device.  ``hidden``: why a link or a
    directory, or a file with a manifest's suffix, could not be looked at.
    """

    files: dict[str, os.stat_result] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)

    def readable(self) -> tuple[list[str], dict[str, str]]:
        """The regular files, sorted; and everything else that may be or hold a manifest, with the reason why it cannot be read."""
        others = {name: "it is no regular file" for name, one in self.files.items() if not stat.S_ISREG(one.st_mode)}
        return sorted(self.files.keys() - others.keys()), {**self.hidden, **others}


def find_manifests(root: Path) -> ManifestFiles:
    """Search a directory and everything below it, through links too; names that begin with a dot are left out.

    Raises OSError when ``root`` itself cannot be listed.
    """
    found = ManifestFiles()
    status = root.stat()
    _search(root, "", {(status.st_dev, status.st_ino)}, found)
    return found


def _search(directory: Path, prefix: str, above: set[tuple[int, int]], found: ManifestFiles) -> None:
    """One directory and those under it; ``above`` stops at links that lead back up."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # also the ..data and timestamp directories of mounted ConfigMaps
                continue
            name = f"{prefix}{entry.name}"
            is_manifest = entry.name.lower().endswith(SUFFIXES)
            try:
                status = entry.stat()
                if stat.S_ISDIR(status.st_mode):
                    here = (status.st_dev, status.st_ino)
                    if here not in above:
                        _search(directory / entry.name, f"{name}/", above | {here}, found)
                elif is_manifest:
                    found.files[name] = status
            except FileNotFoundError:
                if entry.is_symlink():
                    found.hidden[name] = "a link to what is not there"
                # else it went during the search
            except OSError as error:
                if is_manifest or _may_be_directory(entry):
                    found.hidden[name] = error.strerror or str(error)


def _may_be_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() or entry.is_dir(follow_symlinks=False)
    except OSError:  # the file system does not say without a look at the entry
        return True
