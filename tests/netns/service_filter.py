# SPDX-License-Identifier: Apache-2.0
"""Runs a command under the system call filter of the service's unit, on a machine without systemd as process 1.

    service_filter.py COMMAND ...

The sets of system calls are those of the installed systemd-analyze. libseccomp, which systemd also uses, makes the
filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

UNIT = Path(__file__).parents[2] / "deploy" / "netpol-agent.service"
SECCOMP = "libseccomp.so.2"
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
"""Actions of libseccomp: SCMP_ACT_ALLOW, SCMP_ACT_ERRNO."""


def sets_of_systemd() -> dict[str, list[str]]:
    """The members of each set: system calls and other sets."""
    text = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter"], check=True, capture_output=True, text=True
    )
    found: dict[str, list[str]] = {}
    members: list[str] = []
    for line in text.stdout.splitlines():
        if line.startswith("@"):
            members = found.setdefault(line.strip(), [])
        elif line.startswith(" ") and not line.strip().startswith("#") and line.strip():
            members.append(line.strip())
    return found


def members_of(name: str, sets: dict[str, list[str]]) -> Iterator[str]:
    """The system calls of a set, or the one with this name."""
    if not name.startswith("@"):
        yield name
        return
    for one in sets[name]:
        yield from members_of(one, sets)


def permitted(unit: str) -> set[str]:
    """The system calls that a unit permits: its first line permits some, and each line with ~ removes some."""
    sets = sets_of_systemd()
    found: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        calls = {call for name in line.removeprefix("~").split() for call in members_of(name, sets)}
        found = found - calls if line.startswith("~") else found | calls
    return found


def install(calls: set[str]) -> None:
    """Permit only these system calls to this process and its children. Others fail with EPERM, as in the unit."""
    library = ctypes.CDLL(SECCOMP)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ERRNO | errno.EPERM))
    for call in calls:
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # otherwise this architecture does not have it
            outcome = library.seccomp_rule_add_array(context, ALLOW, number, 0, None)
            assert outcome == 0, (call, outcome)
    assert library.seccomp_load(context) == 0


if __name__ == "__main__":
    text = UNIT.read_text()
    assert "SystemCallErrorNumber=EPERM" in text.splitlines()
    install(permitted(text))
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - the command replaces this process
