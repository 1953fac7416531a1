# SPDX-License-Identifier: Apache-2.0
"""Removal: find all our objects of one pin root, and remove them one by one. Each is reported by name.

This works with pins of any version and in any state, because it builds, adopts and repairs nothing.

Invariants: only three kinds of objects are ours: those that are pinned below the root, filters that run programs pinned
there, and tables whose comment names the root. The objects are removed in the order of the list. The tables of the
second barrier come first, because they would drop the packets of workloads as soon as no program sets the sign. Filters
of clsact and tables are found only in the caller's network namespace.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader.host import clsact
from netpol_loader.host.barrier import TABLE, BarrierTables, HeldError
from netpol_loader.host.links import list_links
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins import staging
from netpol_loader.pins.attach import CLSACT_MARK, LINKS

OUR_DIRECTORY = re.compile(rf"(v|{staging.PREFIX})\d+")
HOOKS = tuple(hook.value for hook in Hook)
PROGRAMS = "np_tc_"


@dataclass(frozen=True, slots=True)
class Leftover:
    """One object of ours.

    ``kind``: table, link, filter, qdisc, map, program or directory. ``name``: text for administrators. ``remove``:
    removes the object.
    """

    kind: str
    name: str
    remove: Callable[[], None]


def find_leftovers(pin_root: Path) -> list[Leftover]:
    """All our objects, in the order of removal."""
    directories = [path for path in _listed(pin_root) if path.is_dir() and OUR_DIRECTORY.fullmatch(path.name)]
    names = {link.ifindex: link.name for link in list_links()}
    found: list[Leftover] = list(_tables(pin_root))
    for directory in directories:
        found += _links(directory / LINKS, names)
    found += _filters({number for directory in directories for number in _program_ids(directory)}, names)
    for directory in directories:
        found += _qdiscs(directory / LINKS, names)
    for directory in directories:
        found += _pins(directory)
    if pin_root.is_dir() and all(path in directories for path in _listed(pin_root)):
        found.append(Leftover("directory", str(pin_root), pin_root.rmdir))
    return found


def _listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _tables(pin_root: Path) -> Iterator[Leftover]:
    tables = BarrierTables(str(pin_root.absolute()))
    try:
        families = tables.present()
    except HeldError:
        raise  # an agent is running: without its programs the tables would drop all packets
    except PlatformError:  # there are no tables, or another owner has them
        return
    finally:
        tables.close()
    for family in families:
        yield Leftover("table", f"{family} {TABLE}", lambda family=family: _remove_table(pin_root, family))  # type: ignore[misc]


def _remove_table(pin_root: Path, family: str) -> None:
    tables = BarrierTables(str(pin_root.absolute()))
    try:
        tables.remove(family)
    finally:
        tables.close()


def _links(links: Path, names: dict[int, str]) -> Iterator[Leftover]:
    for path in _listed(links):
        if path.name.endswith(CLSACT_MARK):
            continue
        with _opened(path) as fd:
            ifindex = syscall.link_info(fd).ifindex
        where = f"of interface {names.get(ifindex, ifindex)}" if ifindex else "of an interface that is gone"
        yield Leftover("link", f"{path} {where}", lambda path=path: _detach(path))  # type: ignore[misc]  # bound in the loop


def _detach(path: Path) -> None:
    with _opened(path) as fd:
        syscall.link_detach(fd)
    path.unlink()


def _program_ids(directory: Path) -> Iterator[int]:
    for path in [*_listed(directory), *(path for each in directory.glob("programs*") for path in _listed(each))]:
        if path.name.startswith(HOOKS):
            with _opened(path) as fd:
                yield syscall.prog_info(fd).id


def _filters(programs: set[int], names: dict[int, str]) -> Iterator[Leftover]:
    for ifindex in sorted(clsact.interfaces()):
        for one in clsact.our_filters(ifindex):
            if one.prog_id in programs:
                yield Leftover(
                    "filter",
                    f"{one.hook.value} on interface {names.get(ifindex, ifindex)}",
                    lambda ifindex=ifindex, hook=one.hook: clsact.delete_filter(ifindex, hook),  # type: ignore[misc]
                )


def _qdiscs(links: Path, names: dict[int, str]) -> Iterator[Leftover]:
    for path in _listed(links):
        number = path.name.removesuffix(CLSACT_MARK)
        if path.name.endswith(CLSACT_MARK) and number.isdecimal() and int(number) in names:
            yield Leftover(
                "qdisc",
                f"clsact of interface {names[int(number)]}, unless others use it",
                lambda ifindex=int(number): clsact.delete_if_unused(ifindex),  # type: ignore[misc]
            )


def _pins(directory: Path) -> Iterator[Leftover]:
    for path in _listed(directory):
        if path.is_dir():
            yield from _pins(path)
        elif directory.name != LINKS:  # links are listed before
            yield Leftover("program" if path.name.startswith(PROGRAMS) else "map", str(path), path.unlink)
    yield Leftover("directory", str(directory), directory.rmdir)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = syscall.obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)
