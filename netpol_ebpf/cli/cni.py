# SPDX-License-Identifier: Apache-2.0
"""`netpolctl cni`: install or remove the CNI plugin, which the node's container runtime runs for every pod.

Exit codes: 0 installed or removed, 3 there is no network configuration to which the plugin can be added, 5 a file
cannot be written or removed.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import SOCKET_NAME
from netpol_ebpf.agent.loop import wakened_by
from netpol_ebpf.cli.agent_access import add_agent_options
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.cni.installation import (
    DEFAULT_BIN_DIR,
    DEFAULT_CONF_DIR,
    LIST,
    SINGLE,
    TYPE,
    PluginSettings,
    find_installed,
    install,
)
from netpol_ebpf.errors import InvalidInputError, NetpolError, PlatformError, UsageError
from netpol_ebpf.terminal import escaped, say

TIMEOUT_S, LONGEST_S = 30, 600
"""Default and maximum of the plugin's timeout in seconds. They must be the same as in cni/netpol_cni.c."""
LOOK_S = 1.0
"""Seconds between two checks of --follow for changes by other programs. The number is arbitrary."""
MOST_SOCKET_BYTES = 107
"""Longest path of a socket in bytes: the kernel's UNIX_PATH_MAX without the terminating NUL."""

log = logging.getLogger("netpolctl")

FileState = list[tuple[str, int, int, int]]


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cni",
        help="no pod starts before its policy is in force: the CNI plugin, in its place or not",
        description="Have the container runtime of this node run the CNI plugin for every pod, so that no pod starts before its "
        "policy is in force: the program among the runtime's plugins, and the last one of the network configuration that the "
        "runtime takes, the first one by name. Or no longer.",
        epilog="exit codes: 0 it is as asked, 3 there is no network configuration that it can be put into, 5 a file cannot be "
        "written or removed",
    )
    parser.add_argument(
        "action", choices=ACTIONS, help="put it into its place, or take it away; pods that run stay as they are"
    )
    add_directory_options(parser, "")
    add_agent_options(parser, "--state-dir")
    parser.add_argument(
        "--timeout", type=int, default=TIMEOUT_S, metavar="SECONDS",
        help="install: how long a pod's start waits for its policy (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--posture", choices=("closed", "open"), default="closed",
        help="install: what becomes of a pod whose policy is not in force in time: its start fails and is tried again, or it "
        "starts all the same and the runtime's log says so (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--follow", action="store_true",
        help="install: stay, wait for a configuration, and do it again when another program rewrites it",
    )  # fmt: skip
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    return ACTIONS[arguments.action](arguments)


def add_directory_options(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Add the options for the runtime's plugin directory and configuration directory.

    They are named ``--dir`` and ``--conf-dir``, with ``prefix`` before the name.
    """
    parser.add_argument(
        f"--{prefix}dir", dest="bin_dir", type=Path, default=DEFAULT_BIN_DIR, metavar="DIR",
        help=f"directory of the runtime's CNI plugins (default: {DEFAULT_BIN_DIR})",
    )  # fmt: skip
    parser.add_argument(
        f"--{prefix}conf-dir", dest="conf_dir", type=Path, default=DEFAULT_CONF_DIR, metavar="DIR",
        help=f"directory of its network configurations (default: {DEFAULT_CONF_DIR})",
    )  # fmt: skip


def run_install(arguments: argparse.Namespace) -> int:
    """Run `netpolctl cni install`; returns the exit code."""
    socket: Path = arguments.state_dir.absolute() / SOCKET_NAME
    if len(os.fsencode(socket)) > MOST_SOCKET_BYTES:
        raise UsageError(f"--state-dir {arguments.state_dir}: too long for a socket's path")
    if not 1 <= arguments.timeout <= LONGEST_S:
        raise UsageError(f"--timeout {arguments.timeout}: expected a number of seconds from 1 to {LONGEST_S}")
    settings = PluginSettings(socket, arguments.timeout, arguments.posture)

    def put() -> list[Path]:
        return install(arguments.bin_dir, arguments.conf_dir, settings)

    if arguments.follow:
        with wakened_by(signal.SIGTERM, signal.SIGINT) as (received, wake):
            follower = ConfigurationKeeper(arguments.bin_dir, arguments.conf_dir, put)
            while not received:
                for path in follower.look():
                    say(escaped(f"written {path}"))
                select.select([wake], [], [], LOOK_S)
        return 0
    written = put()
    if not print_value(arguments.output, {"written": [str(path) for path in written]}):
        for path in written:
            say(escaped(f"written {path}"))
        if not written:
            say("nothing to do: it is in its place")
    return 0


class ConfigurationKeeper:
    """Repeats the installation when a file in the plugin or configuration directory has changed.

    ``put``: a function that installs, and returns the files that it wrote. If it fails, the error is logged once, and
    every `look` tries again.
    """

    def __init__(self, bin_dir: Path, conf_dir: Path, put: Callable[[], list[Path]]) -> None:
        self._bin_dir, self._conf_dir, self._put = bin_dir, conf_dir, put
        self._seen: FileState | None = None
        self._told = ""

    def look(self) -> list[Path]:
        """Install if a file changed since the last call. Returns the files that were written."""
        seen = self._look()
        if seen == self._seen:
            return []
        try:
            written = self._put()
        except (InvalidInputError, PlatformError) as error:
            if error.message != self._told:
                log.error("pods start without the CNI plugin: %s", error.message)  # noqa: TRY400 - the machine's state
            self._told = error.message
            return []
        self._told = ""
        if not written:  # after a write the next `look` checks again, because another program may have written, too
            self._seen = seen
        return written

    def _look(self) -> FileState:
        paths = [self._bin_dir / TYPE]
        if self._conf_dir.is_dir():
            paths += sorted(path for path in self._conf_dir.iterdir() if path.suffix in (LIST, *SINGLE))
        found = []
        for path in paths:
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
        return found


def run_remove(arguments: argparse.Namespace) -> int:
    """Run `netpolctl cni remove`; returns the exit code."""
    removed: list[dict[str, str]] = []
    failures: list[str] = []
    for one in find_installed(arguments.bin_dir, arguments.conf_dir):
        try:
            one.remove()
        except (OSError, NetpolError) as error:  # noqa: PERF203 - one file's misfortune is not another's
            failures.append(f"{one.kind} {one.path}: {error}")
        else:
            removed.append({"kind": one.kind, "name": str(one.path)})
    if not print_value(arguments.output, removed):
        for each in removed:
            say(escaped(f"removed {each['kind']} {each['name']}"))
        if not removed and not failures:
            say("nothing to remove")
    if failures:
        raise PlatformError("could not remove " + "; ".join(failures), hint="Run `netpolctl cni remove` again.")
    return 0


ACTIONS = {"install": run_install, "remove": run_remove}
