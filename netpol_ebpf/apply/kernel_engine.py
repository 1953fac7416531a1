# SPDX-License-Identifier: Apache-2.0
"""The third engine: the loaded program, run on real packets.

A world is compiled and written to the maps of a dataplane of the engine's own (its own pin directory, beside that of a
running agent); a question becomes a frame, on which the loaded program runs at the hook of the question's direction.  The
engine uses test runs (BPF_PROG_TEST_RUN), which attach nothing to any interface.  Where the kernel's test run cannot say by
which interface a packet entered the node, the frame passes over a veth pair in a namespace of the engine's own
(`netpol_loader.pins.frames`).

Invariants: the answer is what the program reported in its event, checked against what it returned; nothing is worked out
here.  No question sees what an earlier one left: its connection is removed and, when the endpoint changes, a new
generation begins.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
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
    local_element,
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
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import DEFAULT_PIN_ROOT, Dataplane, TestRun
from netpol_loader.pins.frames import FrameRunner, can_name_ingress
from netpol_loader.tables.events import EventRecord

ROOT_PREFIX = "netpol-engine-"
"""Engines pin below /sys/fs/bpf/netpol-engine-PID-COUNT."""

SIZES: Mapping[str, int] = {
    "np_conn4": 64,
    "np_conn6": 64,
    "np_frag4": 64,
    "np_frag6": 64,
    "np_event": 65536,
}
"""Map sizes that differ from the default, to save time: one packet at a time needs little. Ring buffer in bytes."""

MARK_SHIFT = 16
"""Lowest bit of the half of the mark that carries the sender tag of a packet to a service.

The engine's packets have no other mark.
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

    ``reason`` is the program's slug, ``passed`` whether the packet passed. Examples are IPv6 neighbour discovery, and
    packets from a source that the workload does not own.
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
        """The interface of the endpoint."""

    @property
    def elsewhere(self) -> int:
        """The interface by which packets from elsewhere enter the node.

        The program compares it with 0 and with `ifindex`.
        """

    def run(self, hook: Hook, frame: bytes, *, ingress_ifindex: int, ifindex: int, mark: int) -> TestRun:
        """Run the program.

        ``ingress_ifindex`` 0 at TC_EGRESS: the node itself sends the packet; ``mark``: the packet's mark before.
        """


@dataclass(frozen=True, slots=True)
class _TestRunner:
    """Runs the program by BPF_PROG_TEST_RUN.

    A test run needs an existing interface: the engine uses loopback, to which nothing is attached.
    """

    dataplane: Dataplane
    ifindex: int = 1
    elsewhere: int = 2

    def run(self, hook: Hook, frame: bytes, *, ingress_ifindex: int, ifindex: int, mark: int) -> TestRun:
        """See `Runner`."""
        return self.dataplane.test_run(hook, frame, ingress_ifindex=ingress_ifindex, ifindex=ifindex, mark=mark)


