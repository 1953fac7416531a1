# SPDX-License-Identifier: Apache-2.0
"""Reads manifest files into objects: in this process if that takes milliseconds, otherwise in a forked child process.

Parsing a megabyte of YAML takes seconds of CPU time and up to a hundred megabytes of memory, so the child has a limit
on each. The parent goes on with its work, polls for the child's exit, and reads the results from a memfd. Rejected
alternatives: parsing in portions in the event loop (a comment of 30 MB is one step of the parser), and threads (the
parser holds Python's global lock).

Invariant: both ways give the same results, in the order of the tasks. A file at which the child fails is reported as a
problem, and all other files are still read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from netpol_ebpf.child import part_from
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.resources.load import LoadResult, parse_documents
from netpol_ebpf.resources.manifest_files import never_pause, read_regular
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.resources.yamltree import read_documents
from netpol_ebpf.sources.copies import LastGoodCopies

IN_PLACE_BYTES = 4096
"""Largest total size, in bytes, of files that this process reads itself. That takes a few milliseconds, as starting a
child does."""
READ_S = 300
"""Time limit in seconds for one file. A file of 64 MiB, the largest that is read, needs half of it on a slow
processor."""
CHILD_BYTES = 2 << 30
"""Memory limit of the child in bytes, without the memory that it shares with the parent. A file of 64 MiB, the largest
that is read, needs half of this limit."""
MOST_PROBLEMS = 100
"""Largest number of problems of one file that are reported. The number is arbitrary."""
TAKEN_TOGETHER = 250
"""Number of objects processed between two pauses, which takes a few milliseconds. The number is arbitrary."""

UNREADABLE = "unreadable"
"""Slug of a problem, and state of a read: the file or directory cannot be read, so its objects stay as they were."""

_DOCUMENT_MARK = re.compile(r"^---(?:\s|$)", re.MULTILINE)
_ALIAS = re.compile(rb"[&*]\w")
"""Matches anchors and aliases of YAML, with which a small text can expand to large values."""

_LENGTH_BYTES = 8
_STANDARD_ERROR = 2
_NO_MEMORY, _BUG = 12, 70
"""The child's exit codes for too little memory and for a bug."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadTask:
    """A file to read.

    ``path``: the file; None: do not read it, only its last good state. ``digest``: of the text that was read last; b""
    if none was. ``copy``: use the last good state from its copy if the file is not valid. ``size_bytes``: the size that
    the scan found. ``problems``: why the file must not be read. ``again``: whether a later attempt to read may succeed
    even if the file does not change.
    """

    name: str
    place: Path
    path: Path | None
    digest: bytes
    copy: bool
    size_bytes: int
    problems: tuple[Problem, ...] = ()
    again: bool = False


