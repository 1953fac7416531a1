# SPDX-License-Identifier: Apache-2.0
"""`netpolctl`: runs a subcommand, and maps its result or error to an exit code.

Exit codes: 0 yes or done, 1 the answer is no, 2 wrong usage, 3 invalid input, 4 no agent or API server answers, 5 a
fault of the kernel or a missing permission, 70 a bug, 130 interrupted, 141 the reader of the output ended.

Invariants: a user gets a traceback only with ``--debug``. Modules that need BCC, root or a kernel are imported only
when a command runs, neither here nor in a subcommand's ``register``.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from netpol_ebpf import __version__
from netpol_ebpf.agent.configuration import origin_hint
from netpol_ebpf.cli.agent_access import complete_options
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.terminal import LogFormatter, paragraph, say

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

COMMANDS = (
    "netpol_ebpf.cli.test",
    "netpol_ebpf.cli.check",
    "netpol_ebpf.cli.explain",
    "netpol_ebpf.cli.get",
    "netpol_ebpf.cli.status",
    "netpol_ebpf.cli.wait",
    "netpol_ebpf.cli.can_i",
    "netpol_ebpf.cli.metrics",
    "netpol_ebpf.cli.flows",
    "netpol_ebpf.cli.release",
    "netpol_ebpf.cli.bench",
    "netpol_ebpf.cli.demo",
    "netpol_ebpf.cli.cni",
    "netpol_ebpf.cli.cleanup",
    "netpol_ebpf.cli.uninstall",
    "netpol_ebpf.cli.compile",
    "netpol_ebpf.cli.doctor",
)
"""The modules of the subcommands, in the order of the help text. Each has a function ``register(subparsers)``."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands.

    Each subcommand sets ``run``, a function from the arguments to an exit code.
    """
    parser = argparse.ArgumentParser(
        prog="netpolctl",
        description="Network policy enforced with eBPF: check and test policies, explain verdicts, inspect the agent of this node.",
    )
    parser.add_argument("--version", action="version", version=f"netpolctl {__version__}")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(name).register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. For wrong usage argparse itself exits with 2."""
    arguments = build_parser().parse_args(argv)
    if logging.lastResort is not None:  # this handler prints warnings of imported modules
        logging.lastResort.setFormatter(LogFormatter())
    return run(arguments.run, arguments)


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; returns its exit code. A failure is reported on standard error."""
    try:
        complete_options(arguments)
        code = command(arguments)
        sys.stdout.flush()
    except NetpolError as error:
        hint = f"{origin_hint(error.message, getattr(arguments, 'origins', {}))} {error.hint}".strip()
        _report(f"error: {error.message}", hint, debug=arguments.debug)
        return error.exit_code
    except BrokenPipeError:
        # Python flushes standard output once more at exit; that flush must succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one place where a bug becomes a line and an exit code
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"bug: {type(error).__name__}: {error} ({os.path.relpath(where.filename)}:{where.lineno})"
        hint = NetpolError.default_hint + (
            "" if arguments.debug else " Run the command with --debug for the traceback."
        )
        _report(message, hint, debug=arguments.debug)
        return EXIT_BUG
    return code


def _report(message: str, hint: str, *, debug: bool) -> None:
    if debug:
        say(traceback.format_exc(), file=sys.stderr)
    say(paragraph(f"netpolctl: {message}"), file=sys.stderr)
    if hint:
        say(paragraph(f"netpolctl: hint: {hint}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
