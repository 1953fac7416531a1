# SPDX-License-Identifier: Apache-2.0
"""Measures by which the agent needs little memory.

Each runs in a process of its own, because it lasts for the process's life.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_RESIDENT = """
import resource
from pathlib import Path
from netpol_ebpf.agent import footprint

{call}
outgrown = bytearray(16 << 20)
del outgrown
tables = [bytearray(b"x") * (2 << 20) for _ in range(20)]
del tables[:-1]
print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20)
"""


def _run(program: str) -> int:
    return int(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator it is about")
def test_freed_tables_are_given_back() -> None:
    """Freed blocks below one that stays are returned, after a larger one was freed. glibc alone keeps them."""
    kept = _run(_RESIDENT.format(call=""))
    assert _run(_RESIDENT.format(call="footprint.give_back_large_blocks()")) < kept - 30


def test_what_has_settled_is_not_looked_through_again() -> None:
    """The garbage collector skips old objects, and still finds later garbage."""
    assert (
        _run("import gc; from netpol_ebpf.agent import footprint; footprint.freeze(); print(gc.get_freeze_count())") > 0
    )


def test_garbage_is_collected_rarely_until_the_objects_are_there() -> None:
    """There are fewer collections for the same objects, and afterwards as many as by default."""
    program = """
import gc
from netpol_ebpf.agent import footprint

kept = []

def collections():
    before = sum(one["collections"] for one in gc.get_stats())
    kept.append([{"number": number} for number in range(20_000)])
    return sum(one["collections"] for one in gc.get_stats()) - before

usual = collections()
before = gc.get_threshold()
footprint.collect_rarely()
rare = collections()
footprint.freeze()
print(int(usual > 2 * rare and gc.get_threshold() == before))
"""
    assert _run(program) == 1
