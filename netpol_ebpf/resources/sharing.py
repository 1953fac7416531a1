# SPDX-License-Identifier: Apache-2.0
"""Shares equal values: thousands of objects of a cluster repeat the same names and labels, and one copy is kept.

Invariant: the result equals the argument, and nobody changes it.  A value that was not used for long is forgotten, so
two copies of one value may exist; only memory depends on it, hence there is no count of uses and no release.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from functools import lru_cache
from itertools import chain
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

REMEMBERED = 4096
"""Values remembered of each sort; arbitrary, some hundred bytes each.

A list of a cluster's pods has the pods of a namespace together.
"""


def share(value: T) -> T:
    """The shared copy of an immutable value. Types with equal values (1 and True) must not be mixed in one cache."""
    return _values(value)  # type: ignore[return-value]  # what came in, or its equal


def share_text(text: str) -> str:
    """The shared copy of a name that many objects contain; freed with the last of them."""
    return sys.intern(str(text))


def share_texts(texts: Mapping[str, str]) -> Mapping[str, str]:
    """Labels with shared names and values; equal texts under equal names in the same order."""
    return _texts(*chain.from_iterable(texts.items()))


@lru_cache(maxsize=REMEMBERED)
def _values(value: Hashable) -> Hashable:
    return value


@lru_cache(maxsize=REMEMBERED)
def _texts(*names_and_texts: str) -> Mapping[str, str]:
    return dict(zip(names_and_texts[::2], names_and_texts[1::2], strict=True))
