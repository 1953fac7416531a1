# SPDX-License-Identifier: Apache-2.0
"""`netpolctl cleanup`: end enforcement and remove everything that netpol-ebpf made on this node.

Exit codes: 0 nothing is left; 5 something could not be removed, or an agent is running.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import SOCKET_NAME
from netpol_ebpf.agent.main import (
    DEFAULT_STATE_DIR,
    HANDOVERS_NAME,
    INTERFACES_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    NAMES_NAME,
    exclusive,
)
from netpol_ebpf.agent.source_options import COPIES_NAME, DEFAULT_SAVED_STATE
from netpol_ebpf.apply.records import DAMAGED_SUFFIX
from netpol_ebpf.cli.agent_access import add_agent_options
from netpol_ebpf.cli.cni import add_directory_options
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.cni.installation import find_installed
from netpol_ebpf.errors import InvalidInputError, PlatformError, PrivilegeError
from netpol_ebpf.terminal import escaped, say

IN_USE_HINT = "Stop the agent first (systemctl stop netpol-agent): a running agent puts back what is removed."


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cleanup",
        help="end enforcement and remove everything that the agent made",
        description="End enforcement on this node and remove everything that the agent made: links, filters, maps, programs, state.",
        epilog="exit codes: 0 nothing is left, 5 something could not be removed, or an agent is running",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    add_agent_options(parser, "--pin-root", "--state-dir", "--saved-state")
    # None: the option is not given. The agent's default saved state is then removed only with the default state
    # directory, because an agent with another state directory has another saved state.
    parser.set_defaults(agent_options={**parser.get_default("agent_options"), "saved_state": None})
    add_directory_options(parser, "cni-")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if os.geteuid() != 0:
        raise PrivilegeError("pins and state belong to root; nothing was removed")
    from netpol_loader.pins.dataplane import DEFAULT_PIN_ROOT
    from netpol_loader.pins.lock import held

    state_dir: Path = arguments.state_dir
    pin_root: Path = arguments.pin_root or DEFAULT_PIN_ROOT
    with contextlib.ExitStack() as stack:  # the locks prove that no agent runs, which would restore everything
        if state_dir.is_dir():
            stack.enter_context(exclusive(state_dir, hint=IN_USE_HINT))
        if pin_root.is_dir():  # finds a running agent with any other state directory
            stack.enter_context(held(pin_root, hint=IN_USE_HINT))
        return _clean(arguments)


def _clean(arguments: argparse.Namespace) -> int:
    from netpol_loader.pins.compiled import kept_files
    from netpol_loader.pins.dataplane import DEFAULT_PIN_ROOT
    from netpol_loader.pins.removal import Leftover, find_leftovers

    # The plugin is removed first, so that no pod waits for an agent that does not come back.
    plugin = find_installed(arguments.bin_dir, arguments.conf_dir)
    leftovers = [Leftover(one.kind, str(one.path), one.remove) for one in plugin]
    leftovers += find_leftovers(arguments.pin_root or DEFAULT_PIN_ROOT)
    if arguments.pin_root is None:
        leftovers += _abandoned_engines(DEFAULT_PIN_ROOT.parent)
        leftovers += [
            Leftover("compiled file" if path.is_file() else "directory", str(path), lambda path=path: _delete(path))  # type: ignore[misc]
            for path in kept_files()
        ]
    leftovers += [Leftover("state", str(path), lambda path=path: _delete(path)) for path in _state(arguments.state_dir)]  # type: ignore[misc]
    saved: Path | None = arguments.saved_state
    if saved is None and arguments.state_dir == DEFAULT_STATE_DIR:
        saved = DEFAULT_SAVED_STATE
    if saved is not None:
        leftovers += [Leftover("state", str(path), lambda path=path: _delete(path)) for path in _saved(saved)]  # type: ignore[misc]
    failures: list[str] = []
    plain: list[dict[str, Any]] = []
    is_text = arguments.output in ("text", "wide")
    for one in leftovers:
        error = None
        if not arguments.dry_run:
            try:
                one.remove()
            except (OSError, PlatformError, InvalidInputError) as failure:
                error = str(failure)
                failures.append(f"{one.kind} {one.name}: {error}")
        plain.append(
            {"kind": one.kind, "name": one.name, "removed": not arguments.dry_run and error is None, "error": error}
        )
        if is_text:
            done = "would remove" if arguments.dry_run else "NOT REMOVED" if error else "removed"
            say(escaped(f"{done} {one.kind} {one.name}"))
    if not print_value(arguments.output, plain) and not leftovers:
        say("nothing to remove")
    if failures:
        raise PlatformError(
            "could not remove " + "; ".join(failures),
            hint="What is listed is still there. Run `netpolctl cleanup` again.",
        )
    return 0


def _abandoned_engines(parent: Path) -> list[Any]:
    """The pin directories of `netpolctl test` processes that were killed, so that they could not remove them."""
    from netpol_ebpf.apply.kernel_engine import abandoned
    from netpol_loader.pins.removal import find_leftovers

    return [leftover for root in abandoned(parent) for leftover in find_leftovers(root)]


def _state(state_dir: Path) -> Iterator[Path]:
    """The agent's files in the state directory, then the directory itself if it contains no other files."""
    names = (LEDGER_NAME, INTERFACES_NAME, HANDOVERS_NAME, NAMES_NAME)
    files = [f"{name}{suffix}" for name in names for suffix in ("", ".draft", DAMAGED_SUFFIX)]
    ours = [state_dir / name for name in (SOCKET_NAME, *files, COPIES_NAME, LOCK_NAME)]
    present = [path for path in ours if path.exists() or path.is_socket()]
    yield from present
    if state_dir.is_dir() and set(state_dir.iterdir()) <= set(present):
        yield state_dir


def _saved(path: Path) -> Iterator[Path]:
    """The saved state of the cluster and its draft, as far as they exist.

    The last path is the directory of the saved state, if it is the default directory and contains no other files.
    """
    present = [one for one in (path, path.with_suffix(".draft")) if one.exists()]
    yield from present
    if path == DEFAULT_SAVED_STATE and path.parent.is_dir() and set(path.parent.iterdir()) <= set(present):
        yield path.parent


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
