# SPDX-License-Identifier: Apache-2.0
"""Whatever a case file or a selector holds, reading and running it ends in results or clean errors, never otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from netpol_ebpf.cases.case import LoadedCases, load_cases, parse_cases
from netpol_ebpf.cases.runner import run_cases
from netpol_ebpf.selector import SelectorError, negate, parse

CASES = """
name: a pod that answers
sequence: {group: g, step: 1}
manifests:
- {apiVersion: v1, kind: Namespace, metadata: {name: 'n', labels: {a: b}}}
- {apiVersion: v1, kind: Pod, metadata: {name: p, namespace: 'n', labels: {app: p}}, status: {podIPs: [{ip: 10.0.1.1}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: q, namespace: 'n', labels: {app: q}}, status: {podIPs: [{ip: 'fd00::1'}]}}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: k, namespace: 'n'}
  spec: {podSelector: {}, ingress: [{ports: [{protocol: TCP, port: 80}]}]}
probes:
- {from: n/p, to: n/p, protocol: TCP, port: 80, srcPort: 1, expect: allow}
- {from: 192.0.2.1, to: n/p, protocol: TCP, port: 81, expect: allow, dnatTo: {ip: 10.0.1.1, port: 80}}
- {from: 'fd00::9', to: n/q, protocol: ICMPv6, icmpType: 128, icmpCode: 0, expect: deny, notes: closed}
- {from: n/p, to: 192.0.2.1, protocol: 47, expect: allow}
"""
SELECTORS = (
    "all()", "global()", "a == 'b' && !has(c)", "a in {'b', \"c\"} || d not in {}", "!(a != 'b' || (c starts with 'd'))",
    "a contains 'x' && b ends with 'y' && !(!(has(x/y)))", "a notin {'b'} && has(a) || !all()",
)  # fmt: skip
LONG = "9" * 5000
"""More digits than Python converts."""

odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(), max_size=3),
    st.sampled_from([
        "n/p", "n/", "/p", "n/p/q", "10.0.0.1", "::", "10.0.0.1/8", "fe80::1%eth0", "TCP", "256", "-1", LONG, "٣", "\ud800",
        "allow", "\x00", 10**30, 255, 65536,
    ]),
)  # fmt: skip


def containers(value: Any) -> Iterator[Any]:
    """All mappings and lists in a value that have something in them."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for below in value.values() if isinstance(value, dict) else value:
            yield from containers(below)


@st.composite
def mutated_cases(draw: st.DrawFn) -> Any:
    """A case in which a few parts are replaced, removed, added or repeated."""
    case = yaml.safe_load(CASES)
    for _ in range(draw(st.integers(1, 3))):
        target = draw(st.sampled_from(list(containers(case))))
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = draw(st.sampled_from(keys))
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            target[key] = draw(odd)
        elif change == "remove":
            del target[key]
        elif isinstance(target, list):
            target.append(draw(st.sampled_from(target)) if draw(st.booleans()) else draw(odd))
        else:
            target[draw(st.text(max_size=6))] = draw(odd)
        if not isinstance(case, dict) or not case:
            break
    return case


def sound(loaded: LoadedCases) -> None:
    """Every case that was read can be run, and every invalid case has a printable reason."""
    for invalid in loaded.invalid:
        assert invalid.error
        assert isinstance(invalid.case, str)
    report = run_cases(loaded)
    assert json.dumps(report.as_dict(), default=str)


@given(mutated_cases())
def test_mutated_cases(case: Any) -> None:
    """Wrong types, missing and unknown fields, odd values in every place of a case."""
    loaded = LoadedCases()
    parse_cases(json.dumps(case), "f", loaded)
    assert len(loaded.cases) + len(loaded.invalid) == 1
    sound(loaded)


@given(
    at=st.integers(0, len(CASES) - 1),
    length=st.integers(0, 12),
    insert=st.text(alphabet="{}[]:-,&*!|>'\"%@`#? \n\tab0/.\ud800\x00\x85\u2028", max_size=6),
)
def test_mutated_text(at: int, length: int, insert: str) -> None:
    """Cuts and insertions anywhere in a case file."""
    loaded = LoadedCases()
    parse_cases(CASES[:at] + insert + CASES[at + length :], "f", loaded)
    sound(loaded)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes, tmp_path: Path) -> None:
    """A case file of anything, named or found in a directory."""
    file = tmp_path / "fuzz.yaml"
    file.write_bytes(data)
    sound(load_cases([file]))
    sound(load_cases([tmp_path]))


@pytest.mark.parametrize("field", ["protocol", "port", "srcPort", "icmpType", "icmpCode"])
@pytest.mark.parametrize("value", [LONG, f"'{LONG}'", "-" + LONG, "1e999", ".nan"])
def test_endless_numbers(field: str, value: str) -> None:
    """A number with more digits than Python converts is refused like any other that is too large."""
    probe = {"protocol": "ICMP", field: "@"}
    written = ", ".join(f"{key}: {text}" for key, text in probe.items()).replace("@", value)
    loaded = LoadedCases()
    parse_cases(
        f"name: 'n'\nmanifests: []\nprobes: [{{from: 192.0.2.1, to: 192.0.2.2, {written}, expect: deny}}]\n",
        "f",
        loaded,
    )
    assert [invalid.case for invalid in loaded.invalid] == ["n"]


def test_the_seed_is_a_case() -> None:
    """The mutations start from a case that passes."""
    loaded = LoadedCases()
    parse_cases(CASES, "f", loaded)
    report = run_cases(loaded)
    assert not loaded.invalid
    assert (report.probes, report.failed) == (4, [])


@given(
    text=st.sampled_from(SELECTORS),
    at=st.integers(0, 60),
    length=st.integers(0, 8),
    insert=st.text(alphabet="()!&|={}'\", \thasinall\x00\ud800\u2028é/.-_", max_size=8),
    repeat=st.sampled_from([1, 1, 1, 70, 2000]),
)
def test_mutated_selectors(text: str, at: int, length: int, insert: str, repeat: int) -> None:
    """Cuts, insertions and endless repetition give a selector with a stable canonical text, or an error with offset."""
    mutated = text[:at] + insert * repeat + text[at + length :]
    try:
        selector = parse(mutated)
    except SelectorError as error:
        assert 0 <= error.offset <= len(mutated)  # noqa: PT017  # either outcome is right
        assert str(error)  # noqa: PT017  # the same
    else:
        assert parse(str(selector)) == selector
        negate(selector).matches({"a": "b"})
