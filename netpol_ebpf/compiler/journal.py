# SPDX-License-Identifier: Apache-2.0
"""The undo log of one commit: every change to the compiler's state is made through the log and can be rolled back.

Invariant: after `Journal.rollback` each container and attribute that was changed through the journal has its earlier
content.  The journal does not depend on the meaning of the state.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_ABSENT: Any = object()
_MAPPING, _ADDED, _DISCARDED, _ATTRIBUTE, _CALL = range(5)


class Journal:
    """Undo log of a commit: makes changes to the compiler's state and records them in order.

    Each method except `rollback` takes constant time.
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[tuple[int, Any, Any, Any]] = []

    def put(self, mapping: MutableMapping[K, V], key: K, value: V) -> None:
        """``mapping[key] = value``."""
        self._entries.append((_MAPPING, mapping, key, mapping.get(key, _ABSENT)))
        mapping[key] = value

    def pop(self, mapping: MutableMapping[K, V], key: K) -> V:
        """``mapping.pop(key)``; raises KeyError if the key is absent."""
        value = mapping.pop(key)
        self._entries.append((_MAPPING, mapping, key, value))
        return value

    def add(self, members: set[K], member: K) -> None:
        """``members.add(member)``."""
        if member not in members:
            self._entries.append((_ADDED, members, member, None))
            members.add(member)

    def discard(self, members: set[K], member: K) -> None:
        """``members.discard(member)``."""
        if member in members:
            self._entries.append((_DISCARDED, members, member, None))
            members.remove(member)

    def add_to(self, index: dict[K, set[V]], key: K, member: V) -> None:
        """``index.setdefault(key, set()).add(member)``."""
        members = index.get(key)
        if members is None:
            members = set()
            self.put(index, key, members)
        self.add(members, member)

    def discard_from(self, index: dict[K, set[V]], key: K, member: V) -> None:
        """``index[key].discard(member)``; removes the key if no member is left.

        Raises KeyError if the key is absent.
        """
        members = index[key]
        self.discard(members, member)
        if not members:
            self.pop(index, key)

    def assign(self, thing: object, name: str, value: object) -> None:
        """``setattr(thing, name, value)``."""
        self._entries.append((_ATTRIBUTE, thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    def on_rollback(self, undo: Callable[[], object]) -> None:
        """Register a function that undoes a change of the caller. `rollback` calls it at this point of the log."""
        self._entries.append((_CALL, undo, None, None))

    def rollback(self) -> None:
        """Undo every change, the last one first."""
        while self._entries:
            kind, thing, key, value = self._entries.pop()
            if kind == _MAPPING:
                if value is _ABSENT:
                    del thing[key]
                else:
                    thing[key] = value
            elif kind == _ADDED:
                thing.remove(key)
            elif kind == _DISCARDED:
                thing.add(key)
            elif kind == _ATTRIBUTE:
                setattr(thing, key, value)
            else:
                thing()


class Unjournaled(Journal):
    """A journal that makes the changes and records nothing. Used for the first commit.

    If the first commit fails, the whole state is dropped and a new state is created.
    """

    __slots__ = ()

    def put(self, mapping: MutableMapping[K, V], key: K, value: V) -> None:
        """As in the base class."""
        mapping[key] = value

    def pop(self, mapping: MutableMapping[K, V], key: K) -> V:
        """As in the base class."""
        return mapping.pop(key)

    def add(self, members: set[K], member: K) -> None:
        """As in the base class."""
        members.add(member)

    def discard(self, members: set[K], member: K) -> None:
        """As in the base class."""
        members.discard(member)

    def assign(self, thing: object, name: str, value: object) -> None:
        """As in the base class."""
        setattr(thing, name, value)

    def on_rollback(self, undo: Callable[[], object]) -> None:
        """Do nothing: this journal never rolls back."""

    def rollback(self) -> None:
        """Raise AssertionError: this journal cannot roll back."""
        raise AssertionError("the first commit is not journaled")
