# SPDX-License-Identifier: Apache-2.0
"""An endpoint that learns names: its rows, questions and answers as packets, and what the program has learned.

The rows are written by hand, as an agent would write them. The programs run by test runs.
"""

from __future__ import annotations

import ctypes
import struct
import time
from ipaddress import ip_address, ip_network
from typing import Any

import dns_messages as d
import packets as p
from rig import ALLOW, ENDPOINT, LO, POD4, Rig, Seen, everything

from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.clock import read_jiffies
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import SKB_BYTES, SKB_IFINDEX, SKB_INGRESS_IFINDEX
from netpol_loader.tables.events import _SAMPLE, _libbpf

SERVER4, SERVER6, OTHER_SERVER4 = "10.96.0.10", "fd00:96::a", "10.96.0.11"
CLIENT_PORT = 40000
FLOOR_S = 30
EXACT, WILD = 7, 9
"""Name classes of www.example.com and of *.cdn.net."""
Learned = dict[tuple[int, str], dict[int, float]]
"""By endpoint and address: seconds until each class expires."""


def server_of(client: str) -> str:
    """The trusted server in the family of a client's address."""
    return SERVER4 if ip_address(client).version == 4 else SERVER6


def question(message: bytes, *, client: str = POD4, server: str = "", port: int = CLIENT_PORT, to: int = 53) -> bytes:
    """A frame with a question by UDP."""
    return p.frame(client, server or server_of(client), p.UDP, p.udp(port, to, message))


def answer(message: bytes, *, client: str = POD4, server: str = "", port: int = CLIENT_PORT, by: int = 53) -> bytes:
    """A frame with an answer by UDP."""
    return p.frame(server or server_of(client), client, p.UDP, p.udp(by, port, message))


def stream_question(data: bytes, *, client: str = POD4, port: int = CLIENT_PORT, flags: int = p.ACK) -> bytes:
    """A TCP segment to the server."""
    return p.frame(client, server_of(client), p.TCP, p.tcp(port, 53, flags, data))


def stream_answer(data: bytes, *, client: str = POD4, port: int = CLIENT_PORT, flags: int = p.ACK) -> bytes:
    """A TCP segment from the server."""
    return p.frame(server_of(client), client, p.TCP, p.tcp(53, port, flags, data))


