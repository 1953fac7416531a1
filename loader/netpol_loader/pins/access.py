# SPDX-License-Identifier: Apache-2.0
"""Modes of the pins: root (or the agent's user) may open all of them; a group, if one is set, may read most maps.

The group may list the directory of the pins and open maps for reading, with three exceptions.  It may not open
programs: a process that has a program open can run it, and a run writes connections.  It may not open links.  It may
not open private maps (`abi.MapTrait.PRIVATE`): the order of the connection tables reveals the secret of their hash, and
with the secret one can direct flows to one bucket.  The group may pass through the parent directory but not open it: a
process with an open directory can lock it (flock(2)) against the agent.

Invariant: only the owner has access to what the group has not.  The module must not know what the maps mean.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.pins.attach import LINKS
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.programs import CURRENT

PRIVATE = frozenset(abi.maps_with(abi.MapTrait.PRIVATE))
"""Maps that the group must not read: the hash's secret, connections (their slots reveal it), working memory."""

_OWNER_OF_DIRECTORY, _OWNER_OF_PIN = 0o700, 0o600
_LIST, _PASS, _READ = 0o050, 0o010, 0o040


def grant(dataplane: Dataplane, group: int | None) -> list[Path]:
    """Set mode and group (by number) of all pins; returns the paths that changed.

    Cost: a system call for each pin.  Raises PlatformError without the permission: only members of a group, and
    processes with CAP_CHOWN, can give a file to it.
    """
    return [path for path, mode in _modes(dataplane) if _set(path, mode, group)]


def closed_parent(pin_root: Path, group: int) -> Path | None:
    """The topmost directory above the pins that the group cannot pass; None if it can pass all."""
    for path in reversed(pin_root.absolute().parents):
        seen = path.stat()
        if not seen.st_mode & stat.S_IXOTH and not (seen.st_gid == group and seen.st_mode & stat.S_IXGRP):
            return path
    return None


def _modes(dataplane: Dataplane) -> Iterator[tuple[Path, int]]:
    """(path, mode) of each pin; the mode includes the group's permissions."""
    yield dataplane.pin_root, _OWNER_OF_DIRECTORY | _PASS
    yield dataplane.pin_dir, _OWNER_OF_DIRECTORY | _LIST
    yield dataplane.pin_dir / LINKS, _OWNER_OF_DIRECTORY
    yield dataplane.pin_dir / CURRENT, _OWNER_OF_DIRECTORY
    for name in dataplane.pinned:
        yield dataplane.pin_dir / name, _OWNER_OF_PIN | (0 if name in PRIVATE else _READ)


def _set(path: Path, mode: int, group: int | None) -> bool:
    """Set mode and group of a path; returns whether it changed. Skips a missing path, which `drift` restores."""
    wanted = mode if group is not None else mode & ~0o070
    try:
        seen = path.stat()
        is_group_right = group is None or not mode & 0o070 or seen.st_gid == group
        if is_group_right and stat.S_IMODE(seen.st_mode) == wanted:
            return False
        if not is_group_right and group is not None:
            os.chown(path, -1, group)
        path.chmod(wanted)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        raise PlatformError(
            f"cannot give {path} to the group with the number {group}: {error.strerror}",
            hint="Run the agent as a member of that group (systemd: SupplementaryGroups=), or with CAP_CHOWN.",
        ) from error
    return True
