# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the usual scene: one agent for all tests of a file, or an agent for one test.

A conftest imports them. A file that needs another laboratory or other manifests has fixtures of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_scene import Scene, lab_for, scene_in

from netpol_ebpf.lab.laboratory import Lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes with their pods."""
    with lab_for() as one:
        yield one


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_in(lab, tmp_path_factory.mktemp("agent") / "home") as one:
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """An agent with the initial manifests in force. Tests share it until one of them ends it."""
    lasting_scene.reset()
    return lasting_scene


@pytest.fixture
def own_scene(lasting_scene: Scene, lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    """A scene without an agent, on a node without enforcement."""
    lasting_scene.retire()
    with scene_in(lab, tmp_path / "home") as one:
        yield one
