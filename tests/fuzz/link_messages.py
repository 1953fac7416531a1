# SPDX-License-Identifier: Apache-2.0
"""The reference for link-local messages: ARP, neighbour and listener discovery, routers, DHCP servers.

Written from docs/packet-parsing.md and RFC 826 and 5227 (ARP), 4861, 4862 and 7527 (neighbour discovery), 6980
(receivers ignore it in fragments), 2710 and 3810 (listener discovery), 2131 and 8415 (DHCP), 792 (redirect). This
module must not know connections or policy.
"""

from __future__ import annotations

import struct

from endpoint import UNSPECIFIED4, UNSPECIFIED6, Endpoint, is_link_group, is_link_local, is_multicast
from wire import HOP_BY_HOP, ICMP, ICMPV6, IP4, UDP, Facts, Place, u16

LISTENER = frozenset({130, 131, 132, 143})
"""ICMPv6 types: query, report, done, and report of version 2."""
ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT, REDIRECT = 133, 134, 135, 136, 137
DISCOVERY = frozenset({ROUTER_SOLICITATION, SOLICITATION, ADVERTISEMENT})
ROUTERS_ONLY = frozenset({ROUTER_ADVERTISEMENT, REDIRECT})
REDIRECT4 = 5
"""The ICMP type of a redirect, for IPv4."""

NOT_ROUTED, NEVER_ROUTED = 255, 1
"""Hop limits: no router has forwarded the packet; no router will forward it."""
FIXED_BYTES, ADDRESS_BYTES, OPTION_BYTES = 8, 16, 8
SOURCE_ADDRESS, TARGET_ADDRESS, NONCE = 1, 2, 14
MOST_OPTIONS, MOST_RECORDS = 3, 32
DHCP_SERVER = {4: (67, 68), 6: (547, 546)}
"""Source and destination port of a DHCP server's packets, by IP version."""

ARP_HEAD = struct.pack("!HHBB", 1, IP4, 6, 4)
"""The head of an ARP packet for Ethernet and IPv4, with the lengths of their addresses."""
ARP_BYTES, ARP_PADDING = 28, 18
"""The length of an ARP packet, and of the zeros that pad it to the shortest Ethernet frame."""

ROUTER_ALERT = bytes((HOP_BY_HOP, ICMPV6, 0, 5, 2, 0, 0, 1, 0))
"""The only extension header of listener discovery (RFC 2711): its number, and its bytes, padded as hosts do."""
LISTENER_QUERY, LISTENER_REPORT2 = 130, 143
QUERY2_BYTES, REPORT_BYTES, RECORD_BYTES = 28, 24, 20
"""Lengths of a version 2 query without sources, a version 1 message, and a version 2 record without sources."""


def is_from_workload(endpoint: Endpoint, *, out_of_host: bool) -> bool:
    """Whether the packets at this hook come from the workload itself."""
    return not endpoint.is_host and not out_of_host


def arp(facts: Facts, endpoint: Endpoint, *, out_of_host: bool) -> str:
    """The reason why an ARP frame passes ("arp") or is dropped ("link-forged")."""
    if not is_from_workload(endpoint, out_of_host=out_of_host) or endpoint.routes:
        return "arp"
    said, behind = facts.message[:ARP_BYTES], facts.message[ARP_BYTES:]
    if len(said) < ARP_BYTES or said[:6] != ARP_HEAD or said[8:14] != facts.hardware_source:
        return "link-forged"
    if behind not in (b"", bytes(ARP_PADDING)):
        return "link-forged"
    sender, target = said[14:18], said[24:28]
    return "arp" if endpoint.may_claim(target if sender == UNSPECIFIED4 else sender) else "link-forged"


def is_forged(facts: Facts, endpoint: Endpoint, *, out_of_host: bool) -> bool:
    """Whether a workload sends a message that only a router or a DHCP server may send.

    A later fragment never counts.
    """
    if not is_from_workload(endpoint, out_of_host=out_of_host) or endpoint.routes or facts.place is Place.LATER:
        return False
    if facts.protocol == UDP:
        return (facts.source_port, facts.destination_port) == DHCP_SERVER[facts.version]
    if facts.version == 6:
        return facts.protocol == ICMPV6 and facts.icmp_type in ROUTERS_ONLY
    return facts.protocol == ICMP and facts.icmp_type == REDIRECT4


