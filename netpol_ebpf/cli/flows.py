# SPDX-License-Identifier: Apache-2.0
"""`netpolctl flows`: print flows that policy denied or logged, and flows that staged policy would deny.

Each flow is printed with the rule that decided. Exit codes: 0 printed, 4 no agent answers.
"""

from __future__ import annotations

import argparse
from typing import Any

from netpol_ebpf.agent.control_socket import CLIENT_TIMEOUT_S
from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent
from netpol_ebpf.cli.output import render_json
from netpol_ebpf.policy.types import ICMP, ICMPV6, SCTP, TCP, UDP
from netpol_ebpf.terminal import escaped, say

DOMAINS_SHOWN = 3
PROTOCOLS = {ICMP: "ICMP", TCP: "TCP", UDP: "UDP", ICMPV6: "ICMPv6", SCTP: "SCTP"}


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "flows",
        help="show denied flows, each with the rule that denied it",
        description="Show the recent flows that policy on this node denied or logged, each with the rule that decided.",
        epilog="exit codes: 0 done, 4 no agent answers",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="print new flows as they happen, until interrupted")
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "json"),
        default="text",
        help="output format; json: one object per line (default: text)",
    )
    add_agent_options(parser, "--state-dir")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    for flow in ask_agent(
        arguments, "flows", timeout_s=None if arguments.follow else CLIENT_TIMEOUT_S, follow=arguments.follow
    ):
        say(render_json(flow) if arguments.output == "json" else escaped(render_flow(flow)), flush=True)
    return 0


def render_flow(flow: dict[str, Any]) -> str:
    """Render a flow as one line."""
    what = f"{flow['kind']:<5} {flow['direction']:<7} "
    if "source" in flow:
        protocol = PROTOCOLS.get(flow["protocol"], str(flow["protocol"]))
        what += f"{protocol} {render_end(flow, 'source')} -> {render_end(flow, 'destination')}"
        if "icmp_type" in flow:
            what += f" type {flow['icmp_type']} code {flow['icmp_code']}"
    else:
        what += f"{flow['frame_bytes']} bytes at {flow['endpoint'] or flow['ifindex']}"
    decided = flow["decided_by"]
    if decided is None:
        return f"{what}  {flow['reason']}"
    place = f" ({decided['file']}:{decided['line']})" if decided["file"] else ""
    return f"{what}  {decided['sentence']}{place}"


def render_end(flow: dict[str, Any], side: str) -> str:
    """Render one end of a flow: its name or the domain names that the endpoint learned for it, its address and port.

    ``side``: "source" or "destination".
    """
    name, address, port = flow.get(f"{side}_name"), flow[side], flow.get(f"{side}_port")
    text = (
        f"[{address}]:{port}"
        if port is not None and ":" in address
        else address + (f":{port}" if port is not None else "")
    )
    domains = flow.get(f"{side}_domains") or ()
    if name is None and domains:
        return f"{', '.join(domains[:DOMAINS_SHOWN])}{', ...' if domains[DOMAINS_SHOWN:] else ''} {text}"
    return text if name is None else f"{name.removeprefix('Pod/')} {text}"
