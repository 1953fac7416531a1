# SPDX-License-Identifier: Apache-2.0
"""nf_tables over nfnetlink: transactions of tables, chains, rules, sets and counters, and what the kernel holds of them.

Raw netlink: a node needs no `nft` binary, and pyroute2's nf_tables differ between the versions that distributions have.
Invariants: a transaction is in force as a whole or not at all; everything is about the network namespace in which the
socket was made.  Must not know what a table is for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from netpol_ebpf.errors import PlatformError

INET, BRIDGE = 1, 7
"""NFPROTO_INET, NFPROTO_BRIDGE: families of tables."""
PREROUTING, INPUT, OUTPUT, POSTROUTING = 0, 1, 3, 4
"""enum nf_inet_hooks; enum nf_br_hook_priorities' hooks have the same numbers."""

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h
_NETLINK_NETFILTER, _SOL_NETLINK, _NETLINK_CAP_ACK = 12, 270, 10
_SO_SNDBUFFORCE = 32
_REQUEST, _ACK, _DUMP, _INTERRUPTED = 0x1, 0x4, 0x300, 0x10
CREATE, APPEND = 0x400, 0x800
_ERROR, _DONE = 2, 3
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10
_NEWS_GROUP = 7  # NFNLGRP_NFTABLES
NEW_TABLE, GET_TABLE, DELETE_TABLE, NEW_CHAIN, GET_CHAIN = 0, 1, 2, 3, 4
NEW_RULE, GET_RULE, NEW_SET = 6, 7, 9
NEW_ELEMENTS, GET_ELEMENTS, DELETE_ELEMENTS = 12, 13, 14
GET_GENERATION, NEW_OBJECT, GET_OBJECT = 16, 18, 19

OWNER, PERSIST, DORMANT = 0x2, 0x4, 0x1
"""NFT_TABLE_F_*: nobody else changes the table while the socket lives (5.12); it outlives the socket (6.9); it is switched off."""

MARK, IN_INDEX, OUT_INDEX, PROTOCOL, IN_NAME, OUT_NAME = 3, 4, 5, 1, 6, 7
"""enum nft_meta_keys."""
EQUAL, UNEQUAL = 0, 1
DROP, ACCEPT = 0, 1
NAME_TYPE, INDEX_TYPE = 41, 20
"""What `nft` calls ifname and iface_index (datatype.h); the kernel only keeps it."""
NAME_BYTES, INDEX_BYTES = 16, 4
_REGISTER = 1
_COUNTER = 1  # NFT_OBJECT_COUNTER

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("!BBH")  # struct nfgenmsg: family, version, resource
_ATTRIBUTE = struct.Struct("=HH")
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_LIST_ELEMENT = 1
_RECEIVE_BYTES = 1 << 18
_SEND_BYTES = 16 << 20
ELEMENTS_A_MESSAGE = 500
"""Elements in one attribute, of which 65535 bytes are the most."""
DUMP_ATTEMPTS = 10
"""A dump that a change interrupts begins again; arbitrary."""

Attributes = dict[int, bytes]


class NftablesError(PlatformError):
    """An answer of the kernel; ``code`` is its errno."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"nf_tables: {what}: {os.strerror(code)}")
        self.code = code


# --- attributes -----------------------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """A number of 32 bits, as nf_tables wants all of its own: big endian."""
    return attribute(kind, struct.pack("!I", value & 0xFFFF_FFFF))


def text(kind: int, value: str) -> bytes:
    """A name."""
    return attribute(kind, value.encode() + b"\0")


def parse(body: bytes) -> Attributes:
    """Attributes by type; of several of one type the last."""
    return dict(_attributes(body))


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        yield kind & _TYPE_MASK, body[at + _ATTRIBUTE.size : at + size]
        at += max((size + 3) & ~3, _ATTRIBUTE.size)


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def comment(value: str) -> bytes:
    """User data that `nft` shows as a comment: type 0, length, text."""
    raw = value.encode() + b"\0"
    return bytes((0, len(raw))) + raw


def read_comment(raw: bytes) -> str:
    """The comment of user data; "" where there is none."""
    at = 0
    while at + 2 <= len(raw):
        kind, size = raw[at], raw[at + 1]
        if kind == 0:
            return _text(raw[at + 2 : at + 2 + size])
        at += 2 + size
    return ""


# --- expressions of a rule ------------------------------------------------------------------------------------------


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(_LIST_ELEMENT, text(1, name), nested(2, *attributes))


def load_meta(key: int) -> bytes:
    """Take a fact about the packet (MARK, IN_NAME, ...) into the register."""
    return _expression("meta", number(2, key), number(1, _REGISTER))


def store_mark() -> bytes:
    """The register becomes the packet's mark."""
    return _expression("meta", number(2, MARK), number(3, _REGISTER))


