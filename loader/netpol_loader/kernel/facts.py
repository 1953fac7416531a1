# SPDX-License-Identifier: Apache-2.0
"""Facts about the running kernel that the program needs: the offsets of some fields of sk_buff, and a kernel function.

They are read from the kernel's own BTF (/sys/kernel/btf/vmlinux, Documentation/bpf/btf.rst). The header bpf/np_kernel.h
says what the program needs each fact for.

Invariant: a missing fact is an error, never a guess.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.kernel import btf

VMLINUX = Path("/sys/kernel/btf/vmlinux")
CAST = "bpf_cast_to_kern_ctx"
FUNCTION = 12
"""The kind of a function in BTF (BTF_KIND_FUNC)."""


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """The facts of one kernel.

    ``numbers``: the values, by enum np_kernel_fact. ``cast_function``: BTF id of bpf_cast_to_kern_ctx; 0: the kernel
    lacks this function.
    """

    numbers: Mapping[int, int]
    cast_function: int


@dataclass(frozen=True, slots=True)
class Bits:
    """The place of a structure's field.

    ``at``: its offset in bits; ``count``: its width in bits; 0: it is not a bit field.
    """

    at: int
    count: int


@functools.cache
def kernel_facts() -> KernelFacts:
    """Read the facts of the running kernel. This takes a tenth of a second.

    Raises PlatformError if the kernel has no BTF.
    """
    try:
        blob = VMLINUX.read_bytes()
    except OSError as error:
        raise PlatformError(
            f"cannot read the kernel's type information {VMLINUX}: {error.strerror}",
            hint="The packet path needs a kernel that was built with CONFIG_DEBUG_INFO_BTF, as distributions' are.",
        ) from error
    return facts_of(blob)


def facts_of(blob: bytes) -> KernelFacts:
    """Read the facts from a kernel's BTF. Raises PlatformError if a fact is missing."""
    types = _KernelTypes(blob)
    fields = types.fields("sk_buff")
    missing = [name for name in ("ip_summed", "csum_start", "csum_offset", "mac_header") if name not in fields]
    if missing:
        raise PlatformError(f"the kernel's sk_buff has no {', '.join(missing)}")
    summed = fields["ip_summed"]
    bytes_at = {name: fields[name].at // 8 for name in ("ip_summed", "csum_start", "csum_offset", "mac_header")}
    first = min(bytes_at.values())
    if max(bytes_at.values()) + 2 - first > abi.NP_KERNEL_BYTES or summed.at % 8 + summed.count > 8:  # noqa: PLR2004
        raise PlatformError("the layout of the kernel's sk_buff is unknown, so no program can be loaded")
    cast = types.number_of(CAST, FUNCTION)
    numbers = {
        abi.NP_KERNEL_CAST: int(cast != 0),
        abi.NP_KERNEL_FIRST: first,
        abi.NP_KERNEL_SUMMED: bytes_at["ip_summed"] - first,
        abi.NP_KERNEL_SUMMED_SHIFT: summed.at % 8,
        abi.NP_KERNEL_CSUM_START: bytes_at["csum_start"] - first,
        abi.NP_KERNEL_CSUM_OFFSET: bytes_at["csum_offset"] - first,
        abi.NP_KERNEL_MAC_HEADER: bytes_at["mac_header"] - first,
    }
    return KernelFacts(numbers, cast)


class _KernelTypes:
    """The types in a kernel's BTF.

    There are about 150 000 types. So one pass reads only their headers, and a type is decoded when it is needed.
    """

    def __init__(self, blob: bytes) -> None:
        magic, version, _, header, type_at, type_len, string_at, string_len = btf.HEADER.unpack_from(blob)
        if (magic, version) != (btf.MAGIC, 1):
            raise PlatformError(f"the kernel's type information has an unknown form: {magic:#x}, version {version}")
        start = header + string_at
        self._strings = blob[start : start + string_len]
        begin = header + type_at
        self._words = memoryview(blob)[begin : begin + type_len].cast("I")
        self._places = _places(self._words)

    def number_of(self, name: str, kind: int) -> int:
        """The BTF id of the type with this name and kind; 0: there is none."""
        at = self._strings.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            return 0
        wanted, words = at + 1, self._words
        for number, place in enumerate(self._places):
            if words[place] == wanted and words[place + 1] >> 24 & 0x1F == kind:
                return number
        return 0

    def fields(self, structure: str) -> dict[str, Bits]:
        """The named fields of a structure, including those of its anonymous inner structures."""
        number = self.number_of(structure, btf.STRUCT)
        return dict(self._members(number, 0)) if number else {}

    def _members(self, number: int, base: int) -> Iterator[tuple[str, Bits]]:
        words, place = self._words, self._places[number]
        info = words[place + 1]
        kind, count, has_bits = info >> 24 & 0x1F, info & 0xFFFF, info >> 31
        if kind not in (btf.STRUCT, btf.UNION):
            return
        for member in range(place + 3, place + 3 + count * 3, 3):
            name, inner, offset = words[member], words[member + 1], words[member + 2]
            at, bits = (offset & 0xFFFFFF, offset >> 24) if has_bits else (offset, 0)
            if name:
                end = self._strings.index(b"\0", name)
                yield self._strings[name:end].decode(), Bits(base + at, bits)
            else:
                yield from self._members(inner, base + at)


def _places(words: memoryview) -> list[int]:
    """The offset of each type in 32-bit words, by BTF id. Id 0 (void) has the offset 0, which is not valid."""
    words_after = {kind: size // 4 for kind, size in btf.TAILS.items()}
    words_each = {kind: size // 4 for kind, size in btf.MEMBERS.items()}
    fixed = [3 + words_after.get(kind, 0) for kind in range(32)]
    each = [words_each.get(kind, 0) for kind in range(32)]
    places, at, end = [0], 0, len(words)
    append = places.append
    while at < end:
        append(at)
        info = words[at + 1]
        kind = info >> 24 & 0x1F
        at += fixed[kind] + each[kind] * (info & 0xFFFF)
    if at != end:
        raise PlatformError("the kernel's type information has unknown kinds, so no program can be loaded")
    return places
