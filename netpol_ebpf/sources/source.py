# SPDX-License-Identifier: Apache-2.0
"""The protocol of a source of objects: it gives Kubernetes objects and policies as events, and reports its problems.

A source may read files, or watch an API from threads of its own.  The agent receives events only, and only in its own
thread.

Invariants: an update contains objects that change together; a source that cannot be read keeps its objects and reports
a problem; the agent applies nothing of a source that has not synced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Union

from netpol_ebpf.errors import Problem
from netpol_ebpf.policy.translate import ResourceKey
from netpol_ebpf.resources.manifest_files import never_pause
from netpol_ebpf.resources.types import Resource

KEEPS_NOTHING = "`netpolctl status` names the kinds whose definition was deleted (crd-deleted)."
"""Hint of the error that no object of a kind is kept."""


@dataclass(frozen=True, slots=True)
class Upsert:
    """An object appeared, changed, or moved to another position in its source.

    ``key``: (kind, namespace, name).  ``version``: the source's id of this state of the object; different states of one
    key have different versions.
    """

    resource: Resource
    key: ResourceKey
    version: str


@dataclass(frozen=True, slots=True)
class Remove:
    """An object was removed. ``resource`` and ``version`` are those of its last state."""

    resource: Resource
    key: ResourceKey
    version: str


ObjectEvent = Union[Upsert, Remove]


@dataclass(frozen=True, slots=True)
class SourceUpdate:
    """Events that the agent must apply together, removals first, and all problems that the source has now.

    A problem names its object (kind/namespace/name), or its file and line.
    """

    events: tuple[ObjectEvent, ...]
    problems: tuple[Problem, ...]


class Source(Protocol):
    """A source of objects. The agent calls `begin` or `sync` once, then `step` whenever `wait_s` is 0."""

    @property
    def name(self) -> str:
        """The source's name in messages, such as the path of a directory."""

    @property
    def has_synced(self) -> bool:
        """Whether the source has returned all its objects at least once. Never becomes False again.

        It becomes True with the return of the update (of `begin`, `sync` or `step`) that completes the objects.
        """

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of objects of kinds that are not read, by apiVersion and kind."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All present problems of the source."""

    def begin(self) -> SourceUpdate | None:
        """Begin to read, and return the objects that are known without waiting for a server; `step` returns the rest.

        Raises InvalidInputError if the source cannot be read at all.
        """

    def sync(self) -> SourceUpdate:
        """Begin to read, wait until the source has all its objects, and return them.

        Raises InvalidInputError or UnreachableError if the source cannot be read: its objects are then unknown, which
        differs from having none.
        """

    def report(self) -> tuple[Mapping[str, Any], ...]:
        """The data that ``status`` shows for this source, or for each source in it: values that JSON can hold.

        ``source``: its name; ``type``; ``synced``; ``waiting_for``: missing parts until it has synced; ``behind``: parts
        whose changes do not arrive now, each with the reason.  Takes no lock: a forked child of the agent calls it, in
        which no other thread runs that could release one.
        """

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when the source has new events; None: the source has no descriptor."""

    def note_news(self) -> None:
        """Make the descriptor unreadable again; `wait_s` then gives the time of the next step."""

    def wait_s(self) -> float:
        """Seconds after which `step` must be called even if the descriptor is not readable; 0: now."""

    def step(self, pause: Callable[[], None] = never_pause) -> SourceUpdate | None:
        """Do a bounded piece of work; returns the changes, or None.

        ``pause`` is called every few milliseconds while there is work in this process.  Never raises for the state of
        the source: that is a problem in the update.
        """

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:
        """Remove the objects of ``kind`` that are kept although its definition was deleted; `step` returns the removals.

        Returns their names.  ``is_trial``: only that.  Raises InvalidInputError when nothing of the kind is kept.
        """

    def close(self) -> None:
        """End the source's own processes and threads, and close its descriptors."""
