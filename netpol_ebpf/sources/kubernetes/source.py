# SPDX-License-Identifier: Apache-2.0
"""The source behind a cluster: threads that follow its API server, and a descriptor that says when there is something to take.

One thread for each kind reads, one asks whether the server still speaks for the cluster, one keeps the saved state.  None of them
waits for whoever calls `KubernetesSource.drain`, and that call waits for none of them.

Invariant: an exception in a thread ends neither the thread nor enforcement: it is told as a bug, and the kind is listed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from netpol_ebpf.errors import InvalidInputError, Location, Problem
from netpol_ebpf.sources.files import SourceUpdate
from netpol_ebpf.sources.kubernetes.cache import Cache
from netpol_ebpf.sources.kubernetes.client import Client, Cluster
from netpol_ebpf.sources.kubernetes.decoding import KINDS, MalformedError, WatchedKind
from netpol_ebpf.sources.kubernetes.probing import Probe
from netpol_ebpf.sources.kubernetes.saved_state import load_state, store_state
from netpol_ebpf.sources.kubernetes.watching import KindWatcher

SAVE_S = 10.0
"""Between two looks whether the saved state must be replaced; arbitrary."""
AFTER_BUG_S = 60.0
END_S = 5.0
"""What threads may take to end; one that waits for a plugin or a connection is left to end by itself."""
RESTORED, SAVED, BUG = "restored", "saved-state", "bug"

log = logging.getLogger(__name__)


class KindState(NamedTuple):
    """What ``status`` says of one kind. ``kept``: objects in force although their definition was deleted."""

    kind: str
    state: str
    is_synced: bool
    objects: int
    kept: int
    resource_version: str


@dataclass(slots=True)
class KubernetesSource:
    """Follows one cluster. `start` it, `drain` it when ``descriptor`` is readable, `close` it.

    ``state_path``: the saved state, None to keep none.
    """

    cluster: Cluster
    state_path: Path | None = None
    kinds: tuple[WatchedKind, ...] = KINDS
    client: Client = field(init=False)
    cache: Cache = field(init=False)
    watchers: dict[WatchedKind, KindWatcher] = field(init=False)
    probe: Probe = field(init=False)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _saved_at: str = ""
    _saves: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInputError for a server or proxy that is no URL."""
        self.client = Client(self.cluster)
        self.cache = Cache(self.kinds)
        self.watchers = {
            kind: KindWatcher(kind, self.client, self.cache.stores[kind], self._pace_s) for kind in self.kinds
        }
        self.probe = Probe(self.client, self.cache, self.watchers)

    @property
    def descriptor(self) -> int:
        """Readable when `drain` has something to say."""
        return self.cache.descriptor

    @property
    def has_synced(self) -> bool:
        """Whether every kind was listed whole, or is known to be absent."""
        return self.cache.has_synced

    def start(self) -> None:
        """Load the saved state and begin to follow the cluster."""
        self._load()
        for kind, watcher in self.watchers.items():
            self._begin(f"kubernetes-{kind}", watcher.step, watcher.relist)
        self._begin("kubernetes-probe", self.probe.step)
        if self.state_path is not None:
            self._begin("kubernetes-state", self.save)

    def drain(self) -> SourceUpdate | None:
        """What changed, to be applied together, and all problems there are; None when neither is new. Never waits."""
        if self.cache.has_synced:
            self.cache.note(RESTORED, None)
        return self.cache.drain()

    def restore(self) -> bool:
        """Have the state of the last run in force until the cluster was listed: for a node on which nothing is in force. Whether there is one."""
        if not self._saved_at or self.cache.has_synced:
            return False
        message = (
            f"the API server has not been read since the start: the state that was saved at {self._saved_at} is in force, "
            "and later changes are missing"
        )
        self.cache.note(RESTORED, Problem(Location("/"), "", message, slug=RESTORED))
        self.cache.restore()
        return True

    def release(self, kind: str) -> int:
        """Forget what is kept of a kind (``tiers.projectcalico.org``) whose definition was deleted. How many objects that were.

        Raises InvalidInputError for a kind of which nothing is kept.
        """
        for one, store in self.cache.stores.items():
            if str(one) == kind and store.orphans:
                return self.cache.release(one)
        kept = ", ".join(str(one) for one, store in self.cache.stores.items() if store.orphans) or "no kind"
        raise InvalidInputError(f"nothing is kept of {kind}; it is of {kept}", hint="Name one of them.")

    def states(self) -> list[KindState]:
        """Every kind, as ``status`` shows it."""
        with self.cache.lock:
            return [
                KindState(
                    str(kind),
                    self.watchers[kind].state.value,
                    store.is_synced,
                    len(store.entries),
                    len(store.orphans),
                    store.resource_version,
                )
                for kind, store in self.cache.stores.items()
            ]

    def save(self) -> float:
        """Replace the saved state if it is old. The seconds until the next look."""
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

    def close(self) -> None:
        """End the threads, and give the descriptor back if they have ended."""
        self._stopped.set()
        for watcher in self.watchers.values():
            watcher.relist()
        until_s = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            self.cache.close()

    def _pace_s(self) -> float:
        return self.probe.period_s()

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

    def _begin(self, name: str, step: Callable[[], float], after_bug: Callable[[], None] = lambda: None) -> None:
        thread = threading.Thread(target=self._run, args=(name, step, after_bug), name=name[:15], daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, name: str, step: Callable[[], float], after_bug: Callable[[], None]) -> None:
        while not self._stopped.is_set():
            try:
                delay_s = step()
                self.cache.note(f"{BUG} {name}", None)
            except Exception:  # the one place where a bug in a thread is told, and does not end it
                log.exception("bug: %s failed", name)
                message = (
                    f"{name}: a bug, which the log tells; what was last known stays in force, and it is tried again"
                )
                self.cache.note(f"{BUG} {name}", Problem(Location("/"), "", message, slug=BUG))
                after_bug()
                delay_s = AFTER_BUG_S
            self._stopped.wait(delay_s)
