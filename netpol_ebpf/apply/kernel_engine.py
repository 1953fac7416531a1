# SPDX-License-Identifier: Apache-2.0
"""The engine that runs the loaded program on real packets.

The engine has a dataplane of its own, with its own pin directory beside that of a running agent.  It compiles a world
and writes the tables to the dataplane's maps.  For a question, it makes a frame with the question's packet, and runs
the program of the hook that judges the question's direction.  Normally that is a test run (BPF_PROG_TEST_RUN), which
attaches nothing to any interface.  If the kernel's test run cannot set the interface by which a packet entered the
node, the engine sends the frame over a veth pair in a network namespace of its own (`netpol_loader.pins.frames`).

The names of a question become rows of learned addresses, as if the endpoint had got DNS answers.  The program finds the
class of a name in its own table of patterns.

Invariants: the verdict is read from the program's event, and checked against the program's return value; the engine
computes no verdict itself.  A verdict does not depend on earlier questions, because their connections and learned
addresses are removed, and a new generation begins when the endpoint changes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Protocol

from netpol_ebpf.apply.applier import Applier
from netpol_ebpf.apply.encode import (
    DIRECTION,
    NO_BITS,
    NO_SETS,
    EndpointFlag,
    EndpointSets,
    LocalFlag,
    Meaning,
    endpoint_element,
    endpoint_key,
    host_element,
    host_key,
    learned_element,
    local_element,
    name_key,
    place_element,
    vip_filter_elements,
)
from netpol_ebpf.apply.events import FlowEvent, Names, decode_event
from netpol_ebpf.apply.frames import render_frame
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.tables import EndpointRow
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.policy.types import (
    Action,
    Cause,
    CauseKind,
    Direction,
    EndpointKey,
    EndpointKind,
    IPAddress,
    Outcome,
    Question,
    Stage,
    Verdict,
    World,
)
from netpol_loader import abi
from netpol_loader.kernel.clock import read_jiffies
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import DEFAULT_PIN_ROOT, Dataplane, TestRun
from netpol_loader.pins.frames import FrameRunner, can_name_ingress
from netpol_loader.tables.events import EventRecord

ROOT_PREFIX = "netpol-engine-"
"""Prefix of the name of an engine's pin directory, /sys/fs/bpf/netpol-engine-PID-COUNT."""

SIZES: Mapping[str, int] = {
    "np_conn4": 64,
    "np_conn6": 64,
    "np_frag4": 64,
    "np_frag6": 64,
    "np_learned4": 64,
    "np_learned6": 64,
    "np_event": 65536,
    "np_dns_event": 65536,
}
"""Sizes of maps that are smaller than by default, to save time: the engine sends one packet at a time.

The sizes of the ring buffers np_event and np_dns_event are in bytes.
"""

NAME_LIFE = 1 << 30
"""How long a learned address of a question is valid, in units of NP_LEARNED_JIFFIES: longer than an engine runs."""

MARK_SHIFT = 16
"""The number of the lowest bit of the sender tag in the packet mark; the tag has bits 16 to 31.

The engine's packets have no other bits in their mark.
"""

BROADCAST = IPv4Address("255.255.255.255")
OWN = Meaning(LocalFlag.OWN)

SELF = "self"
JUDGED = frozenset({"policy-allow", "policy-deny", "continue"})
NO_OPINION = (Outcome.CONTINUE, Action.PASS)
UNKNOWN = (Outcome.DENY, Action.DENY)


_count = itertools.count()


class NotJudgedError(NetpolError):
    """The program decided a packet without policy.

    Examples are IPv6 neighbour discovery, and packets from a source address that the workload does not have.
    ``reason``: the slug of the program's reason.
    ``passed``: whether the program let the packet pass.
    """

    slug = "not-judged"
    default_hint = "Ask about a packet that policy decides."

    def __init__(self, reason: str, *, passed: bool) -> None:
        super().__init__(f"policy was not asked about this packet: {reason}")
        self.reason = reason
        self.passed = passed


class Runner(Protocol):
    """Runs the program of a hook on a frame."""

    @property
    def ifindex(self) -> int:
        """The ifindex of the endpoint's interface, on which the program runs."""

    @property
    def elsewhere(self) -> int:
        """The ifindex of another interface, by which packets from outside enter the node.

        It is neither 0 nor `ifindex`.
        """

    def run(self, hook: Hook, frame: bytes, *, ingress_ifindex: int, ifindex: int, mark: int) -> TestRun:
        """Run the program of ``hook`` on ``frame``.

        ``ingress_ifindex``: the interface by which the packet entered the node.  At TC_EGRESS, 0 says that the node
        itself sends the packet.
        ``ifindex``: the interface on which the program runs.
        ``mark``: the packet's mark before the run.
        """


