# SPDX-License-Identifier: Apache-2.0
"""The directory of manifests: which changes are applied, when, and what stays after an error."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest

from netpol_ebpf.policy.translate import ResourceKey, key_of
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.sources.copies import LastGoodCopies
from netpol_ebpf.sources.files import (
    MAX_UNSETTLED_LOOKS,
    ManifestDirectory,
)
from netpol_ebpf.sources.source import Remove, SourceUpdate, Upsert

POD = "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {app}}}}}\nstatus: {{podIP: 10.0.0.1}}\n"


def pod(name: str, app: str = "web") -> str:
    return POD.format(name=name, app=app)


def settled(source: ManifestDirectory) -> SourceUpdate | None:
    """What the directory brings once it has settled: the second of two looks."""
    first = source.step()
    assert first is None, "a change was taken up before it had settled"
    return source.step()


def names(batch: SourceUpdate | None) -> dict[str, str]:
    """Events as {object name: kind of event}."""
    assert batch is not None
    return {event.resource.meta.name: type(event).__name__ for event in batch.events}


@pytest.fixture
def source(tmp_path: Path) -> ManifestDirectory:
    return ManifestDirectory(tmp_path / "manifests")


def write(source: ManifestDirectory, name: str, text: str) -> Path:
    path = source.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_first_look_takes_up_everything(source: ManifestDirectory) -> None:
    """The first look yields all objects of all documents and subdirectories, and leaves other files alone."""
    write(source, "a.yaml", pod("one") + "---\n" + pod("two"))
    write(source, "deep/b.yml", pod("three"))
    write(source, "notes.txt", "not: [yaml")
    write(source, ".hidden.yaml", pod("hidden"))
    batch = source.step()
    assert names(batch) == {"one": "Upsert", "two": "Upsert", "three": "Upsert"}
    assert batch is not None
    assert batch.problems == ()


def test_nothing_changed_yields_nothing(source: ManifestDirectory) -> None:
    """Looks at an unchanged directory bring no batch."""
    write(source, "a.yaml", pod("one"))
    source.step()
    assert [source.step() for _ in range(4)] == [None] * 4


def test_changed_object_alone_is_an_event(source: ManifestDirectory) -> None:
    """For a changed file only the differing objects are reported."""
    write(source, "a.yaml", pod("one") + "---\n" + pod("two"))
    source.step()
    write(source, "a.yaml", pod("one") + "---\n" + pod("two", app="db"))
    assert names(settled(source)) == {"two": "Upsert"}


def test_same_size_and_time_is_still_seen(source: ManifestDirectory) -> None:
    """A change that keeps size and modification time right after the first read is found by content."""
    path = write(source, "a.yaml", pod("one", app="web"))
    status = path.stat()
    source.step()
    path.write_text(pod("one", app="sql"), encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert names(settled(source)) == {"one": "Upsert"}


def test_moved_object_is_no_removal(source: ManifestDirectory) -> None:
    """Renaming a file leaves its objects in place; only where they are written changes."""
    path = write(source, "a.yaml", pod("one"))
    source.step()
    path.rename(source.root / "b.yaml")
    batch = settled(source)
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    assert batch.events[0].resource.meta.location.file.endswith("b.yaml")


def test_deleted_file_removes_its_objects(source: ManifestDirectory) -> None:
    """A file that went takes its objects with it, once two looks agree that it is gone."""
    path = write(source, "a.yaml", pod("one"))
    write(source, "b.yaml", pod("two"))
    source.step()
    path.unlink()
    batch = settled(source)
    assert names(batch) == {"one": "Remove"}
    assert batch is not None
    assert isinstance(batch.events[0], Remove)


def test_file_replaced_between_looks_is_never_absent(source: ManifestDirectory) -> None:
    """An editor that removes and writes anew causes no removal, even when a look falls between the two."""
    path = write(source, "a.yaml", pod("one"))
    source.step()
    path.unlink()
    assert source.step() is None
    write(source, "a.yaml", pod("one", app="db"))
    assert names(settled(source)) == {"one": "Upsert"}


def test_atomic_rename_is_taken_up(source: ManifestDirectory) -> None:
    """A file renamed over another gives its new content."""
    write(source, "a.yaml", pod("one"))
    source.step()
    write(source, "draft", pod("two")).rename(source.root / "a.yaml")
    assert names(settled(source)) == {"one": "Remove", "two": "Upsert"}


def test_configmap_swap_changes_all_files_in_one_batch(source: ManifestDirectory) -> None:
    """A mounted ConfigMap that swaps its ..data link yields one batch with all changes, and no object twice."""
    root = source.root
    for version, app in (("..v1", "web"), ("..v2", "db")):
        write(source, f"{version}/a.yaml", pod("one", app=app))
        write(source, f"{version}/b.yaml", pod("two", app=app))
    (root / "..data").symlink_to("..v1")
    for name in ("a.yaml", "b.yaml"):
        (root / name).symlink_to(f"..data/{name}")
    assert names(source.step()) == {"one": "Upsert", "two": "Upsert"}
    (root / "..tmp").symlink_to("..v2")
    (root / "..tmp").rename(root / "..data")
    assert names(settled(source)) == {"one": "Upsert", "two": "Upsert"}
    assert source.problems == ()


def test_broken_file_keeps_its_last_good_objects(source: ManifestDirectory) -> None:
    """A file that no longer parses changes nothing, is reported with its line, and counts again when mended."""
    write(source, "a.yaml", pod("one") + "---\n" + pod("two"))
    source.step()
    write(source, "a.yaml", pod("one", app="db") + "---\nkind: [")
    batch = settled(source)
    assert batch is not None
    assert batch.events == ()
    assert [problem.location.file for problem in batch.problems] == [str(source.root / "a.yaml")]
    assert batch.problems[0].location.line > 4
    write(source, "a.yaml", pod("one", app="db"))
    mended = settled(source)
    assert names(mended) == {"one": "Upsert", "two": "Remove"}
    assert mended is not None
    assert mended.problems == ()


def test_invalid_object_makes_its_whole_file_broken(source: ManifestDirectory) -> None:
    """One invalid object keeps the whole file at its last good state: objects of a file belong together."""
    write(source, "a.yaml", pod("one"))
    source.step()
    write(source, "a.yaml", pod("one", app="db") + "---\napiVersion: v1\nkind: Nonsense\nmetadata: {name: x}\n")
    batch = settled(source)
    assert batch is not None
    assert batch.events == ()
    assert [problem.slug for problem in batch.problems] == ["unknown-kind"]


def test_objects_of_other_kinds_are_counted(tmp_path: Path) -> None:
    """A policy beside a Deployment is taken up; what is skipped is known of the last good state of each file, over a restart too."""
    copies = LastGoodCopies(tmp_path / "copies")
    root = tmp_path / "manifests"
    root.mkdir()
    source = ManifestDirectory(root, copies)
    deployment = "---\napiVersion: apps/v1\nkind: Deployment\n"
    write(source, "a.yaml", pod("one") + deployment)
    write(
        source, "b.yaml", deployment + "---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: c}\n"
    )
    batch = source.step()
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    assert [(problem.severity, problem.slug) for problem in batch.problems] == [("warning", "not-enforced")]
    counts = {"apps/v1 Deployment": 2, "cilium.io/v2 CiliumNetworkPolicy": 1}
    assert source.skipped == counts
    write(source, "a.yaml", "kind: [")
    settled(source)
    assert source.skipped == counts
    again = ManifestDirectory(root, copies)
    again.step()
    assert again.skipped == counts
    (root / "b.yaml").unlink()
    settled(source)
    assert source.skipped == {"apps/v1 Deployment": 1}


def test_a_last_good_state_that_is_no_longer_valid_is_told(tmp_path: Path) -> None:
    """A stricter version refuses the file and its copy alike: what of it is in force, and that the rest is not, is said."""
    root = tmp_path / "manifests"
    root.mkdir()
    text = pod("one") + "---\n" + pod("two").replace("name: two", "name: y")
    copies = LastGoodCopies(tmp_path / "copies")
    copies.store("a.yaml", text)
    (root / "a.yaml").write_text(text, encoding="utf-8")
    batch = ManifestDirectory(root, copies).step()
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    (told,) = [problem for problem in batch.problems if problem.slug == "copies"]
    assert told.severity == "error"
    assert "1 of its objects are in force, the others are not" in told.message
    assert "which is read as true" in told.message


@pytest.mark.parametrize("restarted", [False, True])
def test_text_that_no_file_can_hold_is_refused(tmp_path: Path, *, restarted: bool) -> None:
    """Half of a surrogate pair in a name or a label: the file keeps its last good objects, also those of a copy."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.json", pod("one"))
    source.step()
    metadata = r'{"name": "p\udfff", "namespace": "shop", "labels": {"a": "\ud800"}}'
    write(source, "a.json", f'{{"apiVersion": "v1", "kind": "Pod", "metadata": {metadata}}}')
    if restarted:
        source = ManifestDirectory(source.root, copies)
        assert names(source.step()) == {"one": "Upsert"}
    else:
        assert names(settled(source)) == {}
    assert [one.slug for one in source.problems] == ["encoding"]


