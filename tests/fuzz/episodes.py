# SPDX-License-Identifier: Apache-2.0
"""Episodes: frames at one interface, and what changes around it in between; and the policy that is in force there.

Invariant: the same seed and number give the same episode.  This module must not know the program.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Union

import wire as w
import world
from endpoint import Endpoint, Policy, Question, Way
from generate import Generator
from machine import Machine, State, Stimulus

EPISODE = 3000
PEERS, L4S, SOURCES = 4, 7, 2
"""Classes of the world's policy: the rest, friend, foe, near; the rest and six below; source port 7777 or not."""
L4_CLASSES: dict[tuple[int, int], int] = {
    (w.TCP, 80): 1, (w.TCP, 443): 1, (w.UDP, 53): 2, (w.UDP, 5000): 2, (w.SCTP, 9): 4,
}  # fmt: skip
ICMP_CLASSES = {(w.ICMP, 8, 0): 3, (w.ICMP, 3, 4): 6, (w.ICMPV6, 128, 0): 3, (w.ICMPV6, 2, 0): 6}
OTHER_CLASSES = {47: 5}
SOURCE_PORT = 7777


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
        if question.peer == world.FRIEND[version]:
            peer = 1
        elif question.peer == world.FOE[version]:
            peer = 2
        elif question.peer.startswith(world.NEAR[version][: world.NEAR_BYTES[version]]):
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


@dataclass(frozen=True)
class Moves:
    """A step: from here on the workload under test owns the addresses that move (``here``), or its sibling does."""

    here: bool


@dataclass(frozen=True)
class Routes:
    """A step: whether the workload is a router."""

    on: bool


@dataclass(frozen=True)
class Hairpin:
    """A step: whether packets from outside may have the source of a workload of this node."""

    on: bool


Step = Union[Stimulus, Policies, TimedOut, Keep, Moves, Routes, Hairpin]


@dataclass(frozen=True)
class Episode:
    """Steps from an empty table under the first variant.

    ``takes_fast_path``: its second never ends, else it is over. ``is_outside``: no workload is behind the host interface.
    ``is_external``: that is a tunnel which tells who sent a packet.
    ``has_link``: packets begin with an Ethernet header. ``is_bridged``: the interface is at a bridge.
    """

    steps: tuple[Step, ...]
    is_host: bool = False
    takes_fast_path: bool = False
    is_outside: bool = False
    is_external: bool = False
    has_link: bool = True
    is_bridged: bool = False

    @property
    def scene(self) -> str:
        """The interface in words."""
        words = ["host" if self.is_host else "workload", "interface"]
        words += ["to outside"] if self.is_outside else []
        words += ["by a tunnel"] if self.is_external else []
        words += [] if self.has_link else ["without link headers"]
        words += ["at a bridge"] if self.is_bridged else []
        return " ".join(words) + (", fast path" if self.takes_fast_path else "")


def episode(seed: int, number: int, size: int = EPISODE) -> Episode:
    """The episode of that number.

    Of 8 episodes one meets nothing but denial, one has no link headers, two take the fast path, and one is at a host
    interface, of which every second one leads outside, and half of these out of a tunnel.  Half of all other interfaces are at a bridge.
    """
    chance = random.Random(f"{seed}/{number}/steps").random
    turn, flavour = divmod(number, 8)
    is_host = flavour == 7 or (flavour == 4 and turn % 4 == 3)
    has_link = flavour != 4
    generator = Generator(f"{seed}/{number}", has_link=has_link)
    steps: list[Step] = [Policies(2 if flavour == 0 else 0)]
    for _ in range(size):
        if flavour and chance() < 0.015:
            kind = chance()
            if kind < 0.35:
                steps.append(Policies(int(chance() * 2)))
            elif kind < 0.6:
                steps.append(TimedOut(frozenset(state for state in State if chance() < 0.2)))
            elif kind < 0.7:
                steps.append(Keep(chance() < 0.5))
            elif is_host:
                steps.append(Hairpin(chance() < 0.3))
            else:
                steps.append(Moves(chance() < 0.5) if kind < 0.93 else Routes(chance() < 0.3))
        steps.append(generator.stimulus())
    return Episode(
        tuple(steps), is_host=is_host, takes_fast_path=flavour in (5, 6), is_outside=is_host and turn % 4 in (0, 3),
        is_external=is_host and turn % 4 == 0, has_link=has_link, is_bridged=has_link and not is_host and (turn + number) % 2 == 0,
    )  # fmt: skip


def reference_endpoint(episode: Episode) -> Endpoint:
    """The endpoint under test, as the reference knows it."""
    return Endpoint(
        world.OWN, policy(2), episode.is_host, world.may_borrow, world.around(is_bridged=episode.is_bridged),
        has_link=episode.has_link, is_outside=episode.is_outside, is_external=episode.is_external,
    )  # fmt: skip


def change(machine: Machine, step: Step) -> None:
    """A step that is no frame, for the reference."""
    if isinstance(step, Policies):
        machine.endpoint.policy = policy(step.variant)
        machine.renew()
    elif isinstance(step, TimedOut):
        machine.timed_out = step.states
    elif isinstance(step, Keep):
        machine.keep_revoked = step.on
    elif isinstance(step, Hairpin):
        machine.hairpin = step.on
    elif isinstance(step, Moves):
        machine.endpoint.addresses = world.OWN | world.MOVING if step.here else world.OWN
    elif isinstance(step, Routes):
        machine.endpoint.routes = step.on
