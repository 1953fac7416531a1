# SPDX-License-Identifier: Apache-2.0
"""Compares the loaded program with the reference, by episodes of frames in one fixed small world.

An episode is a list of steps from an empty connection table. It first runs in bulk. Every verdict, every event, the
counts of every reason and rule, and every remaining connection must be as in the reference. If one differs, the episode
runs again frame by frame to find the first difference, and is then made as short as possible. Invariant: no result
depends on time. Time-outs are either endless or over at once, and so is the second for which the flow cache keeps an
entry.

A test run (BPF_PROG_TEST_RUN) cannot set everything, so some packets are not tested here.

- The kernel reads a packet's protocol where an Ethernet header has its type, even if the interface has no link headers.
  So a packet that begins with its network header needs a source address that contains the EtherType: see world.py.
- No packet can have a checksum that a device must still write (CHECKSUM_PARTIAL). tests/netns tests those with real
  packets.
- The program asks the kernel for routes and sockets, and those of the machine are not known. So frames run in an empty
  network namespace: no route leads to any address, and one socket listens.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Any

import episodes
import wire as w
import world
from endpoint import Way
from episodes import Episode, Hairpin, Keep, Moves, Policies, Routes, Step, TimedOut
from machine import RULED, Key, Machine, Outcome, State, Stimulus
from own_netns import OwnNamespace
from rig import ALLOW, CONNECTIONS, DENY, ELSEWHERE, ENDPOINT, LO, POD_IDENTITY, PolicySet, Rig, Verdict

from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import Dataplane, following
from netpol_loader.tables.seal import seal_endpoint

SIZES = {
    "np_endpoint": 16, "np_addr4": 64, "np_addr6": 64, "np_cidr4": 64, "np_cidr6": 64, "np_peer_class": 256,
    "np_l4_col": 256, "np_verdict": 1024, "np_rule": 16, "np_rule_count": 512, "np_conn4": 16384, "np_conn6": 16384,
    "np_frag4": 65536, "np_frag6": 65536, "np_log_limit": 16,
    "np_event": 1 << 20,
}  # fmt: skip
"""Sizes of the tables, larger than any episode needs, so that nothing is evicted and no event is lost."""

ENDLESS, OVER = 1 << 62, (1 << 64) - 1
"""Time-outs in jiffies. The program reads the second one as negative."""
IDENTITIES = {"friend": 101, "foe": 102, "near": 103}
WORKLOAD_IDENTITY = 104
"""The identity of all workloads except the one under test. No policy set has a class for it."""
SIBLING_ENDPOINT, OTHER_ENDPOINT, GONE_ENDPOINT = 8, 9, 10
SIBLING_INTERFACE, OTHER_INTERFACE, BRIDGE = 9998, 9999, 9000
"""Interface indices. None of these interfaces needs to exist."""

TARGETS = {False: Hook.TC_INGRESS, True: Hook.TC_EGRESS}
ENTERED = {"elsewhere": ELSEWHERE, "host": 0, "self": LO}


# --- both sides -------------------------------------------------------------------------------------------------------


Connections = dict[object, tuple[object, ...]]
"""(whether it is unreplied, its key) -> the fields of a connection."""


@dataclass
class Seen:
    """The program's behaviour for a run of frames: verdicts and events in order, counts by reason and by rule."""

    verdicts: list[bool]
    events: list[tuple[object, ...]]
    reasons: Counter[str]
    rules: Counter[int]
    connections: Connections | None = None
    """The remaining connections; None: they were not read."""


def expected(outcomes: Sequence[Outcome], machine: Machine | None = None) -> Seen:
    """The behaviour of the reference.

    Packets of established connections are counted only by rule. ``machine``: also include its connections.
    """
    return Seen(
        [outcome.passed for outcome in outcomes],
        [outcome.event for outcome in outcomes if outcome.event is not None],
        Counter(outcome.reason for outcome in outcomes if outcome.reason != "established"),
        Counter(outcome.rule for outcome in outcomes if outcome.rule is not None),
        None if machine is None else standing(machine),
    )


