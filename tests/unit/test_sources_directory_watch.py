# SPDX-License-Identifier: Apache-2.0
"""inotify as a wake-up for a directory of manifests: what makes the descriptor readable, and when the agent looks."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.sources import directory_watch
from netpol_ebpf.sources.directory_watch import DirectoryWatch
from netpol_ebpf.sources.files import INTERVAL_S, RACY_S, SAFETY_NET_S, ManifestDirectory

NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n"
WOKEN_S = 10.0
"""A deadline; the kernel wakes at once."""


def is_woken(watch: DirectoryWatch) -> bool:
    """Whether the descriptor is readable; what made it so is read."""
    found = bool(select.select([watch], [], [], 0)[0])
    watch.drain()
    return found


@pytest.fixture
def watch() -> Iterator[DirectoryWatch]:
    one = DirectoryWatch()
    yield one
    one.close()


def test_every_change_of_an_entry_wakes(watch: DirectoryWatch, tmp_path: Path) -> None:
    """A file that is made, written, replaced, linked to, given other rights or removed; reading and other directories do not."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "old").write_text("old")
    assert watch.watch([inside]) is True
    assert not is_woken(watch)
    (inside / "new").touch()
    assert is_woken(watch)
    (inside / "old").write_text("other")
    assert is_woken(watch)
    (outside / "draft").write_text("draft")
    assert not is_woken(watch)
    (outside / "draft").replace(inside / "new")
    assert is_woken(watch)
    (inside / "link").symlink_to("old")
    assert is_woken(watch)
    (inside / "old").chmod(0o600)
    assert is_woken(watch)
    (inside / "old").read_text()
    list(inside.iterdir())
    assert not is_woken(watch)
    (inside / "old").unlink()
    assert is_woken(watch)


def test_watches_are_exactly_those_given(watch: DirectoryWatch, tmp_path: Path) -> None:
    """A directory that is not given again wakes nobody any more; one that took the place of another is a new one."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert watch.watch([one, other]) is True
    assert watch.watch([one, other]) is False
    assert watch.watch([one]) is False
    watch.drain()
    (other / "file").touch()
    assert not is_woken(watch)
    one.rename(tmp_path / "gone")
    other.rename(one)
    assert watch.watch([one]) is True
    watch.drain()
    (one / "late").touch()
    assert is_woken(watch)
    assert watch.watch([one, tmp_path / "nowhere"]) is False


def test_watch_that_may_miss_changes_says_so(
    watch: DirectoryWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch of nothing is not complete, nor one of a file system that others change."""
    assert not watch.is_complete
    watch.watch([tmp_path])
    assert watch.is_complete
    watch.watch([tmp_path, Path("/proc")])
    assert not watch.is_complete
    monkeypatch.setattr(directory_watch, "LOCAL_FILE_SYSTEMS", frozenset())
    watch.watch([])
    watch.watch([tmp_path])
    assert not watch.is_complete


@dataclass
class Scene:
    """A watched directory of manifests, and its clocks."""

    root: Path
    now_s: float = 1000.0
    watch: DirectoryWatch = field(default_factory=DirectoryWatch)

    def __post_init__(self) -> None:
        self.root.mkdir()
        self.source = ManifestDirectory(
            self.root, watch=self.watch, monotonic=lambda: self.now_s, clock=lambda: self.now_s + 2e9
        )  # fmt: skip

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def rest(self) -> None:
        """Step until nothing is left to do."""
        if not self.source.has_synced:
            self.source.sync()
        for _ in range(9):
            if self.source.wait_s() > 2 * INTERVAL_S:
                return
            self.now_s += INTERVAL_S
            self.source.step()
        pytest.fail("the source does not come to rest")

    def woken(self) -> bool:
        found = bool(select.select([self.watch], [], [], 0)[0])
        if found:
            self.source.note_news()
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    one = Scene(tmp_path / "manifests")
    yield one
    one.source.close()


def test_directory_at_rest_is_looked_at_as_a_safety_net(scene: Scene) -> None:
    """With a complete watch and nothing new, the next look is due after SAFETY_NET_S, and finds what no event reported."""
    scene.write("a.yaml", NAMESPACE.format(name="a"))
    scene.rest()
    assert scene.source.wait_s() == pytest.approx(SAFETY_NET_S)
    scene.write("b.yaml", NAMESPACE.format(name="b"))
    scene.watch.drain()  # the event is lost
    scene.now_s += SAFETY_NET_S
    assert scene.source.wait_s() == 0
    assert scene.source.step() is None
    scene.now_s += INTERVAL_S
    update = scene.source.step()
    assert update is not None
    assert [one.key.name for one in update.events] == ["b"]


