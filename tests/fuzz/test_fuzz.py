# SPDX-License-Identifier: Apache-2.0
"""The loaded program and the reference agree about mutated packets, and about sequences of them.

This runs a part of `python -m tests.fuzz`, which runs as long as requested, with a fixed seed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import link_messages
import machine
import pytest
import wire
import world
from case_frames import Regression, out
from endpoint import Endpoint, Node, is_for_many, is_multicast
from episodes import Episode, Keep, TimedOut, change, episode, reference_endpoint
from harness import SIZES, Difference, Harness
from machine import Connection, Machine, Outcome, State, Stimulus
from one_cpu import on_one_cpu
from regressions import REGRESSIONS
from regressions_border import BORDER

from netpol_loader.pins.dataplane import Dataplane

pytestmark = pytest.mark.kernel

SEED = 20
EPISODES = int(os.environ.get("NETPOL_FUZZ_EPISODES", "96"))
"""Number of episodes. Each has 3000 packets."""


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """One dataplane for all tests, on one CPU, because the program's per-CPU caches are part of the comparison."""
    with on_one_cpu():
        dataplane = Dataplane.open(Path(f"/sys/fs/bpf/netpol-fuzz-test-{os.getpid()}"), sizes=SIZES)
        one = Harness(dataplane)
        yield one
        one.close()
        dataplane.remove()


@pytest.mark.parametrize("regression", [*REGRESSIONS, *BORDER], ids=lambda one: one.name)
def test_regression(harness: Harness, regression: Regression) -> None:
    """Both agree, and give the recorded reasons."""
    outcomes: list[Outcome] = []
    difference = harness.first_difference(regression.episode, outcomes)
    assert difference is None, str(difference)
    assert tuple(outcome.reason for outcome in outcomes) == regression.reasons


@pytest.mark.parametrize("eighth", range(8))
def test_mutated_packets(harness: Harness, eighth: int) -> None:
    """Verdicts, events, and counts by reason and rule agree for whole episodes.

    Each eighth of them is of another kind.
    """
    for number in range(eighth, EPISODES, 8):
        difference = harness.check(episode(SEED, number))
        if difference is not None:
            pytest.fail(f"seed {SEED} episode {number}: {harness.smallest(difference)}")


OFTEN = 15
"""Smallest number of packets for each reason in the first eight episodes; arbitrary, enough to test a rule in several
ways."""


def test_mutations_reach_every_reason() -> None:
    """Packets for every reason of the reference are frequent."""
    reasons: Counter[str] = Counter()
    for number in range(8):
        one = replace(episode(SEED, number), takes_fast_path=False)
        machine = Machine(reference_endpoint(one))
        for step in one.steps:
            if isinstance(step, Stimulus):
                outcome = machine.step(step)
                assert outcome is not None
                reasons[outcome.reason] += 1
            else:
                change(machine, step)
    assert reasons.keys() == {
        "policy-allow", "established", "related", "host", "self", "arp", "neighbour", "dhcp", "host-non-ip",
        "policy-deny", "revoked", "spoofed", "non-ip", "short", "bad-ip", "bad-l4", "ip6-headers", "no-next-header",
        "fragment", "icmp-unrelated", "link-forged", "misdelivered", "tunnel", "foreign-source",
        "tunnel-source",
    }  # fmt: skip
    assert {reason: count for reason, count in reasons.items() if count < OFTEN} == {}


Slip = tuple[object, str, object]
"""A mistake in the reference: (object, attribute, wrong value)."""


def without_options(frame: bytes, at: int, end: int, facts: wire.Facts, *, before: int = 0) -> None:
    """A mistake: a first fragment only covers the fixed TCP header."""
    wire_transport(frame, at, end, facts, before=before)
    if facts.protocol == wire.TCP:
        facts.covered = min(facts.covered, before + 20)