def test_file_that_was_never_good_contributes_nothing(source: ManifestDirectory) -> None:
    """A broken file without a last good state is reported and adds no object; the others count."""
    write(source, "a.yaml", pod("one"))
    write(source, "b.yaml", pod("two") + "---\nkind: [")
    batch = source.step()
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    assert len(batch.problems) == 1


def test_not_text_is_reported_with_its_line(source: ManifestDirectory) -> None:
    """Bytes that are not UTF-8 are a problem of the line they stand on."""
    source.root.mkdir()
    (source.root / "a.yaml").write_bytes(b"a: 1\nb: \xff\n")
    batch = source.step()
    assert batch is not None
    assert [(problem.slug, problem.location.line) for problem in batch.problems] == [("encoding", 2)]


def test_first_of_two_files_wins(source: ManifestDirectory) -> None:
    """Of an object in two files the one in the first file counts, the other is reported, and succeeds it."""
    first = write(source, "a.yaml", pod("one", app="first"))
    write(source, "b.yaml", pod("one", app="second"))
    batch = source.step()
    assert batch is not None
    (event,) = batch.events
    assert isinstance(event, Upsert)
    assert event.resource.meta.labels["app"] == "first"
    (problem,) = batch.problems
    assert (problem.slug, problem.obj) == ("duplicate", "Pod/shop/one")
    assert problem.location.file == str(source.root / "b.yaml")
    assert f"{first}:1" in problem.message
    first.unlink()
    batch = settled(source)
    assert batch is not None
    assert [event.resource.meta.labels["app"] for event in batch.events] == ["second"]
    assert batch.problems == ()


