# SPDX-License-Identifier: Apache-2.0
"""The state machine of one kind: which request comes next, and what its answer means for what is known.

    LISTING --whole--> WATCHING --clean end--> WATCHING (custom kind, before its time: LISTING)
       |                  |------expired, bad event, definition unread--> LISTING
       |--404, again and again--> ABSENT (nothing was known) or DELETED (what was known stays in force)

It keeps no clock, opens no connection and starts no thread: `KindWatcher.step` makes one request through the transport that it was
given and reads the answer to its end.

Invariants: an object leaves the store for one of three reasons only: a DELETED event, a whole list that does not name it, or an
operator's word; a list counts when its last page or its end mark was read.  What a deleted CustomResourceDefinition took with it
stays: deletions of a custom kind are believed after its definition was read, later than the deletion.  No other answer removes anything.
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
"""Of one page of a LIST: about 3 MB of pods."""
WATCH_S = 300.0
"""A WATCH is asked for as long as this, and for up to twice as long by chance: nodes must not come back all at once."""
PREMATURE_S = 5.0
"""A WATCH that ends this much before its time did not end for its time; the server ends it up to 2 s before."""
SHORT_S = 1.0
"""Streams that end sooner than this and without an event, one after the other, are waited between; arbitrary."""
UNSTABLE = 3
"""So many of them in a row are no way to follow a kind: that a stream opens is no recovery then."""
HEAD_S = 20.0
"""What the head of an answer may take: a LIST that waits for etcd has none for 60 s."""
IDLE_S = 180.0
"""What a WATCH may be silent: three bookmarks."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
GRACE_S = 30.0
"""How long a failure is retried before it is a problem: a starting server answers 403, 429 and 503 for up to 2 s."""
ABSENT_ANSWERS = 3
"""A kind is not installed when its LIST gave 404 this often in a row..."""
ABSENT_RETRY_S = 2.0
"""...so far apart: 404 was never seen while a server started, and this does not rely on it."""
STREAM_ATTEMPTS = 3
"""Lists by stream that may fail in a row before lists come in pages."""

_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _GONE, _TOO_MANY, _ERROR, _TIMEOUT = 401, 403, 404, 410, 429, 500, 504
_OURS = frozenset({400, 405, 406, 415, 422})
"""What no retry mends."""
_TRANSIENT_IN_STREAM = frozenset({_UNAUTHORIZED, _FORBIDDEN, _GONE, _TOO_MANY, 503, _TIMEOUT})


class ServerAnswer(Protocol):
    """The head of an answer was read. ``retry_after_s``: of the header, None without it."""

    @property
    def status(self) -> int: ...  # noqa: D102

    @property
    def retry_after_s(self) -> float | None: ...  # noqa: D102

    def body(self) -> bytes:
        """All of it. Raises UnreachableError when it is cut."""

    def lines(self) -> Iterator[bytes]:
        """The lines of a WATCH until its clean end. Raises UnreachableError when it is cut, or silent for too long."""

    def abort(self) -> None:
        """End it from another thread: who reads meets the end of the connection."""

    def close(self) -> None:
        """Let go of the connection."""


class Transport(Protocol):
    """How requests are made."""

    def get(self, target: str, *, head_s: float, idle_s: float, metadata_only: bool = False) -> ServerAnswer:
        """Begin a GET; the times are those of the head and of a silence in the body. Raises UnreachableError.

        ``metadata_only``: of one object; a server answers 406 to that for a list.
        """


class Store(Protocol):
    """What is known of one kind. ``definition_uid``: of its CustomResourceDefinition, "" for none."""

    definition_uid: str
    resource_version: str

    @property
    def is_empty(self) -> bool: ...  # noqa: D102

    def prepare(self, decoded: Decoded) -> object:
        """An entry for an object, to be put into the store by `put` or `commit`."""

    def put(self, name: Name, entry: object) -> None:
        """Take up an entry."""

    def remove(self, name: Name) -> None:
        """Forget an object."""

    def orphan(self, name: Name) -> None:
        """Keep an object that is gone from the server because its kind is."""

    def missing(self, staged: Mapping[Name, object]) -> set[Name]:
        """The objects known that a list does not name, those that are kept by `orphan` left out."""

    def commit(self, staged: Mapping[Name, object], *, orphaned: set[Name]) -> None:
        """Take up a whole list: what it does not name goes, but for what is ``orphaned``, from now on or before."""

    def commit_absent(self) -> None:
        """The server has no such kind; what was known of it is kept."""

    def note(self, problem: Problem | None) -> None:
        """Why the kind is not followed now; None: it is."""


