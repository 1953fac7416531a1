# SPDX-License-Identifier: Apache-2.0
"""Attach the programs to interfaces, list the attached ones, detach them.

There are two mechanisms. *tcx* (Linux 6.6 and newer): a link that is pinned under the dataplane's ``links``. A link
outlives the process, and its program can be replaced in one step. *clsact*: a filter on a queueing discipline, through
`netpol_loader.host.clsact`. The kernel keeps the filter as long as the interface exists. The filter's name contains the
program's id.

Invariants: a second attachment of an attached program changes nothing. During an exchange, an interface has a program
at every moment. Only our own programs are ever detached. The module must not choose interfaces.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from netpol_ebpf.errors import PlatformError
from netpol_loader.host import clsact
from netpol_loader.host.links import find_link
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook

if TYPE_CHECKING:
    from netpol_loader.pins.dataplane import Dataplane

ATTACH_TYPES: Mapping[Hook, int] = {Hook.TC_INGRESS: syscall.TCX_INGRESS, Hook.TC_EGRESS: syscall.TCX_EGRESS}
SUFFIXES: Mapping[Hook, str] = {Hook.TC_INGRESS: "_in", Hook.TC_EGRESS: "_out"}

LINKS = "links"
CLSACT_MARK = "_clsact"
NO_INTERFACE = 0x7FFF_FFFF
"""An interface index that cannot exist. An attachment to it never succeeds, but shows whether the kernel has tcx."""


class Mechanism(enum.Enum):
    """How a program is attached."""

    TCX = "tcx"
    CLSACT = "clsact"


class PinnedPrograms(Protocol):
    """Programs in force, and the directory with the pins of their links. `Dataplane` is one."""

    @property
    def pin_dir(self) -> Path: ...  # noqa: D102 - its ``links`` has the pins

    def program_fd(self, hook: Hook) -> int:
        """Descriptor of a hook's program."""


@dataclass(frozen=True, slots=True, order=True)
class Attachment:
    """One program on one interface. ``prog_id``: the kernel's id of the program."""

    ifindex: int
    hook: Hook
    mechanism: Mechanism
    prog_id: int


def preferred_mechanism(dataplane: PinnedPrograms) -> Mechanism:
    """The best mechanism of this kernel: tcx if the kernel has it, otherwise clsact."""
    try:
        fd = syscall.link_create(dataplane.program_fd(Hook.TC_INGRESS), NO_INTERFACE, syscall.TCX_INGRESS)
    except OSError as error:
        return Mechanism.TCX if error.errno == errno.ENODEV else Mechanism.CLSACT
    os.close(fd)
    raise AssertionError("attached to an interface that cannot exist")


def attach(
    ifindex: int, dataplane: PinnedPrograms, mechanism: Mechanism | None = None, *, is_newborn: bool = False
) -> None:
    """Attach both programs to an interface. A program that is already attached stays.

    ``mechanism``: for programs that are not attached yet; None: the preferred one. ``is_newborn``: the interface has
    just appeared, so it has no filters of ours. The call then saves the query for filters, which takes longer than
    everything else. Raises PlatformError if the interface is gone, or the kernel refuses.
    """
    found = _tcx_attachments(dataplane, ifindex)
    if not is_newborn:
        found |= _clsact_attachments(dataplane, ifindex)
    present = {one.hook: one for one in found}
    for hook in Hook:
        if hook in present:
            continue
        chosen = mechanism or preferred_mechanism(dataplane)
        try:
            if chosen is Mechanism.TCX:
                _attach_tcx(ifindex, dataplane, hook)
            else:
                _attach_clsact(ifindex, dataplane, hook)
        except OSError as error:
            raise PlatformError(
                f"cannot record in {dataplane.pin_dir / LINKS} that {hook.value} is attached to interface {ifindex}: {error.strerror}"
            ) from error


def detach(ifindex: int, dataplane: Dataplane) -> bool:
    """Detach both programs from an interface. Returns False if it had none.

    If the interface is gone, only its pins and marks are removed. Raises PlatformError.
    """
    found = attached(ifindex, dataplane)
    for one in found:
        try:
            _detach(one, dataplane)
        except (OSError, PlatformError) as error:  # noqa: PERF203 - two at most
            if find_link(ifindex) is not None:  # otherwise the programs are gone with the interface
                what = error.message if isinstance(error, PlatformError) else error.strerror
                raise PlatformError(
                    f"cannot detach {one.hook.value} from interface {ifindex}, where it goes on enforcing: {what}"
                ) from error
    if _clsact_mark(dataplane, ifindex).exists():
        clsact.delete_if_unused(ifindex)
    _forget_dead(dataplane, ifindex)
    return bool(found)


