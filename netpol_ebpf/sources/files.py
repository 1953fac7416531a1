# SPDX-License-Identifier: Apache-2.0
"""The source for ``--manifests DIR``: objects from a directory of manifests that may change.

A scan of the directory (name, inode, size and times of every file) finds the changes. It detects atomic renames,
symlink swaps of mounted ConfigMaps, and changes on network file systems, and it has no queue that can overflow. Inotify
only triggers scans. It does not report changes that another machine makes on a network file system, or changes below a
path outside the watched directories. So a directory without changes is scanned every SAFETY_NET_S seconds, or every
INTERVAL_S seconds if inotify is known to miss changes.

Invariants: one scan gives one update, so objects that change together arrive together. A file that cannot be read, is
not valid, or is empty keeps the objects of its last good state and is reported until it is corrected. The same holds
for all files below a directory that cannot be read. With a directory for copies, last good states survive a restart.
Objects are removed only when their file is removed, when the file no longer contains them, or when it states that it
has none (``---`` or an empty List). If several files have an object, the first by file name is used and the others are
reported. If an object is given both in Calico's stored form and as projectcalico.org/v3, its projectcalico.org/v3 form
is used.

The state of the directory is applied when two successive scans had the same result. So neither a half-written file nor
the moment between the removal of a file and the appearance of its successor becomes policy. This module runs no loop:
`ManifestDirectory.step` is one scan.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import InvalidInputError, Location, Problem
from netpol_ebpf.policy.translate import ResourceKey, key_of
from netpol_ebpf.resources.manifest_files import MOST_BYTES, DirectoryId, find_manifests, never_pause
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.sources.copies import LastGoodCopies
from netpol_ebpf.sources.directory_watch import DirectoryWatch
from netpol_ebpf.sources.reading import UNREADABLE, Reading, ReadResult, ReadTask, can_read_in_place, read, unreadable
from netpol_ebpf.sources.source import KEEPS_NOTHING, ObjectEvent, Remove, SourceUpdate, Upsert

log = logging.getLogger(__name__)

INTERVAL_S = 0.2
"""Seconds between two scans while the directory changes. A change is applied at the second scan that finds it."""
SAFETY_NET_S = 2.0
"""Seconds between two scans of a watched directory without changes, for changes that inotify does not report. The
number is arbitrary."""

MAX_UNSETTLED_LOOKS = 3
"""Number of scans after which a directory that never stops changing is applied as it is."""

RACY_S = 2.0
"""Age of a file in seconds. A younger file may change again without a change of its times or size, so its content is
compared."""

RETRY_S = 60.0
"""Seconds until a file is read again after another process ended the child that read it. The number is arbitrary."""

SLOW_S = 5.0
"""Seconds of reading after which the source reports as a problem that a change is not in force yet. The number is
arbitrary."""

MOST_TOLD = 1000
"""Largest number of problems that the source reports. Each scan iterates over them. The number is arbitrary."""

MOST_BYTES_IN_ALL = 256 << 20
"""Largest total size, in bytes, of the files of one directory that are read: four times the limit of one file."""

_UNKNOWN: DirectoryId = (0, 0)
"""An identity that no directory has."""

_NOTHING: tuple[str, tuple[Resource, ...]] = ("", ())
"""Version and objects of a file that no longer exists."""

_IF_MEANT = "remove it, or put a manifest into it, if that is intended"

Signature = tuple[int, int, int, int, int]
"""(device, inode, size in bytes, modification time in ns, change time in ns) of a file."""
UNREAD: Signature = (0, 0, 0, 0, 0)
"""A signature that no file has."""


@dataclass(slots=True)
class _File:
    """The state of one file.

    ``digest``, ``problems``: of the text that was read last, valid or not. ``resources``: of the last good text.
    ``version``: the digest of that text, in hexadecimal digits. ``skipped``: for each kind that is not read (apiVersion
    and kind), the number of its objects in that text.
    """

    signature: Signature
    read_at_s: float
    digest: bytes = b""
    resources: tuple[Resource, ...] = ()
    version: str = ""
    problems: tuple[Problem, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_racy(self) -> bool:
        return self.read_at_s - self.signature[3] / 1e9 < RACY_S


@dataclass(frozen=True, slots=True)
class _Scan:
    """The result of one scan.

    ``files``: the signature of each manifest by the manifest's name; "" is the name if the root itself is a manifest.
    ``hidden``: the paths that cannot be read, with the reasons. ``directories``: the identity of each directory.
    """

    files: dict[str, Signature]
    hidden: dict[str, str]
    directories: dict[str, DirectoryId] = field(default_factory=dict, compare=False)

    def is_hidden(self, name: str) -> bool:
        """Whether the file ``name`` may exist although it was not found, because a path to it could not be read."""
        return not self.hidden.keys().isdisjoint(_with_parents(name))


@dataclass(slots=True)
class _Pending:
    """A scan that is not applied yet.

    ``tasks``: the files to read. ``began_s``: the time of the scan. ``reading``: the reader in a child process; None:
    this process reads.
    """

    scan: _Scan
    tasks: list[ReadTask]
    began_s: float
    reading: Reading | None = None


ObjectPosition = tuple[bool, str, int]
"""The position of an object: (whether the object has Calico's stored form, name of its file, its number in the file).
If an object has several positions, the least one is used."""


@dataclass(slots=True)
class _MergedFiles:
    """The objects of all files. The cost of a change depends only on the changed files.

    Invariant: for each key, ``homes`` has the least `ObjectPosition` at which an object of this key is, and ``others``
    has all further positions, in order. A key with only one position is not in ``others``. ``given``: for each file,
    the version and the applied objects.
    """

    given: dict[str, tuple[str, tuple[Resource, ...]]] = field(default_factory=dict)
    homes: dict[ResourceKey, ObjectPosition] = field(default_factory=dict)
    others: dict[ResourceKey, list[ObjectPosition]] = field(default_factory=dict)

    def replace(self, files: Mapping[str, tuple[str, tuple[Resource, ...]]]) -> tuple[ObjectEvent, ...]:
        """Replace the objects of ``files``, which gives (version, objects) by file name; a removed file has no objects.

        Returns the resulting events: first removals, then changed objects, each in the order of the files.
        """
        was: dict[ResourceKey, tuple[ObjectPosition, Resource, str] | None] = {}
        for name in files:
            for number, resource in enumerate(self.given.get(name, _NOTHING)[1]):
                key = key_of(resource)
                was.setdefault(key, self._first(key))
                self._retract(key, (resource.meta.is_stored, name, number))
        for name in files:
            self.given.pop(name, None)
        for name, (version, resources) in files.items():
            if resources:
                self.given[name] = version, resources
            for number, resource in enumerate(resources):
                key = key_of(resource)
                was.setdefault(key, self._first(key))
                self._claim(key, (resource.meta.is_stored, name, number))
        removals: list[tuple[ObjectPosition, ObjectEvent]] = []
        upserts: list[tuple[ObjectPosition, ObjectEvent]] = []
        for key, old in was.items():
            new = self._first(key)
            if new is None:
                if old is not None:
                    removals.append((old[0], Remove(old[1], key, old[2])))
            elif old is None or old[1] != new[1]:
                upserts.append((new[0], Upsert(new[1], key, new[2])))
        return tuple(event for part in (removals, upserts) for _, event in sorted(part, key=lambda one: one[0]))

    def duplicates(self) -> Iterator[Problem]:
        """A problem for each position of an object except the least.

        There is no problem if the object's stored form is overridden by its projectcalico.org/v3 form.
        """
        for key in nsmallest(MOST_TOLD, self.others):
            home = self._at(self.homes[key])
            for one in map(self._at, self.others[key]):
                if one.meta.is_stored == home.meta.is_stored:
                    yield _duplicate(key, one, home)

    def _at(self, place: ObjectPosition) -> Resource:
        _, name, number = place
        return self.given[name][1][number]

    def _first(self, key: ResourceKey) -> tuple[ObjectPosition, Resource, str] | None:
        home = self.homes.get(key)
        return None if home is None else (home, self._at(home), self.given[home[1]][0])

    def _claim(self, key: ResourceKey, place: ObjectPosition) -> None:
        first = self.homes.get(key)
        if first is None:
            self.homes[key] = place
            return
        self.homes[key] = min(first, place)
        insort(self.others.setdefault(key, []), max(first, place))

    def _retract(self, key: ResourceKey, place: ObjectPosition) -> None:
        others = self.others.get(key, [])
        if self.homes[key] != place:
            del others[bisect_left(others, place)]
        elif others:
            self.homes[key] = others.pop(0)
        else:
            del self.homes[key]
        if not others:
            self.others.pop(key, None)


@dataclass(slots=True)
class ManifestDirectory:
    """A `Source` for one directory, or one file, of manifests.

    ``copies``: stores last good states across restarts; None: they are only in memory. ``clock``: returns wall-clock
    seconds, which are compared with times of files. ``watch``: wakes the agent when a file changes; None: the directory
    is scanned every ``interval_s`` seconds of the ``monotonic`` clock. ``close`` closes the watch.
    """

    root: Path
    copies: LastGoodCopies | None = None
    clock: Callable[[], float] = time.time
    watch: DirectoryWatch | None = None
    interval_s: float = INTERVAL_S
    monotonic: Callable[[], float] = time.monotonic
    _looked_s: float = -math.inf  # when the last scan began, by the monotonic clock
    _has_news: bool = False  # the watch reported a change since the last look
    _watched: _Scan | None = None  # the scan with the watched directories
    _watch_failure: str = ""
    _files: dict[str, _File] = field(default_factory=dict)
    _taken: dict[str, Signature] = field(default_factory=dict)
    _hidden: dict[str, str] = field(default_factory=dict)
    _racy: set[str] = field(default_factory=set)
    _faulty: set[str] = field(default_factory=set)
    _unmerged: set[str] = field(default_factory=set)
    _merged: _MergedFiles = field(default_factory=_MergedFiles)
    _uncopied: dict[str, str | None] = field(default_factory=dict)  # by file: the text to copy; None: remove the copy
    _is_swept: bool = False  # whether the copies of files that were removed while no agent ran are deleted by now
    _copy_problems: tuple[Problem, ...] = ()
    _directory_problems: tuple[Problem, ...] = ()
    _process_problems: tuple[Problem, ...] = ()
    _homes: dict[str, DirectoryId] | None = field(default_factory=dict)  # directories with manifests; None: not known
    _copied_homes: dict[str, DirectoryId] | None = None
    _too_many: frozenset[str] = frozenset()  # files beyond MOST_BYTES_IN_ALL
    _retries: dict[str, float] = field(default_factory=dict)  # unchanged files to read again -> time
    _pending: _Pending | None = None
    _seen: _Scan | None = None
    _unsettled_looks: int = 0
    _waits: bool = True  # the first step waits for the reading of files
    _started: bool = False
    _is_read: bool = False
    _is_file: bool = False
    _reported: tuple[Problem, ...] = ()

    def close(self) -> None:
        """End a running child and close the watch."""
        if self._pending is not None and self._pending.reading is not None:
            self._pending.reading.close()
        self._pending = None
        if self.watch is not None:
            self.watch.close()

    @property
    def name(self) -> str:
        """The path of the directory."""
        return str(self.root)

    @property
    def has_synced(self) -> bool:
        """Whether all objects of the directory have been read at least once."""
        return self._is_read

    @property
    def skipped(self) -> dict[str, int]:
        """The number of objects of kinds that are not read, by apiVersion and kind."""
        total: Counter[str] = Counter()
        for file in self._files.values():
            if file.skipped:
                total.update(file.skipped)
        return dict(sorted(total.items()))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of the manifests as last applied, in order of file and line; at most MOST_TOLD."""
        found = [*self._directory_problems, *self._copy_problems, *self._process_problems, *self._slowness()]
        if self._is_read and not self._taken and not self._hidden:
            found.append(_without_manifests(self.root))
        found += islice(self._merged.duplicates(), MOST_TOLD)
        found += [_hidden(self._path(name), self._hidden[name]) for name in nsmallest(MOST_TOLD, self._hidden)]
        for name in nsmallest(MOST_TOLD, self._faulty):
            found.extend(self._files[name].problems)
        found.sort(key=lambda p: (p.location.file, p.location.line, p.location.column, p.message))
        if len(found) > MOST_TOLD:
            message = f"only the first {MOST_TOLD} problems of the manifests are reported; there are more"
            found[MOST_TOLD:] = [Problem(Location(str(self.root)), "", message, slug="more")]
        return tuple(found)

    def begin(self) -> SourceUpdate | None:
        """See `Source`. The objects of files that a child must read are returned by a later `step`."""
        self._waits = False
        update = self.step()
        if self._pending is None:
            self._require_read()
        return update

    def report(self) -> tuple[Mapping[str, Any], ...]:
        """See `Source`."""
        waiting_for = () if self.has_synced else ("its files",)
        return (
            {
                "source": self.name,
                "type": "manifests",
                "synced": self.has_synced,
                "waiting_for": list(waiting_for),
                "behind": [f"{one.location}: {one.message}" for one in self.problems if one.slug == UNREADABLE],
            },
        )

    def sync(self) -> SourceUpdate:
        """See `Source`. Waits without a time limit until all files are read."""
        update = self.step()
        self._require_read()
        return update or SourceUpdate((), self.problems)

    def _require_read(self) -> None:
        if not self.has_synced:
            reasons = "; ".join(f"{one.location} {one.message}" for one in self.problems)
            raise InvalidInputError(f"cannot read the manifests: {reasons}")

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:  # noqa: ARG002
        """See `Source`.

        Always raises InvalidInputError: manifests need no definitions, so no object is kept without one.
        """
        raise InvalidInputError(
            f"nothing of {kind} is kept: {self.root} is a directory of manifests", hint=KEEPS_NOTHING
        )

    def fileno(self) -> int | None:
        """See `Source`."""
        return None if self.watch is None else self.watch.fileno()

    def note_news(self) -> None:
        """See `Source`."""
        if self.watch is not None:
            self.watch.drain()
        self._has_news = True

    def wait_s(self) -> float:
        """See `Source`.

        Two scans are at least `interval_s` apart, however often the watch wakes the agent. Otherwise a half-written
        file could be applied.
        """
        is_at_rest = (
            self._watched is not None
            and self.watch is not None
            and self.watch.is_complete
            and not (self._has_news or self._seen or self._pending or self._racy or self._directory_problems)
            and not (self._hidden or self._uncopied or self._copy_problems or self._process_problems or self._retries)
        )
        wait_s = SAFETY_NET_S if is_at_rest else self.interval_s
        return max(0.0, self._looked_s + wait_s - self.monotonic())

    def step(self, pause: Callable[[], None] = never_pause) -> SourceUpdate | None:
        """Scan once, or check whether the files of the last scan have been read.

        Returns None if nothing must be applied.

        Without `begin`, the first step waits until the files are read; no other step does. ``pause``: a function to
        call every few milliseconds during work in this process. This method raises no error for the state of the
        manifests; ``SourceUpdate.problems`` has it.
        """
        self._looked_s = self.monotonic()
        if self._pending is not None:
            return self._go_on(self._pending, pause)
        self._has_news = False
        try:
            scan = self._look(pause)
            self._watch(scan)
            self._look_for_displaced(scan)
        except OSError as error:
            message = f"cannot be read ({error.strerror}); the agent applies no change of the manifests until it can"
            place = Location(str(error.filename or self.root))
            self._directory_problems = (Problem(place, "", message, slug=UNREADABLE),)
            self._seen = None
            return self._batch(()) if self.problems != self._reported or not self._started else None
        self._directory_problems = ()
        if self._uncopied or self._copy_problems:
            self._keep_copies()
            self._sweep_copies()
        if not self._is_due(scan):
            return None
        self._pending = self._begin(scan)
        return self._go_on(self._pending, pause)

    def _look(self, pause: Callable[[], None]) -> _Scan:
        """Find all manifests below the root, which may itself be a manifest. Raises OSError."""
        status = self.root.stat()
        is_file = not stat.S_ISDIR(status.st_mode)
        if is_file and not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is neither a directory nor a regular file", str(self.root))
        if self._is_read and is_file != self._is_file:
            raise OSError(
                errno.EINVAL,
                f"it is a {'file' if is_file else 'directory'} now; restart the agent if that is intended",
                str(self.root),
            )
        if is_file:
            return _Scan({"": _signature(status)}, {})
        found = find_manifests(self.root, pause)
        files = {name: _signature(one) for name, one in found.files.items()}
        return _Scan(files, found.hidden, found.directories)

    def _watch(self, scan: _Scan) -> None:
        """Watch the directories of a scan. If they cannot be watched, they are only scanned at intervals."""
        last = self._watched
        if self.watch is None or (
            last is not None and (last.files, last.directories) == (scan.files, scan.directories)
        ):
            return
        failure, self._watched = "", None
        try:
            # An entry that appears in a directory between the scan and the first watch of it is found by the next scan.
            self._has_news |= self.watch.watch(self._places(scan))
            self._watched = scan
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}"
        if failure and failure != self._watch_failure:
            log.warning(
                "cannot watch the manifests with inotify (%s): the agent looks at them every %s s instead",
                failure, self.interval_s,
            )  # fmt: skip
        self._watch_failure = failure

    def _places(self, scan: _Scan) -> set[Path]:
        """The paths to watch: the directories of a scan, and the directories to which symbolic links of its files lead.

        As long as no directory was found, the result is the root and its parent.
        """
        if not scan.directories:
            return {self.root, self.root.parent}
        paths = {name: self.root / name for name in scan.files}
        links = {Path(os.path.realpath(one)).parent for one in paths.values() if one.is_symlink()}
        return {self.root / name for name in scan.directories} | links

    def _look_for_displaced(self, scan: _Scan) -> None:
        """Add files that a scan did not find, unless their absence is certain. Raises OSError."""
        if not self._is_read and self.copies is not None:
            self._homes = self.copies.directories()
        missing = [name for name in self._known() if name not in scan.files]
        told = _DirectoryHistory(scan, self.root, self._homes) if missing else None
        for name in missing:
            if told is not None and not scan.is_hidden(name):
                scan.hidden.update(told.displaced(name))
            if scan.is_hidden(name):
                scan.files[name] = UNREAD

    def _known(self) -> list[str]:
        """The names of the applied files. Before the first state is applied, those that an earlier agent applied.

        Raises OSError.
        """
        return list(self._taken) if self._is_read or self.copies is None else sorted(self.copies.names())

    def _is_due(self, scan: _Scan) -> bool:
        """Whether the directory differs from its applied state and no longer changes."""
        is_taken = scan == _Scan(self._taken, self._hidden)
        is_retry = any(at_s <= self.clock() for at_s in self._retries.values())
        if self._started and is_taken and not self._racy and not is_retry and self.problems == self._reported:
            self._seen, self._unsettled_looks = None, 0
            return False
        settled = is_taken or scan == self._seen
        if self._started and not settled and self._unsettled_looks < MAX_UNSETTLED_LOOKS:
            self._seen = scan
            self._unsettled_looks += 1
            return False
        self._seen, self._unsettled_looks = None, 0
        return True

    def _begin(self, scan: _Scan) -> _Pending:
        """Choose the files of a scan that must be read. If they are large, prepare a child that reads them."""
        now_s, before = self.clock(), self._too_many
        too_many = self._too_many = _beyond_all(scan.files)
        changed = {name for name, signature in scan.files.items() if self._taken.get(name) != signature}
        again = {name for name, at_s in self._retries.items() if at_s <= now_s and name in scan.files}
        names = changed | self._racy | again | (too_many ^ before)
        tasks = [self._task(name, scan.files[name]) for name in sorted(names & scan.files.keys())]
        pending = _Pending(scan, tasks, now_s)
        if not can_read_in_place(tasks):
            pending.reading = Reading(tasks, self.copies)
        return pending

    def _task(self, name: str, signature: Signature) -> ReadTask:
        before, place = self._files.get(name), self._path(name)
        copy = before is None and self.copies is not None
        digest = b"" if before is None else before.digest
        if signature == UNREAD:  # the unreadable directory is one problem for all files below
            return ReadTask(name, place, None, digest, copy, 0)
        if name in self._too_many:
            reason = (
                f"with those before it by name it is more than the {MOST_BYTES_IN_ALL >> 20} MiB that are read in all"
            )
            return ReadTask(name, place, None, b"", copy, 0, (unreadable(place, reason),))
        return ReadTask(name, place, place, digest, copy, signature[2])

    def _go_on(self, pending: _Pending, pause: Callable[[], None]) -> SourceUpdate | None:
        """Apply the files of a scan if they have been read. Otherwise returns None, or an update with new problems."""
        reading = pending.reading
        if reading is None:
            self._pending = None
            return self._batch(self._take_up(pending, ((task, read(task, self.copies)) for task in pending.tasks)))
        try:
            if not reading.has_begun:
                reading.begin()
            if not reading.has_ended(wait=self._waits and not self._is_read):
                return self._batch(()) if self.problems != self._reported else None
        except OSError as error:  # no process, no memory
            reading.close()
            self._pending = None
            message = (
                f"cannot start a process to read the manifests ({error.strerror}); their last good state stays in force"
            )
            self._process_problems = (Problem(Location(str(self.root)), "", message, slug=UNREADABLE),)
            return self._batch(())
        self._pending = None
        try:
            return self._batch(self._take_up(pending, reading.outcomes(pause)))
        finally:
            reading.close()

    def _slowness(self) -> Iterator[Problem]:
        """A problem if reading takes long, because the change is not in force yet."""
        reading = None if self._pending is None else self._pending.reading
        if reading is not None and time.monotonic() - reading.began_s >= SLOW_S:
            message = (
                "the agent is still reading a change of the manifests; their previous state stays in force until then"
            )
            yield Problem(Location(str(self.root)), "", message, severity="warning", slug="reading")

    def _take_up(self, pending: _Pending, outcomes: Iterator[tuple[ReadTask, ReadResult]]) -> tuple[ObjectEvent, ...]:
        """Update the files' states from the read results, and drop removed files. Returns the resulting events."""
        scan = pending.scan
        for name in self._taken.keys() - scan.files.keys():
            self._unmerged.add(name)
            del self._files[name], self._taken[name]
            self._uncopied[name] = None
            self._racy.discard(name)
            self._faulty.discard(name)
            self._retries.pop(name, None)
        for task, outcome in outcomes:
            before = self._files.get(task.name)
            self._note(task.name, self._entry(scan.files[task.name], pending.began_s, before, outcome), before)
            if task.name in self._uncopied and not self._copy_problems:
                self._keep_copies()  # at once, because the texts of all files together would need much memory
        self._is_read, self._process_problems = True, ()
        self._hidden, self._is_file = scan.hidden, not scan.directories
        self._homes = _DirectoryHistory(scan, self.root, self._homes).homes()
        self._keep_copies()
        self._sweep_copies()
        files = self._files
        changed = {name: files.get(name) for name in self._unmerged}
        events = self._merged.replace(
            {name: _NOTHING if one is None else (one.version, one.resources) for name, one in changed.items()}
        )
        self._unmerged.clear()
        return events

    def _entry(self, signature: Signature, began_s: float, before: _File | None, outcome: ReadResult) -> _File | None:
        """The new state of a file. An invalid file keeps its objects. None if no state of the file is known yet."""
        if outcome.state == "gone":  # removed after the scan, so the next scan does not find it
            return before
        entry = _File(signature, began_s) if before is None else replace(before, signature=signature, read_at_s=began_s)
        if outcome.state == "same":
            return entry
        if outcome.state == "good" or before is None:
            entry.resources, entry.version, entry.skipped = outcome.resources, outcome.version, outcome.skipped
        if outcome.state == "good":
            self._uncopied[outcome.name] = outcome.text
        if outcome.state == UNREADABLE:
            entry.signature = UNREAD  # differs from the file's signature, so that the next scan reads the file again
        if outcome.state == "kept":
            # The file was not read. With this time it is not young; each scan would read a young file again.
            entry.read_at_s = self.clock()
        if outcome.state != "kept" or outcome.problems:
            entry.digest, entry.problems = outcome.digest, outcome.problems
        self._retries.pop(outcome.name, None)
        if outcome.again:
            self._retries[outcome.name] = self.clock() + RETRY_S
        return entry

    def _keep_copies(self) -> None:
        """Update the copies. A failure to write is reported as a problem, and the next scan writes again."""
        self._copy_problems = ()
        if self.copies is None:
            self._uncopied.clear()
            return
        try:
            for name, text in list(self._uncopied.items()):
                if text is None:
                    self.copies.forget(name)
                else:
                    self.copies.store(name, text)
                del self._uncopied[name]
            if self._is_read and self._homes is not None and self._homes != self._copied_homes:
                self.copies.store_directories(self._homes)
                self._copied_homes = self._homes
        except OSError as error:
            self._copy_problems = (_uncopied(self.copies, error),)

    def _sweep_copies(self) -> None:
        """Remove copies of files that were removed while no agent ran.

        This happens once, when all files have been read and every path is readable.
        """
        if self.copies is None or self._is_swept or self._copy_problems or self._hidden:
            return
        try:
            self.copies.keep_only(self._taken)
            self._is_swept = True
        except OSError as error:
            self._copy_problems = (_uncopied(self.copies, error),)

    def _note(self, name: str, entry: _File | None, before: _File | None) -> None:
        """Record facts about a file that every scan needs, so that a scan need not visit each file."""
        if entry is None:
            return
        self._files[name] = entry
        self._taken[name] = entry.signature
        for names, holds in ((self._racy, entry.is_racy), (self._faulty, bool(entry.problems))):
            if holds:
                names.add(name)
            else:
                names.discard(name)
        if before is None or entry.resources is not before.resources:
            self._unmerged.add(name)

    def _path(self, name: str) -> Path:
        return self.root / name if name else self.root

    def _batch(self, events: tuple[ObjectEvent, ...]) -> SourceUpdate | None:
        problems = self.problems
        if self._started and not events and problems == self._reported:
            return None
        self._started, self._reported = True, problems
        return SourceUpdate(events, problems)


