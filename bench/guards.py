# SPDX-License-Identifier: Apache-2.0
"""Measure each guard that every packet of an open connection passes: the program with and without that guard.

    sudo .venv/bin/python -m bench.guards [--loads 9] [--rounds 300] [-o FILE]

A guard is removed from a copy of the sources by replacing its text, as `python -m tests.guards` does to see its tests
fail. The copy and the whole program are each loaded several times, because a hot packet's time differs by some
nanoseconds with the address at which the kernel places a program. All programs run in turns on the same frames
(`bench/versions.py`). The cost of a guard is the difference of the medians over the loads.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.end_to_end import ended_by
from bench.record import LESS, ROOT, Case, Run, begin, save, this_command
from bench.versions import cases, loaded, measure
from netpol_ebpf.errors import PlatformError

SUITE = "guards"
WHOLE = "netpol-ebpf"
CHECKSUMS, SIGN = "without the check of partial checksums", "without the barrier's sign"
COPIED = ("bpf", "loader", "netpol_ebpf", "tests/kernel", "pyproject.toml")

Removal = tuple[str, str, str]
"""(file, text that occurs exactly once in it, the text that replaces it)."""
REMOVALS: Mapping[str, Sequence[Removal]] = {
    CHECKSUMS: (
        ("bpf/np_flow_cache.h", "__u32 checksum = np_checksum_at(skb);", "__u32 checksum = NP_NO_CHECKSUM;"),
        ("bpf/netpol.c", "if (NP_UNLIKELY(np_checksum_misaims(skb, packet)))", "if (0)"),
    ),
    SIGN: (
        ("bpf/np_flow_cache.h", "skb->mark |= config->seen_mark;", ";"),
        ("bpf/netpol.c", "skb->mark |= ctx->config->seen_mark;", ";"),
    ),
}


def run_suite(run: Run, *, loads: int, rounds: int) -> None:
    """Measure, and add the cases to the run: nanoseconds of a test run, one sample for each load of the program."""
    with trees() as found, loaded(found, loads) as programs:
        for case in cases():
            for contender, samples in measure(programs, case, rounds).items():
                run.cases.append(Case(SUITE, case.name, contender, "ns", LESS, tuple(samples), judged=False))


@contextlib.contextmanager
def trees() -> Iterator[dict[str, Path]]:
    """Yield this version, and copies of it that each lack one guard.

    Raises PlatformError if the text of a guard does not occur exactly once.
    """
    with tempfile.TemporaryDirectory(prefix="netpol-bench-guards-") as directory:
        found = {WHOLE: ROOT}
        for place, (name, removals) in enumerate(REMOVALS.items()):
            tree = found[name] = Path(directory) / str(place)
            for one in COPIED:
                copy(ROOT / one, tree / one)
            for file, text, instead in removals:
                whole = (tree / file).read_text()
                if whole.count(text) != 1:
                    raise PlatformError(f"{file} has {text!r} {whole.count(text)} times: bench/guards.py is stale")
                (tree / file).write_text(whole.replace(text, instead))
        yield found


def copy(source: Path, to: Path) -> None:
    """Copy a file or a directory."""
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, to)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loads", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("-o", "--output", type=Path, default=Path("guards.json"))
    options = parser.parse_args(argv)
    run = begin(this_command())
    run_suite(run, loads=options.loads, rounds=options.rounds)
    save(run, options.output)
    whole = {case.name: case.median for case in run.cases if case.contender == WHOLE}
    for case in run.cases:
        if case.contender != WHOLE:
            print(f"{case.name:40}{case.contender:45}{case.median - whole[case.name]:+6.1f} ns")
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
