# SPDX-License-Identifier: Apache-2.0
"""Access of netpolctl to the agent: options that both have, and queries.

Invariant: an option of the agent has the same name, type, default, file key and variable in netpolctl.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from netpol_ebpf.agent import configuration
from netpol_ebpf.agent.control_socket import CLIENT_TIMEOUT_S, SOCKET_NAME, ask
from netpol_ebpf.agent.main import build_parser
from netpol_ebpf.agent.source_options import DEFAULT_MANIFESTS


@lru_cache(maxsize=1)
def agent_parser() -> argparse.ArgumentParser:
    """The agent's parser, which declares the options; read-only for callers."""
    return build_parser()


def add_agent_options(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Add options of the agent, as the agent declares them, and ``--config``.

    `complete_options` must run before the command.
    """
    settings = {one.flag: one for one in configuration.settings_of(agent_parser()).values()}
    for flag in flags:
        action = settings[flag].action
        help_text = (action.help or "") % vars(action)
        parser.add_argument(
            flag, type=action.type or str, metavar=action.metavar, help=f"the agent's: {help_text.replace('%', '%%')}"
        )
    configuration.add_config_option(parser)
    parser.set_defaults(agent_options={settings[flag].action.dest: settings[flag].default for flag in flags})


def complete_options(arguments: argparse.Namespace) -> None:
    """Complete the agent's options from environment, configuration file and defaults. Raises NetpolError."""
    if hasattr(arguments, "agent_options"):
        configuration.complete(arguments, agent_parser(), arguments.agent_options)


def manifests_dir(config: str | None) -> Path:
    """The directory of the agent's manifests. ``config``: the value of ``--config``. Raises NetpolError."""
    arguments = argparse.Namespace(config=config)
    configuration.complete(arguments, agent_parser(), {"manifests": DEFAULT_MANIFESTS})
    found: Path = arguments.manifests
    return found


def ask_agent(
    arguments: argparse.Namespace, operation: str, *, timeout_s: float | None = CLIENT_TIMEOUT_S, **request: Any
) -> Iterator[Any]:
    """Query the agent, and yield the response line by line. ``timeout_s``: seconds for each line, None: no limit.

    Raises the errors of `ask`.
    """
    return ask(arguments.state_dir / SOCKET_NAME, {**request, "op": operation}, timeout_s=timeout_s)
