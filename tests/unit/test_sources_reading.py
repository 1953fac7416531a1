# SPDX-License-Identifier: Apache-2.0
"""Reading many or large files by a child process.

The result is the same, the loop goes on, and the end of a child is reported.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sources_files import names, pod, settled, write

from netpol_ebpf.sources import files, reading
from netpol_ebpf.sources.copies import LastGoodCopies
from netpol_ebpf.sources.files import ManifestDirectory
from netpol_ebpf.sources.source import SourceUpdate

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""Of the threads of a test runner; the agent has one."""

DEADLINE_S = 60.0
READ = reading.read
FORK = os.fork


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ManifestDirectory]:
    """A directory that has been taken up, with copies; slowness of the machine is not told."""
    monkeypatch.setattr(files, "SLOW_S", DEADLINE_S)
    one = ManifestDirectory(tmp_path / "manifests", LastGoodCopies(tmp_path / "copies"))
    write(one, "a.yaml", pod("one"))
    write(one, "b.yaml", pod("two"))
    one.step()
    yield one
    one.close()


def large(*names: str, app: str = "web") -> str:
    """A text that is not read in place."""
    return "---\n".join(pod(name, app) for name in names) + "# " + "x" * reading.IN_PLACE_BYTES + "\n"


def awaited(source: ManifestDirectory) -> SourceUpdate:
    """The next batch, whoever reads it."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        batch = source.step()
        if batch is not None:
            return batch
    raise AssertionError("nothing was taken up")


def in_child(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any], name: str) -> None:
    """Have something happen when a child reads the file of that name."""
    real, parent = reading.read, os.getpid()

    def changed(task: reading.Task, copies: LastGoodCopies | None) -> reading.Outcome:
        if task.name == name and task.path is not None and os.getpid() != parent:
            do()
        return real(task, copies)

    monkeypatch.setattr(reading, "read", changed)


def wait_for_stop(source: ManifestDirectory, look: Callable[[], Any] | None = None) -> int:
    """Begin to read, by looks, and wait until the child has stopped itself; its number."""
    while source._pending is None:
        (look or source.step)()
    assert source._pending.reading is not None
    process = source._pending.reading._process
    os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT)
    return process


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_child_reads_what_is_large_and_the_loop_goes_on(
    source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the child works every look returns at once; then all that changed comes in one batch, with the copies."""
    in_child(monkeypatch, stop, "c.yaml")
    write(source, "a.yaml", pod("one", app="db"))
    write(source, "c.yaml", large("three", "four"))
    child = wait_for_stop(source)
    assert [source.step() for _ in range(5)] == [None] * 5
    os.kill(child, signal.SIGCONT)
    batch = awaited(source)
    assert names(batch) == {"one": "Upsert", "three": "Upsert", "four": "Upsert"}
    assert batch.problems == ()
    assert source.copies is not None
    assert source.copies.load("c.yaml") == large("three", "four")
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


def test_small_changes_are_read_in_place(source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's file is read without a child; a file with multiplying aliases is not."""
    forks: list[int] = []
    real = os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or real())
    write(source, "a.yaml", pod("one", app="db"))
    assert names(settled(source)) == {"one": "Upsert"}
    assert forks == []
    write(source, "a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n---\n" + pod("one"))
    awaited(source)
    assert forks == [1]


