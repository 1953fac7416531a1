# SPDX-License-Identifier: Apache-2.0
"""Periodic probes of the server: whether it still has the cluster's state, and whether it now offers absent kinds.

A server without connection to its etcd seems to work: watches stay open, bookmarks arrive, `/readyz` returns ok.  Only
a read without resourceVersion then has no answer.  The same read detects that etcd was restored from a backup, after
which a WATCH from a lost resourceVersion never reports anything.

An absent kind may be installed later.  The probe reads the kind's API group, once for all kinds of the group; a kind
that is missing in the group is not proven absent, since groups can lack kinds for a moment after a start.

Invariant: a probe changes no object; its result becomes a problem, or a new list.
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
"""Probes in a second by all nodes of a large cluster: a read of one object, and one for each group with absent kinds.
"""
ABSENT_PERIODS = 10
"""Periods after which an absent kind is listed itself, whatever its group contains."""
ANSWER_S = 10.0
RETRY_S = 15.0
"""Seconds until the next probe after a failed one; the second failure in a row is reported."""
TOLD_AFTER = 2
BEHIND_PROBES = 3
"""A WATCH with a resourceVersion below that of this many probes is opened again: on a working one a bookmark comes each
minute.
"""
CUT_OFF = "cut-off"

log = logging.getLogger(__name__)


def version_number(text: str) -> int | None:
    """A resourceVersion as a number: larger is newer within one kind. None for one that is not a decimal number."""
    is_number = text.isascii() and text.isdigit() and not text.startswith("0")
    return int(text) if is_number else None


def period_s(nodes: int) -> float:
    """Seconds between two probes of one node, on average."""
    return max(SHORTEST_PERIOD_S, nodes / NODES_PER_S)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(slots=True)
class FreshnessProbe:
    """Reads one object of the kind with the newest known resourceVersion, among kinds that etcd alone serves.

    ``wake``: triggers a kind's next step now; ``wall``: the time of day, for messages.
    """

    transport: Transport
    cache: Cache
    watchers: Mapping[WatchedKind, KindWatcher]
    wake: Callable[[WatchedKind], None]
    chance: Callable[[], float] = random.random
    wall: Callable[[], str] = _now
    confirmed: str = ""
    """Time of the last answered probe; "" for none."""
    went_back: int = 0
    """How often the server went back to an older resourceVersion, as after a restored backup."""
    went_back_at: str = ""
    """Time when it last did; "" for never."""
    _failures: int = 0
    _behind: Counter[WatchedKind] = field(default_factory=Counter)
    _reopened: set[WatchedKind] = field(default_factory=set)
    _last_seen: int = 0

    def period_s(self) -> float:
        """Period of the next probe, at random between half and one and a half times the average."""
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
        """The kind with the highest resourceVersion, so that one read covers all kinds; and its present version."""
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
        """Reopen a WATCH at a server that is cut off while another server answers: such a WATCH does not end by itself."""
        for kind, watcher in self.watchers.items():
            number = version_number(self.cache.stores[kind].resource_version)
            if number is None or number >= self._last_seen:
                del self._behind[kind]
                self._reopened.discard(kind)
                continue
            self._behind[kind] += 1
            # Once, until it moves: there are servers whose bookmarks do not follow other kinds.
            if self._behind[kind] >= BEHIND_PROBES and kind not in self._reopened:
                log.info("the WATCH of %s is behind the cluster and is opened anew", kind)
                self._reopened.add(kind)
                watcher.abort()
