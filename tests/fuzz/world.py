# SPDX-License-Identifier: Apache-2.0
"""The fixed small world of the fuzzer: all addresses, and the facts that the reference knows about them.

The interface under test belongs to a workload or to the host, and may be at a bridge. Two more workloads of the node
have interfaces, one of them at that bridge. Most addresses contain 0x0800 or 0x86dd: if a packet has no Ethernet
header, a test run reads its protocol from these bytes of the source address (see harness.py).

Invariant: harness.py writes exactly these addresses into the maps. This module must not know packets.
"""

from __future__ import annotations

from ipaddress import ip_address

from endpoint import Node

Pair = dict[int, bytes]
"""One address for each IP version, in network order."""


def pair(text4: str, text6: str) -> Pair:
    """Two addresses, from text."""
    return {4: ip_address(text4).packed, 6: ip_address(text6).packed}


POD = pair("8.0.0.7", "fd00:0:86dd::7")
SECOND = pair("8.0.0.8", "fd00:0:86dd::8")
"""An address of the workload under test or of its sibling; it moves between them."""
FRIEND = pair("8.0.0.9", "fd00:0:86dd::9")
FOE = pair("8.0.0.66", "fd00:0:86dd::66")
NEAR = pair("8.0.51.3", "2001:db8:86dd::3")
"""An address whose prefix a policy rule names."""
WORLD = pair("8.0.113.9", "2a00:1:86dd::9")
BORROWED = pair("8.0.20.1", "fd20:0:86dd::1")
"""An address from whose prefix the workload may send."""
SIBLING = pair("8.0.0.21", "fd00:0:86dd::21")
"""An address of a workload at the bridge."""
OTHER = pair("8.0.0.22", "fd00:0:86dd::22")
"""An address of a workload that is not at the bridge."""
GONE = pair("8.0.0.23", "fd00:0:86dd::23")
"""An address of a workload without an interface."""
NODE = pair("8.0.0.1", "fd00:0:86dd::1")
"""An address of the node at the bridge."""
NODE_PORT = pair("8.0.1.1", "fd01:0:86dd::1")
"""An address of the node at the interface under test, for a workload that is at no bridge."""
NODE_RANGE = pair("8.0.77.5", "fd77:0:86dd::5")
"""The node has every address with the prefix of this one."""
OTHER_NODE = pair("8.0.1.2", "fd01:0:86dd::2")
BROADCAST = ip_address("8.0.0.255").packed

POD_LINK = ip_address("fe80:0:86dd::7").packed
SECOND_LINK = ip_address("fe80:0:86dd::8").packed
SIBLING_LINK = ip_address("fe80:0:86dd::21").packed
GONE_LINK = ip_address("fe80:0:86dd::23").packed
FREE_LINK = ip_address("fe80:0:86dd::99").packed
"""A link-local address that no row has."""
NODE_LINK = ip_address("fe80::1").packed
NODE_PORT_LINK = ip_address("fe80::2").packed

BORROWED_BYTES, NEAR_BYTES, RANGE_BYTES = {4: 3, 6: 4}, {4: 3, 6: 6}, {4: 3, 6: 4}
"""Lengths of the three prefixes in bytes, by IP version."""
TUNNELS = frozenset({(4, 0), (47, 0), (17, 4789)})
"""Rows of np_tunnel. Protocol 41 has none, so that encapsulation without a row is tested, too."""
LISTENING_PORT = 5000
"""The TCP port on which the harness listens."""


def texts(one: Pair) -> tuple[str, str]:
    """The IPv4 and the IPv6 address, as text."""
    return str(ip_address(one[4])), str(ip_address(one[6]))


def both(one: Pair) -> frozenset[bytes]:
    """The addresses of both families."""
    return frozenset(one.values())


ELSEWHERE = both(FOE) | both(BORROWED)
"""Addresses of workloads of another node. The workload under test may borrow some of them."""
OWN = both(POD) | {POD_LINK}
"""Addresses that the endpoint under test always owns."""
MOVING = both(SECOND) | {SECOND_LINK}
"""Addresses that the endpoint under test or its sibling owns."""
SIBLINGS = both(SIBLING) | {SIBLING_LINK} | MOVING


def around(*, is_bridged: bool) -> Node:
    """The node from the view of an interface at the bridge, or of one at no bridge."""
    at_bridge, at_port = both(NODE) | {NODE_LINK}, both(NODE_PORT) | {NODE_PORT_LINK}
    return Node(
        own=at_bridge | at_port,
        own_on_link=at_bridge if is_bridged else at_port,
        is_bridged=is_bridged,
        own_prefixes=tuple(NODE_RANGE[version][: RANGE_BYTES[version]] for version in (4, 6)),
        broadcasts=frozenset({BROADCAST}),
        other_nodes=both(OTHER_NODE),
        workloads=SIBLINGS | both(OTHER),
        workloads_on_link=SIBLINGS if is_bridged else frozenset(),
        elsewhere=ELSEWHERE,
        tunnels=TUNNELS,
        listening=frozenset({LISTENING_PORT}),
    )


def may_borrow(address: bytes) -> bool:
    """Whether the workload under test may send from an address that it does not own."""
    version = 4 if len(address) == 4 else 6
    return address.startswith(BORROWED[version][: BORROWED_BYTES[version]])
