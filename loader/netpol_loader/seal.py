# SPDX-License-Identifier: Apache-2.0
"""The check words of endpoint rows, by which the program sees that a row changed while it was reading it.

Invariant: the fold here and `np_fold` in bpf/np_classify.h are the same function.  Must not know where rows come from.
"""

from __future__ import annotations

from netpol_loader import abi


def fold(words: list[int]) -> int:
    """FNV-1a over 32-bit words instead of bytes."""
    value = abi.NP_CHECK_SEED
    for word in words:
        value = ((value ^ word) * abi.NP_CHECK_PRIME) & 0xFFFF_FFFF
    return value


def seal_endpoint(row: abi.np_endpoint) -> abi.np_endpoint:
    """Fill in both sets' ``check``; to be called on a row that is otherwise complete. Returns the same object."""
    names = [name for name, *_ in abi.np_set._fields_ if name != "check"]
    for policy_set in (row.ingress, row.egress):
        words = [row.number, row.ifindex, row.flags, *(getattr(policy_set, name) for name in names)]
        policy_set.check = fold(words)
    return row
