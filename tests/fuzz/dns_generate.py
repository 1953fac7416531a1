# SPDX-License-Identifier: Apache-2.0
"""Random exchanges of DNS: well-formed answers as servers compress them, answers with wrong grammar, and mutations.

An exchange is drawn from its number and the seed alone, so that a failure can be repeated.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

A, NS, CNAME, SOA, MX, TXT, AAAA, DNAME, OPT, HTTPS = 1, 2, 5, 6, 15, 16, 28, 39, 41, 65
TYPES = (A, A, A, AAAA, AAAA, CNAME, TXT, MX, NS, HTTPS, SOA, 4711)
PATTERNS = {
    "www.example.com": 1, "*.cdn.net": 2, "a.cdn.net": 3, "*.deep.a.cdn.net": 4, "*.org": 5, "x.org": 6,
    "edge.cache.example.com": 2,
}  # fmt: skip
"""Name classes; the longest pattern decides."""
NAMES = (
    "www.example.com", "WWW.eXample.com", "example.com", "a.cdn.net", "b.cdn.net", "q.w.cdn.net", "x.deep.a.cdn.net",
    "cdn.net", "x.org", "y.org", "edge.cache.example.com", "w.x.org", "elsewhere.test", "org", "a.b.c.d.e.f.g.h.i.j.k",
    "one.test", "two.test", "three.test",
)  # fmt: skip
TTLS = (0, 1, 29, 30, 31, 60, 300, 3600, 86400, 604800, 604801, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MOST_BYTES = 3000
"""Longest message: a test run takes frames up to about 3.5 KB."""


@dataclass
class Exchange:
    """A question and what answers it. ``messages``: of one packet; UDP has one. ``asked``: the same for the questions."""

    asked: list[bytes]
    messages: list[bytes]
    stream: bool = False
    tail: bytes = b""
    """Bytes of a TCP segment behind the last whole message."""


@dataclass
class Writer:
    """A message that is being written. ``places``: offsets of names and their ends, for compression."""

    rng: random.Random
    data: bytearray = field(default_factory=bytearray)
    places: dict[tuple[str, ...], int] = field(default_factory=dict)

    def name(self, text: str, *, compressed: float = 0.9) -> None:
        """Write a name. ``compressed``: how likely each of its ends is a pointer, if it can be one."""
        labels = tuple(one for one in text.split(".") if one)
        for index in range(len(labels)):
            rest = labels[index:]
            known = self.places.get(rest)
            if known is not None and self.rng.random() < compressed:
                self.data += struct.pack("!H", 0xC000 | known)
                return
            if len(self.data) < 0x4000:
                self.places[rest] = len(self.data)
            self.data += bytes([len(labels[index])]) + labels[index].encode()
        self.data.append(0)

    def wrong_name(self) -> None:
        """Write a name that breaks a rule, or nearly does."""
        at = len(self.data)
        self.data += self.rng.choice((
            lambda: struct.pack("!H", 0xC000 | self.rng.randrange(at + 40) & 0x3FFF),
            lambda: struct.pack("!H", 0xC000 | at),
            lambda: b"\x01a" + struct.pack("!H", 0xC000 | at),
            lambda: struct.pack("!H", 0xC000 | self.rng.randrange(14)),
            lambda: bytes([self.rng.choice((64, 65, 128, 191))]) + b"abc\0",
            lambda: (b"\x3f" + b"a" * 63) * self.rng.choice((3, 4)) + b"\0",
            lambda: (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"b" * 61 + b"\0",
            lambda: (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"b" * 62 + b"\0",
            lambda: b"\x01a" * self.rng.choice((126, 127, 128)) + b"\0",
            lambda: b"\x02ab" + struct.pack("!H", 0xC000 | max(12, at - self.rng.randrange(1, 30))),
            lambda: b"\0",
        ))()  # fmt: skip

    def pointer_chain(self, length: int) -> None:
        """Write record data of pointers, each to the one before, and the first one to the question's name."""
        self.data += struct.pack("!HHHIH", 0xC00C, 4711, 1, 0, 2 * length)
        at = len(self.data)
        for one in range(length):
            self.data += struct.pack("!H", 0xC000 | (at + 2 * one - 2 if one else 12))


def exchange(seed: int, number: int) -> Exchange:
    """One exchange."""
    rng = random.Random(f"{seed}/{number}")
    if rng.random() < 0.25:  # arbitrary
        return _stream(rng)
    asked = rng.choice(NAMES)
    question, answer = _pair(rng, asked, rng.randrange(1 << 16))
    return Exchange([question], [_perhaps_mutated(rng, answer)])


