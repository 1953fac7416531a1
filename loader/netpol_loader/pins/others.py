# SPDX-License-Identifier: Apache-2.0
"""Programs of others on the node's interfaces: which exist, whether they run before ours, and whether they redirect.

Some packets pass no program at their destination, ours included: those that bpf_redirect_peer puts into a pod, and
those that XDP sends to another interface. (Packets that bpf_redirect, bpf_redirect_neigh and bpf_clone_redirect send
from TC do pass the hooks of the target device.)

The translated instructions of a program show whether it can redirect in these ways. In translated instructions, a call
of a helper contains the distance to the helper's code, which differs from kernel to kernel. So the module loads a
program of its own with the same call, which shows the distance on this kernel. Rejected: the addresses of helpers from
/proc/kallsyms, which has ten megabytes and needs the same privileges.

Invariant: a program that cannot be read counts as unknown, never as harmless. The module changes nothing, and must not
know policy.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netpol_loader.host import clsact
from netpol_loader.host.links import xdp_programs
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.relocation import CALL, INSTRUCTION, LOAD_IMMEDIATE_64, packed, registers
from netpol_loader.pins import attach
from netpol_loader.pins.turns import Turns

if TYPE_CHECKING:
    from netpol_loader.pins.dataplane import Dataplane

XDP = "XDP"
CLSACT_TURN = 10
"""How many interfaces with clsact one call of `OtherPrograms.look` reads at most. The value is arbitrary."""

_TAIL_CALL = 12
_REDIRECTS: Mapping[int, int] = {syscall.PROG_TYPE_SCHED_CLS: 155, syscall.PROG_TYPE_XDP: 23}
"""By program type, the helper that redirects past all hooks: bpf_redirect_peer, in XDP bpf_redirect."""
_REDIRECT_MAPS = frozenset({"devmap", "cpumap", "xskmap", "devmap_hash"})
"""Types of maps that serve only for redirection by XDP (bpf_redirect_map)."""
_CALLS_FUNCTION = 1
"""Source register of a call of a function within the program (BPF_PSEUDO_CALL).

A program of type BPF_PROG_TYPE_EXT may have replaced the function; the dispatcher of libxdp is made for this.
"""
_MOVE, _EXIT = 0xB7, 0x95


class Reach(enum.Enum):
    """Whether a program can send packets past the programs at their destination."""

    NONE = "cannot"
    REDIRECTS = "can"
    UNKNOWN = "cannot be told"


@dataclass(frozen=True, slots=True, order=True)
class Other:
    """A program of others on an interface.

    ``hook``: XDP, or mechanism and direction. ``number``: its id in the kernel. ``name``: "" if the name is unknown.
    ``is_first``: it runs before our program on the interface.
    """

    ifindex: int
    hook: str
    number: int
    name: str
    is_first: bool
    reach: Reach


class OtherPrograms:
    """Finds the programs of others.

    If `look` is called repeatedly, it reads each program once, and the interfaces in turns (`Turns`).
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, Reach]] = {}
        self._turns, self._clsact_turns = Turns(), Turns(CLSACT_TURN)
        self._on_tcx: dict[int, list[Other]] = {}
        self._on_clsact: dict[int, list[Other]] = {}
        self._with_filters: set[int] = set()
        self._on_xdp: dict[int, tuple[int, ...]] = {}

    def look(self, ifindexes: Collection[int], attached: Collection[int], dataplane: Dataplane) -> list[Other]:
        """The programs of others on these interfaces, as last read.

        The interfaces must be in this network namespace. ``attached``: those with our programs. Cost: one or two
        microseconds for each hook of the interfaces whose turn it is; at the first turn of a round, also two dumps of
        all interfaces. One call reads the filters of at most CLSACT_TURN interfaces.
        """
        ours = {hook: syscall.prog_info(dataplane.program_fd(hook)).id for hook in Hook}
        turn = self._turns.next(ifindexes)
        if self._turns.is_first:
            self._on_xdp = xdp_programs()
            self._with_filters = clsact.interfaces()
        self._on_tcx = _kept(self._on_tcx, ifindexes) | {one: list(self._by_tcx(one, ours)) for one in turn}
        present = self._with_filters & set(ifindexes)
        again = self._clsact_turns.next(present)
        self._on_clsact = _kept(self._on_clsact, present) | {one: list(self._filters_on(one)) for one in again}
        found = [one for by in (self._on_tcx, self._on_clsact) for others in by.values() for one in others]
        found += self._by_xdp(ifindexes, attached)
        numbers = {one.number for one in found}
        self._known = {number: known for number, known in self._known.items() if number in numbers}
        return sorted(found, key=lambda one: (one.ifindex, one.hook, one.number))

    def _by_tcx(self, ifindex: int, ours: Mapping[Hook, int]) -> Iterator[Other]:
        with contextlib.suppress(OSError):  # the interface is gone, or the kernel has no tcx
            for hook, kind in attach.ATTACH_TYPES.items():
                order = syscall.prog_query(ifindex, kind)
                before = order.index(ours[hook]) if ours[hook] in order else 0
                for at, number in enumerate(order):
                    if number != ours[hook]:
                        yield self._other(ifindex, f"tcx {_WAYS[hook]}", number, is_first=at < before)

    def _by_xdp(self, ifindexes: Collection[int], attached: Collection[int]) -> Iterator[Other]:
        for ifindex, numbers in self._on_xdp.items():
            for number in numbers if ifindex in ifindexes else ():
                yield self._other(ifindex, XDP, number, is_first=ifindex in attached)

    def _filters_on(self, ifindex: int) -> Iterator[Other]:
        for hook in Hook:
            order = clsact.filter_programs(ifindex, hook)
            is_ours = [clsact.is_our_filter(name, hook) for name, _ in order]
            before = is_ours.index(True) if True in is_ours else 0
            for at, (name, number) in enumerate(order):
                if number and not is_ours[at]:
                    yield self._other(ifindex, f"clsact {_WAYS[hook]}", number, is_first=at < before, name=name)

    def _other(self, ifindex: int, hook: str, number: int, *, is_first: bool, name: str = "") -> Other:
        if number not in self._known:
            self._known[number] = _read(number, syscall.PROG_TYPE_XDP if hook == XDP else syscall.PROG_TYPE_SCHED_CLS)
        known, reach = self._known[number]
        return Other(ifindex, hook, number, known or name, is_first, reach)


