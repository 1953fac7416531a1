# SPDX-License-Identifier: Apache-2.0
"""A progress bar on standard error for runs that take minutes. It prints little if standard error is not a terminal."""

from __future__ import annotations

import sys
import time

WIDTH = 30


class Progress:
    """Counts the steps of a known total.

    A terminal gets one line that is rewritten, anything else a line at each tenth.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, max(total, 1), 0
        self._began = time.monotonic()
        self._shown = -1

    def step(self, what: str) -> None:
        """Count one more step. ``what``: the name of the step that begins."""
        spent = time.monotonic() - self._began
        left = spent / self._done * (self._total - self._done) if self._done else 0.0
        share = self._done / self._total
        if sys.stderr.isatty():
            bar = ("#" * int(share * WIDTH)).ljust(WIDTH, ".")
            line = f"\r{self._title} [{bar}] {self._done}/{self._total} {left:4.0f} s left  {what}"
            print(line[:118].ljust(118), end="", file=sys.stderr, flush=True)
        elif int(share * 10) > self._shown:
            self._shown = int(share * 10)
            print(f"{self._title}: {share:.0%}, {spent:.0f} s  {what}", file=sys.stderr, flush=True)
        self._done += 1

    def end(self) -> None:
        """End the display, whether or not all steps were done."""
        spent = time.monotonic() - self._began
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{self._title}: {self._done} steps in {spent:.0f} s".ljust(118), file=sys.stderr, flush=True)
