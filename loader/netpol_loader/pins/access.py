# SPDX-License-Identifier: Apache-2.0
"""Modes of the pins. Root (or the agent's user) may open all pins; a group, if one is set, may read most maps.

The group may list the directory of the pins, and open maps for reading. There are four exceptions.

- The group may not open programs. A process that has opened a program can run it, and a run writes connections.
- The group may not open links.
- The group may not open private maps (`abi.MapTrait.PRIVATE`). The order of the connection tables reveals the secret of
  their hash, and whoever knows the secret can direct flows to one bucket.
- The group may pass through the parent directory, but not open it. A process with an open directory can lock it
  (flock(2)) against the agent.

Invariant: what the group may not access, only the owner may. The module must not know the meaning of maps.
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
"""Names of the maps that the group must not read.

They are the secret of the hash, the connections, whose slots reveal the secret, and the working memory.
"""

_OWNER_OF_DIRECTORY, _OWNER_OF_PIN = 0o700, 0o600
_LIST, _PASS, _READ = 0o050, 0o010, 0o040


def grant(dataplane: Dataplane, group: int | None) -> list[Path]:
    """Set the mode and the group of all pins. ``group``: its number; None: no group. Returns the paths that changed.

    Cost: a system call for each pin. Raises PlatformError without the permission: only a member of a group, or a
    process with CAP_CHOWN, can give a file to the group.
    """
    return [path for path, mode in _modes(dataplane) if _set(path, mode, group)]


def closed_parent(pin_root: Path, group: int) -> Path | None:
    """The topmost directory above the pins that the group may not pass. None if the group may pass all of them."""
    for path in reversed(pin_root.absolute().parents):
        seen = path.stat()
        if not seen.st_mode & stat.S_IXOTH and not (seen.st_gid == group and seen.st_mode & stat.S_IXGRP):
            return path
    return None


def _modes(dataplane: Dataplane) -> Iterator[tuple[Path, int]]:
    """The path and the mode of each pin. The mode includes the permissions of the group."""
    yield dataplane.pin_root, _OWNER_OF_DIRECTORY | _PASS
    yield dataplane.pin_dir, _OWNER_OF_DIRECTORY | _LIST
    yield dataplane.pin_dir / LINKS, _OWNER_OF_DIRECTORY
    yield dataplane.pin_dir / CURRENT, _OWNER_OF_DIRECTORY
    for name in dataplane.pinned:
        yield dataplane.pin_dir / name, _OWNER_OF_PIN | (0 if name in PRIVATE else _READ)


def _set(path: Path, mode: int, group: int | None) -> bool:
    """Set the mode and the group of a path. Returns whether they changed.

    A missing path is skipped; `drift` restores it.
    """
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