@contextlib.contextmanager
def open_runner(dataplane: Dataplane, *, over_veth: bool | None = None) -> Iterator[Runner]:
    """A runner that uses test runs where the kernel's suffice, else frames over a veth pair.

    ``over_veth`` overrides the choice.
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

    ``over_veth``: whether frames pass over a veth pair; None: only where the kernel's test runs do not suffice.
    Raises PlatformError where the engine cannot run (no root, no BCC, an old kernel).  One thread, one process.
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

    def __enter__(self) -> KernelEngine:  # noqa: PYI034 - typing.Self comes with Python 3.11
        for root in abandoned(self._pin_root.parent):
            shutil.rmtree(root)
        with contextlib.ExitStack() as stack:
            self._dataplane = Dataplane.open(self._pin_root, sizes=SIZES)
            stack.callback(self._dataplane.remove)
            self._reader = stack.enter_context(self._dataplane.events(self._events.append))
            # No packet is under way between two questions, so there is nothing to wait for.
            self._applier = Applier(self._dataplane.maps, wait=lambda: None)
            self._applier.set_sender_tag_bits(MARK_SHIFT)
            self._applier.set_flags(on=abi.NP_CONFIG_ALLOW_EVENTS | abi.NP_CONFIG_DEFER)
            self._runner = stack.enter_context(open_runner(self._dataplane, over_veth=self._over_veth))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def load(self, world: World) -> None:
        """Replace the present world by this one, as an incremental change: compiled and written as in the agent."""
        self._compiler.replace(world)
        self._applier.apply(self._compiler.commit())
        self._kinds = {key: endpoint.kind for key, endpoint in world.endpoints.items()}
        self._installed = None

    def decide(self, question: Question) -> Verdict:
        """The program's verdict. Raises NotJudgedError when the program decides the packet without policy.

        Cost: some 100 microseconds, over a veth pair 50 more; least for a question about the same endpoint as the
        question before.
        """
        row = self._compiler.tables.endpoints.get(question.endpoint)
        if row is not None and (question.direction, question.stage) not in row.sets:
            return _without_rule(question.direction, *NO_OPINION)  # there is no such stage to ask
        host = self._kinds.get(question.endpoint) is EndpointKind.HOST
        self._install(question, row, host=host)
        hook = next(hook for hook in Hook if DIRECTION[hook.direction(host=host)] is question.direction)
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

        A host endpoint's other policy lists are left out, so they cannot decide.  The destination is made an address of
        the node, or not, as the stage requires.
        """
        flags = EndpointFlag.HOST if host else EndpointFlag.NONE
        slot = _slot(question) if host else question.stage
        wanted = _Installed(question.endpoint, question.stage, slot, flags)
        if host:
            self._place_on_node(question.packet.destination if slot is Stage.NORMAL else None)
        if wanted == self._installed:
            return
        maps = self._dataplane.maps
        if self._host is not None:  # a row for each host endpoint that was ever asked about would fill the map
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
        self._applier.bump_generation()  # the program remembers an interface's endpoint for a generation
        self._installed = wanted

    def _place_on_node(self, address: IPAddress | None) -> None:
        """Make one address the only address of the node."""
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
        """Send the packet, and compare the program's event with its return value. Returns the verdict.

        ``sent_here``: a process of this node sends the packet, if it leaves the node.
        """
        is_sent_here = sent_here or hook is Hook.TC_INGRESS  # there the program does not read where the packet entered
        run, events = self._send(hook, question, ingress_ifindex=0 if is_sent_here else self._runner.elsewhere)
        event = events[0]
        if len(events) > 1 or event.packet != question.packet or run.passed != (event.kind == "allow"):
            raise _unexpected(run, events, question)
        return event

    def _run_returning(self, question: Question, number: int) -> FlowEvent:
        """The verdict on a workload's packet to itself, where the question concerns its egress policy.

        The program passes a packet from a workload to its own address without policy.  If the workload sent it to a
        service, the packet returns from the translation with that address and its sender tag, and the program judges it
        at the pod's ingress hook.  An allowed packet then has two events, one of them for the receiver, unless both
        ends of its connection are equal, port included.
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
        """Run the program on the packet.

        Returns its return value and its events without those of Log rules: at least one.
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
        """Remove the connection of an allowed packet, so that a later question is not taken for its reply."""
        table = f"np_conn{question.packet.source.version}"
        for name in (abi.UNREPLIED_VIEWS[table], table):
            self._dataplane.maps[name].clear()


@dataclass(frozen=True, slots=True)
class _Installed:
    """The row that the runner's interface has now."""

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
    """The policy list in which the program must find the policy sets of the question.

    A multicast or broadcast packet is for the node itself, so the program evaluates forward policy for it in the slot
    of normal policy.
    """
    destination = question.packet.destination
    is_for_many = destination.is_multicast or destination == BROADCAST
    if question.stage is Stage.FORWARD and question.direction is Direction.INGRESS and is_for_many:
        return Stage.NORMAL
    return question.stage


def abandoned(parent: Path) -> list[Path]:
    """Pin directories of engines that were killed. Their programs are attached nowhere."""
    found = sorted(parent.glob(f"{ROOT_PREFIX}*")) if parent.is_dir() else []
    pids = {path: path.name.removeprefix(ROOT_PREFIX).partition("-")[0] for path in found}
    return [path for path, pid in pids.items() if pid.isdecimal() and not Path(f"/proc/{pid}").exists()]


def _without_rule(direction: Direction, outcome: Outcome, action: Action) -> Verdict:
    """The verdict without an applicable policy set (policy/MATCHING.md, sections 2 and 4)."""
    cause = Cause(CauseKind.NO_MATCH, direction, action=action)
    return Verdict(outcome, cause, outcome, cause)
