# SPDX-License-Identifier: Apache-2.0
"""Domain names that endpoints learned, as questions carry them: which endpoint knows which names for an address.

Invariant: what one endpoint learned counts for that endpoint alone.  This module knows no time; its caller leaves out
what has expired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from netpol_ebpf.policy.domain_names import is_never_learned
from netpol_ebpf.policy.journey import Journey
from netpol_ebpf.policy.types import Direction, EndpointKey, IPAddress, Question


class LearnedNames:
    """The names that endpoints know for addresses at one moment."""

    def __init__(self) -> None:
        self._names: dict[tuple[EndpointKey | None, IPAddress], set[str]] = defaultdict(set)

    def learn(self, endpoint: EndpointKey | None, names: Iterable[str], address: IPAddress) -> None:
        """Add names for an address: the name that was asked for, and the names of its CNAME chain.

        ``endpoint``: the endpoint that got the answer; None: every endpoint.  An address that no answer can teach
        (`is_never_learned`) is ignored, as in the packet path.
        """
        if not is_never_learned(address):
            self._names[(endpoint, address)].update(names)

    def names(self, endpoint: EndpointKey, address: IPAddress) -> frozenset[str]:
        """The names that ``endpoint`` knows for ``address``."""
        return frozenset(self._names.get((endpoint, address), ())) | frozenset(self._names.get((None, address), ()))

    def all_names(self) -> frozenset[str]:
        """All names that some endpoint knows."""
        return frozenset().union(*self._names.values())

    def addresses(self, endpoint: EndpointKey | None, name: str) -> tuple[IPAddress, ...]:
        """The addresses for which ``endpoint`` knows ``name``, sorted. None: what every endpoint knows."""
        found = {
            address
            for (learner, address), names in self._names.items()
            if name in names and learner in (None, endpoint)
        }
        return tuple(sorted(found, key=lambda address: (address.version, int(address))))

    def apply_to(self, journey: Journey) -> Journey:
        """The journey in which each question about egress has the names that its endpoint knows."""
        if not self._names:
            return journey
        hops = (
            replace(
                hop,
                questions=tuple(map(self._with_names, hop.questions)),
                reply=tuple(map(self._with_names, hop.reply)),
            )
            for hop in journey.hops
        )
        return replace(journey, hops=tuple(hops))

    def _with_names(self, question: Question) -> Question:
        if question.direction is not Direction.EGRESS:
            return question
        return replace(question, names=self.names(question.endpoint, question.packet.destination))
