# SPDX-License-Identifier: Apache-2.0
"""Messages and attributes on the wire, and links as the kernel writes them."""

from __future__ import annotations

import socket
import struct

import pytest

from netpol_loader.host.links import NO_REMOTE, parse_link
from netpol_loader.host.netlink import attribute, attributes, messages, nested


def test_attributes_are_read_as_they_are_written() -> None:
    """Of any length, padded, nested or not."""
    body = attribute(1, b"abc") + nested(18, attribute(1, b"veth\0")) + attribute(3, b"")
    found = attributes(body)
    assert found == {1: b"abc", 18: attribute(1, b"veth\0"), 3: b""}
    assert attributes(found[18]) == {1: b"veth\0"}


@pytest.mark.parametrize("body", [struct.pack("=HH", 3, 1), struct.pack("=HH", 9, 1) + bytes(4)])
def test_attributes_that_are_none_are_refused(body: bytes) -> None:
    """One that is shorter than its own head, and one that ends behind the message."""
    with pytest.raises(ValueError, match="an attribute of"):
        attributes(body)


def test_messages_of_a_datagram() -> None:
    """All of them, in order."""
    one = struct.pack("=IHHII", 17, 16, 1, 0, 0) + b"x" + bytes(3)
    other = struct.pack("=IHHII", 16, 3, 0, 0, 0)
    assert list(messages(one + other)) == [(16, 1, b"x"), (3, 0, b"")]


@pytest.mark.parametrize("length", [0, 15, 40])
def test_messages_that_are_none_are_refused(length: int) -> None:
    """One that is shorter than its own head, and one that ends behind the datagram."""
    with pytest.raises(ValueError, match="a message of"):
        list(messages(struct.pack("=IHHII", length, 16, 0, 0, 0) + bytes(8)))


def link(kind: str, data: bytes = b"", *, hardware: int = 1, family: int = socket.AF_UNSPEC) -> bytes:
    """A message's body."""
    info = nested(18, attribute(1, kind.encode() + b"\0"), *([attribute(2, data)] if data else []))
    return struct.pack("=BBHiII", family, 0, hardware, 7, 0x1, 0) + attribute(3, b"one\0") + info


@pytest.mark.parametrize(
    ("kind", "data", "takes"),
    [
        ("vxlan", attribute(15, struct.pack("!H", 4790)), ((17, 4790),)),
        ("vxlan", b"", ((17, 8472),)),
        ("geneve", attribute(5, struct.pack("!H", 6000)), ((17, 6000),)),
        ("bareudp", attribute(1, struct.pack("!H", 635)), ((17, 635),)),
        ("gtp", b"", ((17, 2152),)),
        ("sit", b"", ((41, 0), (4, 0))),
        ("veth", b"", ()),
    ],
)
def test_what_a_device_unpacks(kind: str, data: bytes, takes: tuple[tuple[int, int], ...]) -> None:
    """By its kind and, where it has one, its port."""
    found = parse_link(link(kind, data))
    assert found is not None
    assert (found.ifindex, found.name, found.kind, found.takes) == (7, "one", kind, takes)


@pytest.mark.parametrize(
    ("hardware", "data", "expected"),
    [
        (778, attribute(7, bytes((192, 0, 2, 1))), 778),
        (778, attribute(7, bytes(4)), NO_REMOTE),
        (778, attribute(7, bytes((224, 0, 0, 1))), NO_REMOTE),
        (778, attribute(6, bytes(4)), NO_REMOTE),
        (778, attribute(18, b"") + attribute(7, bytes(4)), 778),
        (823, attribute(7, bytes(16)), NO_REMOTE),
        (823, attribute(7, bytes.fromhex("fd00" + "00" * 13 + "01")), 823),
        (1, attribute(7, bytes(4)), 1),
    ],
)
def test_gre_without_the_one_remote_end(hardware: int, data: bytes, expected: int) -> None:
    """Its packets begin with the outer header; not where that is told packet by packet."""
    found = parse_link(link("gre", data, hardware=hardware))
    assert found is not None
    assert found.hardware == expected


def test_a_family_s_word_on_an_interface_is_passed_over() -> None:
    """A bridge's of a port has no kind, and would make another interface of it."""
    assert parse_link(link("veth", family=socket.AF_BRIDGE)) is None


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("vxlan", attribute(25, b"\x01"), True),
        ("vxlan", attribute(25, b"\x00"), False),
        ("vxlan", attribute(15, b"\x12\xb5"), False),
        ("geneve", attribute(6, b""), True),
        ("ipip", attribute(19, b""), True),
        ("gretap", attribute(18, b""), True),
        ("bareudp", b"", True),
        ("veth", attribute(25, b"\x01"), False),
    ],
)
def test_what_keeps_the_outer_addresses(kind: str, data: bytes, expected: bool) -> None:  # noqa: FBT001
    """By the attribute of its kind, a flag or a number."""
    found = parse_link(link(kind, data))
    assert found is not None
    assert found.is_external is expected