def bitwise(mask: int, toggle: int = 0) -> bytes:
    """The register becomes ``register & mask ^ toggle``, 32 bits in the machine's order."""
    values = [nested(kind, attribute(1, struct.pack("=I", value))) for kind, value in ((4, mask), (5, toggle))]
    return _expression("bitwise", number(1, _REGISTER), number(2, _REGISTER), number(3, 4), *values)


def compare(value: bytes, operator: int = EQUAL) -> bytes:
    """End the rule unless the beginning of the register is (or is not) this."""
    return _expression("cmp", number(1, _REGISTER), number(2, operator), nested(3, attribute(1, value)))


def look_up(name: str, *, is_absent: bool = False) -> bytes:
    """End the rule unless the register is (or is not) in a set."""
    flags = (number(5, 1),) if is_absent else ()
    return _expression("lookup", text(1, name), number(2, _REGISTER), *flags)


def count(name: str) -> bytes:
    """Count the packet in a named counter."""
    return _expression("objref", number(1, _COUNTER), text(2, name))


def verdict(code: int) -> bytes:
    """ACCEPT: on to the next hook; DROP."""
    return _expression("immediate", number(1, 0), nested(2, nested(2, number(1, code))))


# --- messages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """One step of a transaction."""

    kind: int
    family: int
    body: bytes
    flags: int = 0


def new_table(family: int, name: str, flags: int, remark: str) -> Message:
    """Make a table, or take over one that is there; ``remark`` is that of a new one."""
    body = text(1, name) + number(2, flags) + attribute(6, comment(remark))
    return Message(NEW_TABLE, family, body, CREATE)


def delete_table(family: int, name: str) -> Message:
    """Delete a table with all that is in it."""
    return Message(DELETE_TABLE, family, text(1, name))


def new_chain(family: int, table: str, name: str, hook: int, priority: int) -> Message:
    """Make a base chain of type filter, whose policy is accept."""
    place = nested(4, number(1, hook), number(2, priority))
    return Message(
        NEW_CHAIN, family, text(1, table) + text(3, name) + place + number(5, ACCEPT) + text(7, "filter"), CREATE
    )


def new_rule(family: int, table: str, chain: str, expressions: Iterable[bytes], remark: str) -> Message:
    """Append a rule."""
    body = text(1, table) + text(2, chain) + nested(4, *expressions) + attribute(7, comment(remark))
    return Message(NEW_RULE, family, body, CREATE | APPEND)


def new_counter(family: int, table: str, name: str, packets: int = 0, octets: int = 0) -> Message:
    """Make a named counter with a value to begin with."""
    value = nested(4, attribute(1, struct.pack("!Q", octets)), attribute(2, struct.pack("!Q", packets)))
    return Message(NEW_OBJECT, family, text(1, table) + text(2, name) + number(3, _COUNTER) + value, CREATE)


def new_set(family: int, table: str, name: str, key_type: int, key_bytes: int, number_here: int) -> Message:
    """Make a set whose elements count the packets that they met. ``number_here``: its own in this transaction."""
    byte_order = struct.pack("=BBI", 0, 4, 1)  # for nft: the machine's
    body = text(1, table) + text(2, name) + number(3, 0) + number(4, key_type) + number(5, key_bytes)
    body += number(10, number_here) + attribute(13, byte_order) + nested(17, text(1, "counter"), nested(2))
    return Message(NEW_SET, family, body, CREATE)


