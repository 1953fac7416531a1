# SPDX-License-Identifier: Apache-2.0
"""Patterns of domain names: what they match, which pattern covers which, and addresses that no answer can teach."""

from __future__ import annotations

import itertools
from ipaddress import ip_address

import pytest

from netpol_ebpf.policy.domain_names import (
    covers_pattern,
    is_inner_wildcard,
    is_never_learned,
    matches_pattern,
    matching_names,
)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("example.com", "example.com", True),
        ("example.com", "www.example.com", False),
        ("www.example.com", "example.com", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*.example.com", "a.example.com.evil.net", False),
        ("x.*.com", "x.a.com", True),
        ("x.*.com", "x.a.b.com", True),
        ("x.*.com", "x.com", False),
        ("x.*.com", "y.a.com", False),
        ("x.*.com", "x.a.net", False),
        ("a.*.a", "a.a", False),
        ("a.*.a", "a.a.a", True),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:  # noqa: FBT001
    """A star stands for one or more whole labels, and everything else for itself."""
    assert matches_pattern(pattern, name) is expected


def test_the_names_that_patterns_match() -> None:
    """Each name that some pattern matches is returned once, in order."""
    assert matching_names(["*.b", "a.*.b", "c"], ["c", "a.x.b", "b"]) == ("a.x.b", "c")


def test_coverage_of_patterns_is_exact() -> None:
    """Over all patterns and names of two labels, a pattern covers another one where it matches each of its names."""
    labels = [".".join(parts) for size in (1, 2, 3, 4, 5) for parts in itertools.product("ab", repeat=size)]
    patterns = [
        ".".join(parts)
        for size in (1, 2, 3)
        for parts in itertools.product("ab*", repeat=size)
        if parts.count("*") < 2 and parts[-1] != "*"
    ]
    matched = {pattern: {name for name in labels if matches_pattern(pattern, name)} for pattern in patterns}
    for wide, narrow in itertools.product(patterns, repeat=2):
        assert covers_pattern(wide, narrow) is (matched[wide] >= matched[narrow]), (wide, narrow)


def test_which_wildcards_the_packet_path_cannot_match() -> None:
    """A star that is not the first label needs the agent."""
    assert [is_inner_wildcard(one) for one in ("a.b", "*.a.b", "x.*.b")] == [False, False, True]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("169.254.169.254", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("::1", True),
        ("fe80::1", True),
        ("::ffff:192.0.2.1", True),
        ("10.0.0.1", False),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
    ],
)
def test_addresses_that_no_answer_can_teach(address: str, expected: bool) -> None:  # noqa: FBT001
    """Addresses of the workload itself and of its link are refused; those of a private network are not."""
    assert is_never_learned(ip_address(address)) is expected
