# SPDX-License-Identifier: Apache-2.0
"""The loaded program and the reference agree about mutated packets and about sequences of them.

`python -m tests.fuzz` goes on for as long as it is told; this is a part of it with a fixed seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SIZES, Difference, Episode, Harness, Keep, Policies, TimedOut, episode, policy, reference_endpoint
from machine import Machine, Outcome, State, Stimulus
from one_cpu import on_one_cpu
from regressions import REGRESSIONS, Regression, out

from netpol_loader.dataplane import Dataplane

pytestmark = pytest.mark.kernel

SEED = 20
EPISODES = int(os.environ.get("NETPOL_FUZZ_EPISODES", "96"))
"""Of 3000 packets each."""


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """One dataplane for all; on one CPU, since what the program remembers per CPU is part of it."""
    with on_one_cpu():
        dataplane = Dataplane.open(Path(f"/sys/fs/bpf/netpol-fuzz-test-{os.getpid()}"), sizes=SIZES)
        one = Harness(dataplane)
        yield one
        one.close()
        dataplane.remove()


@pytest.mark.parametrize("regression", REGRESSIONS, ids=lambda one: one.name)
def test_regression(harness: Harness, regression: Regression) -> None:
    """Both answer alike, and as written down."""
    outcomes: list[Outcome] = []
    difference = harness.first_difference(regression.episode(), outcomes)
    assert difference is None, str(difference)
    assert tuple(outcome.reason for outcome in outcomes) == regression.reasons


@pytest.mark.parametrize("eighth", range(8))
def test_mutated_packets(harness: Harness, eighth: int) -> None:
    """Verdicts, events, and counts by reason and rule of whole episodes; each eighth is another kind of them."""
    for number in range(eighth, EPISODES, 8):
        difference = harness.check(episode(SEED, number))
        if difference is not None:
            pytest.fail(f"seed {SEED} episode {number}: {harness.smallest(difference)}")


def test_mutations_reach_every_reason() -> None:
    """The packets of the first episodes are of every kind that the reference tells apart."""
    reasons: set[str] = set()
    for number in (2, 7):
        one = episode(SEED, number)
        machine = Machine(reference_endpoint(one))
        for step in one.steps:
            if isinstance(step, Stimulus):
                outcome = machine.step(step)
                assert outcome is not None
                reasons.add(outcome.reason)
            elif isinstance(step, Policies):
                machine.endpoint.policy = policy(step.variant)
                machine.renew()
    assert reasons == {
        "policy-allow", "established", "related", "host", "self", "arp", "neighbour", "dhcp", "host-non-ip",
        "policy-deny", "revoked", "spoofed", "non-ip", "short", "bad-ip", "bad-l4", "ip6-headers", "no-next-header",
        "fragment", "icmp-unrelated",
    }  # fmt: skip


@pytest.mark.parametrize("broken", ["spoofed", "ports", "fragments", "syn", "errors", "time-outs", "revoked"])
def test_a_wrong_reference_is_noticed(harness: Harness, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Each slip that is put into the reference shows within an episode, made small: the comparison can fail."""
    import machine
    import wire

    if broken == "spoofed":
        monkeypatch.setattr(machine._Passage, "_is_spoofed", lambda _: False)
    elif broken == "ports":
        monkeypatch.setitem(wire.L4_BYTES, wire.SCTP, 0)
    elif broken == "fragments":
        monkeypatch.setattr(machine._Passage, "_fragments", lambda self: (self.facts.source, self.facts.destination))
    elif broken == "syn":
        monkeypatch.setattr(wire.Facts, "is_initial_syn", property(lambda _: False))
    elif broken == "errors":
        monkeypatch.setitem(wire.ERRORS, 4, frozenset({3, 4, 5, 11}))
    elif broken == "time-outs":
        monkeypatch.setattr(machine._Passage, "_is_alive", lambda *_: True)
    else:
        monkeypatch.setattr(machine._Passage, "_still_allowed", lambda *_: True)
    found = next((one for one in (harness.check(episode(SEED, number)) for number in (1, 2)) if one is not None), None)
    assert isinstance(found, Difference)
    small = harness.smallest(found, tries=60)
    assert len(small.episode.steps) <= len(found.episode.steps)
    assert str(small)


def test_steps_that_change_nothing_are_left_out(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is the shortest episode that still shows the difference."""
    import machine

    monkeypatch.setattr(machine._Passage, "_is_spoofed", lambda _: False)
    spoofed = REGRESSIONS[3].episode().steps[0]
    assert isinstance(spoofed, Stimulus)
    frame = spoofed.frame[:26] + bytes([192, 0, 2, 1]) + spoofed.frame[30:]
    noise = [step for step in episode(SEED, 1).steps if not isinstance(step, Stimulus)][:5]
    steps = (*noise, Keep(on=True), TimedOut(frozenset({State.UDP})), out(frame))
    found = harness.check(Episode(steps))
    assert found is not None
    small = harness.smallest(found)
    assert len(small.episode.steps) == 1
    assert "'spoofed': 1" in str(small)
