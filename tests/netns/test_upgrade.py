# SPDX-License-Identifier: Apache-2.0
"""Another version of the agent on an enforcing node takes over older pins and refuses newer ones, without a gap."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, scene_in, to_db, wait_for
from other_version import (
    NAMES_OF_SCHEMA_8,
    OTHER_CONNECTION,
    OTHER_PROGRAM,
    WIDER_CONFIG,
    WIDER_ENDPOINT,
    WITHOUT_NAME_CLASS,
    VersionedScene,
    make_version,
    schema,
)

from netpol_ebpf.lab.laboratory import Lab
from netpol_loader import abi
from netpol_loader.pins import layouts

pytestmark = pytest.mark.netns

OLDER = (schema(-1), WIDER_CONFIG, WIDER_ENDPOINT, *WITHOUT_NAME_CLASS)
"""One version for all tests that need no other: a version is compiled once, which takes longer than its agent."""
KILLED_AT = ("new-*", "new-*/np_event", "new-*/programs/np_call")
"""The pins when an upgrade has begun, when it compiles, and when it has its programs. An agent is killed at each."""


@pytest.fixture
def scene(lab: Lab, tmp_path: Path) -> Iterator[VersionedScene]:
    """Manifests, and no agent yet. A test chooses its version."""
    with scene_in(lab, tmp_path / "home", kind=VersionedScene) as one:
        assert isinstance(one, VersionedScene)
        yield one
        one.tree = None  # so that cleanup is of this version; it works with pins of any version


@contextmanager
def unnoticed(scene: VersionedScene) -> Iterator[None]:
    """Hold connections open and try new ones without a pause during the block: none breaks, and no verdict is wrong."""
    held = [scene.lab.prober.hold(to_db("shop/web", version)) for version in (4, 6)]
    wrong: list[str] = []
    tried = 0
    done = threading.Event()

    def keep_trying() -> None:
        nonlocal tried
        while not done.is_set():
            allowed = scene.lab.attempt([to_db("shop/web"), to_db("shop/web", 6)], deadline_s=5.0)
            denied = scene.lab.attempt([to_db("shop/other"), to_db("shop/other", 6)], deadline_s=0.1, rounds=1)
            tried += 1
            wrong.extend(str(one) for one in allowed if not one.reached)
            wrong.extend(str(one) for one in denied if one.reached)
            if not all(one is not None and one.exchange(10.0) for one in held):
                wrong.append("a connection broke")

    thread = threading.Thread(target=keep_trying)
    thread.start()
    try:
        yield
        seen = tried
        wait_for(lambda: tried > seen + 2 or wrong, "connections are tried afterwards")
    finally:
        done.set()
        thread.join()
        for one in held:
            if one is not None:
                one.close()
    assert wrong == []


def pinned(scene: VersionedScene) -> list[str]:
    return sorted(path.name for path in scene.pin_root.iterdir())


def await_pin(scene: VersionedScene, pattern: str) -> None:
    """Wait until a pin with such a name exists."""
    wait_for(lambda: any(scene.pin_root.glob(pattern)), f"{pattern} is there")


def numbers(state: dict[str, Any]) -> dict[str, int]:
    return {one["endpoint"]: one["number"] for one in state["endpoints"]}


def replaced(scene: VersionedScene, tree: Path | None) -> dict[str, Any]:
    """End the agent and start that of another version. Returns its status."""
    scene.stop()
    scene.tree = tree
    return scene.start()


def test_older_schema_is_taken_over(scene: VersionedScene, tmp_path: Path) -> None:
    """Connections, numbers and counters continue, although offsets of settings, a layout and names differ."""
    scene.tree = make_version(tmp_path / "older", OLDER, NAMES_OF_SCHEMA_8)
    scene.options = ("--timeout", "udp=180")
    before = scene.start()
    assert pinned(scene) == [f"v{abi.SCHEMA_VERSION - 1}"]
    interfaces = scene.attached()
    with unnoticed(scene):
        after = replaced(scene, None)
    assert after["upgrade"] == f"schema {abi.SCHEMA_VERSION - 1} to {abi.SCHEMA_VERSION}, connections kept"
    assert pinned(scene) == [f"v{abi.SCHEMA_VERSION}"]
    assert scene.attached() == interfaces
    assert numbers(after) == numbers(before)
    assert after["generation"] > before["generation"]
    assert after["timeouts"]["udp"] == before["timeouts"]["udp"] == 180
    assert after["packets"]["policy-deny"] >= before["packets"].get("policy-deny", 0)
    (scene.state_dir / "numbers").unlink()  # so that the next agent must learn the connections' endpoints from the rows
    with unnoticed(scene):
        again = replaced(scene, make_version(tmp_path / "newer", [schema(1), WIDER_CONFIG]))
    assert numbers(again) == numbers(before)
    refused = scene_of_this_version(scene)
    assert refused.returncode == 5
    for text in (
        f"v{abi.SCHEMA_VERSION + 1} holds maps of schema {abi.SCHEMA_VERSION + 1}, made by a newer version",
        f"speaks schema {abi.SCHEMA_VERSION} and has changed nothing",
        "Start netpol-agent of the newer version, or end enforcement with `netpolctl cleanup`",
    ):
        assert text in refused.stderr
    assert pinned(scene) == [f"v{abi.SCHEMA_VERSION + 1}"]
    assert scene.attached() == interfaces
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]


def scene_of_this_version(scene: VersionedScene) -> Any:
    """Run this version's agent with pins of a newer one. Returns its output."""
    scene.stop()
    scene.tree = None
    return scene.lab.run(NODE, scene.command("--once"), check=False)