def test_edit_is_looked_at_at_once_and_taken_up_when_settled(scene: Scene) -> None:
    """The first look follows the event, the second one INTERVAL_S later, however many events come between."""
    scene.write("a.yaml", NAMESPACE.format(name="a"))
    scene.rest()
    scene.now_s += SAFETY_NET_S / 2
    assert not scene.woken()
    scene.write("a.yaml", NAMESPACE.format(name="other"))
    assert scene.woken()
    assert scene.source.wait_s() == 0
    assert scene.source.step() is None
    (scene.root / "a.yaml").touch()
    assert scene.woken()
    assert scene.source.wait_s() == pytest.approx(INTERVAL_S)


def test_versions_tell_states_apart(scene: Scene) -> None:
    """A changed object has another version than before; the version of a removal is that of the last state."""
    scene.write("a.yaml", NAMESPACE.format(name="a"))
    (first,) = scene.source.sync().events
    scene.write("a.yaml", NAMESPACE.format(name="a") + "# changed\n---\n" + NAMESPACE.format(name="b"))
    assert scene.source.step() is None
    update = scene.source.step()
    assert update is not None
    versions = {one.key.name: one.version for one in update.events}
    assert versions["b"] != first.version
    (scene.root / "a.yaml").unlink()
    assert scene.source.step() is None
    update = scene.source.step()
    assert update is not None
    assert {one.key.name: one.version for one in update.events} == {"a": versions["b"], "b": versions["b"]}


def test_new_directory_and_link_target_wake(scene: Scene, tmp_path: Path) -> None:
    """What is written below a new directory, or into the file that a link leads to, wakes as well."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "real.yaml").write_text(NAMESPACE.format(name="linked"))
    (scene.root / "link.yaml").symlink_to(target / "real.yaml")
    scene.rest()
    (scene.root / "deep").mkdir()
    assert scene.woken()
    scene.now_s += INTERVAL_S
    scene.rest()
    scene.write("deep/b.yaml", NAMESPACE.format(name="b"))
    assert scene.woken()
    scene.rest()
    (target / "real.yaml").write_text(NAMESPACE.format(name="changed"))
    assert scene.woken()


def test_swap_of_a_mounted_config_map_wakes(scene: Scene) -> None:
    """The kubelet replaces the link ``..data`` by a rename: a change of an entry of the directory itself."""
    for name in ("..one", "..two"):
        (scene.root / name).mkdir()
        (scene.root / name / "a.yaml").write_text(NAMESPACE.format(name=name.strip(".")))
    (scene.root / "..data").symlink_to("..one")
    (scene.root / "a.yaml").symlink_to("..data/a.yaml")
    scene.rest()
    (scene.root / "..draft").symlink_to("..two")
    (scene.root / "..draft").replace(scene.root / "..data")
    assert scene.woken()
    scene.now_s += INTERVAL_S
    assert scene.source.step() is None
    scene.now_s += INTERVAL_S
    update = scene.source.step()
    assert update is not None
    assert {one.key.name for one in update.events} == {"one", "two"}


def test_directory_that_cannot_be_watched_is_looked_at_by_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A user with too many watches is told once, and every change is found within INTERVAL_S as without a watch."""

    def refuse(*_: object) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "manifests")

    monkeypatch.setattr(DirectoryWatch, "watch", refuse)
    scene.source.sync()
    for _ in range(5):
        assert scene.source.wait_s() == pytest.approx(INTERVAL_S)
        scene.now_s += RACY_S
        scene.source.step()
    assert [one.message for one in caplog.records] == [
        "cannot watch the manifests with inotify (manifests: No space left on device): the agent looks at them every 0.2 s instead"
    ]


def test_unreadable_place_is_looked_at_by_time(scene: Scene) -> None:
    """What is wrong with the directory ends within INTERVAL_S of being mended, whether or not an event reports it."""
    (scene.root / "link.yaml").symlink_to("nowhere")
    scene.source.sync()
    scene.now_s += RACY_S
    scene.source.step()
    assert scene.source.wait_s() == pytest.approx(INTERVAL_S)


def test_source_that_cannot_be_read_does_not_sync(tmp_path: Path) -> None:
    """A directory that is not there is not an empty one."""
    source = ManifestDirectory(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="nowhere"):
        source.sync()
    assert not source.has_synced
