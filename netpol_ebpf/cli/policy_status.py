# SPDX-License-Identifier: Apache-2.0
"""The standing of policies, for `netpolctl status --policy` and `netpolctl wait`.

It comes from an API server, or from this node's agent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from netpol_ebpf.cli.agent_access import ask_agent
from netpol_ebpf.cli.api_access import open_api
from netpol_ebpf.cli.output import render_table
from netpol_ebpf.errors import UsageError
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.status.kinds import parse_policy
from netpol_ebpf.status.lookup import look_up
from netpol_ebpf.status.standing import IN_FORCE
from netpol_ebpf.terminal import escaped, paragraph, say

POLICY_HELP = "NAMESPACE/NAME of a NetworkPolicy of Kubernetes, KIND/NAMESPACE/NAME, or KIND/NAME"


def policy(text: str) -> PolicyKey:
    """Parse the name of a policy with `parse_policy`, for argparse. Raises ArgumentTypeError."""
    try:
        return parse_policy(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def add_local_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--local``."""
    parser.add_argument(
        "--local", action="store_true",
        help="ask the agent of this node about this node, instead of an API server about all nodes",
    )  # fmt: skip


def reader_of(arguments: argparse.Namespace) -> Callable[[PolicyKey], dict[str, Any]]:
    """A function that returns the standing of a policy, in the form of `Standing.as_dict`."""
    if arguments.local:

        def ask_here(key: PolicyKey) -> dict[str, Any]:
            (found,) = ask_agent(arguments, "policy", key=list(key))
            return dict(found)

        return ask_here
    client = open_api(arguments)
    return lambda key: look_up(client, key).as_dict()


def print_standings(standings: Iterable[dict[str, Any]], *, wide: bool) -> None:
    """Print each policy and the nodes on which it is not in force; with ``wide``, all nodes that need it."""
    for one in standings:
        word = "in force" if one["programmed"] else "NOT in force"
        say(paragraph(f"{one['policy']}: {word}: {one['message']}"))
        rows = [
            (node["node"], node["reason"], node["generation"] or "-", escaped(node["message"]) or "-")
            for node in one["nodes"]
            if wide or node["reason"] != IN_FORCE
        ]
        if rows:
            say(render_table(("node", "reason", "generation", "message"), rows))
