# SPDX-License-Identifier: Apache-2.0
"""Upgrade from pins of an older schema: new maps and programs are made beside these pins, and then replace them.

Some maps record events and not policy: connections, fragments, counters and learned addresses. Such a map is kept if its
rows, by the layout that the older version saved (`netpol_loader.pins.layouts`), are rows of this version: the new
directory pins the same map a second time. A copy would miss a connection that opens at the last moment. The
configuration is translated field by field. All other maps are new, and the caller must fill them.

There are four steps, each of them atomic. A staging directory is filled while the old programs judge packets. This
directory is renamed to the one of this schema, which begins the exchange. On each interface, the new programs replace
the old ones. The old directory is removed, which ends the exchange.

Invariants: every interface has a whole program set at any instruction. Before the exchange begins, old pins do not
change. If the process is killed, `open_dataplane` of the next process finishes the exchange or removes the new pins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.host import clsact
from netpol_loader.kernel import btf, clock, syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.pins import attach, build, doctor
from netpol_loader.pins.attach import LINKS
from netpol_loader.pins.dataplane import Dataplane, default_config, fill, find_older, following, schema_dir
from netpol_loader.pins.layouts import Layouts, can_keep, load_layouts
from netpol_loader.pins.lock import locked
from netpol_loader.pins.programs import CURRENT, DAMAGED_HINT, program_ids, supersede
from netpol_loader.pins.staging import Staging, remove_unfinished
from netpol_loader.tables.connections import ROWS_PER_BUCKET

log = logging.getLogger(__name__)

LASTING = abi.maps_of(abi.MapRole.CONNECTION, abi.MapRole.COUNTER)
"""Names of the maps that survive a change of schema, if their rows can be kept (`can_keep`)."""

OWN_SETTINGS = frozenset({"jiffies_per_second", "timeout_jiffies", "pad"})
"""Fields of the configuration that are not translated: each version sets them itself."""


class Upgrade:
    """A dataplane of this schema that is not in force yet, beside the older one, which is in force."""

    def __init__(self, dataplane: Dataplane, staging: Staging, older: Path, restarted: Collection[str]) -> None:
        self.dataplane = dataplane
        self._staging = staging
        self.restarted = tuple(restarted)
        self._older = older
        self._in_force: _OlderPrograms | None = None  # opened when an interface needs them

    @property
    def summary(self) -> str:
        """What the upgrade does to open connections, as a text for users."""
        begun = f"schema {self._older.name[1:]} to {abi.SCHEMA_VERSION}"
        lost = [name for name in self.restarted if name in abi.TAG_MAPS]
        if not lost:
            return f"{begun}, connections kept"
        return f"{begun}, open connections judged anew ({', '.join(lost)} of another layout)"

    def numbers(self) -> dict[int, int]:
        """The number of the endpoint of each interface, from the rows of the older schema."""
        with _opened_map(self._older / "np_endpoint") as rows:
            key, value = _known_layouts(rows, load_layouts(self._older))
            ifindex, number = _field(rows, key, "ifindex"), _field(rows, value, "number")
            return {_read(one, ifindex): _read(row, number) for one, row in rows.items()}

    def attached(self) -> set[int]:
        """The interfaces with programs of an older schema.

        These include programs of a still older schema that were not exchanged yet.
        """
        found: set[int] = set()
        for older in find_older(self.dataplane.pin_root):
            found |= attach.listed_interfaces(older / LINKS)
            ours = {number for numbers in program_ids(_sets(older)).values() for number in numbers}
            found |= {
                ifindex for ifindex in clsact.interfaces() for one in clsact.our_filters(ifindex) if one.prog_id in ours
            }
        return found

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> None:
        """Attach the older programs, which are in force, to an interface. Raises PlatformError."""
        if self._in_force is None:
            self._in_force = _OlderPrograms.open(self._older)
        attach.attach(ifindex, self._in_force, is_newborn=is_newborn)

    def drop_rows(self, gone: Collection[int]) -> None:
        """Delete the older rows of interfaces that are gone, and begin a new epoch and generation."""
        with _opened_map(self._older / "np_endpoint") as rows:
            key, _ = _known_layouts(rows, load_layouts(self._older))
            field = _field(rows, key, "ifindex")
            stale = [one for one, _ in rows.items() if _read(one, field) in gone]
            for one in stale:
                rows.delete(one)
        if stale:
            self._renew_caches()

    def _renew_caches(self) -> None:
        """Raise the counters that make the older programs' cached rows invalid."""
        with _opened_map(self._older / "np_config") as one:
            _, layout = _known_layouts(one, load_layouts(self._older))
            for name in ("epoch", "generation"):  # in this order, see `Applier.bump_generation`
                for field in layout:
                    if field.name == name:
                        row = bytearray(one.get(bytes(4)) or b"")
                        value = following(_read(row, field))
                        row[field.at : field.at + field.size] = value.to_bytes(field.size, sys.byteorder)
                        one.put(bytes(4), bytes(row))

    def take_over(self) -> None:
        """Replace the old programs by the new ones on every interface, then remove the old directory."""
        dataplane = self.dataplane
        with locked(dataplane.pin_root):
            target = schema_dir(dataplane.pin_root)
            dataplane.pin_dir.rename(target)
            dataplane.pin_dir = target
            _finish(dataplane)
        self._close_older()
        log.info("upgraded: %s", self.summary)

    def discard(self) -> None:
        """Remove the new directory; the old one stays in force. Does nothing if the new dataplane has taken over."""
        self._close_older()
        self._staging.discard()

    def _close_older(self) -> None:
        if self._in_force is not None:
            self._in_force.close()
            self._in_force = None


