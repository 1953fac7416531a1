# SPDX-License-Identifier: Apache-2.0
"""The agent's side of the second barrier: when each part of it is in force, and which parts are missing.

`netpol_loader.host.barrier` defines the tables and the *sign*.

Invariants: the programs set the sign before a table drops packets without it, and the tables stop dropping before the
programs stop setting it. If the barrier cannot be installed, a problem names the kinds of packets that pass without the
sign, and the agent goes on without the barrier. This module does not decide which interfaces are workloads'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from netpol_ebpf.agent.wiring import Wiring
from netpol_ebpf.errors import Location, PlatformError, Problem, UsageError
from netpol_loader.host.barrier import BarrierSpec, Counts, Difference, Marks, without_sign
from netpol_loader.pins.drift import Drift

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Seconds between two attempts to install tables that the kernel rejected. The number is arbitrary."""
TOLD_S = 60.0
"""Seconds for which a problem reports that packets from an attached interface were dropped. The number is arbitrary."""
ASKED_A_LOOK = 5
"""Number of interfaces on which one pass searches for other software's programs. The search takes milliseconds for each
interface; the number is arbitrary."""
MARK_BITS = 32
SIGNS = 3
LONGEST_NAME = 15
ON, OFF = "nft", "off"


@dataclass(frozen=True, slots=True)
class BarrierSettings:
    """Options of the barrier.

    ``is_on``: if False, no packet is dropped for lack of the sign. ``patterns``: names of interfaces, whole or as
    ``cali*``, that are closed as soon as they exist. ``marks``: the mark bits to use.
    """

    is_on: bool = True
    patterns: tuple[str, ...] = ()
    marks: Marks = Marks(0x20, 0x40, 0x10)

    @property
    def in_force(self) -> Marks:
        """The mark bits that the programs must use. Without the barrier the programs set no sign."""
        return self.marks if self.is_on else replace(self.marks, seen=0)


class BarrierAccess(Protocol):
    """The part of `netpol_loader.host.barrier.BarrierTables` that the agent needs. Tests implement it, too."""

    @property
    def families(self) -> tuple[str, ...]:
        """The families of nf_tables tables that the kernel supports for the barrier."""

    @property
    def is_held(self) -> bool:
        """Whether the kernel prevents other processes from changing the tables."""

    def open(self) -> None:
        """Open the connection to nf_tables, and detect which features the kernel has."""

    def has_news(self) -> bool:
        """Whether any nf_tables table changed since the last call."""

    def has_changed(self) -> bool:
        """Whether the tables in the kernel may differ from those that were last written."""

    def is_there(self) -> bool:
        """Whether one of the barrier's tables exists."""

    def members(self) -> tuple[frozenset[str], frozenset[int]]:
        """The members of the tables' sets: name patterns of workloads' interfaces, and indices of known interfaces."""

    def counts(self) -> Counts:
        """The counters of packets that the barrier dropped."""

    def unsigned(self) -> int:
        """The number of packets dropped for lack of the sign."""

    def write(self, layout: BarrierSpec) -> list[Difference]:
        """Write the tables. Returns how the tables in the kernel differed before."""


class MarksWriter(Protocol):
    """The part of `netpol_ebpf.apply.applier.Applier` that the barrier needs."""

    @property
    def marks(self) -> Marks:
        """The mark bits that the programs use now."""

    def set_marks(self, marks: Marks) -> None:
        """Make the programs use ``marks`` from now on."""


@dataclass(slots=True)
class _Rise:
    """Packets that the barrier dropped from an attached interface.

    ``since_s``: when the barrier last dropped packets. ``others``: other software's programs on the interface, which
    the agent read at ``asked_s``.
    """

    packets: int
    since_s: float
    others: tuple[str, ...] = ()
    asked_s: float = -1.0


