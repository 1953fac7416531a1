# SPDX-License-Identifier: Apache-2.0
"""Netlink: sockets, messages and attributes for every netlink family that the loader uses.

Rejected: pyroute2, which makes an object of every attribute and a new socket for each request. This took seconds of CPU
on a node with some hundred interfaces, and a minute for the connections of a busy node.

Invariant: a socket belongs to the network namespace in which it was made. The module must not know the meaning of
messages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import TypeVar

from netpol_ebpf.errors import PlatformError

ROUTE, SOCK_DIAG, NETFILTER = socket.NETLINK_ROUTE, 4, 12
"""Netlink families (NETLINK_*)."""

# include/uapi/linux/netlink.h
REQUEST, ACK, REPLACE, EXCLUSIVE, CREATE, APPEND = 0x1, 0x4, 0x100, 0x200, 0x400, 0x800
ERROR, DONE = 2, 3
_DUMP, _INTERRUPTED = 0x300, 0x10
_SOL_NETLINK, _ADD_MEMBERSHIP, _CAP_ACK, _GET_STRICT_CHK = 270, 1, 10, 12
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_TYPE_MASK = 0x3FFF  # clears NLA_F_NESTED and NLA_F_NET_BYTEORDER
_NESTED = 0x8000

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE_BYTES = 1 << 16
"""Largest number of bytes that one receive call reads. The datagrams of a dump have at most half this size."""
_SEND_BUFFER_BYTES, _RECEIVE_BUFFER_BYTES = 16 << 20, 1 << 20
"""Sizes of the send buffer, for thousands of elements in one transaction, and of the receive buffer, for long lists.

The values are arbitrary.
"""
_NOTIFICATION_BUFFER_BYTES = 8 << 20
"""Size of the receive buffer for unread notifications. The value is arbitrary."""
DUMP_ATTEMPTS = 10
"""How often one dump is tried at most. The kernel marks a dump that a change interrupted (NLM_F_DUMP_INTR).

The value is arbitrary.
"""

Message = tuple[int, int, bytes]
"""A netlink message: its type, its flags, and the bytes after its header."""


class NetlinkError(PlatformError):
    """The kernel refused a request, or a message could not be sent or received. ``code``: the errno."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"{what}: {os.strerror(code)}")
        self.code = code


# --- attributes -----------------------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute of type ``kind``, padded to a multiple of 4 bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """Encode an attribute of type ``kind`` that contains the attributes ``parts``."""
    return attribute(kind | _NESTED, b"".join(parts))


