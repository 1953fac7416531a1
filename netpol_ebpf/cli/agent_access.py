# SPDX-License-Identifier: Apache-2.0
"""Access to the agent for the commands that query it: the option ``--state-dir``, and the query itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import CLIENT_TIMEOUT_S, SOCKET_NAME, ask
from netpol_ebpf.agent.main import DEFAULT_STATE_DIR


def add_state_dir_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--state-dir``, as `netpol-agent` has it."""
    parser.add_argument(
        "--state-dir", type=Path, default=DEFAULT_STATE_DIR, metavar="DIR",
        help=f"state directory of the agent (default: {DEFAULT_STATE_DIR})",
    )  # fmt: skip


def ask_agent(
    arguments: argparse.Namespace, operation: str, *, timeout_s: float | None = CLIENT_TIMEOUT_S, **request: Any
) -> Iterator[Any]:
    """Query the agent, and yield the response line by line. ``timeout_s``: seconds for each line, None: no limit.

    Raises the errors of `ask`.
    """
    return ask(arguments.state_dir / SOCKET_NAME, {**request, "op": operation}, timeout_s=timeout_s)
