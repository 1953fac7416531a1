# SPDX-License-Identifier: Apache-2.0
"""The known state of the cluster: all objects by kind, whether each kind was listed, and changes not yet read.

Reader threads, one for each kind, write into the cache and make its eventfd readable. The agent then calls
`Cache.drain`. A reader thread never waits for the agent: the cache keeps only the latest change of each object, so its
size is bounded by the number of objects.

Invariants: `drain` returns nothing before every kind was listed completely. There is one exception: after a call of
`restore`, it returns the whole saved state of the last run. An object that is not valid keeps its last good state and
is reported. Two states of an object are compared by the fields that its parser reads, so a new resourceVersion, a
heartbeat or a defaulted status is not a change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.translate import ResourceKey, key_of
from netpol_ebpf.resources.manifest_files import never_pause
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.sources.kubernetes.decoding import (
    Decoded,
    Name,
    WatchedKind,
    decode_fields,
    encode,
    name_of,
    object_path,
    parse,
)
from netpol_ebpf.sources.source import ObjectEvent, Remove, Upsert

MOST_TOLD = 1000
"""Largest number of problems that the cache reports. Each change of a problem iterates over them. The number is
arbitrary."""
TAKEN_TOGETHER = 250
"""Number of objects processed between two pauses, which takes a few milliseconds. The number is arbitrary."""
SAVED_VERSION = "saved"
"""The version of an object of the saved state, until the server reports another state of the object."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object.

    ``seen``: the fields that the server last reported, as JSON. ``good``: its last valid state as JSON, b"" if there is
    none. ``resource``: this last valid state, parsed. ``version``: differs for each state of the object. ``problems``:
    the errors and warnings of the state that the server last reported.
    """

    seen: bytes
    good: bytes
    resource: Resource | None
    version: str
    problems: tuple[Problem, ...]


class SavedObject(NamedTuple):
    """An object in the saved state.

    ``fields``: its last good state as JSON. ``is_orphan``: it is kept although the definition of its kind was deleted.
    """

    fields: bytes
    is_orphan: bool


class SavedKind(NamedTuple):
    """The objects of one kind in the saved state.

    ``definition_uid``: the uid of the kind's CustomResourceDefinition; "" if none was seen.
    """

    definition_uid: str
    objects: list[SavedObject]


class KindStore:
    """The objects of one kind. The kind's reader thread writes them.

    All methods except `prepare` run under the cache's lock.
    """

    def __init__(self, kind: WatchedKind, cache: Cache) -> None:
        self.kind = kind
        self.definition_uid = ""
        self.resource_version = ""
        self.is_synced = False
        self.entries: dict[Name, Entry] = {}
        self.orphans: set[Name] = set()
        self.faulty: set[Name] = set()
        self.problem: Problem | None = None
        self._cache = cache

    # --- for the reader -----------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether the store has no object, not even an orphan."""
        return not self.entries

    def prepare(self, decoded: Decoded) -> Entry:
        """Parse an object; returns its entry for `put` or `commit`, the existing entry if the object did not change."""
        old = self.entries.get(decoded.name)
        seen = encode(decoded.fields)
        if old is not None and old.seen == seen:
            return old
        parsed = parse(self.kind, decoded.name, decoded.fields)
        if parsed.resource is None:
            good = (old.good, old.resource, old.version) if old is not None else (b"", None, "")
            return Entry(seen, *good, parsed.problems)
        if old is not None and old.resource == parsed.resource:
            return Entry(seen, seen, old.resource, old.version, parsed.problems)
        # If a definition gets a new default, an object has a new state with the same resourceVersion.
        is_taken = old is not None and old.version.rstrip("+") == decoded.resource_version
        version = f"{old.version}+" if old is not None and is_taken else decoded.resource_version
        return Entry(seen, seen, parsed.resource, version, parsed.problems)

    def put(self, name: Name, entry: object) -> None:
        """Store under ``name`` the entry that `prepare` returned."""
        with self._cache.lock:
            self._put(name, entry)

    def remove(self, name: Name) -> None:
        """Remove an object."""
        with self._cache.lock:
            self._remove(name)

    def orphan(self, name: Name) -> None:
        """Mark an object as an orphan, which stays in force.

        The server deleted it together with the definition of its kind.
        """
        with self._cache.lock:
            self._orphan((name,))

    def missing(self, staged: Mapping[Name, object]) -> set[Name]:
        """The names of known objects that a complete list lacks, without orphans. ``staged``: the list, by name."""
        with self._cache.lock:  # an operator may release orphans meanwhile
            return self.entries.keys() - staged.keys() - self.orphans

    def commit(self, staged: Mapping[Name, object], *, orphaned: set[Name]) -> None:
        """Replace all objects by a complete list, in one step. Known objects that it lacks are removed, except orphans.

        ``staged``: the list, as entries of `prepare` by name. ``orphaned``: objects to mark as orphans.
        """
        with self._cache.lock:
            self._orphan(orphaned)
            for name in self.missing(staged):
                self._remove(name)
            for name, entry in staged.items():
                self._put(name, entry)
            self._synced()

    def commit_absent(self) -> None:
        """Record that the server does not have the kind. Its known objects are kept as orphans."""
        with self._cache.lock:
            self._orphan(self.entries)
            self._synced()

    def note(self, problem: Problem | None) -> None:
        """Set the problem that says why the kind is not watched now; None if it is watched."""
        with self._cache.lock:
            if problem != self.problem:
                self.problem = problem
                self._cache.wake()

    def _put(self, name: Name, entry: object) -> None:
        if not isinstance(entry, Entry):
            raise TypeError(f"not an entry of prepare(): {entry!r}")
        old = self.entries.get(name)
        was_orphan = name in self.orphans
        self.orphans.discard(name)
        if entry is old:
            if was_orphan:
                self._cache.wake()
            return
        self.entries[name] = entry
        if entry.problems:
            self.faulty.add(name)
        else:
            self.faulty.discard(name)
        self._cache.changed(self.kind, name, old, entry)

    def _remove(self, name: Name) -> None:
        old = self.entries.pop(name, None)
        self.orphans.discard(name)
        self.faulty.discard(name)
        if old is not None:
            self._cache.changed(self.kind, name, old, None)

    def _orphan(self, names: Iterable[Name]) -> None:
        new = self.entries.keys() & set(names) - self.orphans
        if new:
            self.orphans |= new
            self._cache.saves += 1
            self._cache.wake()

    def _synced(self) -> None:
        self._cache.saves += 1  # the saved state includes the definition, which may have changed
        if not self.is_synced:
            self.is_synced = True
            self._cache.wake()

    # --- for the cache, under its lock --------------------------------------------------------------------------------------

    def release(self) -> list[Name]:
        """Remove the orphans; returns their names."""
        names = sorted(self.orphans)
        for name in names:
            self._remove(name)
        return names

    def problems(self) -> Iterable[Problem]:
        """The problems of the kind: why it is not watched, which objects are kept, and which are not valid."""
        if self.problem is not None:
            yield self.problem
        if self.orphans:
            count = len(self.orphans)
            message = (
                f"its CustomResourceDefinition was deleted, was made anew, or serves this version no more, and {count} of its "
                "objects are gone with it: they stay in force as they were last known; apply them again, or end them on this "
                f"node with `netpolctl release {self.kind}`"
            )
            yield Problem(Location(self.kind.path), "", message, obj=str(self.kind), slug="crd-deleted")
        for name in sorted(self.faulty):
            entry = self.entries[name]
            yield from entry.problems
            if any(one.severity == "error" for one in entry.problems):
                kept = (
                    "its last good state stays in force" if entry.resource is not None else "nothing of it is in force"
                )
                place = Location(object_path(self.kind, name))
                obj = "/".join(part for part in (self.kind.kind, *name) if part)
                yield Problem(place, "", f"is not valid: {kept}", obj=obj, slug="kept")

    def saved(self) -> SavedKind:
        """The objects of the kind as the saved state stores them."""
        good = ((name, entry.good) for name, entry in self.entries.items() if entry.good)
        return SavedKind(self.definition_uid, [SavedObject(fields, name in self.orphans) for name, fields in good])

    def load(self, saved: SavedKind) -> None:
        """Load the kind's objects from the saved state. Must be called before the kind is first listed."""
        entries: dict[Name, Entry] = {}
        orphans: set[Name] = set()
        for one in saved.objects:
            fields = decode_fields(one.fields)
            name = name_of(fields, "a saved object")
            parsed = parse(self.kind, name, fields)
            entries[name] = Entry(one.fields, one.fields, parsed.resource, SAVED_VERSION, parsed.problems)
            if one.is_orphan:
                orphans.add(name)
        self.definition_uid = saved.definition_uid
        self.orphans = orphans
        for name, entry in entries.items():
            self.entries[name] = entry
            if entry.problems:
                self.faulty.add(name)
            self._cache.changed(self.kind, name, None, entry)