def listed_attributes(body: bytes, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Decode attributes, each as (type, payload), in order, from offset ``at`` of ``body``.

    Raises ValueError if an attribute is malformed.
    """
    end = len(body)
    while at < end:
        size, kind = _ATTRIBUTE.unpack_from(body, at) if end - at >= _ATTRIBUTE.size else (0, 0)
        if size < _ATTRIBUTE.size or at + size > end:
            raise ValueError(f"an attribute of {size} bytes where {end - at} are left")
        yield kind & _TYPE_MASK, body[at + _ATTRIBUTE.size : at + size]
        at += (size + 3) & ~3


def attributes(body: bytes, at: int = 0) -> dict[int, bytes]:
    """Decode attributes into payloads by attribute type; of several with one type, the last counts.

    Raises ValueError.
    """
    return dict(listed_attributes(body, at))


def read_text(raw: bytes) -> str:
    r"""Decode a name, up to its first zero byte.

    A byte that is not UTF-8, which the kernel allows, becomes ``\xNN``.
    """
    return raw.split(b"\0")[0].decode(errors="backslashreplace")


def read_number(raw: bytes | None) -> int:
    """Decode a 32-bit integer in host order.

    Returns 0 if ``raw`` is None, because the message has no such attribute.
    """
    return 0 if raw is None else int(struct.unpack("=I", raw)[0])


# --- messages -------------------------------------------------------------------------------------------------------


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Encode one message.

    It is not padded, because the length of every body that the loader sends is a multiple of 4 bytes.
    """
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def messages(data: bytes) -> Iterator[Message]:
    """Split a datagram into its messages. Raises ValueError if the length of a message is wrong."""
    at, end = 0, len(data)
    while at + _HEADER.size <= end:
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > end:
            raise ValueError(f"a message of {length} bytes where {end - at} are left")
        yield kind, flags, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def error_code(payload: bytes) -> int:
    """The errno in an ERROR or DONE message, as a positive number; 0: success."""
    return -int(struct.unpack_from("=i", payload)[0]) if len(payload) >= 4 else 0  # noqa: PLR2004 - an int of C


ChannelT = TypeVar("ChannelT", bound="Channel")


class Channel:
    """A netlink socket for requests and their answers. The class is a context manager."""

    def __init__(self, family: int, subject: str) -> None:
        """``subject``: the text at the beginning of error messages.

        Raises NetlinkError if the kernel lacks the family.
        """
        self._subject = subject
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, f"{subject}: the kernel does not have it") from error
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)  # acknowledgements and errors do not repeat the request
        with contextlib.suppress(OSError):  # a larger buffer only makes dumps faster
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        self._socket.bind((0, 0))
        self._sequence = 0

    @property
    def port(self) -> int:
        """The netlink port id of the socket."""
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self: ChannelT) -> ChannelT:  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, kind: int, body: bytes, flags: int = 0, *, what: str = "") -> list[Message]:
        """Send one request. Returns the answers without the acknowledgement. ``what``: text for error messages.

        Raises NetlinkError.
        """
        self._send(kind, body, flags | ACK)
        found: list[Message] = []
        for one in self._received():
            if one[0] == ERROR:
                self._raise_error(one[2], what)
                break
            found.append(one)
        return found

    def stream(self, kind: int, body: bytes, *, what: str = "") -> Iterator[Message]:
        """The messages of a dump, one by one. An interrupted dump is not repeated. Raises NetlinkError.

        The last message has the type DONE. If the caller stops before that message, the channel can make no further
        request.
        """
        self._send(kind, body, _DUMP)
        for one in self._received():
            if one[0] in (DONE, ERROR):
                self._raise_error(one[2], what)
                yield DONE, one[1], b""
                return
            yield one

    def dump(self, kind: int, body: bytes, *, what: str = "") -> list[bytes]:
        """The objects of a dump, each as the bytes after its header. An interrupted dump is repeated.

        Raises NetlinkError. Raises PlatformError if DUMP_ATTEMPTS dumps in a row were interrupted.
        """
        for _ in range(DUMP_ATTEMPTS):
            found = list(self.stream(kind, body, what=what))
            if not any(flags & _INTERRUPTED for _, flags, _ in found):
                return [payload for _, _, payload in found[:-1]]
        raise PlatformError(f"{self._subject}: whatever is listed changes faster than the kernel can list it")

    def first(self, kind: int, body: bytes, most: int) -> list[bytes]:
        """The first objects of a dump: at most ``most`` + 1, which shows whether there are more than ``most``.

        Use this method if a workload controls the length of the dump. The result may contain some of the changes that
        happen during the dump. If the dump has more objects, the channel can make no further request. Raises
        NetlinkError.
        """
        found = []
        for kind_, _, payload in self.stream(kind, body):
            if kind_ != DONE:
                found.append(payload)
            if len(found) > most:
                break
        return found

    def transact(self, parts: Iterable[tuple[int, int, bytes]]) -> list[int]:
        """Send messages, each (type, flags, body), as one datagram. Returns the errno of each answer; 0: success.

        The family must have answered when send(2) returns (nfnetlink). Raises NetlinkError.
        """
        with contextlib.suppress(OSError):  # only thousands of elements need the larger buffer
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        self._sequence += 1
        data = b"".join(message(kind, flags, self._sequence, body) for kind, flags, body in parts)
        self._transmit(data)
        found: list[int] = []
        with contextlib.suppress(BlockingIOError):
            for kind, _, payload in self._received(socket.MSG_DONTWAIT):
                if kind == ERROR:
                    found.append(error_code(payload))
        return found

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._sequence += 1
        self._transmit(message(kind, REQUEST | flags, self._sequence, body))

    def _transmit(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, f"{self._subject}: a request could not be sent") from error

    def _received(self, flags: int = 0) -> Iterator[Message]:
        """The answers to the last request, without end. Answers to an earlier, abandoned request are skipped.

        Raises BlockingIOError if ``flags`` has MSG_DONTWAIT and no answer is queued. Raises NetlinkError if an answer
        was lost.
        """
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES, flags)
            except BlockingIOError:
                raise
            except OSError as error:
                raise NetlinkError(error.errno or errno.EIO, f"{self._subject}: an answer was lost") from error
            if _HEADER.unpack_from(data)[3] == self._sequence:
                yield from messages(data)

    def _raise_error(self, payload: bytes, what: str) -> None:
        """Raise NetlinkError for the errno in an ERROR or DONE message, unless the errno is 0."""
        code = error_code(payload)
        if code:
            raise NetlinkError(code, f"{self._subject}: {what}" if what else self._subject)


class RouteChannel(Channel):
    """An rtnetlink channel with strict checking (NETLINK_GET_STRICT_CHK).

    The kernel then refuses a dump request with a filter that it does not know. Without strict checking, it would ignore
    the filter and dump all objects.
    """

    def __init__(self) -> None:
        super().__init__(ROUTE, "rtnetlink")
        self._socket.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)


class Notifications:
    """A netlink socket that receives the kernel's notifications of some multicast groups, from its creation on."""

    def __init__(self, family: int, groups: tuple[int, ...]) -> None:
        """``groups``: numbers of multicast groups (RTNLGRP_*, NFNLGRP_*). Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _NOTIFICATION_BUFFER_BYTES)
        except PermissionError:  # in a user namespace: up to net.core.rmem_max
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NOTIFICATION_BUFFER_BYTES)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._socket.settimeout(0)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def fileno(self) -> int:
        """A descriptor for select, readable if a notification is queued."""
        return self._socket.fileno()

    def take(self) -> bytes | None:
        """The next datagram, without waiting. b"": none is queued.

        None: the kernel has dropped notifications (ENOBUFS).
        """
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None
            raise
