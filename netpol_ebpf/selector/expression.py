# SPDX-License-Identifier: Apache-2.0
"""Selectors as values: `Selector`, and functions that build a selector from other selectors or from plain values.

Invariant: a selector is immutable.  Two selectors are equal exactly if their canonical texts are equal.  The caller
decides how selectors are composed for a policy (SEMANTICS 2.6), so this module must not depend on namespaces, kinds or
files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from netpol_ebpf.errors import SelectorError
from netpol_ebpf.selector.lexer import LABEL_NAME
from netpol_ebpf.selector.requirements import Cover, cheapest_cover, covers, is_contradiction
from netpol_ebpf.selector.tree import (
    All,
    And,
    Contains,
    EndsWith,
    Equals,
    Global,
    Has,
    In,
    Not,
    NotEquals,
    NotIn,
    Or,
    SelectorNode,
    StartsWith,
    negated,
    walk,
)


class Selector:
    """A selector expression. Selectors with the same canonical text are equal. ``str()`` returns the canonical text."""

    __slots__ = ("_hash", "_root", "_text")

    _hash: int
    _root: SelectorNode
    _text: str

    def __init__(self, root: SelectorNode) -> None:
        text = str(root)
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_hash", hash(text))

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels satisfy the selector. Cost: linear in the length of the expression; nothing is allocated."""
        return self._root.matches(labels)

    @property
    def root(self) -> SelectorNode:
        """The expression tree (`netpol_ebpf.selector.tree`)."""
        return self._root

    @property
    def is_everything(self) -> bool:
        """Whether the selector is exactly ``all()``. Empty text also means ``all()``."""
        return isinstance(self._root, All)

    @property
    def is_global(self) -> bool:
        """Whether the selector is exactly ``global()``."""
        return isinstance(self._root, Global)

    @property
    def mentions_global(self) -> bool:
        """Whether ``global()`` occurs anywhere in the selector."""
        return any(isinstance(node, Global) for node in walk(self._root))

    def label_keys(self) -> frozenset[str]:
        """The names of all labels in the selector. Other labels cannot change whether the selector matches."""
        return frozenset(node.key for node in walk(self._root) if not isinstance(node, (All, Global, Not, And, Or)))

    def prefixed(self, prefix: str) -> Selector:
        """The same expression with ``prefix`` before each label name, also inside ``has`` and negations.

        Raises SelectorError if the prefix has characters that a label name cannot have.
        """
        _check_key(prefix)
        return Selector(_rewritten(self._root, lambda leaf: _with_prefix(leaf, prefix)))

    def with_all_as(self, replacement: Selector) -> Selector:
        """The same expression with ``replacement`` in place of each ``all()``."""
        root = replacement.root
        return Selector(_rewritten(self._root, lambda leaf: root if isinstance(leaf, All) else leaf))

    def required(self) -> Cover | None:
        """The known cover of the selector with the fewest values.

        A cover is a list of restrictions of which matching labels satisfy at least one
        (`netpol_ebpf.selector.requirements`).  Returns () if the selector matches nothing, and None if no cover is
        known.
        """
        return cheapest_cover(self.requirements())

    def requirements(self) -> tuple[Cover, ...]:
        """All known covers of the selector. Matching labels satisfy at least one restriction of each cover."""
        return covers(self._root)

    def is_unsatisfiable(self) -> bool:
        """True if it is certain that no labels match, as for ``a == 'x' && a == 'y'``.

        If the result is False, it is not known whether any labels match.
        """
        return is_contradiction(self._root)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Selector is immutable; {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Selector is immutable; {name} cannot be deleted")

    def __reduce__(self) -> tuple[type[Selector], tuple[SelectorNode]]:
        return (Selector, (self._root,))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selector):
            return NotImplemented
        return self is other or self._text == other._text

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<Selector {self._text}>"


