# SPDX-License-Identifier: Apache-2.0
"""rtnetlink on the wire: one socket for many requests, messages and attributes.

Raw netlink, not pyroute2: a library that makes objects of every attribute, with a new socket for each request, took
seconds of CPU for a node with some hundred interfaces.  Invariant: a socket is about the network namespace in which it was made.
Must not know what a message means.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

from netpol_ebpf.errors import PlatformError

# include/uapi/linux/netlink.h
REQUEST, ACK, REPLACE, EXCLUSIVE, CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_DUMP, _INTERRUPTED = 0x300, 0x10
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _ADD_MEMBERSHIP, _GET_STRICT_CHK = 270, 1, 12
_SO_RCVBUFFORCE = 33
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED, NLA_F_NET_BYTEORDER
_NESTED = 0x8000

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE_BYTES = 1 << 16
_NEWS_BYTES = 8 << 20
"""Room for news that nobody has read yet; arbitrary."""
DUMP_ATTEMPTS = 10
"""A dump that a change interrupts begins again; arbitrary."""

Message = tuple[int, int, bytes]
"""Type, flags and what follows the header."""


class RtnetlinkError(PlatformError):
    """An answer of the kernel; ``code`` is its errno."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rtnetlink: {os.strerror(code)}")
        self.code = code


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NESTED, b"".join(parts))


def attributes(body: bytes, at: int = 0) -> dict[int, bytes]:
    """Attributes by type, from an offset on. Raises ValueError for what is no list of attributes."""
    found = {}
    end = len(body)
    while at < end:
        size, kind = _ATTRIBUTE.unpack_from(body, at) if end - at >= _ATTRIBUTE.size else (0, 0)
        if size < _ATTRIBUTE.size or at + size > end:
            raise ValueError(f"an attribute of {size} bytes where {end - at} are left")
        found[kind & _TYPE_MASK] = body[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


def messages(data: bytes) -> Iterator[Message]:
    """The messages of a datagram. Raises ValueError for what is none."""
    at, end = 0, len(data)
    while at + _HEADER.size <= end:
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > end:
            raise ValueError(f"a message of {length} bytes where {end - at} are left")
        yield kind, flags, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


class Rtnetlink:
    """Requests and their answers. A context manager.

    The kernel checks strictly: a dump with a condition that it does not know is refused, not answered with everything.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Rtnetlink:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, kind: int, body: bytes, flags: int = 0) -> list[Message]:
        """The answers to one request, without the acknowledgement. Raises RtnetlinkError."""
        self._send(kind, body, flags | ACK)
        found: list[Message] = []
        for message in self._received():
            if message[0] == _ERROR:
                _raise_error(message[2])
                break
            found.append(message)
        return found

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All objects of a kind: what follows the header, of each. Raises RtnetlinkError, and PlatformError when changes never let it end."""
        for _ in range(DUMP_ATTEMPTS):
            found, is_whole = self._dump_once(kind, body)
            if is_whole:
                return found
        raise PlatformError("rtnetlink: whatever is listed changes faster than the kernel can list it")

    def first(self, kind: int, body: bytes, most: int) -> list[bytes]:
        """As `dump`, at most ``most`` objects and one more: of a list whose owner may make it long, and change it, at will.

        What changes did to the list meanwhile will do.  A list that was not read to its end leaves the socket unable to ask anything
        else.  Raises RtnetlinkError.
        """
        return self._dump_once(kind, body, most)[0]

    def _dump_once(self, kind: int, body: bytes, most: int | None = None) -> tuple[list[bytes], bool]:
        self._send(kind, body, _DUMP)
        found: list[bytes] = []
        is_whole = True
        for type_, flags, payload in self._received():
            is_whole = is_whole and not flags & _INTERRUPTED
            if type_ == _DONE:
                if len(payload) >= 4:  # noqa: PLR2004 - the errno of a dump that failed on its way
                    _raise_error(payload)
                break
            if type_ == _ERROR:
                _raise_error(payload)
                break
            found.append(payload)
            if most is not None and len(found) > most:
                break
        return found, is_whole

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._sequence += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, REQUEST | flags, self._sequence, 0) + body)

    def _received(self) -> Iterator[Message]:
        """What the kernel says to the last request; what an earlier one, that was given up, left behind is passed over."""
        while True:
            data = self._socket.recv(_RECEIVE_BYTES)
            if _HEADER.unpack_from(data)[3] == self._sequence:
                yield from messages(data)


def _raise_error(payload: bytes) -> None:
    """Raise for an errno, unless it is 0."""
    code = -struct.unpack_from("=i", payload)[0]
    if code:
        raise RtnetlinkError(code)


class News:
    """A socket that receives what the kernel tells everybody, from the moment it is made. ``groups``: RTNLGRP_*."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _NEWS_BYTES)
        except PermissionError:  # of a user namespace: as much as everybody may have
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NEWS_BYTES)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._socket.settimeout(0)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def fileno(self) -> int:
        """For select: readable when there is news."""
        return self._socket.fileno()

    def take(self) -> bytes | None:
        """One datagram; empty: there is none. None: some were lost."""
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None
            raise
