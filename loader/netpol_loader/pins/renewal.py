# SPDX-License-Identifier: Apache-2.0
"""A second set of maps and programs beside those in force, to be filled in peace and then to take their place.

For a writer that does not know what the numbers in the present maps mean (the process that knew is gone): it fills maps of
its own, and each interface passes from the old programs and maps to the new ones in one exchange.  So no packet ever meets
rows of both.  Renumbering inside the maps in force was rejected: tables that all policy sets share cannot change meaning in
one step.

Maps that are not made anew (connections, counters, configuration, events) are the same maps for both programs.
Invariants: until `take_over` nothing in force is touched; killed at any instruction, every interface runs a whole old or a
whole new program, and `prepare` of the next process finishes or forgets what was begun.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping

from netpol_loader import abi
from netpol_loader.kernel.maps import Map
from netpol_loader.pins import build
from netpol_loader.pins.dataplane import Dataplane, locked
from netpol_loader.pins.programs import ProgramSet
from netpol_loader.tables.buckets import bucketed


class Renewal:
    """The new set. A context manager: what did not take over is gone at the end."""

    def __init__(self, dataplane: Dataplane, fresh: Collection[str], sizes: Mapping[str, int] | None = None) -> None:
        """``fresh``: names of the maps to be made anew; ``sizes``: their max_entries, where not those of the maps in force."""
        self._dataplane = dataplane
        self._fresh = frozenset(fresh) | {more for name, more in abi.OVERFLOW_MAPS.items() if name in fresh}
        self._sizes = dict(sizes or {})
        self._staging = dataplane.pin_root / f"new-{os.getpid()}"
        self._maps: dict[str, Map] = {}
        self._programs: ProgramSet | None = None

    def __enter__(self) -> Renewal:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        with locked(self._dataplane.pin_root):
            self._dataplane.finish_exchange()
            try:
                self._prepare()
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    @property
    def maps(self) -> Mapping[str, Map]:
        """All maps of the new set: empty ones, and those it shares with the one in force."""
        return {**self._dataplane.maps, **self._maps}

    def _prepare(self) -> None:
        """Build in a directory of our own: the new maps, and programs on those and on the maps that are shared."""
        current = self._dataplane
        self._staging.mkdir()
        sizes = {name: one.max_entries for name, one in current.pinned.items() if name in self._fresh}
        sizes |= {name: size for name, size in self._sizes.items() if name in self._fresh}
        specs = {name: spec for name, spec in abi.MAP_SPECS.items() if name in self._fresh}
        self._maps = build.make_maps(self._staging, sizes, specs)
        self._programs = ProgramSet.load(build.compiled_program(), {**current.pinned, **self._maps})
        self._programs.pin(self._staging)
        self._maps = bucketed(self._maps)

    def take_over(self) -> None:
        """Put the new programs in the place of the old on every interface; the dataplane is the new set from then on."""
        programs, self._programs = self._programs, None
        if programs is None:
            raise RuntimeError("a renewal takes over once, between its beginning and its end")
        maps, self._maps = self._maps, {}
        with locked(self._dataplane.pin_root):
            self._dataplane.exchange(self._staging, maps, programs)

    def _discard(self) -> None:
        for one in self._maps.values():
            one.close()
        self._maps = {}
        if self._programs is not None:
            self._programs.close()
            self._programs = None
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._staging)
