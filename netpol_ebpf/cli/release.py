# SPDX-License-Identifier: Apache-2.0
"""`netpolctl release`: remove the objects that stay in force although the definition of their kind was deleted.

Exit codes: 0 they are no longer in force on this node, 1 the change was rejected, 3 no object of the kind is kept, 4
the agent does not answer.
"""

from __future__ import annotations

import argparse
from typing import Any

from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.terminal import escaped, paragraph, say

EXIT_REJECTED = 1


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "release",
        help="end the policies of a kind whose definition (CRD) was deleted",
        description="End, on this node, all objects of a kind that stay in force because the kind's CustomResourceDefinition was "
        "deleted. What only these policies denied is allowed from then on.",
        epilog="exit codes: 0 they are no longer in force on this node, 1 the change was rejected, 3 nothing of the kind is kept, "
        "4 no agent answers",
    )
    parser.add_argument(
        "kind", metavar="KIND", help="as `netpolctl status` names it, such as globalnetworkpolicies.projectcalico.org"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the objects that would end, and end none")
    add_agent_options(parser, "--state-dir")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    # No time limit: the answer comes when the change is in force.
    (answer,) = ask_agent(arguments, "release", timeout_s=None, kind=arguments.kind, dry_run=arguments.dry_run)
    if not print_value(arguments.output, answer):
        names = answer["released"]
        what = "would end" if arguments.dry_run else "released"
        say(escaped(f"{what}: {len(names)} objects of {arguments.kind} on this node"))
        for name in names:
            say(escaped(f"  {name}"))
        if answer["rejected"] is not None:
            say(paragraph(f"the change was REJECTED, what was in force stays in force: {answer['rejected']}"))
    return 0 if answer["rejected"] is None else EXIT_REJECTED
