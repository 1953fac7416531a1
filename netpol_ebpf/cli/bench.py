# SPDX-License-Identifier: Apache-2.0
"""`netpolctl bench`: measure this machine, and say how it compares with other ways to enforce the same policies.

The benchmarks are in ``bench/`` of the source; an installed package does not have them, and says so.

Exit codes: 0 measured, 2 usage, 5 not root or something is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from netpol_ebpf.ending import ended_by_signals
from netpol_ebpf.errors import PlatformError, UsageError
from netpol_ebpf.terminal import say

CHECKOUT = Path(__file__).resolve().parents[2]


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure: packets, end to end, growth, control plane",
        description="Run the benchmarks of the source checkout, write the result as JSON and a report beside it. Traffic and "
        "rules stay in network namespaces made for it. Needs root.",
        epilog="exit codes: 0 measured, 2 usage, 5 not root or something is missing",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two or three minutes: shows that all parts work; figures are rough"
    )
    parser.add_argument(
        "--suites", default="", metavar="NAMES", help="of micro,guards,end-to-end,scale,control-plane; default all"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("result.json"), metavar="FILE",
        help="the result, as JSON; the report is in the directory of the same name (default: result.json, result/)",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="leave the report out")
    parser.add_argument("--peer", type=IPv4Address, metavar="ADDRESS", help="end to end: the other machine's address")
    parser.add_argument("--device", metavar="NAME", help="end to end: the unused network card towards it")
    parser.add_argument(
        "--address", type=IPv4Address, metavar="ADDRESS", help="end to end: a free address in its network"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    suite, report, site = (_module(name) for name in ("suite", "report", "site"))
    given = (arguments.peer, arguments.device, arguments.address)
    if any(given) and not all(given):
        raise UsageError("two machines need --peer, --device and --address")
    remote = site.Remote(*given) if all(given) else None
    chosen = [name.strip() for name in arguments.suites.split(",") if name.strip()]
    with ended_by_signals():
        result = suite.run_all(
            _command(arguments), arguments.output, smoke=arguments.smoke, chosen=chosen, remote=remote
        )
    say(f"{len(result.cases)} cases, {result.seconds:.0f} s: {arguments.output}")
    if not arguments.no_report:
        say(report.write(result, arguments.output.with_suffix("")))
    return 0


def _module(name: str) -> Any:
    """A module of ``bench/``, which is no part of the package. Raises PlatformError where it is missing."""
    if not (CHECKOUT / "bench" / f"{name}.py").exists() or importlib.util.find_spec("bench") is None:
        raise PlatformError(
            f"the benchmarks are not in {CHECKOUT}: they are part of the source, not of the installed package",
            hint="Run it from a checkout that was set up with scripts/setup.sh.",
        )
    return importlib.import_module(f"bench.{name}")


def _command(arguments: argparse.Namespace) -> list[str]:
    command = ["netpolctl", "bench"]
    if arguments.smoke:
        command.append("--smoke")
    for name in ("suites", "peer", "device", "address", "output"):
        if value := getattr(arguments, name):
            command += [f"--{name}", str(value)]
    return command