def test_vanished_directory_keeps_everything(source: ManifestDirectory) -> None:
    """A directory that cannot be read removes nothing and is reported once, until it is back."""
    write(source, "a.yaml", pod("one"))
    source.step()
    source.root.rename(source.root.with_name("elsewhere"))
    batch = source.step()
    assert batch is not None
    assert batch.events == ()
    assert [problem.slug for problem in batch.problems] == ["unreadable"]
    assert source.step() is None
    source.root.with_name("elsewhere").rename(source.root)
    back = source.step()
    assert back is not None
    assert (back.events, back.problems) == ((), ())


def test_directory_that_never_settles_is_taken_up(source: ManifestDirectory) -> None:
    """Constant change delays a batch by a bounded number of looks."""
    write(source, "a.yaml", pod("one"))
    source.step()
    for look in range(MAX_UNSETTLED_LOOKS):
        write(source, f"b{look}.yaml", pod(f"p{look}"))
        assert source.step() is None
    write(source, "c.yaml", pod("last"))
    assert "last" in names(source.step())


def test_single_file_is_a_source_too(tmp_path: Path) -> None:
    """The root may be one file, whatever its name."""
    path = tmp_path / "all"
    path.write_text(pod("one"), encoding="utf-8")
    source = ManifestDirectory(path)
    assert names(source.step()) == {"one": "Upsert"}
    path.write_text(pod("two"), encoding="utf-8")
    assert names(settled(source)) == {"one": "Remove", "two": "Upsert"}


def test_links_in_a_circle_end(source: ManifestDirectory) -> None:
    """A link to a directory above is not followed again."""
    write(source, "deep/a.yaml", pod("one"))
    (source.root / "deep" / "up").symlink_to(source.root)
    assert names(source.step()) == {"one": "Upsert"}
    assert source.problems == ()


def test_copies_outlive_a_restart_with_a_broken_file(tmp_path: Path) -> None:
    """A source that starts with a broken file uses what its predecessor last saw good, and reports the file."""
    copies = LastGoodCopies(tmp_path / "copies")
    before = ManifestDirectory(tmp_path / "manifests", copies)
    path = write(before, "a.yaml", pod("one"))
    before.step()
    path.write_text("kind: [", encoding="utf-8")
    after = ManifestDirectory(before.root, copies)
    batch = after.step()
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    assert len(batch.problems) == 1
    assert batch.events[0].resource.meta.location.file == str(path)
    path.write_text(pod("two"), encoding="utf-8")
    assert names(settled(after)) == {"one": "Remove", "two": "Upsert"}


def test_copy_waits_for_its_file_s_turn_to_be_read(tmp_path: Path) -> None:
    """Copies that the files before bring do not remove that of a broken file after them."""
    copies = LastGoodCopies(tmp_path / "copies")
    before = ManifestDirectory(tmp_path / "manifests", copies)
    write(before, "a.yaml", pod("one"))
    write(before, "b.yaml", pod("two"))
    before.step()
    write(before, "a.yaml", pod("one", "db"))
    write(before, "b.yaml", "kind: [")
    assert names(ManifestDirectory(before.root, copies).step()) == {"one": "Upsert", "two": "Upsert"}
    assert copies.load("b.yaml") == pod("two")


