# SPDX-License-Identifier: Apache-2.0
"""`netpolctl test`: run case files, and print the probes with an unexpected verdict.

Exit codes: 0 every probe had the expected verdict; 1 some probes had not; 3 some input is invalid, whatever the other
probes' verdicts; 5 the engine `kernel` cannot run here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from netpol_ebpf.cases.case import load_cases
from netpol_ebpf.cases.engines import ENGINES
from netpol_ebpf.cases.runner import CaseResults, run_cases
from netpol_ebpf.cli.output import print_value
from netpol_ebpf.terminal import escaped, say

EXIT_FAILED = 1
EXIT_INVALID = 3


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "test",
        help="run case files: unit tests for policies",
        description="Run case files. A case has manifests, probes, and the expected verdict of each probe.",
        epilog="exit codes: 0 all probes as expected, 1 some probes failed, 3 some input is not valid, 5 the engine kernel cannot run here",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a case file, or a directory of them")
    parser.add_argument(
        "--engine",
        choices=(*ENGINES, "all"),
        default="model",
        help="engine that evaluates the probes: the reference model (default), the compiled tables, the program in the kernel "
        "(needs root), or all three, which must agree in verdict and rule",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "wide", "json", "yaml"),
        default="text",
        help="output format; wide: every probe, not only failures (default: text)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    loaded = load_cases(arguments.paths)
    report = run_cases(loaded, arguments.engine)
    if not print_value(arguments.output, report.as_dict()):
        _print_text(report, wide=arguments.output == "wide")
    for file in loaded.skipped:
        say(f"note: {file}: skipped, since it has neither manifests nor probes", file=sys.stderr)
    if not report.cases and not report.invalid:
        say("error: no case found in the paths given", file=sys.stderr)
        return EXIT_INVALID
    return EXIT_INVALID if report.invalid else EXIT_FAILED if report.failed else 0


def _print_text(report: CaseResults, *, wide: bool) -> None:
    if wide:
        for judged in report.judged:
            say(escaped(f"{judged.got:<6} {_render_probe(judged.probe)}  [{judged.case}]  {judged.rule}"))
    for failure in report.failed:
        say(escaped(f"FAILED {failure.case}"))
        say(escaped(f"  {failure.location}: {_render_probe(failure.probe)}"))
        say(f"  expected {failure.expected}, got {failure.got}")
        say(escaped(f"  rule: {failure.rule}"))
    for invalid in report.invalid:
        say(escaped(f"INVALID {invalid.case}"))
        for line in invalid.error.splitlines():
            say(f"  {line}")
    say(
        f"{report.cases} cases, {report.probes} probes: {report.probes - len(report.failed)} as expected, "
        f"{len(report.failed)} failed; {len(report.invalid)} cases not valid"
    )


def _render_probe(probe: Any) -> str:
    """Render a probe as one line: its two ends, protocol and port, then its other fields as JSON."""
    text = f"{probe['from']} -> {probe['to']} {probe['protocol']}"
    if "port" in probe:
        text += f" {probe['port']}"
    extras = {key: value for key, value in probe.items() if key not in ("from", "to", "protocol", "port", "expect")}
    return text + (f" {json.dumps(extras)}" if extras else "")
