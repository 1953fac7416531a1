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
from collections.abc import Callable, Iterable, Mapping

from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.compiler import CompiledTables
from netpol_ebpf.errors import Location, MapFullError, Problem
from netpol_ebpf.policy.types import Action, EndpointKey, Policy, ProfileRules, Rule, World
from netpol_loader import abi
from netpol_loader.pins.drift import Drift

LEARNED_MAPS = ("np_learned4", "np_learned6")
_NUMBER = struct.Struct("=I")
_EMPTY = bytes(ctypes.sizeof(abi.np_asked))


def may_use_names(rules: Iterable[Rule], *, has_named_sets: bool) -> bool:
    """Whether one of these egress rules may match by domain names. ``has_named_sets``: some network set has names.

    A rule with a selector may do so by the names of a network set. Whether the selector selects such a set is not looked
    up: a row that no rule needs only takes memory.
    """
    return any(
        rule.action is Action.ALLOW
        and (rule.destination.domains or (has_named_sets and rule.destination.selector is not None))
        for rule in rules
    )


def find_learners(
    tables: CompiledTables, world: World, policies_of: Callable[[EndpointKey], Iterable[Policy]]
) -> dict[EndpointKey, int]:
    """The endpoints of this node that must learn domain names, with their numbers.

    These are the endpoints with a policy or profile that `may_use_names`, as long as some verdict has a domain list.
    ``policies_of``: returns the policies that select an endpoint. Cost: linear in the endpoints of this node and their
    policies, and in the network sets.
    """
    if not len(tables.domain_lists):
        return {}
    has_named_sets = any(one.domains for one in world.network_sets.values())
    known: dict[object, bool] = {}

    def may_use(one: Policy | ProfileRules) -> bool:
        key = one.key if isinstance(one, Policy) else one.name
        if key not in known:
            known[key] = may_use_names(one.egress, has_named_sets=has_named_sets)
        return known[key]

    found = {}
    for key, row in tables.endpoints.items():
        endpoint = world.endpoints.get(key)
        profiles = (world.profiles.get(name) for name in (endpoint.profiles if endpoint else ()))
        if any(map(may_use, (one for one in (*policies_of(key), *profiles) if one is not None))):
            found[key] = row.number
    return found


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

    def restore(self, maps: Mapping[str, KernelMap]) -> list[Drift]:
        """Make rows that are missing, and delete surplus rows. Returns what differed. Rows that exist stay as they are."""
        found = []
        present = {raw for raw, _ in maps["np_asked"].items()}
        wanted = {_NUMBER.pack(number) for number in self.numbers.values()}
        for raw in present - wanted:
            maps["np_asked"].delete(raw)
            found.append(Drift("row", f"{raw.hex()} of np_asked", "foreign"))
        for raw in wanted - present:
            try:
                maps["np_asked"].put(raw, _EMPTY)
            except MapFullError:  # the next round tries again; surplus rows that filled the map are gone by then
                continue
            found.append(Drift("row", f"{raw.hex()} of np_asked", "missing"))
        return found

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
