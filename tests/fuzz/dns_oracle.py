# SPDX-License-Identifier: Apache-2.0
"""What an exchange of DNS should teach, by dnspython's wire parser.

dnspython reads names and record data. This module has the rules that decide which records count, and the limits of the
program. It shares no code with the program.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import dns.exception
import dns.name
import dns.rdata
import dns.wire
from dns_generate import AAAA, CNAME, PATTERNS, A, Exchange

STEPS, RECORD_CALLS_UNTIL, CALLS, LEARN_STEPS = 48, 18, 20, 64
"""Limits of the program: steps of a call, the last call that goes on with a message, all calls, and steps of learning."""
MOST_ADDRESSES, MOST_TARGETS, WAYS, UNLIMITED = 128, 16, 4, 0xFFFFFFFF
FLOOR_S, WEEK_S = 30, 604800
REFUSED = tuple(ip_network(one) for one in ("127.0.0.0/8", "10.0.0.0/8", "fe80::/10", "::ffff:0:0/96"))


NAMED = [
    (dns.name.from_text(text.removeprefix("*.")), text.startswith("*."), number) for text, number in PATTERNS.items()
]


class Refused(Exception):  # noqa: N818  # no error of the test: the message teaches nothing
    """The message is not understood."""


@dataclass
class Ways:
    """Four classes with their lives; class 0 is unused."""

    classes: list[int] = field(default_factory=lambda: [0] * WAYS)
    lives: list[int] = field(default_factory=lambda: [0] * WAYS)

    def enter(self, number: int, life: int) -> None:
        """Enter a class in place of itself, of an unused way, or of the way with the least life."""
        worths = [
            -2 if one == number else -1 if not one else left for one, left in zip(self.classes, self.lives, strict=True)
        ]
        way = worths.index(min(worths))
        before = self.lives[way] if self.classes[way] == number else 0
        self.classes[way], self.lives[way] = number, max(before, life)

    def used(self) -> dict[int, int]:
        """Lives by class."""
        return {one: life for one, life in zip(self.classes, self.lives, strict=True) if one}


@dataclass
class Lesson:
    """What is learned: classes and seconds to live by address; and the reports, as (name, address, class, TTL)."""

    rows: dict[str, Ways] = field(default_factory=dict)
    reports: list[tuple[str, str, int, int]] = field(default_factory=list)


@dataclass
class Reading:
    """The state of one message while its answer section is read."""

    asked: dns.name.Name
    current: dns.name.Name
    current_at: int
    steps: int
    ways: Ways = field(default_factory=Ways)
    addresses: list[tuple[str, int]] = field(default_factory=list)
    targets: int = 0


def class_of(name: dns.name.Name) -> int:
    """The class of a name: that of the longest pattern that matches."""
    best, best_length = 0, -1
    for pattern, is_wild, number in NAMED:
        matches = name.is_subdomain(pattern) and name != pattern if is_wild else name == pattern
        length = len(pattern.labels) + (not is_wild)
        if matches and length > best_length:
            best, best_length = number, length
    return best


def expected(one: Exchange) -> Lesson:
    """What the exchange teaches."""
    lesson = Lesson()
    pending = {(message[:2], _question_of(message)) for message in one.asked}
    calls = 1
    for index, message in enumerate(one.messages):
        is_last = index == len(one.messages) - 1 and not one.tail
        if len(message) <= 12 or (one.stream and calls >= CALLS and index):  # a header alone
            break
        calls += index > 0
        question = _question_of(message)
        flags, questions, answers = struct.unpack_from("!HHH", message, 2)
        if question is None or flags & 0xF800 != 0x8000 or questions != 1:  # an answer, opcode 0
            break
        if (message[:2], question) not in pending:
            continue
        pending.discard((message[:2], question))
        if flags & 15 or not answers:
            continue
        try:
            reading = _read(message, answers)
        except Refused:
            break
        spent = -(-reading.steps // STEPS)
        if calls >= CALLS or (spent > 1 and calls + spent > RECORD_CALLS_UNTIL):
            break
        calls += spent
        calls += _learn(lesson, reading, calls)
        if calls >= CALLS and not is_last:
            break
    return lesson


def _question_of(message: bytes) -> bytes | None:
    """Name, type and class of the question as they are. None if they cannot be read, or if the name has a pointer."""
    parser = dns.wire.Parser(message, 12)
    with suppress(dns.exception.DNSException):
        dns.name.from_wire_parser(parser, decompress=False)
        parser.get_bytes(4)
        return message[12 : parser.current]
    return None


def _read(message: bytes, answers: int) -> Reading:
    """Read the answer section. Raises Refused."""
    parser = dns.wire.Parser(message, 12)
    try:
        name = dns.name.from_wire_parser(parser)
        number = class_of(name)
        reading = Reading(name, name, 12, len(name.labels))
        if number:
            reading.ways.enter(number, UNLIMITED)
        parser.get_bytes(4)
        for _ in range(answers):
            _read_record(reading, parser, message)
    except dns.exception.DNSException as error:
        raise Refused from error
    return reading


def _read_record(reading: Reading, parser: dns.wire.Parser, message: bytes) -> None:
    start = parser.current
    owner = dns.name.from_wire_parser(parser)
    pieces = list(_pieces(message, start))
    is_direct = message[start] >= 0xC0 and pieces[0] == reading.current_at  # a pointer
    if any(one is not None and one < 12 for one in pieces):  # into the header
        raise Refused
    reading.steps += 1 if is_direct else len(pieces)
    kind, family, ttl, length = parser.get_struct("!HHIH")
    at = parser.current
    if length > parser.remaining():
        raise Refused
    if ttl >> 31:
        ttl = 0
    if owner != reading.current or family != 1 or kind not in {A, AAAA, CNAME}:
        parser.get_bytes(length)
        return
    with parser.restrict_to(length):
        data = dns.rdata.from_wire_parser("IN", kind, parser)
    if kind != CNAME:
        if len(reading.addresses) < MOST_ADDRESSES:
            reading.addresses.append((data.to_text(), ttl))
        return
    pieces = list(_pieces(message, at))
    if reading.addresses or any(one is not None and one < 12 for one in pieces):  # into the header
        raise Refused
    reading.targets += 1
    if reading.targets > MOST_TARGETS:
        raise Refused
    reading.steps += len(pieces)
    reading.current, reading.current_at = data.target, at
    reading.ways.lives = [min(one, ttl) for one in reading.ways.lives]
    number = class_of(reading.current)
    if number:
        reading.ways.enter(number, UNLIMITED)


def _pieces(message: bytes, at: int) -> Iterator[int | None]:
    """The labels (None), pointers (their targets) and the end (None) of a name that dnspython has read."""
    while message[at]:
        if message[at] < 64:  # a label
            at += 1 + message[at]
            yield None
        else:
            at = struct.unpack_from("!H", message, at)[0] & 0x3FFF
            yield at
    yield None


def _learn(lesson: Lesson, reading: Reading, calls: int) -> int:
    """Enter the addresses of a message. Returns the number of calls."""
    if not reading.addresses:
        return 0
    classes = reading.ways.used()
    asked_class = class_of(reading.asked)
    asked = b".".join(reading.asked.labels[:-1]).decode("latin-1").lower()
    steps = 0
    used = 1 if calls < CALLS else 0
    for text, ttl in reading.addresses:
        if not used:
            break
        address = ip_address(text)
        is_refused = any(address.version == net.version and address in net for net in REFUSED)
        for way in range(1 if is_refused else max(1, len(classes))):
            if steps == used * LEARN_STEPS:
                if calls + used >= CALLS:
                    return used
                used += 1
            steps += 1
            if not way and not is_refused:
                lesson.reports.append((asked, str(address), asked_class, ttl))
        if is_refused or not classes:
            continue
        row = lesson.rows.setdefault(str(address), Ways())
        for number, life in classes.items():
            row.enter(number, min(max(min(life, ttl), FLOOR_S), WEEK_S))
    return used
