# SPDX-License-Identifier: Apache-2.0
"""Renewal: a second set of policy maps and programs, which is filled beside the present set and then replaces it.

A new agent does not know the meaning of the numbers in the present maps, because the process that assigned them has
ended. So the agent fills maps of its own. Then each interface changes from the old programs and maps to the new ones in
one step, so that no packet meets rows of both. Rejected: new numbers in the maps in force, because tables that all
policy sets share cannot change their meaning in one step.

Old and new programs share the maps that are not renewed (connections, counters, configuration, events).

Invariants: before `take_over`, nothing in force is touched. If the process is killed at any instruction, every
interface runs a whole old or a whole new program set, and the next process finishes the exchange or removes the new
set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from netpol_loader import abi
from netpol_loader.kernel.maps import Map
from netpol_loader.pins import build
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.lock import locked
from netpol_loader.pins.programs import ProgramSet
from netpol_loader.pins.staging import Staging
from netpol_loader.tables.buckets import bucketed


class Renewal:
    """The new set. The class is a context manager; its exit removes a set that did not take over."""

    def __init__(self, dataplane: Dataplane, fresh: Collection[str], sizes: Mapping[str, int] | None = None) -> None:
        """``fresh``: names of the maps to make anew.

        ``sizes``: their max_entries by name, if they differ from those in force.
        """
        self._dataplane = dataplane
        self._fresh = frozenset(fresh) | {more for name, more in abi.OVERFLOW_MAPS.items() if name in fresh}
        self._sizes = dict(sizes or {})
        self._staging: Staging | None = None

    def __enter__(self) -> Renewal:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        with locked(self._dataplane.pin_root):
            self._dataplane.finish_exchange()
            self._staging = Staging(self._dataplane.pin_root)
            try:
                self._prepare(self._staging)
            except BaseException:
                self._staging.discard()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._staging is not None:
            self._staging.discard()

    @property
    def maps(self) -> Mapping[str, Map]:
        """All maps of the new set by name: the new, empty ones, and those that it shares with the set in force."""
        return {**self._dataplane.maps, **(self._staging.maps if self._staging is not None else {})}

    def _prepare(self, staging: Staging) -> None:
        """Make the new maps, and load programs that use the new and the shared maps."""
        current = self._dataplane
        sizes = {name: one.max_entries for name, one in current.pinned.items() if name in self._fresh}
        sizes |= {name: size for name, size in self._sizes.items() if name in self._fresh}
        specs = {name: spec for name, spec in abi.MAP_SPECS.items() if name in self._fresh}
        staging.maps = build.make_maps(staging.directory, sizes, specs)
        staging.programs = ProgramSet.load(build.compiled_program(), {**current.pinned, **staging.maps})
        staging.programs.pin(staging.directory)
        staging.maps = bucketed(staging.maps)

    def take_over(self) -> None:
        """Replace the old programs by the new ones on every interface. The dataplane then owns the new set."""
        if self._staging is None:
            raise RuntimeError("a renewal takes over once, between its beginning and its end")
        with locked(self._dataplane.pin_root):
            self._dataplane.exchange(self._staging)
