# SPDX-License-Identifier: Apache-2.0
"""The demonstration, run as a user runs it: its results, its possible failure, and that nothing remains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol_ebpf.cli.demo import PIN_PARENT, Demo, DemoOutput
from netpol_ebpf.lab import shop
from netpol_ebpf.lab.guard import NETNS_DIR

pytestmark = pytest.mark.netns

COMMAND = [sys.executable, "-m", "netpol_ebpf.cli.main", "demo"]
DEADLINE_S = 120.0


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory with a short name, because the path of the agent's socket below it has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="np-") as name:
        yield Path(name)


def left_behind(token: str, pins: str, temporary: Path) -> list[str]:
    """The namespaces, pins and copies of a run that still exist."""
    places = [*NETNS_DIR.glob(f"{token}-*"), *PIN_PARENT.glob(Path(pins).name), *temporary.iterdir()]
    return [str(path) for path in places]


def test_everything_is_as_the_model_predicts(temporary: Path) -> None:
    """Four matrices of real connections, one explained denial, one live change; afterwards nothing remains."""
    done = subprocess.run(
        [*COMMAND, "--no-iperf", "-o", "json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["ok"] is True
    assert summary["throughput"] is None
    for part in ("before", "after", "changed", "restored"):
        assert summary[part]["mismatches"] == []
    attempts = summary["before"]["attempts"]
    assert attempts > 200
    assert summary["before"]["reached"] == attempts
    assert 0 < summary["after"]["reached"] < attempts
    assert summary["restored"]["matrix"] == summary["after"]["matrix"]
    assert summary["after"]["matrix"]["shop/back-end"]["shop/database:5432"] == "reached"
    assert summary["after"]["matrix"]["shop/front-end"]["shop/database:5432"] == "silent"
    assert summary["after"]["matrix"]["outside/blocked"]["shop/front-end:8080"] == "silent"
    assert summary["change"]["cells"] == ["shop/debug to shop/database:5432"]
    assert summary["change"]["open_connection_cut"] is True
    assert summary["explained"]["rule"].startswith("default|end of tier|egress|")
    assert summary["explained"]["policies"]["shop/front-end"] == "front-end.yaml:3"
    assert any('"name": "' in line for line in summary["map"])
    assert left_behind(summary["laboratory"], summary["pins"], temporary) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(number: signal.Signals, temporary: Path) -> None:
    """If it is ended while the agent works, it still removes everything. Its exit code shows the signal."""
    with subprocess.Popen(
        [*COMMAND, "--no-iperf"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as demo:
        assert demo.stdout is not None
        shown = ""
        for line in demo.stdout:
            shown += line
            if "in force after" in line:
                break
        os.kill(demo.pid, number)
        _, errors = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == 130, shown + errors
    named = re.search(r"names of namespaces begin with (np\w+); the agent will pin its maps in (\S+)", shown)
    assert named is not None
    assert left_behind(named[1], named[2], temporary) == []


def test_it_notices_when_nothing_is_enforced(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an agent the demonstration names every connection that should be denied, and fails."""
    monkeypatch.setattr(Demo, "_start_agent", lambda _: 0.0)
    workshop = temporary / "workshop"
    (workshop / "manifests").mkdir(parents=True)
    for path in shop.manifests_dir().iterdir():
        (workshop / "manifests" / path.name).write_text(path.read_text())
    with Demo(DemoOutput(quiet=True, colour=False), workshop) as demo:
        before = demo._show_before()
        assert demo.summary["ok"]
        demo._show_enforced(before)
    assert not demo.summary["ok"]
    named = demo.summary["after"]["mismatches"]
    assert "shop/front-end to 10.244.1.12 protocol 6 port 5432: reached, expected silent" in named
    assert left_behind(demo.lab.token, str(demo.pins), temporary) == []


def test_without_root_it_says_so() -> None:
    """The output is one clear line, and the exit code 5."""
    program = (
        "import os, sys; os.geteuid = lambda: 1000; from netpol_ebpf.cli.main import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 5
    assert "needs root" in done.stderr
    assert done.stdout == ""
