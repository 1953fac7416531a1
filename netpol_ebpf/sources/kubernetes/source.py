# SPDX-License-Identifier: Apache-2.0
"""A cluster as a source: threads watch its API server, and make an eventfd readable when there are changes.

There is one thread for each kind, one that probes the server, and one that writes the saved state. No thread waits for
the caller of `KubernetesSource.step`, and that method waits for no thread.

Invariant: an exception in a thread ends neither the thread nor enforcement. The exception is reported as a bug, and the
kind is listed again.
"""

from __future__ import annotations

import logging
import math
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from netpol_ebpf.errors import InvalidInputError, Location, Problem, UnreachableError
from netpol_ebpf.resources.manifest_files import never_pause
from netpol_ebpf.sources.kubernetes.cache import Cache
from netpol_ebpf.sources.kubernetes.client import Client, Cluster
from netpol_ebpf.sources.kubernetes.decoding import KINDS, MalformedError, WatchedKind
from netpol_ebpf.sources.kubernetes.probing import ABSENT_PERIODS, CUT_OFF, FreshnessProbe
from netpol_ebpf.sources.kubernetes.saved_state import load_state, store_state
from netpol_ebpf.sources.kubernetes.watching import KindWatcher
from netpol_ebpf.sources.source import KEEPS_NOTHING, SourceUpdate

SYNC_S = 60.0
"""Time limit in seconds for the first state of the cluster. It is longer than GRACE_S, after which a failure is
reported, and longer than a list of the largest clusters takes."""
RESTORE_S = 10.0
"""Time limit in seconds for the first state of the cluster, if nothing is in force on this node and a saved state can
be applied."""
SHOWN_KINDS = 5
SAVE_S = 10.0
"""Seconds between two checks whether the saved state is out of date. The number is arbitrary."""
AFTER_BUG_S = 60.0
END_S = 5.0
"""Time limit in seconds for threads to end. A thread that still waits for a plugin or a connection then ends later by
itself."""
RESTORED, SAVED, BUG = "restored", "saved-state", "bug"

log = logging.getLogger(__name__)


