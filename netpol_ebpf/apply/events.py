# SPDX-License-Identifier: Apache-2.0
"""Decodes records of the program's ring buffer into events with names of rules, endpoints and causes.

Invariant: everything in a `FlowEvent` was reported by the program.  A number that cannot be resolved stays a number.
The kernel engine, the agent and the command line use the same decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Protocol, TypeVar, Union

from netpol_ebpf.apply.encode import DIRECTION, OUTCOME
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    Action,
    Cause,
    Direction,
    EndpointKey,
    Outcome,
    Packet,
)
from netpol_loader import abi
from netpol_loader.tables.events import EventRecord

V_co = TypeVar("V_co", covariant=True)

FLOW_KIND: Mapping[int, str] = {abi.NP_EVENT_DENY: "deny", abi.NP_EVENT_ALLOW: "allow", abi.NP_EVENT_LOG: "log"}
"""Maps the type numbers of flow events to their names."""

DROPPED_BY_RULE = frozenset({abi.NP_REASON_POLICY_DENY, abi.NP_REASON_REVOKED})
"""The reasons of packets that a rule denied. Policy may have allowed a packet with another reason."""


class Lookup(Protocol[V_co]):
    """Anything that maps a number to the object with that number, such as a dictionary or a compiled table."""

    def get(self, key: int, /) -> V_co | None:
        """The object with the number ``key``, or None."""


@dataclass(frozen=True, slots=True)
class Names:
    """Resolves the numbers of rules, lists of Log rules and endpoints."""

    rules: Lookup[Cause]
    log_lists: Lookup[tuple[int, ...]]
    endpoints: Lookup[EndpointKey]


@dataclass(frozen=True, slots=True)
class FlowEvent:
    """One packet that the program reported.

    ``kind``: deny, allow or log.
    ``reason``: a slug of the registry in bpf/np_abi.h.
    ``packet``: None if the reported packet has no IP header.
    ``rule``, ``staged_rule``: the numbers of the rules that decided.
    ``cause``, ``staged_cause``: the causes with these numbers; None if no rule decided (as for a spoofed packet), or if
    the rule is no longer known.
    ``time_jiffies``: the time of the packet in jiffies of the kernel's clock.
    """

    kind: str
    reason: str
    direction: Direction
    endpoint: EndpointKey | None
    ifindex: int
    packet: Packet | None
    outcome: Outcome | None
    cause: Cause | None
    staged_outcome: Outcome | None
    staged_cause: Cause | None
    logs: tuple[Cause, ...]
    rule: int
    staged_rule: int
    own_identity: int
    peer_identity: int
    frame_bytes: int
    time_jiffies: int

    def as_dict(self) -> dict[str, Any]:
        """The event as plain values for JSON. Ports and ICMP fields are present only if the protocol has them."""
        plain: dict[str, Any] = {
            "kind": self.kind,
            "reason": self.reason,
            "direction": self.direction.value,
            "endpoint": None if self.endpoint is None else str(self.endpoint),
            "ifindex": self.ifindex,
            "verdict": None if self.outcome is None else self.outcome.value,
            "rule": None if self.cause is None else str(self.cause),
            "staged_verdict": None if self.staged_outcome is None else self.staged_outcome.value,
            "staged_rule": None if self.staged_cause is None else str(self.staged_cause),
            "logs": [str(cause) for cause in self.logs],
            "peer_identity": self.peer_identity,
            "frame_bytes": self.frame_bytes,
            "time_jiffies": self.time_jiffies,
        }
        if self.packet is not None:
            plain |= {
                "source": str(self.packet.source),
                "destination": str(self.packet.destination),
                "protocol": self.packet.protocol,
            }
            if self.packet.protocol in PORT_PROTOCOLS:
                plain |= {"source_port": self.packet.source_port, "destination_port": self.packet.destination_port}
            elif self.packet.protocol in (ICMP, ICMPV6):
                plain |= {"icmp_type": self.packet.icmp_type, "icmp_code": self.packet.icmp_code}
        return plain


ProgramEvent = Union[FlowEvent]
"""All types of events that the program reports."""


def decode_event(record: EventRecord, names: Names) -> ProgramEvent:
    """Decode a record that `netpol_loader.tables.events.parse_record` returned, and resolve the record's numbers."""
    return DECODERS[record.kind](record, names)


