# SPDX-License-Identifier: Apache-2.0
"""The state machine that watches one kind: its next request, and the effect of the answer on the known objects.

    LISTING --complete--> WATCHING --clean end--> WATCHING (custom kind that ended early: LISTING)
       |                     |------expired, bad event, definition unread--> LISTING
       |--404, several times in a row--> ABSENT (no object was known) or DELETED (known objects stay in force)

The machine keeps no clock, opens no connection and starts no thread. `KindWatcher.step` makes one request through the
given transport and reads the answer to its end.

Invariants: a known object is removed for only three reasons: a DELETED event, a complete list without the object, or an
operator's release of orphans. A list is complete when its last page or its end mark was read. Objects of a deleted
CustomResourceDefinition stay: the deletion of a custom object counts only after a later read has shown that the
definition of its kind exists. No other answer removes an object.
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlencode

from netpol_ebpf.errors import Location, Problem, UnreachableError
from netpol_ebpf.sources.kubernetes.decoding import (
    Decoded,
    Definition,
    MalformedError,
    Name,
    Status,
    WatchedKind,
    decode_bookmark,
    decode_definition,
    decode_event,
    decode_object,
    decode_page,
    decode_status,
)

PAGE_OBJECTS = 500
"""Number of objects in one page of a LIST. A page of pods has about 3 MB."""
WATCH_S = 300.0
"""Shortest requested duration of a WATCH in seconds. Each request adds a random time of up to the same length, so that
nodes do not all reconnect at once."""
PREMATURE_S = 5.0
"""A WATCH that ends more than this many seconds before the requested duration counts as ended early. Servers normally
end it up to 2 s before."""
SHORT_S = 1.0
"""Duration in seconds. A stream that ends sooner and without an event counts as short, and the next stream is opened
only after a pause. The number is arbitrary."""
UNSTABLE = 3
"""Number of short streams in a row after which the kind counts as not watchable. From then on only an event or a list
counts as a success, not the opening of a stream."""
HASTY_STEPS = 5
"""Number of steps in a row that may each take less than SHORT_S without a pause after them. After each further short
step there is a pause, even if the step succeeded: lists that succeed, each followed by a stream that ends at once,
would otherwise be a busy loop. A start takes at most three short steps."""
HEAD_S = 20.0
"""Time limit in seconds for the head of an answer. It is shorter than the 60 s for which the server itself waits for
etcd."""
IDLE_S = 180.0
"""Longest silence of a WATCH in seconds: three periods of bookmarks."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
GRACE_S = 30.0
"""Seconds for which a failure is retried before it is reported as a problem. The reason is that a starting server
answers 403, 429 and 503 for up to 2 s."""
ABSENT_ANSWERS = 3
"""Number of 404 answers to a LIST, in a row, after which a kind counts as not installed."""
ABSENT_RETRY_S = 2.0
"""Seconds between two of the ABSENT_ANSWERS requests in a row.

No server was seen to answer 404 while it started, but the agent does not rely on that."""
STREAM_ATTEMPTS = 3
"""Number of streaming lists that may fail in a row before the watcher requests a LIST in pages instead."""

_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _GONE, _TOO_MANY, _ERROR, _TIMEOUT = 401, 403, 404, 410, 429, 500, 504
_OURS = frozenset({400, 405, 406, 415, 422})
"""HTTP codes that mean that the request is faulty, so that a retry cannot succeed."""
_TRANSIENT_IN_STREAM = frozenset({_UNAUTHORIZED, _FORBIDDEN, _GONE, _TOO_MANY, 503, _TIMEOUT})


