# SPDX-License-Identifier: Apache-2.0
"""Drift of the pins, links and filters: find and restore what another process removed or changed.

The open descriptors of this process are the desired state. They keep maps and programs alive even without pins.

Invariants: correct pins and programs are not touched. Every repair is reported. An object of another program is not
removed, unless it is pinned under one of our names. The module must not know the meaning of maps, and must not choose
interfaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader.host.links import find_link
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins import attach, layouts
from netpol_loader.pins.attach import LINKS
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.lock import locked
from netpol_loader.pins.programs import CALL_MAP, CURRENT


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference from the desired state.

    ``kind``: pin, program (on an interface), row, configuration or barrier. ``where``: the object. ``was``: missing,
    foreign or changed.
    """

    kind: str
    where: str
    was: str

    def __str__(self) -> str:
        return f"{self.kind} {self.where} was {self.was}"


class PartlyMendedError(PlatformError):
    """A repair failed. ``found``: the differences that were repaired."""

    def __init__(self, message: str, found: Collection[Drift]) -> None:
        super().__init__(message)
        self.found = found


def mend_pins(dataplane: Dataplane) -> list[Drift]:
    """Restore pins that are missing or replaced by another object. Cost: some system calls for each map and program.

    Raises PartlyMendedError if a pin cannot be restored.
    """
    found: list[Drift] = []
    try:
        found.extend(_mend_pins(dataplane))  # keeps the repairs before an error
    except OSError as error:
        raise PartlyMendedError(
            f"cannot restore the pins in {dataplane.pin_dir}: {error.strerror}; enforcement goes on while this agent runs",
            found,
        ) from error
    return found


def _mend_pins(dataplane: Dataplane) -> Iterator[Drift]:
    for directory in (dataplane.pin_dir / LINKS, dataplane.pin_dir / CURRENT):
        if not directory.is_dir():
            directory.mkdir(parents=True)
            yield Drift("pin", str(directory), "missing")
    with locked(dataplane.pin_root):
        for path, fd, number in _pinned(dataplane):
            was = _state_of(path, number)
            if was is not None:
                if was == "foreign":
                    _remove(path)
                syscall.obj_pin(fd, path)
                yield Drift("pin", str(path), was)
        path = dataplane.pin_dir / layouts.NAME
        was = _state_of_layouts(path)
        if was is not None:
            if was == "foreign":
                _remove(path)
            layouts.save_layouts(dataplane.pin_dir)
            yield Drift("pin", str(path), was)
    for name in dataplane.programs.mend_calls():
        yield Drift("program", f"{name} of {CALL_MAP}", "missing")


def mend_attachments(dataplane: Dataplane, ifindexes: Iterable[int]) -> list[Drift]:
    """Restore our programs on interfaces where they are missing or replaced. Interfaces that are gone are skipped.

    Cost: some system calls for an interface with tcx, some milliseconds for one with clsact. Raises PartlyMendedError
    if an interface could not be restored, after a pass over all interfaces.
    """
    found: list[Drift] = []
    failures: list[str] = []
    ours = {hook: syscall.prog_info(dataplane.program_fd(hook)).id for hook in Hook}
    for ifindex in ifindexes:
        try:
            found += _mend_interface(dataplane, ifindex, ours)
        except (OSError, PlatformError) as error:  # noqa: PERF203 - one failure must not stop the others
            if find_link(ifindex) is not None:  # otherwise the interface was removed meanwhile
                failures.append(error.message if isinstance(error, PlatformError) else f"interface {ifindex}: {error}")
    if failures:
        raise PartlyMendedError("; ".join(failures), found)
    return found


def _mend_interface(dataplane: Dataplane, ifindex: int, ours: Mapping[Hook, int]) -> list[Drift]:
    """Restore the programs on one interface. ``ours``: the id of our program by hook."""
    found, absent = [], set()
    for hook in Hook:
        fd = _try_open(attach.link_path(dataplane, ifindex, hook))
        if fd is None:
            absent.add(hook)
            continue
        with _closing(fd):
            info = syscall.link_info(fd)
            if not info.ifindex:
                absent.add(hook)
            elif info.prog_id != ours[hook]:
                syscall.link_update(fd, dataplane.program_fd(hook))
                found.append(Drift("program", f"{hook.value} of interface {ifindex}", "changed"))
    if absent:
        absent -= {one.hook for one in attach.attached(ifindex, dataplane)}
    if not absent or find_link(ifindex) is None:
        return found
    attach.attach(ifindex, dataplane)
    missing = [Drift("program", f"{hook.value} of interface {ifindex}", "missing") for hook in Hook if hook in absent]
    return found + missing


def _pinned(dataplane: Dataplane) -> Iterator[tuple[Path, int, int]]:
    """Every object that must be pinned, as (path, descriptor, id in the kernel)."""
    for name, one in dataplane.pinned.items():
        yield dataplane.pin_dir / name, one.fd, syscall.map_info(one.fd).id
    for name, fd in dataplane.programs.programs():
        yield dataplane.pin_dir / CURRENT / name, fd, syscall.prog_info(fd).id
    calls = dataplane.programs.calls
    yield dataplane.pin_dir / CURRENT / CALL_MAP, calls.fd, syscall.map_info(calls.fd).id


def _state_of(path: Path, number: int) -> str | None:
    """The state of a pin: missing or foreign. None if it is the object whose id in the kernel is ``number``."""
    fd = _try_open(path)
    if fd is None:
        return "foreign" if path.is_symlink() or path.exists() else "missing"
    with _closing(fd):
        return None if _number_of(fd) == number else "foreign"


def _state_of_layouts(path: Path) -> str | None:
    """The state of the pinned layouts: missing or foreign. None if they are there.

    The dataplane keeps no descriptor of this map, so its name identifies it.
    """
    fd = _try_open(path)
    if fd is None:
        return "foreign" if path.is_symlink() or path.exists() else "missing"
    with _closing(fd):
        is_map = "bpf-map" in Path(f"/proc/self/fd/{fd}").readlink().name
        return None if is_map and syscall.map_info(fd).name == layouts.NAME else "foreign"


def _number_of(fd: int) -> int:
    """The id in the kernel of a map or program. 0, which the kernel never uses, for any other object."""
    kind = Path(f"/proc/self/fd/{fd}").readlink().name
    if "bpf-map" in kind:
        return syscall.map_info(fd).id
    return syscall.prog_info(fd).id if "bpf-prog" in kind else 0


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _try_open(path: Path) -> int | None:
    """Open a pinned object. Returns its descriptor. None if there is no BPF object at the path."""
    try:
        return syscall.obj_get(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.EISDIR, errno.EACCES):
            return None
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