@dataclass(frozen=True, slots=True)
class _OlderPrograms:
    """The hooks' programs of an older schema, for `attach`."""

    pin_dir: Path
    hooks: Mapping[Hook, int]

    @classmethod
    def open(cls, older: Path) -> _OlderPrograms:
        """Open the program set in force of an older schema. Raises PlatformError."""
        hooks: dict[Hook, int] = {}
        for directory in (older / CURRENT, older):
            for hook in Hook:
                if hook not in hooks and (directory / hook.value).exists():
                    hooks[hook] = syscall.obj_get(directory / hook.value)
        if len(hooks) < len(Hook):
            raise PlatformError(f"{older} has no programs of both hooks", hint=DAMAGED_HINT)
        return cls(older, hooks)

    def program_fd(self, hook: Hook) -> int:
        """Descriptor of a hook's program."""
        return self.hooks[hook]

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.hooks.values():
            os.close(fd)


def open_dataplane(pin_root: Path, sizes: Mapping[str, int] | None = None) -> tuple[Dataplane, Upgrade | None]:
    """Open the dataplane. If there are pins of an older schema, open a new dataplane that has not taken over yet.

    The second result is then the upgrade; otherwise None. Raises the errors of `Dataplane.open`. Raises PlatformError
    for pins of a newer schema.
    """
    doctor.require_bpffs(pin_root)
    pin_root.mkdir(parents=True, exist_ok=True)
    older = find_older(pin_root)
    if not older:
        return Dataplane.open(pin_root, sizes=sizes), None
    if schema_dir(pin_root).exists():  # a process died during an exchange
        dataplane = Dataplane.open(pin_root, sizes=sizes, beside_older=True)
        with locked(pin_root):
            _finish(dataplane)
        log.info("finished an upgrade that another process had begun")
        return dataplane, None
    with locked(pin_root):
        remove_unfinished(pin_root)
        return _prepare(pin_root, older[-1], dict(sizes or {}))


def _prepare(pin_root: Path, older: Path, sizes: dict[str, int]) -> tuple[Dataplane, Upgrade]:
    staging = Staging(pin_root)
    try:
        saved = load_layouts(older)
        config = _config_of(older, saved)
        restarted = []
        for name in LASTING:
            if saved is not None and name not in saved:  # the older schema had no such map, so nothing is lost
                continue
            reason = _keep(older / name, staging.directory / name, abi.MAP_SPECS[name], sizes, saved)
            if reason:
                restarted.append(name)
                log.warning("%s of %s is not kept: %s", name, older, reason)
        fill(staging, sizes, config)
        dataplane = Dataplane(pin_root, *staging.taken(), staging.directory)
    except BaseException:
        staging.discard()
        raise
    upgrade = Upgrade(dataplane, staging, older, restarted)
    log.info("prepared an upgrade of %s: %s", older, upgrade.summary)
    return dataplane, upgrade


