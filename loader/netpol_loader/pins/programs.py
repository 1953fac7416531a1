# SPDX-License-Identifier: Apache-2.0
"""A program set: the hooks' programs, the programs that they tail-call, and the program array of these calls.

The parts belong together. Each set has a program array of its own, so that a hook's program never calls a program of
another set. The kernel empties a program array that user space neither pins nor has open. So the array is pinned as
long as a hook may run its set. A set is pinned in one directory:

    PIN_DIR/programs        the set in force, or about to be
    PIN_DIR/programs_new    a whole set that is not in force
    PIN_DIR/programs_old    the previous set, while hooks may still run it

A set is replaced in four steps, each of them atomic. One rename makes ``programs_new`` appear as a whole. ``programs``
is renamed to ``programs_old``. ``programs_new`` is renamed to ``programs``, which begins the exchange. ``programs_old``
is removed when every hook runs ``programs``. New policy maps that come with a set are pinned in its directory until the
exchange is over.

Invariant: if the process is killed between two steps, `recover` and `finish_exchange` of the next process remove the
new set or finish the exchange. The module must not know the meaning of programs or maps, and must not attach anything.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.facts import kernel_facts
from netpol_loader.kernel.grace import order_stores, wait_for_readers
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.kernel.relocation import link, load_program
from netpol_loader.pins.compiled import Compiled

CURRENT, NEW, OLD = "programs", "programs_new", "programs_old"
DAMAGED_HINT = (
    "The pin directory is damaged. `netpolctl cleanup` removes it and ends all enforcement of this node until an agent has started "
    "again: see first whether the right BPF file system is mounted there (netpolctl doctor)."
)
CALL_MAP = "np_call"
_SLOT = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class ProgramSet:
    """The descriptors of one program set. `close` closes them.

    ``hooks``: programs by hook. ``called``: tail-called programs by slot. ``calls``: the program array.
    """

    hooks: Mapping[Hook, int]
    called: Mapping[int, int]
    calls: Map

    @classmethod
    def load(cls, compiled: Compiled, maps: Mapping[str, Map]) -> ProgramSet:
        """Load all programs with these maps, and with a program array of their own. Raises LoadError and OSError."""
        calls = Map(syscall.map_create("prog_array", CALL_MAP, _SLOT.size, _SLOT.size, len(abi.CALLS)))
        every = {**{name: one.fd for name, one in maps.items()}, CALL_MAP: calls.fd}
        opened = [calls.fd]

        def load(name: str) -> int:
            fd = load_program(name, link(compiled.programs[name], compiled.maps, every, kernel_facts()))
            opened.append(fd)
            return fd

        try:
            called = {slot: load(name) for slot, name in abi.CALLS.items()}
            for slot, fd in called.items():
                calls.put(_SLOT.pack(slot), _SLOT.pack(fd))
            return cls({hook: load(hook.value) for hook in Hook}, called, calls)
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise

    @classmethod
    def open(cls, directory: Path) -> ProgramSet:
        """Open the set that is pinned in a directory. Raises PlatformError if a program cannot be opened."""
        opened: list[int] = []

        def get(name: str) -> int:
            opened.append(syscall.obj_get(directory / name))
            return opened[-1]

        try:
            hooks = {hook: get(hook.value) for hook in Hook}
            called = {slot: get(name) for slot, name in abi.CALLS.items()}
            return cls(hooks, called, Map(get(CALL_MAP)))
        except OSError as error:
            for fd in opened:
                os.close(fd)
            raise PlatformError(
                f"a program in {directory} cannot be opened: {error.strerror}",
                hint=DAMAGED_HINT,
            ) from error

    def pin(self, directory: Path) -> None:
        """Pin all programs and the program array in a directory, which is made if it is missing."""
        directory.mkdir(exist_ok=True)
        for name, fd in self.named():
            syscall.obj_pin(fd, directory / name)

    def named(self) -> Iterator[tuple[str, int]]:
        """All programs and the program array, each as (name of the pin, descriptor)."""
        yield from ((hook.value, fd) for hook, fd in self.hooks.items())
        yield from ((abi.CALLS[slot], fd) for slot, fd in self.called.items())
        yield CALL_MAP, self.calls.fd

    def programs(self) -> Iterator[tuple[str, int]]:
        """All programs, each as (name, descriptor). The called programs come first."""
        yield from ((abi.CALLS[slot], fd) for slot, fd in self.called.items())
        yield from ((hook.value, fd) for hook, fd in self.hooks.items())

    def tags(self) -> dict[str, str]:
        """The kernel's digest of each program's instructions, by the program's name."""
        return {name: syscall.prog_info(fd).tag for name, fd in self.programs()}

    def mend_calls(self) -> list[str]:
        """Restore those slots of the program array that lack their program. Returns the names of these programs."""
        mended = []
        for slot, fd in self.called.items():
            found = self.calls.get(_SLOT.pack(slot))
            if found is None or _SLOT.unpack(found)[0] != syscall.prog_info(fd).id:
                self.calls.put(_SLOT.pack(slot), _SLOT.pack(fd))
                mended.append(abi.CALLS[slot])
        return mended

    def close(self) -> None:
        """Close all descriptors. A second call does nothing."""
        if self.calls.fd >= 0:
            for fd in [*self.hooks.values(), *self.called.values()]:
                os.close(fd)
            self.calls.close()


def begin_exchange(pin_dir: Path, staged: Path) -> None:
    """Put the pins of a staged program set in place of the set in force.

    Then `finish_exchange` must update the interfaces.
    """
    staged.rename(pin_dir / NEW)
    (pin_dir / CURRENT).rename(pin_dir / OLD)
    (pin_dir / NEW).rename(pin_dir / CURRENT)


def recover(pin_dir: Path) -> None:
    """Repair the directories, if a process was killed between two steps of an exchange."""
    if (pin_dir / OLD).exists() and not (pin_dir / CURRENT).exists():
        (pin_dir / NEW).rename(pin_dir / CURRENT)
    elif (pin_dir / NEW).exists():
        shutil.rmtree(pin_dir / NEW)


def finish_exchange(pin_dir: Path, replace: Callable[[Mapping[Hook, set[int]]], None]) -> None:
    """Finish an exchange that this process or a killed one has begun. Does nothing if none has begun.

    ``replace``: is called with ids of programs by hook. It must replace these programs by the current ones on every
    interface.
    """
    if (pin_dir / OLD).exists():
        supersede([pin_dir / OLD], replace)
        for path in sorted((pin_dir / CURRENT).iterdir()):
            if path.name in abi.MAP_SPECS:
                path.rename(pin_dir / path.name)
        shutil.rmtree(pin_dir / OLD)


def supersede(directories: Sequence[Path], replace: Callable[[Mapping[Hook, set[int]]], None]) -> None:
    """Replace the programs that are pinned in these directories, and wait until no packet runs them any more.

    ``replace``: as in `finish_exchange`. Afterwards no program calls another program of these sets, so their pins may
    be removed.
    """
    order_stores()  # so that a run of the new programs sees the rows of their maps
    replace(program_ids(directories))
    wait_for_readers()


def program_ids(directories: Sequence[Path]) -> dict[Hook, set[int]]:
    """The ids of the hooks' programs that are pinned in these directories, by hook."""
    ids: dict[Hook, set[int]] = {hook: set() for hook in Hook}
    for hook in Hook:
        for path in (path for directory in directories for path in directory.glob(hook.value + "*")):
            fd = syscall.obj_get(path)
            ids[hook].add(syscall.prog_info(fd).id)
            os.close(fd)
    return ids