def _stream(rng: random.Random) -> Exchange:
    count = rng.choice((1, 1, 2, 2, 3))
    pairs = [_pair(rng, rng.choice(NAMES), number * 7 + 1, most=MOST_BYTES // count) for number in range(count)]
    messages = [_perhaps_mutated(rng, answer) for _, answer in pairs]
    if rng.random() < 0.3:  # arbitrary
        rng.shuffle(messages)
    tail = rng.randbytes(rng.randrange(1, 6)) if rng.random() < 0.1 else b""  # arbitrary
    return Exchange([question for question, _ in pairs], messages, stream=True, tail=tail)


def _pair(rng: random.Random, asked: str, identification: int, *, most: int = MOST_BYTES) -> tuple[bytes, bytes]:
    """A question, and an answer to it."""
    kind = rng.choice((A, A, A, AAAA, AAAA, CNAME, HTTPS))
    cased = "".join(rng.choice((one.lower(), one.upper())) for one in asked) if rng.random() < 0.5 else asked
    writer = Writer(rng)
    writer.data += bytes(12)
    writer.name(cased)
    writer.data += struct.pack("!HH", kind, 1)
    question = bytearray(writer.data)
    if rng.random() < 0.5:  # arbitrary
        question += b"\0" + struct.pack("!HHIH", OPT, 4096, 0, 0)
    struct.pack_into("!6H", question, 0, identification, 0x0100, 1, 0, 0, 1 if len(question) > len(writer.data) else 0)
    code = rng.choice((0,) * 12 + (2, 3))
    count = _answer_section(rng, writer, cased, most)
    flags = 0x8180 | code | rng.choice((0, 0, 0x0200, 0x0400))
    struct.pack_into("!6H", writer.data, 0, identification, flags, 1, count, 0, 0)
    return bytes(question), bytes(writer.data)


def _answer_section(rng: random.Random, writer: Writer, asked: str, most: int) -> int:
    """Write records. Returns their number."""
    is_strange = rng.random() < 0.35  # arbitrary
    names = [asked]
    count = 0
    for _ in range(rng.choice((0,) * 8 + (1,) * 4 + (2, 2, 3, 4, 5, 15, 16, 17))):
        target = rng.choice(NAMES)
        count += _record(rng, writer, names[-1], CNAME, target, is_strange=is_strange)
        names.append(target)
    if is_strange and len(names) == 1 and rng.random() < 0.1:  # arbitrary
        writer.pointer_chain(rng.choice((1, 14, 15, 16, 17)))
        writer.data += struct.pack("!HHHIHI", 0xC000 | (len(writer.data) - 2), A, 1, 60, 4, 0xCB007107)
        count += 2
    wanted = rng.choice((0, 1, 1, 1, 1, 2, 2, 3, 4, 8) * 6 + (30, 64, 127, 128, 129, 150))
    for _ in range(wanted):
        if len(writer.data) > most - 100:
            break
        kind = (
            A if wanted > 100 else rng.choice((A, AAAA)) if not is_strange or rng.random() < 0.7 else rng.choice(TYPES)
        )
        owner = names[-1] if not is_strange or rng.random() < 0.8 else rng.choice((*names, *NAMES))
        count += _record(rng, writer, owner, kind, rng.choice(NAMES), is_strange=is_strange)
    return count


def _record(rng: random.Random, writer: Writer, owner: str, kind: int, target: str, *, is_strange: bool) -> int:
    """Write a record. Returns 1."""
    wrong = is_strange and rng.random() < 0.03  # arbitrary
    if wrong:
        writer.wrong_name()
    else:
        writer.name(owner, compressed=rng.choice((1.0, 1.0, 0.5, 0.0)))
    family = 1 if not is_strange or rng.random() < 0.95 else rng.choice((3, 255, 0x8001))  # arbitrary
    writer.data += struct.pack("!HHIH", kind, family, rng.choice(TTLS), 0)
    at = len(writer.data)
    if kind in {CNAME, NS, DNAME}:
        if is_strange and rng.random() < 0.05:  # arbitrary
            writer.wrong_name()
        else:
            writer.name(target, compressed=rng.choice((1.0, 0.5, 0.0)))
    else:
        writer.data += _data(rng, kind)
    if is_strange and rng.random() < 0.03:  # arbitrary
        writer.data += rng.randbytes(rng.randrange(1, 3))
    length = len(writer.data) - at
    if is_strange and rng.random() < 0.03:  # arbitrary
        length = max(0, length + rng.choice((-2, -1, 1, 2, 300)))
    struct.pack_into("!H", writer.data, at - 2, length)
    return 1


def _data(rng: random.Random, kind: int) -> bytes:
    if kind == A:
        return bytes([rng.choice((10, 127, 192, 203)), 0, rng.randrange(3), rng.randrange(256)])
    if kind == AAAA:
        start = rng.choice(("20010db8000000000000000000000000", "fe800000000000000000000000000000",
                            "00000000000000000000ffffcb007100"))  # fmt: skip
        return bytes.fromhex(start)[:15] + bytes([rng.randrange(256)])
    return rng.randbytes(rng.randrange(20))


def _perhaps_mutated(rng: random.Random, message: bytes) -> bytes:
    if rng.random() < 0.8:  # arbitrary
        return message
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data)) if data else 0
        choice = rng.randrange(6)
        if choice == 0:
            del data[at:]
        elif choice == 1:
            data += rng.randbytes(rng.randrange(1, 20))
        elif choice == 2:  # the kinds of mutation
            data[at : at + 1] = b""
        elif choice == 3 and data:  # the same
            data[at] = rng.choice((0, 1, 5, 63, 64, 0xC0, 0xFF, rng.randrange(256)))
        elif choice == 4 and data:  # the same
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at:at] = rng.choice((b"\0", b"\xc0\x0c", rng.randbytes(2)))
        if not data:
            break
    return bytes(data)