def _iso(seconds: float) -> str | None:
    """A time since 1970 as UTC, ISO 8601; None for 0."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else None


class KindState(NamedTuple):
    """The state of one kind, for ``status``.

    ``kept``: the number of objects in force although the kind's definition was deleted. ``lists``, ``watches``: the
    numbers of requests so far. ``gaps``: how many times events were lost, so that the kind was listed again.
    ``last_sync``: when the last list, event or bookmark arrived, in UTC, ISO 8601; None: never.
    """

    kind: str
    state: str
    is_synced: bool
    objects: int
    kept: int
    resource_version: str
    lists: int
    watches: int
    gaps: int
    last_sync: str | None


@dataclass(slots=True)
class KubernetesSource:
    """A `Source` that watches one cluster.

    ``state_path``: the file of the saved state; None: there is none. ``may_restore``: whether nothing is in force on
    this node, so that the saved state may be applied until the cluster was listed. ``clock``: returns the time in
    seconds.
    """

    cluster: Cluster
    state_path: Path | None = None
    may_restore: bool = False
    kinds: tuple[WatchedKind, ...] = KINDS
    clock: Callable[[], float] = time.monotonic
    client: Client = field(init=False)
    cache: Cache = field(init=False)
    watchers: dict[WatchedKind, KindWatcher] = field(init=False)
    probe: FreshnessProbe = field(init=False)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _wakes: dict[WatchedKind, threading.Event] = field(init=False)  # a set event triggers the kind's next step
    _threads: list[threading.Thread] = field(default_factory=list)
    _has_news: bool = False
    _reported: tuple[Problem, ...] = ()
    _saved_at: str = ""
    _restore_at_s: float = math.inf
    _saves: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInputError if the address of the server or of the proxy is not a URL."""
        self.client = Client(self.cluster)
        self.cache = Cache(self.kinds)
        self.watchers = {
            kind: KindWatcher(kind, self.client, self.cache.stores[kind], self._pace_s) for kind in self.kinds
        }
        self._wakes = {kind: threading.Event() for kind in self.kinds}
        self.probe = FreshnessProbe(self.client, self.cache, self.watchers, lambda kind: self._wakes[kind].set())

    # --- what a source is -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The URL of the server."""
        return self.cluster.server

    @property
    def has_synced(self) -> bool:
        """Whether a complete state was returned: that of the cluster, or the saved one if it may be applied."""
        return self.cache.is_given

    @property
    def skipped(self) -> Mapping[str, int]:
        """Always empty, because this source lists only kinds that it reads."""
        return {}

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems of the cluster's objects, of its server, and of the saved state."""
        return self.cache.problems()

    def begin(self) -> None:
        """See `Source`.

        If nothing is in force on this node, and the cluster was not listed within `RESTORE_S`, then `step` returns the
        saved state.
        """
        self._load()
        self._start()
        if self.may_restore and self._saved_at:
            self._restore_at_s = self.clock() + RESTORE_S

    def sync(self) -> SourceUpdate:
        """Begin to watch the cluster, and wait for its first state.

        Raises UnreachableError if a kind could not be listed in time. The policy in force then stays in force.
        """
        self.begin()
        until_s = min(self.clock() + SYNC_S, self._restore_at_s)
        while not self.cache.has_synced and self.clock() < until_s:
            select.select([self.fileno()], [], [], max(0.0, until_s - self.clock()))
            self.cache.calm()
        update = self.step()
        if not self.has_synced:
            raise self._unsynced()
        return update or SourceUpdate((), self.problems)

    def fileno(self) -> int:
        """The eventfd of the cache."""
        return self.cache.descriptor

    def note_news(self) -> None:
        """See `Source`."""
        self.cache.calm()
        self._has_news = True

    def wait_s(self) -> float:
        """See `Source`. 0 after `note_news`, or when the saved state must be returned. Otherwise no step is due."""
        if self._has_news:
            return 0.0
        return math.inf if self.has_synced else max(0.0, self._restore_at_s - self.clock())

    def step(self, pause: Callable[[], None] = never_pause) -> SourceUpdate | None:
        """See `Source`. Never waits for the server or for a thread that watches it."""
        self._has_news = False
        if self.cache.has_synced:
            self.cache.note(RESTORED, None)
        elif not self.has_synced and self.clock() >= self._restore_at_s:
            self._restore()
        events, problems = self.cache.drain(pause), self.problems
        if not events and problems == self._reported:
            return None
        self._reported = problems
        return SourceUpdate(events, problems)

    def close(self) -> None:
        """End the threads. If all have ended within END_S, also close the cache's eventfd.

        Otherwise the eventfd stays open, because a thread may still write to it.
        """
        self._stopped.set()
        for kind, watcher in self.watchers.items():
            watcher.relist()
            self._wakes[kind].set()
        until_s = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            self.cache.close()

    # --- beyond that ----------------------------------------------------------------------------------------------------------

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:
        """See `Source`. ``kind``: the kind's name in ``status``, such as ``tiers.projectcalico.org``."""
        for one, store in self.cache.stores.items():
            if str(one) == kind and store.orphans:
                names = self.cache.orphans(one) if is_trial else self.cache.release(one)
                return tuple("/".join(part for part in (one.kind, *name) if part) for name in names)
        kept = ", ".join(str(one) for one, store in self.cache.stores.items() if store.orphans) or "no kind"
        raise InvalidInputError(
            f"nothing of {kind} is kept: objects whose definition was deleted are kept of {kept}", hint=KEEPS_NOTHING
        )

    def states(self) -> list[KindState]:
        """The state of every kind, for ``status``.

        The method takes no lock, because it runs in a forked child, in which a lock of another thread is never
        released. So the result may lack a change that a thread made at the time of the fork.
        """
        return [
            KindState(
                str(kind),
                self.watchers[kind].state.value,
                store.is_synced,
                len(store.entries),
                len(store.orphans),
                store.resource_version,
                self.watchers[kind].lists,
                self.watchers[kind].watches,
                self.watchers[kind].gaps,
                _iso(self.watchers[kind].synced_at),
            )
            for kind, store in self.cache.stores.items()
        ]

    def report(self) -> tuple[Mapping[str, Any], ...]:
        """See `Source`, whose fields come first.

        ``restored``: whether the saved state is in force. ``confirmed``: when the server last answered a probe; None:
        never. ``cut_off``: whether the server no longer answers probes. ``stale_since``: since when changes may be
        missing; None: no changes are missing, or the time is not known. Times are in UTC, ISO 8601. ``kinds``: see
        `KindState`. ``went_back``, ``went_back_at``: how many times the server went back to an older state, and the
        last time (None: never).
        """
        noted = self.cache.noted
        confirmed = self.probe.confirmed or None
        is_restored, is_cut_off = RESTORED in noted, CUT_OFF in noted
        state: dict[str, Any] = {
            "source": self.name,
            "type": "kubernetes",
            "synced": self.has_synced,
            "waiting_for": [str(kind) for kind in self.cache.unsynced],
            "behind": [
                *([f"the saved state of {self._saved_at} is in force"] if is_restored else ()),
                *([f"the server has confirmed nothing since {confirmed or 'the start'}"] if is_cut_off else ()),
                *(f"{kind}: {problem.slug}" for kind, problem in self._unwatched()),
            ],
            "restored": is_restored,
            "confirmed": confirmed,
            "cut_off": is_cut_off,
            "stale_since": self._saved_at if is_restored else confirmed if is_cut_off else None,
            "kinds": [one._asdict() for one in self.states()],
            "went_back": self.probe.went_back,
            "went_back_at": self.probe.went_back_at or None,
        }
        return (state,)

    def _unwatched(self) -> Iterator[tuple[WatchedKind, Problem]]:
        """The kinds that are not watched now, with the reason."""
        for kind, store in self.cache.stores.items():
            problem = store.problem  # read only once, because a thread may replace the problem at any time
            if problem is not None:
                yield kind, problem

    def save(self) -> float:
        """Write the saved state if it is out of date. Returns the seconds until the next check."""
        changes = self.cache.saves
        if self.state_path is None or not self.cache.has_synced or changes == self._saves:
            return SAVE_S
        try:
            store_state(self.state_path, self.cache.saved())
            self._saves = changes
            self.cache.note(SAVED, None)
        except OSError as error:
            message = (
                f"the state of the cluster cannot be saved ({error.strerror}): a node that starts while the API server is "
                "away has an old one, or none"
            )
            problem = Problem(Location(str(self.state_path)), "", message, severity="warning", slug=SAVED)
            self.cache.note(SAVED, problem)
        return SAVE_S

    def _restore(self) -> None:
        """Put the saved state in force, until the cluster has been listed."""
        message = (
            f"the API server could not be read at the start: the state that was saved at {self._saved_at} is in force, "
            "and later changes are missing"
        )
        self.cache.note(RESTORED, Problem(Location("/"), "", message, slug=RESTORED))
        self.cache.restore()

    def _unsynced(self) -> UnreachableError:
        """The error that not all kinds were listed, with the kinds and the reasons."""
        unsynced = self.cache.unsynced
        reasons = [one.message for kind in unsynced if (one := self.cache.stores[kind].problem) is not None]
        message = (
            f"{self.name}: {len(unsynced)} of {len(self.kinds)} kinds were not listed in {SYNC_S:.0f} s "
            f"({', '.join(map(str, unsynced[:SHOWN_KINDS]))}{', ...' if unsynced[SHOWN_KINDS:] else ''})"
        )
        return UnreachableError(
            f"{message}: {reasons[0]}" if reasons else message,
            hint="What is in force stays. See whether this node reaches the API server, and whether the agent may list these kinds.",
        )

    def _pace_s(self) -> float:
        return ABSENT_PERIODS * self.probe.period_s()

    def _start(self) -> None:
        for kind, watcher in self.watchers.items():
            self._begin(f"kubernetes-{kind}", watcher.step, self._wakes[kind], watcher.relist)
        self._begin("kubernetes-probe", self.probe.step, self._stopped)
        if self.state_path is not None:
            self._begin("kubernetes-state", self.save, self._stopped)

    def _load(self) -> None:
        if self.state_path is None:
            return
        try:
            state = load_state(self.state_path)
            if state is not None:
                self.cache.load(state.of(self.kinds))
                self._saved_at = state.saved
        except (OSError, MalformedError) as error:
            message = (
                f"the saved state of the cluster cannot be read ({error}); nothing of it is used, and it is replaced"
            )
            self.cache.note(SAVED, Problem(Location(str(self.state_path)), "", message, slug=SAVED))

    def _begin(
        self, name: str, step: Callable[[], float], wake: threading.Event, after_bug: Callable[[], None] = lambda: None
    ) -> None:
        arguments = (name, step, wake, after_bug)
        thread = threading.Thread(target=self._run, args=arguments, name=name[:15], daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, name: str, step: Callable[[], float], wake: threading.Event, after_bug: Callable[[], None]) -> None:
        while not self._stopped.is_set():
            try:
                delay_s = step()
                self.cache.note(f"{BUG} {name}", None)
            except Exception:  # the one place where a bug in a thread is caught: it is reported, and the thread goes on
                log.exception("bug: %s failed", name)
                message = (
                    f"{name}: a bug, which the log tells; what was last known stays in force, and it is tried again"
                )
                self.cache.note(f"{BUG} {name}", Problem(Location("/"), "", message, slug=BUG))
                after_bug()
                delay_s = AFTER_BUG_S
            if wake.wait(delay_s) and not self._stopped.is_set():
                wake.clear()
