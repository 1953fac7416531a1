# SPDX-License-Identifier: Apache-2.0
"""Packets that are almost right: valid ones of a few flows, in which fields lie, headers repeat, bytes flip or are missing.

Invariant: the same seed gives the same frames.  Must not know what is expected of a frame.
"""

from __future__ import annotations

import random
import struct
from ipaddress import ip_address

import wire as w
from machine import Stimulus

POD = {4: ip_address("10.0.0.7").packed, 6: ip_address("fd00::7").packed}
FRIEND = {4: ip_address("10.0.0.9").packed, 6: ip_address("fd00::9").packed}
FOE = {4: ip_address("10.0.0.66").packed, 6: ip_address("fd00::66").packed}
NEAR = {4: ip_address("198.51.100.3").packed, 6: ip_address("2001:db8:1::3").packed}
"""In the prefix that policy knows."""
WORLD = {4: ip_address("203.0.113.9").packed, 6: ip_address("2001:db8:ffff::9").packed}
BORROWED = {4: ip_address("10.20.1.1").packed, 6: ip_address("fd20::1").packed}
ODD = {
    4: [ip_address(text).packed for text in ("0.0.0.0", "255.255.255.255", "224.0.0.1", "169.254.1.1", "127.0.0.1")],
    6: [ip_address(text).packed for text in ("::", "ff02::1", "fe80::7", "febf::1", "fec0::1", "::ffff:10.0.0.7")],
}
PROTOCOLS = (w.TCP, w.TCP, w.TCP, w.UDP, w.UDP, w.SCTP, w.ICMP, w.ICMP, 47)
OTHERS = (0, 1, 4, 41, 43, 44, 47, 50, 51, 58, 59, 60, 103, 132, 135, 136, 139, 255)
PORTS = (80, 443, 53, 9, 7777, 1000, 5000, 40000)
FLAGS = (w.SYN, w.SYN, w.SYN | w.ACK, w.ACK, w.ACK, w.ACK | 8, w.FIN | w.ACK, w.RST, w.RST | w.ACK, w.SYN | w.FIN,
         w.SYN | w.RST, 0, 255, w.SYN | 0xC0)  # fmt: skip
DHCP = {4: (68, 67), 6: (546, 547)}
EXTENSION_KINDS = (0, 43, 44, 51, 60, 60, 135)
FLOWS = 16
"""In an episode; few, so that packets meet each other's connections."""
SMALLEST = {w.IP4: 34, w.IP6: 54}
"""The kernel runs no program on an untagged frame of these types that is shorter."""

Flow = tuple[int, bytes, bytes, int, int, int]
"""IP version, local and remote address, protocol (ICMP stands for both), local and remote port."""


