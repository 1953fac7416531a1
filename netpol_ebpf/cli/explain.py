# SPDX-License-Identifier: Apache-2.0
"""`netpolctl explain`: whether one connection is allowed, and by which rule of which policy at each endpoint it meets.

Works on manifests alone (those of the agent when none are given): no root, no kernel.  Exit codes: 0 allowed, 1 denied,
3 invalid manifests or unknown names, 4 no manifests are given and no agent answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from netpol_ebpf.cases.case import Probe
from netpol_ebpf.cases.engines import Engine, ModelEngine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.cli.agent_access import add_state_dir_option, ask_agent
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.errors import Location, UsageError
from netpol_ebpf.policy.journey import Finding, Journey, Reason, walk
from netpol_ebpf.policy.provenance import trace
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import ICMP, ICMPV6, PORT_PROTOCOLS, SCTP, TCP, UDP, UDPLITE, Cause, IPAddress, World
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.workloads import as_cluster, stand_in_notes
from netpol_ebpf.terminal import escaped, paragraph, say

EXIT_DENIED = 1
PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": ICMP, "icmpv6": ICMPV6, "udplite": UDPLITE}


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="say whether a connection is allowed, and by which rule",
        description="Say whether a new connection is allowed, and which rule of which policy decides at each endpoint.",
        epilog="exit codes: 0 allowed, 1 denied, 3 invalid input, 4 no manifests given and no agent answers",
    )
    end = "NAMESPACE/NAME of a pod (or of a Deployment or another workload), or an address"
    parser.add_argument("--from", dest="source", required=True, type=parse_end, metavar="WHO", help=end)
    parser.add_argument("--to", dest="destination", required=True, type=parse_end, metavar="WHO", help=end)
    parser.add_argument(
        "--protocol",
        type=parse_protocol,
        default=TCP,
        metavar="NAME",
        help="tcp (default), udp, sctp, icmp, icmpv6, a number",
    )
    parser.add_argument("--port", type=parse_port, help="destination port, of tcp, udp and sctp")
    parser.add_argument("--source-port", type=parse_port, help="source port; rarely matters")
    parser.add_argument("--icmp-type", type=int, help="default: echo request")
    parser.add_argument("--icmp-code", type=int, help="default: 0")
    parser.add_argument(
        "--manifests", action="append", type=Path, metavar="PATH",
        help="files and directories of manifests (may be repeated); default: those of the agent of this node",
    )  # fmt: skip
    parser.add_argument(
        "--engine",
        choices=("model", "tables"),
        default="model",
        help="what judges: the reference model, or the compiled tables",
    )
    add_state_dir_option(parser)
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if (arguments.protocol in PORT_PROTOCOLS) != (arguments.port is not None):
        raise UsageError("--port is needed for tcp, udp and sctp, and only for those")
    loaded = load_paths(arguments.manifests or [_manifests_of_agent(arguments)]).check()
    resources = as_cluster(loaded, addressed=True)
    for note in stand_in_notes(resources, (arguments.source, arguments.destination)):
        say(paragraph(escaped(f"note: {note}")), file=sys.stderr)
    world = derive(resources)
    engine = _engine(arguments.engine)
    engine.load(world)
    probe = Probe(
        source=arguments.source, destination=arguments.destination, protocol=arguments.protocol, expect_allow=True,
        port=arguments.port, source_port=arguments.source_port, icmp_type=arguments.icmp_type,
        icmp_code=arguments.icmp_code, location=Location("netpolctl explain"),
    )  # fmt: skip
    found = [(journey, walk(journey, engine.decide)) for journey in Cast(resources, world).journeys(probe)]
    plain = [describe(world, journey, finding) for journey, finding in found]
    if not print_value(arguments.output, plain):
        say("\n\n".join(render(one) for one in plain))
    return 0 if all(finding.allowed for _, finding in found) else EXIT_DENIED


def describe(world: World, journey: Journey, finding: Finding) -> dict[str, Any]:
    """One way through the cluster as plain values. ``steps``: each endpoint's say, in the order the packet meets them."""
    packet = journey.flow.packet
    steps: list[dict[str, Any]] = []
    for hop in journey.hops:
        if hop.reason is not None:
            steps.append(_reason_step(hop.reason))
            continue
        for question, verdict in finding.answers:
            if question in hop.questions or question in hop.reply:
                steps.append({
                    "endpoint": str(question.endpoint),
                    "direction": question.direction.value,
                    "stage": question.stage.value,
                    "verdict": verdict.outcome.value,
                    **trace(world, verdict.cause).as_dict(),
                    "logs": [trace(world, cause).as_dict() for cause in verdict.logs],
                    "staged_verdict": verdict.staged_outcome.value,
                    "staged": trace(world, verdict.staged_cause).as_dict(),
                })  # fmt: skip
    decided = finding.cause
    return {
        "source": str(packet.source),
        "destination": str(packet.destination),
        "protocol": packet.protocol,
        "port": packet.destination_port if packet.protocol in PORT_PROTOCOLS else None,
        "allowed": finding.allowed,
        "staged_allowed": finding.staged_allowed,
        "decided_by": trace(world, decided).as_dict() if isinstance(decided, Cause) else _reason_step(decided),
        "steps": steps,
    }