def standing(machine: Machine) -> Connections:
    """The connections of the reference."""
    return {
        (is_unreplied, key): (
            one.rule, one.way, one.state, one.fin, one.exempt, one.icmp, one.generation == machine.generation,
        )
        for is_unreplied, table in ((False, machine.connections), (True, machine.unreplied))
        for key, one in table.items()
    }  # fmt: skip


def told_connection(
    key: bytes, row: abi.np_conn, *, is_unreplied: bool, generation: int
) -> tuple[object, tuple[object, ...]]:
    """A row of the program's connection table in the form of the reference."""
    version: Any = abi.np_conn4_key if len(key) == ctypes.sizeof(abi.np_conn4_key) else abi.np_conn6_key
    names = version.from_buffer_copy(key)
    tuple_: Key = bytes(names.local), bytes(names.remote), names.protocol, names.local_port, names.remote_port
    fin = {
        reply for flag, reply in ((abi.NP_CONN_FIN_ORIGINAL, False), (abi.NP_CONN_FIN_REPLY, True)) if row.flags & flag
    }
    return (is_unreplied, tuple_), (
        row.rule, Way(row.direction), State(row.state), fin, bool(row.flags & abi.NP_CONN_EXEMPT),
        (row.icmp_type, row.icmp_code), row.generation == generation,
    )  # fmt: skip


@dataclass
class Difference:
    """The first frame of an episode at which program and reference differ."""

    episode: Episode
    reference: Seen
    program: Seen

    def __str__(self) -> str:
        lines = [f"the program and the reference differ about the last frame of ({self.episode.scene}):"]
        for step in self.episode.steps:
            if isinstance(step, Stimulus):
                where = f"out of the host, entered: {step.entered}" if step.out_of_host else "into the host"
                lines.append(f"  {step.frame.hex()}  {where}")
            else:
                lines.append(f"  {step}")
        for name, seen in (("reference", self.reference), ("program", self.program)):
            lines.append(
                f"  {name}: {'pass' if seen.verdicts == [True] else 'drop'} "
                f"reasons {dict(seen.reasons)} rules {dict(seen.rules)} {seen.events}"
            )
        reference, program = self.reference.connections or {}, self.program.connections or {}
        lines += [
            f"  connection {key}: reference {reference.get(key)} program {program.get(key)}"
            for key in reference.keys() | program.keys()
            if reference.get(key) != program.get(key)
        ]
        return "\n".join(lines)


