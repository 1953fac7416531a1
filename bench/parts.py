# SPDX-License-Identifier: Apache-2.0
"""Runs parts of a benchmark as processes of their own, so that each has its own memory and maps.

Invariant: if a run ends early, it first ends its part, and waits until the part has removed everything that it made.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from netpol_ebpf.errors import PlatformError


def run_part(command: Sequence[str], name: str) -> str:
    """Run a part and return its output. Raises PlatformError if the part fails."""
    part = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = part.communicate()
    except BaseException:
        part.terminate()
        part.communicate()
        raise
    if part.returncode != 0:
        raise PlatformError(f"{name} ended with {part.returncode}", hint="What it said is above.")
    return said
