# SPDX-License-Identifier: Apache-2.0
"""The document of layouts: what is encoded comes out again, and another format is refused."""

from __future__ import annotations

import json

import pytest

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.kernel.btf import Field, declared
from netpol_loader.pins.layouts import can_keep, decode_layouts, encode_layouts


def test_every_map_comes_out_again() -> None:
    """Nested structures too."""
    every = {
        name: (declared(spec.key), declared(spec.value))
        for name, spec in abi.MAP_SPECS.items()
        if spec.value is not None
    }
    assert any(field.inner for _, value in every.values() for field in value)
    assert decode_layouts(encode_layouts(every), "here") == every


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"[]", b"{}", b"\xff", b"[" * 100_000),
        *(b'{"format": 1, "maps": %s}' % maps for maps in (b"[]", b'{"a": [1, 2]}', b'{"a": []}', b'{"a": null}')),
        *(
            b'{"format": 1, "maps": {"a": [[["x", %s, []]], []]}}' % where
            for where in (b"Infinity, 1", b"0, 1e400", b"-5, 1", b"0, -1", b"0.5, 1", b"true, 1", b'"0", 1', b"0, null")
        ),
        b'{"format": 1, "maps": {"a": [[[5, 0, 1, []]], []]}}',
    ],
    ids=range(18),
)
def test_what_is_no_document_is_refused(raw: bytes) -> None:
    """By name."""
    with pytest.raises(PlatformError, match="here has no layouts of maps"):
        decode_layouts(raw, "here")


def test_another_format_is_refused() -> None:
    """A later version may write one."""
    with pytest.raises(PlatformError, match="here has format 2; this version reads format 1"):
        decode_layouts(json.dumps({"format": 2}).encode(), "here")


ROW = (Field("rule", 0, 4), Field("name_class", 4, 4), Field("conn", 8, 4, (Field("state", 0, 1), Field("pad", 1, 3))))


@pytest.mark.parametrize(
    ("older", "kept"),
    [
        (ROW, True),
        ((ROW[0], Field("pad", 4, 4), ROW[2]), True),
        ((ROW[0], Field("other", 4, 4), ROW[2]), False),
        ((Field("name_class", 0, 4), Field("rule", 4, 4), ROW[2]), False),
        ((ROW[0], Field("pad", 4, 2), ROW[2]), False),
        ((ROW[0], Field("pad", 5, 4), ROW[2]), False),
        (ROW[:2], False),
        ((*ROW, Field("more", 12, 4)), False),
        ((*ROW[:2], Field("conn", 8, 4, (Field("pad", 0, 1), Field("pad", 1, 3)))), True),
        ((*ROW[:2], Field("conn", 8, 4, (Field("state", 0, 1), Field("code", 1, 3)))), False),
        ((*ROW[:2], Field("conn", 8, 4)), False),
    ],
    ids=[
        *("the same", "padding that is used now", "another field", "other places", "a shorter one", "another offset"),
        *("a field less", "a field more", "padding within", "a field that is padding now", "no inner fields"),
    ],
)
def test_rows_of_an_older_layout_are_kept_if_they_can_be_read(older: tuple[Field, ...], *, kept: bool) -> None:
    """Fields must be the same, but padding of the older layout may have become a field; the key follows the same rule."""
    key = (Field("rule", 0, 4),)
    assert can_keep((key, older), (key, ROW)) is kept
    assert can_keep((older, key), (ROW, key)) is kept
