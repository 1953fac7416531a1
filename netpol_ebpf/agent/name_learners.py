# SPDX-License-Identifier: Apache-2.0
"""Which endpoints learn domain names: their rows in np_asked, and the rows of learned addresses of numbers in use.

The program learns for an endpoint only if the endpoint has a row in np_asked.  The row has the endpoint's pending DNS
questions, so a row that exists is never overwritten.

Invariant: no row of a number that no endpoint has stays, so an endpoint that gets the number later does not inherit
what another one learned.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping

from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.errors import Location, MapFullError, Problem
from netpol_ebpf.policy.types import Action, EndpointKey, Rule, World
from netpol_loader import abi

LEARNED_MAPS = ("np_learned4", "np_learned6")
_NUMBER = struct.Struct("=I")
_EMPTY = bytes(ctypes.sizeof(abi.np_asked))


def may_use_names(rules: tuple[Rule, ...], world: World) -> bool:
    """Whether one of these egress rules may match by domain names.

    A rule with a selector may do so by the names of a network set. Whether the selector selects such a set is not looked
    up: a row that no rule needs only takes memory.
    """
    has_named_sets = any(held.domains for held in world.network_sets.values())
    return any(
        rule.action is Action.ALLOW
        and (rule.destination.domains or (has_named_sets and rule.destination.selector is not None))
        for rule in rules
    )


class NameLearners:
    """The rows in np_asked, by endpoint.

    ``full``: the endpoints for which the map had no room.
    """

    def __init__(self) -> None:
        self.numbers: dict[EndpointKey, int] = {}
        self.full: tuple[EndpointKey, ...] = ()

    def adopt(self, maps: Mapping[str, KernelMap], kept: Mapping[EndpointKey, int]) -> None:
        """Take over the rows of an earlier agent. ``kept``: the endpoints that still have their number.

        Rows of other numbers are deleted.
        """
        known = {number: key for key, number in kept.items()}
        self.numbers.clear()
        for raw, _ in list(maps["np_asked"].items()):
            (number,) = _NUMBER.unpack(raw)
            if number in known:
                self.numbers[known[number]] = number
            else:
                maps["np_asked"].delete(raw)
        _sweep(maps, lambda number: number not in known)

    def update(self, maps: Mapping[str, KernelMap], wanted: Mapping[EndpointKey, int]) -> None:
        """Make the rows those of ``wanted``, which maps endpoints to their numbers."""
        gone = {number for key, number in self.numbers.items() if wanted.get(key) != number}
        for number in gone:
            maps["np_asked"].delete(_NUMBER.pack(number))
        if gone:
            _sweep(maps, gone.__contains__)
        present = {key: number for key, number in self.numbers.items() if number not in gone}
        full = []
        for key, number in wanted.items():
            if key not in present:
                try:
                    maps["np_asked"].put(_NUMBER.pack(number), _EMPTY)
                    present[key] = number
                except MapFullError:
                    full.append(key)
        self.numbers, self.full = present, tuple(full)

    @property
    def problems(self) -> list[Problem]:
        """The endpoints that learn no names because the map has no room for their questions."""
        return [
            Problem(
                Location(""),
                "",
                "map np_asked is full: the workload learns no domain names, so rules with names do not match "
                "(--map-size np_asked=N)",
                obj=str(key),
                slug="map-full",
            )
            for key in self.full
        ]


def _sweep(maps: Mapping[str, KernelMap], is_gone: Callable[[int], bool]) -> None:
    """Delete the learned addresses of the endpoint numbers for which ``is_gone`` is true. Cost: linear in the maps."""
    for name in LEARNED_MAPS:
        keys = [key for key, _ in maps[name].items() if is_gone(_NUMBER.unpack_from(key)[0])]
        if keys:
            maps[name].delete_many(keys)
