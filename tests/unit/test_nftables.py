# SPDX-License-Identifier: Apache-2.0
"""Messages to nf_tables, byte by byte, and which of them a layout of the second barrier takes. No kernel is asked."""

from __future__ import annotations

import struct

import pytest

from netpol_loader.host import nftables
from netpol_loader.host.barrier import (
    BRIDGE,
    FAMILIES,
    INET,
    BarrierSpec,
    Marks,
    _content,
    raw_name,
    remark_of,
    without_sign,
)
from netpol_loader.host.netlink import attribute, attributes, nested

ALL = Marks(0x20, 0x40, 0x10)
WHOLE = BarrierSpec(ALL, 0, ("cali*", "tap0"), frozenset({"cali1"}), frozenset({1, 2}))


def expression(raw: bytes) -> tuple[str, dict[int, bytes]]:
    """Name and attributes of one expression."""
    (element,) = attributes(raw).values()
    found = attributes(element)
    return found[1].rstrip(b"\0").decode(), attributes(found[2])


def test_attributes_are_padded_and_say_their_length_without_that() -> None:
    """As struct nlattr has it; what is nested says so."""
    assert attribute(3, b"abcde") == struct.pack("=HH", 9, 3) + b"abcde\0\0\0"
    assert nested(4, nftables.number(1, 2)) == struct.pack("=HHHH", 12, 4 | 0x8000, 8, 1) + b"\0\0\0\2"
    assert nftables.text(1, "ab") == struct.pack("=HH", 7, 1) + b"ab\0\0"
    assert nftables.number(2, -450)[4:] == struct.pack("!i", -450)


def test_attributes_are_read_back() -> None:
    """By their types, also those that are marked as nested."""
    body = nested(4, nftables.text(1, "x")) + nftables.number(2, 7)
    assert attributes(body) == {4: nftables.text(1, "x"), 2: struct.pack("!I", 7)}


def test_comments_are_read_back() -> None:
    """Whatever else is in the user data; without one there is none."""
    assert nftables.read_comment(nftables.comment("seen")) == "seen"
    assert nftables.read_comment(b"\1\4\0\0\0\0" + nftables.comment("é")) == "é"
    assert nftables.read_comment(b"") == nftables.read_comment(b"\1\1\0") == nftables.read_comment(b"\0") == ""


def test_marks_are_compared_in_the_machines_order() -> None:
    """A mark is a number of the machine's; all numbers of nf_tables itself are big endian."""
    name, found = expression(nftables.bitwise(0xFFFFFFDF, 0x40))
    assert (name, attributes(found[4])[1], attributes(found[5])[1]) == (
        "bitwise", struct.pack("=I", 0xFFFFFFDF), struct.pack("=I", 0x40)
    )  # fmt: skip
    assert found[3] == struct.pack("!I", 4)


def test_elements_are_sent_in_portions() -> None:
    """An attribute has 65535 bytes at most."""
    keys = [struct.pack("=I", number) for number in range(1201)]
    found = list(nftables.change_elements(nftables.NEW_ELEMENTS, INET, "t", "s", keys))
    assert len(found) == 3
    assert all(len(one.body) < 1 << 16 for one in found)


@pytest.mark.parametrize(
    ("layout", "family", "chains"),
    [
        (WHOLE, INET, {"prerouting", "input", "output", "postrouting"}),
        (WHOLE, BRIDGE, {"prerouting", "postrouting"}),
        (BarrierSpec(ALL), INET, {"prerouting", "input", "output"}),
        (BarrierSpec(ALL), BRIDGE, {"prerouting"}),
        (without_sign(WHOLE), INET, {"input", "output"}),
        (without_sign(WHOLE), BRIDGE, None),
        (BarrierSpec(Marks()), INET, None),
    ],
)
def test_chains_of_a_layout(layout: BarrierSpec, family: int, chains: set[str] | None) -> None:
    """What closes needs the sign, new interfaces a pattern; without anything to do there is no table."""
    content = _content(layout, family)
    assert (None if content is None else set(content.rules)) == chains, FAMILIES[family]


def test_a_pattern_compares_the_beginning_and_a_name_the_whole() -> None:
    """With the zeroes behind it, or tap0 would be tap01, too."""
    content = _content(WHOLE, INET)
    assert content is not None
    _, rules = content.rules["prerouting"]
    compared = [
        attributes(expression(raw)[1][3])[1]
        for rule in rules[2:]
        for raw in rule.expressions
        if expression(raw)[0] == "cmp"
    ]
    assert compared == [b"cali", b"tap0".ljust(16, b"\0")]


def test_remarks_of_rules_tell_them_apart() -> None:
    """So a rule that was exchanged shows, whatever else is asked of the kernel."""
    first, second = (_content(BarrierSpec(Marks(seen, 0x40, 0x10)), INET) for seen in (0x20, 0x80))
    assert first is not None
    assert second is not None
    signs = [one.rules["prerouting"][1][0].remark for one in (first, second)]
    assert signs[0] != signs[1]
    assert [one.rules["output"][1] for one in (first, second)] == [first.rules["output"][1]] * 2


def test_names_are_bytes() -> None:
    """The kernel takes any; those that are no text come written out."""
    assert raw_name("cali1") == b"cali1".ljust(16, b"\0")
    assert raw_name(b"a\xff\xfeb".decode(errors="backslashreplace")) == b"a\xff\xfeb".ljust(16, b"\0")


def test_a_long_owner_is_shortened() -> None:
    """A comment has 128 bytes; two owners stay two."""
    long = [remark_of("/sys/fs/bpf/" + "x" * 200 + tail) for tail in "ab"]
    assert remark_of("/sys/fs/bpf/netpol") == "netpol-ebpf /sys/fs/bpf/netpol"
    assert len(set(long)) == 2
    assert max(map(len, long)) < 128