@dataclass(slots=True)
class _DirectoryHistory:
    """The directories with manifests of one scan, compared with those before.

    ``known``: the directories that contained manifests when a state of the source was last applied, with their
    identities; None if the file that records the identities was lost.
    """

    scan: _Scan
    root: Path
    known: Mapping[str, DirectoryId] | None
    _with_manifests: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        directories = self.scan.directories
        found = {name.rpartition("/")[0] for name, signature in self.scan.files.items() if signature != UNREAD}
        holders = {directories[above] for one in found & directories.keys() for above in _with_parents(one)}
        for name in directories:
            if directories[name] in holders:  # it is the same directory, even if its files have other names now
                self._with_manifests.update(_with_parents(name))

    def displaced(self, name: str) -> dict[str, str]:
        """For a file that was not found: the path that took its place, or its directory's place, with a description.

        {} if nothing took the place of either: the file, or its directory, was removed, so the objects of the file must
        be removed.
        """
        directories = self.scan.directories
        if name in directories:
            return (
                {} if name in self._with_manifests else {name: f"it is a directory without a manifest now; {_IF_MEANT}"}
            )
        for place in reversed(_with_parents(name)[1:]):  # from the root down
            if place not in directories:
                return {place: f"it is no directory any more; {_IF_MEANT}"} if self._is_there(place) else {}
            was = None if self.known is None else self.known.get(place, directories[place])
            if was != directories[place] and place not in self._with_manifests:
                return {place: f"it is another directory now, without a manifest; {_IF_MEANT}"}
        return {}

    def homes(self) -> dict[str, DirectoryId]:
        """The directories of all files, with their identities (device and inode), by path below the root.

        The directories of files that were not found but may still exist are included. A directory that could not be
        read keeps its earlier identity.
        """
        now, known = self.scan.directories, self.known or {}
        parents = {one.rpartition("/")[0] for one in self.scan.files if one}
        names = {above for one in parents for above in _with_parents(one)}
        return {
            name: known.get(name, _UNKNOWN) if name not in now or self.scan.is_hidden(name) else now[name]
            for name in names
        }

    def _is_there(self, name: str) -> bool:
        try:
            (self.root / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def _with_parents(name: str) -> list[str]:
    """A path and the paths of its parent directories; the last is "", the root."""
    names = [name]
    while names[-1]:
        names.append(names[-1].rpartition("/")[0])
    return names


def _beyond_all(files: Mapping[str, Signature]) -> frozenset[str]:
    """The files that, with all files before them by name, exceed MOST_BYTES_IN_ALL."""
    left, beyond = MOST_BYTES_IN_ALL, set()
    if sum(signature[2] for signature in files.values()) <= left:
        return frozenset()
    for name in sorted(files):
        size_bytes = files[name][2]
        if size_bytes > MOST_BYTES:  # rejected because of its own size
            continue
        left -= size_bytes
        if left < 0:
            beyond.add(name)
    return frozenset(beyond)


def _signature(status: os.stat_result) -> Signature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _hidden(path: Path, reason: str) -> Problem:
    message = f"cannot be read ({reason}); the last good state of everything at and below it stays in force"
    return Problem(Location(str(path)), "", message, slug=UNREADABLE)


def _without_manifests(root: Path) -> Problem:
    message = (
        "contains no manifest (*.yaml, *.yml, *.json): no policy is in force, so policy denies nothing to any workload; a file "
        "with only `---` declares that this is intended"
    )
    return Problem(Location(str(root)), "", message, slug="no-manifests")


def _uncopied(copies: LastGoodCopies, error: OSError) -> Problem:
    message = f"cannot write copies of last good states ({error.strerror}): after a restart a broken file may have none"
    return Problem(Location(str(copies.directory)), "", message, severity="warning", slug="copies")


def _duplicate(key: ResourceKey, resource: Resource, first: Resource) -> Problem:
    message = (
        f"the same object is written twice: the first one, at {first.meta.location}, is in force; remove one of them"
    )
    obj = "/".join(part for part in key if part)
    return Problem(resource.meta.location, "", message, obj=obj, slug="duplicate")