def _detach(one: Attachment, dataplane: Dataplane) -> None:
    if one.mechanism is Mechanism.CLSACT:
        clsact.delete_filter(one.ifindex, one.hook)
        return
    path = link_path(dataplane, one.ifindex, one.hook)
    with _opened(path) as fd:
        syscall.link_detach(fd)  # takes effect at once; unpinning alone takes effect later
    path.unlink()


def attached(ifindex: int, dataplane: Dataplane) -> tuple[Attachment, ...]:
    """The attachments of our programs to an interface, by either mechanism."""
    return tuple(sorted(_tcx_attachments(dataplane, ifindex) | _clsact_attachments(dataplane, ifindex), key=_order))


def attachments(dataplane: Dataplane) -> tuple[Attachment, ...]:
    """All attachments of our programs in this network namespace."""
    found = set(_tcx_attachments(dataplane))
    for ifindex in clsact.interfaces():
        found |= _clsact_attachments(dataplane, ifindex)
    return tuple(sorted(found, key=_order))


def others(ifindex: int, dataplane: Dataplane) -> list[str]:
    """The programs of others on an interface's ingress hook, for messages: tcx by id, clsact by name."""
    ours = syscall.prog_info(dataplane.program_fd(Hook.TC_INGRESS)).id
    found: list[str] = []
    with contextlib.suppress(OSError):  # the interface is gone, or the kernel has no tcx
        numbers = syscall.prog_query(ifindex, ATTACH_TYPES[Hook.TC_INGRESS])
        found += [f"tcx program {number}" for number in numbers if number != ours]
    return found + [f"filter {name}" for name in clsact.foreign_filters(ifindex, Hook.TC_INGRESS)]


def detach_all(dataplane: Dataplane) -> None:
    """Detach our programs from every interface."""
    for ifindex in {one.ifindex for one in attachments(dataplane)}:
        detach(ifindex, dataplane)
    prune(dataplane)


def prune(dataplane: Dataplane, present: Collection[int] = ()) -> None:
    """Remove the pins and the clsact marks of interfaces that are gone.

    ``present``: interfaces that are known to exist, and need no check.
    """
    for ifindex in {int(path.name.partition("_")[0]) for path in _listed(dataplane)} - set(present):
        _forget_dead(dataplane, ifindex)


def replace(dataplane: Dataplane, old: Mapping[Hook, Collection[int]]) -> None:
    """Replace our programs on every interface by those of this dataplane.

    ``old``: ids of the programs to replace on clsact.
    """
    for path in _link_paths(dataplane):
        _update_link(dataplane, path)
    for ifindex in clsact.interfaces():
        for one in clsact.our_filters(ifindex):
            if one.prog_id in old[one.hook]:
                _put_filter(ifindex, dataplane, one.hook)


def take_links(dataplane: Dataplane, links: Path) -> None:
    """Take over the tcx links and clsact marks in another directory: replace their programs, move the pins.

    If the process is killed meanwhile, the next call takes over the rest, which is still in the other directory.
    """
    for path in sorted(links.iterdir()) if links.is_dir() else ():
        target = dataplane.pin_dir / LINKS / path.name
        if path.name.endswith(CLSACT_MARK):
            target.mkdir(parents=True, exist_ok=True)
            path.rmdir()
        elif _update_link(dataplane, path):
            path.rename(target)
        else:
            path.unlink()  # its interface is gone


def listed_interfaces(links: Path) -> set[int]:
    """The interfaces of the tcx links that are pinned in a directory."""
    found = set()
    for path in sorted(links.iterdir()) if links.is_dir() else ():
        if not path.name.endswith(CLSACT_MARK):
            with _opened(path) as fd:
                found.add(syscall.link_info(fd).ifindex)
    return found - {0}


