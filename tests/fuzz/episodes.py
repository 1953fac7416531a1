# SPDX-License-Identifier: Apache-2.0
"""Episodes: frames at one interface, changes of its surroundings between them, and the policy in force.

Invariant: the same seed and number give the same episode. This module must not know the program.
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
"""Numbers of classes in the world's policy: peers (rest, friend, foe, near), L4 (rest and six others), source ports
(7777 or not)."""
L4_CLASSES: dict[tuple[int, int], int] = {
    (w.TCP, 80): 1, (w.TCP, 443): 1, (w.UDP, 53): 2, (w.UDP, 5000): 2, (w.SCTP, 9): 4,
}  # fmt: skip
ICMP_CLASSES = {(w.ICMP, 8, 0): 3, (w.ICMP, 3, 4): 6, (w.ICMPV6, 128, 0): 3, (w.ICMPV6, 2, 0): 6}
OTHER_CLASSES = {47: 5}
SOURCE_PORT = 7777


def allows(variant: int, way: Way, peer: int, l4: int, source: int) -> bool:
    """Whether a variant of the policy allows a combination.

    An arbitrary pattern with many of both; variant 2 denies everything.
    """
    if variant == 2 or source:
        return False
    if peer == 1:
        return l4 != 2 or way is Way.EGRESS or variant == 1
    return (peer * 3 + l4 * 5 + way.value + variant * 2) % 4 == 0


def set_number(variant: int, way: Way) -> int:
    """The number of the policy set for a variant and direction."""
    return 1 + variant * 2 + way.value


def policy(variant: int) -> Policy:
    """The variant as a policy for the reference."""

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
    """Step: this variant comes into force."""

    variant: int


@dataclass(frozen=True)
class TimedOut:
    """Step: connections in these states have expired, and all others have not."""

    states: frozenset[State]


@dataclass(frozen=True)
class Keep:
    """Step: whether connections that policy no longer allows stay open."""

    on: bool


@dataclass(frozen=True)
class Moves:
    """Step: the workload under test owns the moving addresses (``here``), or its sibling owns them."""

    here: bool


@dataclass(frozen=True)
class Routes:
    """Step: whether the workload is a router."""

    on: bool


@dataclass(frozen=True)
class Hairpin:
    """Step: whether packets from outside may have the source of a workload of this node."""

    on: bool


Step = Union[Stimulus, Policies, TimedOut, Keep, Moves, Routes, Hairpin]


@dataclass(frozen=True)
class Episode:
    """Steps that begin with an empty connection table and the first variant.

    ``takes_fast_path``: entries of the flow cache never expire; otherwise they expire at once. ``is_outside``: the host
    interface leads to no workload. ``is_external``: it is a tunnel that gives the outer sender. ``has_link``: packets
    begin with an Ethernet header. ``is_bridged``: the interface is at a bridge.
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
        """The kind of interface, as text."""
        words = ["host" if self.is_host else "workload", "interface"]
        words += ["to outside"] if self.is_outside else []
        words += ["by a tunnel"] if self.is_external else []
        words += [] if self.has_link else ["without link headers"]
        words += ["at a bridge"] if self.is_bridged else []
        return " ".join(words) + (", fast path" if self.takes_fast_path else "")


def episode(seed: int, number: int, size: int = EPISODE) -> Episode:
    """The episode with this number.

    Of 8 episodes, policy denies everything in one, one has no link headers, two use the fast path, and one is at a host
    interface. Half of the host interfaces lead outside, and half of these are tunnels. Half of all other interfaces are
    at a bridge.
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
    """The endpoint under test, for the reference."""
    return Endpoint(
        world.OWN, policy(2), episode.is_host, world.may_borrow, world.around(is_bridged=episode.is_bridged),
        has_link=episode.has_link, is_outside=episode.is_outside, is_external=episode.is_external,
    )  # fmt: skip


def change(machine: Machine, step: Step) -> None:
    """Apply a step that is no frame to the reference."""
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
