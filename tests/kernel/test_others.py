# SPDX-License-Identifier: Apache-2.0
"""Whether another party's program can redirect packets: read from its instructions, or unknown if they are unreadable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol_loader.kernel import syscall
from netpol_loader.kernel.relocation import CALL, INSTRUCTION, LOAD_IMMEDIATE_64, LOADS_MAP, packed
from netpol_loader.kernel.syscall import PROG_TYPE_SCHED_CLS as TC
from netpol_loader.kernel.syscall import PROG_TYPE_XDP as XDP
from netpol_loader.pins.others import Reach, _read, reach_of

LOOKUP, TIME, TAIL_CALL, CLONE_REDIRECT, REDIRECT, REDIRECT_MAP, REDIRECT_NEIGH, REDIRECT_PEER = (
    1, 5, 12, 13, 23, 51, 152, 155,
)  # fmt: skip
"""Helpers (enum bpf_func_id)."""


def one(opcode: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """An instruction."""
    return INSTRUCTION.pack(opcode, packed(source, target), offset, immediate)


def move(target: int, value: int) -> bytes:
    return one(0xB7, target, immediate=value)


def load_map(target: int, fd: int) -> bytes:
    return one(LOAD_IMMEDIATE_64, target, LOADS_MAP, immediate=fd) + bytes(8)


KEEP = one(0xBF, 6, 1)
"""A register that calls preserve; it has the context."""
CONTEXT = one(0xBF, 1, 6)
END = move(0, 0) + one(0x95)
CALLS = {
    "bpf_redirect": move(1, 1) + move(2, 0) + one(CALL, immediate=REDIRECT),
    "bpf_clone_redirect": CONTEXT + move(2, 1) + move(3, 0) + one(CALL, immediate=CLONE_REDIRECT),
    "bpf_redirect_neigh": move(1, 1) + move(2, 0) + move(3, 0) + move(4, 0) + one(CALL, immediate=REDIRECT_NEIGH),
    "bpf_redirect_peer": move(1, 1) + move(2, 0) + one(CALL, immediate=REDIRECT_PEER),
}
COUNTS = one(CALL, immediate=TIME)
FUNCTION = one(CALL, source=1, immediate=2) + END + move(0, 0) + one(0x95)
"""A call of the program's own function, which follows in the instructions."""


@pytest.fixture
def maps() -> Iterator[dict[str, int]]:
    kinds = {"array": 8, "prog_array": 4, "devmap": 4, "devmap_hash": 4, "cpumap": 4}
    found = {kind: syscall.map_create(kind, "others", 4, size, 4) for kind, size in kinds.items()}
    yield found
    for fd in found.values():
        os.close(fd)


def reach(code: bytes, program_type: int) -> Reach:
    fd = syscall.prog_load(code, program_type, name="another")
    try:
        found = reach_of(fd, program_type)
        assert _read(syscall.prog_info(fd).id, program_type) == ("another", found)
    finally:
        os.close(fd)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_tc_program_that_redirects(name: str) -> None:
    """A call of bpf_redirect_peer anywhere counts; redirection to a device does not, because its hooks still run."""
    expected = Reach.REDIRECTS if name == "bpf_redirect_peer" else Reach.NONE
    assert reach(KEEP + COUNTS + CALLS[name] + END, TC) is expected


def test_xdp_program_that_redirects(maps: dict[str, int]) -> None:
    """XDP redirects by the number of an interface or through a map; both count."""
    assert reach(CALLS["bpf_redirect"] + END, XDP) is Reach.REDIRECTS
    for kind in ("devmap", "devmap_hash", "cpumap"):
        code = load_map(1, maps[kind]) + move(2, 0) + move(3, 0) + one(CALL, immediate=REDIRECT_MAP) + END
        assert reach(code, XDP) is Reach.REDIRECTS, kind


@pytest.mark.parametrize("program_type", [TC, XDP])
def test_program_that_only_counts(maps: dict[str, int], program_type: int) -> None:
    """A program that only reads the time and a map, or does nothing, cannot redirect."""
    key = one(0x62, 10, offset=-4) + one(0xBF, 2, 10) + one(0x07, 2, immediate=0xFFFF_FFFC)
    code = key + load_map(1, maps["array"]) + one(CALL, immediate=LOOKUP) + COUNTS + END
    assert reach(code, program_type) is Reach.NONE
    assert reach(END, program_type) is Reach.NONE


@pytest.mark.parametrize("program_type", [TC, XDP])
def test_program_that_hands_on_to_others(maps: dict[str, int], program_type: int) -> None:
    """A program with a tail call is unknown, because the target may change at any time."""
    code = load_map(2, maps["prog_array"]) + move(3, 0) + one(CALL, immediate=TAIL_CALL) + END
    assert reach(code, program_type) is Reach.UNKNOWN


def test_function_of_the_program_itself() -> None:
    """A call of a program's own function makes XDP unknown, because libxdp's dispatcher replaces them; not so in TC."""
    assert reach(FUNCTION, XDP) is Reach.UNKNOWN
    assert reach(FUNCTION, TC) is Reach.NONE


SETTINGS = Path("/proc/sys/kernel")
SHOWS_ADDRESSES = (
    int((SETTINGS / "kptr_restrict").read_text()) == 0 and int((SETTINGS / "perf_event_paranoid").read_text()) < 2
)
"""Whether this kernel shows addresses to everybody, even without CAP_SYSLOG."""


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("sys_admin", "UNKNOWN "),
        ("syslog", "NONE another" if SHOWS_ADDRESSES else "UNKNOWN another"),
        ("net_raw", "NONE another"),
    ],
)
def test_process_that_may_not_read_it(without: str, expected: str) -> None:
    """Without CAP_SYS_ADMIN, and if the kernel hides its addresses, the answer is unknown, not a guess."""
    fd = syscall.prog_load(COUNTS + END, TC, name="another")
    try:
        number = syscall.prog_info(fd).id
        script = (
            f"from netpol_loader.pins.others import _read; name, reach = _read({number}, {TC}); print(reach.name, name)"
        )
        command = [
            "setpriv",
            "--bounding-set",
            f"-{without}",
            "--inh-caps",
            f"-{without}",
            sys.executable,
            "-c",
            script,
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.stdout.strip("\n") == expected, done.stderr
    finally:
        os.close(fd)
