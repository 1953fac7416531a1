# SPDX-License-Identifier: Apache-2.0
"""Saves memory: keeps one copy of equal names and labels, because thousands of a cluster's objects repeat them.

Invariant: the result is equal to the argument, and callers must not change it. The cache drops values that were not
used for long, so a value may have two copies, which costs only memory. References are not counted, so callers release
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from functools import lru_cache
from itertools import chain
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

REMEMBERED = 4096
"""How many values of each type are cached; arbitrary. A value needs some hundred bytes.

This number suffices because a list of a cluster's pods has the pods of one namespace next to each other.
"""


def share(value: T) -> T:
    """The shared copy of an immutable value. Values of different types must not be equal, as 1 and True are."""
    return _values(value)  # type: ignore[return-value]  # the argument, or an equal value


def share_text(text: str) -> str:
    """The shared copy of a name that many objects contain.

    The copy is freed with the last object that contains the name.
    """
    return sys.intern(str(text))


def share_texts(texts: Mapping[str, str]) -> Mapping[str, str]:
    """A copy of ``texts`` (labels) with shared names and values, in the same order."""
    return _texts(*chain.from_iterable(texts.items()))


@lru_cache(maxsize=REMEMBERED)
def _values(value: Hashable) -> Hashable:
    return value


@lru_cache(maxsize=REMEMBERED)
def _texts(*names_and_texts: str) -> Mapping[str, str]:
    return dict(zip(names_and_texts[::2], names_and_texts[1::2], strict=True))
