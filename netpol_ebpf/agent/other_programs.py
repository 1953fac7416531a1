# SPDX-License-Identifier: Apache-2.0
"""Problems for programs that other software attached to the node's interfaces, if packets may bypass policy by them.

Invariant: a program that runs after ours and only counts, passes or drops packets is no problem. A program that cannot
be examined never counts as harmless. This module reads nothing from the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from netpol_ebpf.errors import Location, Problem
from netpol_loader.pins.others import XDP, Other, Reach

OVERTAKEN, REDIRECT = "overtaken", "redirect"
WHY_UNKNOWN = "they call programs that are not known (tail calls, libxdp), or this process may not read them (CAP_SYS_ADMIN, CAP_SYSLOG)"
SAID: dict[tuple[bool, Reach], tuple[str, str, str]] = {
    (True, Reach.REDIRECTS): (
        OVERTAKEN, "error", "XDP programs of others can redirect packets, on which policy is NOT enforced: {}",
    ),
    (True, Reach.UNKNOWN): (
        OVERTAKEN, "warning", "cannot tell whether XDP programs of others redirect packets past policy: {}; " + WHY_UNKNOWN,
    ),
    (True, Reach.NONE): (
        OVERTAKEN, "warning", "XDP programs of others run before policy, which evaluates what they let pass: {}",
    ),
    (False, Reach.REDIRECTS): (
        REDIRECT, "error",
        "programs of others can redirect packets into pods (bpf_redirect_peer), where policy is NOT enforced on those: {}",
    ),
    (False, Reach.UNKNOWN): (
        REDIRECT, "warning", "cannot tell whether programs of others redirect packets past policy: {}; " + WHY_UNKNOWN,
    ),
}  # fmt: skip
"""The problem that a program causes, as (slug, severity, message).

The key is (whether it is an XDP program, its `Reach`)."""
FIRST = (OVERTAKEN, "error", "programs of others run before policy, which does not see what they let pass: {}")
SHOWN = 10
"""Largest number of programs that a message names. The number is arbitrary."""


def problems_of(found: Iterable[Other], name_of: Callable[[int], str]) -> list[Problem]:
    """The problems for the programs ``found``. Programs with the same problem share one message.

    ``name_of``: returns the name of an interface by its index.
    """
    told: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        said = _said(one)
        if said is not None:
            named = f"{one.number} ({one.name})" if one.name else str(one.number)
            told.setdefault(said, []).append(f"{name_of(one.ifindex)} {one.hook} program {named}")
    problems = []
    for (slug, severity, message), names in sorted(told.items()):
        rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        text = message.format(", ".join(names[:SHOWN] + rest))
        problems.append(Problem(Location(""), "", text, severity=severity, slug=slug))
    return problems


def _said(one: Other) -> tuple[str, str, str] | None:
    if one.hook == XDP:  # an XDP program that cannot redirect matters only if our programs run after it
        return SAID[True, one.reach] if one.is_first or one.reach is not Reach.NONE else None
    return FIRST if one.is_first else SAID.get((False, one.reach))
