# SPDX-License-Identifier: Apache-2.0
"""Generates packets that are almost right: with wrong fields, repeated headers, flipped or missing bytes.

Invariant: the same seed gives the same frames. This module must not know the expected result of a frame.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TypeVar

import wire as w
import world
from endpoint import UNSPECIFIED4, UNSPECIFIED6
from machine import Stimulus

T = TypeVar("T")

MAC, OTHER_MAC, TO_MAC = b"\2\0\0\0\0\2", b"\2\0\0\0\0\x99", b"\2\0\0\0\0\1"
"""The source address of all frames, the address of another sender, and the destination address of all frames."""


def packed(*texts: str) -> list[bytes]:
    """Addresses in network order, from text."""
    return [ip_address(text).packed for text in texts]


LOCALS = (
    *(world.POD,) * 16, *(world.SECOND,) * 2, world.BORROWED, world.FRIEND, world.SIBLING, world.OTHER,
)  # fmt: skip
REMOTES = (
    *(world.FRIEND,) * 9, *(world.FOE, world.NEAR, world.WORLD) * 3, *(world.POD,) * 2, world.SECOND, world.SIBLING,
    world.OTHER, world.GONE,
)  # fmt: skip
NODES = (world.NODE, world.NODE_PORT, world.NODE_RANGE, world.OTHER_NODE)
MANY = {
    4: [world.BROADCAST, *packed("255.255.255.255", "224.0.0.1")],
    6: packed("ff02::1", "ff05::2", "ff0e::1"),
}
ODD = {
    4: packed("0.0.0.0", "255.255.255.255", "224.0.0.1", "169.254.1.1", "127.0.0.1", "203.0.113.9"),
    6: [
        *packed("::", "ff02::1", "febf::1", "fec0::1", "::ffff:8.0.0.7", "2001:db9::9"),
        *(world.POD_LINK, world.FREE_LINK, world.NODE_LINK),
    ],
}
SPEAKERS = [
    *(world.POD[6], world.POD_LINK, UNSPECIFIED6) * 5,
    *(world.SECOND[6], world.SECOND_LINK, world.FREE_LINK, world.BORROWED[6]) * 2,
    world.SIBLING[6], world.SIBLING_LINK, world.GONE_LINK, world.NODE[6], world.NODE_LINK, world.FRIEND[6],
    world.OTHER[6],
]  # fmt: skip
"""Sources and targets of neighbour discovery messages."""
HEARERS = [
    *packed("ff02::1", "ff02::2", "ff02::16", "ff02::1:ff00:7", "ff02::1:ff00:7", "ff12::1", "ff05::2", "ff01::1"),
    world.NODE[6], world.NODE_LINK, world.NODE_PORT[6], world.NODE_PORT_LINK, world.FREE_LINK, world.POD_LINK,
    world.POD[6], world.SECOND[6], world.SIBLING[6], world.OTHER[6], world.WORLD[6],
]  # fmt: skip
"""Destinations of neighbour discovery messages."""
CLAIMED4 = [
    *(world.POD[4], UNSPECIFIED4) * 5, *(world.SECOND[4], world.BORROWED[4]) * 2,
    world.SIBLING[4], world.FRIEND[4], world.NODE[4], world.BROADCAST,
]  # fmt: skip
"""Senders and targets of ARP packets."""
LISTENERS = (world.POD_LINK, world.POD_LINK, world.FREE_LINK, world.SECOND_LINK, UNSPECIFIED6, world.SIBLING_LINK)
"""Sources of listener discovery messages."""
DISCOVERY_KINDS = (133, 135, 135, 135, 136, 136, 136, 134, 137)
LISTENER_KINDS = (130, 131, 132, 143, 143)

PROTOCOLS = (w.TCP, w.TCP, w.TCP, w.UDP, w.UDP, w.SCTP, w.ICMP, w.ICMP, w.GRE)
OTHERS = (0, 1, 4, 41, 43, 44, 47, 50, 51, 58, 59, 59, 59, 60, 103, 132, 135, 135, 136, 139, 255)
PORTS = (80, 443, 53, 9, 7777, 1000, 5000, 40000)
ENCAPSULATIONS = (w.IPIP, w.IP6_IN_IP, w.GRE, w.UDP, w.UDP)
VXLAN = 4789
FLAGS = (w.SYN, w.SYN, w.SYN | w.ACK, w.ACK, w.ACK, w.ACK | 8, w.ACK | 8, w.FIN | w.ACK, w.FIN | w.ACK, w.RST,
         w.RST | w.ACK, w.SYN | w.FIN, w.SYN | w.RST, 0, 255, w.SYN | 0xC0)  # fmt: skip
DHCP = {4: (68, 67), 6: (546, 547)}
EXTENSION_KINDS = (0, 43, 44, 51, 60, 60)
FLOWS = 16
"""Number of flows in an episode. There are few, so that packets belong to each other's connections."""
SMALLEST = {w.IP4: 34, w.IP6: 54}
"""Length of the shortest untagged frame of each type on which the kernel runs a program."""

