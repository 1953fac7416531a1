# SPDX-License-Identifier: Apache-2.0
"""`netpolctl doctor`: check whether this machine has everything that enforcement needs.

For each missing thing the command prints how to get it. Exit codes: 0 everything is there, 5 something is missing.
"""

from __future__ import annotations

import argparse
from typing import Any

from netpol_ebpf.cli.agent_access import add_agent_options
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.terminal import paragraph, say


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="check what this machine has, and lacks, for enforcement",
        description="Check everything that enforcement needs of this machine, and load the programs for a trial. Changes "
        "nothing.",
        epilog="exit codes: 0 everything is there, 5 something is missing",
    )
    add_agent_options(parser, "--pin-root")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from netpol_loader.pins import doctor

    checks = doctor.check_all(arguments.pin_root or doctor.BPFFS)
    if all(check.error is None for check in checks):
        checks = [*checks, doctor.try_to_load()]
    plain = [
        {
            "check": check.name,
            "ok": check.error is None,
            "detail": check.detail,
            "hint": None if check.error is None else check.error.hint,
        }
        for check in checks
    ]
    if not print_value(arguments.output, plain):
        for check in checks:
            say(paragraph(f"{'ok' if check.error is None else 'MISSING':<8}{check.name:<10} {check.detail}"))
            if check.error is not None and check.error.hint:
                say(f"{'':<19}-> {check.error.hint}")
    return 0 if all(check.error is None for check in checks) else PlatformError.exit_code