def test_copies_are_written_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one file's text is held at a time; that of a file that cannot be written is, and nothing is tried again for it."""
    source = ManifestDirectory(tmp_path / "manifests", LastGoodCopies(tmp_path / "copies"))
    for number in range(4):
        write(source, f"{number}.yaml", pod(f"p{number}"))
    held: list[set[str]] = []

    def store(_copies: LastGoodCopies, name: str, _text: str) -> None:
        held.append(set(source._uncopied))
        if name == "2.yaml":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(LastGoodCopies, "store", store)
    batch = source.step()
    assert len(names(batch)) == 4
    assert held == [{"0.yaml"}, {"1.yaml"}, {"2.yaml"}, {"2.yaml", "3.yaml"}]
    assert [one.slug for one in source.problems] == ["copies"]


def test_copies_of_files_that_went_are_forgotten(tmp_path: Path) -> None:
    """A file that went while nobody looked does not come back through its copy."""
    copies = LastGoodCopies(tmp_path / "copies")
    before = ManifestDirectory(tmp_path / "manifests", copies)
    path = write(before, "a.yaml", pod("one"))
    before.step()
    path.unlink()
    ManifestDirectory(before.root, copies).step()
    path.write_text("kind: [", encoding="utf-8")
    batch = ManifestDirectory(before.root, copies).step()
    assert names(batch) == {}


@pytest.mark.parametrize("seed", range(8))
def test_changes_lead_where_a_fresh_look_leads(source: ManifestDirectory, seed: int) -> None:
    """After any changes, with objects given by several files, objects and problems are those of a new reader's."""
    random = Random(seed)
    write(source, "a.yaml", pod("p0"))
    objects: dict[str, Resource] = {}
    seen_duplicates = False
    for _ in range(25):
        for number in random.sample(range(4), random.randint(1, 3)):
            path = source.root / f"{number}.yaml"
            if path.exists() and random.random() < 0.3:
                path.unlink()
            else:
                wanted = random.sample(range(5), random.randint(1, 3))
                text = "---\n".join(pod(f"p{one}", random.choice(("web", "db"))) for one in wanted)
                path.write_text(text + "---\nkind: [" * (random.random() < 0.1), encoding="utf-8")
        batch = source.step() or source.step()
        for event in batch.events if batch is not None else ():
            name = event.resource.meta.name
            if isinstance(event, Remove):
                assert objects.pop(name) == event.resource
            else:
                assert objects.get(name) != event.resource
                objects[name] = event.resource
        if not any(one.slug == "yaml" for one in source.problems):  # a broken file's last good state is not on the disk
            fresh = ManifestDirectory(source.root)
            first = fresh.step()
            assert first is not None
            assert objects == {event.resource.meta.name: event.resource for event in first.events}
            assert source.problems == first.problems
        seen_duplicates |= any(one.slug == "duplicate" for one in source.problems)
    assert seen_duplicates


def test_copies_that_cannot_be_written_are_a_warning_and_tried_again(tmp_path: Path) -> None:
    """Policy is taken up without them; when there is room they are written, and the warning goes."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.yaml", pod("one"))
    assert names(source.step()) == {"one": "Upsert"}
    write(source, "a.yaml", pod("one", "db"))
    write(source, "b.yaml", pod("two"))
    obstacle = copies._path("b.yaml").with_suffix(".draft")
    obstacle.mkdir()
    batch = settled(source)
    assert names(batch) == {"one": "Upsert", "two": "Upsert"}
    assert batch is not None
    assert [(one.slug, one.severity) for one in batch.problems] == [("copies", "warning")]
    obstacle.rmdir()
    mended = source.step()
    assert mended is not None
    assert (mended.events, mended.problems) == ((), ())
    assert [copies.load(name) for name in ("a.yaml", "b.yaml")] == [pod("one", "db"), pod("two")]


def test_copy_that_cannot_be_read_is_reported_with_its_file(tmp_path: Path) -> None:
    """A broken file and a damaged copy of it are both reported, and the other files count."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.yaml", "kind: [")
    write(source, "b.yaml", pod("two"))
    copies.store("a.yaml", "")
    copies._path("a.yaml").write_bytes(b"\xff")
    batch = source.step()
    assert names(batch) == {"two": "Upsert"}
    assert batch is not None
    assert [one.slug for one in batch.problems] == ["copies", "yaml"]


