# SPDX-License-Identifier: Apache-2.0
"""A small builder of DNS messages, also of malformed ones. Names are text without a final dot, or raw bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from ipaddress import ip_address

A, NS, CNAME, SOA, TXT, AAAA, DNAME, ANY = 1, 2, 5, 6, 16, 28, 39, 255
IN, CHAOS = 1, 3
ANSWER, TRUNCATED, RECURSION = 0x8000, 0x0200, 0x0180
NAME_AT = 12
"""Offset of the question's name in every message."""


def name(text: str | bytes) -> bytes:
    """The name on the wire, without compression. Bytes are returned as they are."""
    if isinstance(text, bytes):
        return text
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".") if label) + b"\0"


def pointer(offset: int) -> bytes:
    """A compression pointer."""
    return struct.pack("!H", 0xC000 | offset)


def labels(text: str) -> bytes:
    """The labels as np_name has them: lower case, in reverse order, without the final zero."""
    return b"".join(bytes([len(one)]) + one.encode() for one in reversed(text.lower().split(".")))


@dataclass(frozen=True)
class Record:
    """A resource record. ``owner`` None: a pointer to the question's name; ``length`` None: that of ``data``."""

    data: bytes
    kind: int = A
    owner: str | bytes | None = None
    ttl: int = 60
    family: int = IN
    length: int | None = None

    def wire(self) -> bytes:
        """The record on the wire."""
        owner = pointer(NAME_AT) if self.owner is None else name(self.owner)
        length = len(self.data) if self.length is None else self.length
        return owner + struct.pack("!HHIH", self.kind, self.family, self.ttl & 0xFFFFFFFF, length) + self.data


def address(text: str, *, owner: str | bytes | None = None, ttl: int = 60) -> Record:
    """An A or AAAA record."""
    packed = ip_address(text).packed
    return Record(packed, A if len(packed) == 4 else AAAA, owner, ttl)


def cname(target: str | bytes, *, owner: str | bytes | None = None, ttl: int = 60) -> Record:
    """A CNAME record."""
    return Record(name(target), CNAME, owner, ttl)


@dataclass(frozen=True)
class Message:
    """A DNS message; without records it is a question. The counts can be wrong on purpose."""

    asked: str | bytes = "www.example.com"
    kind: int = A
    identification: int = 0x1234
    flags: int = 0x0100
    answers: tuple[Record, ...] = ()
    authority: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()
    family: int = IN
    questions: int = 1
    answer_count: int | None = None
    tail: bytes = b""

    def answer(self, *answers: Record, flags: int = ANSWER | RECURSION) -> Message:
        """The answer to this question."""
        return replace(self, answers=answers, flags=flags)

    def wire(self) -> bytes:
        """The message on the wire."""
        count = len(self.answers) if self.answer_count is None else self.answer_count
        header = struct.pack(
            "!6H", self.identification, self.flags, self.questions, count, len(self.authority), len(self.additional)
        )
        records = b"".join(one.wire() for one in (*self.answers, *self.authority, *self.additional))
        return header + name(self.asked) + struct.pack("!HH", self.kind, self.family) + records + self.tail


def prefixed(*messages: bytes) -> bytes:
    """Messages as TCP carries them, each behind its length."""
    return b"".join(struct.pack("!H", len(one)) + one for one in messages)
