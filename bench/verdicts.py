# SPDX-License-Identifier: Apache-2.0
"""Checks with real packets that all contenders give the same verdicts, before anything is timed.

A question is a first packet: TCP to a port without a listener, which is refused if the packet passes; or UDP to a port
that echoes it. A denied packet gets no answer. The expected answer is the reference model's, for the policies that the
contenders enforce.

Invariant: a difference is an error with the contender, the packet and both answers, and nothing is timed after it.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address

from bench.policies import MEASURED, flat_rules, peer_addresses, questions
from bench.site import MEASURED_HOST, NODE_ADDRESS, PEER_HOST, Contender, Scenario, Site
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.model.reference import ReferenceModel
from netpol_ebpf.policy.types import TCP, Direction, Outcome, Packet, Question, Stage, World

DEADLINE_S = 0.4
ROUNDS = 3
"""How often an unanswered question is asked in all, because a busy machine may lose a packet."""
QUESTIONS = {10_000: 24}
"""By number of rules: the number of questions. With so many rules the model takes a tenth of a second for each
question."""
QUESTIONS_ELSE = 64
SPARE = 8
"""Number of addresses for the peer from each world, from which questions about any size can be asked."""


def choose_peers(scenario: Scenario, sizes: Sequence[int], own: IPv4Address) -> tuple[IPv4Address, ...]:
    """The addresses that the peer needs for questions about worlds of these sizes."""
    found: dict[IPv4Address, None] = {own: None}
    for size in sizes:
        rules = flat_rules(scenario.world(size), MEASURED, scenario.direction)
        found.update(dict.fromkeys(peer_addresses(rules, own, SPARE)))
    return tuple(address for address in found if address not in (scenario.measured, NODE_ADDRESS))


class Examination:
    """The questions and the model's answers, by number of rules."""

    def __init__(self, scenario: Scenario, sizes: Sequence[int]) -> None:
        self._scenario = scenario
        self._answers = {size: self._prepare(scenario.world(size), size) for size in sizes}

    def _prepare(self, world: World, size: int) -> dict[Packet, Outcome]:
        direction = self._scenario.direction
        rules = flat_rules(world, MEASURED, direction)
        count = QUESTIONS.get(size, QUESTIONS_ELSE)
        asked = questions(rules, self._scenario.measured, self._scenario.peers, direction, count)
        model = ReferenceModel(world)
        answers = {
            packet: model.decide(Question(MEASURED, direction, Stage.NORMAL, packet)).outcome for packet in asked
        }
        if len(set(answers.values())) < 2:
            raise NetpolError(f"all {len(asked)} questions about {size} rules have one answer: they say nothing")
        return answers

    def examine(self, site: Site) -> tuple[int, int]:
        """Ask a contender.

        Returns the numbers of allowed and denied questions. Raises NetpolError for a wrong answer.
        """
        if not site.contender.rules:
            return 0, 0
        expected = self._answers[site.contender.rules]
        seen = ask(site, list(expected), self._scenario.direction)
        for packet, outcome in expected.items():
            if seen[packet] is not outcome:
                protocol = "TCP" if packet.protocol == TCP else "UDP"
                raise NetpolError(
                    f"{site.contender}: {protocol} from {packet.source} to {packet.destination} port "
                    f"{packet.destination_port}: the model says {outcome.value}, seen: {seen[packet].value}",
                    hint="The contenders do not enforce the same policies, so comparing their speed would mean nothing.",
                )
        allowed = sum(outcome is Outcome.ALLOW for outcome in expected.values())
        return allowed, len(expected) - allowed


def ask(site: Site, packets: Sequence[Packet], direction: Direction) -> Mapping[Packet, Outcome]:
    """Send all packets at the same time. Returns the outcome of each."""
    asking, answering = (PEER_HOST, MEASURED_HOST) if direction is Direction.INGRESS else (MEASURED_HOST, PEER_HOST)
    seen = dict.fromkeys(packets, Outcome.DENY)
    for _ in range(ROUNDS):
        silent = [packet for packet, outcome in seen.items() if outcome is Outcome.DENY]
        with contextlib.ExitStack() as stack:
            round_ = _Round(stack, site, asking, answering, silent)
            seen.update(dict.fromkeys(round_.answered(), Outcome.ALLOW))
    return seen


class _Round:
    """One round with every question. Datagrams are echoed. A refused connection counts as allowed."""

    def __init__(
        self, stack: contextlib.ExitStack, site: Site, asking: str, answering: str, packets: Sequence[Packet]
    ) -> None:
        self._stack, self._site = stack, site
        self._poll = select.poll()
        self._echoes: dict[int, socket.socket] = {}
        self._waiting: dict[int, tuple[socket.socket, Packet]] = {}
        datagrams = {(str(one.destination), one.destination_port) for one in packets if one.protocol != TCP}
        for place in sorted(datagrams):
            sock = self._open(answering, socket.SOCK_DGRAM, place)
            self._echoes[sock.fileno()] = sock
            self._poll.register(sock, select.POLLIN)
        for packet in packets:
            is_stream = packet.protocol == TCP
            sock = self._open(asking, socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM, (str(packet.source), 0))
            sock.connect_ex((str(packet.destination), packet.destination_port))
            if not is_stream:
                sock.send(b"?")
            self._waiting[sock.fileno()] = (sock, packet)
            self._poll.register(sock, select.POLLOUT if is_stream else select.POLLIN)

    def _open(self, host: str, kind: int, bind_to: tuple[str, int]) -> socket.socket:
        sock = self._stack.enter_context(self._site.lab.prober.open_socket(host, socket.AF_INET, kind))
        sock.settimeout(0)
        sock.bind(bind_to)
        return sock

    def answered(self) -> list[Packet]:
        """The questions that were answered before the deadline."""
        found = []
        deadline = time.monotonic() + DEADLINE_S
        while self._waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left * 1000):
                if fd in self._echoes:
                    data, peer = self._echoes[fd].recvfrom(16)
                    self._echoes[fd].sendto(data, peer)
                    continue
                self._poll.unregister(fd)
                sock, packet = self._waiting.pop(fd)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error not in (0, errno.ECONNREFUSED):
                    raise NetpolError(f"{self._site.contender}: asking {packet}: error {error}")
                found.append(packet)
        return found


def describe(counts: Mapping[Contender, tuple[int, int]]) -> str:
    """A note for the record with the numbers of questions."""
    asked = [pair for pair in counts.values() if sum(pair)]
    allowed, denied = sum(pair[0] for pair in asked), sum(pair[1] for pair in asked)
    return (
        f"verdicts: {len(asked)} contenders answered {allowed + denied} questions with real packets "
        f"({allowed} allowed, {denied} denied), each as the reference model does"
    )
