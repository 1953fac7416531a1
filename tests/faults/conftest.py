# SPDX-License-Identifier: Apache-2.0
"""A laboratory with an agent for tests of faults. The tests are short by default, and long with NETPOL_FAULTS=long."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernel"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "netns"))

from agent_scene import LATE, lab_for
from scene_fixtures import lasting_scene, own_scene, scene

from netpol_ebpf.lab.laboratory import Lab

__all__ = ["lab", "lasting_scene", "own_scene", "scene"]


@pytest.fixture(scope="session")
def is_long() -> bool:
    """Whether the long version of the tests is requested."""
    return os.environ.get("NETPOL_FAULTS") == "long"


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with lab_for(outside=[LATE]) as one:
        yield one