def _update_link(dataplane: Dataplane, path: Path) -> bool:
    """Put our program on a link. Returns False if the link's interface is gone."""
    with _opened(path) as fd:
        info = syscall.link_info(fd)
        if info.ifindex:
            hook = next(hook for hook, kind in ATTACH_TYPES.items() if kind == info.attach_type)
            syscall.link_update(fd, dataplane.program_fd(hook))
    return bool(info.ifindex)


def _order(one: Attachment) -> tuple[int, str, str]:
    return (one.ifindex, one.hook.value, one.mechanism.value)


def _attach_tcx(ifindex: int, dataplane: PinnedPrograms, hook: Hook) -> None:
    path = link_path(dataplane, ifindex, hook)
    path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
    path.unlink(missing_ok=True)  # the pin of a former interface with this index
    try:
        # First, as with clsact: another program that lets a packet pass must not run before policy.
        fd = syscall.link_create(dataplane.program_fd(hook), ifindex, ATTACH_TYPES[hook], syscall.BPF_F_BEFORE)
    except OSError as error:
        raise PlatformError(f"cannot attach {hook.value} to interface {ifindex}: {error.strerror}") from error
    try:
        syscall.obj_pin(fd, path)
    finally:
        os.close(fd)


def _attach_clsact(ifindex: int, dataplane: PinnedPrograms, hook: Hook) -> None:
    if clsact.add(ifindex):
        _clsact_mark(dataplane, ifindex).mkdir(parents=True, exist_ok=True)
    _put_filter(ifindex, dataplane, hook)


def _put_filter(ifindex: int, dataplane: PinnedPrograms, hook: Hook) -> None:
    prog_fd = dataplane.program_fd(hook)
    clsact.put_filter(ifindex, hook, prog_fd, syscall.prog_info(prog_fd).id)


def _clsact_mark(dataplane: PinnedPrograms, ifindex: int) -> Path:
    """A directory that marks an interface's clsact as ours, so that `detach` removes it.

    A file is not possible in bpffs.
    """
    return dataplane.pin_dir / LINKS / f"{ifindex}{CLSACT_MARK}"


def link_path(dataplane: PinnedPrograms, ifindex: int, hook: Hook) -> Path:
    """The path of a tcx link's pin."""
    return dataplane.pin_dir / LINKS / f"{ifindex}{SUFFIXES[hook]}"


def _link_paths(dataplane: PinnedPrograms, ifindex: int | None = None) -> list[Path]:
    if ifindex is not None:
        return [path for hook in Hook if (path := link_path(dataplane, ifindex, hook)).exists()]
    return [path for path in _listed(dataplane) if not path.name.endswith(CLSACT_MARK)]


def _listed(dataplane: PinnedPrograms) -> list[Path]:
    """The paths of all pins and marks of interfaces. Empty if somebody removed their directory."""
    try:
        return sorted((dataplane.pin_dir / LINKS).iterdir())
    except FileNotFoundError:
        return []


def _tcx_attachments(dataplane: PinnedPrograms, ifindex: int | None = None) -> set[Attachment]:
    found = set()
    for path in _link_paths(dataplane, ifindex):
        with _opened(path) as fd:
            info = syscall.link_info(fd)
        if info.ifindex:
            hook = next(hook for hook, kind in ATTACH_TYPES.items() if kind == info.attach_type)
            found.add(Attachment(info.ifindex, hook, Mechanism.TCX, info.prog_id))
    return found


def _clsact_attachments(dataplane: PinnedPrograms, ifindex: int) -> set[Attachment]:
    ours = {syscall.prog_info(dataplane.program_fd(hook)).id for hook in Hook}
    return {
        Attachment(ifindex, one.hook, Mechanism.CLSACT, one.prog_id)
        for one in clsact.our_filters(ifindex)
        if one.prog_id in ours
    }


def _forget_dead(dataplane: Dataplane, ifindex: int) -> None:
    """Remove the pins and marks of an interface that is gone.

    If the interface has moved to another network namespace, this detaches its programs, which would find no endpoint
    row there.
    """
    is_here = find_link(ifindex) is not None
    for path in _link_paths(dataplane, ifindex):
        with _opened(path) as fd:
            alive = syscall.link_info(fd).ifindex
        if not alive or not is_here:
            path.unlink()
    mark = _clsact_mark(dataplane, ifindex)
    if mark.exists() and not clsact.is_on(ifindex):
        mark.rmdir()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = syscall.obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)