class _Objects:
    """The objects that `drain` has returned, by key.

    If an object exists as projectcalico.org/v3 and in its stored form, the projectcalico.org/v3 form is used.
    Invariant: each key has a list of at least one state, and the first state of the list is used.
    """

    def __init__(self) -> None:
        self._states: dict[ResourceKey, list[tuple[bool, str, Resource, str]]] = {}  # stored, path, resource, version
        self._keys: dict[str, ResourceKey] = {}  # by path

    def replace(self, path: str, new: tuple[Resource, str] | None) -> Iterator[ObjectEvent]:
        """Replace the object at an API path by ``new``, (resource, version); None: the object was removed.

        Yields the resulting events.
        """
        keys = [self._keys.pop(path, None), None if new is None else key_of(new[0])]
        for key in dict.fromkeys(key for key in keys if key is not None):
            before = self._states.pop(key, [])
            after = [state for state in before if state[1] != path]
            if new is not None and key == keys[1]:
                self._keys[path] = key
                after = sorted([*after, (new[0].meta.is_stored, path, *new)], key=lambda state: state[:2])
            if after:
                self._states[key] = after
                if not before or before[0][2:] != after[0][2:]:
                    yield Upsert(after[0][2], key, after[0][3])
            elif before:
                yield Remove(before[0][2], key, before[0][3])