@dataclass(frozen=True, slots=True)
class _TestRunner:
    """Runs the program by BPF_PROG_TEST_RUN.

    A test run needs an existing interface.  The runner uses loopback, and attaches nothing to it.
    """

    dataplane: Dataplane
    ifindex: int = 1
    elsewhere: int = 2

    def run(self, hook: Hook, frame: bytes, *, ingress_ifindex: int, ifindex: int, mark: int) -> TestRun:
        return self.dataplane.test_run(hook, frame, ingress_ifindex=ingress_ifindex, ifindex=ifindex, mark=mark)


@contextlib.contextmanager
def open_runner(dataplane: Dataplane, *, over_veth: bool | None = None) -> Iterator[Runner]:
    """A runner that uses test runs, or frames over a veth pair if the kernel's test runs do not suffice.

    ``over_veth``: True for frames over a veth pair, False for test runs; None lets the kernel's abilities decide.
    """
    if over_veth is None:
        over_veth = not can_name_ingress()
    if over_veth:
        with FrameRunner({hook: dataplane.program_fd(hook) for hook in Hook}) as runner:
            yield runner
    else:
        yield _TestRunner(dataplane)


class KernelEngine:
    """Judges packets with the program in the kernel; a context manager.

    ``over_veth``: whether frames pass over a veth pair; None: only if the kernel's test runs do not suffice.

    Raises PlatformError if the engine cannot run (no root, no BCC, an old kernel).  Must be used in one thread of one
    process.
    """

    def __init__(self, pin_root: Path | None = None, *, over_veth: bool | None = None) -> None:
        self._over_veth = over_veth
        self._pin_root = pin_root or DEFAULT_PIN_ROOT.with_name(f"{ROOT_PREFIX}{os.getpid()}-{next(_count)}")
        self._stack = contextlib.ExitStack()
        self._compiler = Compiler()
        self._names = Names(self._compiler.tables.rules, self._compiler.tables.log_lists, {})
        self._events: list[EventRecord] = []
        self._kinds: dict[EndpointKey, EndpointKind] = {}
        self._installed: _Installed | None = None
        self._own_address: IPAddress | None = None
        self._host: int | None = None
        self._names_until = 0
        self._seen: set[str] = set()

    def __enter__(self) -> KernelEngine:  # noqa: PYI034 - typing.Self comes with Python 3.11
        for root in abandoned(self._pin_root.parent):
            shutil.rmtree(root)
        with contextlib.ExitStack() as stack:
            self._dataplane = Dataplane.open(self._pin_root, sizes=SIZES)
            stack.callback(self._dataplane.remove)
            self._reader = stack.enter_context(self._dataplane.events(self._events.append))
            # Between two questions no packet is in the program, so no grace period is needed.
            self._applier = Applier(self._dataplane.maps, wait=lambda: None)
            self._applier.set_sender_tag_bits(MARK_SHIFT)
            self._names_until = read_jiffies() // abi.NP_LEARNED_JIFFIES + NAME_LIFE
            self._applier.set_flags(on=abi.NP_CONFIG_ALLOW_EVENTS | abi.NP_CONFIG_DEFER)
            self._runner = stack.enter_context(open_runner(self._dataplane, over_veth=self._over_veth))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def load(self, world: World, names: Collection[str] = ()) -> None:
        """Replace the present world by ``world``. As in the agent, only the changes are compiled and written.

        ``names``: the domain names that endpoints ask for, as the agent learns them from the program's events.
        """
        self._compiler.replace(world)
        self._compiler.see_names(names)
        self._seen = set(names)
        self._applier.apply(self._compiler.commit())
        self._kinds = {key: endpoint.kind for key, endpoint in world.endpoints.items()}
        self._installed = None

    def decide(self, question: Question) -> Verdict:
        """The program's verdict on ``question``. Raises NotJudgedError if the program decides without policy.

        Cost: some 100 microseconds, and 50 more over a veth pair.  The cost is lower if the previous question was about
        the same endpoint.
        """
        row = self._compiler.tables.endpoints.get(question.endpoint)
        if row is not None and (question.direction, question.stage) not in row.sets:
            return _without_rule(question.direction, *NO_OPINION)  # the endpoint has no policy set in this stage
        host = self._kinds.get(question.endpoint) is EndpointKind.HOST
        self._install(question, row, host=host)
        hook = next(hook for hook in Hook if DIRECTION[hook.direction(host=host)] is question.direction)
        with self._learned(question, row):
            event = self._run(hook, question, sent_here=host and question.stage is Stage.NORMAL)
            if row is not None and event.reason == SELF and question.direction is Direction.EGRESS:
                event = self._run_returning(question, row.number)
        if row is None and event.reason == "unknown-endpoint":
            return _without_rule(question.direction, *UNKNOWN)
        if event.reason not in JUDGED:
            raise NotJudgedError(event.reason, passed=event.kind != "deny")
        if event.cause is None or event.outcome is None or event.staged_cause is None or event.staged_outcome is None:
            raise NetpolError(f"the program reported rule {event.rule} and {event.staged_rule} for {question}")
        return Verdict(event.outcome, event.cause, event.staged_outcome, event.staged_cause, event.logs)

    def _install(self, question: Question, row: EndpointRow | None, *, host: bool) -> None:
        """Bind the interface to the question's endpoint, with the policy sets of the question's stage.

        The other stages of a host endpoint get no policy set, so that they cannot decide.  If the stage requires it,
        the destination is made an address of the node.
        """
        flags = EndpointFlag.HOST if host else EndpointFlag.NONE
        slot = _slot(question) if host else question.stage
        wanted = _Installed(question.endpoint, question.stage, slot, flags)
        if host:
            self._place_on_node(question.packet.destination if slot is Stage.NORMAL else None)
        if wanted == self._installed:
            return
        maps = self._dataplane.maps
        if self._host is not None:  # rows of all host endpoints of earlier questions would fill the map
            maps["np_host"].delete(host_key(self._host))
            self._host = None
        if row is None:
            maps["np_endpoint"].delete(endpoint_key(self._runner.ifindex))
        else:
            sets = NO_SETS if host else EndpointSets.of(row, question.stage)
            elements = [endpoint_element(self._runner.ifindex, row.number, sets, flags)]
            if host:
                both = {
                    (one, slot): row.sets[one, question.stage] for one in Direction if (one, question.stage) in row.sets
                }
                elements.append(host_element(row.number, both))
                self._host = row.number
            for name, key, value in elements:
                maps[name].put(key, value)
        self._applier.bump_generation()  # the program caches an interface's endpoint for a generation
        self._installed = wanted

    @contextlib.contextmanager
    def _learned(self, question: Question, row: EndpointRow | None) -> Iterator[None]:
        """Let the endpoint have learned the names of the question for the packet's destination, for the time of the block.

        Raises NetpolError if the names have more classes than a row of the map has room for.
        """
        self._see(question.names)
        found = {self._class_of(name) for name in question.names} - {0}
        if row is None or not found:
            yield
            return
        if len(found) > abi.NP_LEARNED_CLASSES:
            raise NetpolError(f"the names of {question} have {len(found)} classes, more than an address can have")
        until = dict.fromkeys(sorted(found), self._names_until)
        name, key, value = learned_element(row.number, question.packet.destination, until)
        self._dataplane.maps[name].put(key, value)
        try:
            yield
        finally:
            self._dataplane.maps[name].delete(key)

    def _see(self, names: frozenset[str]) -> None:
        """Let the compiler know which names were asked for, as the agent does after a DNS answer."""
        if names <= self._seen:
            return
        self._seen |= names
        self._compiler.see_names(self._seen)
        self._applier.apply(self._compiler.commit())

    def _class_of(self, name: str) -> int:
        """The class of a domain name, by a look-up in the kernel's table of patterns. 0: no pattern matches the name."""
        value = self._dataplane.maps["np_name"].get(name_key(name))
        return 0 if value is None else abi.np_name.from_buffer_copy(value).name_class

    def _place_on_node(self, address: IPAddress | None) -> None:
        """Make ``address`` the only address of the node. ``address`` None: the node has no address."""
        if address == self._own_address:
            return
        maps = self._dataplane.maps
        if self._own_address is not None:
            name, key, _ = local_element(self._own_address, OWN)
            maps[name].delete(key)
            for name, key, _ in vip_filter_elements([self._own_address]):
                maps[name].put(key, NO_BITS)
        if address is not None:
            for name, key, value in (*vip_filter_elements([address]), local_element(address, OWN)):
                maps[name].put(key, value)
        self._own_address = address

    def _run(self, hook: Hook, question: Question, *, sent_here: bool) -> FlowEvent:
        """Run the program on the question's packet.

        Returns the program's event, checked against the program's return value.
        ``sent_here``: at TC_EGRESS, whether a process of this node sends the packet.
        """
        is_sent_here = sent_here or hook is Hook.TC_INGRESS  # the program reads the ingress interface only at TC_EGRESS
        run, events = self._send(hook, question, ingress_ifindex=0 if is_sent_here else self._runner.elsewhere)
        event = events[0]
        if len(events) > 1 or event.packet != question.packet or run.passed != (event.kind == "allow"):
            raise _unexpected(run, events, question)
        return event

    def _run_returning(self, question: Question, number: int) -> FlowEvent:
        """The program's event with the egress verdict on a packet from a workload to itself.

        The program passes a packet from a workload to its own address without policy.  If the workload sends it to a
        service that translates to the workload's address, the packet comes back with that address and its sender tag.
        Then the program judges it at the TC egress hook of the workload's interface.  If the packet is allowed, the
        program reports a second event for the receiver, unless both ends of the connection are equal, port included.
        """
        name, key, value = place_element(number, self._runner.ifindex)
        self._dataplane.maps[name].put(key, value)
        try:
            run, events = self._send(
                Hook.TC_EGRESS, question, ingress_ifindex=self._runner.ifindex, mark=number << MARK_SHIFT
            )
        finally:
            self._dataplane.maps[name].delete(key)
        event, *received = events
        is_passed_on = all(one.reason == SELF for one in received)
        if event.packet != question.packet or run.passed != (event.kind == "allow") or not is_passed_on:
            raise _unexpected(run, events, question)
        return event

    def _send(
        self, hook: Hook, question: Question, *, ingress_ifindex: int, mark: int = 0
    ) -> tuple[TestRun, list[FlowEvent]]:
        """Run the program on the question's packet.

        Returns the result of the run, and the program's events without those of Log rules.  There is at least one
        event.
        """
        self._events.clear()
        frame = render_frame(question.packet)
        run = self._runner.run(hook, frame, ifindex=self._runner.ifindex, ingress_ifindex=ingress_ifindex, mark=mark)
        self._reader.consume()
        if run.passed:
            self._forget_connection(question)
        events = [decode_event(event, self._names) for event in self._events if event.kind != abi.NP_EVENT_LOG]
        if not events:
            raise NotJudgedError(f"{'passed' if run.passed else 'dropped'} without an event", passed=run.passed)
        return run, events

    def _forget_connection(self, question: Question) -> None:
        """Remove the connection of an allowed packet, so that a later question's packet does not count as a reply."""
        table = f"np_conn{question.packet.source.version}"
        for name in (abi.UNREPLIED_VIEWS[table], table):
            self._dataplane.maps[name].clear()


