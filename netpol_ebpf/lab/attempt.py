# SPDX-License-Identifier: Apache-2.0
"""An attempt to connect two hosts of a laboratory, and its outcome.

Invariant: an outcome states the observation, never a conclusion: a refused connection or an ICMP unreachable is not a
denial by policy, and is distinct from silence.
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
    UNREACHABLE = "unreachable"  # a router, or the source's own kernel, reported no route


@dataclass(frozen=True, slots=True)
class Attempt:
    """One new connection from a host to an address.

    ``protocol``: TCP, UDP, ICMP or ICMPv6 by IANA number; ``port`` is 0 for the last two, which are echo requests.
    ``source_port`` 0: the kernel chooses.
    """

    source: str
    destination: IPAddress
    protocol: int
    port: int = 0
    source_port: int = 0


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """Outcome of an attempt, known after ``seconds``."""

    attempt: Attempt
    outcome: Reachability
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether the echo came back."""
        return self.outcome is Reachability.REACHED
