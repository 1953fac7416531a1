# SPDX-License-Identifier: Apache-2.0
"""Time-outs by name: every state has one, and without an option it has its default."""

from __future__ import annotations

import re

import pytest

from netpol_ebpf.agent.main import build_parser
from netpol_ebpf.agent.timeouts import LONGEST_S, SHORTEST_S, STATES, parse_timeouts, read_timeouts, set_timeouts
from netpol_ebpf.errors import UsageError
from netpol_loader import abi
from netpol_loader.pins.dataplane import TIMEOUTS_S, default_config

JIFFIES_PER_SECOND = 250


def test_every_state_has_a_name_and_is_in_the_help() -> None:
    """The names are those of all states of the program, each once."""
    assert sorted(STATES.values()) == list(range(abi.NP_CONN_STATES)) == sorted(TIMEOUTS_S)
    shown = re.sub(r"\s+", "", build_parser().format_help())  # lines are also broken at hyphens
    assert [state for state in STATES if state not in shown] == []


def test_what_is_asked_for_is_set_and_the_rest_is_default() -> None:
    """This holds even if an earlier agent had other options."""
    config = default_config(JIFFIES_PER_SECOND)
    defaults = read_timeouts(config)
    assert defaults["tcp-open"] == 8100
    set_timeouts(config, parse_timeouts(["udp=180", "icmp=7", "icmp=9"]))
    assert config.timeout_jiffies[abi.NP_CONN_UDP] == 180 * JIFFIES_PER_SECOND
    assert read_timeouts(config) == {**defaults, "udp": 180, "icmp": 9}
    set_timeouts(config, parse_timeouts([f"other={LONGEST_S}"]))
    assert read_timeouts(config) == {**defaults, "other": LONGEST_S}


def test_limits_are_part_of_the_range() -> None:
    """The smallest and the largest value are accepted. The values beyond are errors that name the time-out."""
    assert parse_timeouts([f"udp={SHORTEST_S}", f"tcp-new={LONGEST_S}"]) == {"udp": SHORTEST_S, "tcp-new": LONGEST_S}
    for seconds in (SHORTEST_S - 1, LONGEST_S + 1):
        with pytest.raises(UsageError, match=f"--timeout udp={seconds}: expected"):
            parse_timeouts([f"udp={seconds}"])


def test_overwritten_configuration_can_be_read() -> None:
    """The agent can answer when another program has overwritten its maps with zeros."""
    assert set(read_timeouts(abi.np_config()).values()) == {0}