class State(enum.Enum):
    """Where a kind stands; the value is what a user reads."""

    LISTING = "listing"
    WATCHING = "watching"
    WAITING = "waiting to retry"
    ABSENT = "not installed"
    DELETED = "definition deleted"


class RefusedError(Exception):
    """The server answered, and not with what was asked for. ``in_stream``: by an ERROR event."""

    def __init__(self, status: Status, *, in_stream: bool = False) -> None:
        super().__init__(f"{status.code} {status.reason}: {status.message}")
        self.status = status
        self.in_stream = in_stream


class _RelistError(Exception):
    """What is known can no longer be followed by events."""


@dataclass(slots=True)
class KindWatcher:
    """Follows one kind. ``pace_s``: seconds until an absent kind is asked for again, by chance; ``chance``: from [0, 1)."""

    kind: WatchedKind
    transport: Transport
    store: Store
    pace_s: Callable[[], float]
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    state: State = State.LISTING
    _resource_version: str = ""  # where the next WATCH begins; "": a LIST comes first
    _streams: bool = True
    _stream_failures: int = 0
    _failures: int = 0
    _failing_since_s: float | None = None
    _expired: int = 0
    _not_found: int = 0
    _short_streams: int = 0
    _opened_s: float | None = None  # since when this step's stream is open
    _must_relist: bool = False
    _answer: ServerAnswer | None = field(default=None)

    def step(self) -> float:
        """One request, its answer read to the end. The seconds until the next step. Never raises for what the server says."""
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
        """Have the next step list, and the present one end; from any thread."""
        self._must_relist = True
        self.abort()

    def abort(self) -> None:
        """End the present request; from any thread."""
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
        if self._streams:
            # No resourceVersion: the list is at least as new as this question, whatever the server's cache holds.
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
        return self._stream({"resourceVersion": self._resource_version}, staged=None)

    def _stream(self, query: Mapping[str, str], staged: dict[Name, object] | None) -> float:
        """A WATCH. ``staged``: None, or the objects of a list that the stream begins with."""
        timeout_s = int(WATCH_S * (1 + self.chance()))
        whole = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s), **query}
        answer = self._answer = self._get(self.kind.path, whole, idle_s=IDLE_S)
        began_s = self._opened_s = self.clock()
        if staged is None:
            self.state = State.WATCHING
            if self._short_streams < UNSTABLE:  # no event has to come for a minute
                self._recovered()
        if self._must_relist:  # said while the connection was being made
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
        """After a clean end, whatever its cause: time over, slow reader, stopping server, definition changed or deleted."""
        if not is_listed:
            self._count_stream_failure()
            return self._failed("unreachable", "the stream of the list ended before the list did")
        if self.kind.is_custom and lasted_s < timeout_s - PREMATURE_S:
            # A new default of a changed definition is in objects that no event names, under their old resourceVersion.
            self._resource_version = ""
        self._count_short_stream()
        if self._short_streams <= 1:
            return 0.0
        self._failed("unstable", "the server, or a proxy before it, ends each stream at once")
        return self._backoff_s(self._short_streams - 1)

    def _count_short_stream(self) -> None:
        """After the end of a stream, if there was one: how many in a row have ended before they had an event."""
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
        """After what is as new as this was taken up."""
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
        """Whether what is gone was deleted, rather than taken by the deletion of its kind; the definition is asked after the fact."""
        if not self.kind.is_custom:
            return True
        definition = self._definition()
        known = self.store.definition_uid
        if definition is None:  # never known: an aggregated API serves the kind
            return not known
        self.store.definition_uid = definition.uid
        return not definition.is_ending and known in ("", definition.uid)

    def _definition(self) -> Definition | None:
        """The definition of the kind, None when there is none. Raises _RelistError when that cannot be told."""
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
            # 422 when streams are switched off or unknown; an ERROR event where etcd is too old for them.
            self._streams = False
            return 0.0
        if status.code in (_GONE, _ERROR) or status.code in _OURS:  # 500: a resourceVersion of another server
            self._resource_version = ""
        if status.code == _GONE:
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
        """After 404 for the kind itself."""
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
        """After an event or a list."""
        self._expired, self._short_streams, self._opened_s = 0, 0, None
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