def test_deleted_file_does_not_come_back_when_one_of_its_name_is_broken(tmp_path: Path) -> None:
    """What was deleted stays so: neither this process nor the next one takes the old state for the new file's."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    path = write(source, "a.yaml", pod("one"))
    source.step()
    path.unlink()
    assert names(settled(source)) == {"one": "Remove"}
    assert list(copies.directory.iterdir()) == []
    path.write_text("kind: [", encoding="utf-8")
    assert names(settled(source)) == {}
    assert names(ManifestDirectory(source.root, copies).step()) == {}


def test_what_is_no_file_is_reported_and_not_waited_for(source: ManifestDirectory) -> None:
    """A pipe that nobody writes to and a link to itself are problems of their own; all else is taken up."""
    write(source, "a.yaml", pod("one"))
    os.mkfifo(source.root / "b.yaml")
    (source.root / "c.yaml").symlink_to("c.yaml")
    (source.root / "d").symlink_to("d")
    batch = source.step()
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    assert [(one.slug, Path(one.location.file).name) for one in batch.problems] == [
        ("unreadable", "b.yaml"), ("unreadable", "c.yaml"), ("unreadable", "d"),
    ]  # fmt: skip
    assert "no regular file" in batch.problems[0].message
    (source.root / "c.yaml").unlink()
    write(source, "c.yaml", pod("two"))
    assert names(settled(source)) == {"two": "Upsert"}


# --- places that cannot be looked at ---------------------------------------------------------------------------------


def by_mode(mode: int, place: Path) -> Callable[[], None]:
    place.chmod(mode)
    return lambda: place.chmod(0o755)


def by_link_to_nothing(place: Path) -> Callable[[], None]:
    target = place.with_name(f".{place.name}.target")
    place.rename(target)
    place.symlink_to(target.with_name(".gone"))

    def restore() -> None:
        place.unlink()
        target.rename(place)

    return restore


def by_link_to_itself(place: Path) -> Callable[[], None]:
    restore = by_link_to_nothing(place)
    place.unlink()
    place.symlink_to(place)
    return restore


HIDING = {
    "directory may not be listed": ("deep", partial(by_mode, 0o000)),
    "directory may be listed and not entered": ("deep", partial(by_mode, 0o444)),
    "directory is a link to nothing": ("deep", by_link_to_nothing),
    "directory is a link to itself": ("deep", by_link_to_itself),
    "file is a link to nothing": ("deep/b.yaml", by_link_to_nothing),
    "file is a link to itself": ("deep/b.yaml", by_link_to_itself),
}


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A directory of a user without root's leave to open everything, and that user's rights."""
    with tempfile.TemporaryDirectory(prefix="netpol-manifests-") as name:
        if os.geteuid() != 0:
            yield Path(name)
            return
        os.chown(name, 65534, 65534)
        os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize(("name", "hide"), HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("restarted", [False, True])
def test_what_cannot_be_looked_at_stays_as_it_was(
    plain_user: Path, name: str, hide: Callable[[Path], Callable[[], None]], *, restarted: bool
) -> None:
    """Of a place that cannot be looked at the last good objects stay, also over a restart; it is told, and all else is taken up."""
    copies = LastGoodCopies(plain_user / "copies")
    source = ManifestDirectory(plain_user / "manifests", copies)
    write(source, "a.yaml", pod("one"))
    write(source, "deep/b.yaml", pod("two"))
    source.step()
    restore = hide(source.root / name)
    try:
        write(source, "c.yaml", pod("three"))
        if restarted:
            source = ManifestDirectory(source.root, copies)
            batch = source.step()
            assert names(batch) == {"one": "Upsert", "two": "Upsert", "three": "Upsert"}
        else:
            batch = settled(source)
            assert names(batch) == {"three": "Upsert"}
        assert batch is not None
        assert {one.slug for one in batch.problems} == {"unreadable"}
        assert all(one.severity == "error" for one in batch.problems)
        assert {one.location.file for one in batch.problems} <= {
            str(source.root / "deep"),
            str(source.root / "deep/b.yaml"),
        }
        assert [source.step() for _ in range(3)] == [None] * 3
    finally:
        restore()
    back = source.step() or source.step()
    assert back is not None
    assert (back.events, back.problems) == ((), ())
    (source.root / "deep/b.yaml").unlink()
    (source.root / "deep").rmdir()
    assert names(settled(source)) == {"two": "Remove"}, "what is seen to be gone is"


def test_place_that_was_never_seen_is_reported(source: ManifestDirectory) -> None:
    """A link to nothing, of whatever name, may be a directory of policies: it is an error from the first look on."""
    write(source, "a.yaml", pod("one"))
    (source.root / "team").symlink_to("nowhere")
    batch = source.step()
    assert names(batch) == {"one": "Upsert"}
    assert batch is not None
    assert [(one.slug, one.severity, Path(one.location.file).name) for one in batch.problems] == [
        ("unreadable", "error", "team")
    ]


# --- other things in the place of manifests --------------------------------------------------------------------------


def later() -> float:
    """A time at which no file is young."""
    return time.time() + 1000


def put_empty_directory(place: Path) -> None:
    place.mkdir()


def put_directory_with_notes(place: Path) -> None:
    (place / "deeper").mkdir(parents=True)
    (place / "README").touch()


def put_pipe(place: Path) -> None:
    os.mkfifo(place)


def put_link_to_a_device(place: Path) -> None:
    place.symlink_to("/dev/tty")


def put_link_to_other_text(place: Path) -> None:
    place.symlink_to("/proc/self/cmdline")


def put_file(place: Path) -> None:
    place.write_text("kind: [", encoding="utf-8")


PUT_IN_PLACE = [
    put_empty_directory, put_directory_with_notes, put_pipe, put_link_to_a_device, put_link_to_other_text, put_file,
]  # fmt: skip


@pytest.mark.parametrize("put", PUT_IN_PLACE)
@pytest.mark.parametrize("name", ["b.yaml", "deep", "deep/er"])
@pytest.mark.parametrize("restarted", [False, True])
def test_something_else_in_the_place_of_manifests_ends_nothing(
    tmp_path: Path, name: str, put: Callable[[Path], None], *, restarted: bool
) -> None:
    """A mount that is gone, a pipe, a link elsewhere: the objects stay and it is told; when the manifests are back, or the place goes, so does that."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies, clock=later)
    write(source, "a.yaml", pod("one"))
    write(source, "b.yaml", pod("two"))
    write(source, "deep/er/c.yaml", pod("three"))
    source.step()
    place, away = source.root / name, tmp_path / "away"
    place.rename(away)
    put(place)
    write(source, "d.yaml", pod("four"))
    if restarted:
        source = ManifestDirectory(source.root, copies, clock=later)
        batch = source.step()
        assert names(batch) == dict.fromkeys(("one", "two", "three", "four"), "Upsert")
    else:
        batch = settled(source)
        assert names(batch) == {"four": "Upsert"}
    assert batch is not None
    assert batch.problems
    assert {(one.severity, one.location.file) for one in batch.problems} == {("error", str(place))}
    assert [source.step() for _ in range(5)] == [None] * 5
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink()
    away.rename(place)
    back = source.step() or source.step()
    assert back is not None
    assert (back.events, back.problems) == ((), ())
    place.rename(away)
    assert names(settled(source)) == {"two" if name == "b.yaml" else "three": "Remove"}
    assert source.problems == ()


def test_mount_that_is_gone_ends_nothing_at_the_root_either(tmp_path: Path) -> None:
    """An empty directory in place of the whole one: nothing is known to have gone; nor by a restart."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.yaml", pod("one"))
    source.step()
    source.root.rename(tmp_path / "away")
    source.root.mkdir()
    batch = settled(source)
    assert batch is not None
    assert batch.events == ()
    assert [(one.slug, one.location.file) for one in batch.problems] == [("unreadable", str(source.root))]
    again = ManifestDirectory(source.root, copies)
    assert names(again.step()) == {"one": "Upsert"}
    assert again.problems == batch.problems
    write(source, "none.yaml", "---\n")
    assert names(settled(source)) == {"one": "Remove"}
    assert source.problems == ()


