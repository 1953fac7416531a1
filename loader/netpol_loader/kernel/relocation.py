# SPDX-License-Identifier: Apache-2.0
"""Relocation: replace the numbers that the compiler left in the instructions by maps, masks and facts of the kernel.

Everything in a program that depends on the node is filled in here: the maps, their sizes, the number of CPUs, and
offsets in the kernel's structures. So one compiled file serves every node, and there is only one way to load it.

Invariant: an instruction with an unknown number is an error, and such a program is never loaded.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Mapping, Sequence

from netpol_ebpf.errors import LoadError
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.facts import KernelFacts
from netpol_loader.kernel.maps import possible_cpus

INSTRUCTION = struct.Struct("=BBhI")
LOAD_IMMEDIATE_64 = 0x18
"""Opcode BPF_LD | BPF_DW | BPF_IMM, of the only instruction that has 16 bytes."""
LOADS_MAP = 1
"""Source register of an instruction that loads a map: BPF_PSEUDO_MAP_FD."""
CALL = 0x85
"""Opcode BPF_JMP | BPF_CALL."""
CALLS_KERNEL = 2
"""Source register of an instruction that calls a kernel function by its BTF id: BPF_PSEUDO_KFUNC_CALL."""

PER_CPU_RANGES = frozenset(abi.maps_with(abi.MapTrait.RANGED))
"""Names of the maps with the trait "ranged".

Such a map is an array that all CPUs share, and in which each CPU uses only its own range of slots.
"""

LOAD_TRIES = 5
ERROR_LINES = 25
"""Number of last lines of the verifier's log that an error includes. The end of the log has the cause."""


def link(instructions: bytes, names: Sequence[str], maps: Mapping[str, int], facts: KernelFacts) -> bytes:
    """Relocate the instructions of a program. Returns them with map descriptors, masks and facts filled in.

    ``names``: map names; an instruction has the index of a name in place of a map. ``maps``: descriptors by map name.
    Raises LoadError.
    """
    code = bytearray(instructions)
    at = 0
    while at < len(code):
        opcode, operands, offset, immediate = INSTRUCTION.unpack_from(code, at)
        if opcode != LOAD_IMMEDIATE_64:
            if opcode == CALL and immediate == abi.NP_CALLS_CAST and facts.cast_function:
                INSTRUCTION.pack_into(code, at, opcode, packed(CALLS_KERNEL, 0), 0, facts.cast_function)
            at += INSTRUCTION.size
            continue
        source, target = registers(operands)
        if source in (LOADS_MAP, abi.NP_LOADS_MASK):
            if immediate >= len(names) or names[immediate] not in maps:
                raise LoadError(f"instruction {at // INSTRUCTION.size} names map {immediate}, which was not made")
            fd = maps[names[immediate]]
            value = fd if source == LOADS_MAP else mask_of(syscall.map_info(fd))
            kept = LOADS_MAP if source == LOADS_MAP else 0
            INSTRUCTION.pack_into(code, at, opcode, packed(kept, target), offset, value)
        elif source == abi.NP_LOADS_FACT:
            if immediate not in facts.numbers:
                raise LoadError(
                    f"instruction {at // INSTRUCTION.size} wants the unknown fact {immediate} of the kernel"
                )
            INSTRUCTION.pack_into(code, at, opcode, packed(0, target), offset, facts.numbers[immediate])
        elif source != 0:
            raise LoadError(f"instruction {at // INSTRUCTION.size} loads something of the unknown kind {source}")
        at += 2 * INSTRUCTION.size
    return bytes(code)


def mask_of(one: syscall.MapInfo) -> int:
    """The number of slots in a map that a hash chooses from, minus one.

    Raises LoadError if the map's number of slots must be a power of two, and is not.
    """
    slots = one.max_entries
    if one.name in PER_CPU_RANGES:
        return (1 << (slots // possible_cpus()).bit_length() - 1) - 1
    if slots & slots - 1:
        raise LoadError(f"map {one.name} has {slots} entries; a power of two is needed")
    return slots - 1


def load_program(name: str, instructions: bytes) -> int:
    """Load a TC program. Returns its descriptor. Raises LoadError with the end of the verifier's log."""
    try:
        return _load(name, instructions)
    except OSError as error:
        failed = error
    try:  # a second load, which gives the verifier's log
        return syscall.prog_load(instructions, name=name, log=(room := syscall.empty(syscall.LOG_BYTES)))
    except OSError:
        said = room.value.decode(errors="replace").strip().splitlines()
    tail = "\n  ".join(said[-ERROR_LINES:]) or "the verifier said nothing"
    raise LoadError(f"the kernel refuses program {name} ({failed.strerror}):\n  {tail}") from failed


def _load(name: str, instructions: bytes) -> int:
    """Load a program. If a signal arrives, the verifier returns EAGAIN; then retry, as often as libbpf does.

    Raises OSError.
    """
    for _ in range(LOAD_TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            return syscall.prog_load(instructions, name=name)
    return syscall.prog_load(instructions, name=name)


def registers(byte: int) -> tuple[int, int]:
    """The register byte of an instruction as (source, destination). In struct bpf_insn, these are bit fields."""
    return (byte >> 4, byte & 15) if sys.byteorder == "little" else (byte & 15, byte >> 4)


def packed(source: int, target: int) -> int:
    """The register byte of an instruction with these registers; the inverse of `registers`."""
    return source << 4 | target if sys.byteorder == "little" else target << 4 | source
