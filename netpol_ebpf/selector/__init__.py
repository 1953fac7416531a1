# SPDX-License-Identifier: Apache-2.0
"""Calico's selector language: parser, evaluation on labels, canonical text, composition, index.

Public and stable: `parse`, `Selector`, `SelectorError`.
"""

from netpol_ebpf.errors import SelectorError
from netpol_ebpf.selector.expression import (
    EVERYTHING,
    Selector,
    all_of,
    any_of,
    equals,
    has,
    is_in,
    negate,
    not_equals,
    not_in,
)
from netpol_ebpf.selector.index import SelectorIndex
from netpol_ebpf.selector.parser import parse

__all__ = [
    "EVERYTHING",
    "Selector",
    "SelectorError",
    "SelectorIndex",
    "all_of",
    "any_of",
    "equals",
    "has",
    "is_in",
    "negate",
    "not_equals",
    "not_in",
    "parse",
]
