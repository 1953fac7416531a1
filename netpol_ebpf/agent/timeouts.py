# SPDX-License-Identifier: Apache-2.0
"""Time-outs of connections without packets, by state, in seconds.

Invariant: a state without an option has its default, whatever an earlier agent set in the same maps.  The kernel's
units (jiffies) appear here and in `netpol_loader.pins.dataplane` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from netpol_ebpf.errors import UsageError
from netpol_loader import abi
from netpol_loader.pins.dataplane import TIMEOUTS_S

STATES: Mapping[str, int] = {
    "tcp-new": abi.NP_CONN_TCP_NEW,
    "tcp-open": abi.NP_CONN_TCP_OPEN,
    "tcp-closing": abi.NP_CONN_TCP_CLOSING,
    "tcp-reset": abi.NP_CONN_TCP_RESET,
    "udp": abi.NP_CONN_UDP,
    "icmp": abi.NP_CONN_ICMP,
    "other": abi.NP_CONN_OTHER,
    "fragment": abi.NP_CONN_FRAGMENT,
}
"""Names of states (enum np_conn_state); the last one is for the record of a datagram's first fragment."""

SHORTEST_S = 2
"""Shortest time-out: a connection's time is updated at most once a second and read as rarely, so a busy connection
could exceed one second.
"""
LONGEST_S = 365 * 24 * 3600
"""Longest time-out: arbitrary, far below overflow."""


def parse_timeouts(texts: Sequence[str]) -> dict[str, int]:
    """Parse ``STATE=SECONDS`` pairs; for a state that is given twice, the last counts. Raises UsageError."""
    timeouts_s: dict[str, int] = {}
    for text in texts:
        state, _, number = text.partition("=")
        is_number = number.isascii() and number.isdecimal() and len(number) <= len(str(LONGEST_S))
        if state not in STATES or not is_number or not SHORTEST_S <= int(number) <= LONGEST_S:
            raise UsageError(
                f"--timeout {text}: expected STATE=SECONDS, with {SHORTEST_S} to {LONGEST_S} whole seconds and a state of "
                + ", ".join(STATES)
            )
        timeouts_s[state] = int(number)
    return timeouts_s


def set_timeouts(config: abi.np_config, asked_s: Mapping[str, int]) -> None:
    """Write all time-outs into a configuration: the given ones, and the defaults of the others."""
    for state, number in STATES.items():
        config.timeout_jiffies[number] = int(asked_s.get(state, TIMEOUTS_S[number]) * config.jiffies_per_second)


def read_timeouts(config: abi.np_config) -> dict[str, float]:
    """Read the time-outs of a configuration, in seconds, as they are, also if something else has overwritten them."""
    jiffies_per_second = config.jiffies_per_second or 1
    return {state: round(config.timeout_jiffies[number] / jiffies_per_second, 3) for state, number in STATES.items()}