class ServerAnswer(Protocol):
    """An answer whose head was read. ``retry_after_s``: from the header Retry-After; None without the header."""

    @property
    def status(self) -> int: ...  # noqa: D102

    @property
    def retry_after_s(self) -> float | None: ...  # noqa: D102

    def body(self) -> bytes:
        """The whole body. Raises UnreachableError if it is truncated."""

    def lines(self) -> Iterator[bytes]:
        """The lines of a WATCH until the stream ends cleanly.

        Raises UnreachableError if the stream is truncated, or silent for too long.
        """

    def abort(self) -> None:
        """End the connection, from another thread. The reading thread then gets an error."""

    def close(self) -> None:
        """Close the connection."""


class Transport(Protocol):
    """Makes HTTP requests."""

    def get(self, target: str, *, head_s: float, idle_s: float, metadata_only: bool = False) -> ServerAnswer:
        """Send a GET request; returns when the head of the answer has been read. Raises UnreachableError.

        ``head_s``: time limit in seconds for the head. ``idle_s``: longest silence in seconds in the body.
        ``metadata_only``: ask for the metadata of one object; for a list a server would answer 406.
        """


class Store(Protocol):
    """The objects of one kind. ``definition_uid``: the uid of its CustomResourceDefinition, "" if none was seen."""

    definition_uid: str
    resource_version: str

    @property
    def is_empty(self) -> bool: ...  # noqa: D102

    def prepare(self, decoded: Decoded) -> object:
        """Parse an object; returns its entry for `put` or `commit`."""

    def put(self, name: Name, entry: object) -> None:
        """Store under ``name`` the entry that `prepare` returned."""

    def remove(self, name: Name) -> None:
        """Remove an object."""

    def orphan(self, name: Name) -> None:
        """Mark an object as an orphan, which stays in force.

        The server deleted it together with the definition of its kind.
        """

    def missing(self, staged: Mapping[Name, object]) -> set[Name]:
        """The names of known objects that a complete list lacks, without orphans. ``staged``: the list, by name."""

    def commit(self, staged: Mapping[Name, object], *, orphaned: set[Name]) -> None:
        """Replace all objects by a complete list, in one step.

        Known objects that the list lacks are removed, except ``orphaned`` ones and earlier orphans.
        """

    def commit_absent(self) -> None:
        """Record that the server does not have the kind. Its known objects are kept as orphans."""

    def note(self, problem: Problem | None) -> None:
        """Set the problem that says why the kind is not watched now; None if it is watched."""


class State(enum.Enum):
    """The state of a kind's watch. Users see the values."""

    LISTING = "listing"
    WATCHING = "watching"
    WAITING = "waiting to retry"
    ABSENT = "not installed"
    DELETED = "definition deleted"


class RefusedError(Exception):
    """The server answered with an error. ``in_stream``: the error was an ERROR event of a WATCH."""

    def __init__(self, status: Status, *, in_stream: bool = False) -> None:
        super().__init__(f"{status.code} {status.reason}: {status.message}")
        self.status = status
        self.in_stream = in_stream


class _RelistError(Exception):
    """The WATCH cannot continue from the known state, so the kind must be listed again."""


