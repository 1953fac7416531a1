# SPDX-License-Identifier: Apache-2.0
"""scripts/render_manifests.py says in one line which tool it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "render_manifests.py"


def test_a_check_without_the_extra_dev_says_so_in_one_line(tmp_path: Path) -> None:
    """An interpreter without site packages has neither yaml nor kubernetes_validate: one line and exit code 5."""
    helm = tmp_path / "helm"
    helm.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    helm.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--check"]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "yaml" in done.stderr
    assert "[dev]" in done.stderr
