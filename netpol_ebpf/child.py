# SPDX-License-Identifier: Apache-2.0
"""The setup of a child process that the agent forks for one computation.

Invariant: a child ends when its time is up and when its parent ends. If memory runs short, the kernel kills the child
before the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""Value from the kernel's linux/prctl.h."""


def part_from(parent: int, work_s: int) -> None:
    """Set up this process, a fresh child, so that it ends with its parent and does not handle the parent's signals.

    The kernel's OOM killer will kill this process before the parent. ``parent``: the id of the process that forked.
    ``work_s``: seconds after which SIGALRM ends this process; a later `signal.alarm` replaces them.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(0)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(work_s)
    with contextlib.suppress(OSError):  # if memory runs short, the kernel kills the child before the agent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    gc.disable()  # a collection would write to, and so copy, every page that it visits