@dataclass(slots=True)
class KindWatcher:
    """Watches one kind.

    ``pace_s``: returns the seconds, partly random, until an absent kind is listed again. ``clock``: returns the time in
    seconds. ``chance``: returns random numbers from [0, 1). ``wall``: returns the seconds since 1970. ``lists``,
    ``watches``: the numbers of requests so far. ``synced_at``: when the last list, event or bookmark arrived, in
    seconds since 1970; 0: never.
    """

    kind: WatchedKind
    transport: Transport
    store: Store
    pace_s: Callable[[], float]
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    wall: Callable[[], float] = time.time
    state: State = State.LISTING
    gaps: int = 0
    """How many times the server had no events since the known resourceVersion, so that the kind was listed again."""
    lists: int = 0
    watches: int = 0
    synced_at: float = 0.0
    _resource_version: str = ""  # where the next WATCH begins; "": a LIST comes first
    _streams: bool = True
    _stream_failures: int = 0
    _failures: int = 0
    _failing_since_s: float | None = None
    _expired: int = 0
    _not_found: int = 0
    _short_streams: int = 0
    _hasty_steps: int = 0  # in a row
    _opened_s: float | None = None  # since when this step's stream is open
    _must_relist: bool = False
    _answer: ServerAnswer | None = field(default=None)

    def step(self) -> float:
        """Make one request and read its answer to the end. Returns the seconds until the next step.

        This method raises no error for an answer of the server.
        """
        began_s = self.clock()
        delay_s = max(0.0, self._step())
        self._hasty_steps = self._hasty_steps + 1 if self.clock() - began_s < SHORT_S else 0
        if self._hasty_steps <= HASTY_STEPS:
            return delay_s
        return max(delay_s, self._backoff_s(self._hasty_steps - HASTY_STEPS))

    def _step(self) -> float:
        """Make one request. Returns the seconds until the next step as its result requires; `step` may wait longer."""
        self._opened_s = None
        if self._must_relist:
            self._must_relist, self._resource_version = False, ""
        try:
            return self._watch() if self._resource_version else self._list()
        except RefusedError as error:
            return self._refused(error)
        except _RelistError as error:
            self._resource_version = ""
            return self._failed("unreadable", str(error))
        except MalformedError as error:
            self._resource_version = ""
            self._count_stream_failure()
            return self._failed("malformed", f"the server's answer cannot be read ({error})")
        except UnreachableError as error:
            if self._must_relist:
                return 0.0
            self._count_short_stream()
            return self._failed("unreachable", error.message)
        finally:
            self._close()

    def relist(self) -> None:
        """End the request that is under way; the next step lists the kind. Any thread may call this."""
        self._must_relist = True
        self.abort()

    def abort(self) -> None:
        """End the request that is under way. Any thread may call this."""
        answer = self._answer
        if answer is not None:
            answer.abort()

    def _close(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    # --- requests -----------------------------------------------------------------------------------------------------------

    def _get(
        self, path: str, query: Mapping[str, str], *, idle_s: float = HEAD_S, metadata_only: bool = False
    ) -> ServerAnswer:
        target = f"{path}?{urlencode(query)}" if query else path
        answer = self.transport.get(target, head_s=HEAD_S, idle_s=idle_s, metadata_only=metadata_only)
        if answer.status == 200:  # noqa: PLR2004 - OK
            return answer
        try:
            status = decode_status(answer.body(), answer.status)
        finally:
            answer.close()
        if answer.retry_after_s is not None:
            status = status._replace(retry_after_s=answer.retry_after_s)
        raise RefusedError(status)

    def _list(self) -> float:
        self.state = State.LISTING if self.state not in (State.ABSENT, State.DELETED) else self.state
        self.lists += 1
        if self._streams:
            # Without a resourceVersion, the list is at least as new as this request, whatever the server has in its
            # cache.
            return self._stream({"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}, staged={})
        staged: dict[Name, object] = {}
        query, version = {"limit": str(PAGE_OBJECTS)}, ""
        while True:
            self._answer = self._get(self.kind.path, query)
            page = decode_page(self._answer.body())
            self._close()
            if version and page.resource_version != version:
                raise MalformedError("the pages of a list are of different resourceVersions")
            version = page.resource_version
            for raw in page.items:
                decoded = decode_object(self.kind, raw)
                staged[decoded.name] = self.store.prepare(decoded)
            if not page.more:
                break
            query["continue"] = page.more
        self._commit(staged, version)
        return 0.0

    def _watch(self) -> float:
        self.watches += 1
        return self._stream({"resourceVersion": self._resource_version}, staged=None)

    def _stream(self, query: Mapping[str, str], staged: dict[Name, object] | None) -> float:
        """Make a WATCH request and handle its events until it ends. Returns the seconds until the next step.

        ``staged``: the objects of the list with which the stream begins, by name; None if it begins without a list.
        """
        timeout_s = int(WATCH_S * (1 + self.chance()))
        whole = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s), **query}
        answer = self._answer = self._get(self.kind.path, whole, idle_s=IDLE_S)
        began_s = self._opened_s = self.clock()
        if staged is None:
            self.state = State.WATCHING
            # An opened stream counts as a success, because its first event may come only after a minute.
            if self._short_streams < UNSTABLE:
                self._recovered()
        if self._must_relist:  # `relist` was called while the connection was made
            return 0.0
        for line in answer.lines():
            event = decode_event(line)
            if event.type == "ERROR":
                raise RefusedError(decode_status(event.raw), in_stream=True)
            if event.type == "BOOKMARK":
                mark = decode_bookmark(event.raw)
                if staged is None:
                    self._advance(mark.resource_version)
                elif mark.ends_list:
                    self._commit(staged, mark.resource_version)
                    staged, self.state = None, State.WATCHING
                else:
                    raise MalformedError("a list by stream has a bookmark before its end mark")
            elif event.type not in ("ADDED", "MODIFIED", "DELETED"):
                raise MalformedError(f"an event of the unknown type {event.type[:40]!r}")
            else:
                decoded = decode_object(self.kind, event.raw)
                if staged is None:
                    self._apply(decoded, is_deletion=event.type == "DELETED")
                elif event.type == "DELETED":
                    staged.pop(decoded.name, None)
                else:
                    staged[decoded.name] = self.store.prepare(decoded)
        return self._ended(self.clock() - began_s, timeout_s, is_listed=staged is None)

    def _ended(self, lasted_s: float, timeout_s: float, *, is_listed: bool) -> float:
        """Handle the clean end of a stream. Returns the seconds until the next step.

        Possible causes: the requested time is over, the agent read too slowly, the server stops, or the definition of
        the kind was changed or deleted.
        """
        if not is_listed:
            self._count_stream_failure()
            return self._failed("unreachable", "the stream of the list ended before the list did")
        if self.kind.is_custom and lasted_s < timeout_s - PREMATURE_S:
            # The definition may have a new default, which changes objects without an event or a new resourceVersion.
            self._resource_version = ""
        self._count_short_stream()
        if self._short_streams <= 1:
            return 0.0
        self._failed("unstable", "the server, or a proxy before it, ends each stream at once")
        return self._backoff_s(self._short_streams - 1)

    def _count_short_stream(self) -> None:
        if self._opened_s is not None:
            self._short_streams = self._short_streams + 1 if self.clock() - self._opened_s < SHORT_S else 0

    # --- what the answers mean ----------------------------------------------------------------------------------------------

    def _apply(self, decoded: Decoded, *, is_deletion: bool) -> None:
        if not is_deletion:
            self.store.put(decoded.name, self.store.prepare(decoded))
        elif self._are_deletions_real():
            self.store.remove(decoded.name)
        else:
            self.store.orphan(decoded.name)
        self._advance(decoded.resource_version)

    def _advance(self, resource_version: str) -> None:
        """Advance the known resourceVersion. Every change up to it must have been stored."""
        if not resource_version:
            raise MalformedError("an event has no resourceVersion")
        self._resource_version = self.store.resource_version = resource_version
        self._succeeded()

    def _commit(self, staged: Mapping[Name, object], resource_version: str) -> None:
        is_real = self._are_deletions_real()
        self.store.commit(staged, orphaned=set() if is_real else self.store.missing(staged))
        self._not_found = self._stream_failures = 0
        self._advance(resource_version)

    def _are_deletions_real(self) -> bool:
        """Whether objects that are missing were deleted one by one, not together with the definition of their kind.

        This reads the definition now, after the objects were found missing.
        """
        if not self.kind.is_custom:
            return True
        definition = self._definition()
        known = self.store.definition_uid
        if definition is None:  # no definition was ever seen: an aggregated API serves the kind
            return not known
        self.store.definition_uid = definition.uid
        return not definition.is_ending and known in ("", definition.uid)

    def _definition(self) -> Definition | None:
        """The definition of the kind; None if it does not exist.

        Raises _RelistError if the server gives no clear answer.
        """
        try:
            answer = self._get(self.kind.definition, {}, metadata_only=True)
            try:
                return decode_definition(answer.body())
            finally:
                answer.close()
        except RefusedError as error:
            if error.status.code == _NOT_FOUND:
                return None
            raise _RelistError(f"its CustomResourceDefinition cannot be read ({error})") from error
        except (UnreachableError, MalformedError) as error:
            raise _RelistError(f"its CustomResourceDefinition cannot be read ({error})") from error

    def _refused(self, error: RefusedError) -> float:
        status = error.status
        if status.code == _NOT_FOUND and not error.in_stream:
            return self._absent()
        is_list = not self._resource_version
        is_not_offered = status.code in _OURS or (error.in_stream and status.code not in _TRANSIENT_IN_STREAM)
        if is_list and self._streams and is_not_offered:
            # The server does not offer streaming lists. It answers 422 if they are switched off or unknown to it, and
            # sends an ERROR event if its etcd is too old for them.
            self._streams = False
            return 0.0
        if status.code in (_GONE, _ERROR) or status.code in _OURS:  # 500: perhaps a resourceVersion of another server
            self._resource_version = ""
        if status.code == _GONE:
            self.gaps += not is_list
            self._expired += 1
            return self._backoff_s(self._expired - 1) if self._expired > 1 else 0.0
        if status.code == _FORBIDDEN:
            reason = f"the server forbids it ({status.message}); grant list and watch on it"
            return self._failed("forbidden", reason)
        if status.code == _UNAUTHORIZED:
            return self._failed(
                "unauthorized", "the server does not accept the credentials, which are read anew each time"
            )
        slug = "bug" if status.code in _OURS else "unavailable"
        return self._failed(slug, f"the server answers {error}", status.retry_after_s)

    def _absent(self) -> float:
        """Handle a 404 answer for the kind itself. Returns the seconds until the next step."""
        self._resource_version = ""
        if not self.kind.is_custom:
            return self._failed("not-served", "the server does not know this kind, which every cluster has")
        self._not_found += 1
        if self._not_found < ABSENT_ANSWERS:
            return ABSENT_RETRY_S
        self.state = State.ABSENT if self.store.is_empty else State.DELETED
        self.store.commit_absent()
        self._succeeded()
        return self.pace_s()

    def _count_stream_failure(self) -> None:
        if self._resource_version:
            return
        self._stream_failures += 1
        if self._stream_failures >= STREAM_ATTEMPTS:
            self._streams = False

    def _succeeded(self) -> None:
        """Note a success: an event or a list was read."""
        self._expired, self._short_streams, self._opened_s = 0, 0, None
        self.synced_at = self.wall()
        self._recovered()

    def _recovered(self) -> None:
        if self._failures or self._failing_since_s is not None:
            self._failures, self._failing_since_s = 0, None
            self.store.note(None)

    def _failed(self, slug: str, reason: str, retry_after_s: float | None = None) -> float:
        now_s = self.clock()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        self._failures += 1
        if self.state not in (State.ABSENT, State.DELETED):
            self.state = State.WAITING
        if now_s - self._failing_since_s >= GRACE_S or slug in ("bug", "not-served"):
            message = f"cannot be followed: {reason}; what was last known of it stays in force, and no change of it is applied"
            self.store.note(Problem(Location(self.kind.path), "", message, obj=str(self.kind), slug=slug))
        if retry_after_s is not None:
            return min(retry_after_s, LONGEST_RETRY_S) * (1 + self.chance())
        return self._backoff_s(self._failures)

    def _backoff_s(self, attempt: int) -> float:
        return float(min(FIRST_RETRY_S * 2 ** min(attempt - 1, 10), LONGEST_RETRY_S) * (0.5 + self.chance()))
