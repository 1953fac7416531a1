# SPDX-License-Identifier: Apache-2.0
"""Selectors against plain restatements of their semantics, on generated expressions and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from strategies import selector_trees

from netpol_ebpf.selector import EVERYTHING, Selector, SelectorError, SelectorIndex, negate, parse
from netpol_ebpf.selector.tree import (
    All,
    And,
    Contains,
    EndsWith,
    Equals,
    Global,
    In,
    Not,
    NotEquals,
    NotIn,
    Or,
    SelectorNode,
    StartsWith,
)  # fmt: skip

KEYS = ("a", "b", "in", "p.a/x")
VALUES = ("", "x", "y", "xy", "yx", 'a"b', "a'b")

trees: st.SearchStrategy[SelectorNode] = selector_trees(KEYS, VALUES)
selectors: st.SearchStrategy[Selector] = trees.map(Selector)
labels: st.SearchStrategy[dict[str, str]] = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3)


def _evaluate(node: SelectorNode, given_labels: Mapping[str, str]) -> bool:
    """The table of absent and present labels, written out once more and in another way."""
    if isinstance(node, (All, Global)):
        return True
    if isinstance(node, Not):
        return not _evaluate(node.operand, given_labels)
    if isinstance(node, And):
        return all(_evaluate(operand, given_labels) for operand in node.operands)
    if isinstance(node, Or):
        return any(_evaluate(operand, given_labels) for operand in node.operands)
    if node.key not in given_labels:
        return isinstance(node, (NotEquals, NotIn))
    value = given_labels[node.key]
    if isinstance(node, (In, NotIn)):
        return (value in list(node.values)) is isinstance(node, In)
    if isinstance(node, (Equals, NotEquals)):
        return (value == node.value) is isinstance(node, Equals)
    if isinstance(node, Contains):
        return value.find(node.value) >= 0
    if isinstance(node, StartsWith):
        return value[: len(node.value)] == node.value
    if isinstance(node, EndsWith):
        return not node.value or value[-len(node.value) :] == node.value
    return True


@given(trees, labels)
def test_evaluation(tree: SelectorNode, some: dict[str, str]) -> None:
    """A selector matches exactly what the semantics say, and its negation everything else."""
    selector = Selector(tree)
    assert selector.matches(some) is _evaluate(tree, some)
    assert negate(selector).matches(some) is not selector.matches(some)


@given(selectors, selectors)
def test_canonical_text_parses_back(one: Selector, other: Selector) -> None:
    """Canonical text parses to an equal tree; different trees have different texts."""
    assert parse(str(one)).root == one.root
    assert (str(one) == str(other)) is (one.root == other.root)


@given(st.text(alphabet="ab !&|=(){}'\",in\thas", max_size=24))
def test_any_text_parses_or_is_refused_in_place(text: str) -> None:
    """Any text is a selector with a stable canonical text, or an error with an offset inside it."""
    try:
        selector = parse(text)
    except SelectorError as error:
        assert 0 <= error.offset <= len(text)  # noqa: PT017  # either outcome is right
    else:
        assert parse(str(selector)) == selector


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda text: text.replace("not in", "notin").replace("starts with", "startswith"),
    lambda text: text.replace(" && ", "&&").replace(" || ", "\t||  "),
    lambda text: f" ({text}) ",
    lambda text: f"!!{text}" if text.startswith("(") else text,
)


@given(selectors.filter(lambda selector: "'" not in str(selector)), st.sampled_from(_SPELLINGS))
def test_spellings(selector: Selector, respell: Callable[[str], str]) -> None:
    """Other spacings, joined word operators and redundant parentheses are the same selector."""
    assert parse(respell(str(selector))) == selector


@given(selectors, labels)
def test_label_keys_suffice(selector: Selector, some: dict[str, str]) -> None:
    """Labels that a selector does not name never matter."""
    keys = selector.label_keys()
    assert selector.matches({key: value for key, value in some.items() if key in keys}) is selector.matches(some)


@given(selectors, labels)
def test_prefix_moves_the_labels(selector: Selector, some: dict[str, str]) -> None:
    """A prefixed selector says of prefixed labels what the plain one says of plain labels, and sees no others."""
    moved = {f"pcns.{key}": value for key, value in some.items()}
    assert selector.prefixed("pcns.").matches({**some, **moved}) is selector.matches(some)


@given(selectors, selectors, labels)
def test_all_is_replaced_everywhere(selector: Selector, replacement: Selector, some: dict[str, str]) -> None:
    """Replacing all() by something true changes no answer, and by itself no text."""
    assert selector.with_all_as(EVERYTHING) == selector
    if replacement.matches(some):
        assert selector.with_all_as(replacement).matches(some) is selector.matches(some)


@settings(max_examples=5 * settings().max_examples)
@given(selectors, labels)
def test_requirements_and_contradictions_are_sound(selector: Selector, some: dict[str, str]) -> None:
    """Labels that match satisfy every requirement, and a selector that matches anything is no contradiction."""
    if selector.matches(some):
        assert not selector.is_unsatisfiable()
        for cover in selector.requirements():
            assert any(part.matches_value(some.get(part.key)) for part in cover)
        required = selector.required()
        assert required is None or required in selector.requirements()


class IndexMachine(RuleBasedStateMachine):
    """Any sequence of changes: the index answers like testing every pair."""

    def __init__(self) -> None:
        super().__init__()
        self.index: SelectorIndex[int, str] = SelectorIndex()
        self.selectors: dict[int, Selector] = {}
        self.labels: dict[str, dict[str, str]] = {}

    @rule(number=st.integers(0, 5), selector=selectors)
    def add_selector(self, number: int, selector: Selector) -> None:
        """Add or replace a selector."""
        self.selectors[number] = selector
        assert self.index.add_selector(number, selector) == self._labels_of(number)

    @rule(number=st.integers(0, 5))
    def remove_selector(self, number: int) -> None:
        """Remove a selector that may be there."""
        self.selectors.pop(number, None)
        self.index.remove_selector(number)

    @rule(name=st.sampled_from("pqrstu"), some=labels)
    def add_labels(self, name: str, some: dict[str, str]) -> None:
        """Add or replace a label set."""
        self.labels[name] = some
        assert self.index.add_labels(name, some) == self._selectors_of(name)

    @rule(name=st.sampled_from("pqrstu"))
    def remove_labels(self, name: str) -> None:
        """Remove a label set that may be there."""
        self.labels.pop(name, None)
        self.index.remove_labels(name)

    @invariant()
    def answers_are_exact(self) -> None:
        """Both queries agree with brute force."""
        for number in self.selectors:
            assert self.index.matching_labels(number) == self._labels_of(number)
        for name in self.labels:
            assert self.index.matching_selectors(name) == self._selectors_of(name)

    def teardown(self) -> None:
        """An emptied index holds nothing."""
        for number in range(6):
            self.index.remove_selector(number)
        for name in "pqrstu":
            self.index.remove_labels(name)
        assert not any(map(len, vars(self.index).values()))

    def _labels_of(self, number: int) -> set[str]:
        return {name for name, some in self.labels.items() if self.selectors[number].matches(some)}

    def _selectors_of(self, name: str) -> set[int]:
        return {number for number, selector in self.selectors.items() if selector.matches(self.labels[name])}


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestIndex = IndexMachine.TestCase