def test_empty_directory_of_which_nobody_knows_ends_nothing(tmp_path: Path) -> None:
    """A damaged record of where the files were: an empty directory may be the mount that is gone."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    path = write(source, "deep/a.yaml", pod("one"))
    write(source, "b.yaml", pod("two"))
    source.step()
    path.unlink()
    (copies.directory / "directories").write_text("[1", encoding="utf-8")
    again = ManifestDirectory(source.root, copies, clock=later)
    assert names(again.step()) == {"one": "Upsert", "two": "Upsert"}
    assert [one.location.file for one in again.problems] == [str(path.parent)]
    assert [again.step() for _ in range(5)] == [None] * 5
    assert names(ManifestDirectory(source.root, copies).step()) == {"one": "Upsert", "two": "Upsert"}


def test_place_that_was_never_seen_as_it_was_ends_nothing(tmp_path: Path) -> None:
    """A pipe in place of a directory at the start, then an empty directory in place of the pipe."""
    copies = LastGoodCopies(tmp_path / "copies")
    copies.store("deep/a.yaml", pod("one"))
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "b.yaml", pod("two"))
    os.mkfifo(source.root / "deep")
    assert names(source.step()) == {"one": "Upsert", "two": "Upsert"}
    (source.root / "deep").unlink()
    (source.root / "deep").mkdir()
    assert names(settled(source)) == {}
    assert [one.slug for one in source.problems] == ["unreadable"]


@pytest.mark.parametrize("restarted", [False, True])
def test_files_that_went_from_their_directory_went(tmp_path: Path, *, restarted: bool) -> None:
    """The last file of a directory that stays, a whole directory, and a file that became a directory of manifests end what they had."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "deep/a.yaml", pod("one"))
    write(source, "b/c.yaml", pod("two"))
    write(source, "d.yaml", pod("three"))
    source.step()
    (source.root / "deep/a.yaml").unlink()
    shutil.rmtree(source.root / "b")
    (source.root / "d.yaml").unlink()
    write(source, "d.yaml/e.yaml", pod("four"))
    if restarted:
        source = ManifestDirectory(source.root, copies)
        assert names(source.step()) == {"four": "Upsert"}
    else:
        assert names(settled(source)) == {"one": "Remove", "two": "Remove", "three": "Remove", "four": "Upsert"}
    assert source.problems == ()


