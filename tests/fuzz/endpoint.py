# SPDX-License-Identifier: Apache-2.0
"""The reference for addresses: the scope of an address, and the facts that the node and an endpoint know about it.

Sources: RFC 4291 (IPv6 scopes), RFC 1112 and 919 (IPv4 multicast and broadcast), RFC 1122 (loopback), and
docs/packet-parsing.md. An address is 4 or 16 bytes in network order. This module must not know packets.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

UNSPECIFIED4, UNSPECIFIED6 = bytes(4), bytes(16)
BROADCAST4 = b"\xff" * 4
LINK_SCOPE = 2


class Way(enum.Enum):
    """The policy's direction."""

    INGRESS = 0
    EGRESS = 1


@dataclass(frozen=True)
class Question:
    """A flow's first packet as policy gets it, from the endpoint's view. The ports are in the packet's own order."""

    way: Way
    peer: bytes
    protocol: int
    source_port: int
    destination_port: int
    icmp: tuple[int, int]


Policy = Callable[[Question], "tuple[bool, int]"]
"""A function from a question to (whether the flow is allowed, number of the deciding rule)."""


def is_link_local(address: bytes) -> bool:
    """Whether the address is in fe80::/10. 169.254.0.0/16 is an ordinary prefix here."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def is_multicast(address: bytes) -> bool:
    """Whether the address is in ff00::/8 or 224.0.0.0/4."""
    return address[0] == 0xFF if len(address) == 16 else address[0] >> 4 == 0xE


def is_for_many(address: bytes) -> bool:
    """Whether the address is multicast or 255.255.255.255, to which several hosts may listen. No table is needed."""
    return is_multicast(address) or address == BROADCAST4


def is_link_group(address: bytes) -> bool:
    """Whether an address is IPv6 multicast of link-local scope. The flags (high half of byte 2) do not matter."""
    return len(address) == 16 and address[0] == 0xFF and address[1] & 0xF == LINK_SCOPE


@dataclass(frozen=True)
class Node:
    """The node's facts, from the view of the interface under test."""

    own: frozenset[bytes] = frozenset()
    """Addresses of the node, on any interface."""
    own_on_link: frozenset[bytes] = frozenset()
    """Those addresses of the node that are on the interface's link: at the interface, or at its bridge."""
    own_prefixes: tuple[bytes, ...] = ()
    """Prefixes in bytes. The node has every address that begins with one of them."""
    broadcasts: frozenset[bytes] = frozenset()
    other_nodes: frozenset[bytes] = frozenset()
    workloads: frozenset[bytes] = frozenset()
    """Addresses of other workloads of this node. One of them may be the endpoint's at the same time while it moves."""
    workloads_on_link: frozenset[bytes] = frozenset()
    """Those of ``workloads`` that are at the interface's bridge."""
    elsewhere: frozenset[bytes] = frozenset()
    """Addresses of workloads of other nodes."""
    is_bridged: bool = False
    """The interface is at a bridge, so other hosts than the node may receive the workload's packets."""
    tunnels: frozenset[tuple[int, int]] = frozenset()
    """Encapsulations that nodes accept from any sender: (protocol, UDP destination port, or 0 for other protocols)."""
    listening: frozenset[int] = frozenset()
    """TCP ports on which a process of the node listens, at all addresses."""

    def is_own(self, address: bytes) -> bool:
        """Whether the node has the address. It has all addresses of 127.0.0.0/8."""
        if len(address) == 4 and address[0] == 127:
            return True
        return address in self.own or address.startswith(self.own_prefixes)

    def reaches_nodes(self, address: bytes) -> bool:
        """Whether this node or another one receives packets to the address."""
        return self.is_own(address) or address in self.broadcasts | self.other_nodes


@dataclass
class Endpoint:
    """The interface's endpoint, and the flags of its row."""

    addresses: frozenset[bytes]
    policy: Policy
    is_host: bool = False
    borrowed: Callable[[bytes], bool] = lambda _: False
    """Whether the endpoint may send from an address that it does not own."""
    node: Node = field(default_factory=Node)
    routes: bool = False
    """The workload is a router: it sends and receives packets of others."""
    has_link: bool = True
    """The packets begin with an Ethernet header."""
    is_outside: bool = False
    """This host interface leads to no workload of this node."""
    is_external: bool = False
    """The interface is a tunnel that gives the outer sender in the packet's metadata, which a test run cannot set."""

    def may_claim(self, address: bytes) -> bool:
        """Whether the workload may say on its link that it has the address.

        It may if it owns or may borrow the address, or if the address is link-local and no known other host has it.
        """
        if address in self.addresses or self.borrowed(address):
            return True
        return is_link_local(address) and not self.node.is_own(address) and address not in self.node.workloads

    def may_send(self, address: bytes, to: bytes) -> bool:
        """Whether the workload may send from the address without borrowing it.

        A link-local source is allowed if only the node receives the packet, because workloads identify peers by
        address.
        """
        if address in self.addresses:
            return True
        return is_link_local(address) and (not self.node.is_bridged or to in self.node.own_on_link)

    def is_on_link(self, address: bytes) -> bool:
        """Whether an IPv6 address is on the interface's link.

        There are no routes in the test, so no further address is.

        All addresses of the node count as on the link, because the tables have only one interface of each address.
        """
        known = self.addresses | self.node.own | self.node.workloads_on_link
        return is_link_local(address) or address in known

    def may_receive(self, address: bytes) -> bool:
        """Whether a packet to the address may be for the workload. Any workload may have a link-local address."""
        if address in self.addresses or self.borrowed(address) or is_link_local(address):
            return True
        return is_for_many(address) or address in self.node.broadcasts
