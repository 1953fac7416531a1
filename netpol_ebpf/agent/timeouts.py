# SPDX-License-Identifier: Apache-2.0
"""How long the packet path remembers a connection that nothing is heard of: by the names that people use, in seconds.

Invariant: what is not asked for has its default, whatever an earlier agent on the same maps was asked for.  The kernel's
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
"""States of a connection (enum np_conn_state), and the memory of a datagram's first fragment."""

SHORTEST_S = 2
"""A connection's time is noted at most once a second, and looked up as seldom: one second might be over for a busy one."""
LONGEST_S = 365 * 24 * 3600
"""Arbitrary; far from what overflows."""


def parse_timeouts(texts: Sequence[str]) -> dict[str, int]:
    """``STATE=SECONDS`` pairs; of a state that is given twice, the last counts. Raises UsageError."""
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
    """Write all time-outs into a configuration: those that are asked for, and the defaults of the others."""
    for state, number in STATES.items():
        config.timeout_jiffies[number] = int(asked_s.get(state, TIMEOUTS_S[number]) * config.jiffies_per_second)


def read_timeouts(config: abi.np_config) -> dict[str, float]:
    """The time-outs of a configuration, in seconds. Of one that something else has overwritten: whatever it says."""
    jiffies_per_second = config.jiffies_per_second or 1
    return {state: round(config.timeout_jiffies[number] / jiffies_per_second, 3) for state, number in STATES.items()}
