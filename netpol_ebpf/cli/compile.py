# SPDX-License-Identifier: Apache-2.0
"""`netpolctl compile`: compile the program into a file, so that nodes need no compiler and agents start faster.

Exit codes: 0 written; 5 the program does not compile, no compiler is installed, or other users may write into the
directory.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.terminal import say


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compile",
        help="compile the packet path into a file, for an image or a package",
        description="Compile the packet path into a file. Agents of this version load the file instead of compiling. Needs BCC; "
        "needs no privileges and no kernel that can load the programs. One file serves nodes with any number of processors and "
        "any --map-size.",
        epilog="exit codes: 0 written, 5 it does not compile, there is no compiler, or others may write into the directory",
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR",
        help="directory of the file; agents look in /usr/lib/netpol-ebpf (default) and /var/cache/netpol-ebpf",
    )  # fmt: skip
    parser.add_argument(
        "--machine", default=platform.machine(), metavar="NAME",
        help="architecture of the nodes, as `uname -m` prints it there (default: %(default)s)",
    )  # fmt: skip
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from netpol_loader.pins.compilation import compile_program
    from netpol_loader.pins.compiled import PREPARED_DIR, save_compiled

    directory: Path = arguments.output_dir or PREPARED_DIR
    compiled = compile_program(machine=arguments.machine)
    try:
        path = save_compiled(compiled, directory)
    except OSError as error:
        raise PlatformError(
            f"cannot write into {directory}: {error.strerror}",
            hint="Run the command as root, or give another --output-dir.",
        ) from error
    instructions = {name: len(code) // 8 for name, code in compiled.programs.items()}
    plain = {
        "path": str(path),
        "digest": compiled.digest,
        "machine": compiled.machine,
        "compiler": compiled.compiler,
        "instructions": instructions,
    }
    if not print_value(arguments.output, plain):
        say(f"{path}: {len(instructions)} programs, {sum(instructions.values())} instructions, by {compiled.compiler}")
    return 0
