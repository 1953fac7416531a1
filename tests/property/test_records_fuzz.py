# SPDX-License-Identifier: Apache-2.0
"""Reading any JSON in a file of an agent or a plugin raises nothing, and invalid content is reported."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol_ebpf.agent.assignments import InterfaceAssignments
from netpol_ebpf.agent.cni import CniResult, parse_result
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.compiler import Compiler, KnownNumbers
from netpol_ebpf.errors import PlatformError

INTERFACES: dict[str, Any] = {
    "format": 1,
    "interfaces": {
        "5": {
            "name": "veth5", "side": "workload", "first": ["10.0.0.1", "fd00::1"],
            "bond": {"endpoint": ["Pod", "shop", "web"], "evidence": "ADDRESS", "addresses": ["10.0.0.1"]},
        },
        "6": {"name": "veth6", "side": None, "first": []},
    },
}  # fmt: skip
NUMBERS: list[Any] = [
    {"format": 1},
    ["rule", ["RULE", "EGRESS", "default", ["NetworkPolicy", "shop", "x"], "", 3, "ALLOW"], 1],
    ["rule", ["PROFILE", "INGRESS", "", None, "kns.shop", 0, "ALLOW"], 2],
    ["endpoint", ["Pod", "shop", "web"], 1],
    ["endpoint", ["Pod", "shop", "db"], 2],
    ["endpoint", ["Pod", "shop", "db"], 0],
    ["identity", "ab12", 16],
    ["identity", "cd34", 17],
]
RESULT: dict[str, Any] = {
    "kind": "cniCacheV1", "config": base64.b64encode(b'{"plugins": [{"type": "bridge"}]}').decode(), "ifName": "eth0",
    "cniArgs": [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"]],
    "result": {"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/x"}], "ips": [{"address": "10.0.0.1/24"}]},
}  # fmt: skip
CONFIG: dict[str, Any] = {"plugins": [{"type": "bridge"}]}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 16, (1 << 32) - 1, 1 << 20, 1 << 64, -1])
    | st.floats()
    | st.text(st.characters(), max_size=8)  # halves of surrogate pairs too
    | st.sampled_from(["own", "workload", "CNI", "RULE", "10.0.0.1", "fe80::1%x", "5", "Pod", "\udfff"])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, itself first."""
    yield path
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, one in inner:
        yield from places(one, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = with_value(document[path[0]], path[1:], value)
    return copy


def damaged(document: Any) -> st.SearchStrategy[Any]:
    """The document with anything in up to three places."""
    one = st.tuples(st.sampled_from(list(places(document))), anything)

    def put(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        result = document
        for path, value in sorted(changes, key=lambda change: -len(change[0])):
            result = with_value(result, path, value)
        return result

    return st.lists(one, min_size=1, max_size=3).map(put)


@given(damaged(INTERFACES))
def test_interfaces_of_any_kind_are_read_or_told(document: Any) -> None:
    """What was decided about interfaces: what is read can be used and written, and is what the next agent reads."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "interfaces"
        path.write_text(json.dumps(document))
        assignments = InterfaceAssignments()
        problem = assignments.load(path)
        assert problem is None or problem.slug == "interfaces-file"
        assignments.look(
            Wiring({5: Interface(5, "veth5", "veth", (1, 2)), 6: Interface(6, "veth6", "veth", (2, 2))}), []
        )
        assignments.save(path)
        again = InterfaceAssignments()
        assert again.load(path) is None
        assert again._seen == assignments._seen


@given(damaged(NUMBERS))
def test_numbers_of_any_kind_are_read_or_told(document: Any) -> None:
    """The ledger: no number is two things', all fit into rows, and the next agent reads the same without a word."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "numbers"
        lines = document if isinstance(document, list) else [document]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ledger = Ledger(path)
        try:
            numbers = ledger.open()
        except PlatformError as error:
            assert "format" in str(error)  # noqa: PT017 - told, and nothing was changed
            return
        told, entries = ledger.problems, list(numbers.entries())
        ledger.close()
        assert all(one.slug == "ledger" for one in told)
        assert len({(kind, number) for kind, _, number in entries}) == len(entries)
        assert all(0 < number < 1 << 32 for _, _, number in entries)
        Compiler(known=KnownNumbers(numbers.identities, numbers.rules, numbers.endpoints))
        again = Ledger(path)
        assert again.open() == numbers
        assert again.problems == []
        again.close()


@given(damaged(RESULT), damaged(CONFIG) | st.none())
def test_results_of_any_kind_are_read_or_told(document: Any, config: Any) -> None:
    """A plugin's result, and the configuration inside it: a result, no pod's, or the one error that is told."""
    if config is not None and isinstance(document, dict):
        document["config"] = base64.b64encode(json.dumps(config).encode()).decode()
    try:
        found = parse_result(json.dumps(document).encode())
    except ValueError:
        return
    assert found is None or isinstance(found, CniResult)
    if found is not None:
        assert all(text.encode() is not None for text in (*found.pod, *found.names, found.inside, found.plugin))


@given(
    st.binary(max_size=60)
    | st.text(max_size=40).map(str.encode)
    | st.integers(900, 100_000).map(lambda depth: b"[" * depth)
)
def test_bytes_of_any_kind_are_told(content: bytes) -> None:
    """Texts that are not JSON."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "interfaces"
        path.write_bytes(content)
        assert InterfaceAssignments().load(path) is not None
        ledger = Ledger(Path(home) / "numbers")
        ledger._path.write_bytes(content + b"\n")
        assert [ledger.open(), *ledger.problems][1:], "it is told"
        ledger.close()
        with pytest.raises(ValueError, match="."):
            parse_result(content)