@dataclass(slots=True)
class Barrier:
    """The second barrier of a node.

    Callers call `sign` with each new set of maps, `reconcile` when interfaces changed, and `look` at intervals.
    ``clock``: returns the time in seconds. ``others``: reads the names of other software's programs at an interface's
    TC ingress.
    """

    settings: BarrierSettings
    tables: BarrierAccess
    clock: Callable[[], float]
    others: Callable[[int], Sequence[str]]
    _writer: MarksWriter | None = None
    _is_signed: bool = False  # the programs set the sign, and the kernel accepts a table
    _layout: BarrierSpec | None = None  # the last one that was written completely
    _wanted: BarrierSpec | None = None
    _numbers: dict[str, int] = field(default_factory=dict)
    _failure: Problem | None = None
    _tried_s: float = 0.0
    _unsigned: int = 0
    _counted: dict[str, tuple[int, int]] = field(default_factory=dict)  # interface, packets
    _risen: dict[str, _Rise] = field(default_factory=dict)

    # --- in force ---------------------------------------------------------------------------------------------------

    def sign(self, writer: MarksWriter) -> None:
        """Make the programs that use a new set of maps set the marks.

        The existing tables are prepared for the marks first.
        """
        self._writer, self._is_signed, self._layout = writer, False, None
        before = writer.marks
        self._tried_s = self.clock()
        try:
            self._prepare(before)
        except PlatformError as error:
            self._fail(error)
            writer.set_marks(before if self._may_be_there() else Marks())
            return
        self._is_signed, self._failure = True, None
        writer.set_marks(self.settings.in_force)

    def _prepare(self, before: Marks) -> None:
        """Make existing tables accept both the old and the new marks. Raises PlatformError."""
        marks = self.settings.in_force
        base = without_sign(BarrierSpec(marks))
        self.tables.open()
        if not marks.seen or not self.tables.is_there():
            self.tables.write(base)  # if no table exists, this shows that the kernel accepts one
            return
        if before.seen not in (0, marks.seen):
            workloads, known = self.tables.members()
            older = BarrierSpec(marks, before.seen, self.settings.patterns, workloads, known)
            self.tables.write(older)

    def _may_be_there(self) -> bool:
        """Whether a table of an earlier agent may exist.

        It would drop packets by the present mark bits, so the bits must not change.
        """
        try:
            return self.tables.is_there()
        except PlatformError:
            return True  # unknown, so it counts as possible

    def reconcile(self, wiring: Wiring, workloads: Collection[int], attached: Collection[int]) -> None:
        """Update which interfaces the tables contain.

        ``workloads``: workloads' interfaces. ``attached``: interfaces with the programs, which set the sign.
        """
        links = wiring.links
        bound = {links[one].name: one for one in links.keys() & set(workloads) & set(attached)}
        settings = self.settings
        wanted = without_sign(BarrierSpec(settings.in_force))
        if settings.is_on:
            patterns = settings.patterns
            numbers = frozenset[int]()
            if patterns:
                numbers = frozenset(links.keys() & (set(attached) | (links.keys() - set(workloads))))
            wanted = BarrierSpec(settings.in_force, 0, patterns, frozenset(bound), numbers)
        self._wanted, self._numbers = wanted, bound
        if self._is_signed and self._layout != wanted:
            self._write(wanted)

    def _write(self, wanted: BarrierSpec) -> list[Difference]:
        self._tried_s = self.clock()
        try:
            found = self.tables.write(wanted)
        except PlatformError as error:
            self._layout = None
            self._fail(error)
            return []
        if self._failure is not None:
            log.info("over: the second barrier is in force", extra={"fields": {"problem": self._failure.slug}})
        self._layout, self._failure = wanted, None
        return found

    def _fail(self, error: PlatformError) -> None:
        message = f"the second barrier is NOT in force: {error.message}; it leaves open: {'; '.join(self._open())}"
        problem = Problem(Location(""), "", message, severity="warning", slug="barrier")
        if problem != self._failure:
            log.warning("%s", problem.message)
        self._failure = problem

    # --- now and then -----------------------------------------------------------------------------------------------

    def restore_reported(self) -> list[Drift]:
        """Restore the tables if the kernel reported a change of any table since the last call.

        Returns the restored differences.
        """
        return self._mend() if self._layout is not None and self.tables.has_news() else []

    def look(self) -> list[Drift]:
        """Restore changed tables, retry a failed installation, and note interfaces whose packets were dropped.

        Returns the restored differences.
        """
        now_s = self.clock()
        if self._failure is not None and now_s - self._tried_s >= RETRY_S:
            self._try_again()
        if self._layout is None:
            return []
        found = self._mend()
        try:
            self._look_at_unsigned(now_s)
        except PlatformError as error:
            self._fail(error)
        return found

    def _try_again(self) -> None:
        if not self._is_signed and self._writer is not None:
            self.sign(self._writer)
        if self._is_signed and self._wanted is not None:
            self._write(self._wanted)

    def _mend(self) -> list[Drift]:
        if self._layout is None:
            return []
        try:
            if not self.tables.has_changed():
                return []
        except PlatformError as error:
            self._fail(error)
            return []
        return [Drift("barrier", one.where, one.was) for one in self._write(self._layout)]

    def _look_at_unsigned(self, now_s: float) -> None:
        self._risen = {name: one for name, one in self._risen.items() if now_s - one.since_s < TOLD_S}
        if not self.settings.is_on:
            return
        before, self._unsigned = self._unsigned, self.tables.unsigned()
        known = {name: self._counted.get(name, (number, 0)) for name, number in self._numbers.items()}
        if self._unsigned == before and all(one[0] == self._numbers[name] for name, one in known.items()):
            self._counted = known  # no packet was dropped since, also none of a new interface
            return
        counted = self.tables.counts().by_interface
        for name, number in self._numbers.items():
            earlier, packets = self._counted.get(name), counted.get(name, 0)
            # A new interface may have sent packets before it had the program, so only later drops count.
            if earlier is not None and earlier[0] == number and packets > earlier[1]:
                self._note_rise(name, number, packets - earlier[1], now_s)
        self._counted = {name: (number, counted.get(name, 0)) for name, number in self._numbers.items()}

    def _note_rise(self, name: str, number: int, packets: int, now_s: float) -> None:
        if name not in self._risen:
            log.warning("interface %s: the second barrier dropped packets without the sign of its program", name)
            self._risen[name] = _Rise(0, now_s)
        rise = self._risen[name]
        rise.packets += packets
        rise.since_s = now_s
        if sum(one.asked_s == now_s for one in self._risen.values()) < ASKED_A_LOOK:
            rise.others, rise.asked_s = tuple(self.others(number)), now_s

    # --- problems and status -----------------------------------------------------------------------------------------

    @property
    def problems(self) -> list[Problem]:
        """A problem if the barrier lets packets without the sign pass.

        Also a problem for each attached interface from which the barrier dropped packets.
        """
        found = [] if self._failure is None else [self._failure]
        for name, one in sorted(self._risen.items()):
            others = f" (also there: {', '.join(one.others)})" if one.others else ""
            message = (
                f"{one.packets} packets of interface {name} were dropped because they do not have the sign of its program: the workload "
                f"sends past the hook, or a program of others on that hook overwrites the mark{others}"
            )
            found.append(Problem(Location(""), "", message, severity="warning", slug="unsigned"))
        return found

    @property
    def is_installed(self) -> bool:
        """Whether the tables in the kernel are as desired."""
        return self._layout is not None and self._layout == self._wanted and self._failure is None

    def report(self) -> dict[str, Any]:
        """The state of the barrier as plain values for `status`.

        ``families``: the families of the barrier's tables; bridge only if the kernel supports it.
        """
        settings = self.settings
        counts = Counts()
        if self._layout is not None:
            try:
                counts = self.tables.counts()
            except PlatformError as error:
                self._fail(error)
        return {
            "mode": ON if settings.is_on else OFF,
            "installed": self.is_installed,
            "families": list(self.tables.families) if self._layout is not None else [],
            "held": self._layout is not None and self.tables.is_held,
            "patterns": list(settings.patterns),
            "marks": {name: hex(getattr(settings.in_force, name)) for name in ("seen", "node", "due")},
            "interfaces": len(self._numbers) if settings.is_on and self.is_installed else 0,
            "packets": {name: dict(one) for name, one in sorted(counts.by_counter.items())},
            "unsigned": {name: packets for name, packets in sorted(counts.by_interface.items()) if packets},
            "open": self._open(),
        }

    def _open(self) -> list[str]:
        """The kinds of packets that the barrier does not stop on this node, as texts."""
        found = []
        if not self.is_installed:
            found.append("packets of services that the node gives to a process of its own: they bear no mark")
        if not self.settings.is_on:
            return ["packets that skip a workload's program, or come before it is there: --barrier off", *found]
        if not self.is_installed:
            return ["packets that skip a workload's program, or come before it is there", *found]
        if "bridge" not in self.tables.families:
            found.append("packets that a bridge passes on: the kernel has no tables for bridges")
        if not self.settings.patterns:
            found.append("interfaces that are born while no agent runs: no --barrier-interfaces")
        return found