def change_elements(kind: int, family: int, table: str, name: str, keys: Sequence[bytes]) -> Iterator[Message]:
    """Add elements to a set or delete them. ``kind``: NEW_ELEMENTS or DELETE_ELEMENTS."""
    for at in range(0, len(keys), ELEMENTS_A_MESSAGE):
        some = [nested(_LIST_ELEMENT, nested(1, attribute(1, key))) for key in keys[at : at + ELEMENTS_A_MESSAGE]]
        body = text(1, table) + text(2, name) + nested(3, *some)
        yield Message(kind, family, body, CREATE if kind == NEW_ELEMENTS else 0)


# --- what the kernel holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """``owner``: netlink port that alone may change it, 0: anybody may."""

    flags: int
    owner: int
    remark: str


@dataclass(frozen=True, slots=True)
class Chain:
    """A base chain, or one without a hook (``hook`` -1)."""

    hook: int
    priority: int
    policy: int
    kind: str


class Nftables:
    """A netlink socket for nf_tables. A context manager; tables that it owns are released at the end.

    All methods raise NftablesError with the kernel's answer.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        except OSError as error:
            raise NftablesError(error.errno or errno.EIO, "the kernel has no nfnetlink") from error
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        with contextlib.suppress(OSError):  # more room is needed for thousands of elements alone
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BYTES)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 0))
        self._socket.settimeout(0)  # nf_tables has answered when send returns
        self._sequence = 0

    @property
    def port(self) -> int:
        """Its netlink port: the owner of the tables that it makes with OWNER."""
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Nftables:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def commit(self, messages: Sequence[Message], *, is_trial: bool = False) -> None:
        """Put all messages in force, or none and raise. ``is_trial``: only ask whether they could be."""
        self._sequence += 1
        begin = _message(_BATCH_BEGIN, _REQUEST, self._sequence, 0, _SUBSYSTEM)
        parts = [begin]
        for place, one in enumerate(messages, 1):
            flags = _REQUEST | one.flags | (_ACK if place == len(messages) else 0)
            parts.append(_message(_SUBSYSTEM << 8 | one.kind, flags, self._sequence, one.family, 0, one.body))
        if not is_trial:  # a batch without an end is checked and given up
            parts.append(_message(_BATCH_END, _REQUEST, self._sequence, 0, _SUBSYSTEM))
        self._send(b"".join(parts))
        answers = [code for kind, code, _ in self._answers() if kind == _ERROR]
        failed = next((code for code in answers if code), 0)
        if failed or not answers:
            raise NftablesError(failed or errno.EIO, "the change was refused")

    def generation(self) -> int:
        """A number that each change of any table of the namespace changes."""
        for kind, code, body in self._ask(GET_GENERATION, 0, _REQUEST, b""):
            if kind == _ERROR:
                raise NftablesError(code or errno.EIO, "its generation")
            return _number(parse(body)[1])
        raise NftablesError(errno.EIO, "its generation")

    def table(self, family: int, name: str) -> Table | None:
        """A table, None when there is none."""
        for kind, code, body in self._ask(GET_TABLE, family, _REQUEST, text(1, name)):
            if kind == _ERROR and code == errno.ENOENT:
                return None
            if kind == _ERROR:
                raise NftablesError(code or errno.EIO, f"table {name}")
            found = parse(body)
            return Table(_number(found.get(2, b"")), _number(found.get(7, b"")), read_comment(found.get(6, b"")))
        return None

    def chains(self, family: int, table: str) -> dict[str, Chain]:
        """The chains of a table."""
        found = {}
        for body in self._dump(GET_CHAIN, family, text(1, table)):
            one = parse(body)
            if _text(one[1]) == table:
                hook = parse(one.get(4, b""))
                priority = struct.unpack("!i", hook.get(2, bytes(4)))[0]
                place = _number(hook[1]) if 1 in hook else -1
                found[_text(one[3])] = Chain(place, priority, _number(one.get(5, b"\1")), _text(one.get(7, b"")))
        return found

    def rules(self, family: int, table: str) -> dict[str, list[str]]:
        """The remarks of the rules of a table, by chain and in their order."""
        found: dict[str, list[str]] = {}
        for body in self._dump(GET_RULE, family, text(1, table)):
            one = parse(body)
            if _text(one[1]) == table:
                found.setdefault(_text(one[2]), []).append(read_comment(one.get(7, b"")))
        return found

    def elements(self, family: int, table: str, name: str) -> dict[bytes, int] | None:
        """The keys of a set and the packets that each met; None when there is no such set."""
        found = {}
        try:
            for body in self._dump(GET_ELEMENTS, family, text(1, table) + text(2, name)):
                for _, raw in _attributes(parse(body).get(3, b"")):
                    element = parse(raw)
                    counted = parse(parse(element.get(7, b"")).get(2, b""))
                    found[parse(element[1])[1]] = _number(counted.get(2, b""))
        except NftablesError as error:
            if error.code == errno.ENOENT:
                return None
            raise
        return found

    def counters(self, family: int, table: str) -> dict[str, tuple[int, int]]:
        """Packets and bytes of the named counters of a table."""
        found = {}
        for body in self._dump(GET_OBJECT, family, text(1, table) + number(3, _COUNTER)):
            one = parse(body)
            if _text(one[1]) == table and _number(one[3]) == _COUNTER:
                value = parse(one.get(4, b""))
                found[_text(one[2])] = (_number(value.get(2, b"")), _number(value.get(1, b"")))
        return found

    def _dump(self, kind: int, family: int, body: bytes) -> list[bytes]:
        """The entries, of one moment; those of a table that is not there: none."""
        for _ in range(DUMP_ATTEMPTS):
            entries, is_whole = [], True
            for answer, code, entry in self._ask(kind, family, _REQUEST | _DUMP, body):
                if answer == _ERROR and code == errno.ENOENT and kind != GET_ELEMENTS:
                    return []
                if answer == _ERROR:
                    raise NftablesError(code, "a list of what is there")
                if answer == _INTERRUPTED:
                    is_whole = False
                else:
                    entries.append(entry)
            if is_whole:
                return entries
        raise NftablesError(errno.EINTR, "a list of what is there")

    def _ask(self, kind: int, family: int, flags: int, body: bytes) -> list[tuple[int, int, bytes]]:
        self._sequence += 1
        self._send(_message(_SUBSYSTEM << 8 | kind, flags, self._sequence, family, 0, body))
        return list(self._answers(is_dump=bool(flags & _DUMP)))

    def _send(self, data: bytes) -> None:
        try:
            while True:  # what an earlier question left
                self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            pass
        except OSError as error:
            raise NftablesError(error.errno or errno.EIO, "an earlier answer was lost") from error
        try:
            self._socket.send(data)
        except OSError as error:
            raise NftablesError(error.errno or errno.EIO, "a question could not be sent") from error

    def _answers(self, *, is_dump: bool = False) -> Iterator[tuple[int, int, bytes]]:
        """Answers to the last question: (_ERROR, errno or 0, b""), (_INTERRUPTED, 0, b""), or (0, 0, attributes)."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                yield _ERROR, error.errno or errno.EIO, b""
                return
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
                body = data[at + _HEADER.size : at + length]
                at += max((length + 3) & ~3, _HEADER.size)
                if sequence != self._sequence:
                    continue
                if kind == _ERROR:
                    yield _ERROR, -struct.unpack_from("=i", body)[0], b""
                elif is_dump and flags & _INTERRUPTED:
                    yield _INTERRUPTED, 0, b""
                elif kind != _DONE:
                    yield 0, 0, body[_GENERIC.size :]


class News:
    """A socket that is readable when something has changed any table of the namespace. Raises NftablesError."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
            self._socket.settimeout(0)
            self._socket.bind((0, 1 << (_NEWS_GROUP - 1)))
        except OSError as error:
            raise NftablesError(error.errno or errno.EIO, "news of changes") from error

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def take(self) -> bool:
        """Whether there was news; afterwards there is none. What it was is not looked at, so that losing some is no loss."""
        is_news = False
        while True:
            try:
                self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return is_news
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            is_news = True

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def _message(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes = b"") -> bytes:
    whole = _GENERIC.pack(family, 0, resource) + body
    return _HEADER.pack(_HEADER.size + len(whole), kind, flags, sequence, 0) + whole
