# SPDX-License-Identifier: Apache-2.0
"""`netpolctl demo`: its handling of the agent's answers."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.cli.demo import Demo, DemoOutput

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.mark.parametrize(
    ("status", "is_ready"),
    [
        ({"in_force": False, "waiting": "the first state is not read yet"}, False),
        ({"in_force": True, "objects": {"enforced_endpoints": 1, "local_endpoints": 2}}, False),
        ({"in_force": True, "objects": {"enforced_endpoints": 2, "local_endpoints": 2}}, True),
    ],
)
def test_agent_that_waits_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], *, is_ready: bool
) -> None:
    """The status of an agent that waits for its source has no objects."""
    shutil.copytree(EXAMPLE, tmp_path / "manifests")
    demo = Demo(DemoOutput(quiet=True, colour=False), tmp_path)
    monkeypatch.setattr(demo, "_ask", lambda _request: iter([status]))
    assert demo._is_in_force() is is_ready