def test_release_that_is_swapped_by_a_link_is_a_change_like_others(source: ManifestDirectory) -> None:
    """Another directory under the same name that has manifests says what there is, also when the same is found under a further name."""
    write(source, ".v1/a.yaml", pod("one"))
    write(source, ".v1/b.yaml", pod("two"))
    write(source, ".v2/a.yaml", pod("one", app="db"))
    (source.root / "current").symlink_to(".v1")
    assert names(source.step()) == {"one": "Upsert", "two": "Upsert"}
    (source.root / "next").symlink_to(".v2")
    (source.root / "next").rename(source.root / "current")
    assert names(settled(source)) == {"one": "Upsert", "two": "Remove"}
    (source.root / "another").symlink_to(".v2")
    assert names(settled(source)) == {"one": "Upsert"}, "it is under the first name now"
    assert source.problems == ()


@pytest.mark.parametrize("put", [put_pipe, put_link_to_a_device, put_file])
def test_root_that_is_no_directory_any_more_ends_nothing(
    source: ManifestDirectory, put: Callable[[Path], None]
) -> None:
    """A pipe or a file in place of the whole directory is not read, and told; the directory counts again when it is back."""
    write(source, "a.yaml", pod("one"))
    source.step()
    away = source.root.with_name("away")
    source.root.rename(away)
    put(source.root)
    batch = source.step()
    assert batch is not None
    assert (batch.events, [one.slug for one in batch.problems]) == ((), ["unreadable"])
    source.root.unlink()
    away.rename(source.root)
    back = source.step()
    assert back is not None
    assert (back.events, back.problems) == ((), ())


def test_root_that_is_a_pipe_is_not_waited_for(source: ManifestDirectory) -> None:
    """At the start too: nothing is opened, and nothing is taken for an empty directory."""
    os.mkfifo(source.root)
    batch = source.step()
    assert batch is not None
    assert "neither a directory nor a regular file" in batch.problems[0].message
    assert not source.has_synced


