# SPDX-License-Identifier: Apache-2.0
"""Write docs/kernels.md from the recorded results.

    python -m tests.vm.page [--check]

This program writes every figure of the page from tests/vm/results. It must not leave out a kernel: one of WANTED
without a result is shown as "not run". Exit code: 0, or 1 with ``--check`` if the page is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import NetpolError
from tests.vm.record import REFUSED, ROOT, Result, read_results
from tests.vm.steps import BORDER

PAGE = ROOT / "docs" / "kernels.md"
NOT_RUN = "not run"

COMPILERS = {"BCC 0.26": "BCC 0.26, LLVM 14", "BCC 0.31": "BCC 0.31, LLVM 19", "BCC 0.37": "BCC 0.37, LLVM 21"}
"""By the beginning of a compiler's name: its name with the LLVM of Debian 12, 13 and sid, which BCC does not report."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A kernel that the documentation lists.

    ``who``: the distributions that have the kernel. ``compilers``: the compilers with which it must be run; "any": one
    of them.
    """

    series: str
    machine: str
    who: str
    compilers: tuple[str, ...] = ("any",)


EVERY = tuple(COMPILERS.values())
WANTED = (
    Wanted("5.10", "x86_64", "Debian 11"),
    Wanted("5.15", "x86_64", "Ubuntu 22.04; the oldest that is supported", EVERY),
    Wanted("6.1", "x86_64", "Debian 12", EVERY),
    Wanted("6.1-rt", "x86_64", "Debian 12, real-time"),
    Wanted("6.6", "x86_64", "a long-term kernel", EVERY),
    Wanted("6.12", "x86_64", "Debian 13", EVERY),
    Wanted("6.12-rt", "x86_64", "Debian 13, real-time"),
    Wanted("6.18", "x86_64", "a long-term kernel", EVERY),
    Wanted("6.12", "aarch64", "Debian 13"),
)
"""Each has a row in the table for each of its compilers, whether or not it was run. Other kernels that were run
follow."""

HEAD = """\
# Kernels

<!-- Written by `python -m tests.vm.page` from tests/vm/results; not edited by hand. -->

What was run where, under emulation (QEMU without KVM), and what was seen. `scripts/test.sh vm [KERNEL...]` runs it: boots the
kernel, loads the programs, runs eight case files on the kernel engine, runs the demonstration, replaces an agent of an older
version by this one's, kills that and starts another. A kernel that was not run says so.

*Verified* is how many instructions the verifier walked in the program that took most, of a million it allows, and in all
programs together; *jited* is how many bytes of machine code all programs have.
"""

HEADER = (
    "kernel",
    "machine",
    "compiler",
    "loads",
    "verified",
    "jited",
    "cases",
    "demonstration",
    "upgrade",
    "kill",
    "date",
)
BORDER_HEADER = ("kernel", *(f"`test_{name}.py`" for name in BORDER), "commit", "date")
BORDER_WANTED = ("5.15", "6.1", "6.12")
"""Kernels on which the tests of the border must have been run."""
BORDER_HEAD = """
## Attacks at the border

