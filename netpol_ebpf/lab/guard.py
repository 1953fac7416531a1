# SPDX-License-Identifier: Apache-2.0
"""Removes a laboratory, in a process that outlives the builder of the laboratory.

The builder starts this module as a child process in its own session. It writes one JSON line to the child's standard
input for each namespace or directory that it is about to create. The pipe ends when the builder closes it or dies, also
by SIGKILL. Then the guard ends every process inside the recorded namespaces, deletes the namespaces and the recorded
directories, and exits.

Invariant: the guard removes only recorded objects, and only the guard removes them. This module uses only the standard
library.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from netpol_ebpf.terminal import say

NETNS_DIR = Path("/run/netns")
KILL_DEADLINE_S = 5.0
POLL_S = 0.01


def processes_in(namespace: str) -> list[int]:
    """Ids of the processes in the named network namespace; [] if the namespace does not exist."""
    try:
        wanted = (NETNS_DIR / namespace).stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            seen = (entry / "ns" / "net").stat()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # the process has ended, or is a kernel thread
        if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(int(entry.name))
    return found


def _kill_all(namespace: str) -> None:
    deadline = time.monotonic() + KILL_DEADLINE_S
    while remaining := processes_in(namespace):
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {remaining} in namespace {namespace} do not end")
        time.sleep(POLL_S)


def remove(namespaces: Iterable[str], directories: Iterable[Path] = ()) -> list[str]:
    """Remove namespaces, with the processes inside, and directories. Missing ones are skipped.

    An object that cannot be removed does not end the removal. The returned list has one line for each such object.
    """
    failures = []
    for namespace in namespaces:
        if not (NETNS_DIR / namespace).exists():
            continue
        try:
            _kill_all(namespace)
            subprocess.run(["ip", "netns", "delete", namespace], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            failures.append(f"namespace {namespace}: {error.stderr.strip()}")
        except OSError as error:
            failures.append(f"namespace {namespace}: {error}")
    for directory in directories:
        if not directory.exists():
            continue
        shutil.rmtree(directory, onerror=lambda _, path, error: failures.append(f"{path}: {error[1]}"))
    return failures


def main() -> int:
    """Read records from standard input to its end, then remove the recorded objects.

    Returns 0 if all were removed, 5 if some remain.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    namespaces: list[str] = []
    directories: list[Path] = []
    for line in sys.stdin:
        record = json.loads(line)
        namespaces += record.get("namespaces", [])
        directories += [Path(text) for text in record.get("directories", [])]
    failures = remove(namespaces, directories)
    for failure in failures:
        say(f"netpol lab: cannot remove {failure}", file=sys.stderr)
    return 5 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