def test_pipe_among_the_copies_is_not_waited_for(tmp_path: Path) -> None:
    """Neither to read a copy nor to write one."""
    copies = LastGoodCopies(tmp_path / "copies")
    copies.store("a.yaml", pod("one"))
    path = copies._path("a.yaml")
    path.unlink()
    for name in (path, path.with_suffix(".draft")):
        os.mkfifo(name)
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.yaml", "kind: [")
    batch = source.step()
    assert batch is not None
    assert [one.slug for one in batch.problems] == ["copies", "yaml"]
    write(source, "a.yaml", pod("one"))
    assert names(settled(source)) == {"one": "Upsert"}
    assert copies.load("a.yaml") == pod("one")


# --- nothing, said and unsaid ----------------------------------------------------------------------------------------

UNSAID = {
    "empty": "",
    "spaces": " \n\t\n",
    "comments": "# kind: Pod\n#---\n",
    "null": "null\n",
    "byte order mark": "\ufeff",
}
SAID = {
    "document mark": "---\n",
    "document mark with a comment": "# none\n--- # none\n",
    "byte order mark": "\ufeff---\n",
    "list": "apiVersion: v1\nkind: List\nitems: []\n",
    "list of JSON": '{"apiVersion": "v1", "kind": "List", "items": []}',
    "typed list": "apiVersion: v1\nkind: PodList\nitems: []\n",
}


@pytest.mark.parametrize("text", UNSAID.values(), ids=UNSAID)
@pytest.mark.parametrize("restarted", [False, True])
def test_file_that_says_nothing_keeps_its_last_good_objects(tmp_path: Path, text: str, *, restarted: bool) -> None:
    """A file that was truncated, or that has no document at all, changes nothing and is reported until it says something."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.yaml", pod("one"))
    source.step()
    write(source, "a.yaml", text)
    if restarted:
        source = ManifestDirectory(source.root, copies)
        batch = source.step()
        assert names(batch) == {"one": "Upsert"}
    else:
        batch = settled(source)
        assert names(batch) == {}
    assert batch is not None
    assert [(one.slug, one.severity) for one in batch.problems] == [("empty", "error")]
    write(source, "a.yaml", pod("one", app="db"))
    after = settled(source)
    assert names(after) == {"one": "Upsert"}
    assert after is not None
    assert after.problems == ()


@pytest.mark.parametrize("text", SAID.values(), ids=SAID)
@pytest.mark.parametrize("restarted", [False, True])
def test_file_that_says_that_it_has_no_objects_has_none(tmp_path: Path, text: str, *, restarted: bool) -> None:
    """A document mark or an empty List ends the objects of a file, and is its last good state from then on."""
    copies = LastGoodCopies(tmp_path / "copies")
    source = ManifestDirectory(tmp_path / "manifests", copies)
    write(source, "a.yaml", pod("one"))
    write(source, "b.yaml", pod("two"))
    source.step()
    write(source, "a.yaml", text)
    batch = settled(source)
    assert names(batch) == {"one": "Remove"}
    assert batch is not None
    assert batch.problems == ()
    write(source, "a.yaml", "")
    if restarted:
        source = ManifestDirectory(source.root, copies)
        assert names(source.step()) == {"two": "Upsert"}
    else:
        assert names(settled(source)) == {}
    assert [one.slug for one in source.problems] == ["empty"]


def test_truncated_and_written_later_is_never_without_objects(source: ManifestDirectory) -> None:
    """However many looks fall between truncating a file and writing it, no look takes its objects away."""
    write(source, "a.yaml", pod("one"))
    source.step()
    write(source, "a.yaml", "")
    seen = [source.step() for _ in range(5)]
    write(source, "a.yaml", pod("one"))
    seen += [source.step() for _ in range(3)]
    assert [event for batch in seen if batch is not None for event in batch.events] == []
    assert source.problems == ()


def test_directory_without_manifests_says_what_that_means(source: ManifestDirectory) -> None:
    """At start and later: no manifest at all is a warning with its consequence, until there is one, which may say that it has none."""
    source.root.mkdir()
    (source.root / "notes.txt").touch()
    batch = source.step()
    assert batch is not None
    assert [(one.slug, one.severity) for one in batch.problems] == [("no-manifests", "error")]
    assert "no policy is in force" in batch.problems[0].message
    path = write(source, "a.yaml", "---\n")
    batch = settled(source)
    assert batch is not None
    assert batch.problems == ()
    path.unlink()
    batch = settled(source)
    assert batch is not None
    assert [one.slug for one in batch.problems] == ["no-manifests"]


def test_problems_without_number_cost_a_bounded_time(
    source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of links to nothing, duplicates and broken files the first are told, and that there are more."""
    monkeypatch.setattr("netpol_ebpf.sources.files.MOST_TOLD", 9)
    for number in range(5):
        write(source, f"b{number}.yaml", pod("one"))
        write(source, f"c{number}.yaml", "kind: [")
        (source.root / f"d{number}").symlink_to("nowhere")
    source.step()
    told = [Path(one.location.file).name for one in source.problems]
    assert told == [
        *(f"b{number}.yaml" for number in range(1, 5)),
        *(f"c{number}.yaml" for number in range(5)),
        "manifests",
    ]
    assert "there are more" in source.problems[-1].message


def test_directory_that_was_never_read_says_so(source: ManifestDirectory) -> None:
    """Missing manifests are distinguished from an empty directory."""
    assert source.step() is not None
    assert not source.has_synced
    source.root.mkdir()
    source.step()
    source.step()
    assert source.has_synced


def test_a_change_compares_only_what_it_touches(source: ManifestDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file more among many: keys are asked for its objects only."""
    for number in range(50):
        write(source, f"{number}.yaml", pod(f"p{number}"))
    source.step()
    for path in source.root.iterdir():
        os.utime(path, (1, 1))
    while source.step() is not None or source._seen is not None or source._racy:
        pass
    asked: list[str] = []

    def recorded(resource: Resource) -> ResourceKey:
        asked.append(resource.meta.name)
        return key_of(resource)

    monkeypatch.setattr("netpol_ebpf.sources.files.key_of", recorded)
    write(source, "new.yaml", pod("new"))
    assert names(settled(source)) == {"new": "Upsert"}
    assert asked == ["new"]