def parse_barrier(mode: str, patterns: Sequence[str], marks: str, mark_shift: int) -> BarrierSettings:
    """Parse the barrier's options. Raises UsageError.

    ``mark_shift``: the position of the lowest of the 16 bits of `--service-mark`; 0: there is none.
    """
    return BarrierSettings(mode != OFF, tuple(_parse_pattern(one) for one in patterns), parse_marks(marks, mark_shift))


def parse_marks(text: str, mark_shift: int) -> Marks:
    """Parse three different single bits, none of them in the service mark. Raises UsageError."""
    try:
        bits = [int(one, 0) for one in text.split(",")]
    except ValueError:
        bits = []
    are_bits = all(0 < bit < 1 << MARK_BITS and not bit & (bit - 1) for bit in bits)
    if len(bits) != SIGNS or len(set(bits)) != SIGNS or not are_bits:
        raise UsageError(f"--barrier-marks {text}: expected three different single bits, such as 0x20,0x40,0x10")
    taken = 0xFFFF << mark_shift if mark_shift else 0
    inside = [hex(bit) for bit in bits if bit & taken]
    if inside:
        raise UsageError(f"--barrier-marks {text}: {', '.join(inside)} is inside --service-mark {taken:#x}")
    return Marks(*bits)


def _parse_pattern(text: str) -> str:
    """Parse an interface name, or a prefix of one and ``*``. Raises UsageError."""
    name = text.removesuffix("*")
    is_odd = not name or len(name.encode()) > LONGEST_NAME or any(one in "*?[]/\\:" or one.isspace() for one in name)
    if is_odd or (text.endswith("*") and "lo".startswith(name)) or text == "lo":
        raise UsageError(
            f"--barrier-interfaces {text}: expected the name of an interface, or its beginning and *, such as cali*; not the loopback"
        )
    return text
