# SPDX-License-Identifier: Apache-2.0
"""Time-outs of connections, in seconds for each state: how long a connection without packets is kept.

Invariant: a state without an option has its default time-out, even if an earlier agent set another one in the same
maps. Only this module and `netpol_loader.pins.dataplane` use the kernel's unit (jiffies).
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
"""The number of each state (enum np_conn_state) by its name in options. The state "fragment" is that of the row for a
datagram's first fragment."""

SHORTEST_S = 2
"""Shortest time-out in seconds. The program updates the time of a connection at most once a second, so with a time-out
of one second a connection with traffic could expire."""
LONGEST_S = 365 * 24 * 3600
"""Longest time-out in seconds: a year. The number is arbitrary, far below an overflow."""


def parse_timeouts(texts: Sequence[str]) -> dict[str, int]:
    """Parse options of the form ``STATE=SECONDS``; returns the seconds by state. Raises UsageError.

    If a state is given twice, the last option counts.
    """
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
    """Write the time-outs of all states into ``config``. A state that ``asked_s`` lacks gets its default."""
    for state, number in STATES.items():
        config.timeout_jiffies[number] = int(asked_s.get(state, TIMEOUTS_S[number]) * config.jiffies_per_second)


def read_timeouts(config: abi.np_config) -> dict[str, float]:
    """Read the time-outs in ``config``, in seconds by state.

    They are the present values, even if another program wrote them.
    """
    jiffies_per_second = config.jiffies_per_second or 1
    return {state: round(config.timeout_jiffies[number] / jiffies_per_second, 3) for state, number in STATES.items()}