Tests of `tests/netns` as each kernel ran them (`python -m tests.vm --steps border KERNEL`): attacks and their twins, and the second
barrier. CI runs all of them, and the others, on its own kernel.
"""

FEATURES: dict[str, str] = {
    "tcx": "no tcx: programs are attached by clsact",
    "test run names an interface": "BPF_PROG_TEST_RUN cannot name an interface: case files run as frames over a veth pair",
}
"""Features that a kernel may lack, and the consequence."""


def render(results: Collection[Result]) -> str:
    """The whole page."""
    by_kernel: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        by_kernel.setdefault((result.series, result.machine), []).append(result)
    rows, details, border = [], [], []
    wanted = {(one.series, one.machine): one for one in WANTED}
    others = sorted(by_kernel.keys() - wanted.keys(), key=lambda key: (key[1] != "x86_64", _numbers(key[0]), key[0]))
    for key in [*wanted, *others]:
        both = sorted(by_kernel.get(key, []), key=lambda result: result.compiler)
        border += [_border_row(result) for result in both if result.has_border]
        found = [result for result in both if set(result.steps) & {"load", "refusal"} or not result.has_border]
        rows += [_refused_row(result) if result.expected == REFUSED else _row(result) for result in found]
        tried = {compiler_label(result.compiler) for result in found} | ({"any"} if found else set())
        rows += [_not_run_row(key, one) for one in (wanted[key].compilers if key in wanted else ()) if one not in tried]
        details += [_detail(key, wanted[key].who if key in wanted else "", found)] if found else []
    ran = {result.series for result in results if result.has_border}
    border += [(series, *[NOT_RUN] * len(BORDER), "-", "-") for series in BORDER_WANTED if series not in ran]
    return (
        "\n".join([HEAD, *_table(HEADER, rows), BORDER_HEAD, *_table(BORDER_HEADER, border), *details]).rstrip() + "\n"
    )


def compiler_label(name: str) -> str:
    """The name of the compiler with its LLVM, if that is known."""
    return next((label for begin, label in COMPILERS.items() if name.startswith(begin)), name)


def _numbers(series: str) -> tuple[int, ...]:
    return tuple(int(part) for part in series.partition("-")[0].split("."))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    return [f"| {line} |" for line in lines]


def _row(result: Result) -> Sequence[str]:
    load = _kept(result, "load")
    programs = load["programs"].values() if load else ()
    verified = [one["verified"] for one in programs if one["verified"]]
    counts = f"{max(verified)} / {sum(verified)}" if verified else "not told" if load else "-"
    jited = str(sum(one["jited_bytes"] for one in programs)) if load else "-"
    return (
        result.series, result.machine, compiler_label(result.compiler), _outcome(result, "load", "yes"), counts, jited,
        _outcome(result, "cases", _cases), _outcome(result, "demo", _demo),
        _outcome(result, "succession", "connection kept"), _outcome(result, "succession", "enforcement goes on"), result.date,
    )  # fmt: skip


def _border_row(result: Result) -> Sequence[str]:
    cells = [_outcome(result, f"border {name}", _counts) for name in BORDER]
    return (f"{result.series} (`{result.release}`)", *cells, result.commit, result.date)


def _counts(kept: Any) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in kept.items())


def _refused_row(result: Result) -> Sequence[str]:
    said = _outcome(result, "refusal", "refused, exit code 5")
    return (result.series, result.machine, "any", said, *["-"] * 6, result.date)


def _not_run_row(key: tuple[str, str], compiler: str) -> Sequence[str]:
    return (*key, compiler, NOT_RUN, *["-"] * 6, "-")


def _kept(result: Result, step: str) -> Any:
    return result.steps.get(step, {}).get("result")


def _outcome(result: Result, step: str, good: Any) -> str:
    """The cell of a step: ``good`` (a text, or a function of the record), or that the step failed or was not run."""
    seen = result.steps.get(step)
    if seen is None:
        return NOT_RUN if not result.failure else "FAILED"
    if seen["code"] != 0:
        return "FAILED"
    return good if isinstance(good, str) else str(good(seen["result"]))


def _cases(kept: Any) -> str:
    return f"{kept['probes']} probes of {kept['files']} files"


def _demo(kept: Any) -> str:
    return f"{kept['attempts']} connections as predicted"


def _detail(key: tuple[str, str], who: str, found: Iterable[Result]) -> str:
    series, machine = key
    lines = ["", f"## {series}, {machine}{f': {who}' if who else ''}", ""]
    for result in found:
        made = "" if result.expected == REFUSED else f", {compiler_label(result.compiler)}"
        ran = ", ".join(
            f"{name} {one['seconds']:.0f} s"
            for name, one in result.steps.items()
            if name not in ("boot", "import", "system")
        )
        lines.append(f"- `{result.release}` ({result.source}){made}; commit {result.commit}, {result.date}; {ran}")
        refusal = _kept(result, "refusal")
        if refusal:
            lines.append(f"  - the agent says: `{refusal['agent']['line']}`")
        load = _kept(result, "load")
        if load:
            lacks = [name for name, has in load["features"].items() if not has]
            lines += [f"  - {FEATURES[name]}" for name in lacks if name in FEATURES]
            counts = ", ".join(f"`{name}` {one['verified'] or 'not told'}" for name, one in load["programs"].items())
            lines.append(f"  - verified: {counts}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. With ``--check``, only report whether it is fresh."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is stale")
    options = parser.parse_args(argv)
    try:
        text = render(read_results())
    except NetpolError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{Path(PAGE).relative_to(ROOT)} is stale: run python -m tests.vm.page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
