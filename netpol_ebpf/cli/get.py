# SPDX-License-Identifier: Apache-2.0
"""`netpolctl get`: list endpoints, rules with their counters, learned domain names, identities, connections or maps of the agent.

Exit codes: 0 listed, 4 no agent answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent
from netpol_ebpf.cli.flows import PROTOCOLS, render_end
from netpol_ebpf.cli.output import add_output_option, print_value, render_table
from netpol_ebpf.terminal import say

MEMBERS_SHOWN = 4


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "get",
        help="list endpoints, rules, learned domain names, identities, connections or maps of this node",
        description="List endpoints, rules with their counters, learned domain names (dns), identities, connections or maps of the agent of this node.",
        epilog="exit codes: 0 done, 4 no agent answers",
    )
    parser.add_argument("what", choices=tuple(_LISTS), help="what to list")
    add_agent_options(parser, "--state-dir")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    operation, pick, header, cells = _LISTS[arguments.what]
    (answer,) = ask_agent(arguments, operation)
    found = pick(answer)
    if not print_value(arguments.output, found):
        say(render_table(header, [cells(one, arguments.output == "wide") for one in found]))
    more = answer.get("more") if isinstance(answer, dict) else 0
    if more:
        say(f"and {more} more", file=sys.stderr)
    return 0


def _members(identity: dict[str, Any], wide: bool) -> str:  # noqa: FBT001 - private
    members = identity["members"]
    shown = members if wide else members[:MEMBERS_SHOWN]
    return " ".join(shown) + (f" and {len(members) - len(shown)} more" if len(shown) < len(members) else "")


def _flow(one: dict[str, Any]) -> str:
    protocol = PROTOCOLS.get(one["protocol"], str(one["protocol"]))
    return f"{protocol} {render_end(one, 'source')} -> {render_end(one, 'destination')}"


def _state(one: dict[str, Any]) -> str:
    return f"{one['state']}, no reply yet" if one["form"] == "unreplied" else str(one["state"])


_Cells = Callable[[dict[str, Any], bool], tuple[object, ...]]
_LISTS: dict[str, tuple[str, Callable[[Any], list[dict[str, Any]]], tuple[str, ...], _Cells]] = {
    "endpoints": (
        "status", lambda state: list(state["endpoints"]), ("number", "endpoint", "interface", "state", "addresses"),
        lambda one, _: (one["number"], one["endpoint"], one["interface"] or "-", one["state"], " ".join(one["addresses"])),
    ),
    "rules": (
        "rules", list, ("number", "packets", "bytes", "staged", "rule"),
        lambda one, _: (one["number"], one["packets"], one["bytes"], one["staged_packets"], one["rule"]),
    ),
    "dns": (
        "dns", list, ("endpoint", "name", "address", "expires", "patterns"),
        lambda one, _: (
            one["endpoint"], one["name"], one["address"], f"{one['expires_s']} s", " ".join(one["patterns"]) or "-",
        ),
    ),
    "identities": (
        "identities", list, ("number", "members"), lambda one, wide: (one["number"], _members(one, wide)),
    ),
    "connections": (
        "connections", lambda answer: list(answer["connections"]), ("endpoint", "direction", "flow", "state", "rule"),
        lambda one, _: (one["endpoint"], one["direction"], _flow(one), _state(one), one["rule"] or "-"),
    ),
    "maps": (
        "status", lambda state: [{"map": name, **sizes} for name, sizes in state["maps"].items()],
        ("map", "entries", "size"), lambda one, _: (one["map"], one["entries"], one["size"]),
    ),
}  # fmt: skip