def _reason_step(reason: Reason) -> dict[str, Any]:
    return {
        "endpoint": None, "direction": None, "stage": None, "verdict": "allow" if reason.allows else "deny",
        "kind": "no policy", "sentence": reason.value, "file": None, "line": None, "tier": None, "policy": None,
        "rule": None, "logs": [],
    }  # fmt: skip


def render(one: dict[str, Any]) -> str:
    """The same for people."""
    names = {number: name.upper() for name, number in PROTOCOLS.items()}
    port = "" if one["port"] is None else f" port {one['port']}"
    what = f"{one['source']} -> {one['destination']} {names.get(one['protocol'], one['protocol'])}{port}"
    lines = [f"{'ALLOWED' if one['allowed'] else 'DENIED'}  {what}"]
    for number, step in enumerate(one["steps"], 1):
        if step["endpoint"] is None:
            lines.append(f"  {number}. {step['verdict']}: {escaped(step['sentence'])}")
            continue
        stage = "" if step["stage"] == "normal" else f", {step['stage']}"
        lines.append(f"  {number}. {step['direction']} of {escaped(step['endpoint'])}{stage}: {step['verdict']}")
        lines += [f"       {escaped(log['sentence'])}{_place(log)}" for log in step["logs"]]
        lines.append(f"       {escaped(step['sentence'])}{_place(step)}")
        if step["staged_verdict"] != step["verdict"]:
            lines.append(f"       staged: {escaped(step['staged']['sentence'])}{_place(step['staged'])}")
    if one["staged_allowed"] != one["allowed"]:
        lines.append(f"  With staged policies in force: {'allowed' if one['staged_allowed'] else 'denied'}")
    return "\n".join(lines)


def _place(step: dict[str, Any]) -> str:
    return "" if step["file"] is None else f"\n         {escaped(step['file'])}:{step['line']}"


def _engine(name: str) -> Engine:
    if name == "model":
        return ModelEngine()
    from netpol_ebpf.cases.tables import TablesEngine

    return TablesEngine()


def _manifests_of_agent(arguments: argparse.Namespace) -> Path:
    (state,) = ask_agent(arguments, "status")
    return Path(state["manifests"])


def parse_end(text: str) -> IPAddress | tuple[str, str]:
    """An address, or (namespace, name). Raises ArgumentTypeError."""
    namespace, slash, name = text.partition("/")
    if slash and namespace and name and "/" not in name:
        return namespace, name
    address: IPAddress = _parse(ip_address, text, "neither NAMESPACE/POD nor an address")
    return address


def parse_protocol(text: str) -> int:
    """A protocol's number by name or number. Raises ArgumentTypeError."""
    if text.lower() in PROTOCOLS:
        return PROTOCOLS[text.lower()]
    number: int = _parse(int, text, f"neither a number nor one of {', '.join(PROTOCOLS)}")
    return _within(number, 0, 255)


def parse_port(text: str) -> int:
    """A port. Raises ArgumentTypeError."""
    number: int = _parse(int, text, "not a port number")
    return _within(number, 1, 65535)


def _parse(read: Callable[[str], Any], text: str, complaint: str) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {complaint}") from error


def _within(number: int, least: int, most: int) -> int:
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{number}: must be {least} to {most}")
    return number
