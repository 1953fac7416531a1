# SPDX-License-Identifier: Apache-2.0
"""Objects from a directory of manifests, followed as it changes: the source behind ``--manifests DIR``.

The directory is looked at by polling (name, inode, size and times of every file), not by inotify: polling sees atomic renames,
symlink swaps of mounted ConfigMaps and network file systems alike, and has no queue that can overflow.

Invariants: one look yields one batch, so objects that change together arrive together; a file that cannot be read, is not
valid, or says nothing keeps the objects of its last good state (also over a restart, when a directory for copies is given) and
is reported until it is mended; so does everything below a place that cannot be looked at.  Objects go when their file goes or
says so: by leaving them out, or by ``---`` or an empty List where it has no others.  Of an object that is written twice the first by
file name counts and the others are reported; of one in the form in which Calico stores it and as projectcalico.org/v3, the latter counts.

A directory is taken up when two looks in a row saw the same, so neither a half-written file nor the moment between the removal
of a file and the appearance of its successor becomes policy.  This module runs no loop and keeps no clock of its own for that:
`ManifestDirectory.step` is one look.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Union

from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.translate import ResourceKey, key_of
from netpol_ebpf.resources.load import LoadResult, parse_documents
from netpol_ebpf.resources.manifest_files import find_manifests
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.resources.yamltree import read_documents

INTERVAL_S = 0.2
"""Recommended time between two looks: a change is taken up after one to two of them, well within a second."""

MAX_UNSETTLED_LOOKS = 3
"""A directory that never stops changing is taken up as it is after this many looks."""

RACY_S = 2.0
"""A file younger than this when read may change again without its times or size showing it; it is compared by content."""

Signature = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, modification time, change time (ns)."""
UNREAD: Signature = (0, 0, 0, 0, 0)
"""Equals the signature of no file."""

