# SPDX-License-Identifier: Apache-2.0
"""Modes of the pins: root (or the agent's user) may open all of them, and a group, if one is named, may read most maps.

The group may list the directory of the pins and open maps for reading.  It may not open programs: a process that holds one can
run it, and a run writes connections.  It may not open links, nor the private maps (`abi.MapTrait.PRIVATE`): the order of the
connection tables gives their secret away, and with the secret flows can be aimed at one bucket.  It may pass through the
directory above but not open it, since an open directory can be locked against the agent.

Invariant: what is not for the group is for nobody but the owner.  The module must not know what the maps mean.
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
"""Maps that the group must not read: the hash's secret, the connections (their slots reveal it), working memory."""

_OWNER_OF_DIRECTORY, _OWNER_OF_PIN = 0o700, 0o600
_LIST, _PASS, _READ = 0o050, 0o010, 0o040


def grant(dataplane: Dataplane, group: int | None) -> list[Path]:
    """Give all pins their modes and the group (by number); returns what had other ones.

    Cost: a system call for each pin.  Raises PlatformError if the process may not: only members of a group and
    CAP_CHOWN can give it away.
    """
    return [path for path, mode in _modes(dataplane) if _set(path, mode, group)]


def closed_parent(pin_root: Path, group: int) -> Path | None:
    """The nearest directory above the pins that the group cannot pass; None if it can pass all."""
    for path in reversed(pin_root.absolute().parents):
        seen = path.stat()
        if not seen.st_mode & stat.S_IXOTH and not (seen.st_gid == group and seen.st_mode & stat.S_IXGRP):
            return path
    return None


def _modes(dataplane: Dataplane) -> Iterator[tuple[Path, int]]:
    """(path, mode) of each pin, the group's part included."""
    yield dataplane.pin_root, _OWNER_OF_DIRECTORY | _PASS
    yield dataplane.pin_dir, _OWNER_OF_DIRECTORY | _LIST
    yield dataplane.pin_dir / LINKS, _OWNER_OF_DIRECTORY
    yield dataplane.pin_dir / CURRENT, _OWNER_OF_DIRECTORY
    for name in dataplane.pinned:
        yield dataplane.pin_dir / name, _OWNER_OF_PIN | (0 if name in PRIVATE else _READ)


def _set(path: Path, mode: int, group: int | None) -> bool:
    """Set mode and group of a path; whether it changed. `netpol_loader.pins.drift` handles a missing path."""
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
