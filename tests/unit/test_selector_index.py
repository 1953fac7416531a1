# SPDX-License-Identifier: Apache-2.0
"""The incremental index: exact answers, replacement, removal, and no product of both sides."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from netpol_ebpf.selector import Selector, SelectorIndex, equals, parse
from netpol_ebpf.selector.tree import SelectorNode


def test_both_sides_answer() -> None:
    """Each addition returns what it matches on the other side, and the queries agree."""
    index: SelectorIndex[str, int] = SelectorIndex()
    assert index.add_selector("x", parse("a == 'x'")) == set()
    assert index.add_selector("not x", parse("a != 'x'")) == set()
    assert index.add_labels(1, {"a": "x"}) == {"x"}
    assert index.add_labels(2, {}) == {"not x"}
    assert index.add_selector("has", parse("has(a)")) == {1}
    assert index.add_selector("all", parse("")) == {1, 2}
    assert index.matching_labels("not x") == {2}
    assert index.matching_selectors(1) == {"x", "has", "all"}
    assert index.selector("x") == parse("a == 'x'")
    assert index.labels(1) == {"a": "x"}


def test_replacing_an_id() -> None:
    """Adding under a known id replaces, on both sides; the same content again is no change."""
    index: SelectorIndex[str, str] = SelectorIndex()
    index.add_labels("p", {"a": "x"})
    index.add_selector("s", parse("a == 'x'"))
    assert index.add_selector("s", parse("a == 'y'")) == set()
    assert index.matching_selectors("p") == set()
    assert index.add_labels("p", {"a": "y"}) == {"s"}
    assert index.add_labels("p", {"a": "y"}) == {"s"}
    assert index.matching_labels("s") == {"p"}


def test_equal_content_under_several_ids() -> None:
    """Ids that share a selector or a label set come and go on their own."""
    index: SelectorIndex[int, str] = SelectorIndex()
    index.add_selector(1, parse("a in {'x'} || b == 'y'"))
    index.add_selector(2, parse("(a in {'x'} || b == 'y')"))
    index.add_labels("p", {"a": "x", "b": "y"})
    assert index.add_labels("q", {"b": "y", "a": "x"}) == {1, 2}
    index.remove_selector(1)
    assert index.matching_selectors("q") == {2}
    index.remove_labels("p")
    assert index.matching_labels(2) == {"q"}
    index.remove_labels("q")
    assert index.matching_labels(2) == set()


def test_unknown_ids() -> None:
    """A query for an unknown id is an error, its removal is no change."""
    index: SelectorIndex[int, int] = SelectorIndex()
    index.remove_selector(1)
    index.remove_labels(1)
    for query in (index.matching_labels, index.matching_selectors, index.selector, index.labels):
        with pytest.raises(KeyError):
            query(1)


def test_labels_are_copied() -> None:
    """The caller may change its mapping afterwards."""
    index: SelectorIndex[str, str] = SelectorIndex()
    index.add_selector("s", parse("a == 'x'"))
    labels = {"a": "x"}
    index.add_labels("p", labels)
    labels["a"] = "y"
    assert index.matching_labels("s") == {"p"}
    index.remove_labels("p")
    assert index.matching_labels("s") == set()


def test_everything_removed_leaves_nothing() -> None:
    """An emptied index holds no row, count or bucket of what it held."""
    index: SelectorIndex[int, int] = SelectorIndex()
    texts = ["a == 'x'", "has(a) && b in {'x','y'}", "a != 'x'", "", "a in {}", "a == 'x' || b == 'y'"]
    for number, text in enumerate(texts):
        index.add_selector(number, parse(text))
        index.add_labels(number, {"a": "x", "b": str(number % 3)})
    for number in range(len(texts)):
        index.remove_labels(number)
        index.remove_selector(number)
    for name in vars(index):
        assert not len(getattr(index, name)), name


class _Counting(Selector):
    """A selector that counts how often it is tested."""

    __slots__ = ()
    tests = 0

    def __init__(self, root: SelectorNode) -> None:
        super().__init__(root)

    def matches(self, labels: Mapping[str, str]) -> bool:
        type(self).tests += 1
        return super().matches(labels)


def test_not_a_product() -> None:
    """Selectors that share a common term are still found by their own: few pairs are tested, in either order."""
    namespaces, applications = 20, 25
    for labels_first in (True, False):
        _Counting.tests = 0
        index: SelectorIndex[tuple[int, int], tuple[int, int]] = SelectorIndex()
        pairs = [(namespace, application) for namespace in range(namespaces) for application in range(applications)]

        def add_labels(
            index: SelectorIndex[tuple[int, int], tuple[int, int]] = index, pairs: list[tuple[int, int]] = pairs
        ) -> None:
            for namespace, application in pairs:
                labels = {"orchestrator": "k8s", "namespace": str(namespace), "app": f"{namespace}-{application}"}
                index.add_labels((namespace, application), labels)

        if labels_first:
            add_labels()
        for namespace, application in pairs:
            text = f"orchestrator == 'k8s' && namespace == '{namespace}' && app == '{namespace}-{application}'"
            index.add_selector((namespace, application), _Counting(parse(text).root))
        if not labels_first:
            add_labels()
        assert all(index.matching_labels(pair) == {pair} for pair in pairs)
        assert all(index.matching_selectors(pair) == {pair} for pair in pairs)
        # Each query should test one candidate; the product would be 250 000 for each of the two rounds of queries.
        assert _Counting.tests < 10 * len(pairs)


def test_a_lone_value_among_many() -> None:
    """A present-label term finds all values, whatever else is there."""
    index: SelectorIndex[str, int] = SelectorIndex()
    for number in range(50):
        index.add_labels(number, {"k": str(number)} if number % 2 else {"other": str(number)})
    assert index.add_selector("has", parse("has(k)")) == set(range(1, 50, 2))
    assert index.add_selector("one", equals("k", "7")) == {7}
    assert index.add_selector("starts", parse("k starts with '1'")) == {1, 11, 13, 15, 17, 19}
