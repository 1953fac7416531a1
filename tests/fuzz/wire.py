# SPDX-License-Identifier: Apache-2.0
"""The reference parser: from the bytes of a frame to the facts that policy and connections need.

Written from the RFCs and docs/packet-parsing.md, not from the C program, and simple rather than fast. Invariant: no
byte beyond the packet's stated length, or beyond the frame, has an effect. This module must not know policy,
connections or addresses.

Sources: RFC 791, 792, 826 (ARP), 8200, 4302 (AH), 4443, 768, 9293, 9260, 1858 and 3128 (small and overlapping
fragments), 7112 (a first fragment has all headers), IEEE 802.1Q.

The parser parses the IPv6 extension headers that a Linux receiver parses (`ipv6_ext_hdr` in net/ipv6/exthdrs_core.c).
The mobility header (135) is not one of them, although RFC 6275 calls it one: it ends the chain, as a protocol.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

IP4, ARP, VLAN, IP6, QINQ = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88A8
HOP_BY_HOP, ICMP, IPIP, TCP, UDP, IP6_IN_IP, ROUTING, FRAGMENT, GRE, AH, ICMPV6, NO_NEXT, OPTIONS, SCTP, MOBILITY = (
    0, 1, 4, 6, 17, 41, 43, 44, 47, 51, 58, 59, 60, 132, 135,
)  # fmt: skip
FIN, SYN, RST, ACK = 1, 2, 4, 16
ENCAPSULATION = frozenset({IPIP, IP6_IN_IP, GRE})
"""Protocols that are tunnels by themselves. UDP is one by its destination port."""

TAGS = 2
"""Number of VLAN tags that are skipped. A frame with a third one is not parsed as IP."""
EXTENSIONS = frozenset({HOP_BY_HOP, ROUTING, FRAGMENT, AH, OPTIONS})
EXTENSIONS_WALKED = 8
HEADER_ROOM = 256
"""The largest offset in the frame at which a header may begin."""
L4_BYTES = {TCP: 20, UDP: 8, SCTP: 12}
"""Shortest header, by protocol. For ICMP in its own family it is ICMP_BYTES."""
ICMP_BYTES = 8

ANSWERS = {4: {8: 0, 13: 14, 15: 16, 17: 18}, 6: {128: 129}}
"""By IP version: the type of each ICMP query, and that of its answer."""
ERRORS = {4: frozenset({3, 4, 5, 11, 12}), 6: frozenset({1, 2, 3, 4})}
ALL_DHCP_SERVERS = bytes.fromhex("ff020000000000000000000000010002")


class Place(enum.Enum):
    """The place of a frame in a fragmented packet."""

    WHOLE = 0
    FIRST = 1
    LATER = 2


class Kind(enum.Enum):
    """The kind of an ICMP message. NONE also stands for all other protocols."""

    NONE = 0
    QUERY = 1
    ANSWER = 2
    ERROR = 3


@dataclass(frozen=True)
class Invoking:
    """The inner packet of an ICMP error. ``tuple``: source, destination, protocol, ports (or ICMP identifier)."""

    tuple: tuple[bytes, bytes, int, int, int]


@dataclass
class Facts:
    """The fields of a frame.

    Addresses are in network order. The identifier of an ICMP query is its source port, that of an answer its
    destination port.
    """

    ethertype: int = 0
    hardware_source: bytes = b""
    """The source address of the Ethernet header; empty without such a header."""
    version: int = 0
    source: bytes = b""
    destination: bytes = b""
    hop_limit: int = 0
    """Set only for IPv6."""
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    tcp_flags: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    kind: Kind = Kind.NONE
    invoking: Invoking | None = None
    place: Place = Place.WHOLE
    identification: int = 0
    offset: int = 0
    """Offset of a later fragment, in bytes of the fragmented part."""
    covered: int = 0
    """Number of bytes of the fragmented part that the headers of a first fragment take."""
    message: bytes = b""
    """All bytes from the transport header, or from the first field of ARP, to the packet's stated end."""
    payload_bytes: int = 0
    """Number of bytes after the transport header, to the packet's stated end. A later fragment has only payload."""
    extensions: bytes = b""
    """The number of the first IPv6 extension header, followed by the bytes of all of them up to the transport
    header."""
    padding: int = 0
    """Number of bytes of the frame after the packet's stated end."""

    @property
    def is_initial_syn(self) -> bool:
        """Whether the packet opens a TCP connection."""
        return self.protocol == TCP and self.tcp_flags & (SYN | ACK) == SYN

    @property
    def is_dhcp_request(self) -> bool:
        """Whether the packet is a DHCP client's request to all servers on its link."""
        if self.protocol != UDP or self.place is not Place.WHOLE:
            return False
        if self.version == 4:
            return (self.source_port, self.destination_port) == (68, 67) and self.destination == b"\xff" * 4
        return (self.source_port, self.destination_port) == (546, 547) and self.destination == ALL_DHCP_SERVERS