def _with_prefix(leaf: SelectorNode, prefix: str) -> SelectorNode:
    if isinstance(leaf, (All, Global, Not, And, Or)):
        return leaf
    if isinstance(leaf, Has):
        return Has(prefix + leaf.key)
    if isinstance(leaf, In):
        return In(prefix + leaf.key, leaf.values)
    if isinstance(leaf, NotIn):
        return NotIn(prefix + leaf.key, leaf.values)
    if isinstance(leaf, Equals):
        return Equals(prefix + leaf.key, leaf.value)
    if isinstance(leaf, NotEquals):
        return NotEquals(prefix + leaf.key, leaf.value)
    if isinstance(leaf, Contains):
        return Contains(prefix + leaf.key, leaf.value)
    if isinstance(leaf, StartsWith):
        return StartsWith(prefix + leaf.key, leaf.value)
    return EndsWith(prefix + leaf.key, leaf.value)


def _rewritten(node: SelectorNode, change: Callable[[SelectorNode], SelectorNode]) -> SelectorNode:
    """A copy of the tree with ``change`` applied to each leaf."""
    if isinstance(node, Not):
        return negated(_rewritten(node.operand, change))
    if isinstance(node, And):
        return And(tuple(_rewritten(operand, change) for operand in node.operands))
    if isinstance(node, Or):
        return Or(tuple(_rewritten(operand, change) for operand in node.operands))
    return change(node)


EVERYTHING = Selector(All())
"""The selector ``all()``."""


def all_of(*selectors: Selector) -> Selector:
    """The conjunction (AND) of ``selectors``.

    Nested ANDs are flattened, and repeated operands are dropped.  A single operand is returned unchanged.  Without
    operands the result is `EVERYTHING`.  An operand ``all()`` is kept, because `Selector.with_all_as` may replace it.
    """
    operands: dict[SelectorNode, None] = {}
    for selector in selectors:
        operands.update(dict.fromkeys(selector.root.operands if isinstance(selector.root, And) else (selector.root,)))
    if not operands:
        return EVERYTHING
    return Selector(next(iter(operands)) if len(operands) == 1 else And(tuple(operands)))


def any_of(first: Selector, *others: Selector) -> Selector:
    """The disjunction (OR) of the operands.

    Nested ORs are flattened, and repeated operands are dropped.  A single operand is returned unchanged.
    """
    operands: dict[SelectorNode, None] = {}
    for selector in (first, *others):
        operands.update(dict.fromkeys(selector.root.operands if isinstance(selector.root, Or) else (selector.root,)))
    return Selector(next(iter(operands)) if len(operands) == 1 else Or(tuple(operands)))


def negate(selector: Selector) -> Selector:
    """The negation (NOT). The negation of a negation is its operand."""
    return Selector(negated(selector.root))


def has(key: str) -> Selector:
    """``has(key)``: true if the label is present. Raises SelectorError if ``key`` is not a label name."""
    return Selector(Has(_check_key(key)))


def equals(key: str, value: str) -> Selector:
    """``key == "value"``: false if the label is absent. Raises SelectorError if ``key`` is not a label name."""
    return Selector(Equals(_check_key(key), value))


def not_equals(key: str, value: str) -> Selector:
    """``key != "value"``: true if the label is absent. Raises SelectorError if ``key`` is not a label name."""
    return Selector(NotEquals(_check_key(key), value))


def is_in(key: str, values: Iterable[str]) -> Selector:
    """``key in {...}``: false if the label is absent or ``values`` is empty.

    Raises SelectorError if ``key`` is not a label name.
    """
    return Selector(In(_check_key(key), values))


def not_in(key: str, values: Iterable[str]) -> Selector:
    """``key not in {...}``: true if the label is absent or ``values`` is empty.

    Raises SelectorError if ``key`` is not a label name.
    """
    return Selector(NotIn(_check_key(key), values))


def _check_key(key: str) -> str:
    name = LABEL_NAME.match(key)
    end = name.end() if name else 0
    if end != len(key) or not key:
        raise SelectorError(
            "not a label name", text=key, offset=end, hint="Label names have letters, digits and _ . / -"
        )
    return key
