# SPDX-License-Identifier: Apache-2.0
"""What is in deploy/ fits the program."""

from __future__ import annotations

import shlex
from configparser import ConfigParser
from pathlib import Path

from netpol_ebpf.agent.main import DEFAULT_STATE_DIR, build_parser

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_service_starts_the_agent_with_options_it_knows() -> None:
    """The command line parses, the state directory is the one systemd keeps, and readiness is told."""
    unit = ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[method-assign,assignment]  # names keep their case
    unit.read_string((DEPLOY / "netpol-agent.service").read_text())
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "netpol-agent"
    parsed = build_parser().parse_args(arguments)
    assert parsed.state_dir == DEFAULT_STATE_DIR == Path("/run") / unit["Service"]["RuntimeDirectory"]
    assert parsed.node == "%H"
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["RuntimeDirectoryPreserve"] == "yes"
