# SPDX-License-Identifier: Apache-2.0
"""`netpolctl wait`: wait until policies are in force on every node that needs them.

Exit codes: 0 they are in force, 1 they are not in force in time, 2 wrong usage, 3 a policy does not exist, 4 no API
server or agent answers, 5 a right is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from netpol_ebpf.cli.agent_access import add_agent_options
from netpol_ebpf.cli.api_access import add_api_options
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.cli.policy_status import POLICY_HELP, add_local_option, policy, print_standings, reader_of
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.terminal import say

EXIT_NOT_IN_TIME = 1
SHORTEST_PAUSE_S = 0.5
WORK_SHARE = 4
"""Factor of the pause between two queries: the pause lasts at least this many times as long as a query. So the load is
small even if one query makes the server of a large cluster read many objects."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "wait",
        help="wait until policies are in force on every node that needs them",
        description="Wait until the newest generation of each policy is in force on every node that needs it: every node with a pod "
        "or host endpoint that the policy selects.",
        epilog="exit codes: 0 all are in force, 1 not in time, 3 no such policy or no usable kubeconfig, 4 no API server or agent answers, 5 no right",
    )
    parser.add_argument("--for", dest="condition", choices=("programmed",), required=True, help="what to wait for")
    parser.add_argument(
        "--timeout",
        type=parse_seconds,
        default=30.0,
        metavar="TIME",
        help="how long to wait, such as 90s or 5m; 0: look once (default: 30s)",
    )
    parser.add_argument(
        "policies", nargs="+", type=policy, metavar="POLICY", help=POLICY_HELP,
    )  # fmt: skip
    add_local_option(parser)
    add_api_options(parser)
    add_agent_options(parser, "--state-dir")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    found = wait(reader_of(arguments), arguments.policies, arguments.timeout)
    if not print_value(arguments.output, found):
        print_standings(found, wide=arguments.output == "wide")
    missing = [one["policy"] for one in found if not one["programmed"]]
    if missing and arguments.output == "text":
        say(f"not in force in {arguments.timeout:g} s: {', '.join(missing)}")
    return EXIT_NOT_IN_TIME if missing else 0


def wait(
    look: Callable[[PolicyKey], dict[str, Any]],
    policies: Sequence[PolicyKey],
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """Wait until all policies are in force or the time is over. Returns the standing of each policy.

    Raises the errors of the function ``look``. After an UnreachableError ``look`` is called again; the error is raised
    only if the last call raised it.
    """
    until_s = clock() + timeout_s
    found: dict[PolicyKey, dict[str, Any]] = {}
    while True:
        began_s = clock()
        failure = None
        for key in policies:
            if key in found and found[key]["programmed"]:
                continue
            try:
                found[key] = look(key)
            except UnreachableError as error:  # it may answer again in time
                failure = error
        is_done = failure is None and all(one["programmed"] for one in found.values())
        pause_s = max(SHORTEST_PAUSE_S, WORK_SHARE * (clock() - began_s))
        left_s = until_s - clock()
        if is_done or left_s <= 0:
            if failure is not None:
                raise failure
            return [found[key] for key in policies]
        sleep(min(pause_s, left_s))


def parse_seconds(text: str) -> float:
    """Parse a duration such as ``30``, ``30s``, ``5m`` or ``1h``; returns seconds. Raises ArgumentTypeError."""
    unit = _UNITS.get(text[-1:], 0.0)
    number = text[:-1] if unit else text
    if not number.isascii() or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 30, 30s, 5m or 1h")
    return int(number) * (unit or 1.0)
