# SPDX-License-Identifier: Apache-2.0
"""One attempt of a laboratory's host to connect to an address, and the outcome of the attempt.

Invariant: an outcome states what the source host observed and draws no conclusion. A refused connection and an ICMP
unreachable message do not prove a denial by policy, so each is an outcome of its own, distinct from silence.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from netpol_ebpf.lab.topology import IPAddress


class Reachability(enum.Enum):
    """The outcome of an attempt, as observed at the source."""

    REACHED = "reached"  # an echo came back, over the same connection
    SILENT = "silent"  # nothing came back before the deadline
    REFUSED = "refused"  # the destination answered that no socket listens on the port
    UNREACHABLE = "unreachable"  # a router or the source's own kernel reported that there is no route


@dataclass(frozen=True, slots=True)
class Attempt:
    """One new connection from a host to an address.

    ``protocol``: TCP, UDP, ICMP or ICMPv6, by IANA number. ``port``: the destination port of TCP and UDP; 0 for ICMP
    and ICMPv6, which send an echo request. ``source_port``: 0 if the kernel chooses the port.
    """

    source: str
    destination: IPAddress
    protocol: int
    port: int = 0
    source_port: int = 0


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The outcome of an attempt. ``seconds``: the time from the start of the attempt to its outcome."""

    attempt: Attempt
    outcome: Reachability
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether the echo of the destination arrived at the source."""
        return self.outcome is Reachability.REACHED
