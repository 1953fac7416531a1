# SPDX-License-Identifier: Apache-2.0
"""Parts of a run that are processes of their own, so that memory and maps are theirs alone.

Invariant: a run that ends early ends its part first, and waits until that has removed what it made.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from netpol_ebpf.errors import PlatformError


def run_part(command: Sequence[str], name: str) -> str:
    """The output of a part. Raises PlatformError when the part fails."""
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