def _kept(before: Mapping[int, list[Other]], present: Collection[int]) -> dict[int, list[Other]]:
    return {ifindex: found for ifindex, found in before.items() if found and ifindex in present}


_WAYS: Mapping[Hook, str] = {Hook.TC_INGRESS: "ingress", Hook.TC_EGRESS: "egress"}


def _read(number: int, program_type: int) -> tuple[str, Reach]:
    """The name of a program, and whether the program redirects. ("", UNKNOWN) without CAP_SYS_ADMIN."""
    try:
        fd = syscall.prog_fd(number)
    except OSError:
        return "", Reach.UNKNOWN
    try:
        return syscall.prog_info(fd).name, reach_of(fd, program_type)
    except OSError:
        return "", Reach.UNKNOWN
    finally:
        os.close(fd)


def reach_of(fd: int, program_type: int) -> Reach:
    """Whether a program can send packets past other programs, judged by its calls and maps. Raises OSError."""
    if any(_map_kind(number) in _REDIRECT_MAPS for number in syscall.prog_maps(fd)):
        return Reach.REDIRECTS
    code = syscall.prog_code(fd)
    called = _helpers_called(code)
    redirecting = _helpers_called(_probe(program_type))
    if called & redirecting - {0}:
        return Reach.REDIRECTS
    is_readable = bool(code) and 0 not in called and (not called or bool(redirecting - {0}))
    is_whole = _TAIL_CALL not in called and not (program_type == syscall.PROG_TYPE_XDP and _calls_functions(code))
    return Reach.NONE if is_readable and is_whole else Reach.UNKNOWN


def _map_kind(number: int) -> str:
    fd = syscall.map_fd(number)
    try:
        return syscall.map_info(fd).kind
    finally:
        os.close(fd)


def _calls(code: bytes) -> Iterator[tuple[int, int]]:
    """All call instructions in translated instructions, each as (source register, immediate)."""
    at = 0
    while at < len(code):
        opcode, operands, _, immediate = INSTRUCTION.unpack_from(code, at)
        if opcode == CALL:
            yield registers(operands)[0], immediate
        at += INSTRUCTION.size * (2 if opcode == LOAD_IMMEDIATE_64 else 1)


def _helpers_called(code: bytes) -> set[int]:
    """The immediates of the helper calls, one for each helper. 0: the kernel hides the immediate from this process."""
    return {immediate for source, immediate in _calls(code) if source == 0}


def _calls_functions(code: bytes) -> bool:
    return any(source == _CALLS_FUNCTION for source, _ in _calls(code))


def _probe(program_type: int) -> bytes:
    """The translated instructions of a program that only calls the redirecting helper. b"" if it cannot be loaded."""
    arguments = INSTRUCTION.pack(_MOVE, packed(0, 1), 0, 1) + INSTRUCTION.pack(_MOVE, packed(0, 2), 0, 0)
    call = INSTRUCTION.pack(CALL, 0, 0, _REDIRECTS[program_type])
    try:
        fd = syscall.prog_load(arguments + call + INSTRUCTION.pack(_EXIT, 0, 0, 0), program_type)
    except OSError:
        return b""
    try:
        return syscall.prog_code(fd)
    finally:
        os.close(fd)
