# SPDX-License-Identifier: Apache-2.0
"""The loaded program beside the reference: one fixed small world, episodes of frames through both, differences found.

An episode is a list of steps from an empty connection table: frames, and changes of policy, time-outs and settings.  It is
first run in bulk; every verdict, every event, every reason's and every rule's count must be what the reference says.  If
something differs it is run again frame by frame, to find the first one that differs, and the episode is made as short as
it can be.  Invariant: the same seed and number give the same episode.  Time plays no part: time-outs are either endless or
over at once, and the short way's second is either endless or over at once.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Union

import wire as w
from generate import BORROWED, FOE, FRIEND, NEAR, POD, Generator
from machine import RULED, Endpoint, Machine, Outcome, Policy, Question, State, Stimulus, Way
from rig import ALLOW, DENY, ELSEWHERE, ENDPOINT, LO, POD_IDENTITY, PolicySet, Rig, Verdict

from netpol_loader import abi, syscall
from netpol_loader.dataplane import Dataplane, following
from netpol_loader.hook import Hook

SIZES = {
    "np_endpoint": 16, "np_addr4": 64, "np_addr6": 64, "np_cidr4": 64, "np_cidr6": 64, "np_peer_class": 256,
    "np_l4_col": 256, "np_verdict": 1024, "np_rule": 16, "np_rule_count": 512, "np_conn4": 65536, "np_conn6": 65536,
    "np_frag4": 65536, "np_frag6": 65536, "np_log_limit": 16,
    "np_event": 1 << 20,
}  # fmt: skip
"""Tables with room for far more than an episode, so that nothing is evicted and no event lost."""

EPISODE = 3000
ENDLESS, OVER = 1 << 62, (1 << 64) - 1
"""Jiffies; the second is a negative time-out to the program."""
IDENTITIES = {"friend": 101, "foe": 102, "near": 103}
PEERS, L4S, SOURCES = 4, 7, 2
"""Classes of the world's policy: the rest, friend, foe, near; the rest and six below; source port 7777 or not."""
L4_CLASSES: dict[tuple[int, int], int] = {
    (w.TCP, 80): 1, (w.TCP, 443): 1, (w.UDP, 53): 2, (w.UDP, 5000): 2, (w.SCTP, 9): 4,
}  # fmt: skip
ICMP_CLASSES = {(w.ICMP, 8, 0): 3, (w.ICMP, 3, 4): 6, (w.ICMPV6, 128, 0): 3, (w.ICMPV6, 2, 0): 6}
OTHER_CLASSES = {47: 5}
SOURCE_PORT = 7777

TARGETS = {False: Hook.TC_INGRESS, True: Hook.TC_EGRESS}
ENTERED = {"elsewhere": ELSEWHERE, "host": 0, "self": LO}


# --- the world --------------------------------------------------------------------------------------------------------


def allows(variant: int, way: Way, peer: int, l4: int, source: int) -> bool:
    """The policy of a variant; 2 denies everything. An arbitrary pattern with much of both."""
    if variant == 2 or source:
        return False
    if peer == 1:
        return l4 != 2 or way is Way.EGRESS or variant == 1
    return (peer * 3 + l4 * 5 + way.value + variant * 2) % 4 == 0


def set_number(variant: int, way: Way) -> int:
    """The number of the policy set of a variant and direction."""
    return 1 + variant * 2 + way.value


def policy(variant: int) -> Policy:
    """The variant as the reference asks it."""

    def decide(question: Question) -> tuple[bool, int]:
        version = 4 if len(question.peer) == 4 else 6
        peer = 0
        if question.peer == FRIEND[version]:
            peer = 1
        elif question.peer == FOE[version]:
            peer = 2
        elif question.peer.startswith(NEAR[version][: 3 if version == 4 else 6]):
            peer = 3
        protocol = question.protocol
        if protocol in (w.ICMP, w.ICMPV6):
            l4 = ICMP_CLASSES.get((protocol, *question.icmp), 0)
        elif protocol in w.L4_BYTES:
            l4 = L4_CLASSES.get((protocol, question.destination_port), 0)
        else:
            l4 = OTHER_CLASSES.get(protocol, 0)
        source = int(protocol in w.L4_BYTES and question.source_port == SOURCE_PORT)
        index = (peer * L4S + l4) * SOURCES + source
        return allows(variant, question.way, peer, l4, source), set_number(variant, question.way) * 64 + index

    return decide


