# SPDX-License-Identifier: Apache-2.0
"""The search for manifests and the reading of one: links, what is no file, and what costs more than it should."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from netpol_ebpf.resources import manifest_files
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.manifest_files import find_manifests, read_regular

NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {}}}\n"


def maze(root: Path, size: int) -> None:
    """Directories, each with a manifest and a link to each other one."""
    for number in range(size):
        here = root / f"d{number}"
        here.mkdir(parents=True)
        (here / "a.yaml").write_text(NAMESPACE.format(f"n{number}"), encoding="utf-8")
        for other in range(size):
            if other != number:
                (here / f"l{other}").symlink_to(f"../d{other}")


def test_links_between_directories_cost_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each directory is listed once and under its own name, whatever links lead to it; the command line reads the same."""
    maze(tmp_path, 12)
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.fspath(path)) or scandir(path))
    found = find_manifests(tmp_path)
    assert sorted(found.files) == sorted(f"d{number}/a.yaml" for number in range(12))
    assert found.hidden == {}
    assert len(listed) == 13
    assert len(found.directories) == 13 + 12 * 11
    assert sorted(one.meta.name for one in load_paths([tmp_path]).check()) == sorted(f"n{one}" for one in range(12))


def test_directory_that_only_links_lead_to_is_under_the_first_of_them(tmp_path: Path) -> None:
    """The order in which a file system lists names decides nothing; links that are found behind links are followed."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("team", "other"):
        (outside / name).mkdir(parents=True)
        (outside / name / f"{name}.yaml").touch()
    (outside / "team" / "z").symlink_to(outside / "other")
    for links in (("c", "b", "d/a"), ("d/a", "b", "c")):
        (root / "d").mkdir(parents=True)
        for link in links:
            (root / link).symlink_to(outside / "team")
        assert sorted(find_manifests(root).files) == ["b/team.yaml", "b/z/other.yaml"]
        for link in links:
            (root / link).unlink()
        (root / "d").rmdir()


def test_layouts_with_links_of_real_tools_are_read_whole(tmp_path: Path) -> None:
    """A ConfigMap's volume with a linked directory, and overlays that link to their base: every file, each once."""
    (tmp_path / "volume/..v1/sub").mkdir(parents=True)
    (tmp_path / "volume/..data").symlink_to("..v1")
    (tmp_path / "volume/..v1/a.yaml").touch()
    (tmp_path / "volume/..v1/sub/b.yaml").touch()
    (tmp_path / "volume/a.yaml").symlink_to("..data/a.yaml")
    (tmp_path / "volume/sub").symlink_to("..data/sub")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/policy.yaml").touch()
    for overlay in ("dev", "prod"):
        (tmp_path / "overlays" / overlay).mkdir(parents=True)
        (tmp_path / "overlays" / overlay / "base").symlink_to("../../base")
        (tmp_path / "overlays" / overlay / "patch.yaml").touch()
    found = find_manifests(tmp_path)
    assert sorted(found.files) == [
        "base/policy.yaml", "overlays/dev/patch.yaml", "overlays/prod/patch.yaml", "volume/a.yaml", "volume/sub/b.yaml",
    ]  # fmt: skip
    assert found.hidden == {}


def test_deep_directories_are_searched(tmp_path: Path) -> None:
    """Nesting is no recursion: a file below more directories than Python may call functions is found."""
    depth = 1200
    for level in range(1, depth + 1):
        (tmp_path / ("d/" * level)).mkdir()
    (tmp_path / ("d/" * depth) / "a.yaml").touch()
    names = list(find_manifests(tmp_path).files)
    (tmp_path / ("d/" * depth) / "a.yaml").unlink()
    for level in range(depth, 0, -1):
        (tmp_path / ("d/" * level)).rmdir()
    assert names == ["d/" * depth + "a.yaml"]


def test_search_pauses_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among many names other work gets its turn; beyond the limit there is no search, and it says so."""
    for number in range(50):
        (tmp_path / f"{number}.txt").touch()
    monkeypatch.setattr(manifest_files, "PAUSE_ENTRIES", 10)
    pauses: list[int] = []
    assert find_manifests(tmp_path, lambda: pauses.append(1)).files == {}
    assert len(pauses) == 5
    monkeypatch.setattr(manifest_files, "MOST_ENTRIES", 49)
    with pytest.raises(OSError, match="more than 49 names") as raised:
        find_manifests(tmp_path)
    assert raised.value.errno == errno.E2BIG
    (problem,) = load_paths([tmp_path]).problems
    assert "more than 49 names" in problem.message


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes, sockets, devices and directories are refused before anything is opened that could wait or act."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/tty")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest: opened.append(flags) or real(path, flags, *rest))
    for name in ("pipe", "device", "directory", "socket"):
        with pytest.raises(OSError, match="no regular file"):
            read_regular(tmp_path / name)
    assert all(flags & os.O_PATH for flags in opened)


@pytest.mark.parametrize("name", ["/proc/kmsg", "/proc/self/maps"])
def test_files_without_a_size_are_not_read(name: str) -> None:
    """Those of special file systems are regular, say that they are empty, and may never end."""
    assert read_regular(Path(name)) == b""


def test_large_file_is_refused_without_being_read(tmp_path: Path) -> None:
    """A sparse file of 100 GB is refused by its size, to the agent and to the command line; one at the limit is read."""
    path = tmp_path / "a.yaml"
    path.touch()
    os.truncate(path, 100 << 30)
    with pytest.raises(OSError, match="larger than 64 MiB") as raised:
        read_regular(path)
    assert raised.value.errno == errno.EFBIG
    for given in (path, tmp_path):
        (problem,) = load_paths([given]).problems
        assert "larger than 64 MiB" in problem.message
    path.write_bytes(b"x" * 4096)
    assert read_regular(path, 4096) == b"x" * 4096
    with pytest.raises(OSError, match="larger"):
        read_regular(path, 4095)


def test_file_that_has_more_than_its_size_is_refused_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that grows while it is read is read up to the limit and no further."""
    path = tmp_path / "a.yaml"
    path.write_bytes(b"x")
    real = os.read

    def growing(file: int, size: int) -> bytes:
        with path.open("ab") as more:
            more.write(b"x" * 1000)
        return real(file, size)

    monkeypatch.setattr(os, "read", growing)
    with pytest.raises(OSError, match="larger"):
        read_regular(path, 5000)


def test_pipe_of_the_shell_is_read_by_the_command_line() -> None:
    """`netpolctl check <(kustomize build)` names a pipe; that one is waited for."""
    reading, writing = os.pipe()
    os.write(writing, NAMESPACE.format("a").encode())
    os.close(writing)
    try:
        assert [one.meta.name for one in load_paths([Path(f"/dev/fd/{reading}")]).check()] == ["a"]
    finally:
        os.close(reading)