class Generator:
    """A stream of stimuli around a few flows."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)
        self._chance = self._random.random
        self._flows = [self._flow() for _ in range(FLOWS)]

    def _pick(self, some: tuple[int, ...]) -> int:
        return some[int(self._chance() * len(some))]

    def _below(self, bound: int) -> int:
        return int(self._chance() * bound)

    def _flow(self) -> Flow:
        version = self._pick((4, 6))
        remote = (FRIEND, FRIEND, FRIEND, FOE, NEAR, WORLD, POD)[self._below(7)][version]
        local = POD[version] if self._chance() < 0.9 else (BORROWED, FRIEND)[self._below(2)][version]
        protocol = self._pick(PROTOCOLS)
        if self._chance() < 0.06:
            local = (local, bytes(4), bytes(16))[self._below(2) * (1 if version == 4 else 2)]
            return version, local, w.ALL_DHCP_SERVERS if version == 6 else b"\xff" * 4, w.UDP, *DHCP[version]
        return version, local, remote, protocol, self._pick(PORTS), self._pick(PORTS)

    def stimulus(self) -> Stimulus:
        """The next frame and where it comes along."""
        from_pod = self._chance() < 0.5
        flow = self._flows[self._below(FLOWS)] if self._chance() < 0.93 else self._flow()
        entered = "elsewhere"
        if not from_pod and self._chance() < 0.06:
            entered = "host" if self._chance() < 0.5 else "self"
        frame = self._frame(flow, from_pod=from_pod)
        if self._chance() < 0.2:
            frame = self._mangled(frame)
        if self._chance() < 0.02:  # at the hook where it does not belong
            from_pod = not from_pod
        return Stimulus(not from_pod, entered, runnable(frame))

    # --- layers, from the outside in

    def _frame(self, flow: Flow, *, from_pod: bool) -> bytes:
        packet = self._packet(flow, from_pod=from_pod)
        kind = struct.pack("!H", w.IP4 if flow[0] == 4 else w.IP6)
        chance = self._chance()
        if chance < 0.08:
            tags = 1 + self._below(3)
            kind = b"".join(struct.pack("!HH", self._pick((w.VLAN, w.QINQ)), 5) for _ in range(tags)) + kind
        elif chance < 0.09:
            kind = struct.pack("!H", self._pick((w.ARP, 0x88CC, 46, w.VLAN, w.IP4, w.IP6)))
        if self._chance() < 0.1:
            packet += bytes(self._below(40))  # padding
        return b"\2\0\0\0\0\1\2\0\0\0\0\2" + kind + packet

    def _packet(self, flow: Flow, *, from_pod: bool) -> bytes:
        version, local, remote, protocol, local_port, remote_port = flow
        if self._chance() < 0.03:
            remote = ODD[version][self._below(len(ODD[version]))]
        if self._chance() < 0.02:
            local = ODD[version][self._below(len(ODD[version]))]
        if from_pod:
            source, destination, ports = local, remote, (local_port, remote_port)
        else:
            source, destination, ports = remote, local, (remote_port, local_port)
        if protocol == w.ICMP:
            body = self._icmp(flow, from_pod=from_pod)
            if version == 6:
                protocol = w.ICMPV6
            if self._chance() < 0.02:
                protocol = w.ICMP + w.ICMPV6 - protocol  # the other family's
        else:
            body = self._body(protocol, *ports)
        if self._chance() < 0.02:
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

    def _ip6(self, source: bytes, destination: bytes, protocol: int, body: bytes) -> bytes:
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
        return struct.pack("!IHBB", version << 28, length & 0xFFFF, protocol, 64) + source + destination + body

    def _chain(self, protocol: int, body: bytes) -> tuple[int, bytes, list[bytes]]:
        """Extension headers before ``body``: the first one's protocol, the rest of the body, the headers."""
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
        """A fragment of ``body``: payload, offset, whether more follow, identification."""
        number = 1 + self._below(3)
        chance = self._chance()
        if chance < 0.5:
            return body[: 8 * self._below(8)] if self._chance() < 0.4 else body, 0, 1, number
        offset = 8 * (1 + self._below(4)) if chance < 0.9 else 8 * self._below(8192)
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
            words = 5 if self._chance() < 0.9 else self._below(16)
            body = struct.pack(
                "!HHIIBBHHH", source_port, destination_port, 1, 1, words << 4, self._pick(FLAGS), 1024, 0, 0
            ) + bytes(4 * self._below(12))  # fmt: skip
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
            kind = (
                self._below(256) if version == 4 or chance < 0.95 else self._pick((130, 131, 132, 133, 134, 135, 136))
            )
        code = 0 if self._chance() < 0.95 else self._below(256)
        if self._chance() < 0.2:
            identifier = 0
        body = struct.pack("!BBHHH", kind, code, 0, identifier, 1) + bytes(self._below(24))
        return body if self._chance() < 0.96 else body[: self._below(len(body) + 1)]

    def _error(self, version: int, *, from_pod: bool) -> bytes:
        """About a packet of some flow that went the other way, as a rule."""
        kind = self._pick((3, 3, 4, 5, 11, 12)) if version == 4 else self._pick((1, 2, 3, 4))
        candidates = [flow for flow in self._flows if flow[0] == version] or self._flows
        inner = self._packet(candidates[self._below(len(candidates))], from_pod=from_pod is (self._chance() < 0.05))
        if self._chance() < 0.5:
            inner = inner[: self._below(80)]
        return struct.pack("!BBHI", kind, self._below(5), 0, 0) + inner

    # --- blind damage

    def _mangled(self, frame: bytes) -> bytes:
        data = bytearray(frame)
        chance = self._chance()
        if chance < 0.6:
            for _ in range(1 + self._below(3)):
                data[12 + self._below(len(data) - 12)] ^= 1 << self._below(8)
        elif chance < 0.7:
            data[12 + self._below(len(data) - 12)] = self._pick((0, 1, 4, 6, 17, 44, 58, 59, 60, 127, 128, 255))
        elif chance < 0.9:
            del data[14 + self._below(len(data) - 13) :]
        else:
            start, size, target = self._below(len(data)), self._below(24), 12 + self._below(len(data) - 12)
            data[target : target + size] = data[start : start + size]
        return bytes(data)


def runnable(frame: bytes) -> bytes:
    """The frame, behind a VLAN tag if the kernel would otherwise refuse to run a program on it."""
    frame = frame.ljust(14, b"\0")
    while len(frame) < SMALLEST.get(w.u16(frame, 12), 0):
        frame = frame[:12] + b"\x81\x00\0\5" + frame[12:]
    return frame