class DnsScene:
    """A rig whose endpoint may talk to everybody and learns names. ``reports``: events of learned addresses; ``hertz``: jiffies a second."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.reports: list[abi.np_dns_event] = []
        self.hertz = int(rig.dataplane.config().jiffies_per_second)
        self._began_s, self._began_jiffies = time.monotonic(), read_jiffies()
        self._sample = _SAMPLE(self._on_report)
        self._ring = _libbpf().ring_buffer__new(rig.map("np_dns_event").fd, self._sample, None, None)
        self.take_reports()
        rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
        config = rig.dataplane.config()
        config.flags |= abi.NP_CONFIG_NAMES
        config.name_floor_s = FLOOR_S
        rig.dataplane.set_config(config)
        self.asks()
        for server in (SERVER4, SERVER6, OTHER_SERVER4):
            self.trust(server)
        self.pattern("www.example.com", EXACT)
        self.pattern("*.cdn.net", WILD)

    def close(self) -> None:
        """Close the reader of reports."""
        _libbpf().ring_buffer__free(self._ring)

    def configure(self, **fields: int) -> None:
        """Set fields of the configuration."""
        config = self.rig.dataplane.config()
        for name, value in fields.items():
            setattr(config, name, value)
        self.rig.dataplane.set_config(config)

    def asks(self, endpoint: int = ENDPOINT) -> None:
        """Give an endpoint an empty row of pending questions."""
        self.rig.map("np_asked").put(struct.pack("=I", endpoint), bytes(abi.np_asked()))

    def trust(self, server: str, port: int = 53) -> None:
        """Believe the answers of a server."""
        packed = ip_address(server).packed
        name = "np_resolver4" if len(packed) == 4 else "np_resolver6"
        self.rig.map(name).put(packed + struct.pack("=Hxx", port), struct.pack("=I", 1))

    def pattern(self, text: str, name_class: int) -> None:
        """Give a name, or ``*.`` and the end of names, a class."""
        wild = text.startswith("*.")
        key = d.labels(text.removeprefix("*.")) + (b"" if wild else b"\0")
        row = struct.pack("=I", len(key) * 8) + key.ljust(abi.NP_NAME_BYTES, b"\0")
        self.rig.map("np_name").put(row, struct.pack("=I", name_class))

    def refuse(self, text: str) -> None:
        """Never learn the addresses of a prefix."""
        net = ip_network(text)
        key = struct.pack("=I", net.prefixlen) + net.network_address.packed
        self.rig.map(f"np_unlearned{net.version}").put(key, struct.pack("=I", 1))

    def exchange(self, message: d.Message, *answers: d.Record, client: str = POD4, flags: int = 0x8180) -> Seen:
        """Ask by UDP and get the answer."""
        self.rig.out(question(message.wire(), client=client))
        return self.rig.into(answer(message.answer(*answers, flags=flags).wire(), client=client))

    def learned(self) -> Learned:
        """What the rows of learned addresses have."""
        now = self.now_units()
        result: Learned = {}
        for name, size in (("np_learned4", 4), ("np_learned6", 16)):
            for key, value in self.rig.map(name).items():
                row = abi.np_learned.from_buffer_copy(value)
                seconds = {
                    one: (until - now) * abi.NP_LEARNED_JIFFIES / self.hertz
                    for one, until in zip(row.name_class, row.until, strict=True)
                    if one
                }
                number = struct.unpack_from("=I", key)[0]
                result[number, str(ip_address(key[4 : 4 + size]))] = seconds
        return result

    def addresses(self) -> dict[str, set[int]]:
        """The learned addresses of the endpoint, each with its classes."""
        return {address: set(classes) for (number, address), classes in self.learned().items() if number == ENDPOINT}

    def now_units(self) -> int:
        """The time in units of NP_LEARNED_JIFFIES. The kernel's count is read once, because a read takes a millisecond."""
        passed = (time.monotonic() - self._began_s) * self.hertz
        return int(self._began_jiffies + passed) // abi.NP_LEARNED_JIFFIES

    def pending(self) -> int:
        """Number of pending questions."""
        value = self.rig.map("np_asked").get(struct.pack("=I", ENDPOINT)) or b""
        return sum(1 for slot in abi.np_asked.from_buffer_copy(value).slot if slot)

    def age_questions(self, units: int) -> None:
        """Let all pending questions be older by some units of NP_LEARNED_JIFFIES."""
        key = struct.pack("=I", ENDPOINT)
        row = abi.np_asked.from_buffer_copy(self.rig.map("np_asked").get(key) or b"")
        for index, slot in enumerate(row.slot):
            if slot:
                row.slot[index] = slot & ~0xFFFF | (slot - units) & 0xFFFF
        self.rig.map("np_asked").put(key, bytes(row))

    def take_reports(self) -> list[tuple[str, str, int, int]]:
        """The reports since the last call: name, address, class, TTL."""
        self.reports.clear()
        _libbpf().ring_buffer__consume(self._ring)
        return [
            (name_of(bytes(one.labels)), address_of(one), int(one.name_class), int(one.ttl_s)) for one in self.reports
        ]

    def changed(self, frame: bytes) -> tuple[int, bytes]:
        """Run a packet towards the endpoint. Returns the verdict and the packet as the program left it."""
        fd = self.rig.dataplane.programs.hooks[Hook.TC_EGRESS]
        context = bytearray(SKB_BYTES)
        struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, 77)
        struct.pack_into("=I", context, SKB_IFINDEX, LO)
        data, ctx = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(bytes(context))
        out = ctypes.create_string_buffer(len(frame) + 256)
        attr: Any = syscall._TestRunAttr(
            prog_fd=fd, data_size_in=len(frame), data_in=ctypes.addressof(data), repeat=1,
            data_size_out=len(out), data_out=ctypes.addressof(out),
            ctx_size_in=SKB_BYTES, ctx_in=ctypes.addressof(ctx),
        )  # fmt: skip
        syscall._bpf(syscall.PROG_TEST_RUN, attr)
        return ctypes.c_int32(attr.retval).value, out.raw[: attr.data_size_out]

    def _on_report(self, _context: int, data: int, size: int) -> int:
        self.reports.append(abi.np_dns_event.from_buffer_copy(ctypes.string_at(data, size)))
        return 0


def name_of(labels: bytes) -> str:
    """The name of a report as text."""
    parts, at = [], 0
    while labels[at]:
        parts.append(labels[at + 1 : at + 1 + labels[at]].decode("latin-1"))
        at += 1 + labels[at]
    return ".".join(reversed(parts))


def address_of(report: abi.np_dns_event) -> str:
    """The address of a report as text."""
    return str(ip_address(bytes(report.address)[: 4 if report.ip_version == 4 else 16]))
