# SPDX-License-Identifier: Apache-2.0
"""`netpolctl bench`: measure enforcement on this machine, compared with nftables and iptables for the same policies.

The benchmarks are in ``bench/`` of the source. An installed package does not contain them; the command then fails.

Exit codes: 0 measured, 2 wrong usage, 5 not root or something is missing.
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
        help="measure single packets, end to end, growth and the control plane",
        description="Run the benchmarks of the source checkout. Writes the result as JSON, and a report beside it. Traffic and "
        "rules stay in network namespaces that the run makes. Needs root.",
        epilog="exit codes: 0 measured, 2 usage, 5 not root or something is missing",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="run for two or three minutes only: every part works, the figures are rough",
    )
    parser.add_argument(
        "--suites",
        default="",
        metavar="NAMES",
        help="suites to run, of micro,guards,end-to-end,scale,names,control-plane (default: all)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("result.json"), metavar="FILE",
        help="file for the result, as JSON; the report goes to the directory of the same name (default: result.json, result/)",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="write no report")
    parser.add_argument("--peer", type=IPv4Address, metavar="ADDRESS", help="end to end: address of the other machine")
    parser.add_argument(
        "--device", metavar="NAME", help="end to end: unused network card that leads to the other machine"
    )
    parser.add_argument(
        "--address", type=IPv4Address, metavar="ADDRESS", help="end to end: a free address in the network of --device"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    suite, report, site = (_module(name) for name in ("suite", "report", "site"))
    given = (arguments.peer, arguments.device, arguments.address)
    if any(given) and not all(given):
        raise UsageError("a run between two machines needs all of --peer, --device and --address")
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
    """Import a module of ``bench/``, which is only in a source checkout. Raises PlatformError if it is missing."""
    if not (CHECKOUT / "bench" / f"{name}.py").exists() or importlib.util.find_spec("bench") is None:
        raise PlatformError(
            f"no benchmarks in {CHECKOUT}: the source has them, the installed package does not",
            hint="Run the command from a checkout that scripts/setup.sh has set up.",
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
