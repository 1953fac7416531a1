# SPDX-License-Identifier: Apache-2.0
"""Records of the ring buffer, decoded into the terms of the policy."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest

from netpol_ebpf.apply.events import DECODERS, FlowEvent, Names, decode_event
from netpol_ebpf.policy.types import (
    ICMP,
    TCP,
    Action,
    Cause,
    CauseKind,
    Direction,
    EndpointKey,
    Outcome,
    Packet,
    PolicyKey,
)
from netpol_loader import abi
from netpol_loader.tables import events

WEB = EndpointKey("Pod", "shop", "web")
KEY = PolicyKey("NetworkPolicy", "shop", "p")
DENY = Cause(CauseKind.TIER_END, Direction.INGRESS, "default", KEY)
ALLOW = Cause(CauseKind.RULE, Direction.INGRESS, "default", KEY, index=1, action=Action.ALLOW)
LOG = Cause(CauseKind.RULE, Direction.INGRESS, "default", KEY, index=0, action=Action.LOG)
NAMES = Names({1: DENY, 2: ALLOW, 3: LOG}, {4: (3,)}, {5: WEB})


def raw(**fields: object) -> abi.np_event:
    event = abi.np_event(
        kind=abi.NP_EVENT_DENY, reason=abi.NP_REASON_POLICY_DENY, direction=abi.NP_DIRECTION_INGRESS, endpoint=5,
        ifindex=42, rule=1, staged_rule=2, log_list=4, action=abi.NP_ACTION_DENY, staged_action=abi.NP_ACTION_ALLOW,
        ip_version=4, protocol=TCP, source_port=40000, destination_port=443, peer_identity=16, frame_bytes=74,
    )  # fmt: skip
    event.source[0:4] = list(ip_address("10.0.0.9").packed)
    event.destination[0:4] = list(ip_address("10.0.0.1").packed)
    for name, value in fields.items():
        setattr(event, name, value)
    return event


def decoded(**fields: object) -> FlowEvent:
    return decode_event(raw(**fields), NAMES)


def test_denied_flow_is_told_in_full() -> None:
    """The event has endpoint, packet, the deciding rule, the verdict of staged policy, and the Log rules before it."""
    event = decoded()
    assert (event.kind, event.reason, event.direction) == ("deny", "policy-deny", Direction.INGRESS)
    assert (event.endpoint, event.ifindex, event.peer_identity) == (WEB, 42, 16)
    assert event.packet == Packet(ip_address("10.0.0.9"), ip_address("10.0.0.1"), TCP, 40000, 443)
    assert (event.outcome, event.cause) == (Outcome.DENY, DENY)
    assert (event.staged_outcome, event.staged_cause) == (Outcome.ALLOW, ALLOW)
    assert event.logs == (LOG,)


def test_addresses_of_the_other_family() -> None:
    """IPv6 addresses use all sixteen bytes."""
    event = raw(ip_version=6)
    event.source[:] = list(ip_address("fd00::9").packed)
    event.destination[:] = list(ip_address("fd00::1").packed)
    packet = decode_event(event, NAMES).packet
    assert packet is not None
    assert (packet.source, packet.destination) == (ip_address("fd00::9"), ip_address("fd00::1"))


def test_icmp_has_type_and_code_and_no_ports() -> None:
    """The identifier of an echo request, which the program keeps in the ports, is not shown as a port."""
    event = decoded(protocol=ICMP, icmp_type=8, icmp_code=0, destination_port=0)
    assert event.packet == Packet(ip_address("10.0.0.9"), ip_address("10.0.0.1"), ICMP, icmp_type=8)
    assert "source_port" not in event.as_dict()
    assert event.as_dict()["icmp_type"] == 8


def test_what_is_not_known_is_not_guessed() -> None:
    """Without an IP header there is no packet. Unknown numbers have no name."""
    event = decoded(ip_version=0, rule=99, endpoint=98, log_list=97, action=abi.NP_ACTION_NONE)
    assert (event.packet, event.cause, event.endpoint, event.logs, event.outcome) == (None, None, None, (), None)
    assert event.rule == 99
    assert event.as_dict()["rule"] is None


def test_dictionary_is_json() -> None:
    """The plain form can be written as JSON, and has readable names."""
    plain = json.loads(json.dumps(decoded().as_dict()))
    assert plain["endpoint"] == "Pod/shop/web"
    assert plain["rule"] == str(DENY)
    assert (plain["source"], plain["destination_port"], plain["verdict"]) == ("10.0.0.9", 443, "deny")


def test_every_kind_and_reason_of_the_registry_is_known() -> None:
    """Every record of the program has names here."""
    for kind in (abi.NP_EVENT_DENY, abi.NP_EVENT_ALLOW, abi.NP_EVENT_LOG):
        for reason in abi.REASONS:
            assert decoded(kind=kind, reason=reason).reason == abi.REASONS[reason].slug


@pytest.mark.parametrize(
    "reason",
    [
        abi.NP_REASON_TO_HOST,
        abi.NP_REASON_HIDDEN_SOURCE,
        abi.NP_REASON_CONN_FULL,
        abi.NP_REASON_POLICY_DENY,
        abi.NP_REASON_REVOKED,
    ],
)
def test_what_is_dropped_is_never_told_as_allowed(reason: int) -> None:
    """A packet is dropped although a rule allows it, or its rule's number was reused.

    The reason is shown, and no rule.
    """
    event = decoded(reason=reason, rule=2)
    assert (event.reason, event.cause) == (abi.REASONS[reason].slug, None)
    assert event.as_dict()["rule"] is None


@pytest.mark.parametrize("reason", [abi.NP_REASON_TO_HOST, abi.NP_REASON_HIDDEN_SOURCE, abi.NP_REASON_SPOOFED])
def test_what_no_rule_dropped_names_no_rule(reason: int) -> None:
    """If something else decided, the rule of policy is not shown, whatever it says."""
    event = decoded(reason=reason)
    assert (event.cause, event.staged_cause) == (None, None)


def test_what_is_allowed_is_never_told_as_denied() -> None:
    """The rule of an allowed flow never denies."""
    passed = {"kind": abi.NP_EVENT_ALLOW, "reason": abi.NP_REASON_POLICY_ALLOW, "action": abi.NP_ACTION_ALLOW}
    assert decoded(**passed, rule=2).cause == ALLOW
    assert decoded(**passed, rule=1).cause is None


def test_every_type_of_event_has_a_record_and_a_decoder() -> None:
    """Every type that the program may report has a decoder; otherwise it would be lost."""
    kinds = {value for name, value in vars(abi).items() if name.startswith("NP_EVENT_")}
    assert kinds == set(events.RECORDS) == set(DECODERS)


def test_record_is_read_by_its_type() -> None:
    """The type number gives the structure. Another version's type, or a short record, gives none."""
    whole = bytes(raw(kind=abi.NP_EVENT_ALLOW))
    record = events.parse_record(whole)
    assert record is not None
    assert bytes(record) == whole
    assert decode_event(record, NAMES).kind == "allow"
    unknown = max(events.RECORDS) + 1
    assert events.parse_record(bytes(raw(kind=unknown))) is None
    assert events.parse_record(whole[:-1]) is None
    assert events.parse_record(b"") is None


def test_unknown_record_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A record of another version of the program does not hide the records of this one."""
    seen: list[events.EventRecord] = []
    reader = object.__new__(events.EventReader)
    reader.unknown, reader._callback, reader._parse = 0, seen.append, events.parse_record
    for kind in (99, abi.NP_EVENT_DENY, 99):
        reader._hand_over(bytes(raw(kind=kind)))
    assert (reader.unknown, [one.kind for one in seen]) == (2, [abi.NP_EVENT_DENY])
    assert len(caplog.records) == 1