@dataclass(slots=True)
class Cache:
    """The known objects of ``kinds``, for one consumer. Must be closed after the reader threads have ended."""

    kinds: tuple[WatchedKind, ...]
    lock: threading.RLock = field(default_factory=threading.RLock)
    stores: dict[WatchedKind, KindStore] = field(init=False)
    descriptor: int = field(init=False)
    """An eventfd. It is readable when `drain` or `problems` has something new."""
    saves: int = 0
    """A counter of the changes that the saved state must include."""
    is_given: bool = False
    """Whether `drain` has returned a complete state."""
    _changed: dict[str, tuple[Resource, str] | None] = field(default_factory=dict)
    _loaded: dict[str, tuple[Resource, str] | None] = field(
        default_factory=dict
    )  # the objects of the saved state, until the first `drain`
    _objects: _Objects = field(default_factory=_Objects)
    _is_restored: bool = False
    _problems: dict[str, Problem] = field(default_factory=dict)
    _versions: dict[WatchedKind, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stores = {kind: KindStore(kind, self) for kind in self.kinds}
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close the descriptor; must be called once."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def has_synced(self) -> bool:
        """Whether every kind was listed completely, or is known to be absent."""
        return all(store.is_synced for store in self.stores.values())

    @property
    def unsynced(self) -> tuple[WatchedKind, ...]:
        """The kinds that have not been listed yet."""
        return tuple(kind for kind, store in self.stores.items() if not store.is_synced)

    @property
    def versions(self) -> Mapping[WatchedKind, str]:
        """The resourceVersion of each kind up to which `drain` has returned all changes."""
        return self._versions

    def wake(self) -> None:
        """Make the descriptor readable."""
        os.eventfd_write(self.descriptor, 1)

    def calm(self) -> None:
        """Make the descriptor unreadable."""
        with suppress(BlockingIOError):  # it was not readable
            os.eventfd_read(self.descriptor)

    def changed(self, kind: WatchedKind, name: Name, old: Entry | None, new: Entry | None) -> None:
        """Record that an object changed. The caller must hold the lock."""
        before, after = old.resource if old else None, new.resource if new else None
        if before is not after:
            path = object_path(kind, name)
            self._changed[path] = None if new is None or after is None else (after, new.version)
        if before is not after or (old.problems if old else ()) != (new.problems if new else ()):
            self.wake()
        self.saves += 1

    @property
    def noted(self) -> Collection[str]:
        """The keys for which `note` has set a problem."""
        return self._problems.keys()

    def note(self, key: str, problem: Problem | None) -> None:
        """Set the problem of ``key``, for problems that belong to no kind; None removes the problem."""
        with self.lock:
            if problem is None:
                if self._problems.pop(key, None) is not None:
                    self.wake()
            elif self._problems.get(key) != problem:
                self._problems[key] = problem
                self.wake()

    def orphans(self, kind: WatchedKind) -> list[Name]:
        """The names of the objects of a kind that are kept although the kind's definition was deleted."""
        with self.lock:
            return sorted(self.stores[kind].orphans)

    def release(self, kind: WatchedKind) -> list[Name]:
        """Remove the objects that are kept although their kind's definition was deleted. Returns their names."""
        with self.lock:
            released = self.stores[kind].release()
            self.wake()  # an object that was never valid causes no event, but its problem ends
            return released

    def restore(self) -> None:
        """Make `drain` return the whole loaded saved state, even before every kind was listed."""
        with self.lock:
            self._is_restored = True
            self.wake()

    def problems(self) -> tuple[Problem, ...]:
        """All present problems, at most MOST_TOLD."""
        with self.lock:
            found = list(self._problems.values())
            for store in self.stores.values():
                found += islice(store.problems(), MOST_TOLD)
        if len(found) > MOST_TOLD:
            message = f"only the first {MOST_TOLD} problems of the cluster's objects are reported; there are more"
            found[MOST_TOLD:] = [Problem(Location("/"), "", message, slug="more")]
        return tuple(found)

    def drain(self, pause: Callable[[], None] = never_pause) -> tuple[ObjectEvent, ...]:
        """The changes since the last call, removals first; none before every kind was listed. Never waits for a server.

        ``pause``: a function to call every few milliseconds.
        """
        with self.lock:
            if self.has_synced:
                changed, self._changed = self._changed, {}
                self._versions = {kind: store.resource_version for kind, store in self.stores.items()}
            elif self._is_restored and not self.is_given:
                changed = self._loaded  # the saved state alone; listed objects follow when every kind was listed
            else:
                return ()
            self.is_given, self._loaded = True, {}
        removals: list[ObjectEvent] = []
        upserts: list[ObjectEvent] = []
        for number, path in enumerate(sorted(changed)):
            if number % TAKEN_TOGETHER == 0:
                pause()
            for event in self._objects.replace(path, changed[path]):
                (upserts if isinstance(event, Upsert) else removals).append(event)
        return (*removals, *upserts)

    def saved(self) -> dict[WatchedKind, SavedKind]:
        """The state to save. It is consistent only if every kind was listed."""
        with self.lock:
            return {kind: store.saved() for kind, store in self.stores.items()}

    def load(self, saved: Mapping[WatchedKind, SavedKind]) -> None:
        """Load the saved state of the last run.

        `drain` returns its objects only when every kind was listed, or `restore` was called.
        """
        with self.lock:
            for kind, one in saved.items():
                if kind in self.stores:
                    self.stores[kind].load(one)
            self._loaded = dict(self._changed)
