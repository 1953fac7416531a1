# SPDX-License-Identifier: Apache-2.0
"""One object in place of equal ones: what thousands of objects of a cluster say alike is held once.

Invariant: what comes out equals what went in, and nobody changes it.  What was not met for long is forgotten, so there may be two
objects of one value after all; nothing but memory depends on it, hence nothing is counted and nothing has to be given back.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from functools import lru_cache
from itertools import chain
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

REMEMBERED = 4096
"""Values of one sort; arbitrary, some hundred bytes each. Whoever lists a cluster tells of the pods of a namespace together."""


def share(value: T) -> T:
    """An immutable value. Types that equal each other (1 and True) are not to be mixed in one."""
    return _values(value)  # type: ignore[return-value]  # what came in, or its equal


def share_text(text: str) -> str:
    """A name that many objects contain, stored once; freed with the last of them."""
    return sys.intern(str(text))


def share_texts(texts: Mapping[str, str]) -> Mapping[str, str]:
    """Labels: equal texts under equal names in the same order."""
    return _texts(*chain.from_iterable(texts.items()))


@lru_cache(maxsize=REMEMBERED)
def _values(value: Hashable) -> Hashable:
    return value


@lru_cache(maxsize=REMEMBERED)
def _texts(*names_and_texts: str) -> Mapping[str, str]:
    return dict(zip(names_and_texts[::2], names_and_texts[1::2], strict=True))
