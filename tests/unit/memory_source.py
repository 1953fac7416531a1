# SPDX-License-Identifier: Apache-2.0
"""A source in memory that reports what a test gives to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from netpol_ebpf.errors import InvalidInputError, Problem
from netpol_ebpf.policy.translate import ResourceKey, key_of
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.sources.source import ObjectEvent, Remove, SourceUpdate, Upsert


def upsert(name: str, source: str, state: int = 0) -> Upsert:
    """A Namespace as an event of a source. ``state``: a value of one of its labels."""
    text = f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{state: s{state}}}}}\n"
    (resource,) = parse_documents(text, f"{source}.yaml").resources
    return Upsert(resource, key_of(resource), f"{source}-{state}")


@dataclass
class MemorySource:
    """A source.

    ``batches``: the results of its next steps, also (). ``syncs_after``: the number of batches until it has synced.
    """

    name: str
    batches: list[Sequence[ObjectEvent]] = field(default_factory=list)
    syncs_after: int = 0
    problems: tuple[Problem, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    has_descriptor: bool = False
    is_closed: bool = False
    objects: dict[ResourceKey, Upsert] = field(default_factory=dict)
    _pipe: tuple[int, int] | None = None
    _steps: int = 0
    _has_news: bool = False

    @property
    def has_synced(self) -> bool:
        return self._steps >= self.syncs_after

    def begin(self) -> SourceUpdate | None:
        return self.step() if self.batches else None

    def report(self) -> tuple[dict[str, object], ...]:
        waiting_for = [] if self.has_synced else ["objects"]
        state = {"source": self.name, "type": "memory", "synced": self.has_synced, "waiting_for": waiting_for}
        return ({**state, "behind": []},)

    def sync(self) -> SourceUpdate:
        events: list[ObjectEvent] = []
        while not self.has_synced:
            update = self.step()
            events += update.events if update is not None else ()
        return SourceUpdate(tuple(events), self.problems)

    def fileno(self) -> int | None:
        if self.has_descriptor and self._pipe is None:
            self._pipe = os.pipe()
        return None if self._pipe is None else self._pipe[0]

    def wake(self) -> None:
        assert self._pipe is not None
        os.write(self._pipe[1], b"x")

    def note_news(self) -> None:
        assert self._pipe is not None
        os.read(self._pipe[0], 1)
        self._has_news = True

    def wait_s(self) -> float:
        return 0.0 if self._has_news or self.batches else 60.0

    def step(self, pause: Callable[[], None] = lambda: None) -> SourceUpdate | None:
        pause()
        self._has_news = False
        self._steps += 1
        events = tuple(self.batches.pop(0)) if self.batches else ()
        for event in events:
            if isinstance(event, Upsert):
                self.objects[event.key] = event
            else:
                assert isinstance(event, Remove)
                del self.objects[event.key]
        return SourceUpdate(events, self.problems) if events else None

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:  # noqa: ARG002
        raise InvalidInputError(f"nothing of {kind} is kept")

    def close(self) -> None:
        self.is_closed = True
        for descriptor in self._pipe or ():
            os.close(descriptor)
        self._pipe = None