@dataclass(frozen=True, slots=True)
class _Installed:
    """The endpoint row that the runner's interface has at present.

    ``stage``: the stage of the question.
    ``slot``: the stage in which the row has the policy sets (`_slot`).
    """

    endpoint: EndpointKey
    stage: Stage
    slot: Stage
    flags: EndpointFlag


def _unexpected(run: TestRun, events: list[FlowEvent], question: Question) -> NetpolError:
    reported = ", ".join(map(str, events))
    return NetpolError(
        f"the program returned {run.verdict} and reported {len(events)} events, {reported}, for {question}"
    )


def _slot(question: Question) -> Stage:
    """The stage of the endpoint row in which the program looks up the policy sets for the question.

    A multicast or broadcast packet is addressed to the node itself, so the program looks up the policy sets of stage
    NORMAL.  For a question about FORWARD, the policy sets of FORWARD must therefore be in place of those of NORMAL.
    """
    destination = question.packet.destination
    is_for_many = destination.is_multicast or destination == BROADCAST
    if question.stage is Stage.FORWARD and question.direction is Direction.INGRESS and is_for_many:
        return Stage.NORMAL
    return question.stage


def abandoned(parent: Path) -> list[Path]:
    """The pin directories in ``parent`` of engines whose process is gone. Their programs are not attached."""
    found = sorted(parent.glob(f"{ROOT_PREFIX}*")) if parent.is_dir() else []
    pids = {path: path.name.removeprefix(ROOT_PREFIX).partition("-")[0] for path in found}
    return [path for path, pid in pids.items() if pid.isdecimal() and not Path(f"/proc/{pid}").exists()]


def _without_rule(direction: Direction, outcome: Outcome, action: Action) -> Verdict:
    """The verdict if no policy set applies (policy/MATCHING.md, sections 2 and 4)."""
    cause = Cause(CauseKind.NO_MATCH, direction, action=action)
    return Verdict(outcome, cause, outcome, cause)