def may_borrow(address: bytes) -> bool:
    """Whether an address is in 10.20.0.0/16 or fd20::/32."""
    version, size = (4, 2) if len(address) == 4 else (6, 4)
    return address[:size] == BORROWED[version][:size]


@dataclass(frozen=True)
class Policies:
    """A step: this variant is in force from here on."""

    variant: int


@dataclass(frozen=True)
class TimedOut:
    """A step: connections in these states are dead from here on, all others alive."""

    states: frozenset[State]


@dataclass(frozen=True)
class Keep:
    """A step: whether connections that policy no longer allows live on."""

    on: bool


Step = Union[Stimulus, Policies, TimedOut, Keep]


@dataclass(frozen=True)
class Episode:
    """Steps from an empty table under the first variant. ``short_way``: its second never ends, else it is over."""

    steps: tuple[Step, ...]
    is_host: bool = False
    short_way: bool = False


def episode(seed: int, number: int, size: int = EPISODE) -> Episode:
    """The episode of that number: of 8, one meets nothing but denial, two take the short way, one is at a host."""
    chance = random.Random(f"{seed}/{number}/steps").random
    generator = Generator(f"{seed}/{number}")
    flavour = number % 8
    steps: list[Step] = [Policies(2 if flavour == 0 else 0)]
    for _ in range(size):
        if flavour and chance() < 0.01:
            kind = chance()
            if kind < 0.5:
                steps.append(Policies(int(chance() * 2)))
            elif kind < 0.85:
                steps.append(TimedOut(frozenset(state for state in State if chance() < 0.2)))
            else:
                steps.append(Keep(chance() < 0.5))
        steps.append(generator.stimulus())
    return Episode(tuple(steps), is_host=flavour == 7, short_way=flavour in (5, 6))


def reference_endpoint(episode: Episode) -> Endpoint:
    """The endpoint under test, as the reference knows it."""
    return Endpoint(frozenset(POD.values()), policy(2), episode.is_host, may_borrow)


# --- both sides -------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the program did with a run of frames: verdicts and events in order, counts by reason and by rule."""

    verdicts: list[bool]
    events: list[tuple[object, ...]]
    reasons: Counter[str]
    rules: Counter[int]


def expected(outcomes: Sequence[Outcome]) -> Seen:
    """The same of the reference. Established packets are counted by rule alone."""
    return Seen(
        [outcome.passed for outcome in outcomes],
        [outcome.event for outcome in outcomes if outcome.event is not None],
        Counter(outcome.reason for outcome in outcomes if outcome.reason != "established"),
        Counter(outcome.rule for outcome in outcomes if outcome.rule is not None),
    )


@dataclass
class Difference:
    """The first frame of an episode that the two see differently."""

    episode: Episode
    reference: Seen
    program: Seen

    def __str__(self) -> str:
        head = f"{'host' if self.episode.is_host else 'workload'} interface"
        head += ", short way" if self.episode.short_way else ""
        lines = [f"the program and the reference differ about the last frame of ({head}):"]
        for step in self.episode.steps:
            if isinstance(step, Stimulus):
                where = f"towards the workload, entered: {step.entered}" if step.out_of_host else "from the workload"
                lines.append(f"  {step.frame.hex()}  {where}")
            else:
                lines.append(f"  {step}")
        for name, seen in (("reference", self.reference), ("program", self.program)):
            lines.append(
                f"  {name}: {'pass' if seen.verdicts == [True] else 'drop'} "
                f"reasons {dict(seen.reasons)} rules {dict(seen.rules)} {seen.events}"
            )
        return "\n".join(lines)


