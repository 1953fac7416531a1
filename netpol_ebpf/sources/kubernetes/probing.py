# SPDX-License-Identifier: Apache-2.0
"""Probes of the API server: whether it still has the cluster's state, and whether it now offers kinds that were absent.

A server that has lost its etcd seems to work: watches stay open, bookmarks arrive, `/readyz` returns ok. Only a read
without resourceVersion gets no answer then, so the probe is such a read. It also shows, by its older resourceVersion,
that etcd was restored from a backup. After a restore, a WATCH from a resourceVersion that was lost never reports
anything.

An absent kind may be installed later. The probe reads the list of kinds of its API group, once for all kinds of the
group. A kind that the list lacks may still exist, because groups can lack kinds for a moment after a start.

Invariant: a probe changes no object. Its result becomes a problem, or causes a new list.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus

from netpol_ebpf.errors import Location, Problem, UnreachableError
from netpol_ebpf.sources.kubernetes.cache import Cache
from netpol_ebpf.sources.kubernetes.decoding import MalformedError, WatchedKind, decode_offered, decode_page
from netpol_ebpf.sources.kubernetes.watching import KindWatcher, State, Transport

SHORTEST_PERIOD_S = 60.0
NODES_PER_S = 10.0
"""Number of nodes that probe per second in a large cluster; each node's period grows with the number of nodes. A probe
reads one object, and once more for each API group with absent kinds."""
ABSENT_PERIODS = 10
"""Number of probe periods after which the agent lists an absent kind, even if its API group does not contain the
kind."""
ANSWER_S = 10.0
RETRY_S = 15.0
"""Seconds until the next probe after a failed one. The second failure in a row is reported."""
TOLD_AFTER = 2
BEHIND_PROBES = 3
"""A WATCH is opened again if its resourceVersion is below that of so many successive probes. A working WATCH gets a
bookmark each minute."""
CUT_OFF = "cut-off"

log = logging.getLogger(__name__)


def version_number(text: str) -> int | None:
    """A resourceVersion as a number; None if it is not a decimal number. Within one kind, a larger number is newer."""
    is_number = text.isascii() and text.isdigit() and not text.startswith("0")
    return int(text) if is_number else None


def period_s(nodes: int) -> float:
    """Seconds between two probes of one node, on average. ``nodes``: the number of nodes in the cluster."""
    return max(SHORTEST_PERIOD_S, nodes / NODES_PER_S)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(slots=True)
class FreshnessProbe:
    """Probes the server: reads one object of the built-in kind with the newest known resourceVersion.

    ``wake``: triggers the next step of a kind at once. ``chance``: returns random numbers from [0, 1). ``wall``:
    returns the time of day, for messages.
    """

    transport: Transport
    cache: Cache
    watchers: Mapping[WatchedKind, KindWatcher]
    wake: Callable[[WatchedKind], None]
    chance: Callable[[], float] = random.random
    wall: Callable[[], str] = _now
    confirmed: str = ""
    """When a probe was last answered; "" if none was."""
    went_back: int = 0
    """How many times the server went back to an older resourceVersion, for example because etcd was restored from a
    backup."""
    went_back_at: str = ""
    """When the server last went back; "" if it never did."""
    _failures: int = 0
    _behind: Counter[WatchedKind] = field(default_factory=Counter)
    _reopened: set[WatchedKind] = field(default_factory=set)
    _last_seen: int = 0

    def period_s(self) -> float:
        """Seconds until the next probe: a random number between half and one and a half times the average."""
        nodes = sum(len(store.entries) for kind, store in self.cache.stores.items() if kind.kind == "Node")
        return period_s(nodes) * (0.5 + self.chance())

    def step(self) -> float:
        """Make one probe. Returns the seconds until the next one."""
        newest = self._newest()
        if newest is None:  # nothing was listed yet, which is reported elsewhere
            return RETRY_S
        kind, watermark = newest
        try:
            version = self._ask(kind)
        except (UnreachableError, MalformedError) as error:
            return self._failed(str(error))
        self._failures, self.confirmed = 0, self.wall()
        self.cache.note(CUT_OFF, None)
        number = version_number(version)
        if number is None:
            raise AssertionError("a built-in kind has numbers")
        if number < watermark:
            log.warning(
                "the API server went back from resourceVersion %d to %d, as after a restored backup: all kinds are listed again",
                watermark,
                number,
            )
            self.went_back, self.went_back_at = self.went_back + 1, self.confirmed
            self._behind.clear()
            self._last_seen = 0
            for one, watcher in self.watchers.items():
                watcher.relist()
                self.wake(one)
        else:
            self._reopen_what_is_behind()
            self._last_seen = number
        self._look_for_new_kinds()
        return self.period_s()

    def _newest(self) -> tuple[WatchedKind, int] | None:
        """The built-in kind with the newest known resourceVersion, and that version; None if no kind was listed yet.

        One read of this kind shows whether the server lacks a state that any kind has.
        """
        stores = self.cache.stores.items()
        known = [(version_number(store.resource_version), kind) for kind, store in stores if not kind.is_custom]
        numbers = [(number, str(kind), kind) for number, kind in known if number is not None]
        if not numbers:
            return None
        number, _, kind = max(numbers)
        return kind, number

    def _ask(self, kind: WatchedKind) -> str:
        answer = self.transport.get(f"{kind.path}?limit=1", head_s=ANSWER_S, idle_s=ANSWER_S)
        try:
            if answer.status != HTTPStatus.OK:
                raise UnreachableError(f"it answers {answer.status} to a consistent read of {kind}", hint="")
            return decode_page(answer.body()).resource_version
        finally:
            answer.close()

    def _look_for_new_kinds(self) -> None:
        """Trigger a list of the absent kinds that their API group now contains."""
        absent: dict[str, list[WatchedKind]] = {}
        for kind, watcher in self.watchers.items():
            if watcher.state in (State.ABSENT, State.DELETED):
                absent.setdefault(kind.group_path, []).append(kind)
        for path, kinds in absent.items():
            try:
                answer = self.transport.get(path, head_s=ANSWER_S, idle_s=ANSWER_S)
                try:
                    offered = decode_offered(answer.body()) if answer.status == HTTPStatus.OK else set()
                finally:
                    answer.close()
            except (UnreachableError, MalformedError) as error:
                log.info("%s was not read (%s); it is asked for again", path, error)
                continue
            for kind in kinds:
                if kind.plural in offered:
                    self.wake(kind)

    def _failed(self, reason: str) -> float:
        self._failures += 1
        if self._failures >= TOLD_AFTER:
            since = f"since {self.confirmed}" if self.confirmed else "since the start"
            message = (
                f"the API server has confirmed nothing {since} ({reason}): what was last known stays in force, and later "
                "changes may be missing; see whether this node reaches the API server, and the API server its etcd"
            )
            self.cache.note(CUT_OFF, Problem(Location("/"), "", message, slug=CUT_OFF))
        return RETRY_S * (0.5 + self.chance())

    def _reopen_what_is_behind(self) -> None:
        """Reopen each WATCH that is behind the probes.

        The server of such a WATCH may be cut off from etcd while another server answers the probes. Then the WATCH does
        not end by itself.
        """
        for kind, watcher in self.watchers.items():
            number = version_number(self.cache.stores[kind].resource_version)
            if number is None or number >= self._last_seen:
                del self._behind[kind]
                self._reopened.discard(kind)
                continue
            self._behind[kind] += 1
            # A WATCH is reopened once, and again only after its resourceVersion has advanced: the bookmarks of some
            # servers do not advance when other kinds change.
            if self._behind[kind] >= BEHIND_PROBES and kind not in self._reopened:
                log.info("the WATCH of %s is behind the cluster and is opened anew", kind)
                self._reopened.add(kind)
                watcher.abort()