wire_transport = wire._transport
SLIPS: dict[str, Slip] = {
    "spoofed": (machine._Passage, "_is_spoofed", lambda _: False),
    "link-local sources": (Endpoint, "may_send", lambda self, address, _: address in self.addresses),
    "link-local sources at a bridge": (Node, "is_bridged", property(lambda _: False, lambda *_: None)),
    "an address asks for its own": (machine, "is_link_local", lambda _: False),
    "ports": (wire, "L4_BYTES", {**wire.L4_BYTES, wire.SCTP: 0}),
    "mobility": (wire, "EXTENSIONS", wire.EXTENSIONS | {wire.MOBILITY}),
    "options": (wire, "_transport", without_options),
    "fragments": (machine._Passage, "_fragments", lambda self: (self.facts.source, self.facts.destination)),
    "syn": (wire.Facts, "is_initial_syn", property(lambda _: False)),
    "errors": (wire, "ERRORS", {**wire.ERRORS, 4: frozenset({3, 4, 5, 11})}),
    "time-outs": (machine._Passage, "_is_alive", lambda *_: True),
    "time-outs of closed ones": (
        machine._Passage, "_is_alive", lambda self, connection: connection.state not in self.machine.timed_out,
    ),
    "closed ones go through": (Connection, "is_closed", property(lambda _: False)),
    "closed ones stay closed": (machine._Passage, "_revives", lambda *_: False),
    "open ones go through": (machine._Passage, "_passes_at_once", lambda *_: False),
    "revoked": (machine._Passage, "_still_allowed", lambda *_: True),
    "tails": (world, "LISTENING_PORT", 1),
    "claims of all": (Endpoint, "may_claim", lambda *_: True),
    "claims of nobody's": (Endpoint, "may_claim", lambda self, one: one in self.addresses or self.borrowed(one)),
    "on the link": (Endpoint, "is_on_link", lambda *_: True),
    "beside": (Node, "workloads_on_link", property(lambda _: frozenset(), lambda *_: None)),
    "groups": (link_messages, "is_link_group", is_multicast),
    "hop limits": (link_messages, "NOT_ROUTED", 64),
    "hop limits of listeners": (link_messages, "NEVER_ROUTED", 255),
    "listeners": (link_messages, "LISTENER", frozenset({130, 131, 132})),
    "listeners' bodies": (link_messages, "_is_bare_listener_message", lambda _: True),
    "router alerts": (link_messages, "ROUTER_ALERT", b""),
    "link options": (link_messages, "_are_own", lambda *_: True),
    "many link options": (link_messages, "MOST_OPTIONS", 4),
    "nonces": (link_messages, "NONCE", 15),
    "routers": (link_messages, "ROUTERS_ONLY", frozenset({134})),
    "redirects": (link_messages, "REDIRECT4", 6),
    "servers": (link_messages, "DHCP_SERVER", {4: (67, 68), 6: (67, 68)}),
    "arp": (link_messages, "arp", lambda *_, **__: "arp"),
    "arp with padding": (link_messages, "ARP_PADDING", 0),
    "arp of nobody": (link_messages, "UNSPECIFIED4", b"none"),
    "routes": (Endpoint, "routes", property(lambda _: False, lambda *_: None)),
    "misdelivered": (machine._Passage, "_is_misdelivered", lambda _: False),
    "delivered to the node": (Endpoint, "may_receive", lambda self, one: self.may_claim(one) or is_for_many(one)),
    "tunnels": (machine._Passage, "_is_tunnelled", lambda _: False),
    "tunnels to others": (Node, "reaches_nodes", Node.is_own),
    "ranges": (Node, "is_own", lambda self, one: one in self.own),
    "foreign": (machine._Passage, "_is_foreign", lambda _: False),
    "foreign workloads": (Node, "workloads", property(lambda _: frozenset(), lambda *_: None)),
    "sent by another": (machine._Passage, "_is_sent_by_another", lambda _: False),
    "questions to servers": (wire.Facts, "is_dhcp_request", property(lambda _: False)),
    "hairpin": (Machine, "hairpin", property(lambda _: False, lambda *_: None)),
    "link headers": (machine, "parse", lambda frame, has_link: wire.parse(frame)),  # noqa: ARG005 # called by keyword
}  # fmt: skip
NOTICED_IN = (1, 2, 3, 4, 7, 9, 10, 11, 15)


@pytest.mark.parametrize("name", SLIPS)
def test_a_wrong_reference_is_noticed(harness: Harness, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each mistake in the reference shows within a few episodes, and is made small. So the comparison can fail."""
    where, attribute, wrong = SLIPS[name]
    monkeypatch.setattr(where, attribute, wrong, raising=where is not Machine)
    found = next(
        (one for one in (harness.check(episode(SEED, number)) for number in NOTICED_IN) if one is not None), None
    )
    assert isinstance(found, Difference)
    small = harness.smallest(found, tries=60)
    assert len(small.episode.steps) <= len(found.episode.steps)
    assert str(small)


def test_steps_that_change_nothing_are_left_out(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is the shortest episode that still has the difference."""
    monkeypatch.setattr(machine._Passage, "_is_spoofed", lambda _: False)
    spoofed = REGRESSIONS[3].episode.steps[0]
    assert isinstance(spoofed, Stimulus)
    frame = spoofed.frame[:26] + bytes([192, 0, 2, 1]) + spoofed.frame[30:]
    noise = [step for step in episode(SEED, 1).steps if not isinstance(step, Stimulus)][:5]
    steps = (*noise, Keep(on=True), TimedOut(frozenset({State.UDP})), out(frame))
    found = harness.check(Episode(steps))
    assert found is not None
    small = harness.smallest(found)
    assert len(small.episode.steps) == 1
    assert "'spoofed': 1" in str(small)
