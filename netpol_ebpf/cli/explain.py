# SPDX-License-Identifier: Apache-2.0
"""`netpolctl explain`: print whether a connection is allowed, and which rule decides at each endpoint.

The agent of this node evaluates the policies in force. With ``--manifests`` the command itself evaluates the policies
in these files; it then needs neither agent nor root nor kernel.

Exit codes: 0 allowed; 1 denied; 3 manifests are invalid, a name is unknown, or the objects determine no verdict; 4 the
agent does not answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.answering import SEND_S, WORK_S
from netpol_ebpf.analysis.explanation import ENGINES, Ways, as_request, explain, names_of
from netpol_ebpf.analysis.explanation import parse_destination as read_destination
from netpol_ebpf.analysis.explanation import parse_end as read_end
from netpol_ebpf.cases.answers import DomainName
from netpol_ebpf.cases.case import Probe
from netpol_ebpf.cases.engines import open_engine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent, manifests_dir
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.errors import Location, UsageError
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import ICMP, ICMPV6, PORT_PROTOCOLS, SCTP, TCP, UDP, UDPLITE, IPAddress
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.workloads import as_cluster, stand_in_notes
from netpol_ebpf.terminal import escaped, paragraph, say

EXIT_DENIED = 1
PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": ICMP, "icmpv6": ICMPV6, "udplite": UDPLITE}
FROM_FILES = (
    "note: this answer is for the files named and an agent without options; without --manifests the agent of this node answers for "
    "what is in force"
)

TRANSLATED = (
    "note: this answer assumes that the node translates the service's address, and that no process of the node has bound it; the "
    "agent of the node knows which addresses are bound"
)


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="say whether a connection is allowed, and by which rule",
        description="Say whether a new connection is allowed, and which rule of which policy decides at each endpoint. The agent of "
        "this node answers for what is in force. The address of a service, a node port or a host port stands for its backends: "
        "each backend has its own answer. A domain name stands for the addresses that the sender has learned for it; if none is known, "
        "the answer says what the rules for that name allow.",
        epilog="exit codes: 0 allowed, 1 denied, 3 invalid input or no answer, 4 no manifests given and no agent answers",
    )
    end = "an address, or NAMESPACE/NAME of a pod, a Deployment or another workload"
    parser.add_argument("--from", dest="source", required=True, type=parse_end, metavar="WHO", help=end)
    parser.add_argument(
        "--to",
        dest="destination",
        required=True,
        type=parse_destination,
        metavar="WHO",
        help=f"{end}; or a domain name such as api.example.com",
    )
    parser.add_argument(
        "--protocol",
        type=parse_protocol,
        default=TCP,
        metavar="NAME",
        help="tcp (default), udp, sctp, icmp, icmpv6, udplite, or a number",
    )
    parser.add_argument("--port", type=parse_port, help="destination port; required for tcp, udp and sctp")
    parser.add_argument("--source-port", type=parse_port, help="source port; few policies have rules for it")
    parser.add_argument("--icmp-type", type=parse_octet, metavar="NUMBER", help="ICMP type (default: echo request)")
    parser.add_argument("--icmp-code", type=parse_octet, metavar="NUMBER", help="ICMP code (default: 0)")
    parser.add_argument(
        "--manifests", action="append", nargs="?", type=Path, metavar="PATH",
        help="evaluate this file or directory of manifests instead of asking the agent (may be repeated); without PATH: the agent's "
        "manifests",
    )  # fmt: skip
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="engine that evaluates: the reference model, or the compiled tables",
    )
    add_agent_options(parser, "--state-dir")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if (arguments.protocol in PORT_PROTOCOLS) != (arguments.port is not None):
        raise UsageError("--port: tcp, udp and sctp need it, other protocols have no ports")
    probe = Probe(
        source=arguments.source, destination=arguments.destination, protocol=arguments.protocol, expect_allow=True,
        port=arguments.port, source_port=arguments.source_port, icmp_type=arguments.icmp_type,
        icmp_code=arguments.icmp_code, location=Location("netpolctl explain"),
    )  # fmt: skip
    if arguments.manifests:
        paths = [one or manifests_dir(arguments.config) for one in arguments.manifests]
        ways = _by_files(paths, probe, arguments.engine)
        say(FROM_FILES, file=sys.stderr)
        if any(one["backend"] is not None for one in ways):
            say(TRANSLATED, file=sys.stderr)
    else:
        request = {**as_request(probe), "engine": arguments.engine}
        (answer,) = ask_agent(arguments, "explain", timeout_s=WORK_S + SEND_S, **request)
        ways = answer["ways"]
    if not print_value(arguments.output, ways):
        say("\n\n".join(render(one) for one in ways))
    return 0 if all(one["allowed"] for one in ways) else EXIT_DENIED


def _by_files(paths: list[Path], probe: Probe, engine: str) -> Ways:
    resources = as_cluster(load_paths(paths).check(), addressed=True)
    ends = [end for end in (probe.source, probe.destination) if not isinstance(end, DomainName)]
    for note in stand_in_notes(resources, ends):
        say(paragraph(escaped(f"note: {note}")), file=sys.stderr)
    world = derive(resources)
    with open_engine(engine) as judge:
        judge.load(world, names_of(probe))
        return explain(Cast(resources, world), world, probe, judge)


def render(one: dict[str, Any]) -> str:
    """Render one path of the connection as text. ``one``: a result of `netpol_ebpf.analysis.explanation.describe`."""
    names = {number: name.upper() for name, number in PROTOCOLS.items()}
    port = "" if one["port"] is None else f" port {one['port']}"
    destination = one["destination"]
    if one.get("name") is not None and one["address_known"]:
        destination = f"{one['name']} ({destination})"
    what = f"{one['source']} -> {destination} {names.get(one['protocol'], one['protocol'])}{port}"
    if one["backend"] is not None:
        what += f", through {', '.join(one['service'])} to {_end(one['backend'])}"
    lines = [escaped(f"{'ALLOWED' if one['allowed'] else 'DENIED'}  {what}")]
    for number, step in enumerate(one["steps"], 1):
        if step["endpoint"] is None:
            lines.append(f"  {number}. {step['verdict']}: {escaped(step['sentence'])}")
            continue
        stage = "" if step["stage"] == "normal" else f", {step['stage']}"
        about = {"address": step["destination"], "port": step["port"]}
        asked = "" if one["backend"] in (None, about) else f", evaluated for {_end(about)}"
        lines.append(f"  {number}. {step['direction']} of {escaped(step['endpoint'])}{stage}: {step['verdict']}{asked}")
        lines += [f"       {escaped(log['sentence'])}{_place(log)}" for log in step["logs"]]
        lines.append(f"       {escaped(step['sentence'])}{_place(step)}")
        if step["staged_verdict"] != step["verdict"]:
            lines.append(f"       staged: {escaped(step['staged']['sentence'])}{_place(step['staged'])}")
    lines += _named_rules(one)
    if one["note"] is not None:
        lines.append(f"  {escaped(one['note'])}")
    if one["staged_allowed"] != one["allowed"]:
        lines.append(f"  With staged policies enforced: {'allowed' if one['staged_allowed'] else 'denied'}")
    return "\n".join(lines)


def _named_rules(one: dict[str, Any]) -> Iterator[str]:
    """The lines about the rules whose names match the destination; none if the destination is no name."""
    if one.get("name") is None:  # an older agent has no such field
        return
    if not one["named_rules"]:
        yield f"  No rule with names for the sender matches {escaped(one['name'])}."
    for rule in one["named_rules"]:
        sets = f" of the network set {' and '.join(rule['sets'])}" if rule["sets"] else ""
        staged = ", staged" if rule["staged"] else ""
        yield escaped(
            f"  {one['name']} matches {' and '.join(rule['patterns'])}{sets}: egress rule {rule['rule']} of {rule['policy']}{staged}"
        ) + _place(rule)


def _end(end: dict[str, Any]) -> str:
    return str(end["address"]) if end["port"] is None else f"{end['address']} port {end['port']}"


def _place(step: dict[str, Any]) -> str:
    return "" if step["file"] is None else f"\n         {escaped(step['file'])}:{step['line']}"


def parse_end(text: str) -> IPAddress | tuple[str, str]:
    """Parse an IP address, or the namespace/name of a workload as (namespace, name). Raises ArgumentTypeError."""
    end: IPAddress | tuple[str, str] = _parse(read_end, text, "neither NAMESPACE/NAME nor an address")
    return end


def parse_destination(text: str) -> IPAddress | tuple[str, str] | DomainName:
    """Parse what `parse_end` parses, or a domain name. Raises ArgumentTypeError."""
    end: IPAddress | tuple[str, str] | DomainName
    end = _parse(read_destination, text, "neither NAMESPACE/NAME nor an address nor a domain name")
    return end


def parse_protocol(text: str) -> int:
    """Parse the name or the number of a protocol; returns its number. Raises ArgumentTypeError."""
    if text.lower() in PROTOCOLS:
        return PROTOCOLS[text.lower()]
    number: int = _parse(int, text, f"neither a number nor one of {', '.join(PROTOCOLS)}")
    return _within(number, 0, 255)


def parse_port(text: str) -> int:
    """Parse a port number from 1 to 65535. Raises ArgumentTypeError."""
    number: int = _parse(int, text, "not a port number")
    return _within(number, 1, 65535)


def parse_octet(text: str) -> int:
    """Parse a number from 0 to 255. Raises ArgumentTypeError."""
    number: int = _parse(int, text, "not a number")
    return _within(number, 0, 255)


def _parse(read: Callable[[str], Any], text: str, complaint: str) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {complaint}") from error


def _within(number: int, least: int, most: int) -> int:
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{number}: must be {least} to {most}")
    return number
