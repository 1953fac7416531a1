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
from pathlib import Path

from netpol_loader import attach, build, syscall
from netpol_loader.buckets import MORE_NAMES, bucketed
from netpol_loader.dataplane import Dataplane, locked
from netpol_loader.hook import Hook
from netpol_loader.maps import Map

OLD_SUFFIX = "_old"
"""Programs that were in force when an exchange began are pinned under this suffix until it is over."""


class Renewal:
    """The new set. A context manager: what did not take over is gone at the end."""

    def __init__(self, dataplane: Dataplane, fresh: Collection[str], sizes: Mapping[str, int] | None = None) -> None:
        """``fresh``: names of the maps to be made anew; ``sizes``: their max_entries, where not those of the maps in force."""
        self._dataplane = dataplane
        self._fresh = frozenset(fresh) | {more for name, more in MORE_NAMES.items() if name in fresh}
        self._sizes = dict(sizes or {})
        self._staging = dataplane.pin_root / f"new-{os.getpid()}"
        self._maps: dict[str, Map] = {}

    def __enter__(self) -> Renewal:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        with locked(self._dataplane.pin_root):
            _finish_exchange(self._dataplane)
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
        """Build in a directory of our own, where the shared maps are known under the same names."""
        current = self._dataplane
        self._staging.mkdir()
        sizes = {name: one.max_entries for name, one in current.pinned.items()}
        sizes |= {name: size for name, size in self._sizes.items() if name in self._fresh}
        for name in current.pinned.keys() - self._fresh:
            os.link(current.pin_dir / name, self._staging / name)
        build.build(self._staging, sizes)
        self._maps = bucketed({name: Map(syscall.obj_get(self._staging / name)) for name in self._fresh})

    def take_over(self) -> None:
        """Put the new programs in the place of the old on every interface; the dataplane is the new set from then on."""
        current = self._dataplane
        with locked(current.pin_root):
            programs = {}
            for hook in Hook:
                pin, staged = current.pin_dir / hook.value, self._staging / (hook.value + build.NEW_SUFFIX)
                programs[hook] = syscall.obj_get(staged)
                os.link(pin, _old_pin(pin))
                staged.rename(pin)
            maps, self._maps = self._maps, {}
            current.exchange(maps, programs)
            _finish_exchange(current)
            for name in self._fresh:
                (self._staging / name).rename(current.pin_dir / name)

    def _discard(self) -> None:
        for one in self._maps.values():
            one.close()
        self._maps = {}
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._staging)


def _old_pin(pin: Path) -> Path:
    return pin.with_name(pin.name + OLD_SUFFIX)


def _finish_exchange(dataplane: Dataplane) -> None:
    """Put the pinned programs in the place of those that an exchange, ours or a dead process's, is to replace."""
    olds = {hook: _old_pin(dataplane.pin_dir / hook.value) for hook in Hook}
    present = {hook: pin for hook, pin in olds.items() if pin.exists()}
    if not present:
        return
    ids: dict[Hook, set[int]] = {hook: set() for hook in Hook}
    for hook, pin in present.items():
        fd = syscall.obj_get(pin)
        ids[hook].add(syscall.prog_info(fd).id)
        os.close(fd)
    attach.replace(dataplane, ids)
    for pin in present.values():
        pin.unlink()
