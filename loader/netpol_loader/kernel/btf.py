# SPDX-License-Identifier: Apache-2.0
"""BPF type information (BTF): the module writes it for the maps that the loader makes, and reads that of existing maps.

The BTF of a map gives `bpftool map dump` the names of fields. It also allows a comparison, field by field, of another
version's layout with the layout that this version declares.

Invariants: two layouts are equal if, and only if, every field has the same name, offset and size, nested structures
included. A map without BTF has no layout; none is guessed. The module must not know the meaning of a field.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

from netpol_ebpf.errors import PlatformError
from netpol_loader.kernel import syscall

MAGIC = 0xEB9F
HEADER = struct.Struct("=HBBIIIII")
TYPE = struct.Struct("=III")
MEMBER = struct.Struct("=III")
ARRAY = struct.Struct("=III")

INT, POINTER, ARRAY_KIND, STRUCT, UNION, ENUM, FUNC_PROTO, VAR, DATASEC, DECL_TAG, ENUM64 = (
    1, 2, 3, 4, 5, 6, 13, 14, 15, 17, 19,
)  # fmt: skip
UNSIGNED, SIGNED = 0, 1
"""Encodings of an integer type."""
ALIASES = frozenset({8, 9, 10, 11, 18})
"""Kinds of types that only rename another type: typedef, volatile, const, restrict, type tag."""
TAILS = {INT: 4, ARRAY_KIND: 12, VAR: 4, DECL_TAG: 4}
MEMBERS = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}
"""Bytes after a type's header, by kind of the type (Documentation/bpf/btf.rst).

TAILS: once for the type. MEMBERS: for each member of the type.
"""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a structure.

    ``at``: its offset in bytes; ``size``: its size in bytes; ``inner``: the fields of a nested structure, or of the
    structure that is an array's element.
    """

    name: str
    at: int
    size: int
    inner: tuple[Field, ...] = ()


Layout = tuple[Field, ...]
"""The fields of a structure; () for a type that is not a structure."""


def layouts(info: syscall.MapInfo) -> tuple[Layout, Layout] | None:
    """The layouts of a map's key and value. None if the map has no BTF. Raises PlatformError without CAP_SYS_ADMIN."""
    if not (info.btf_id and info.btf_key_type and info.btf_value_type):
        return None
    try:
        types = _Types(syscall.btf(info.btf_id))
    except PermissionError as error:
        raise PlatformError(
            f"cannot read the layout of map {info.name}: {error.strerror}",
            hint="The version that made the maps saved no layouts, and the kernel shows them to CAP_SYS_ADMIN alone: run "
            "`netpol-agent --once` of this version as root, with the options of the service; then start the service.",
        ) from error
    return types.layout(info.btf_key_type), types.layout(info.btf_value_type)


def declared(structure: type[ctypes.Structure] | None) -> Layout:
    """The layout of a structure of `netpol_loader.abi`. None stands for a key or value that is a plain number."""
    if structure is None:
        return ()
    fields = []
    for name, kind, *_ in structure._fields_:
        place = getattr(structure, name)
        fields.append(Field(name, place.offset, place.size, declared(_structure_of(kind))))
    return tuple(fields)


def _structure_of(kind: Any) -> type[ctypes.Structure] | None:
    """The structure class of a field's type, or of the elements if the type is an array.

    None if there is no such class.
    """
    while issubclass(kind, ctypes.Array):
        kind = kind._type_
    return kind if issubclass(kind, ctypes.Structure) else None