def test_three_capabilities_are_enough(scene: VersionedScene, tmp_path: Path) -> None:
    """An agent with only the service's capabilities upgrades the schema by the layouts that the older version saved."""
    scene.is_least = True
    scene.tree = make_version(tmp_path / "older", OLDER, NAMES_OF_SCHEMA_8)
    before = scene.start()
    with unnoticed(scene):
        after = replaced(scene, None)
    assert after["upgrade"] == f"schema {abi.SCHEMA_VERSION - 1} to {abi.SCHEMA_VERSION}, connections kept"
    assert pinned(scene) == [f"v{abi.SCHEMA_VERSION}"]
    assert numbers(after) == numbers(before)


def test_version_without_saved_layouts(scene: VersionedScene, tmp_path: Path) -> None:
    """The kernel describes its maps, but only with CAP_SYS_ADMIN.

    Otherwise the upgrade is refused and nothing changes.
    """
    scene.tree = make_version(tmp_path / "older", OLDER, NAMES_OF_SCHEMA_8)
    scene.start()
    (scene.pin_root / f"v{abi.SCHEMA_VERSION - 1}" / layouts.NAME).unlink()
    scene.is_least = True
    with unnoticed(scene):
        refused = scene_of_this_version(scene)
        assert refused.returncode == 5
        assert "cannot read the layout of map np_config: Operation not permitted" in refused.stderr
        assert "run `netpol-agent --once` of this version as root" in refused.stderr
        assert pinned(scene) == [f"v{abi.SCHEMA_VERSION - 1}"]
        scene.is_least = False
        after = scene.start()
    assert after["upgrade"] == f"schema {abi.SCHEMA_VERSION - 1} to {abi.SCHEMA_VERSION}, connections kept"


def test_connections_of_another_layout_are_judged_anew(scene: VersionedScene, tmp_path: Path) -> None:
    """Policy judges connections whose rows cannot be read at their next packet. Status reports this."""
    scene.tree = make_version(tmp_path / "older", [schema(-1), OTHER_CONNECTION])
    scene.start()
    with unnoticed(scene):
        after = replaced(scene, None)
    assert "open connections judged anew (np_conn4, np_conn6 of another layout)" in after["upgrade"]
    shown = scene.ctl("status", "--state-dir", str(scene.state_dir)).stdout
    assert "upgraded   " in shown


def test_changed_program_of_the_same_schema(scene: VersionedScene, tmp_path: Path) -> None:
    """A version that differs only in its program takes over without any other difference."""
    scene.tree = make_version(tmp_path / "older", [OTHER_PROGRAM])
    before = scene.start()
    with unnoticed(scene):
        after = replaced(scene, None)
    assert after["upgrade"] == ""
    assert numbers(after) == numbers(before)
    assert pinned(scene) == [f"v{abi.SCHEMA_VERSION}"]
    shutil.rmtree(tmp_path / "older")


def test_upgrade_killed_at_any_time(scene: VersionedScene, tmp_path: Path) -> None:
    """Agents that die while they prepare an upgrade leave whole enforcement, and the last one completes the upgrade."""
    scene.tree = make_version(tmp_path / "older", OLDER, NAMES_OF_SCHEMA_8)
    before = scene.start()
    scene.stop()
    scene.tree = None
    with unnoticed(scene):
        for place in KILLED_AT if os.environ.get("NETPOL_FAULTS") == "long" else KILLED_AT[-1:]:
            scene.launch()
            await_pin(scene, place)
            scene.kill()
        after = scene.start()
    assert numbers(after) == numbers(before)
    assert pinned(scene) == [f"v{abi.SCHEMA_VERSION}"]
