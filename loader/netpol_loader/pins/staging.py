# SPDX-License-Identifier: Apache-2.0
"""Staging: maps and programs in a directory of their own, which come into force as a whole or are removed.

All maps and program sets are made in such a directory: at a first start, for new programs, for new maps, and for a
newer schema.

Invariants: nothing in force refers to a staging directory. If a process dies, the next process that holds the lock
removes its directory (`remove_unfinished`). The module must not know the meaning of maps.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from netpol_loader.kernel.maps import Map
from netpol_loader.pins.programs import ProgramSet

log = logging.getLogger(__name__)

PREFIX = "new-"
"""The beginning of the directory's name. The process id follows it."""


class Staging:
    """A staging directory, with the descriptors of its pins.

    The class is a context manager; its exit calls `discard`.
    """

    def __init__(self, pin_root: Path) -> None:
        """Make the directory. Raises OSError."""
        self.directory = pin_root / f"{PREFIX}{os.getpid()}"
        self.maps: Mapping[str, Map] = {}
        self.programs: ProgramSet | None = None
        self.directory.mkdir()

    def taken(self) -> tuple[Mapping[str, Map], ProgramSet]:
        """Give the descriptors to the caller, who must close them.

        May be called once, and only if programs were loaded.
        """
        if self.programs is None:
            raise RuntimeError("what is staged is taken once, after its programs were loaded")
        maps, programs = self.maps, self.programs
        self.maps, self.programs = {}, None
        return maps, programs

    def discard(self) -> None:
        """Close the maps and programs that the caller has not taken, and remove the directory.

        The directory stays if it was renamed, because it is then in force.
        """
        for one in self.maps.values():
            one.close()
        if self.programs is not None:
            self.programs.close()
        self.maps, self.programs = {}, None
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def __enter__(self) -> Staging:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def remove_unfinished(pin_root: Path) -> None:
    """Remove the staging directories of dead processes.

    The caller must hold the lock, so that no owner is still at work.
    """
    for path in pin_root.glob(f"{PREFIX}*"):
        log.warning("removing %s, left by a process that died", path)
        shutil.rmtree(path)
