# SPDX-License-Identifier: Apache-2.0
"""The limits of the compiled tables, checked before a commit changes the tables.

Invariant: a commit that would exceed a limit raises `LimitError` with the object, the limit and the figure, and changes
nothing.  Nothing is ever truncated.  The agent derives the limits from the sizes of its maps.
"""

from __future__ import annotations

from dataclasses import dataclass

from netpol_ebpf.errors import LimitError


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest number of rows of each table, and the largest sizes of policies and policy sets.

    A default is the default size of the BPF map that has the table's rows.  Where no map sets the limit, the default is
    arbitrary.
    """

    rules_per_policy: int = 65_536  # arbitrary: rules of one direction, after lists of ports and of peers are split
    entries_per_set: int = 65_536  # arbitrary: number of bits of the bit vectors
    classes_per_set: int = 65_535  # a class number has 16 bits
    verdicts_per_set: int = 1 << 22  # arbitrary
    atoms: int = 65_535  # an atom number has 16 bits
    identities: int = 1 << 20
    peer_classes: int = 1 << 22
    addresses: int = 1 << 20
    cidrs: int = 1 << 20
    column_blocks: int = 1 << 18
    verdicts: int = 1 << 24
    rules: int = 1 << 20
    log_lists: int = 1 << 16
    domain_lists: int = (1 << 15) - 1  # a verdict has 15 bits for the number
    domains: int = 1 << 18
    names: int = 1 << 16
    name_classes: int = 1 << 16  # arbitrary
    seen_names: int = 1 << 12  # arbitrary; much less than `names`, so that workloads cannot use up the rows of patterns
    endpoints: int = 1 << 16


def exceeded(what: str, limit: str, maximum: int, seen: int) -> LimitError:
    """The error for a limit that the object ``what`` exceeds: it needs ``seen``, and the limit is ``maximum``.

    ``limit``: the name of the field of `Limits`.
    """
    return LimitError(f"{what}: {limit.replace('_', ' ')}: needs {seen}, the limit is {maximum}", limit=limit)
