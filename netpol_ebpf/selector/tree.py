# SPDX-License-Identifier: Apache-2.0
"""The tree of a selector expression: evaluation on labels (SEMANTICS 2.3) and canonical text (2.4).

Invariants: nodes are immutable.  A tree has no double negation, and its sets are sorted without repetition, so the
parser makes an equal tree of the canonical text.

There are three exceptions, which only the functions of `expression` can produce, for example from a Kubernetes
LabelSelector.  The parser rejects the canonical text of values with single and double quotes, of values with a line
break, and of label names that a prefix makes longer than the parser's limit.  A value with both kinds of quotes is
rendered in double quotes, with each inner double quote doubled (`k == "a""b'c"`); no other selector has this text.
This module must not depend on parsing or composition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Union


def render_string(value: str) -> str:
    """A string literal. It has double quotes, or single quotes if the value has double quotes.

    The module's docstring describes the literal of a value with both kinds of quotes.
    """
    if '"' not in value:
        return f'"{value}"'
    if "'" not in value:
        return f"'{value}'"
    return '"' + value.replace('"', '""') + '"'


def _render_set(values: tuple[str, ...]) -> str:
    return "{" + ", ".join(render_string(value) for value in values) + "}"


@dataclass(frozen=True, slots=True)
class All:
    """The operator all(): true for any labels."""

    def matches(self, labels: Mapping[str, str]) -> bool:  # noqa: ARG002  # one signature for all nodes
        """Always true."""
        return True

    def __str__(self) -> str:
        return "all()"


@dataclass(frozen=True, slots=True)
class Global:
    """The operator global(): true for any labels. In a namespace selector the translation of policies replaces it."""

    def matches(self, labels: Mapping[str, str]) -> bool:  # noqa: ARG002  # one signature for all nodes
        """Always true."""
        return True

    def __str__(self) -> str:
        return "global()"


@dataclass(frozen=True, slots=True)
class Has:
    """The operator has(key): true if the label is present, even with an empty value."""

    key: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is present."""
        return self.key in labels

    def __str__(self) -> str:
        return f"has({self.key})"


@dataclass(frozen=True, slots=True)
class Equals:
    """The operator ``key == value``: false if the label is absent."""

    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is present with exactly this value."""
        return labels.get(self.key) == self.value

    def __str__(self) -> str:
        return f"{self.key} == {render_string(self.value)}"


@dataclass(frozen=True, slots=True)
class NotEquals:
    """The operator ``key != value``: true if the label is absent."""

    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is absent or has another value."""
        return labels.get(self.key) != self.value

    def __str__(self) -> str:
        return f"{self.key} != {render_string(self.value)}"


@dataclass(frozen=True, slots=True, init=False)
class _Membership:
    """A key and a set of values.

    ``values``: sorted and without repetition.
    ``members``: the same values as a set, for fast look-up.
    """

    key: str
    values: tuple[str, ...]
    members: frozenset[str]

    def __init__(self, key: str, values: Iterable[str]) -> None:
        members = frozenset(values)
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "values", tuple(sorted(members)))
        object.__setattr__(self, "members", members)


@dataclass(frozen=True, slots=True, init=False)
class In(_Membership):
    """The operator ``key in {values}``: false if the label is absent."""

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is present with one of the values."""
        return labels.get(self.key) in self.members

    def __str__(self) -> str:
        return f"{self.key} in {_render_set(self.values)}"


@dataclass(frozen=True, slots=True, init=False)
class NotIn(_Membership):
    """The operator ``key not in {values}``: true if the label is absent."""

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is absent or has none of the values."""
        return labels.get(self.key) not in self.members

    def __str__(self) -> str:
        return f"{self.key} not in {_render_set(self.values)}"


@dataclass(frozen=True, slots=True)
class Contains:
    """The operator ``key contains text``: false if the label is absent. Every value contains the empty text."""

    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is present and its value contains the text."""
        actual = labels.get(self.key)
        return actual is not None and self.value in actual

    def __str__(self) -> str:
        return f"{self.key} contains {render_string(self.value)}"


@dataclass(frozen=True, slots=True)
class StartsWith:
    """The operator ``key starts with text``: false if the label is absent."""

    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is present and its value begins with the text."""
        actual = labels.get(self.key)
        return actual is not None and actual.startswith(self.value)

    def __str__(self) -> str:
        return f"{self.key} starts with {render_string(self.value)}"


@dataclass(frozen=True, slots=True)
class EndsWith:
    """The operator ``key ends with text``: false if the label is absent."""

    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the key is present and its value ends with the text."""
        actual = labels.get(self.key)
        return actual is not None and actual.endswith(self.value)

    def __str__(self) -> str:
        return f"{self.key} ends with {render_string(self.value)}"


@dataclass(frozen=True, slots=True)
class Not:
    """Boolean NOT. Only `negated` makes this node, and it never makes a NOT of a NOT."""

    operand: SelectorNode

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the operand does not match."""
        return not self.operand.matches(labels)

    def __str__(self) -> str:
        return f"!{self.operand}"


@dataclass(frozen=True, slots=True)
class And:
    """Boolean AND of two or more operands."""

    operands: tuple[SelectorNode, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether every operand matches."""
        for operand in self.operands:  # noqa: SIM110  # all() would build a generator for each call
            if not operand.matches(labels):
                return False
        return True

    def __str__(self) -> str:
        return "(" + " && ".join(map(str, self.operands)) + ")"


@dataclass(frozen=True, slots=True)
class Or:
    """Boolean OR of two or more operands."""

    operands: tuple[SelectorNode, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether at least one operand matches."""
        for operand in self.operands:  # noqa: SIM110  # any() would build a generator for each call
            if operand.matches(labels):
                return True
        return False

    def __str__(self) -> str:
        return "(" + " || ".join(map(str, self.operands)) + ")"


SelectorNode = Union[
    All, Global, Has, Equals, NotEquals, In, NotIn, Contains, StartsWith, EndsWith, Not, And, Or
]  # fmt: skip


def negated(node: SelectorNode) -> SelectorNode:
    """The negation of ``node``. The negation of a `Not` is its operand."""
    return node.operand if isinstance(node, Not) else Not(node)


def walk(node: SelectorNode) -> Iterator[SelectorNode]:
    """``node`` and every node below it, in the order of the text."""
    yield node
    if isinstance(node, Not):
        yield from walk(node.operand)
    elif isinstance(node, (And, Or)):
        for operand in node.operands:
            yield from walk(operand)