class Stop(Exception):  # noqa: N818  # no error: the slug of why a frame goes no further
    """Parsing ends here, with this reason."""


def u16(data: bytes, at: int) -> int:
    """Two bytes in network order, as a number."""
    return data[at] << 8 | data[at + 1]


def parse(frame: bytes, *, has_link: bool = True) -> tuple[str, Facts]:
    """The reason that ends parsing, or "", and the facts that are known by then.

    ``has_link``: the frame begins with an Ethernet header. Otherwise it begins with the network header, and the kernel
    says which one it is. In a test run the kernel reads that from the place of an Ethernet header's type.
    """
    facts = Facts()
    try:
        if has_link:
            at = _ethernet(frame, facts)
        else:
            at, facts.ethertype = 0, u16(frame, 12)
        _network(frame, at, facts)
    except Stop as stop:
        return str(stop), facts
    return "", facts


def _ethernet(frame: bytes, facts: Facts) -> int:
    if len(frame) < 14:
        raise Stop("short")
    at, kind = 14, u16(frame, 12)
    for _ in range(TAGS):
        if kind not in (VLAN, QINQ):
            break
        if len(frame) < at + 4:
            raise Stop("short")
        kind = u16(frame, at + 2)
        at += 4
    facts.ethertype, facts.hardware_source = kind, frame[6:12]
    return at


def _network(frame: bytes, at: int, facts: Facts) -> None:
    if facts.ethertype == IP4:
        _ip4(frame, at, facts)
    elif facts.ethertype == IP6:
        _ip6(frame, at, facts)
    elif facts.ethertype == ARP:
        facts.message = frame[at:]
        raise Stop("arp")
    else:
        raise Stop("non-ip")


def _ip4(frame: bytes, at: int, facts: Facts) -> None:
    room = len(frame) - at
    if room < 20:
        raise Stop("short")
    header = (frame[at] & 15) * 4
    stated = u16(frame, at + 2)
    total = stated or room  # 0: larger than 64 kB, and the kernel will segment it later
    place = u16(frame, at + 6)
    fragmented = bool(place & 0x3FFF)  # the flag "more fragments", or an offset
    if frame[at] >> 4 != 4 or header < 20 or not header <= total <= room or (fragmented and not stated):
        raise Stop("bad-ip")
    facts.version = 4
    facts.source, facts.destination = frame[at + 12 : at + 16], frame[at + 16 : at + 20]
    facts.protocol = frame[at + 9]
    if fragmented:
        facts.offset = (place & 0x1FFF) * 8
        facts.place = Place.LATER if facts.offset else Place.FIRST
        facts.identification = u16(frame, at + 4)
    _transport(frame, at + header, at + total, facts)


def _ip6(frame: bytes, at: int, facts: Facts) -> None:
    room = len(frame) - at - 40
    if room < 0:
        raise Stop("short")
    stated = u16(frame, at + 4)
    payload = stated or room  # 0: larger than 64 kB, and the kernel will segment it later
    if frame[at] >> 4 != 6 or payload > room:
        raise Stop("bad-ip")
    facts.version = 6
    facts.source, facts.destination = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
    facts.hop_limit = frame[at + 7]
    end = at + 40 + payload
    start = at + 40
    following, at = frame[at + 6], start
    fragmented_part = 0  # the offset at which it begins; 0: no fragment header yet
    for walked in range(EXTENSIONS_WALKED + 1):
        if following == NO_NEXT:
            raise Stop("no-next-header")
        if following not in EXTENSIONS:
            break
        if walked == EXTENSIONS_WALKED:
            raise Stop("ip6-headers")
        kind = following
        following, size = _extension(frame, kind, at, end)
        at += size
        if kind == FRAGMENT:
            if fragmented_part:
                raise Stop("ip6-headers")  # a fragment of a fragment
            fragmented_part = at
            _fragment(frame, at - size, facts)
            if facts.place is not Place.WHOLE and not stated:
                raise Stop("bad-ip")
            if facts.place is Place.LATER:
                break  # the rest is payload
        if at > HEADER_ROOM:
            raise Stop("short")
    facts.protocol = following
    facts.extensions = frame[start - 34 : start - 33] + frame[start:at]
    _transport(frame, at, end, facts, before=at - fragmented_part)