def _keep(
    old: Path, new: Path, spec: abi.MapSpec, sizes: dict[str, int], saved: Mapping[str, Layouts] | None
) -> str | None:
    """Pin an old map also in the new directory, and store its size in ``sizes``.

    ``saved``: as in `_layouts`, the layouts that the older version saved; None: none.  Returns None if the map is kept,
    otherwise the reason why it cannot be kept.
    """
    if not old.exists():
        return "there is none"
    with _opened_map(old) as one:
        if one.type != spec.kind:
            return f"it is of type {one.type}, not {spec.kind}"
        found, wanted = _layouts(one, saved), (btf.declared(spec.key), btf.declared(spec.value))
        if (one.key_size, one.value_size) != (spec.key_size, spec.value_size) or not (
            found and can_keep(found, wanted)
        ):
            return "its layout is another" if found is not None else "its layout is not known"
        is_table = spec.name in {*abi.TAG_MAPS, *abi.TAG_MAPS.values()}  # a bucketed table, for which any size fits
        asked = build.kernel_sizes(sizes)[spec.name] if spec.name in sizes else spec.max_entries
        if spec.kind.endswith("array") and one.max_entries < asked and not is_table:
            return f"it has {one.max_entries} entries, not {asked}"
        if spec.name in sizes and one.max_entries != asked:
            log.warning("map %s keeps its size of %d; %d was asked for", spec.name, one.max_entries, asked)
        if spec.name in abi.TAG_MAPS:
            sizes[spec.name] = one.max_entries // abi.NP_CONN_WAYS * ROWS_PER_BUCKET
        elif not is_table:
            sizes[spec.name] = one.max_entries
    os.link(old, new)
    return None


def _config_of(older: Path, saved: Mapping[str, Layouts] | None) -> abi.np_config:
    """The configuration of the older dataplane in this version's layout.

    It has the agent's settings, and the generation of the connections.
    """
    config = default_config(clock.measure_jiffies_per_second())
    with _opened_map(older / "np_config") as one:
        _, layout = _known_layouts(one, saved)
        row = one.get(bytes(4)) or b""
        _field(one, layout, "generation")  # without it, a cut connection would look like an open one
        for name, *_ in abi.np_config._fields_:
            size = getattr(abi.np_config, name).size
            for field in layout:
                if field.name == name and field.size == size and name not in OWN_SETTINGS:
                    setattr(config, name, _read(row, field))
    return config


def _finish(dataplane: Dataplane) -> None:
    """Replace the older programs that are still attached, then remove the older directories."""
    for older in find_older(dataplane.pin_root):

        def replace(old: Mapping[Hook, set[int]], links: Path = older / LINKS) -> None:
            attach.take_links(dataplane, links)
            attach.replace(dataplane, old)

        supersede(_sets(older), replace)
        shutil.rmtree(older)


def _sets(directory: Path) -> list[Path]:
    """The directories with programs.

    Before schema 6, this was the directory of the maps. Since then, there is one for each set, and two during an
    exchange.
    """
    return [directory, *directory.glob("programs*")]


def _layouts(one: Map, saved: Mapping[str, Layouts] | None) -> Layouts | None:
    """The layouts of an older map; None if they are not known.

    ``saved``: the layouts that its version saved; None: it saved none, so the kernel is asked, which needs CAP_SYS_ADMIN.
    """
    return btf.layouts(syscall.map_info(one.fd)) if saved is None else saved.get(one.name)


def _known_layouts(one: Map, saved: Mapping[str, Layouts] | None) -> Layouts:
    found = _layouts(one, saved)
    if found is None:
        raise PlatformError(
            f"the layout of map {one.name} is not known, so it cannot be upgraded",
            hint="Start the version that made it, which goes on; or end enforcement with `netpolctl cleanup`, then start this one.",
        )
    return found


def _field(one: Map, layout: btf.Layout, name: str) -> btf.Field:
    for field in layout:
        if field.name == name and field.size <= struct.calcsize("=Q"):
            return field
    raise PlatformError(
        f"map {one.name} of the older schema has no field {name}, so it cannot be upgraded",
        hint="Start the version that made it, which goes on; or end enforcement with `netpolctl cleanup`, then start this one.",
    )


def _read(raw: bytes, field: btf.Field) -> int:
    return int.from_bytes(raw[field.at : field.at + field.size], sys.byteorder)


@contextlib.contextmanager
def _opened_map(path: Path) -> Iterator[Map]:
    try:
        one = Map(syscall.obj_get(path))
    except OSError as error:
        raise PlatformError(
            f"{path} cannot be opened: {error.strerror}",
            hint=DAMAGED_HINT,
        ) from error
    try:
        yield one
    finally:
        one.close()