@dataclass(slots=True)
class ReadResult:
    """The result of reading one file.

    ``state``: "good" or "bad" after reading; "same" if the text did not change; "gone" if the file no longer exists;
    "unreadable"; or "kept" if the file was not read. ``resources``, ``skipped``: the file's objects, and numbers of
    objects of other kinds. If the file is not good and the task has ``copy``, they are those of the last good state.
    ``version``: hex digest of the text with these objects. ``text``: the text of a good file, for its copy. ``again``:
    as in the task.
    """

    name: str
    state: str
    digest: bytes = b""
    problems: tuple[Problem, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    text: str | None = None
    again: bool = False
    resources: tuple[Resource, ...] = ()
    version: str = ""


def can_read_in_place(tasks: Sequence[ReadTask]) -> bool:
    """Whether reading these files in this process takes only some milliseconds."""
    if sum(task.size_bytes for task in tasks) > IN_PLACE_BYTES:
        return False
    return not any(_has_aliases(task.path) for task in tasks if task.path is not None)


def _has_aliases(path: Path) -> bool:
    with contextlib.suppress(OSError):  # `read` reports the error
        return len(_ALIAS.findall(read_regular(path))) > 1
    return False


def read(task: ReadTask, copies: LastGoodCopies | None) -> ReadResult:
    """Read one file in this process. Errors in the file are part of the result."""
    if task.path is None:
        return _with_last_good(ReadResult(task.name, "kept", problems=task.problems, again=task.again), task, copies)
    try:
        raw = read_regular(task.path)
    except FileNotFoundError:
        return ReadResult(task.name, "gone")
    except OSError as error:
        outcome = ReadResult(task.name, UNREADABLE, problems=(unreadable(task.place, error.strerror),))
        return _with_last_good(outcome, task, copies)
    digest = hashlib.sha256(raw).digest()
    if digest == task.digest:
        return ReadResult(task.name, "same", digest)
    result = _parse(raw, task.place)
    outcome = ReadResult(task.name, "bad", digest, tuple(_few(result.problems, task.place)))
    if result.errors:
        return _with_last_good(outcome, task, copies)
    outcome.state, outcome.text, outcome.version = "good", raw.decode("utf-8"), digest.hex()
    outcome.resources, outcome.skipped = tuple(result.resources), result.skipped
    return outcome


def _with_last_good(outcome: ReadResult, task: ReadTask, copies: LastGoodCopies | None) -> ReadResult:
    """The read result; if the task has ``copy``, with the objects of the file's last good state.

    That state is read from the copy that an earlier agent stored.
    """
    if not task.copy or copies is None:
        return outcome
    try:
        text = copies.load(task.name)
    except (OSError, UnicodeDecodeError) as error:
        text = None
        message = f"its last good state cannot be read from {copies.directory} either ({error})"
        outcome.problems += (Problem(Location(str(task.place)), "", message, slug="copies"),)
    if text is not None:
        good = parse_documents(text, str(task.place))
        outcome.resources, outcome.skipped = tuple(good.resources), good.skipped
        outcome.version = hashlib.sha256(text.encode()).hexdigest()
        if good.errors:  # it was valid only for another version of the agent
            outcome.problems += (_no_longer_good(task.place, good),)
    return outcome


@dataclass(slots=True)
class Reading:
    """Reads the files of one scan in a child process.

    Callers call `begin`, poll `has_ended`, then call `outcomes` once.
    """

    tasks: Sequence[ReadTask]
    copies: LastGoodCopies | None
    began_s: float = field(default_factory=time.monotonic)
    _left: list[ReadTask] = field(default_factory=list)
    _done: list[tuple[ReadTask, int]] = field(default_factory=list)  # task, and index of the results file that has it
    _results: list[io.BufferedReader] = field(default_factory=list)
    _process: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether a child was started."""
        return bool(self._results)

    def begin(self) -> None:
        """Start a child that reads the files. Raises OSError if no child can be started now."""
        self._left = list(self.tasks)
        self._fork()

    def _fork(self) -> None:
        parent, results = os.getpid(), os.memfd_create("manifests", os.MFD_CLOEXEC)
        self._results.append(os.fdopen(results, "rb"))
        self._process = os.fork()
        if self._process == 0:
            _work(parent, results, self._left, self.copies)

    def has_ended(self, *, wait: bool = False) -> bool:
        """Whether all files have been read. ``wait``: block until they have been read.

        Raises OSError if a further child cannot be started now.
        """
        while self._left:
            done, status = os.waitpid(self._process, 0 if wait else os.WNOHANG)
            if not done:
                return False
            self._process = 0
            self._note_end(os.waitstatus_to_exitcode(status))
        return True

    def _note_end(self, code: int) -> None:
        """Handle the end of a child. If files remain, start another child for them.

        The file at which the child ended is not read again; a problem reports it.
        """
        number, results = len(self._results) - 1, self._results[-1]
        results.seek(0)
        while self._left and _skip(results):
            self._done.append((self._left.pop(0), number))
        results.seek(0)
        if self._left:
            why, again = _reason(code)
            failed = self._left[0]
            if failed.path is None:  # not even its last good state can be read
                failed = replace(failed, copy=False)
            problems = (*failed.problems, unreadable(failed.place, why))
            self._left[0] = replace(failed, path=None, problems=problems, again=again)
            self._fork()

    def outcomes(self, pause: Callable[[], None] = never_pause) -> Iterator[tuple[ReadTask, ReadResult]]:
        """The results of all files, in the order of the tasks.

        ``pause``: a function to call every few milliseconds.
        """
        # A file object without `peek` keeps the unpickler from reading beyond its object.
        feeds = [SimpleNamespace(read=one.read, readline=one.readline) for one in self._results]
        unpicklers = [pickle.Unpickler(one) for one in feeds]  # noqa: S301 - written by our own child
        for task, number in self._done:
            yield task, _load(self._results[number], unpicklers[number], pause)

    def close(self) -> None:
        """End a running child, and close the files that contain results."""
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = 0
        for one in self._results:
            one.close()
        self._results.clear()


# --- what the child leaves: for each file its length in bytes, 0 while it is being read, an outcome, its text, its objects ------


def _skip(results: io.BufferedReader) -> bool:
    """Skip the rest of one file's results. Returns False if they are not complete."""
    length = int.from_bytes(results.read(_LENGTH_BYTES), "little")
    if length:
        results.seek(length, os.SEEK_CUR)
    return bool(length)


def _load(results: io.BufferedReader, unpickler: pickle.Unpickler, pause: Callable[[], None]) -> ReadResult:
    results.read(_LENGTH_BYTES)
    outcome: ReadResult = unpickler.load()
    outcome.text = pickle.load(results)  # noqa: S301 - written by our own child
    resources: list[Resource] = []
    while part := unpickler.load():
        pause()
        resources += part
    outcome.resources = tuple(resources)
    pause()
    return outcome


def _work(parent: int, results: int, tasks: Sequence[ReadTask], copies: LastGoodCopies | None) -> NoReturn:
    """Do the child's work, then exit the process. Never returns."""
    code = _BUG
    try:
        part_from(parent, READ_S)
        _let_go_of_all_but(results)
        _limit_memory()
        _leave_all(results, tasks, copies)
        code = 0
    except MemoryError:
        code = _NO_MEMORY
    except Exception:  # the one place where a bug in reading becomes an exit code
        log.exception("bug: manifests cannot be read")
    finally:
        os._exit(code)


def _let_go_of_all_but(results: int) -> None:
    """Close the descriptors that the agent had. A connection ends for its peer only when no process has it open."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > _STANDARD_ERROR and int(name) != results:
            with contextlib.suppress(OSError):  # the descriptor of the listed directory
                os.close(int(name))


def _limit_memory() -> None:
    shared = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = shared + CHILD_BYTES
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _leave_all(results: int, tasks: Sequence[ReadTask], copies: LastGoodCopies | None) -> None:
    with os.fdopen(results, "wb", closefd=False) as file:
        pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)  # for all files, so that shared values stay shared
        for task in tasks:
            signal.alarm(READ_S)
            begin = file.tell()
            file.write(bytes(_LENGTH_BYTES))
            outcome = read(task, copies)
            pickler.dump(replace(outcome, resources=(), text=None))
            pickle.dump(outcome.text, file, pickle.HIGHEST_PROTOCOL)
            for first in range(0, len(outcome.resources), TAKEN_TOGETHER):
                pickler.dump(outcome.resources[first : first + TAKEN_TOGETHER])
            pickler.dump(())
            file.flush()
            os.pwrite(results, (file.tell() - begin - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little"), begin)


def _reason(code: int) -> tuple[str, bool]:
    """Why a child ended early, as text, and whether a later attempt may succeed."""
    if code == -signal.SIGALRM:
        return f"that takes longer than {READ_S} s; write its objects into several files", False
    if code == _NO_MEMORY:
        return f"that takes more than {CHILD_BYTES >> 20} MiB of memory; write its objects into several files", False
    if code < 0:
        return f"the process that read it was ended by {signal.Signals(-code).name}", True
    return "a bug; the log has the details", False


# --- one text --------------------------------------------------------------------------------------------------------------------


def unreadable(place: Path, reason: str | None) -> Problem:
    """The problem that a file cannot be read, with the consequence."""
    message = f"cannot be read ({reason}); its last good state stays in force"
    return Problem(Location(str(place)), "", message, slug=UNREADABLE)


def _parse(raw: bytes, path: Path) -> LoadResult:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        return LoadResult(resources=[], problems=[Problem(Location(str(path), line), "", message, slug="encoding")])
    blank = not text.removeprefix("\ufeff").strip()  # a text of tabs is blank, too; YAML would reject it
    result = parse_documents("" if blank else text, str(path))
    if not result.resources and not result.errors and not _says_none(text, str(path)):
        message = (
            "is empty, or has only spaces and comments; its last good state stays in force: write `---` into it if it must "
            "have no objects, or remove it"
        )
        result.problems.append(Problem(Location(str(path)), "", message, slug="empty"))
    return result


def _says_none(text: str, file: str) -> bool:
    """Whether a text without objects states that it has none: by a document start ``---`` or an empty List."""
    has_mark = _DOCUMENT_MARK.search(text.removeprefix("\ufeff")) is not None
    return has_mark or any(True for _ in read_documents(text, file, []))


def _few(problems: Sequence[Problem], place: Path) -> Iterator[Problem]:
    """The first MOST_PROBLEMS problems, and one more that says how many are left out."""
    yield from problems[:MOST_PROBLEMS]
    more = problems[MOST_PROBLEMS:]
    if more:
        severity = "error" if any(one.severity == "error" for one in more) else "warning"
        message = f"has {len(more)} more problems, which are not reported"
        yield Problem(Location(str(place), more[0].location.line), "", message, severity=severity, slug="more")


def _no_longer_good(path: Path, good: LoadResult) -> Problem:
    message = (
        f"its last good state is not valid to this version of the agent either ({good.errors[0].message}): "
        f"{len(good.resources)} of its objects are in force, the others are not; correct the file"
    )
    return Problem(Location(str(path)), "", message, slug="copies")
