# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the scene that most tests have: one agent for all tests of a file, or an agent of the test's own.

A conftest imports them; a file that needs another laboratory or other manifests has a fixture of the same name.
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
    """An agent that has the manifests of the beginning in force; the same one as long as nothing happens to it."""
    lasting_scene.reset()
    return lasting_scene


@pytest.fixture
def own_scene(lasting_scene: Scene, lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    """A scene without an agent, on a node on which nothing is enforced."""
    lasting_scene.retire()
    with scene_in(lab, tmp_path / "home") as one:
        yield one
