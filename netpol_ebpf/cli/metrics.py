# SPDX-License-Identifier: Apache-2.0
"""`netpolctl metrics`: print the agent's metrics in Prometheus' text format, or as plain values.

The text is for the textfile collector of the node exporter. `netpol-agent --health-address` serves the same metrics
over HTTP. This module computes nothing; `netpol_ebpf.agent.metrics` does.

Exit codes: 0 printed, 4 no agent answers, 5 the package that renders the text is missing.
"""

from __future__ import annotations

import argparse
from typing import Any

from netpol_ebpf.agent.metrics import Family, render, require_metrics_package
from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent
from netpol_ebpf.cli.output import print_value


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "metrics",
        help="print the agent's metrics for Prometheus",
        description="Print the metrics of the agent of this node in Prometheus' text format, for the textfile collector "
        "of the node exporter. The text needs the extra [metrics].",
        epilog="exit codes: 0 done, 4 no agent answers, 5 a package is missing",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "json", "yaml"),
        default="text",
        help="output format; text: Prometheus' text format (default: text)",
    )
    add_agent_options(parser, "--state-dir")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if arguments.output == "text":
        require_metrics_package()
    (found,) = ask_agent(arguments, "metrics")
    if not print_value(arguments.output, found):
        print(render(Family.from_dict(one) for one in found).decode(), end="")
    return 0