def decode_flow(event: abi.np_event, names: Names) -> FlowEvent:
    """Decode a flow event, and resolve its numbers."""
    reason = abi.REASONS[event.reason]
    is_by_rule = not reason.dropped or event.reason in DROPPED_BY_RULE
    return FlowEvent(
        kind=FLOW_KIND[event.kind],
        reason=reason.slug,
        direction=DIRECTION[event.direction],
        endpoint=names.endpoints.get(event.endpoint),
        ifindex=event.ifindex,
        packet=_packet(event),
        outcome=OUTCOME.get(event.action),
        cause=_cause(names, event.rule, event.action) if is_by_rule else None,
        staged_outcome=OUTCOME.get(event.staged_action),
        staged_cause=_cause(names, event.staged_rule, event.staged_action) if is_by_rule else None,
        logs=tuple(cause for rule in names.log_lists.get(event.log_list) or () if (cause := names.rules.get(rule))),
        rule=event.rule,
        staged_rule=event.staged_rule,
        own_identity=event.own_identity,
        peer_identity=event.peer_identity,
        frame_bytes=event.frame_bytes,
        time_jiffies=event.time_jiffies,
    )  # fmt: skip


def _cause(names: Names, rule: int, action: int) -> Cause | None:
    """The cause with the number ``rule``.

    None if the number is unknown, or if the cause's action does not fit ``action``.

    If the action does not fit, another rule got the number after the event.
    """
    cause = names.rules.get(rule)
    decided = OUTCOME.get(action)
    if cause is None or decided not in (Outcome.ALLOW, Outcome.DENY):
        return cause
    return cause if (cause.action is Action.DENY) == (decided is Outcome.DENY) else None


def _packet(event: abi.np_event) -> Packet | None:
    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    if event.ip_version == 4:  # noqa: PLR2004 - the IP version
        source, destination = IPv4Address(bytes(event.source)[:4]), IPv4Address(bytes(event.destination)[:4])
    elif event.ip_version == 6:  # noqa: PLR2004 - the IP version
        source, destination = IPv6Address(bytes(event.source)), IPv6Address(bytes(event.destination))
    else:
        return None
    has_ports = event.protocol in PORT_PROTOCOLS  # the events of ICMP queries have the identifier in these fields
    is_icmp = event.protocol in (ICMP, ICMPV6)
    return Packet(
        source,
        destination,
        event.protocol,
        event.source_port if has_ports else 0,
        event.destination_port if has_ports else 0,
        event.icmp_type if is_icmp else 0,
        event.icmp_code if is_icmp else 0,
    )


DECODERS: Mapping[int, Callable[[EventRecord, Names], ProgramEvent]] = dict.fromkeys(FLOW_KIND, decode_flow)
"""Maps each type number (``enum np_event_kind``) in `netpol_loader.tables.events.RECORDS` to the decoder of that type.
"""


@dataclass(frozen=True, slots=True)
class LearnedAddress:
    r"""An address that an endpoint learned from a DNS answer, as the program reported it.

    ``endpoint``: None if the endpoint is no longer known.
    ``name``: the name of the question, in lower case, without a dot at the end. A byte of a label that is no letter, digit,
    hyphen or underscore has the form ``\DDD``, as in zone files.
    ``ttl_s``: the time to live in the answer, in seconds.
    ``name_class``: 0 if no pattern matched the name.
    ``time_jiffies``: when the answer came.
    """

    endpoint: EndpointKey | None
    name: str
    address: IPv4Address | IPv6Address
    server: IPv4Address | IPv6Address
    ttl_s: int
    name_class: int
    time_jiffies: int = 0


def decode_learned(record: abi.np_dns_event, names: Names) -> LearnedAddress:
    """Decode a report of the program. ``names``: resolves the endpoint's number."""
    family: type[IPv4Address | IPv6Address] = IPv4Address if record.ip_version == IPV4 else IPv6Address
    size = 4 if record.ip_version == IPV4 else 16
    return LearnedAddress(
        names.endpoints.get(record.endpoint),
        decode_labels(bytes(record.labels)),
        family(bytes(record.address)[:size]),
        family(bytes(record.server)[:size]),
        record.ttl_s,
        record.name_class,
        record.time_jiffies,
    )


def decode_labels(labels: bytes) -> str:
    """The name of a key of np_name: labels in reverse order, each after its length, until a length of zero."""
    found, at = [], 0
    while at < len(labels) and labels[at]:
        label = labels[at + 1 : at + 1 + labels[at]]
        found.append("".join(chr(byte) if chr(byte) in _PLAIN else f"\\{byte:03d}" for byte in label))
        at += 1 + labels[at]
    return ".".join(reversed(found))


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
IPV4 = 4