def _extension(frame: bytes, kind: int, at: int, end: int) -> tuple[int, int]:
    """(the number of the header after the one at ``at``, the size of this one)."""
    if at + 8 > end:
        raise Stop("short")
    if kind == FRAGMENT:
        size = 8
    elif kind == AH:
        size = (frame[at + 1] + 2) * 4
    else:
        size = (frame[at + 1] + 1) * 8
    if at + size > end:
        raise Stop("short")
    return frame[at], size


def _fragment(frame: bytes, at: int, facts: Facts) -> None:
    place = u16(frame, at + 2) & 0xFFF9  # without reserved bits; 0: an atomic fragment, a whole packet
    if place:
        facts.offset = place & 0xFFF8
        facts.place = Place.LATER if facts.offset else Place.FIRST
        facts.identification = int.from_bytes(frame[at + 4 : at + 8], "big")


def _transport(frame: bytes, at: int, end: int, facts: Facts, *, before: int = 0) -> None:
    """The transport header, or the payload of a later fragment. ``before``: number of fragmented bytes before it."""
    size = 0 if facts.place is Place.LATER else _l4(frame, at, end, facts)
    if facts.place is Place.FIRST:
        facts.covered = before + size
    facts.message, facts.padding = frame[at:end], len(frame) - end
    facts.payload_bytes = end - at - size


def _l4(frame: bytes, at: int, end: int, facts: Facts) -> int:
    """Parse ports, flags and ICMP. Returns the header's size, for TCP with options, which the receiver reads, too."""
    protocol = facts.protocol
    if protocol == (ICMP if facts.version == 4 else ICMPV6):
        if at + ICMP_BYTES > end:
            raise Stop("bad-l4")
        _icmp(frame, at, end, facts)
        return ICMP_BYTES
    size = L4_BYTES.get(protocol, 0)
    if at + size > end:
        raise Stop("bad-l4")
    if protocol == TCP:
        stated = (frame[at + 12] >> 4) * 4
        if stated < size or at + stated > end:
            raise Stop("bad-l4")
        size = stated
        facts.tcp_flags = frame[at + 13]
    if size:
        facts.source_port, facts.destination_port = u16(frame, at), u16(frame, at + 2)
    return size


def _icmp(frame: bytes, at: int, end: int, facts: Facts) -> None:
    facts.icmp_type, facts.icmp_code = frame[at], frame[at + 1]
    facts.kind = icmp_kind(facts.icmp_type, facts.version)
    if facts.kind is Kind.QUERY:
        facts.source_port = u16(frame, at + 4)
    elif facts.kind is Kind.ANSWER:
        facts.destination_port = u16(frame, at + 4)
    elif facts.kind is Kind.ERROR:
        facts.invoking = _invoking(frame[at + ICMP_BYTES : end], facts.version)


def icmp_kind(number: int, version: int) -> Kind:
    """The kind of an ICMP type in its own family."""
    if number in ERRORS[version]:
        return Kind.ERROR
    if number in ANSWERS[version]:
        return Kind.QUERY
    return Kind.ANSWER if number in ANSWERS[version].values() else Kind.NONE


def _invoking(packet: bytes, version: int) -> Invoking | None:
    """The inner packet of an ICMP error: its header and the next eight bytes. None if it cannot be parsed."""
    if version == 4:
        if len(packet) < 20 or packet[0] >> 4 != 4 or packet[0] & 15 < 5 or u16(packet, 6) & 0x1FFF:
            return None
        source, destination, protocol, at = packet[12:16], packet[16:20], packet[9], (packet[0] & 15) * 4
    else:
        if len(packet) < 40 or packet[0] >> 4 != 6:
            return None
        source, destination, protocol, at = packet[8:24], packet[24:40], packet[6], 40
        for _ in range(EXTENSIONS_WALKED):
            if protocol not in EXTENSIONS:
                break
            try:
                following, size = _extension(packet, protocol, at, len(packet))
            except Stop:
                return None
            if protocol == FRAGMENT and u16(packet, at + 2) & 0xFFF8:
                return None
            protocol, at = following, at + size
        if protocol in EXTENSIONS:
            return None
    if len(packet) < at + 8:
        return None
    source_port = destination_port = 0
    if protocol in L4_BYTES:
        source_port, destination_port = u16(packet, at), u16(packet, at + 2)
    elif protocol == (ICMP if version == 4 else ICMPV6):
        kind = icmp_kind(packet[at], version)
        if kind is Kind.QUERY:
            source_port = u16(packet, at + 4)
        elif kind is Kind.ANSWER:
            destination_port = u16(packet, at + 4)
    return Invoking((source, destination, protocol, source_port, destination_port))
