# SPDX-License-Identifier: Apache-2.0
"""Merges several sources into one. If several sources have an object, that of the first source in order is used.

The same object in a later source is reported as a problem, and is used when the earlier sources no longer have it. So
the objects in force follow from the content of the sources, not from the order of their updates.

Invariant: a source that has not synced contributes neither objects nor removals. When it syncs, one update adds all its
objects.
"""

from __future__ import annotations

import select
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from netpol_ebpf.errors import InvalidInputError, Problem
from netpol_ebpf.policy.translate import ResourceKey
from netpol_ebpf.resources.manifest_files import never_pause
from netpol_ebpf.sources.source import ObjectEvent, Remove, Source, SourceUpdate, Upsert

SHOWN = 1000
"""Largest number of objects that are reported because several sources have them; the first ones by key. The number is
arbitrary."""


class MergedSources:
    """A `Source` that merges several sources. Closing it closes them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """``sources``: in order of precedence. If several of them have an object, the first one's is used."""
        self._sources = tuple(sources)
        self._objects: tuple[dict[ResourceKey, Upsert], ...] = tuple({} for _ in sources)
        self._merged: set[int] = set()  # indices of sources that have synced and contribute
        self._winners: dict[ResourceKey, tuple[int, Upsert]] = {}
        self._shadowed: set[ResourceKey] = set()  # keys that several contributing sources have
        self._reported: tuple[Problem, ...] | None = None
        self._descriptors = {fd: one for one in self._sources if (fd := one.fileno()) is not None}
        self._epoll = select.epoll() if self._descriptors else None
        for descriptor in self._descriptors:
            self._polling().register(descriptor, select.EPOLLIN)

    @property
    def parts(self) -> tuple[Source, ...]:
        """The merged sources, in order of precedence."""
        return self._sources

    @property
    def name(self) -> str:
        """The names of all sources, in order of precedence."""
        return ", ".join(one.name for one in self._sources)

    @property
    def has_synced(self) -> bool:
        """Whether all sources have synced."""
        return all(one.has_synced for one in self._sources)

    @property
    def skipped(self) -> dict[str, int]:
        """The number of objects of kinds that are not read, over all sources, by apiVersion and kind."""
        total: Counter[str] = Counter()
        for one in self._sources:
            total.update(one.skipped)
        return dict(sorted(total.items()))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of all sources, then one for each object that a source before its own also has."""
        return (*(problem for one in self._sources for problem in one.problems), *self._duplicates())

    def begin(self) -> SourceUpdate | None:
        """See `Source`."""
        updates = {number: one.begin() for number, one in enumerate(self._sources)}
        return self._update(self._merge({number: one.events for number, one in updates.items() if one is not None}))

    def report(self) -> tuple[Mapping[str, Any], ...]:
        """See `Source`."""
        return tuple(part for one in self._sources for part in one.report())

    def sync(self) -> SourceUpdate:
        """See `Source`. Raises the error of the first source that cannot be read."""
        updates = [one.sync() for one in self._sources]
        events = self._merge({number: update.events for number, update in enumerate(updates)})
        return self._update(events) or SourceUpdate((), self.problems)

    def fileno(self) -> int | None:
        """An epoll descriptor. It is readable when the descriptor of any source is readable."""
        return None if self._epoll is None else self._epoll.fileno()

    def note_news(self) -> None:
        """See `Source`. Calls the same method of the sources whose descriptor is readable."""
        for descriptor, _ in self._polling().poll(timeout=0):
            self._descriptors[descriptor].note_news()

    def wait_s(self) -> float:
        """See `Source`."""
        return min(one.wait_s() for one in self._sources)

    def step(self, pause: Callable[[], None] = never_pause) -> SourceUpdate | None:
        """See `Source`. Calls `step` only of the sources for which a step is due."""
        updates = {number: one.step(pause) for number, one in enumerate(self._sources) if one.wait_s() <= 0}
        return self._update(self._merge({number: one.events for number, one in updates.items() if one is not None}))

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:
        """See `Source`."""
        names: list[str] = []
        refusals: list[InvalidInputError] = []
        for one in self._sources:
            try:
                names += one.release(kind, is_trial=is_trial)
            except InvalidInputError as error:  # noqa: PERF203 - all sources are asked
                refusals.append(error)
        if len(refusals) == len(self._sources):
            raise refusals[0]
        return tuple(names)

    def close(self) -> None:
        """Close all sources."""
        for one in self._sources:
            one.close()
        if self._epoll is not None:
            self._epoll.close()

    def _polling(self) -> select.epoll:
        if self._epoll is None:
            raise AssertionError("no source has a descriptor")
        return self._epoll

    def _merge(self, reported: dict[int, Sequence[ObjectEvent]]) -> tuple[ObjectEvent, ...]:
        """Merge new events of the sources; returns the resulting events of the merged objects, removals first.

        ``reported``: the events by index of the source. Cost: linear in the events, and in the objects of a source that
        has just synced.
        """
        touched: dict[ResourceKey, None] = {}
        for number, events in reported.items():
            objects = self._objects[number]
            for event in events:
                touched[event.key] = None
                if isinstance(event, Upsert):
                    objects[event.key] = event
                else:
                    objects.pop(event.key, None)
        for number, one in enumerate(self._sources):
            if one.has_synced and number not in self._merged:
                self._merged.add(number)
                touched |= dict.fromkeys(self._objects[number])
        removals: list[ObjectEvent] = []
        upserts: list[ObjectEvent] = []
        for key in touched:
            before = self._winners.pop(key, None)
            having = [number for number in sorted(self._merged) if key in self._objects[number]]
            if having:
                after = having[0], self._objects[having[0]][key]
                self._winners[key] = after
                if before != after:
                    upserts.append(after[1])
            elif before is not None:
                removals.append(Remove(before[1].resource, key, before[1].version))
            (self._shadowed.add if having[1:] else self._shadowed.discard)(key)
        return (*removals, *upserts)

    def _duplicates(self) -> Iterator[Problem]:
        for key in sorted(self._shadowed)[:SHOWN]:
            first, winner = self._winners[key]
            for number in sorted(self._merged):
                loser = self._objects[number].get(key)
                if loser is not None and number != first:
                    message = (
                        f"{self._sources[number].name} and {self._sources[first].name} both have this object: that of "
                        f"{self._sources[first].name} ({winner.resource.meta.location}) is in force; remove one of them"
                    )
                    yield Problem(loser.resource.meta.location, "", message, obj=str(key), slug="duplicate")

    def _update(self, events: tuple[ObjectEvent, ...]) -> SourceUpdate | None:
        problems = self.problems
        if not events and problems == self._reported:
            return None
        self._reported = problems
        return SourceUpdate(events, problems)