class Harness:
    """A dataplane with the world in its maps."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.rig = Rig(dataplane)
        self.rig.reset()
        self.dataplane = dataplane
        self._run = TestRuns(dataplane)
        self._node = OwnNamespace()
        with self._node:
            self._server = socket.create_server(
                ("::", world.LISTENING_PORT), family=socket.AF_INET6, dualstack_ipv6=True
            )
        self._config = dataplane.config()
        self._episode = Episode(())
        self._routes = False
        self.packets, self.reasons = 0, Counter[str]()
        """Totals of all checked episodes."""
        self._words = {
            name: self.rig.map(name).cell_bytes // 8 * self.rig.map(name).max_entries
            for name in ("np_reason_count", "np_rule_count")
        }
        self._write_world()
        self._counts_before = self._counts()

    def close(self) -> None:
        """Stop reading events, and release the namespace."""
        self.rig.reader.close()
        self._server.close()
        self._node.close()

    def _write_world(self) -> None:
        rig = self.rig
        for address in world.OWN:
            rig.address(_text(address), POD_IDENTITY, ENDPOINT)
        for address in world.SIBLINGS:
            rig.address(_text(address), WORKLOAD_IDENTITY, SIBLING_ENDPOINT)
        for address in world.both(world.OTHER):
            rig.address(_text(address), WORKLOAD_IDENTITY, OTHER_ENDPOINT)
        for address in world.both(world.GONE) | {world.GONE_LINK}:
            rig.address(_text(address), WORKLOAD_IDENTITY, GONE_ENDPOINT)
        self._place(SIBLING_ENDPOINT, SIBLING_INTERFACE, link=BRIDGE)
        self._place(OTHER_ENDPOINT, OTHER_INTERFACE, link=OTHER_INTERFACE)
        for version in (4, 6):
            rig.address(_text(world.FRIEND[version]), IDENTITIES["friend"])
            rig.address(_text(world.FOE[version]), IDENTITIES["foe"], abi.NP_NODE_FIRST)
            rig.cidr(_prefix(world.NEAR[version], world.NEAR_BYTES[version]), IDENTITIES["near"])
            world_identity = abi.NP_IDENTITY_WORLD_V4 if version == 4 else abi.NP_IDENTITY_WORLD_V6
            rig.address(_text(world.BORROWED[version]), world_identity, abi.NP_NODE_FIRST)
            rig.source(_prefix(world.BORROWED[version], world.BORROWED_BYTES[version]))
            key = struct.pack("=I", world.RANGE_BYTES[version] * 8) + world.NODE_RANGE[version]
            rig.map(f"np_local{version}_net").put(key, bytes(abi.np_local(flags=abi.NP_LOCAL_OWN)))
        for is_bridged, interface in ((False, LO), (True, BRIDGE)):
            rig.local(*map(_text, world.around(is_bridged=is_bridged).own_on_link), ifindex=interface)
        rig.local(_text(world.BROADCAST), flags=abi.NP_LOCAL_MANY)
        for address in world.both(world.OTHER_NODE):
            rig.local(_text(address), flags=abi.NP_LOCAL_NODE)
        for protocol, port in world.TUNNELS:
            rig.map("np_tunnel").put(struct.pack("=HBx", port, protocol), struct.pack("=I", 1))
        slots = {
            w.TCP: abi.NP_SLOT_TCP, w.UDP: abi.NP_SLOT_UDP, w.SCTP: abi.NP_SLOT_SCTP, w.ICMP: abi.NP_SLOT_ICMP,
            w.ICMPV6: abi.NP_SLOT_ICMPV6,
        }  # fmt: skip
        places = [
            (slots[protocol] * 256 + (port >> 8), port & 255, l4)
            for (protocol, port), l4 in episodes.L4_CLASSES.items()
        ]
        places += [
            (slots[protocol] * 256 + kind, code, l4) for (protocol, kind, code), l4 in episodes.ICMP_CLASSES.items()
        ]
        places += [(abi.NP_OTHER_BLOCK, protocol, l4) for protocol, l4 in episodes.OTHER_CLASSES.items()]
        for block, index, l4 in places:
            rig.atom(block, index, l4)  # atoms have the numbers of their classes
        rig.atom(abi.NP_SLOT_SOURCE * 256 + (episodes.SOURCE_PORT >> 8), episodes.SOURCE_PORT & 255, 1)
        for variant in range(3):
            for way in Way:
                number = episodes.set_number(variant, way)
                rig.policy(self._set(variant, way))
                for peer, identity in enumerate(IDENTITIES.values(), 1):
                    rig.peer_class(number, identity, peer)
                for l4 in range(1, episodes.L4S):
                    rig.l4_class(number, l4, l4)
                rig.l4_class(number, 1, 1, source=True)

    def _place(self, number: int, interface: int, *, link: int) -> None:
        """Write the row of another workload. The program reads only the row's number and link."""
        key = struct.pack("=I", interface)
        row = seal_endpoint(abi.np_endpoint(number=number, ifindex=interface, link=link))
        self.rig.map("np_endpoint").put(key, bytes(row))
        self.rig.map("np_ifindex").put(struct.pack("=I", number), key)

    @staticmethod
    def _set(variant: int, way: Way) -> PolicySet:
        number = episodes.set_number(variant, way)
        verdicts = [
            Verdict(ALLOW if episodes.allows(variant, way, peer, l4, source) else DENY,
                    number * 64 + (peer * episodes.L4S + l4) * episodes.SOURCES + source)
            for peer in range(episodes.PEERS) for l4 in range(episodes.L4S) for source in range(episodes.SOURCES)
        ]  # fmt: skip
        return PolicySet(
            number, verdicts, peer_classes=episodes.PEERS, l4_classes=episodes.L4S, source_classes=episodes.SOURCES
        )

    # --- settings

    def _empty(self, episode: Episode) -> None:
        for name in CONNECTIONS:
            one = self.rig.map(name)
            one.delete_many([key for key, _ in one.items()])
        if episode.is_host:
            self.rig.map("np_ifindex").delete(struct.pack("=I", ENDPOINT))
        config = self._config
        config.flags = abi.NP_CONFIG_ALLOW_EVENTS | abi.NP_CONFIG_LOCAL_NETS
        config.jiffies_per_second = 0xFFFF_FFFF if episode.takes_fast_path else 0
        for state in range(abi.NP_CONN_STATES):
            config.timeout_jiffies[state] = ENDLESS
        self._episode, self._routes, self._variant = episode, False, 0
        self._move(here=False)

    def _move(self, *, here: bool) -> None:
        for address in world.MOVING:
            identity, number = (POD_IDENTITY, ENDPOINT) if here else (WORKLOAD_IDENTITY, SIBLING_ENDPOINT)
            self.rig.address(_text(address), identity, number)

    def _write_endpoint(self) -> None:
        one = self._episode
        flags = abi.NP_ENDPOINT_SOURCES
        flags |= abi.NP_ENDPOINT_HOST if one.is_host else 0
        flags |= abi.NP_ENDPOINT_OUTSIDE if one.is_outside else 0
        flags |= abi.NP_ENDPOINT_EXTERNAL if one.is_external else 0
        flags |= 0 if one.has_link else abi.NP_ENDPOINT_LAYER3
        flags |= abi.NP_ENDPOINT_ROUTES if self._routes else 0
        ingress, egress = self._set(self._variant, Way.INGRESS), self._set(self._variant, Way.EGRESS)
        self.rig.endpoint(ingress, egress, flags=flags, link=BRIDGE if one.is_bridged else LO)

    def _apply(self, step: Step) -> None:
        config = self._config
        config.epoch = following(config.epoch)
        if isinstance(step, Policies):
            self._variant = step.variant
            self._write_endpoint()
            config.generation = following(config.generation)
        elif isinstance(step, TimedOut):
            for state in State:
                config.timeout_jiffies[state.value] = OVER if state in step.states else ENDLESS
        elif isinstance(step, Keep):
            self._flag(abi.NP_CONFIG_KEEP_REVOKED, on=step.on)
        elif isinstance(step, Hairpin):
            self._flag(abi.NP_CONFIG_HAIRPIN, on=step.on)
        elif isinstance(step, Moves):
            self._move(here=step.here)
        elif isinstance(step, Routes):
            self._routes = step.on
            self._write_endpoint()
        self.dataplane.set_config(config)

    def _flag(self, flag: int, *, on: bool) -> None:
        self._config.flags = self._config.flags | flag if on else self._config.flags & ~flag

    # --- running

    def check(self, episode: Episode) -> Difference | None:
        """Run an episode in bulk. If there is a difference, find the first frame with one."""
        outcomes: list[Outcome] = []
        reference, program = self._in_bulk(self._start(episode), episode.steps, outcomes, with_connections=True)
        self.packets += len(outcomes)
        self.reasons.update(outcome.reason for outcome in outcomes)
        if reference == program:
            return None
        difference = self.first_difference(episode) or self.first_difference(episode, with_connections=True)
        if difference is None:
            raise AssertionError("an episode went wrong once and not when it was run again")
        return difference

    def _in_bulk(
        self, machine: Machine, steps: Sequence[Step], outcomes: list[Outcome], *, with_connections: bool
    ) -> tuple[Seen, Seen]:
        """The behaviour of both. ``outcomes`` gets the outcomes of the reference, one for each frame."""
        verdicts: list[bool] = []
        before = len(outcomes)
        with self._node:
            for step in steps:
                if not isinstance(step, Stimulus):
                    self._apply(step)
                    episodes.change(machine, step)
                    continue
                outcome = machine.step(step)
                if outcome is not None:
                    outcomes.append(outcome)
                    verdicts.append(self._run(step))
        seen = self._seen(verdicts)
        if with_connections:
            seen.connections = self._connections()
        return expected(outcomes[before:], machine if with_connections else None), seen

    def first_difference(
        self, episode: Episode, outcomes: list[Outcome] | None = None, *, with_connections: bool = False
    ) -> Difference | None:
        """Run an episode frame by frame up to the first difference. ``outcomes`` gets the outcomes of the reference.

        ``with_connections``: compare connections after every frame, which takes milliseconds each.
        """
        machine = self._start(episode)
        all_outcomes = [] if outcomes is None else outcomes
        for index, step in enumerate(episode.steps):
            reference, program = self._in_bulk(machine, [step], all_outcomes, with_connections=with_connections)
            if reference != program:
                return Difference(replace(episode, steps=episode.steps[: index + 1]), reference, program)
        return None

    def _start(self, episode: Episode) -> Machine:
        self._empty(episode)
        machine = Machine(episodes.reference_endpoint(episode))
        machine.shortened = {} if episode.takes_fast_path else None
        self._apply(Policies(0))
        episodes.change(machine, Policies(0))
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

    def _connections(self) -> Connections:
        return dict(
            told_connection(
                key, row, is_unreplied=name in abi.UNREPLIED_VIEWS.values(), generation=self._config.generation
            )
            for name in (*abi.UNREPLIED_VIEWS, *abi.UNREPLIED_VIEWS.values())
            for key, row in self.rig.connections(name).items()
        )

    def _counts(self) -> tuple[Counter[int], Counter[int]]:
        return self._count("np_reason_count"), self._count("np_rule_count")

    def _count(self, name: str) -> Counter[int]:
        """The packets by row, over all CPUs, for rows that have any."""
        words = struct.unpack(f"={self._words[name]}Q", b"".join(value for _, value in self.rig.map(name).items()))
        cells = len(words) // self.rig.map(name).max_entries
        sums = [sum(words[at : at + cells : 2]) for at in range(0, len(words), cells)]
        return Counter({row: packets for row, packets in enumerate(sums) if packets})

    # --- making it small

    def smallest(self, found: Difference, tries: int = 1500) -> Difference:
        """Remove steps, then bytes, as long as the last frame still differs. At most ``tries`` runs."""
        best = found
        chunk = max(len(best.episode.steps) // 2, 1)
        while chunk and tries > 0:
            start = 0
            while start < len(best.episode.steps) - 1 and tries > 0:
                steps = best.episode.steps
                stop = min(start + chunk, len(steps) - 1)
                tries -= 1
                smaller = self._still(best, steps[:start] + steps[stop:])
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
        size = len(best.episode.steps[index].frame)  # this step is a frame, which the caller has checked
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
            best = self._still(best, tuple(steps)) or best
        return best, tries

    def _still(self, found: Difference, steps: tuple[Step, ...]) -> Difference | None:
        """The difference, if the last frame of these steps is the first frame that differs; otherwise None."""
        with_connections = found.program.connections is not None
        shorter = replace(found.episode, steps=steps)
        machine = self._start(shorter)
        reference, program = self._in_bulk(machine, steps[:-1], [], with_connections=with_connections)
        if reference != program:
            return None
        reference, program = self._in_bulk(machine, steps[-1:], [], with_connections=with_connections)
        return Difference(shorter, reference, program) if reference != program else None


def told(event: abi.np_event) -> tuple[object, ...]:
    """An event in the form of the reference. For a frame that could not be parsed, only its reason and length."""
    reason = abi.REASONS[event.reason].slug
    if reason in UNPARSED or not event.ip_version:
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


def _prefix(packed: bytes, size: int) -> str:
    return str(ip_network((packed, size * 8), strict=False))


class TestRuns:
    """BPF_PROG_TEST_RUN with everything prepared except the frame, for many runs."""

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
        """Run the program on a frame. Returns whether it passed."""
        frame = stimulus.frame
        attr = self._attrs[stimulus.out_of_host, stimulus.entered]
        ctypes.memmove(self._data, frame, len(frame))
        attr.data_size_in = len(frame)
        attr.data_size_out = attr.ctx_size_out = 0  # the kernel wrote the output's sizes into these fields
        if self._call(self._number, syscall.PROG_TEST_RUN, ctypes.byref(attr), ctypes.sizeof(attr)):
            raise OSError(ctypes.get_errno(), f"cannot run a program on {frame.hex()}")
        assert attr.retval in (2, 0xFFFF_FFFF), attr.retval
        return bool(attr.retval != 2)
