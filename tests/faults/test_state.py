# SPDX-License-Identifier: Apache-2.0
"""The agent's state directory, its locks or its BPF file system fail: enforcement continues, or nothing is started."""

from __future__ import annotations

import ctypes
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from agent_scene import NODE, OTHER_ALLOWED, Scene, scene_in, to_db

from netpol_ebpf.agent.main import LEDGER_NAME
from netpol_ebpf.apply.records import DAMAGED_SUFFIX
from netpol_ebpf.lab.laboratory import Lab

pytestmark = pytest.mark.netns

ROOM_BYTES = 256 << 10


@dataclass
class SmallScene(Scene):
    """An agent whose state directory is on a file system of ROOM_BYTES."""

    small: Path = Path("/nonexistent")

    @property
    def state_dir(self) -> Path:
        return self.small / "state"

    def fill(self) -> None:
        """Fill the file system.

        A part of the last page of a file may be free, which lines of hundreds of bytes soon fill.
        """
        with (self.small / "others").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return


@pytest.fixture
def small_scene(lasting_scene: Scene, lab: Lab, tmp_path: Path) -> Iterator[SmallScene]:
    libc = ctypes.CDLL(None, use_errno=True)
    lasting_scene.retire()
    with tempfile.TemporaryDirectory(prefix="netpol-small-") as name:
        size = f"size={ROOM_BYTES}".encode()
        assert libc.mount(b"none", name.encode(), b"tmpfs", 0, size) == 0, os.strerror(ctypes.get_errno())
        try:
            with scene_in(lab, tmp_path / "home", kind=SmallScene, small=Path(name)) as one:
                assert isinstance(one, SmallScene)
                yield one
        finally:
            assert libc.umount2(name.encode(), 0) == 0, os.strerror(ctypes.get_errno())


def many_policies(number: int) -> str:
    """Policies whose rules need more room in the ledger than a page has."""
    return "---\n".join(
        OTHER_ALLOWED.replace("name: other,", f"name: other-{number}-{index}-{'x' * 40},") for index in range(40)
    )


def slugs(state: dict[str, list[dict[str, str]]]) -> set[str]:
    return {one["slug"] for one in state["problems"]}


def test_full_state_directory_ends_nothing(small_scene: SmallScene) -> None:
    """Changes are still applied and the problem is reported.

    With room again, the ledger is written; the next agent uses its numbers.
    """
    scene = small_scene
    assert slugs(scene.start()) == set()
    scene.fill()
    scene.write("many.yaml", many_policies(1))
    scene.await_reached(to_db("shop/other"), expected=True)
    state = scene.await_status(lambda now: {"ledger", "copies"} <= slugs(now), "the lack of room is told")
    assert state["in_force"], "nothing of the manifests is missing"
    (scene.manifests / "many.yaml").unlink()
    scene.await_reached(to_db("shop/other"), expected=False)
    (scene.small / "others").unlink()
    numbers = scene.await_status(lambda now: not slugs(now), "it is made up for")["endpoints"]
    scene.kill()
    assert scene.start()["endpoints"] == numbers


def test_start_without_room_and_with_a_damaged_ledger(small_scene: SmallScene) -> None:
    """The agent finds both faults, enforces nevertheless, and reports them.

    Cleanup also removes the damaged ledger's copy.
    """
    scene = small_scene
    numbers = scene.start()["endpoints"]
    scene.kill()
    ledger = scene.state_dir / LEDGER_NAME
    ledger.write_bytes(b"\xff\xfe damaged\n")
    scene.fill()
    state = scene.start()
    assert state["in_force"]
    assert "ledger" in slugs(state)
    assert state["endpoints"] == numbers, "those of the rows in force"
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    assert ledger.with_suffix(DAMAGED_SUFFIX).read_bytes() == b"\xff\xfe damaged\n"
    (scene.small / "others").unlink()
    scene.stop()
    assert scene.cleanup().returncode == 0
    assert not scene.state_dir.exists()


def test_nobody_works_beside_an_agent_by_another_state_directory(scene: Scene, tmp_path: Path) -> None:
    """A cleanup and a second agent each end with one line, and policy stays in force."""
    other = ("--pin-root", str(scene.pin_root), "--state-dir", str(tmp_path / "other"))
    refused = scene.ctl("cleanup", *other)
    second = scene.lab.run(NODE, [*scene.command("--once"), *other], check=False)
    for done in (refused, second):
        assert done.returncode == 5
        assert f"is at work on {scene.pin_root}" in done.stderr
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    assert scene.attached()


def test_agent_makes_no_pins_that_would_go_with_it(own_scene: Scene) -> None:
    """The mount namespace has no BPF file system of the node. The agent reports this and ends, and pins nothing."""
    command = shlex.join(own_scene.command("--once"))
    done = own_scene.lab.run(
        NODE, ["unshare", "--mount", "sh", "-c", f"umount /sys/fs/bpf && exec {command}"], check=False
    )
    assert done.returncode == 5
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "would be gone when this process ends" in error
    assert "cleanup" not in done.stderr
    assert own_scene.reached(to_db("shop/other")) == [True]
    own_scene.start()
    assert own_scene.reached(to_db("shop/other")) == [False]
