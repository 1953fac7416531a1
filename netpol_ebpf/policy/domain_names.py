# SPDX-License-Identifier: Apache-2.0
"""Patterns of domain names in rules: what a pattern matches, and where patterns need care (SEMANTICS 6.1).

A pattern is a name in lower case without a dot at the end.  One of its labels, but not the last, may be ``*``, which
stands for one or more whole labels: ``*.example.com`` matches ``a.example.com`` and ``a.b.example.com``, but not
``example.com``.

Invariant: this module compares texts only.  It knows no addresses and makes no look-ups.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address

from netpol_ebpf.policy.types import IPAddress

STAR = "*"


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name``, which is in lower case and has no dot at the end."""
    wanted, labels = pattern.split("."), name.split(".")
    if STAR not in wanted:
        return wanted == labels
    star = wanted.index(STAR)
    before, after = wanted[:star], wanted[star + 1 :]
    return (
        len(labels) > len(before) + len(after)
        and labels[: len(before)] == before
        and labels[len(labels) - len(after) :] == after
    )


def matching_names(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that one of ``patterns`` matches, sorted."""
    given = tuple(patterns)
    return tuple(sorted(name for name in names if any(matches_pattern(pattern, name) for pattern in given)))


def covers_pattern(wide: str, narrow: str) -> bool:
    """Whether ``wide`` matches every name that ``narrow`` matches.

    A star of ``narrow`` stands for at least one label, and for any labels.  So ``wide`` must match ``narrow`` with one
    unknown label in the place of its star, and must have a star of its own there.
    """
    if STAR not in narrow.split("."):
        return matches_pattern(wide, narrow)
    if STAR not in wide.split("."):
        return False
    star, other = wide.split(".").index(STAR), narrow.split(".").index(STAR)
    after, other_after = wide.split(".")[star + 1 :], narrow.split(".")[other + 1 :]
    return (
        star <= other
        and len(after) <= len(other_after)
        and wide.split(".")[:star] == narrow.split(".")[:star]
        and after == other_after[len(other_after) - len(after) :]
    )


def is_inner_wildcard(pattern: str) -> bool:
    """Whether the star of ``pattern`` is not its first label, so that the packet path cannot match the pattern itself.

    Then the agent adds each name that it sees and that the pattern matches.
    """
    return STAR in pattern.split(".")[1:]


def is_never_learned(address: IPAddress) -> bool:
    """Whether no answer can teach ``address``, whatever the cluster's addresses are (docs/domain-names.md).

    An answer with such an address would lead a workload to itself, to its node or to its link (DNS rebinding).
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return True
    return address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