class Harness:
    """A dataplane of its own with the world written into it."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.rig = Rig(dataplane)
        self.rig.reset()
        self.dataplane = dataplane
        self._run = TestRuns(dataplane)
        self._config = dataplane.config()
        self._is_host = False
        self.packets, self.reasons = 0, Counter[str]()
        """Of all episodes that were checked."""
        self._words = {
            name: self.rig.map(name).cell_bytes // 8 * self.rig.map(name).max_entries
            for name in ("np_reason_count", "np_rule_count")
        }
        self._write_world()
        self._counts_before = self._counts()

    def close(self) -> None:
        """Stop reading events."""
        self.rig.reader.close()

    def _write_world(self) -> None:
        rig = self.rig
        for version in (4, 6):
            rig.address(_text(POD[version]), POD_IDENTITY, ENDPOINT)
            rig.address(_text(FRIEND[version]), IDENTITIES["friend"])
            rig.address(_text(FOE[version]), IDENTITIES["foe"])
        rig.cidr("198.51.100.0/24", IDENTITIES["near"])
        rig.cidr("2001:db8:1::/48", IDENTITIES["near"])
        rig.source("10.20.0.0/16")
        rig.source("fd20::/32")
        slots = {
            w.TCP: abi.NP_SLOT_TCP, w.UDP: abi.NP_SLOT_UDP, w.SCTP: abi.NP_SLOT_SCTP, w.ICMP: abi.NP_SLOT_ICMP,
            w.ICMPV6: abi.NP_SLOT_ICMPV6,
        }  # fmt: skip
        places = [(slots[protocol] * 256 + (port >> 8), port & 255, l4) for (protocol, port), l4 in L4_CLASSES.items()]
        places += [(slots[protocol] * 256 + kind, code, l4) for (protocol, kind, code), l4 in ICMP_CLASSES.items()]
        places += [(abi.NP_OTHER_BLOCK, protocol, l4) for protocol, l4 in OTHER_CLASSES.items()]
        for block, index, l4 in places:
            rig.atom(block, index, l4)  # atoms are numbered as the classes
        rig.atom(abi.NP_SLOT_SOURCE * 256 + (SOURCE_PORT >> 8), SOURCE_PORT & 255, 1)
        for variant in range(3):
            for way in Way:
                number = set_number(variant, way)
                rig.policy(self._set(variant, way))
                for peer, identity in enumerate(IDENTITIES.values(), 1):
                    rig.peer_class(number, identity, peer)
                for l4 in range(1, L4S):
                    rig.l4_class(number, l4, l4)
                rig.l4_class(number, 1, 1, source=True)

    @staticmethod
    def _set(variant: int, way: Way) -> PolicySet:
        number = set_number(variant, way)
        verdicts = [
            Verdict(ALLOW if allows(variant, way, peer, l4, source) else DENY,
                    number * 64 + (peer * L4S + l4) * SOURCES + source)
            for peer in range(PEERS) for l4 in range(L4S) for source in range(SOURCES)
        ]  # fmt: skip
        return PolicySet(number, verdicts, peer_classes=PEERS, l4_classes=L4S, source_classes=SOURCES)

    # --- settings

    def _empty(self, episode: Episode) -> None:
        for name in ("np_conn4", "np_conn6", "np_young4", "np_young6", "np_frag4", "np_frag6"):
            one = self.rig.map(name)
            one.delete_many([key for key, _ in one.items()])
        config = self._config
        config.flags = abi.NP_CONFIG_ALLOW_EVENTS
        config.jiffies_per_second = 0xFFFF_FFFF if episode.short_way else 0
        for state in range(abi.NP_CONN_STATES):
            config.timeout_jiffies[state] = ENDLESS
        self._is_host = episode.is_host

    def _apply(self, step: Policies | TimedOut | Keep, machine: Machine) -> None:
        config = self._config
        if isinstance(step, Policies):
            flags = abi.NP_ENDPOINT_SOURCES | (abi.NP_ENDPOINT_HOST if self._is_host else 0)
            self.rig.endpoint(self._set(step.variant, Way.INGRESS), self._set(step.variant, Way.EGRESS), flags=flags)
            config.generation, config.epoch = following(config.generation), following(config.epoch)
            machine.endpoint.policy = policy(step.variant)
            machine.renew()
        elif isinstance(step, TimedOut):
            for state in State:
                config.timeout_jiffies[state.value] = OVER if state in step.states else ENDLESS
            machine.timed_out = step.states
        else:
            flag = abi.NP_CONFIG_KEEP_REVOKED
            config.flags = config.flags | flag if step.on else config.flags & ~flag
            machine.keep_revoked = step.on
        self.dataplane.set_config(config)

    # --- running

    def check(self, episode: Episode) -> Difference | None:
        """Run an episode in bulk; when something differs, find the first frame that does."""
        reference, program = self._in_bulk(self._start(episode), episode.steps)
        self.packets += len(reference)
        self.reasons.update(outcome.reason for outcome in reference)
        if expected(reference) == program:
            return None
        difference = self.first_difference(episode)
        if difference is None:
            raise AssertionError("an episode went wrong once and not when it was run again")
        return difference

    def _in_bulk(self, machine: Machine, steps: Sequence[Step]) -> tuple[list[Outcome], Seen]:
        outcomes: list[Outcome] = []
        verdicts: list[bool] = []
        for step in steps:
            if not isinstance(step, Stimulus):
                self._apply(step, machine)
                continue
            outcome = machine.step(step)
            if outcome is not None:
                outcomes.append(outcome)
                verdicts.append(self._run(step))
        return outcomes, self._seen(verdicts)

    def first_difference(self, episode: Episode, outcomes: list[Outcome] | None = None) -> Difference | None:
        """Run an episode frame by frame up to the first difference; ``outcomes`` gets the reference's."""
        machine = self._start(episode)
        for index, step in enumerate(episode.steps):
            reference, program = self._in_bulk(machine, [step])
            if outcomes is not None:
                outcomes += reference
            if expected(reference) != program:
                shorter = Episode(episode.steps[: index + 1], episode.is_host, episode.short_way)
                return Difference(shorter, expected(reference), program)
        return None

    def _start(self, episode: Episode) -> Machine:
        self._empty(episode)
        machine = Machine(reference_endpoint(episode))
        machine.shortened = {} if episode.short_way else None
        self._apply(Policies(0), machine)
        return machine

    def _seen(self, verdicts: list[bool]) -> Seen:
        self.rig.events.clear()
        self.rig.reader.consume()
        before, self._counts_before = self._counts_before, self._counts()
        return Seen(
            verdicts,
            [told(event) for event in self.rig.events],
            Counter({abi.REASONS[n].slug: c for n, c in (self._counts_before[0] - before[0]).items()}),
            self._counts_before[1] - before[1],
        )

    def _counts(self) -> tuple[Counter[int], Counter[int]]:
        return self._count("np_reason_count"), self._count("np_rule_count")

    def _count(self, name: str) -> Counter[int]:
        """Packets by row, of all CPUs; only rows that have any."""
        words = struct.unpack(f"={self._words[name]}Q", b"".join(value for _, value in self.rig.map(name).items()))
        cells = len(words) // self.rig.map(name).max_entries
        sums = [sum(words[at : at + cells : 2]) for at in range(0, len(words), cells)]
        return Counter({row: packets for row, packets in enumerate(sums) if packets})

    # --- making it small

    def smallest(self, found: Difference, tries: int = 1500) -> Difference:
        """Leave out steps, then bytes, as long as the last frame is still seen differently, in at most so many runs."""
        best = found
        chunk = max(len(best.episode.steps) // 2, 1)
        while chunk and tries > 0:
            start = 0
            while start < len(best.episode.steps) - 1 and tries > 0:
                steps = best.episode.steps
                stop = min(start + chunk, len(steps) - 1)
                tries -= 1
                smaller = self._still(best.episode, steps[:start] + steps[stop:])
                if smaller is not None:
                    best = smaller
                else:
                    start += chunk
            chunk //= 2
        for index in range(len(best.episode.steps)):
            best, tries = self._smaller_frame(best, index, tries)
        return best

    def _smaller_frame(self, best: Difference, index: int, tries: int) -> tuple[Difference, int]:
        if index >= len(best.episode.steps) or not isinstance(best.episode.steps[index], Stimulus):
            return best, tries
        size = len(best.episode.steps[index].frame)  # type: ignore[union-attr]  # looked at just above
        for candidate in [("cut", n) for n in (32, 8, 4, 1) * 3] + [("zero", n) for n in range(size)]:
            if tries <= 0 or index >= len(best.episode.steps):
                break
            step = best.episode.steps[index]
            assert isinstance(step, Stimulus)
            kind, number = candidate
            frame = step.frame[:-number] if kind == "cut" else _zeroed(step.frame, number)
            if frame == step.frame or len(frame) < 54:
                continue
            tries -= 1
            steps = list(best.episode.steps)
            steps[index] = Stimulus(step.out_of_host, step.entered, frame)
            best = self._still(best.episode, tuple(steps)) or best
        return best, tries

    def _still(self, episode: Episode, steps: tuple[Step, ...]) -> Difference | None:
        """Whether the last frame of these steps is the first that differs."""
        shorter = Episode(steps, episode.is_host, episode.short_way)
        machine = self._start(shorter)
        outcomes, seen = self._in_bulk(machine, steps[:-1])
        if expected(outcomes) != seen:
            return None
        reference, program = self._in_bulk(machine, steps[-1:])
        return Difference(shorter, expected(reference), program) if expected(reference) != program else None


def told(event: abi.np_event) -> tuple[object, ...]:
    """An event as the reference has it: of frames that were not understood only why and how long."""
    reason = abi.REASONS[event.reason].slug
    if reason in UNPARSED:
        return reason, event.frame_bytes
    rule = event.rule if reason in RULED else 0
    version = event.ip_version
    size = 4 if version == 4 else 16
    if event.protocol == (w.ICMP if version == 4 else w.ICMPV6) and event.icmp_type in w.ERRORS[version]:
        return reason, rule, event.frame_bytes
    source, destination = bytes(event.source), bytes(event.destination)
    if any(source[size:]) or any(destination[size:]):
        return reason, "bytes after an IPv4 address", source, destination
    return (
        reason, rule, event.frame_bytes, Way(event.direction), version, event.protocol,
        (source[:size], event.source_port), (destination[:size], event.destination_port), event.icmp_type,
        event.icmp_code,
    )  # fmt: skip


UNPARSED = frozenset({"short", "bad-ip", "bad-l4", "non-ip", "ip6-headers", "no-next-header"})


def _zeroed(frame: bytes, index: int) -> bytes:
    return frame[:index] + b"\0" + frame[index + 1 :]


def _text(packed: bytes) -> str:
    return str(ip_address(packed))


class TestRuns:
    """BPF_PROG_TEST_RUN with everything but the frame prepared, for many frames."""

    __test__ = False

    def __init__(self, dataplane: Dataplane) -> None:
        self._call = syscall._libc().syscall
        self._number = syscall._syscall_number()
        self._data = ctypes.create_string_buffer(4096)
        self._contexts = []
        self._attrs = {}
        for out_of_host, hook in TARGETS.items():
            for name, ingress in ENTERED.items():
                context = ctypes.create_string_buffer(192)
                struct.pack_into("=II", context, 36, ingress if out_of_host else 0, LO)
                attr = syscall._TestRunAttr(
                    prog_fd=dataplane.program_fd(hook), data_in=ctypes.addressof(self._data), repeat=1,
                    ctx_size_in=len(context), ctx_in=ctypes.addressof(context),
                )  # fmt: skip
                self._contexts.append(context)
                self._attrs[out_of_host, name] = attr

    def __call__(self, stimulus: Stimulus) -> bool:
        """Whether the frame passed."""
        frame = stimulus.frame
        attr = self._attrs[stimulus.out_of_host, stimulus.entered]
        ctypes.memmove(self._data, frame, len(frame))
        attr.data_size_in = len(frame)
        attr.data_size_out = attr.ctx_size_out = 0  # where the kernel wrote how much it had for us
        if self._call(self._number, syscall.PROG_TEST_RUN, ctypes.byref(attr), ctypes.sizeof(attr)):
            raise OSError(ctypes.get_errno(), f"cannot run a program on {frame.hex()}")
        assert attr.retval in (2, 0xFFFF_FFFF), attr.retval
        return bool(attr.retval != 2)