def discovery(facts: Facts, endpoint: Endpoint, *, out_of_host: bool) -> str:
    """The reason why a discovery message passes ("neighbour") or is dropped ("link-forged"); "": policy decides."""
    if facts.version != 6 or facts.protocol != ICMPV6 or facts.place is not Place.WHOLE or facts.icmp_code:
        return ""
    from_workload = is_from_workload(endpoint, out_of_host=out_of_host)
    if facts.icmp_type in LISTENER:
        return "neighbour" if _is_listener_message(facts, endpoint, from_workload=from_workload) else ""
    if facts.icmp_type not in DISCOVERY or facts.hop_limit != NOT_ROUTED:
        return ""
    if from_workload:
        return _workloads_discovery(facts, endpoint)
    destination = facts.destination
    stays = is_multicast(destination) or is_link_local(destination) or endpoint.node.is_own(destination)
    return "neighbour" if out_of_host or stays else ""


def _is_listener_message(facts: Facts, endpoint: Endpoint, *, from_workload: bool) -> bool:
    if facts.hop_limit != NEVER_ROUTED or not is_multicast(facts.destination):
        return False
    if from_workload and not _is_bare_listener_message(facts):
        return False
    if facts.source == UNSPECIFIED6:
        return True
    return is_link_local(facts.source) and (not from_workload or endpoint.may_claim(facts.source))


def _is_bare_listener_message(facts: Facts) -> bool:
    """Whether a listener discovery message has its minimal length, after a router alert or no extension header."""
    if facts.padding or facts.extensions not in (bytes((ICMPV6,)), ROUTER_ALERT):
        return False
    size = len(facts.message)
    if facts.icmp_type == LISTENER_REPORT2:
        count, records = u16(facts.message, 6), facts.message[FIXED_BYTES:]
        starts = range(0, len(records), RECORD_BYTES)
        plain = all(records[at + 1 : at + 4] == bytes(3) and records[at + 4 : at + 5] == b"\xff" for at in starts)
        return len(records) == count * RECORD_BYTES and count <= MOST_RECORDS and plain
    return size == REPORT_BYTES or (facts.icmp_type == LISTENER_QUERY and size == QUERY2_BYTES)


def _workloads_discovery(facts: Facts, endpoint: Endpoint) -> str:
    """A workload's message may be about itself, or ask about its link, without headers before or bytes after it."""
    rest = facts.message[FIXED_BYTES:]
    target = b""
    if facts.icmp_type != ROUTER_SOLICITATION:
        target, rest = rest[:ADDRESS_BYTES], rest[ADDRESS_BYTES:]
        if len(target) < ADDRESS_BYTES:
            return ""
    forged = "" if endpoint.routes else "link-forged"
    if facts.icmp_type == ADVERTISEMENT and not endpoint.may_claim(target):
        return forged  # receivers accept it whatever comes before and after it
    if facts.padding or facts.extensions != bytes((ICMPV6,)):
        return ""
    is_nobody = facts.source == UNSPECIFIED6
    if not is_nobody and not endpoint.may_claim(facts.source):
        return ""
    if not is_link_group(facts.destination) and not endpoint.is_on_link(facts.destination):
        return ""
    if facts.icmp_type == SOLICITATION:
        if is_nobody and not endpoint.may_claim(target):
            return forged
        if not is_nobody and not endpoint.is_on_link(target):
            return ""
    return "neighbour" if _are_own(rest, facts) else ""


def _are_own(options: bytes, facts: Facts) -> bool:
    """Whether every option is the sender's own link-layer address, or a nonce."""
    if len(options) % OPTION_BYTES or len(options) > MOST_OPTIONS * OPTION_BYTES:
        return False
    for at in range(0, len(options), OPTION_BYTES):
        kind, units, content = options[at], options[at + 1], options[at + 2 : at + OPTION_BYTES]
        if units != 1:
            return False
        if kind in (SOURCE_ADDRESS, TARGET_ADDRESS):
            if facts.source == UNSPECIFIED6 or content != facts.hardware_source:
                return False
        elif kind != NONCE:
            return False
    return True
