# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the regression cases: addresses as text, frames with wrong fields, and the case itself."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Union

import packets as p
import world
from episodes import Episode, Step
from machine import Stimulus

POD4, POD6 = world.texts(world.POD)
FRIEND4, FRIEND6 = world.texts(world.FRIEND)
FOE4, FOE6 = world.texts(world.FOE)
MAC, OTHER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000099")
"""The hardware address of the sender of all frames, and that of another sender."""

Where = Callable[[bytes], Stimulus]
Told = tuple[Where, bytes, str]
"""(hook, frame, reason why it passes or is dropped)."""


@dataclass(frozen=True)
class Regression:
    """A short episode, and the reason why each of its frames passes or is dropped."""

    name: str
    episode: Episode
    reasons: tuple[str, ...]


def case(
    name: str, *steps: Union[Told, Step], is_host: bool = False, is_outside: bool = False, is_external: bool = False,
    has_link: bool = True, is_bridged: bool = False,
) -> Regression:  # fmt: skip
    """A regression from frames with reasons and other steps, in order."""
    episode = Episode(
        tuple(step[0](step[1]) if isinstance(step, tuple) else step for step in steps),
        is_host=is_host, is_outside=is_outside, is_external=is_external, has_link=has_link, is_bridged=is_bridged,
    )  # fmt: skip
    return Regression(name, episode, tuple(step[2] for step in steps if isinstance(step, tuple)))


def out(frame: bytes) -> Stimulus:
    """A frame from the workload; at a host's interface, from the network."""
    return Stimulus(out_of_host=False, entered="elsewhere", frame=frame)


def into(frame: bytes) -> Stimulus:
    """A frame to the workload from another host; at a host's interface, to the network."""
    return Stimulus(out_of_host=True, entered="elsewhere", frame=frame)


def by_host(frame: bytes) -> Stimulus:
    """A frame to the workload from the node itself."""
    return Stimulus(out_of_host=True, entered="host", frame=frame)


# --- packets ----------------------------------------------------------------------------------------------------------


def says4(total: int | None, protocol: int, body: bytes, *, source: str = POD4, destination: str = FRIEND4,
          **more: int) -> bytes:  # fmt: skip
    """An IPv4 frame with the given total length in its header."""
    packet = p.ip4(source, destination, protocol, body, total=total, **more)  # type: ignore[arg-type]  # ints only
    return p.eth(packet, p.IP4)


def says6(payload: int, protocol: int, body: bytes, *, source: str = POD6, destination: str = FRIEND6) -> bytes:
    """An IPv6 frame with the given payload length in its header."""
    packet = bytearray(p.ip6(source, destination, protocol, body))
    struct.pack_into("!H", packet, 4, payload)
    return p.eth(bytes(packet), p.IP6)


def option8(following: int) -> bytes:
    """The smallest destination options header."""
    return p.extension(following, b"")


def inner(source: str, destination: str, protocol: int, l4: bytes) -> bytes:
    """The inner packet of an ICMP error."""
    return (p.ip4 if ip_address(source).version == 4 else p.ip6)(source, destination, protocol, l4)


# --- messages of the link ---------------------------------------------------------------------------------------------


def discovery(kind: int, source: str, destination: str, target: str | None = None, options: bytes = b"", *,
              hops: int = 255, code: int = 0) -> bytes:  # fmt: skip
    """A neighbour discovery message. ``target`` None: without a target."""
    body = struct.pack("!BBHI", kind, code, 0, 0) + (b"" if target is None else ip_address(target).packed) + options
    return p.eth(p.ip6(source, destination, p.ICMPV6, body, hops=hops), p.IP6)


def listener(kind: int, source: str, destination: str = "ff02::16", *, hops: int = 1, code: int = 0,
             records: int = 1, rest: bytes = b"", alert: bytes = b"\5\2\0\0\1\0", first: int = 0) -> bytes:  # fmt: skip
    """A listener discovery message about one group after a router alert, as hosts send it.

    ``records``: the number of records that a version 2 report states. ``rest``: bytes at the end. ``first``: the number
    of the header with the alert.
    """
    group = ip_address("ff02::1:ff00:7").packed
    body = struct.pack("!HHBBH", 0, records, 4, 0, 0) + group if kind == 143 else bytes(4) + group
    message = struct.pack("!BBH", kind, code, 0) + body + rest
    packet = struct.pack("!BB", p.ICMPV6, 0) + alert + message
    return p.eth(p.ip6(source, destination, first, packet, hops=hops), p.IP6)


def mac_option(kind: int, mac: bytes = MAC) -> bytes:
    """An option with a link-layer address."""
    return bytes((kind, 1)) + mac


def arp(sender: str, target: str, *, mac: bytes = MAC, kind: int = 1, hardware: int = 1, protocol: int = p.IP4,
        sizes: bytes = b"\6\4") -> bytes:  # fmt: skip
    """An ARP frame."""
    body = struct.pack("!HH2sH", hardware, protocol, sizes, kind) + mac + ip_address(sender).packed
    return p.eth(body + bytes(6) + ip_address(target).packed, p.ARP)
