# SPDX-License-Identifier: Apache-2.0
"""The protocol of a source of objects. A source reports Kubernetes objects and policies as events, and its problems.

A source may read files, or watch an API in its own threads. The agent receives events only, in the agent's thread.

Invariants: an update contains all objects that must change together. A source that cannot be read keeps its objects and
reports a problem. The agent applies nothing of a source that has not synced.
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
"""Hint of the error that no objects of a kind are kept."""


@dataclass(frozen=True, slots=True)
class Upsert:
    """An object appeared, changed, or has another position in its source.

    ``key``: (kind, namespace, name). ``version``: identifies this state of the object; different states of an object
    have different versions.
    """

    resource: Resource
    key: ResourceKey
    version: str


@dataclass(frozen=True, slots=True)
class Remove:
    """An object was removed. ``resource``, ``version``: those of its last state."""

    resource: Resource
    key: ResourceKey
    version: str


ObjectEvent = Union[Upsert, Remove]


@dataclass(frozen=True, slots=True)
class SourceUpdate:
    """Events that the agent must apply together, removals first, and all present problems of the source.

    A problem names its object (kind/namespace/name), or its file and line.
    """

    events: tuple[ObjectEvent, ...]
    problems: tuple[Problem, ...]


class Source(Protocol):
    """A source of objects. The agent calls `begin` or `sync` once, then `step` whenever `wait_s` returns 0."""

    @property
    def name(self) -> str:
        """The name of the source in messages, such as the path of a directory."""

    @property
    def has_synced(self) -> bool:
        """Whether the source has returned all its objects at least once. Once True, it stays True.

        It becomes True when `begin`, `sync` or `step` returns the update that completes the objects.
        """

    @property
    def skipped(self) -> Mapping[str, int]:
        """The number of objects of kinds that are not read, by apiVersion and kind."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All present problems of the source."""

    def begin(self) -> SourceUpdate | None:
        """Begin to read. Returns the objects that are known without waiting for a server; `step` returns the others.

        Raises InvalidInputError if the source cannot be read at all.
        """

    def sync(self) -> SourceUpdate:
        """Begin to read, wait until the source has read all its objects, and return the objects.

        Raises InvalidInputError or UnreachableError if the source cannot be read. The caller must not treat an
        unreadable source as one without objects.
        """

    def report(self) -> tuple[Mapping[str, Any], ...]:
        """The data that ``status`` shows for this source, or for each source in it, as values that JSON can represent.

        ``source``: its name. ``type``: its kind of source. ``synced``: see `has_synced`. ``waiting_for``: the kinds, or
        the text "its files", that it must still read to be synced. ``behind``: the kinds or files of which changes do
        not arrive now, each with the reason. The method takes no lock: it runs in a forked child of the agent, in which
        a lock that another thread held would never be released.
        """

    def fileno(self) -> int | None:
        """A file descriptor that becomes readable when the source has new events; None if the source has none."""

    def note_news(self) -> None:
        """Make the descriptor unreadable again. `wait_s` then tells when `step` is due."""

    def wait_s(self) -> float:
        """Seconds after which `step` must be called even if the descriptor is not readable; 0: now."""

    def step(self, pause: Callable[[], None] = never_pause) -> SourceUpdate | None:
        """Do a bounded amount of work. Returns the changes, None if there are none.

        ``pause``: a function to call every few milliseconds during work in this process. This method raises no error
        for the state of the source; the update has it as a problem.
        """

    def release(self, kind: str, *, is_trial: bool = False) -> tuple[str, ...]:
        """Remove the objects of ``kind`` that are kept although its definition was deleted. Returns their names.

        The next `step` returns the removals. ``is_trial``: return the names, but remove nothing. Raises
        InvalidInputError if no object of the kind is kept.
        """

    def close(self) -> None:
        """End the processes and threads of the source, and close its descriptors."""