@pytest.mark.parametrize("restarted", [False, True])
def test_both_ways_of_reading_give_the_same(
    source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch, *, restarted: bool
) -> None:
    """Objects, problems, what is skipped and copies do not depend on who reads; labels that objects share stay shared."""

    def make(one: ManifestDirectory) -> None:
        write(one, "a.yaml", "kind: [")
        write(one, "b.yaml", "")
        write(one, "c.yaml", "---\n".join(pod(f"p{number}") for number in range(600)))
        write(one, "d.yaml", "apiVersion: apps/v1\nkind: Deployment\n---\n" + pod("dup"))
        write(
            one,
            "e.yaml",
            pod("dup") + "---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: c}\n",
        )
        os.mkfifo(one.root / "f.yaml")
        (one.root / "g.yaml").write_bytes(b"a: \xff\n")

    make(source)
    if restarted:
        source = ManifestDirectory(source.root, source.copies)
    by_child = awaited(source)
    assert source.copies is not None
    other = ManifestDirectory(source.root, LastGoodCopies(source.copies.directory.with_name("others")))
    for path in source.copies.directory.iterdir():
        other.copies.directory.mkdir(exist_ok=True)  # type: ignore[union-attr]
        (other.copies.directory / path.name).write_bytes(path.read_bytes())  # type: ignore[union-attr]
    monkeypatch.setattr(files, "can_read_in_place", lambda _tasks: True)
    in_place = other.step()
    assert in_place is not None
    kept = [event for event in in_place.events if event.resource.meta.name not in ("one", "two")]
    assert [event for event in by_child.events if event.resource.meta.name not in ("one", "two")] == kept
    assert names(in_place).keys() >= {"one", "two"}
    assert by_child.problems == in_place.problems
    assert source.skipped == other.skipped
    assert len({id(event.resource.meta.labels) for event in by_child.events}) < 5
    assert len({id(event.resource.meta.location.file) for event in by_child.events}) < 5


def test_many_objects_are_taken_up_with_pauses(source: ManifestDirectory) -> None:
    """Between portions of what the child left other work gets its turn."""
    write(source, "c.yaml", "---\n".join(pod(f"p{number}") for number in range(1000)))
    pauses: list[int] = []
    batch = None
    while batch is None:
        pauses.clear()
        batch = source.step(lambda: pauses.append(1))
    assert len(batch.events) == 1000
    assert len(pauses) >= 4


def exhaust() -> None:
    bytearray(2 * reading.CHILD_BYTES)


def fail() -> None:
    raise RuntimeError("a bug")


def too_long() -> None:
    signal.alarm(1)
    signal.pause()


ENDS = {
    "memory": (exhaust, "more than 2048 MiB of memory", False),
    "time": (too_long, "takes longer than", False),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL", True),
    "bug": (fail, "a bug; the log has the details", False),
}