class Writer:
    """Builds a BTF blob for structures of `netpol_loader.abi`.

    The blob has only integers, arrays and structures, which every supported kernel knows.
    """

    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._strings = bytearray(b"\0")
        self._numbers: dict[object, int] = {}

    def number_of(self, kind: Any) -> int:
        """The BTF type id of a ctypes type, which must be a structure, an array or an unsigned integer.

        The type is added to the blob if it is new.
        """
        if kind not in self._numbers:
            if issubclass(kind, ctypes.Structure):
                self._numbers[kind] = self._structure(kind)
            elif issubclass(kind, ctypes.Array):
                element, index = self.number_of(kind._type_), self.number_of(ctypes.c_uint32)
                self._numbers[kind] = self._add(0, ARRAY_KIND, 0, 0, ARRAY.pack(element, index, kind._length_))
            else:
                size = ctypes.sizeof(kind)
                is_text = kind is ctypes.c_char  # bpftool prints an array of `char` as text, by that name
                name, encoding = ("char", SIGNED) if is_text else (f"u{size * 8}", UNSIGNED)
                self._numbers[kind] = self._add(
                    self._name(name), INT, 0, size, struct.pack("=I", encoding << 24 | size * 8)
                )
        return self._numbers[kind]

    def blob(self) -> bytes:
        """All types that were added so far, in the format of BPF_BTF_LOAD."""
        types, strings = b"".join(self._types), bytes(self._strings)
        return HEADER.pack(MAGIC, 1, 0, HEADER.size, 0, len(types), len(types), len(strings)) + types + strings

    def _structure(self, kind: type[ctypes.Structure]) -> int:
        members = b""
        for name, member, *_ in kind._fields_:
            number = self.number_of(member)
            members += MEMBER.pack(self._name(name), number, getattr(kind, name).offset * 8)
        return self._add(self._name(kind.__name__), STRUCT, len(kind._fields_), ctypes.sizeof(kind), members)

    def _add(self, name: int, kind: int, count: int, size: int, tail: bytes) -> int:
        self._types.append(TYPE.pack(name, kind << 24 | count, size) + tail)
        return len(self._types)

    def _name(self, text: str) -> int:
        at = len(self._strings)
        self._strings += text.encode() + b"\0"
        return at


class _Types:
    """The types of a BTF blob, by type id."""

    def __init__(self, blob: bytes) -> None:
        magic, version, _, header, type_at, type_len, string_at, _ = HEADER.unpack_from(blob)
        if (magic, version) != (MAGIC, 1):
            raise PlatformError(f"type information of an unknown form: magic {magic:#x}, version {version}")
        self._blob = blob
        self._strings = header + string_at
        self._places = [0]  # number 0 is void
        at = header + type_at
        while at < header + type_at + type_len:
            self._places.append(at)
            _, info, _ = TYPE.unpack_from(blob, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            at += TYPE.size + TAILS.get(kind, 0) + MEMBERS.get(kind, 0) * count

    def _resolve(self, number: int) -> tuple[int, int, int, int]:
        """A type as (kind, number of members, size, offset in the blob), with typedefs and qualifiers resolved."""
        while True:
            at = self._places[number]
            _, info, size_or_type = TYPE.unpack_from(self._blob, at)
            kind = info >> 24 & 0x1F
            if kind not in ALIASES:
                return kind, info & 0xFFFF, size_or_type, at + TYPE.size
            number = size_or_type

    def layout(self, number: int) -> Layout:
        kind, count, _, at = self._resolve(number)
        if kind == ARRAY_KIND:
            return self.layout(ARRAY.unpack_from(self._blob, at)[0])
        if kind not in (STRUCT, UNION):
            return ()
        fields = []
        for index in range(count):
            name, member, bits = MEMBER.unpack_from(self._blob, at + index * MEMBER.size)
            place = (bits & 0xFFFFFF) // 8
            fields.append(Field(self._text(name), place, self._size(member), self.layout(member)))
        return tuple(fields)

    def _size(self, number: int) -> int:
        kind, _, size, at = self._resolve(number)
        if kind == ARRAY_KIND:
            element, _, count = ARRAY.unpack_from(self._blob, at)
            return self._size(element) * int(count)
        return 8 if kind == POINTER else size

    def _text(self, at: int) -> str:
        start = self._strings + at
        return self._blob[start : self._blob.index(0, start)].decode()