_DOCUMENT_MARK = re.compile(r"^---(?:\s|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Upsert:
    """An object appeared, changed, or moved to another place of the manifests. ``key``: to be kept rather than made again."""

    resource: Resource
    key: ResourceKey


@dataclass(frozen=True, slots=True)
class Remove:
    """An object went; ``resource`` is its last state."""

    resource: Resource
    key: ResourceKey


Event = Union[Upsert, Remove]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one look brought: events to be applied together, and all problems there are now, in file and line order."""

    events: tuple[Event, ...]
    problems: tuple[Problem, ...]


@dataclass(slots=True)
class _File:
    """What is known of one file.

    ``digest`` is of the text last read, good or not; ``problems`` are of that text; ``skipped``: objects beside ``resources`` of
    kinds that are not read, by apiVersion and kind.
    """

    signature: Signature
    read_at_s: float
    digest: bytes = b""
    resources: tuple[Resource, ...] = ()
    problems: tuple[Problem, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_racy(self) -> bool:
        return self.read_at_s - self.signature[3] / 1e9 < RACY_S


@dataclass(slots=True)
class LastGoodCopies:
    """Texts of the last good state of each file, so that a restart with a broken file changes no policy.

    ``directory`` is made when the first copy is stored. Names are hashed, since a manifest may have any name; each copy has the
    name beside it.  All raise OSError.
    """

    directory: Path

    def _path(self, name: str) -> Path:
        return self.directory / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    def load(self, name: str) -> str | None:
        """The copy, or None when there is none. Raises UnicodeDecodeError, too."""
        try:
            return self._path(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def store(self, name: str, text: str) -> None:
        """Replace the copy in one step."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(name)
        draft = path.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
        beside, raw = path.with_suffix(".name"), name.encode(errors="surrogateescape")
        if not beside.exists() or beside.read_bytes() != raw:
            beside.write_bytes(raw)

    def names(self) -> list[str]:
        """The files that there are copies of, whatever has become of the files."""
        if not self.directory.is_dir():
            return []
        found = [path.read_bytes().decode(errors="surrogateescape") for path in self.directory.glob("*.name")]
        return [name for name in found if self._path(name).exists()]  # a name that was written in part has no copy

    def forget(self, name: str) -> None:
        """Remove the copy, if there is one."""
        for path in (self._path(name), self._path(name).with_suffix(".name")):
            path.unlink(missing_ok=True)

    def keep_only(self, names: Mapping[str, object]) -> None:
        """Forget the copies of all other files."""
        if not self.directory.is_dir():
            return
        wanted = {self._path(name).name for name in names}
        for path in self.directory.iterdir():
            if path.name.removesuffix(".name") not in wanted:
                path.unlink()


@dataclass(frozen=True, slots=True)
class _Sight:
    """One look: manifests by name ("" for a root that is a file), and why other places could not be looked at, by name."""

    files: dict[str, Signature]
    hidden: dict[str, str]

    def is_hidden(self, name: str) -> bool:
        """Whether a file may be there, at or below a place that could not be looked at."""
        return any(name == place or name.startswith(f"{place}/") for place in self.hidden)


Place = tuple[bool, str, int]
"""Whether it is the form in which Calico stores an object, name of the file, the object's number in it: the least place counts."""


@dataclass(slots=True)
class _Merged:
    """The objects of all files, kept up file by file: a change costs what it touches, not what there is.

    Invariant: ``homes`` holds of each key the least place that gives it, ``others`` the further ones, in order; a key that is given
    once is not in ``others``.  ``given``: of each file, what was taken up.
    """

    given: dict[str, tuple[Resource, ...]] = field(default_factory=dict)
    homes: dict[ResourceKey, Place] = field(default_factory=dict)
    others: dict[ResourceKey, list[Place]] = field(default_factory=dict)

    def replace(self, files: Mapping[str, tuple[Resource, ...]]) -> tuple[Event, ...]:
        """Take up files given as name to resources, none for one that went. Removals come first; each part in file order."""
        was: dict[ResourceKey, tuple[Place, Resource] | None] = {}
        for name in files:
            for number, resource in enumerate(self.given.get(name, ())):
                key = key_of(resource)
                was.setdefault(key, self._first(key))
                self._retract(key, (resource.meta.is_stored, name, number))
        for name in files:
            self.given.pop(name, None)
        for name, resources in files.items():
            if resources:
                self.given[name] = resources
            for number, resource in enumerate(resources):
                key = key_of(resource)
                was.setdefault(key, self._first(key))
                self._claim(key, (resource.meta.is_stored, name, number))
        removals: list[tuple[Place, Event]] = []
        upserts: list[tuple[Place, Event]] = []
        for key, old in was.items():
            new = self._first(key)
            if new is None:
                if old is not None:
                    removals.append((old[0], Remove(old[1], key)))
            elif old is None or old[1] != new[1]:
                upserts.append((new[0], Upsert(new[1], key)))
        return tuple(event for part in (removals, upserts) for _, event in sorted(part, key=lambda one: one[0]))

    def duplicates(self) -> Iterator[Problem]:
        """A problem for each place but the first of each object; none where Calico's stored form is given beside the object."""
        for key, others in self.others.items():
            home = self._at(self.homes[key])
            for one in map(self._at, others):
                if one.meta.is_stored == home.meta.is_stored:
                    yield _duplicate(key, one, home)

    def _at(self, place: Place) -> Resource:
        _, name, number = place
        return self.given[name][number]

    def _first(self, key: ResourceKey) -> tuple[Place, Resource] | None:
        home = self.homes.get(key)
        return None if home is None else (home, self._at(home))

    def _claim(self, key: ResourceKey, place: Place) -> None:
        first = self.homes.get(key)
        if first is not None:
            place, *self.others[key] = sorted([first, *self.others.get(key, ()), place])
        self.homes[key] = place

    def _retract(self, key: ResourceKey, place: Place) -> None:
        others = self.others.pop(key, [])
        if self.homes[key] != place:
            others = [other for other in others if other != place]
        elif others:
            self.homes[key], *others = others
        else:
            del self.homes[key]
        if others:
            self.others[key] = others


@dataclass(slots=True)
class ManifestDirectory:
    """Follows one directory (or one file) of manifests.

    ``copies``: where last good states outlive the process; None keeps them in memory only.  ``clock``: wall-clock seconds,
    comparable with file times.
    """

    root: Path
    copies: LastGoodCopies | None = None
    clock: Callable[[], float] = time.time
    _files: dict[str, _File] = field(default_factory=dict)
    _taken: dict[str, Signature] = field(default_factory=dict)
    _hidden: dict[str, str] = field(default_factory=dict)
    _racy: set[str] = field(default_factory=set)
    _faulty: set[str] = field(default_factory=set)
    _unmerged: set[str] = field(default_factory=set)
    _merged: _Merged = field(default_factory=_Merged)
    _uncopied: dict[str, str | None] = field(default_factory=dict)  # texts to be copied, None: a copy to be removed
    _is_swept: bool = False  # of copies of files that went while nobody looked
    _copy_problems: tuple[Problem, ...] = ()
    _directory_problems: tuple[Problem, ...] = ()
    _seen: _Sight | None = None
    _unsettled_looks: int = 0
    _started: bool = False
    _is_read: bool = False
    _reported: tuple[Problem, ...] = ()

    @property
    def was_read(self) -> bool:
        """Whether the directory has been taken up at least once."""
        return self._is_read

    @property
    def skipped(self) -> dict[str, int]:
        """How many objects of kinds that are not read there are, by apiVersion and kind."""
        total: Counter[str] = Counter()
        for file in self._files.values():
            if file.skipped:
                total.update(file.skipped)
        return dict(sorted(total.items()))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong with the manifests as they were last taken up, in file and line order."""
        found = [*self._directory_problems, *self._copy_problems, *self._merged.duplicates()]
        found += [_hidden(self._path(name), reason) for name, reason in self._hidden.items()]
        if self._is_read and not self._taken and not self._hidden:
            found.append(_without_manifests(self.root))
        for name in self._faulty:
            found.extend(self._files[name].problems)
        return tuple(sorted(found, key=lambda p: (p.location.file, p.location.line, p.location.column, p.message)))

    def step(self) -> Batch | None:
        """Look once. None: nothing to take up (yet). The first look is taken up at once.

        Never raises for the state of the manifests; that is in ``Batch.problems``.
        """
        try:
            sight = _look(self.root)
            for name in self._known() if sight.hidden else ():
                if sight.is_hidden(name):
                    sight.files.setdefault(name, UNREAD)  # nobody knows that it went
        except OSError as error:
            message = f"cannot be read ({error.strerror}); until it can, no change of the manifests is taken up"
            place = Location(str(error.filename or self.root))
            self._directory_problems = (Problem(place, "", message, slug="unreadable"),)
            self._seen = None
            return self._batch(()) if self.problems != self._reported or not self._started else None
        self._directory_problems = ()
        if self._uncopied:
            self._keep_copies()
            self._sweep_copies()
        if not self._is_due(sight):
            return None
        return self._batch(self._take_up(sight))

    def _known(self) -> list[str]:
        """The files taken up, and before there are any those that a predecessor had. Raises OSError."""
        return list(self._taken) if self._is_read or self.copies is None else self.copies.names()

    def _is_due(self, sight: _Sight) -> bool:
        """Whether the directory differs from what was taken up and has settled."""
        is_taken = sight == _Sight(self._taken, self._hidden)
        if self._started and is_taken and not self._racy and self.problems == self._reported:
            self._seen, self._unsettled_looks = None, 0
            return False
        settled = is_taken or sight == self._seen
        if self._started and not settled and self._unsettled_looks < MAX_UNSETTLED_LOOKS:
            self._seen = sight
            self._unsettled_looks += 1
            return False
        self._seen, self._unsettled_looks = None, 0
        return True

    def _take_up(self, sight: _Sight) -> tuple[Event, ...]:
        """Read what changed and forget what went; what that makes of the objects."""
        snapshot, self._hidden = sight.files, sight.hidden
        for name in self._taken.keys() - snapshot.keys():
            self._unmerged.add(name)
            del self._files[name], self._taken[name]
            self._uncopied[name] = None
            self._racy.discard(name)
            self._faulty.discard(name)
        taken = self._taken
        changed = {name for name, signature in snapshot.items() if taken.get(name) != signature}
        for name in sorted(changed | self._racy):
            before = self._files.get(name)
            if snapshot[name] == UNREAD:
                self._keep(name, before)
            else:
                self._read(name, snapshot[name], before)
            if name in self._uncopied and not self._copy_problems:
                self._keep_copies()  # the texts of all files at once would be the agent's peak of memory
            after = self._files.get(name)
            if after is not None:
                self._note(name, after)
                if before is None or after.resources is not before.resources:
                    self._unmerged.add(name)
        self._is_read = True
        self._keep_copies()
        self._sweep_copies()
        files = self._files
        events = self._merged.replace({name: files[name].resources if name in files else () for name in self._unmerged})
        self._unmerged.clear()
        return events

    def _keep_copies(self) -> None:
        """Bring the copies up to date. What cannot be written is told, and tried again at the next look."""
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
        except OSError as error:
            self._copy_problems = (_uncopied(self.copies, error),)

    def _sweep_copies(self) -> None:
        """Remove copies of files that went while nobody looked. Once, when all files have been read and nothing is hidden."""
        if self.copies is None or self._is_swept or self._copy_problems or self._hidden:
            return
        try:
            self.copies.keep_only(self._taken)
            self._is_swept = True
        except OSError as error:
            self._copy_problems = (_uncopied(self.copies, error),)

    def _note(self, name: str, entry: _File) -> None:
        """Keep what every look asks of all files, so that it need not go through them."""
        self._taken[name] = entry.signature
        for names, holds in ((self._racy, entry.is_racy), (self._faulty, bool(entry.problems))):
            if holds:
                names.add(name)
            else:
                names.discard(name)

    def _keep(self, name: str, before: _File | None) -> None:
        """Have a file that cannot be looked at stay what it was; that of its place is told once for all below it."""
        if before is None:
            self._files[name] = self._or_last_good(name, _File(UNREAD, self.clock()), None)
        else:
            self._files[name] = replace(before, signature=UNREAD)

    def _read(self, name: str, signature: Signature, before: _File | None) -> None:
        """Bring one file up to date; a file that is not valid keeps its objects."""
        path = self._path(name)
        entry = _File(signature, self.clock())
        if before is not None:
            entry.digest, entry.resources, entry.problems = before.digest, before.resources, before.problems
            entry.skipped = before.skipped
        try:
            raw = _read_regular(path) if name else path.read_bytes()
        except FileNotFoundError:
            return  # it went after the look; the next look shows that
        except OSError as error:
            entry.problems, entry.digest = (_unreadable(path, error),), b""
            entry.signature = UNREAD  # whatever the reason, the next look tries again
            self._files[name] = self._or_last_good(name, entry, before)
            return
        digest = hashlib.sha256(raw).digest()
        if before is None or digest != before.digest:
            entry.digest = digest
            result = _parse(raw, path)
            entry.problems = tuple(result.problems)
            if result.errors:
                entry = self._or_last_good(name, entry, before)
            else:
                entry.resources, entry.skipped = tuple(result.resources), result.skipped
                self._uncopied[name] = raw.decode("utf-8")
        self._files[name] = entry

    def _or_last_good(self, name: str, entry: _File, before: _File | None) -> _File:
        """For a file that this process has never seen good: the state a predecessor stored."""
        if before is None and self.copies is not None:
            try:
                text = self.copies.load(name)
            except (OSError, UnicodeDecodeError) as error:
                text = None
                message = f"its last good state cannot be read from {self.copies.directory} either ({error})"
                entry.problems += (Problem(Location(str(self._path(name))), "", message, slug="copies"),)
            if text is not None:
                good = parse_documents(text, str(self._path(name)))
                entry.resources, entry.skipped = tuple(good.resources), good.skipped
                if good.errors:  # another version of the agent took it for good
                    entry.problems += (_no_longer_good(self._path(name), good),)
        return entry

    def _path(self, name: str) -> Path:
        return self.root / name if name else self.root

    def _batch(self, events: tuple[Event, ...]) -> Batch | None:
        problems = self.problems
        if self._started and not events and problems == self._reported:
            return None
        self._started, self._reported = True, problems
        return Batch(events, problems)


def _parse(raw: bytes, path: Path) -> LoadResult:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        return LoadResult(resources=[], problems=[Problem(Location(str(path), line), "", message, slug="encoding")])
    blank = not text.removeprefix("\ufeff").strip()  # tabs as well, which YAML would find fault with
    result = parse_documents("" if blank else text, str(path))
    if not result.resources and not result.errors and not _says_none(text, str(path)):
        message = (
            "says nothing (it is empty, or has spaces and comments alone); its last good state stays in force: write `---` "
            "into it if it is meant to have no objects, or remove it"
        )
        result.problems.append(Problem(Location(str(path)), "", message, slug="empty"))
    return result


def _says_none(text: str, file: str) -> bool:
    """Whether a text without objects means that: it begins a document, or has an empty List."""
    has_mark = _DOCUMENT_MARK.search(text.removeprefix("\ufeff")) is not None
    return has_mark or any(True for _ in read_documents(text, file, []))


def _look(root: Path) -> _Sight:
    """All manifests below ``root``, which may be one itself. Raises OSError."""
    status = root.stat()
    if not stat.S_ISDIR(status.st_mode):
        return _Sight({"": _signature(status)}, {})
    found = find_manifests(root)
    return _Sight({name: _signature(one) for name, one in found.files.items()}, found.hidden)


def _read_regular(path: Path) -> bytes:
    """The content of a regular file; of nothing else, since a pipe might never end. Raises OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read()


def _signature(status: os.stat_result) -> Signature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _unreadable(path: Path, error: OSError) -> Problem:
    message = f"cannot be read ({error.strerror}); its last good state stays in force"
    return Problem(Location(str(path)), "", message, slug="unreadable")


def _no_longer_good(path: Path, good: LoadResult) -> Problem:
    message = (
        f"its last good state is not valid to this version of the agent either ({good.errors[0].message}): "
        f"{len(good.resources)} of its objects are in force, the others are not; mend the file"
    )
    return Problem(Location(str(path)), "", message, slug="copies")


def _hidden(path: Path, reason: str) -> Problem:
    message = f"cannot be read ({reason}); what was last known of it, and of what is below it, stays in force"
    return Problem(Location(str(path)), "", message, slug="unreadable")


def _without_manifests(root: Path) -> Problem:
    message = (
        "holds no manifest (*.yaml, *.yml, *.json): no policy is in force, so policy denies nothing to any workload; a file with "
        "`---` alone says that this is meant"
    )
    return Problem(Location(str(root)), "", message, slug="no-manifests")


def _uncopied(copies: LastGoodCopies, error: OSError) -> Problem:
    message = f"last good states cannot be kept there ({error.strerror}): after a restart a broken file may have none"
    return Problem(Location(str(copies.directory)), "", message, severity="warning", slug="copies")


def _duplicate(key: ResourceKey, resource: Resource, first: Resource) -> Problem:
    message = f"the same object is given twice: first at {first.meta.location}, which counts; remove one of them"
    obj = "/".join(part for part in key if part)
    return Problem(resource.meta.location, "", message, obj=obj, slug="duplicate")
