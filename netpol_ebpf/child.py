# SPDX-License-Identifier: Apache-2.0
"""What every child process of the agent does first: a fork that works something out and ends.

Invariant: a child ends when its time is up, when its parent ends, and before its parent where memory runs short.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def part_from(parent: int, work_s: int) -> None:
    """Become a process that its parent's signals and end do not leave behind, and that leaves the parent its memory.

    ``parent``: the process that forked.  After ``work_s`` seconds, or those of a later `signal.alarm`, SIGALRM ends this process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(0)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(work_s)
    with contextlib.suppress(OSError):  # where memory runs short, a child is given up rather than the agent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    gc.disable()  # a collection would copy every page that it looks at