@pytest.mark.parametrize(("do", "told", "again"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("restarted", [False, True])
def test_file_that_ends_the_child_keeps_its_objects_and_is_told(
    source: ManifestDirectory,
    monkeypatch: pytest.MonkeyPatch,
    do: Callable[[], Any],
    told: str,
    *,
    again: bool,
    restarted: bool,
) -> None:
    """All other files are taken up; that one keeps its last good state, also over a restart, until it changes or its time comes."""
    in_child(monkeypatch, do, "a.yaml")
    now_s = time.time() + 100
    write(source, "a.yaml", large("one", app="db"))
    write(source, "c.yaml", large("three"))
    if restarted:
        source = ManifestDirectory(source.root, source.copies)
    source.clock = lambda: now_s
    batch = awaited(source)
    assert names(batch) == {"three": "Upsert"} | ({"one": "Upsert", "two": "Upsert"} if restarted else {})
    assert [event.resource.meta.labels["app"] for event in batch.events] == ["web"] * len(batch.events)
    assert [(one.slug, one.severity, Path(one.location.file).name) for one in batch.problems] == [
        ("unreadable", "error", "a.yaml")
    ]
    assert told in batch.problems[0].message
    assert [source.step() for _ in range(5)] == [None] * 5
    monkeypatch.setattr(reading, "read", READ)
    now_s += files.RETRY_S
    if not again:
        assert [source.step() for _ in range(5)] == [None] * 5
        os.utime(source.root / "a.yaml", (1, 1))
    after = awaited(source)
    assert [(event.resource.meta.name, event.resource.meta.labels["app"]) for event in after.events] == [("one", "db")]
    assert after.problems == ()


def test_no_process_can_be_begun(source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine gives no process, what is in force stays, it is told, and it is tried again."""

    def refused() -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    write(source, "a.yaml", large("one", app="db"))
    batch = awaited(source)
    assert batch.events == ()
    assert "cannot start a process" in batch.problems[0].message
    assert [source.step() for _ in range(5)] == [None] * 5
    monkeypatch.setattr(os, "fork", FORK)
    after = awaited(source)
    assert names(after) == {"one": "Upsert"}
    assert after.problems == ()


def test_slow_reading_is_told(source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a change is not in force yet is a warning, once, until it is."""
    in_child(monkeypatch, stop, "a.yaml")
    monkeypatch.setattr(files, "SLOW_S", 0.0)
    write(source, "a.yaml", large("one", app="db"))
    batch = awaited(source)
    assert (batch.events, [(one.slug, one.severity) for one in batch.problems]) == ((), [("reading", "warning")])
    child = wait_for_stop(source)
    assert source.step() is None
    os.kill(child, signal.SIGCONT)
    after = awaited(source)
    assert (names(after), after.problems) == ({"one": "Upsert"}, ())


def test_child_has_limits_and_nothing_of_the_agent_s(
    source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no descriptor but its result, has a limit of memory, and goes before the agent where that runs short."""
    in_child(monkeypatch, stop, "a.yaml")
    sockets = os.pipe()
    write(source, "a.yaml", large("one"))
    child = wait_for_stop(source)
    try:
        held = {str(one.readlink()) for one in Path(f"/proc/{child}/fd").iterdir() if int(one.name) > 2}
        assert held == {"/memfd:manifests (deleted)"}
        most, _ = resource.prlimit(child, resource.RLIMIT_AS)
        assert reading.CHILD_BYTES < most < reading.CHILD_BYTES * 4
        assert Path(f"/proc/{child}/oom_score_adj").read_text(encoding="ascii") == "1000\n"
    finally:
        for one in sockets:
            os.close(one)
    source.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_problems_without_number_are_not_all_told(source: ManifestDirectory) -> None:
    """For one file at most MOST_PROBLEMS problems are reported, and the number of the others."""
    write(source, "a.yaml", "- a\n" * 5000)
    batch = awaited(source)
    assert len(batch.problems) == reading.MOST_PROBLEMS + 1
    assert f"{5000 - reading.MOST_PROBLEMS} more problems" in batch.problems[-1].message
    assert batch.events == ()


def test_large_files_are_refused_and_keep_their_objects(source: ManifestDirectory) -> None:
    """A sparse file of 100 GB is reported and not read; it is read when it is corrected."""
    os.truncate(source.root / "a.yaml", 100 << 30)
    batch = awaited(source)
    assert batch.events == ()
    assert [one.slug for one in batch.problems] == ["unreadable"]
    assert "larger than 64 MiB" in batch.problems[0].message
    assert names(ManifestDirectory(source.root, source.copies).step()) == {"one": "Upsert", "two": "Upsert"}
    write(source, "a.yaml", pod("one", app="db"))
    assert names(awaited(source)) == {"one": "Upsert"}
    assert source.problems == ()


def test_files_beyond_what_is_read_in_all_are_told(source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last by name are not read, and keep what they had; when there is room again they are."""
    monkeypatch.setattr(files, "MOST_BYTES_IN_ALL", 2000)
    write(source, "b.yaml", pod("two", app="db") + "#" * 1000)
    write(source, "aa.yaml", pod("three") + "#" * 1000)
    batch = awaited(source)
    assert names(batch) == {"three": "Upsert"}
    assert [(one.slug, Path(one.location.file).name) for one in batch.problems] == [("unreadable", "b.yaml")]
    assert "read in all" in batch.problems[0].message
    again = ManifestDirectory(source.root, source.copies).step()
    assert again is not None
    assert names(again) == {"one": "Upsert", "two": "Upsert", "three": "Upsert"}
    assert again.problems == batch.problems
    (source.root / "aa.yaml").unlink()
    after = awaited(source)
    assert names(after) == {"two": "Upsert", "three": "Remove"}
    assert after.problems == ()


def test_every_object_survives_the_way_through_the_child() -> None:
    """Whatever the examples of this project hold comes out of the child as it went in."""
    from netpol_ebpf.resources.load import load_paths

    examples = Path(__file__).parents[2] / "examples"
    resources = load_paths([examples]).resources
    assert len({type(one) for one in resources}) > 5
    assert pickle.loads(pickle.dumps(resources, pickle.HIGHEST_PROTOCOL)) == resources  # noqa: S301
