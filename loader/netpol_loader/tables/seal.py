# SPDX-License-Identifier: Apache-2.0
"""Check words of endpoint rows. With them the program detects that a row changed during its read.

Invariant: `fold` computes the same as `np_fold` of bpf/np_endpoint.h. The module must not know where rows come from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from netpol_loader import abi


def fold(words: list[int]) -> int:
    """The FNV-1a hash, computed over 32-bit words and not over bytes."""
    value = abi.NP_CHECK_SEED
    for word in words:
        value = ((value ^ word) * abi.NP_CHECK_PRIME) & 0xFFFF_FFFF
    return value


def seal_endpoint(row: abi.np_endpoint) -> abi.np_endpoint:
    """Set the ``check`` of both policy sets. All other fields must be set before. Returns the same object."""
    for policy_set in (row.ingress, row.egress):
        policy_set.check = _check(policy_set, row.number, row.ifindex, row.flags, row.link)
    return row


def seal_host(row: abi.np_host) -> abi.np_host:
    """Set the ``check`` of all policy sets in a host endpoint's row, including the unused ones.

    Returns the same object.
    """
    for index, policy_set in enumerate(row.sets):
        policy_set.check = _check(policy_set, row.number, index | row.present << 8, row.version, 0)
    return row


def _check(policy_set: abi.np_set, number: int, place: int, flags: int, link: int) -> int:
    return fold([number, place, flags, link, *_words(policy_set)])


def _words(policy_set: abi.np_set) -> Iterator[int]:
    """The fields of a policy set without ``check``, as 32-bit words.

    Of two 16-bit fields that share a word, the first is the low half, on every machine.
    """
    low: int | None = None
    for name, kind, *_ in abi.np_set._fields_:
        value = getattr(policy_set, name)
        if name == "check":
            return
        if kind is ctypes.c_uint32:
            yield value
        elif low is None:
            low = value
        else:
            yield low | value << 16
            low = None
