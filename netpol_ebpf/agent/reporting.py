# SPDX-License-Identifier: Apache-2.0
"""The threads that report to the API server.

One thread writes this node's report. Three other threads work only while this agent is the elected leader.

The agent's loop calls `Reporting.look`, which never waits. The threads get copies of the agent's data. Invariant: an
exception in a thread ends neither the thread nor enforcement; it becomes a warning.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.policies_in_force import PoliciesInForce
from netpol_ebpf.errors import Location, Problem, UnreachableError
from netpol_ebpf.sources.kubernetes.client import Client, Cluster
from netpol_ebpf.sources.kubernetes.watching import KindWatcher
from netpol_ebpf.status.conditions import ROUND_S, ConditionWriter, View
from netpol_ebpf.status.election import Election
from netpol_ebpf.status.kinds import kind_at
from netpol_ebpf.status.report import COLLECTION
from netpol_ebpf.status.watched_reports import REPORTS, ReportStore
from netpol_ebpf.status.writer import ABSENT_RETRY_S, SLUG, ReportWriter

LOOK_S = 0.5
"""Least seconds between two calls of `PoliciesInForce.look` after a change. The number is arbitrary."""
SLOW_LOOK_S = 10.0
"""The same in seconds if nothing changed. Without a change a workload can become unenforced because time passes."""
IDLE_S = 3600.0
END_S = 5.0
"""Time limit in seconds for threads to end. A thread that still waits for a connection then ends later by itself."""
AFTER_BUG_S = 60.0
LOOK = "the look at the policies in force"

log = logging.getLogger(__name__)


class Reporting:
    """Reports what this agent has in force, and writes conditions of policies where this agent is the elected leader.

    Callers call `look` after each step of the agent.
    """

    def __init__(self, agent: Agent, cluster: Cluster, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        client = Client(cluster)
        self.writer = ReportWriter(client, node)
        self.election = Election(client, node)
        self.conditions = ConditionWriter(client, node)
        self.store = ReportStore()
        self.watcher = KindWatcher(REPORTS, client, self.store, lambda: ABSENT_RETRY_S)
        self._agent = agent
        self._clock = clock
        self._policies = PoliciesInForce(agent)
        self._view: View | None = None
        self._seen = -1
        self._looked_s = -math.inf
        self._viewed = -1
        self._refused = ""  # why conditions or Events are not written now
        self._bugs: dict[str, str] = {}
        self._stopped = threading.Event()
        self._leads = threading.Event()  # wakes the watcher when this agent begins to lead
        self._threads: list[threading.Thread] = []

    # --- in the agent's loop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads."""
        steps: tuple[tuple[str, Callable[[], float], threading.Event], ...] = (
            ("status-report", self.writer.step, self.writer.wake),
            ("status-lease", self._elect, self._stopped),
            ("status-watch", self._watch, self._leads),
            ("status-write", self._lead, self._stopped),
        )
        for name, step, wake in steps:
            thread = threading.Thread(target=self._run, args=(name, step, wake), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def look(self) -> None:
        """Give the threads the present state, if it may have changed."""
        try:
            self._look()
        except Exception as error:  # a bug in a report must not end enforcement's loop
            log.exception("bug: the policies in force cannot be reported")
            self._bugs[LOOK] = f"a bug, which the log tells ({type(error).__name__}: {error})"
            self._looked_s = self._clock() + AFTER_BUG_S

    def _look(self) -> None:
        agent, now_s = self._agent, self._clock()
        is_changed = agent.changes_seen != self._seen
        if not agent.is_in_force or now_s < self._looked_s + (LOOK_S if is_changed else SLOW_LOOK_S):
            return
        self._seen, self._looked_s = agent.changes_seen, now_s
        status = self._policies.look()
        self._bugs.pop(LOOK, None)
        self.election.nodes = status.nodes
        self.writer.offer(status)
        if self.election.is_leading and self._viewed != self._seen:
            self._viewed = self._seen
            self._view = self._copy()

    def _copy(self) -> View:
        """A copy of the cluster's state for the leader. Mappings are copied; the objects in them are shared."""
        objects = self._agent.objects
        world, get = objects.world, objects.derivation.get
        resources = {key: get(key) for key in world.policies}
        revisions = {key: "" if one is None else one.meta.revision for key, one in resources.items()}
        faults: dict[str, str] = {}
        for one in objects.source_problems:
            if one.severity == "error" and one.slug != "kept" and kind_at(one.location.file) is not None:
                faults.setdefault(one.location.file, f"{one.path}: {one.message}" if one.path else one.message)
        return View(dict(world.policies), dict(world.endpoints), revisions, faults)

    @property
    def problems(self) -> Iterable[Problem]:
        """Why reports or conditions are not written.

        These are warnings, because enforcement does not depend on them.
        """
        if self.writer.problem is not None:
            yield self.writer.problem
        found = dict(self._bugs)
        found["the Lease of the leading agent"] = self.election.problem
        if self.election.is_leading:
            found["conditions of policies"] = self._refused
            found["reports of nodes"] = self.store.fault if self.store.problem is None else self.store.problem.message
        for what, why in found.items():
            if why:
                message = f"{what}: {why}; what is in force stays in force"
                yield Problem(Location(COLLECTION), "", message, severity="warning", slug=SLUG)

    def close(self) -> None:
        """End the threads."""
        self._stopped.set()
        self.watcher.relist()
        self.writer.wake.set()
        self._leads.set()
        until_s = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # --- in the threads ---------------------------------------------------------------------------------------------

    def _elect(self) -> float:
        was = self.election.is_leading
        pause_s = self.election.step()
        if self.election.is_leading and not was:
            log.info("this agent now writes the conditions of policies for the cluster")
            self.conditions.forget()
            self._viewed = -1
            self._leads.set()
        return pause_s

    def _watch(self) -> float:
        """Watch the reports of all nodes while this agent leads. Each stream ends by itself after some minutes."""
        if not self.election.is_leading:
            self.watcher.relist()
            return IDLE_S
        return self.watcher.step()

    def _lead(self) -> float:
        view = self._view
        if self.election.is_leading and self.store.is_listed and view is not None:
            try:
                self.conditions.round(view, self.store.reports())
                self._refused = ""
            except UnreachableError as error:
                self._refused = error.message
        return ROUND_S

    def _run(self, name: str, step: Callable[[], float], wake: threading.Event) -> None:
        while not self._stopped.is_set():
            try:
                pause_s = min(step(), IDLE_S)
                self._bugs.pop(name, None)
            except Exception as error:  # the one place where a bug in a thread is told, and does not end it
                log.exception("bug: %s failed", name)
                self._bugs[name] = f"a bug, which the log tells ({type(error).__name__}: {error})"
                pause_s = AFTER_BUG_S
            if wake.wait(pause_s) and not self._stopped.is_set():
                wake.clear()
