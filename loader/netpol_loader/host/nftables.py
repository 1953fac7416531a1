# SPDX-License-Identifier: Apache-2.0
"""nf_tables over nfnetlink: transactions that change tables, chains, rules, sets and counters, and reads of all these.

The module speaks raw netlink. So a node needs no `nft` binary. Rejected: pyroute2, whose nf_tables code differs between
the versions that distributions have.

Invariants: a transaction is in force as a whole or not at all. Every call acts in the network namespace in which the
socket was made. The module must not know the purpose of a table.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from netpol_loader.host.netlink import (
    ACK,
    APPEND,
    CREATE,
    NETFILTER,
    REQUEST,
    Channel,
    NetlinkError,
    Notifications,
    attribute,
    attributes,
    listed_attributes,
    nested,
)

INET, BRIDGE = 1, 7
"""Families of tables (NFPROTO_INET, NFPROTO_BRIDGE)."""
PREROUTING, INPUT, OUTPUT, POSTROUTING = 0, 1, 3, 4
"""Hooks (enum nf_inet_hooks). The hooks of bridges have the same numbers."""

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10
_NOTIFICATIONS = 7  # NFNLGRP_NFTABLES
NEW_TABLE, GET_TABLE, DELETE_TABLE, NEW_CHAIN, GET_CHAIN = 0, 1, 2, 3, 4
NEW_RULE, GET_RULE, NEW_SET = 6, 7, 9
NEW_ELEMENTS, GET_ELEMENTS, DELETE_ELEMENTS = 12, 13, 14
GET_GENERATION, NEW_OBJECT, GET_OBJECT = 16, 18, 19

OWNER, PERSIST, DORMANT = 0x2, 0x4, 0x1
"""Flags of a table (NFT_TABLE_F_*).

OWNER: only the socket that owns the table can change the table (since Linux 5.12). PERSIST: the table remains when that
socket is closed (since Linux 6.9). DORMANT: the table is disabled.
"""

MARK, IN_INDEX, OUT_INDEX, PROTOCOL, IN_NAME, OUT_NAME = 3, 4, 5, 1, 6, 7
"""Properties of a packet (enum nft_meta_keys)."""
EQUAL, UNEQUAL = 0, 1
DROP, ACCEPT = 0, 1
NAME_TYPE, INDEX_TYPE = 41, 20
"""Types of set keys, ifname and iface_index, as `nft` numbers them (datatype.h).

The kernel only stores these numbers.
"""
NAME_BYTES, INDEX_BYTES = 16, 4
_REGISTER = 1
_COUNTER = 1  # NFT_OBJECT_COUNTER

_GENERIC = struct.Struct("!BBH")  # struct nfgenmsg: family, version, resource
_LIST_ELEMENT = 1
ELEMENTS_A_MESSAGE = 500
"""Largest number of elements in one message. They are in one attribute, which has at most 65535 bytes."""


# --- attributes -----------------------------------------------------------------------------------------------------


def number(kind: int, value: int) -> bytes:
    """Encode an attribute with a 32-bit number in big-endian order, as nf_tables expects."""
    return attribute(kind, struct.pack("!I", value & 0xFFFF_FFFF))


def text(kind: int, value: str) -> bytes:
    """Encode an attribute with a string."""
    return attribute(kind, value.encode() + b"\0")


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def comment(value: str) -> bytes:
    """Encode user data of an object that `nft` shows as the object's comment: type 0, length, text."""
    raw = value.encode() + b"\0"
    return bytes((0, len(raw))) + raw


def read_comment(raw: bytes) -> str:
    """Decode the comment in the user data of an object. "" if there is none."""
    at = 0
    while at + 2 <= len(raw):
        kind, size = raw[at], raw[at + 1]
        if kind == 0:
            return _text(raw[at + 2 : at + 2 + size])
        at += 2 + size
    return ""


# --- expressions of a rule ------------------------------------------------------------------------------------------


def _expression(name: str, *parts: bytes) -> bytes:
    return nested(_LIST_ELEMENT, text(1, name), nested(2, *parts))


def load_meta(key: int) -> bytes:
    """Expression: load a property of the packet (``key``: MARK, IN_NAME, ...) into the register."""
    return _expression("meta", number(2, key), number(1, _REGISTER))


def store_mark() -> bytes:
    """Expression: set the packet's mark to the value of the register."""
    return _expression("meta", number(2, MARK), number(3, _REGISTER))


def bitwise(mask: int, toggle: int = 0) -> bytes:
    """Expression: set the register to ``register & mask ^ toggle``, a 32-bit number in host order."""
    values = [nested(kind, attribute(1, struct.pack("=I", value))) for kind, value in ((4, mask), (5, toggle))]
    return _expression("bitwise", number(1, _REGISTER), number(2, _REGISTER), number(3, 4), *values)


def compare(value: bytes, operator: int = EQUAL) -> bytes:
    """Expression: compare the first bytes of the register with ``value``, and end the rule unless they are equal.

    ``operator`` UNEQUAL: end the rule unless they differ.
    """
    return _expression("cmp", number(1, _REGISTER), number(2, operator), nested(3, attribute(1, value)))


