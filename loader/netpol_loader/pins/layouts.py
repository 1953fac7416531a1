# SPDX-License-Identifier: Apache-2.0
"""The layouts of the pinned maps, as one more pinned map beside them, so that a newer version can read older maps.

The kernel has the layouts too, as type information (BTF), but shows them only to a process with CAP_SYS_ADMIN, which an
agent does not have (ADR 21). The map has one element: a JSON document with the fields of every map's key and value.

Invariants: a new pin directory has this map before it is in force; a map that an older version made (connections,
counters) is in the directory only if its layout equals that of this version. The module must not know what a field
means.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.btf import Field, Layout, declared
from netpol_loader.kernel.maps import Map

NAME = "np_layout"
FORMAT = 1
_ONLY = struct.pack("=I", 0)
"""The key of the one element."""

Layouts = tuple[Layout, Layout]
"""The layouts of a map's key and value."""


def save_layouts(directory: Path) -> None:
    """Pin the layouts of this version's maps in a directory, unless they are there. Raises OSError."""
    path = directory / NAME
    if path.exists():
        return
    content = encode_layouts(
        {spec.name: (declared(spec.key), declared(spec.value)) for spec in abi.MAP_SPECS.values() if spec.value}
    )
    one = Map(syscall.map_create("array", NAME, len(_ONLY), len(content), 1))
    try:
        one.put(_ONLY, content)
        syscall.obj_pin(one.fd, path)
    finally:
        one.close()


def load_layouts(directory: Path) -> Mapping[str, Layouts] | None:
    """The layouts of a directory's maps, by map name; None if the version that made them saved none.

    Raises OSError, and PlatformError for a document of another format.
    """
    path = directory / NAME
    if not path.exists():
        return None
    one = Map(syscall.obj_get(path))
    try:
        return decode_layouts(one.get(_ONLY) or b"", str(path))
    finally:
        one.close()


def encode_layouts(layouts: Mapping[str, Layouts]) -> bytes:
    """Encode layouts as a document; a field is its name, offset, size and the fields in it."""
    maps = {name: [_plain(key), _plain(value)] for name, (key, value) in layouts.items()}
    return json.dumps({"format": FORMAT, "maps": maps}, separators=(",", ":")).encode()


def decode_layouts(raw: bytes, where: str) -> Mapping[str, Layouts]:
    """Decode a document; ``where``: its name in errors. Raises PlatformError."""
    try:
        document = json.loads(raw)
        if document["format"] != FORMAT:
            raise PlatformError(f"{where} has format {document['format']}; this version reads format {FORMAT}")
        return {name: (_fields(key), _fields(value)) for name, (key, value) in document["maps"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlatformError(f"{where} has no layouts of maps: {error}") from error


def _plain(layout: Layout) -> list[Any]:
    return [[one.name, one.at, one.size, _plain(one.inner)] for one in layout]


def _fields(plain: list[Any]) -> Layout:
    return tuple(Field(_name(name), _count(at), _count(size), _fields(inner)) for name, at, size, inner in plain)


def _name(plain: Any) -> str:
    if not isinstance(plain, str):
        raise TypeError(f"{plain!r} is no name of a field")
    return plain


def _count(plain: Any) -> int:
    if type(plain) is not int or plain < 0:
        raise TypeError(f"{plain!r} is no number of bytes")
    return plain