Flow = tuple[int, bytes, bytes, int, int, int]
"""(IP version, local address, remote address, protocol, local port, remote port). ICMP also stands for ICMPv6."""


class Generator:
    """A stream of frames of a few flows. ``has_link``: the frames begin with Ethernet headers."""

    def __init__(self, seed: int | str, *, has_link: bool = True) -> None:
        self._random = random.Random(seed)
        self._chance = self._random.random
        self._has_link = has_link
        self._flows = [self._flow() for _ in range(FLOWS)]

    def _pick(self, some: Sequence[T]) -> T:
        return some[int(self._chance() * len(some))]

    def _below(self, bound: int) -> int:
        return int(self._chance() * bound)

    def _flow(self) -> Flow:
        version = self._pick((4, 6))
        local, remote = self._pick(LOCALS)[version], self._pick(REMOTES)[version]
        chance = self._chance()
        if chance < 0.06:
            local = (local, bytes(4), bytes(16), world.POD_LINK, world.FREE_LINK)[
                self._below(2) if version == 4 else self._pick((0, 2, 3, 4))
            ]
            return version, local, w.ALL_DHCP_SERVERS if version == 6 else b"\xff" * 4, w.UDP, *DHCP[version]
        if chance < 0.09:  # the workload as the server
            return version, local, self._pick([remote, *MANY[version]]), w.UDP, *reversed(DHCP[version])
        if version == 6 and self._chance() < 0.1:
            local = self._pick((world.POD_LINK, world.FREE_LINK, world.SIBLING_LINK))
            remote = self._pick((world.NODE[6], world.NODE_LINK, world.NODE_PORT_LINK, remote))
        elif chance < 0.21:
            remote = self._pick([*(one[version] for one in NODES), *MANY[version], remote])
            if self._chance() < 0.6:
                return version, local, remote, self._pick(ENCAPSULATIONS), self._pick(PORTS), VXLAN
        return version, local, remote, self._pick(PROTOCOLS), self._pick(PORTS), self._pick(PORTS)

    def stimulus(self) -> Stimulus:
        """The next frame, and its hook."""
        from_pod = self._chance() < 0.5
        flow = self._pick(self._flows) if self._chance() < 0.93 else self._flow()
        entered = "elsewhere"
        if not from_pod and self._chance() < 0.1:
            entered = "host" if self._chance() < 0.7 else "self"
        chance = self._chance()
        if chance < 0.1:
            frame = self._around(w.IP6, self._discovery())
        elif chance < 0.13 and self._has_link:
            frame = self._around(w.ARP, self._arp())
        else:
            frame = self._around(w.IP4 if flow[0] == 4 else w.IP6, self._packet(flow, from_pod=from_pod))
        if self._chance() < 0.2:
            frame = self._mangled(frame)
        if self._chance() < 0.02:  # at the wrong hook
            from_pod = not from_pod
        return Stimulus(not from_pod, entered, runnable(frame, has_link=self._has_link))

    # --- layers, from the outside in

    def _around(self, ethertype: int, packet: bytes) -> bytes:
        """The packet with its Ethernet header and tags, and sometimes padding."""
        kind = struct.pack("!H", ethertype)
        chance = self._chance()
        if chance < 0.08:
            tags = 1 + self._below(3)
            kind = b"".join(struct.pack("!HH", self._pick((w.VLAN, w.QINQ)), 5) for _ in range(tags)) + kind
        elif chance < 0.09:
            kind = struct.pack("!H", self._pick((w.ARP, 0x88CC, 46, w.VLAN, w.IP4, w.IP6)))
        if self._chance() < 0.1:
            packet += bytes(self._below(40))  # padding
        return TO_MAC + MAC + kind + packet if self._has_link else packet

    def _packet(self, flow: Flow, *, from_pod: bool) -> bytes:
        version, local, remote, protocol, local_port, remote_port = flow
        if self._chance() < 0.03:
            remote = self._pick(ODD[version])
        if self._chance() < 0.02:
            local = self._pick(ODD[version])
        if from_pod:
            source, destination, ports = local, remote, (local_port, remote_port)
        else:
            source, destination, ports = remote, local, (remote_port, local_port)
        if protocol == w.ICMP:
            body = self._icmp(flow, from_pod=from_pod)
            if version == 6:
                protocol = w.ICMPV6
            if self._chance() < 0.02:
                protocol = w.ICMP + w.ICMPV6 - protocol  # the protocol of the other family
        else:
            body = self._body(protocol, *ports)
        if self._chance() < 0.03:
            protocol = self._pick(OTHERS)
        build = self._ip4 if version == 4 else self._ip6
        return build(source, destination, protocol, body)

    def _ip4(self, source: bytes, destination: bytes, protocol: int, body: bytes) -> bytes:
        options, place, number = b"", 0, 1
        if self._chance() < 0.1:
            options = bytes(4 * self._below(11))
        if self._chance() < 0.12:
            body, offset, more, number = self._piece(body)
            place = offset // 8 | more << 13 | (self._below(4) << 14 if self._chance() < 0.2 else 0)
        words = 5 + len(options) // 4
        total = words * 4 + len(body)
        version = 4
        if self._chance() < 0.06:
            lie = self._below(4)
            if lie == 0:
                words = self._below(16)
            elif lie == 1:
                total = self._length_lie(total)
            elif lie == 2:
                version = self._below(16)
            else:
                place ^= 1 << self._below(16)
        return struct.pack(
            "!BBHHHBBH4s4s", version << 4 | words, 0, total, number, place, 64, protocol, 0, source, destination
        ) + options + body  # fmt: skip

    def _ip6(self, source: bytes, destination: bytes, protocol: int, body: bytes, hops: int = 64) -> bytes:
        chain: list[bytes] = []
        if self._chance() < 0.3:
            protocol, body, chain = self._chain(protocol, body)
        body = b"".join(chain) + body
        length, version = len(body), 6
        if self._chance() < 0.05:
            if self._chance() < 0.7:
                length = self._length_lie(length)
            else:
                version = self._below(16)
        return struct.pack("!IHBB", version << 28, length & 0xFFFF, protocol, hops) + source + destination + body

    def _chain(self, protocol: int, body: bytes) -> tuple[int, bytes, list[bytes]]:
        """Put extension headers before ``body``.

        Returns the protocol of the first header, the rest of the body, and the headers.
        """
        fragments = self._chance() < 0.4
        kinds = [self._pick(EXTENSION_KINDS) for _ in range(self._below(4 if self._chance() < 0.9 else 11))]
        if fragments:
            kinds.insert(self._below(len(kinds) + 1), w.FRAGMENT)
        chain: list[bytes] = []
        following = protocol
        for kind in reversed(kinds):
            if kind == w.FRAGMENT:
                payload, offset, more, number = self._piece(b"".join(chain) + body)
                if self._chance() < 0.2:
                    payload, offset, more = b"".join(chain) + body, 0, 0  # atomic
                chain, body = [], payload
                header = struct.pack("!BBHI", following, 0, offset | more | self._below(2) << 1, number)
            else:
                units = self._below(4) if self._chance() < 0.9 else self._below(40)
                stated = units if self._chance() < 0.97 else self._below(256)
                size = (units + 2) * 4 if kind == w.AH else (units + 1) * 8
                header = struct.pack("!BB", following, stated) + bytes(size - 2)
            chain.insert(0, header)
            following = kind
        return following, body, chain

    def _piece(self, body: bytes) -> tuple[bytes, int, int, int]:
        """A fragment of ``body``: (payload, offset, whether more follow, identification)."""
        number = 1 + self._below(3)
        chance = self._chance()
        if chance < 0.5:
            return body[: 8 * self._below(8)] if self._chance() < 0.4 else body, 0, 1, number
        offset = 8 * (1 + self._below(8)) if chance < 0.9 else 8 * self._below(8192)
        return body[offset:] or body, offset, int(self._chance() < 0.3), number

    def _length_lie(self, right: int) -> int:
        chance = self._chance()
        if chance < 0.4:
            return self._below(right + 1)
        if chance < 0.8:
            return right + 1 + self._below(60)
        return self._pick((0, 1, 0xFFFF)) if chance < 0.95 else self._below(0x10000)

    # --- transport

    def _body(self, protocol: int, source_port: int, destination_port: int) -> bytes:
        if protocol == w.TCP:
            chance = self._chance()
            words = 5 if chance < 0.6 else 5 + self._below(11) if chance < 0.9 else self._below(16)
            body = struct.pack(
                "!HHIIBBHHH", source_port, destination_port, 1, 1, words << 4, self._pick(FLAGS), 1024, 0, 0
            ) + bytes(max(words - 5, 0) * 4) + bytes(4 * self._below(12) if self._chance() < 0.6 else 0)  # fmt: skip
        elif protocol == w.UDP:
            size = self._below(40)
            length = 8 + size if self._chance() < 0.95 else self._below(0x10000)
            body = struct.pack("!HHHH", source_port, destination_port, length, 0) + bytes(size)
        elif protocol == w.SCTP:
            body = struct.pack("!HHII", source_port, destination_port, 0, 0) + bytes(self._below(24))
        else:
            body = bytes(self._below(40))
        return body if self._chance() < 0.96 else body[: self._below(len(body) + 1)]

    def _icmp(self, flow: Flow, *, from_pod: bool) -> bytes:
        version, *_, identifier = flow
        chance = self._chance()
        if chance < 0.3:
            kind = self._pick((8, 8, 8, 13, 15, 17)) if version == 4 else 128
        elif chance < 0.55:
            kind = self._pick((0, 0, 14, 16, 18)) if version == 4 else 129
        elif chance < 0.9:
            return self._error(version, from_pod=from_pod)
        else:
            kind = self._below(256)
        code = 0 if self._chance() < 0.95 else self._below(256)
        if self._chance() < 0.2:
            identifier = 0
        body = struct.pack("!BBHHH", kind, code, 0, identifier, 1) + bytes(self._below(24))
        return body if self._chance() < 0.96 else body[: self._below(len(body) + 1)]

    def _error(self, version: int, *, from_pod: bool) -> bytes:
        """An ICMP error, usually about a packet of a flow in the other direction."""
        kind = self._pick((3, 3, 4, 5, 11, 12)) if version == 4 else self._pick((1, 2, 3, 4))
        candidates = [flow for flow in self._flows if flow[0] == version] or self._flows
        inner = self._packet(candidates[self._below(len(candidates))], from_pod=from_pod is (self._chance() < 0.05))
        if self._chance() < 0.5:
            inner = inner[: self._below(80)]
        return struct.pack("!BBHI", kind, self._below(5), 0, 0) + inner

    # --- messages of the link

    def _discovery(self) -> bytes:
        """A neighbour or listener discovery message."""
        is_listener = self._chance() < 0.25
        kind = self._pick(LISTENER_KINDS if is_listener else DISCOVERY_KINDS)
        code = 0 if self._chance() < 0.93 else self._below(256)
        source, destination = self._pick(SPEAKERS), self._pick(HEARERS)
        hops = 1 if is_listener else 255
        if self._chance() < 0.1:
            hops = self._pick((0, 1, 64, 254, 255))
        rest = self._groups(kind) if is_listener else self._about(kind)
        body, protocol = struct.pack("!BBH", kind, code, 0) + rest, w.ICMPV6
        if is_listener and self._chance() < 0.8:
            source = self._pick(LISTENERS)
        if self._chance() < 0.06:
            body = body[: self._below(len(body) + 1)] if self._chance() < 0.5 else body + bytes(self._below(16))
        if is_listener and self._chance() < 0.7:
            alert = (0x0502, 0) if self._chance() < 0.9 else (self._pick((0x0502, 0x0503)), self._below(2))
            body = struct.pack("!BBHHH", w.ICMPV6, 0, *alert, 0x0100) + body
            protocol = w.HOP_BY_HOP if self._chance() < 0.95 else w.OPTIONS
        if self._chance() < 0.05:
            body, protocol = struct.pack("!BBHI", protocol, 0, self._below(2), 7) + body, w.FRAGMENT  # atomic, or first
        if self._chance() < 0.85:
            return struct.pack("!IHBB", 6 << 28, len(body), protocol, hops) + source + destination + body
        return self._ip6(source, destination, protocol, body, hops)

    def _groups(self, kind: int) -> bytes:
        """The part of a listener discovery message after its checksum."""
        if kind != 143:
            return bytes(24 if self._chance() < (0.5 if kind == 130 else 0.1) else 20)
        records = self._below(3)
        return struct.pack("!HH", 0, records if self._chance() < 0.9 else self._below(4)) + bytes(20 * records)

    def _about(self, kind: int) -> bytes:
        """The part of a neighbour discovery message after its checksum."""
        target = b"" if kind == 133 else self._pick(SPEAKERS if self._chance() < 0.7 else HEARERS)
        options = [self._option() for _ in range(self._pick((0, 0, 1, 1, 1, 2, 3, 3, 4)))]
        return bytes(4) + target + b"".join(options)

    def _option(self) -> bytes:
        """An option of neighbour discovery."""
        chance = self._chance()
        if chance < 0.6:
            return bytes((self._pick((1, 2)), 1)) + MAC
        if chance < 0.8:
            return bytes((14, 1)) + b"random"
        if chance < 0.88:
            return bytes((self._pick((1, 2)), 1)) + OTHER_MAC
        if chance < 0.94:
            return bytes((self._pick((0, 3, 5, 13, 15, 25)), 1)) + MAC
        return bytes((self._pick((1, 14)), self._pick((0, 2)))) + MAC

    def _arp(self) -> bytes:
        """An ARP request or reply."""
        hardware, protocol, sizes = 1, w.IP4, (6, 4)
        if self._chance() < 0.08:
            hardware, protocol, sizes = self._pick(((6, w.IP4, (6, 4)), (1, w.IP6, (6, 4)), (1, w.IP4, (4, 6))))
        mac = MAC if self._chance() < 0.9 else OTHER_MAC
        packet = struct.pack("!HHBBH", hardware, protocol, *sizes, self._pick((1, 1, 2))) + mac
        packet += self._pick(CLAIMED4) + TO_MAC + self._pick(CLAIMED4)
        chance = self._chance()
        if chance < 0.3:
            packet += bytes(18)  # padding up to the shortest Ethernet frame
        elif chance < 0.4:
            packet += bytes(self._below(60)) + bytes((self._below(2),))
        return packet if self._chance() < 0.95 else packet[: self._below(len(packet))]

    # --- blind damage

    def _mangled(self, frame: bytes) -> bytes:
        data = bytearray(frame)
        kept = 12 if self._has_link else 0
        chance = self._chance()
        if chance < 0.6:
            for _ in range(1 + self._below(3)):
                data[kept + self._below(len(data) - kept)] ^= 1 << self._below(8)
        elif chance < 0.7:
            data[kept + self._below(len(data) - kept)] = self._pick((0, 1, 4, 6, 17, 44, 58, 59, 60, 127, 128, 255))
        elif chance < 0.9:
            del data[14 + self._below(len(data) - 13) :]
        else:
            start, size, target = self._below(len(data)), self._below(24), kept + self._below(len(data) - kept)
            data[target : target + size] = data[start : start + size]
        return bytes(data)


def runnable(frame: bytes, *, has_link: bool = True) -> bytes:
    """The frame; if the kernel runs no program on such a short one, with a VLAN tag, or without a link with padding."""
    frame = frame.ljust(14, b"\0")
    if not has_link:
        return frame.ljust(SMALLEST.get(w.u16(frame, 12), 0), b"\0")
    while len(frame) < SMALLEST.get(w.u16(frame, 12), 0):
        frame = frame[:12] + b"\x81\x00\0\5" + frame[12:]
    return frame