def look_up(name: str, *, is_absent: bool = False) -> bytes:
    """Expression: end the rule unless the register's value is in the set ``name``.

    ``is_absent``: the opposite; end the rule unless the value is absent from the set.
    """
    flags = (number(5, 1),) if is_absent else ()
    return _expression("lookup", text(1, name), number(2, _REGISTER), *flags)


def count(name: str) -> bytes:
    """Expression: count the packet in the counter ``name``."""
    return _expression("objref", number(1, _COUNTER), text(2, name))


def verdict(code: int) -> bytes:
    """Expression: give the verdict ``code``: DROP, or ACCEPT, with which the packet goes on to the next hook."""
    return _expression("immediate", number(1, 0), nested(2, nested(2, number(1, code))))


# --- messages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NftMessage:
    """One change of a transaction."""

    kind: int
    family: int
    body: bytes
    flags: int = 0


def new_table(family: int, name: str, flags: int, remark: str) -> NftMessage:
    """The message that makes a table, or takes over a table that has no owner.

    ``flags``: of the table; with OWNER, the socket that sends the message owns the table. ``remark``: the comment of a
    new table.
    """
    body = text(1, name) + number(2, flags) + attribute(6, comment(remark))
    return NftMessage(NEW_TABLE, family, body, CREATE)


def delete_table(family: int, name: str) -> NftMessage:
    """The message that deletes a table with everything in it."""
    return NftMessage(DELETE_TABLE, family, text(1, name))


def new_chain(family: int, table: str, name: str, hook: int, priority: int) -> NftMessage:
    """The message that makes a base chain of type filter with the policy accept."""
    place = nested(4, number(1, hook), number(2, priority))
    return NftMessage(
        NEW_CHAIN, family, text(1, table) + text(3, name) + place + number(5, ACCEPT) + text(7, "filter"), CREATE
    )


def new_rule(family: int, table: str, chain: str, expressions: Iterable[bytes], remark: str) -> NftMessage:
    """The message that appends a rule with these expressions to a chain. ``remark``: the rule's comment."""
    body = text(1, table) + text(2, chain) + nested(4, *expressions) + attribute(7, comment(remark))
    return NftMessage(NEW_RULE, family, body, CREATE | APPEND)


def new_counter(family: int, table: str, name: str, packets: int = 0, octets: int = 0) -> NftMessage:
    """The message that makes a named counter with an initial value."""
    value = nested(4, attribute(1, struct.pack("!Q", octets)), attribute(2, struct.pack("!Q", packets)))
    return NftMessage(NEW_OBJECT, family, text(1, table) + text(2, name) + number(3, _COUNTER) + value, CREATE)


def new_set(family: int, table: str, name: str, key_type: int, key_bytes: int, number_here: int) -> NftMessage:
    """The message that makes a set in which each element has a packet counter.

    ``number_here``: id of the set in this transaction.
    """
    byte_order = struct.pack("=BBI", 0, 4, 1)  # for nft: the set's keys are in the machine's byte order
    body = text(1, table) + text(2, name) + number(3, 0) + number(4, key_type) + number(5, key_bytes)
    body += number(10, number_here) + attribute(13, byte_order) + nested(17, text(1, "counter"), nested(2))
    return NftMessage(NEW_SET, family, body, CREATE)


def change_elements(kind: int, family: int, table: str, name: str, keys: Sequence[bytes]) -> Iterator[NftMessage]:
    """The messages that add elements to a set or delete them. ``kind``: NEW_ELEMENTS or DELETE_ELEMENTS."""
    for at in range(0, len(keys), ELEMENTS_A_MESSAGE):
        some = [nested(_LIST_ELEMENT, nested(1, attribute(1, key))) for key in keys[at : at + ELEMENTS_A_MESSAGE]]
        body = text(1, table) + text(2, name) + nested(3, *some)
        yield NftMessage(kind, family, body, CREATE if kind == NEW_ELEMENTS else 0)


# --- what the kernel holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NftTable:
    """A table. ``owner``: netlink port id of the only socket that may change the table; 0: every socket may."""

    flags: int
    owner: int
    remark: str


@dataclass(frozen=True, slots=True)
class NftChain:
    """A base chain, or a regular chain. A regular chain has no hook: its ``hook`` is -1."""

    hook: int
    priority: int
    policy: int
    kind: str


