# SPDX-License-Identifier: Apache-2.0
"""Adds this directory, and that of the kernel tests' packet builder and rig, to sys.path."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernel")]
