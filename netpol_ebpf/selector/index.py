# SPDX-License-Identifier: Apache-2.0
"""Finds the matching pairs of many selectors and many label sets, while both change.

Invariant: after any sequence of calls the results are the same as if every selector were tested on every label set.
The indexes only reduce the number of tests.  Equal selectors are stored and tested once, whatever the number of their
ids; so are equal label sets.  Matching pairs are computed on request and not stored, so memory grows with the sum of
selectors and label sets, not with their product.

Two inverted indexes reduce the tests.  Both use *covers*: conditions that every matching label set satisfies, as lists
of (label, value) pairs of which the label set must have at least one (`netpol_ebpf.selector.requirements`).

1.  A selector is indexed under the pairs of one of its covers: the cover under which there are the fewest other
   selectors.  So selectors are not indexed under the namespace's label if all of them have that label.  A new label set
   is tested against the selectors under its own pairs, and against the selectors without a cover.
2.  A label set is indexed under each of its pairs.  A new selector is tested on the label sets under the pairs of one
   of its covers: the cover with the fewest label sets.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Generic, TypeVar

from netpol_ebpf.selector.expression import Selector
from netpol_ebpf.selector.requirements import Cover

S = TypeVar("S", bound=Hashable)
L = TypeVar("L", bound=Hashable)
T = TypeVar("T", bound=Hashable)

_Pair = tuple[str, "str | None"]
"""(label, value). If the value is None, the pair stands for the label with any value."""


class _SelectorGroup(Generic[S]):
    """One distinct selector.

    ``ids``: the ids of this selector.
    ``pairs``: the pairs under which the selector is indexed; None if it has no cover and is always tested.
    """

    __slots__ = ("ids", "pairs", "selector")

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.ids: set[S] = set()
        self.pairs: tuple[_Pair, ...] | None = None


class _LabelGroup(Generic[L]):
    """One distinct label set. ``ids``: the ids of this label set."""

    __slots__ = ("ids", "labels")

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.ids: set[L] = set()


class _Bag(Generic[T]):
    """Maps a key to a set of members.

    A single member is stored without a set to save memory, because most keys of a large index have one member.
    """

    __slots__ = ("_members",)

    def __init__(self) -> None:
        self._members: dict[Hashable, T | set[T]] = {}

    def add(self, key: Hashable, member: T) -> None:
        known = self._members.get(key)
        if known is None:
            self._members[key] = member
        elif isinstance(known, set):
            known.add(member)
        else:
            self._members[key] = {known, member}

    def remove(self, key: Hashable, member: T) -> None:
        known = self._members[key]
        if isinstance(known, set):
            known.remove(member)
            if len(known) == 1:
                self._members[key] = known.pop()
        else:
            del self._members[key]

    def get(self, key: Hashable) -> Iterable[T]:
        known = self._members.get(key)
        if known is None:
            return ()
        return known if isinstance(known, set) else (known,)

    def count(self, key: Hashable) -> int:
        known = self._members.get(key)
        if known is None:
            return 0
        return len(known) if isinstance(known, set) else 1

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


class SelectorIndex(Generic[S, L]):
    """The matching pairs of selectors and label sets. Selectors have ids of type S, label sets have ids of type L."""

    def __init__(self) -> None:
        self._selectors: dict[S, _SelectorGroup[S]] = {}
        self._selector_groups: dict[Selector, _SelectorGroup[S]] = {}
        self._waiting: _Bag[_SelectorGroup[S]] = _Bag()
        self._uncovered: set[_SelectorGroup[S]] = set()
        self._mentions: dict[_Pair, int] = {}
        self._labels: dict[L, _LabelGroup[L]] = {}
        self._label_groups: dict[tuple[str, ...], _LabelGroup[L]] = {}
        self._having: dict[str, _Bag[_LabelGroup[L]]] = {}
        self._key_counts: dict[str, int] = {}

    # --- changes ----------------------------------------------------------------------------------------------------

    def add_selector(self, selector_id: S, selector: Selector) -> set[L]:
        """Add a selector, or replace the one with the same id.

        Returns the ids of the label sets that the selector matches.
        """
        known = self._selectors.get(selector_id)
        if known is None or known.selector != selector:
            self.remove_selector(selector_id)
            group = self._selector_groups.get(selector)
            if group is None:
                group = self._new_selector_group(selector)
            group.ids.add(selector_id)
            self._selectors[selector_id] = group
        return self.matching_labels(selector_id)

    def remove_selector(self, selector_id: S) -> None:
        """Remove a selector. If the id is unknown, nothing changes."""
        group = self._selectors.pop(selector_id, None)
        if group is None:
            return
        group.ids.remove(selector_id)
        if not group.ids:
            self._drop_selector_group(group)

    def add_labels(self, labels_id: L, labels: Mapping[str, str]) -> set[S]:
        """Add a copy of a label set, or replace the label set with the same id.

        Returns the ids of the selectors that match the label set.
        """
        known = self._labels.get(labels_id)
        if known is None or known.labels != labels:
            self.remove_labels(labels_id)
            signature = tuple(chain.from_iterable(sorted(labels.items())))
            group = self._label_groups.get(signature)
            if group is None:
                group = self._new_label_group(signature, labels)
            group.ids.add(labels_id)
            self._labels[labels_id] = group
        return self.matching_selectors(labels_id)

    def remove_labels(self, labels_id: L) -> None:
        """Remove a label set. If the id is unknown, nothing changes."""
        group = self._labels.pop(labels_id, None)
        if group is None:
            return
        group.ids.remove(labels_id)
        if not group.ids:
            self._drop_label_group(group)

    # --- look-up ----------------------------------------------------------------------------------------------------

    def matching_labels(self, selector_id: S) -> set[L]:
        """The ids of the label sets that a selector matches, as a new set. Raises KeyError for an unknown id."""
        selector = self._selectors[selector_id].selector
        found: set[L] = set()
        for group in self._label_candidates(selector.requirements()):
            if selector.matches(group.labels):
                found |= group.ids
        return found

    def matching_selectors(self, labels_id: L) -> set[S]:
        """The ids of the selectors that match a label set, as a new set. Raises KeyError for an unknown id."""
        labels = self._labels[labels_id].labels
        found: set[S] = set()
        for group in self._selector_candidates(labels):
            if group.selector.matches(labels):
                found |= group.ids
        return found

    def selector(self, selector_id: S) -> Selector:
        """The selector with this id. Raises KeyError for an unknown id."""
        return self._selectors[selector_id].selector

    def labels(self, labels_id: L) -> Mapping[str, str]:
        """The label set with this id; read-only for callers. Raises KeyError for an unknown id."""
        return self._labels[labels_id].labels

    # --- selectors, found by labels ---------------------------------------------------------------------------------

    def _selector_candidates(self, labels: Mapping[str, str]) -> Iterator[_SelectorGroup[S]]:
        """The distinct selectors that may match ``labels``. A selector may be yielded more than once."""
        yield from self._uncovered
        if len(self._waiting):
            for key, value in labels.items():
                yield from self._waiting.get((key, value))
                yield from self._waiting.get((key, None))

    def _new_selector_group(self, selector: Selector) -> _SelectorGroup[S]:
        group: _SelectorGroup[S] = _SelectorGroup(selector)
        candidates = [tuple(_pairs(cover)) for cover in selector.requirements()]
        for pair in chain.from_iterable(candidates):
            self._mentions[pair] = self._mentions.get(pair, 0) + 1
        if candidates:
            group.pairs = min(candidates, key=self._popularity)
        if group.pairs is None:
            self._uncovered.add(group)
        else:
            for pair in group.pairs:
                self._waiting.add(pair, group)
        self._selector_groups[selector] = group
        return group

    def _popularity(self, pairs: tuple[_Pair, ...]) -> tuple[int, int, int]:
        """A sort key for the choice of the pairs under which a selector is indexed; the smallest is best.

        The first item estimates how many tests the selector costs if it is indexed under ``pairs``.
        """
        present = sum(value is None for _, value in pairs)
        labelled = sum(self._labels_having(pair) for pair in pairs)
        return (sum(self._mentions[pair] for pair in pairs) + labelled, present, len(pairs))

    def _drop_selector_group(self, group: _SelectorGroup[S]) -> None:
        del self._selector_groups[group.selector]
        if group.pairs is None:
            self._uncovered.remove(group)
        else:
            for pair in group.pairs:
                self._waiting.remove(pair, group)
        for pair in chain.from_iterable(_pairs(cover) for cover in group.selector.requirements()):
            self._mentions[pair] -= 1
            if not self._mentions[pair]:
                del self._mentions[pair]

    # --- label sets, found by selectors -----------------------------------------------------------------------------

    def _label_candidates(self, candidates: tuple[Cover, ...]) -> Iterable[_LabelGroup[L]]:
        """The distinct label sets that a selector with the covers ``candidates`` may match, each once."""
        if not candidates:
            return self._label_groups.values()
        sizes = [sum(self._labels_having(pair) for pair in _pairs(cover)) for cover in candidates]
        cover = candidates[sizes.index(min(sizes))]
        if len(cover) == 1:
            return self._groups_having(cover[0].key, cover[0].one_of)
        # The result is a set, because a group may have two keys of the cover.
        return set(chain.from_iterable(self._groups_having(part.key, part.one_of) for part in cover))

    def _groups_having(self, key: str, values: frozenset[str] | None) -> Iterator[_LabelGroup[L]]:
        bag = self._having.get(key)
        if bag is not None:
            for value in bag if values is None else values:
                yield from bag.get(value)

    def _labels_having(self, pair: _Pair) -> int:
        key, value = pair
        bag = self._having.get(key)
        if bag is None:
            return 0
        return self._key_counts[key] if value is None else bag.count(value)

    def _new_label_group(self, signature: tuple[str, ...], labels: Mapping[str, str]) -> _LabelGroup[L]:
        group: _LabelGroup[L] = _LabelGroup(dict(labels))
        for key, value in group.labels.items():
            bag = self._having.get(key)
            if bag is None:
                bag = self._having[key] = _Bag()
            bag.add(value, group)
            self._key_counts[key] = self._key_counts.get(key, 0) + 1
        self._label_groups[signature] = group
        return group

    def _drop_label_group(self, group: _LabelGroup[L]) -> None:
        del self._label_groups[tuple(chain.from_iterable(sorted(group.labels.items())))]
        for key, value in group.labels.items():
            self._having[key].remove(value, group)
            self._key_counts[key] -= 1
            if not self._key_counts[key]:
                del self._having[key], self._key_counts[key]


def _pairs(cover: Cover) -> Iterator[_Pair]:
    """The (label, value) pairs of a cover. Matching labels have at least one of these pairs."""
    for part in cover:
        if part.one_of is None:
            yield (part.key, None)
        else:
            for value in part.one_of:
                yield (part.key, value)
