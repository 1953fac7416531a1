# SPDX-License-Identifier: Apache-2.0
"""Whose BPF file system it is: the node's, or one that goes with this process. With a /proc of the test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netpol_ebpf.errors import PlatformError
from netpol_loader.pins import doctor

ROOT_MOUNT = "{number} 1 8:1 / / rw - ext4 /dev/sda1 rw"
BPF_MOUNT = "{number} 1 {device} / /sys/fs/bpf rw - bpf bpf rw"


def device_of(path: Path) -> str:
    status = path.stat()
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"


class Proc:
    """A /proc with this process and process 1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for process in ("self", "1"):
            (root / process / "ns").mkdir(parents=True)
        (root / "self" / "ns" / "pid").touch()

    def mounts(self, process: str, *lines: str) -> None:
        (self.root / process / "mountinfo").write_text("\n".join(lines) + "\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    one = Proc(tmp_path / "proc")
    monkeypatch.setattr(doctor, "PROC", one.root)
    monkeypatch.setattr(doctor, "INITIAL_PID_NAMESPACE", (one.root / "self" / "ns" / "pid").stat().st_ino)
    monkeypatch.setattr(doctor, "_look_at_privilege", lambda: "")
    monkeypatch.setattr(doctor, "BPFFS", tmp_path / "bpf")
    (tmp_path / "bpf").mkdir()
    return one


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is mounted by the one who asks, which succeeds."""
    done: list[bytes] = []

    class Library:
        def mount(self, _what: bytes, where: bytes, *_: object) -> int:
            done.append(where)
            return 0

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda *_args, **_options: Library())
    monkeypatch.setattr(doctor, "_is_bpffs", lambda _path: False)
    return done


def test_is_mounted_on_the_node(proc: Proc, mounted: list[bytes]) -> None:
    """In the node's own mount namespace nothing changes: what is missing is mounted."""
    for process in ("self", "1"):
        proc.mounts(process, ROOT_MOUNT.format(number=20))
    assert "it will be" in doctor._look_at_bpffs(doctor.BPFFS / "netpol")
    doctor.require_bpffs(doctor.BPFFS / "netpol")
    assert mounted == [bytes(doctor.BPFFS)]


@pytest.mark.parametrize("kind", ["mount namespace", "PID namespace", "hidden"])
def test_is_mounted_nowhere_else(proc: Proc, mounted: list[bytes], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where the mount would be gone with this process, or that cannot be told, there is one line, and nothing is mounted."""
    proc.mounts("self", ROOT_MOUNT.format(number=900))
    proc.mounts("1", ROOT_MOUNT.format(number=20))
    if kind == "PID namespace":
        monkeypatch.setattr(doctor, "INITIAL_PID_NAMESPACE", 1)
        proc.mounts("1", ROOT_MOUNT.format(number=900))  # process 1 of that namespace is in this mount namespace
    elif kind == "hidden":
        (proc.root / "1" / "mountinfo").unlink()
    for look in (doctor.require_bpffs, doctor._look_at_bpffs):
        with pytest.raises(PlatformError, match="would be gone when this process ends") as caught:
            look(doctor.BPFFS / "netpol")
        assert caught.value.exit_code == 5
        assert "\n" not in caught.value.message
        assert "cleanup" not in (caught.value.hint or "")
    assert mounted == []


def test_file_system_of_the_node_is_taken_in_any_mount_namespace(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound in from the node, as into a container, or handed down to a service: it has the device that the node has."""
    monkeypatch.setattr(doctor, "_is_bpffs", lambda _path: True)
    bound = BPF_MOUNT.format(number=901, device=device_of(doctor.BPFFS))
    proc.mounts("self", ROOT_MOUNT.format(number=900), bound)
    proc.mounts("1", ROOT_MOUNT.format(number=20), BPF_MOUNT.format(number=21, device=device_of(doctor.BPFFS)))
    doctor.require_bpffs(doctor.BPFFS / "netpol")
    monkeypatch.setattr(doctor, "INITIAL_PID_NAMESPACE", 1)  # of a container nothing more can be seen
    proc.mounts("1", ROOT_MOUNT.format(number=900), bound)
    doctor.require_bpffs(doctor.BPFFS / "netpol")


def test_file_system_that_the_node_has_not_is_refused(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody mounted in a mount namespace of its own is as short-lived as one that the agent would mount there."""
    monkeypatch.setattr(doctor, "_is_bpffs", lambda _path: True)
    proc.mounts("self", ROOT_MOUNT.format(number=900), BPF_MOUNT.format(number=901, device=device_of(doctor.BPFFS)))
    proc.mounts("1", ROOT_MOUNT.format(number=20), BPF_MOUNT.format(number=21, device="0:9999"))
    for look in (doctor.require_bpffs, doctor._look_at_bpffs):
        with pytest.raises(PlatformError, match="not on the node") as caught:
            look(doctor.BPFFS / "netpol")
        assert "cleanup" not in (caught.value.hint or "")