class Nftables(Channel):
    """A channel for nf_tables. When the channel is closed, the kernel releases the tables that the channel owns.

    All methods raise NetlinkError if the kernel reports an error. They raise PlatformError if a dump is interrupted
    again and again.
    """

    def __init__(self) -> None:
        super().__init__(NETFILTER, "nf_tables")

    def commit(self, changes: Sequence[NftMessage], *, is_trial: bool = False) -> None:
        """Apply all changes in one transaction. If one cannot be applied, none is, and NetlinkError is raised.

        ``is_trial``: only test whether the changes could be applied.
        """
        parts = [(_BATCH_BEGIN, REQUEST, _GENERIC.pack(0, 0, _SUBSYSTEM))]
        for place, one in enumerate(changes, 1):
            flags = REQUEST | one.flags | (ACK if place == len(changes) else 0)
            parts.append((_kind(one.kind), flags, _GENERIC.pack(one.family, 0, 0) + one.body))
        if not is_trial:  # the kernel checks a batch without an end, then discards it
            parts.append((_BATCH_END, REQUEST, _GENERIC.pack(0, 0, _SUBSYSTEM)))
        answers = self.transact(parts)
        failed = next((code for code in answers if code), 0)
        if failed or not answers:
            raise NetlinkError(failed or errno.EIO, "nf_tables: the change was refused")

    def generation(self) -> int:
        """The generation of the namespace's tables, a number that changes with every change of any table."""
        for body in self._asked(GET_GENERATION, 0, b"", "its generation"):
            return _number(attributes(body)[1])
        raise NetlinkError(errno.EIO, "nf_tables: its generation")

    def table(self, family: int, name: str) -> NftTable | None:
        """The table ``name``; None if it does not exist."""
        try:
            for body in self._asked(GET_TABLE, family, text(1, name), f"table {name}"):
                found = attributes(body)
                return NftTable(_number(found.get(2, b"")), _number(found.get(7, b"")), read_comment(found.get(6, b"")))
        except NetlinkError as error:
            if error.code != errno.ENOENT:
                raise
        return None

    def chains(self, family: int, table: str) -> dict[str, NftChain]:
        """The chains of a table."""
        found = {}
        for body in self._listed(GET_CHAIN, family, text(1, table)) or ():
            one = attributes(body)
            if _text(one[1]) == table:
                hook = attributes(one.get(4, b""))
                priority = struct.unpack("!i", hook.get(2, bytes(4)))[0]
                number_of_hook = _number(hook[1]) if 1 in hook else -1
                policy, kind = _number(one.get(5, b"\1")), _text(one.get(7, b""))
                found[_text(one[3])] = NftChain(number_of_hook, priority, policy, kind)
        return found

    def rules(self, family: int, table: str) -> dict[str, list[str]]:
        """The comments of a table's rules, by the chain's name, in the order of the rules."""
        found: dict[str, list[str]] = {}
        for body in self._listed(GET_RULE, family, text(1, table)) or ():
            one = attributes(body)
            if _text(one[1]) == table:
                found.setdefault(_text(one[2]), []).append(read_comment(one.get(7, b"")))
        return found

    def elements(self, family: int, table: str, name: str) -> dict[bytes, int] | None:
        """The keys of a set, each with the number of packets that matched it. None if the set does not exist."""
        bodies = self._listed(GET_ELEMENTS, family, text(1, table) + text(2, name))
        if bodies is None:
            return None
        found = {}
        for body in bodies:
            for _, raw in listed_attributes(attributes(body).get(3, b"")):
                element = attributes(raw)
                counted = attributes(attributes(element.get(7, b"")).get(2, b""))
                found[attributes(element[1])[1]] = _number(counted.get(2, b""))
        return found

    def counters(self, family: int, table: str) -> dict[str, tuple[int, int]]:
        """The named counters of a table, each as (packets, bytes)."""
        found = {}
        for body in self._listed(GET_OBJECT, family, text(1, table) + number(3, _COUNTER)) or ():
            one = attributes(body)
            if _text(one[1]) == table and _number(one[3]) == _COUNTER:
                value = attributes(one.get(4, b""))
                found[_text(one[2])] = (_number(value.get(2, b"")), _number(value.get(1, b"")))
        return found

    def _asked(self, kind: int, family: int, body: bytes, what: str) -> Iterator[bytes]:
        """The answers to one request, each as the bytes of its attributes."""
        for _, _, payload in self.ask(_kind(kind), _GENERIC.pack(family, 0, 0) + body, what=what):
            yield payload[_GENERIC.size :]

    def _listed(self, kind: int, family: int, body: bytes) -> list[bytes] | None:
        """All listed objects, each as the bytes of its attributes. None if their table or set does not exist.

        The objects are of one generation.
        """
        try:
            found = self.dump(_kind(kind), _GENERIC.pack(family, 0, 0) + body, what="a list of what is there")
        except NetlinkError as error:
            if error.code == errno.ENOENT:
                return None
            raise
        return [payload[_GENERIC.size :] for payload in found]


def _kind(number_of_message: int) -> int:
    """The message type in nfnetlink for a message number of nf_tables."""
    return _SUBSYSTEM << 8 | number_of_message


class TableNotifications(Notifications):
    """Notifications that a table of the namespace changed. The descriptor is readable after such a change."""

    def __init__(self) -> None:
        """Open the socket. Raises NetlinkError."""
        try:
            super().__init__(NETFILTER, (_NOTIFICATIONS,))
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, "nf_tables: notifications of changes") from error

    def clear(self) -> bool:
        """Whether any table changed since the last call.

        The notifications are not parsed, so it does not matter if the kernel drops some of them.
        """
        has_changed = False
        while self.take() != b"":
            has_changed = True
        return has_changed
