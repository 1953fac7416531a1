# SPDX-License-Identifier: Apache-2.0
"""Makes commands that create objects on the machine remove these objects also when a signal ends the command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the context, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that cleanup code runs."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
