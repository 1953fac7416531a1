# SPDX-License-Identifier: Apache-2.0
"""The agent, step by step: each step reads changes of objects and interfaces, and updates enforcement.

Each part of the agent has a module: `ClusterObjects` (the source's objects), `LocalInterfaces` (the interface of each
workload), `Enforcement` (compiled policy in maps), `EndpointBinder` with `Attachments` and `OwnInterfaces` (programs
and rows of interfaces), `Barrier` (the tables behind the programs) and `Repair` (restores what other programs changed).
The agent calls them in order; its only own state is the rejected changes.

Invariants: the policy in force was compiled whole from one state of the objects. A step that fails leaves the previous
state in force and is reported in `Agent.problems`. A workload's interface is never open without policy: until its
workload is known, the program on it denies everything.

This module runs no loop and opens no files or sockets; `netpol_ebpf.agent.main` does. So tests can run steps without
them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path

from netpol_ebpf.agent.attachments import Attachments
from netpol_ebpf.agent.barrier import Barrier
from netpol_ebpf.agent.closed_workloads import ClosedWorkloads
from netpol_ebpf.agent.domain_names import DomainNames
from netpol_ebpf.agent.endpoint_binder import EndpointBinder
from netpol_ebpf.agent.enforcement import Enforcement
from netpol_ebpf.agent.handover import Handover
from netpol_ebpf.agent.local_interfaces import LocalInterfaces
from netpol_ebpf.agent.node_access import NodeAccess
from netpol_ebpf.agent.objects import ClusterObjects
from netpol_ebpf.agent.own_interfaces import OwnInterfaces
from netpol_ebpf.agent.problem_log import ProblemLog
from netpol_ebpf.agent.rejected import RejectedChanges
from netpol_ebpf.agent.repair import Repair
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.apply.events import ProgramEvent, decode_event
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.errors import LimitError, Location, MapFullError, Problem
from netpol_ebpf.policy.types import Changes, EndpointKey
from netpol_ebpf.sources.source import ObjectEvent, Source, SourceUpdate
from netpol_loader.tables.events import EventRecord

CLOSE_S = 15.0
"""Seconds that a node without any policy in force waits for its objects, before its workloads' interfaces are closed.
The number is arbitrary, but longer than a source takes before it uses its saved state."""
SHOWN = 5
"""Largest number of kinds or directories, still to be read by a source, that a message names; `status` shows all. The
number is arbitrary."""
NOT_SYNCED = "not-synced"
TELL_S = 60.0
"""Seconds between two log lines that name what the agent waits for. The number is arbitrary."""
log = logging.getLogger(__name__)


class Agent:
    """Keeps enforcement on a node up to date. Callers call `begin` or `start` once, then `step` again and again.

    ``is_started``: whether this agent has put a state in force; until then the state of an earlier agent remains.
    ``changes_seen``: a number that grows with each change of objects or interfaces. The other attributes are the
    agent's parts, which callers may only read.
    """

    def __init__(
        self,
        settings: AgentSettings,
        node: NodeAccess,
        source: Source,
        ledger: Ledger,
        clock: Callable[[], float],
        assignments_file: Path | None = None,
        handovers_file: Path | None = None,
        names_file: Path | None = None,
    ) -> None:
        """``clock``: returns the time in seconds.

        ``assignments_file``: the file that keeps interface assignments across restarts; None: they are not kept.
        ``handovers_file``: the same for handovers of the CNI plugin.
        ``names_file``: the same for the domain names that endpoints learned.
        """
        self.settings = settings
        self.source = source
        self.objects = ClusterObjects(settings, handovers_file)
        self.interfaces = LocalInterfaces(settings, node.network, self.objects, clock, assignments_file)
        self.attachments = Attachments(node)
        self.own_interfaces = OwnInterfaces(settings.node, self.attachments, settings.tunnels)
        self.barrier = Barrier(settings.barrier, node.barrier, clock, node.others)
        self.enforcement = Enforcement(
            settings, node, node, ledger, self.objects, self.interfaces, self.own_interfaces, self.barrier, clock
        )
        self.binder = EndpointBinder(
            node, self.objects, self.interfaces, self.enforcement, self.attachments, self.own_interfaces, self.barrier
        )
        self.repair = Repair(node, self.enforcement, self.attachments, self.barrier, self._name_of, clock)
        self.domain_names = DomainNames(
            node,
            self.enforcement,
            clock,
            names_file,
            floor_s=settings.name_ttl_floor_s,
            extra_s=settings.name_extra_ttl_s,
        )
        self.closed = ClosedWorkloads(settings.node)
        self.rejected = RejectedChanges()
        self._node = node
        self._ledger = ledger
        self._clock = clock
        self.is_started = False
        self.changes_seen = 0
        self._early: list[ObjectEvent] = []  # events of sources that synced before the others
        self._early_handovers: list[Handover] = []  # handovers from before the start
        self._enforced: frozenset[int] = frozenset()  # interfaces with an earlier agent's programs at the start
        self._close_at_s = math.inf
        self._tell_at_s = math.inf
        self._unenforced_log = ProblemLog(log)

    # --- steps ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Wait until the source has synced, then put its objects in force.

        They replace the state of an earlier agent at once. Raises LimitError or MapFullError if the objects do not fit.
        Raises InvalidInputError or UnreachableError if a source cannot be read, because an unreadable source is not an
        empty one. After an error the previous state is in force.
        """
        self._open()
        self._take(self.source.sync())
        self._put_in_force()

    def begin(self) -> None:
        """Start without waiting for a server. A later `step` puts the objects in force when the source has synced.

        Until then the state of an earlier agent stays in force, and workloads' interfaces without policy in that state
        are closed. If there is no such state, only new interfaces are closed at once. The others, which may have
        connections, are closed after `CLOSE_S`.
        """
        self._open()
        update = self.source.begin()
        self._enforced = frozenset(self._node.attached())
        self._tell_at_s = self._clock() + CLOSE_S
        self._close_at_s = math.inf if self._enforced else self._tell_at_s
        self._take(update)
        self._put_in_force_if_due()
        if not self.is_started:
            self._recall()
            self.attachments.find()
            self._close_uncovered()

    @property
    def is_in_force(self) -> bool:
        """Whether a state of the source is in force, and no change of it waits because it was rejected."""
        return self.is_started and self.source.has_synced and not self.enforcement.is_pending

    @property
    def keeps_enforcement(self) -> bool:
        """Whether the programs enforce anything, by this agent or an earlier one."""
        return self.is_started or bool(self._enforced)

    def _open(self) -> None:
        self._ledger.open()

    def _take(self, update: SourceUpdate | None) -> bool:
        """Translate an update of the source, unless the source has not synced: then its events are queued.

        The first translated update replaces closed workloads and includes all queued events. Returns whether objects
        changed.
        """
        if update is None:
            update = SourceUpdate((), self.objects.source_problems)
        if not self.source.has_synced:
            self._early += update.events
            self.objects.note_problems(update.problems)
            return False
        if self.closed:
            self.binder.expect_old_connections(self.closed.keys)
        queued = (*self.closed.release(), *self._early)
        is_news = bool(queued or update.events)
        if is_news:
            self.enforcement.record.begin()
        self._early.clear()
        self.objects.take(SourceUpdate((*queued, *update.events), update.problems))
        return is_news

    def _put_in_force_if_due(self) -> None:
        """Before the start: put the objects in force if the source has synced.

        If it has not synced after `CLOSE_S`, close workloads' interfaces.
        """
        if self.source.has_synced:
            self._put_in_force()
            return
        if self._clock() >= self._tell_at_s:
            self._tell_at_s = self._clock() + TELL_S
            log.warning("%s", self._not_synced())
        if self._clock() >= self._close_at_s:
            self._put_in_force()
            log.error("%s", self._not_synced())

    def _recall(self) -> None:
        """Restore the assignments of an earlier agent. Only the first call has an effect."""
        if not self.interfaces.has_recalled:
            self.interfaces.recall(self.enforcement.former_workloads(), self._node.attached())

    def _close_uncovered(self) -> None:
        """Before the start: take a snapshot, and close workloads' interfaces that no earlier agent's policy covers."""
        self._forget_gone()
        self.interfaces.look_for_roles()
        if self._enforced:
            self.binder.close_workloads()

    def _forget_gone(self) -> None:
        """Remove interfaces that no longer exist, before new interfaces with the same indices are seen."""
        gone = self.binder.gone()
        self.interfaces.forget(gone)
        self.binder.forget(gone)

    def _put_in_force(self) -> None:
        self._take_changes(older=set(self._ledger.numbers.endpoints))
        self._recall()
        self.interfaces.look()
        self.interfaces.recall_handovers()
        for handed in self._early_handovers:  # newer than the handovers in the file
            self.objects.handovers.add(handed)
        self._update_closed()
        self._take_changes()  # `look` has set the tunnels of the node's devices
        self.interfaces.locate()  # finds pods whose addresses only the CNI plugin reported
        self.binder.find_attached()
        self.domain_names.receive()
        self.enforcement.install()
        self.binder.take_over()
        self.is_started = True
        self.changes_seen += 1

    def step(self) -> list[ProgramEvent]:
        """Do all work that is due. Returns the events that the program reported since the last step.

        Before the start this checks whether the source has synced, and may raise the errors of `start`.
        """
        if not self.is_started:
            self.close_newborn()
            if self._node.network.has_news() or self._is_searching():
                self._close_uncovered()
            update = self.source.step(self.close_newborn) if self.source.wait_s() <= 0 else None
            self._take(update)
            self._put_in_force_if_due()
            return []
        self.interfaces.has_looked = False
        self.close_newborn()
        update = None
        if self.source.wait_s() <= 0:
            update = self.source.step(self.close_newborn)  # interfaces that appear meanwhile are handled below
        if self._node.network.has_news() or self._is_searching():
            self._forget_gone()
            self._look()
            self._update_closed()
            self.binder.reconcile()
            self.changes_seen += 1
        is_news = self._take(update)
        if is_news or self.objects.is_changed:
            self.changes_seen += 1
            self._bring_into_force(self._take_changes())
        elif self.rejected.retry_at_s is not None and self._clock() >= self.rejected.retry_at_s:
            self.changes_seen += 1
            self._bring_into_force(Changes())
        if self.interfaces.audit():
            self.binder.reconcile()
        self._step_names()
        self.enforcement.record.write_line()
        if self.repair.step():
            self._log_unenforced()
        return self.read_events()

    def _step_names(self) -> None:
        """Read what endpoints learned. A change of the tables that does not fit is reported like any other."""
        try:
            self.domain_names.step(self.enforcement.applier.bindings.keys())
        except (LimitError, MapFullError) as error:
            self.rejected.reject(error, self._clock())

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:
        """Remove the kept objects of a kind, see `Source.release`, and apply the change. Returns their names.

        Before the start they are removed from the objects that the start will put in force.
        """
        names = self.source.release(kind, is_trial=is_trial)
        if not is_trial:
            log.warning("an operator released %d objects of %s: %s", len(names), kind, ", ".join(names))
        if not is_trial and self.is_started:
            self.source.note_news()
            self._take(self.source.step(self.close_newborn))
            self._bring_into_force(self._take_changes())
        return names

    def hand_over(self, handed: Handover) -> None:
        """Add a handover of the CNI plugin. The next step applies it; `missing_for` tells what is still missing."""
        if self.is_started:
            self.objects.handovers.add(handed)
        else:
            self._early_handovers.append(handed)

    @property
    def has_handovers(self) -> bool:
        """Whether a handover waits for the next step."""
        return self.objects.handovers.is_changed

    def missing_for(self, handed: Handover) -> str:
        """Why policy is not in force yet on an interface that was handed over; "" if it is in force."""
        if not self.is_started:
            return self._not_synced().message
        if not self.interfaces.is_there(handed):
            return f"the node has no interface {handed.name} with its other end where it was said to be"
        missing = self.objects.missing_for(handed)
        if missing:
            return missing
        if not self.binder.is_bound(handed.pod, handed.ifindex):
            rejected = self.rejected.problem
            return self.binder.why_unbound(handed.pod) if rejected is None else rejected.message
        is_attached = handed.ifindex in self.attachments.interfaces
        return "" if is_attached else f"interface {handed.name} has no programs"

    def close_newborn(self) -> None:
        """Attach the programs to interfaces that just appeared, before anything else is known about them.

        This takes little time. The programs deny everything until a step finds the workload of the interface, or
        detaches the programs because the interface is the node's own.
        """
        for link in self._node.network.take_born():
            self.binder.close_newborn(link)

    def read_events(self) -> list[ProgramEvent]:
        """The events that the program reported since the last call."""
        records: list[EventRecord] = []
        self._node.read_events(records.append)
        return [decode_event(record, self.enforcement.names) for record in records]

    def _take_changes(self, older: frozenset[EndpointKey] | set[EndpointKey] = frozenset()) -> Changes:
        changes = self.objects.take_changes(older, self.interfaces.is_idle)
        self.interfaces.forget_missing()
        return changes

    def _bring_into_force(self, changes: Changes) -> None:
        """Compile changes and apply them.

        A change that does not fit is reported. It is tried again with the next change, and at intervals if the kernel
        had no memory.
        """
        if not changes and not self.enforcement.is_pending:
            self.enforcement.record.drop()
            return
        self.enforcement.record.begin()
        self.rejected.expect(changes, self._location_of)
        before = self.own_interfaces.inputs
        if self.enforcement.is_pending:
            self.domain_names.receive()
        try:
            self.enforcement.apply(changes)
        except (LimitError, MapFullError) as error:
            self.rejected.reject(error, self._clock())
            if (
                self.own_interfaces.inputs is not before
            ):  # interfaces that the change would have released need their rows again
                self.own_interfaces.inputs = before
                self.interfaces.locate()  # the change may have removed workloads
                self.binder.reconcile()
            return
        self.rejected.accept()
        if self.binder.is_waiting() and not self.interfaces.has_looked:
            self._look()  # the kernel does not notify of addresses in a pod's namespace
        else:
            self.interfaces.locate()
        self.binder.reconcile()

    def _look(self) -> None:
        self.interfaces.look(self.enforcement.bound)

    def _update_closed(self) -> None:
        """Before any object is known: update the endpoint of each workload's interface, see `ClosedWorkloads`."""
        if not self.source.has_synced:
            events = self.closed.update(self.interfaces.with_evident_addresses())
            self.objects.take(SourceUpdate(events, self.objects.source_problems))

    def _is_searching(self) -> bool:
        """Whether to search the interfaces without a notification.

        The reason is an address that may appear late, a workload without an interface, or an attachment that failed.
        """
        return self.interfaces.is_search_due() and (
            bool(self.attachments.problems)
            or (self.is_started and self.binder.is_waiting())
            or self.interfaces.is_curious()
        )

    # --- problems ---------------------------------------------------------------------------------------------------

    @property
    def problems(self) -> list[Problem]:
        """All reasons why the node does not enforce exactly what the objects state."""
        if not self.is_started:
            found = [*self.objects.source_problems, *self.attachments.problems, *self.interfaces.conflicts()]
            return [*found, *self.interfaces.file_problems, self._not_synced()]
        own = self.own_interfaces
        found = [*self.objects.source_problems, *own.problems(self.objects.world.endpoints, self.objects.location)]
        found += [*self.objects.disputes(), *self.binder.problems, *self.attachments.problems, *self.binder.warnings]
        found += [*self.barrier.problems, *self.repair.other_programs]
        found += [one for one in (self.rejected.problem, self.repair.failure, own.no_room) if one is not None]
        found += [*self.interfaces.conflicts(), *self.unenforced(), *self.interfaces.file_problems]
        found += [*self.enforcement.name_problems, *self.domain_names.problems]
        if not self.source.has_synced:
            found.append(self._not_synced())
        return [*found, *self.objects.handovers.problems]

    def _not_synced(self) -> Problem:
        """The problem that the source has not synced: what is not read yet, and which policy is in force meanwhile."""
        missing = [
            f"{one['source']} ({', '.join(one['waiting_for'][:SHOWN])}{', ...' if one['waiting_for'][SHOWN:] else ''})"
            for one in self.source.report()
            if not one["synced"]
        ]
        if self.is_started:
            stays = "nothing was in force, so the workloads of this node are closed, except for connections of the node"
            unknown = self.attachments.interfaces - self.enforcement.bound - set(self.own_interfaces.interfaces)
            if unknown:
                stays += f", which do not reach {self._shown(unknown)} either (its address is not known)"
        elif self.keeps_enforcement:
            stays = "what an earlier agent put in force stays"
            uncovered = self.attachments.interfaces - self._enforced
            if uncovered:
                stays += f", {self._shown(uncovered)} and other new interfaces of workloads are closed"
        else:
            stays = "nothing is in force yet"
        message = f"the agent waits for all objects of {' and '.join(missing)}: {stays}, and changes are not applied"
        return Problem(Location(""), "", message, slug=NOT_SYNCED)

    def _shown(self, interfaces: Collection[int]) -> str:
        names = sorted(map(self._name_of, interfaces))
        return f"{', '.join(names[:SHOWN])}{', ...' if names[SHOWN:] else ''}"

    def unenforced(self) -> list[Problem]:
        """Problems of this node's workloads on which policy is not enforced as written."""
        found = self.interfaces.unenforced(self.attachments.interfaces, self.enforcement.bound)
        return [*found, *self.objects.without_namespace()]

    def _log_unenforced(self) -> None:
        """Log the workloads that became unenforced or enforced. A workload can become unenforced by time alone."""
        self._unenforced_log.note(self.unenforced())

    def _name_of(self, ifindex: int) -> str:
        return self.interfaces.wiring.name_of(ifindex)

    def _location_of(self, key: object) -> Location:
        return self.objects.location(key) if isinstance(key, EndpointKey) else Location("")
