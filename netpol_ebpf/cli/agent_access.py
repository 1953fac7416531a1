# SPDX-License-Identifier: Apache-2.0
"""The connection of netpolctl to the agent: options that both programs have, and requests to the agent.

Invariant: an option of the agent has the same name, type, default, configuration key and environment variable in
netpolctl.
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
    """The parser of the agent's own command line, which declares the shared options. Callers must not change it."""
    return build_parser()


def add_agent_options(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Add ``--config``, and the options ``flags`` as the agent's parser declares them.

    `complete_options` must be called with the parsed arguments before the command runs.
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
    """Set the agent's options that the command line does not give, if the command has such options.

    The values come from the environment, the configuration file, or the defaults. Raises NetpolError.
    """
    if hasattr(arguments, "agent_options"):
        configuration.complete(arguments, agent_parser(), arguments.agent_options)


def manifests_dir(config: str | None) -> Path:
    """The agent's manifest directory by environment, configuration file and default. Raises NetpolError.

    ``config``: the value of the option ``--config``, None if it is not given.
    """
    arguments = argparse.Namespace(config=config)
    configuration.complete(arguments, agent_parser(), {"manifests": DEFAULT_MANIFESTS})
    found: Path = arguments.manifests
    return found


def ask_agent(
    arguments: argparse.Namespace, operation: str, *, timeout_s: float | None = CLIENT_TIMEOUT_S, **request: Any
) -> Iterator[Any]:
    """Send a request to the agent; yields the values of its response as they arrive. Raises the errors of `ask`.

    ``timeout_s``: the longest wait for each value in seconds, None for no limit. ``request``: the fields of the
    request.
    """
    return ask(arguments.state_dir / SOCKET_NAME, {**request, "op": operation}, timeout_s=timeout_s)
