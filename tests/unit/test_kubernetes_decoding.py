# SPDX-License-Identifier: Apache-2.0
"""Decoding of the API server's JSON: the fields that are dropped are those that no parser reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from apiserver_traces import DATA, NAMESPACES, PODS, TIERS, exchanges, recorded

from netpol_ebpf.resources import core
from netpol_ebpf.resources.load import KINDS as PARSED
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.sources.kubernetes.decoding import (
    KINDS,
    MalformedError,
    Name,
    WatchedKind,
    decode_bookmark,
    decode_event,
    decode_fields,
    decode_object,
    decode_page,
    decode_status,
    encode,
    object_path,
    parse,
)

UNWATCHED = {"WorkloadEndpoint", "Profile"}


def recorded_objects() -> list[tuple[WatchedKind, dict[str, Any]]]:
    """Every item of every recorded list of a kind that is watched."""
    found = []
    by_path = {kind.path: kind for kind in KINDS}
    for path in sorted(DATA.glob("list-*-paged.json")):
        for number, one in enumerate(exchanges(path.stem)):
            kind = by_path[one["request_head"].split()[1].partition("?")[0]]
            found += [(kind, item) for item in json.loads(recorded(path.stem, number).body())["items"]]
    return found


def test_every_kind_of_the_parsers_is_watched() -> None:
    """But for those that Calico makes up of others."""
    watched = {(kind.api_version, kind.kind) for kind in KINDS}
    assert {key for key in PARSED if key[1] not in UNWATCHED} == watched


def test_paths() -> None:
    """As the server has them."""
    assert PODS.path == "/api/v1/pods"
    assert TIERS.path == "/apis/projectcalico.org/v3/tiers"
    assert TIERS.definition.endswith("/customresourcedefinitions/tiers.projectcalico.org")
    policies = next(kind for kind in KINDS if kind.kind == "GlobalNetworkPolicy")
    assert policies.path == "/apis/projectcalico.org/v3/globalnetworkpolicies"
    assert object_path(PODS, Name("prod", "web")) == "/api/v1/namespaces/prod/pods/web"
    assert object_path(TIERS, Name("", "one")) == "/apis/projectcalico.org/v3/tiers/one"


def test_dropped_fields_change_no_object() -> None:
    """Each recorded object, read whole and read by its used fields, is the same to its parser."""
    objects = recorded_objects()
    assert {kind.kind for kind, _ in objects} >= {"Pod", "Node", "Service", "EndpointSlice", "Namespace", "Tier"}
    valid = set()
    for kind, item in objects:
        decoded = decode_object(kind, json.dumps(item).encode())
        whole = parse_object(
            {**item, "apiVersion": kind.api_version, "kind": kind.kind}, object_path(kind, decoded.name)
        )
        few = parse(kind, decoded.name, decoded.fields)
        assert whole.resources == ([] if few.resource is None else [few.resource])
        valid |= {type(one) for one in whole.resources}
        assert tuple(whole.problems) == few.problems
        assert decoded.resource_version == item["metadata"]["resourceVersion"]
    assert len(valid) > 8


def test_every_annotation_that_a_parser_reads_is_kept() -> None:
    """Those of core.py, by its own constants."""
    texts = [text for value in vars(core).values() for text in (value if isinstance(value, tuple) else [value])]
    read = {text for text in texts if isinstance(text, str) and "/" in text and text[0] != "/"}
    read -= {core.NAMESPACE_NAME_LABEL, core.SERVICE_NAME_LABEL, "discovery.k8s.io/v1"}
    assert len(read) > 8
    metadata = {"name": "a", "resourceVersion": "1", "annotations": dict.fromkeys([*read, "example.org/large"], "x")}
    decoded = decode_object(PODS, json.dumps({"metadata": metadata}).encode())
    assert decoded.fields["metadata"]["annotations"].keys() == read


def test_calico_annotations_of_a_pod_are_read() -> None:
    """An address that only an annotation has."""
    annotations = {"cni.projectcalico.org/podIP": "10.0.0.9/32"}
    metadata = {"name": "a", "namespace": "b", "resourceVersion": "1", "annotations": annotations}
    decoded = decode_object(PODS, json.dumps({"metadata": metadata, "spec": {}, "status": {}}).encode())
    resource = parse(PODS, decoded.name, decoded.fields).resource
    assert [str(address) for address in resource.addresses] == ["10.0.0.9"]  # type: ignore[union-attr]


def deep(levels: int) -> bytes:
    """An array in arrays, with brackets and quotes in a text at its end."""
    return b"[" * levels + rb'"\\\"[{"' + b"]" * levels


@pytest.mark.parametrize("levels", [200, 2_000, 100_000])
@pytest.mark.parametrize("kind", [PODS, KINDS[-1]], ids=str)
def test_nesting_of_one_object_hides_no_other(kind: WatchedKind, levels: int) -> None:
    """A custom kind may keep unknown fields, in which a server takes thousands of levels, more than Python's stack."""
    metadata = b'{"name": "deep", "namespace": "a", "resourceVersion": "5"}'
    raw = b'{"metadata": %s, "spec": {"unknown": [%s, 1], "selector": %s}}' % (metadata, deep(levels), deep(3))
    page = decode_page(b'{"metadata": {"resourceVersion": "7"}, "items": [%s, {"b": 1}]}' % raw)
    assert len(page.items) == 2
    event = decode_event(b'{"type": "ADDED", "object": %s}' % raw)
    for one in (raw, page.items[0], event.raw):
        decoded = decode_object(kind, one)
        assert (decoded.name, decoded.resource_version) == (Name("a", "deep"), "5")
        assert decode_fields(encode(decoded.fields)) == decoded.fields
        parse(kind, decoded.name, decoded.fields)
    if kind is not PODS:
        assert decoded.fields["spec"]["selector"] == [[['\\"[{']]]
        assert decoded.fields["spec"]["unknown"][1] == 1


def test_nesting_without_an_end_is_malformed() -> None:
    """Nothing of it counts."""
    with pytest.raises(MalformedError):
        decode_fields(b'{"a": ' + b"[" * 100_000)


def test_unknown_field_of_a_policy_is_found() -> None:
    """At any depth: policies are decoded whole."""
    policies = next(
        kind for kind in KINDS if (kind.kind, kind.api_version) == ("GlobalNetworkPolicy", "projectcalico.org/v3")
    )
    for extra in (
        {"selector": "all()"},
        {"spec": {"selector2": "all()"}},
        {"spec": {"ingress": [{"action": "Allow", "from": 1}]}},
    ):
        item = {
            "metadata": {"name": "a", "resourceVersion": "1", "managedFields": []},
            "status": {},
            "spec": {},
        } | extra
        decoded = decode_object(policies, json.dumps(item).encode())
        parsed = parse(policies, decoded.name, decoded.fields)
        assert parsed.resource is None
        assert parsed.problems[0].slug == "unknown-field"
        assert parsed.problems[0].obj == "GlobalNetworkPolicy/a"


def test_shape_that_is_not_declared_is_the_parsers_to_judge() -> None:
    """A problem with its path, not a lost object."""
    item = {"metadata": {"name": "a", "namespace": "b", "resourceVersion": "1"}, "spec": {"containers": "none"}}
    decoded = decode_object(PODS, json.dumps(item).encode())
    parsed = parse(PODS, decoded.name, decoded.fields)
    assert parsed.resource is None
    assert parsed.problems[0].path == "spec.containers"


@pytest.mark.parametrize("containers", [None, []])
def test_containers_may_be_null(containers: list[Any] | None) -> None:
    """As Go writes a list that has nothing."""
    item = {"metadata": {"name": "a", "namespace": "b", "resourceVersion": "1"}, "spec": {"containers": containers}}
    decoded = decode_object(PODS, json.dumps(item).encode())
    assert parse(PODS, decoded.name, decoded.fields).problems == ()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"metadata": {}}',
        b'{"metadata": {"name": ""}}',
        b'{"metadata": {"name": 1}}',
        b'{"metadata": {"name": "a", "namespace": 1}}',
        b'{"metadata": {"name": "a", "resourceVersion": 5}}',
        b'{"metadata": {"name": "\xff"}}',
        b'{"metadata": {"name": "a"}',
    ],
)
def test_object_without_a_name_is_no_object(raw: bytes) -> None:
    """Which object it is cannot be said, so nothing of the answer may count."""
    with pytest.raises(MalformedError):
        decode_object(NAMESPACES, raw)


def test_kind_comes_from_the_request() -> None:
    """L1: items of built-in lists have none; one of another kind does not become it."""
    decoded = decode_object(NAMESPACES, b'{"kind": "Secret", "apiVersion": "v9", "metadata": {"name": "a"}}')
    assert (decoded.fields["apiVersion"], decoded.fields["kind"]) == ("v1", "Namespace")


def test_server_fields_are_no_content() -> None:
    """Two states that differ in these alone are one."""
    one = {
        "metadata": {"name": "a", "resourceVersion": "1", "generation": 1, "uid": "x", "managedFields": [1]},
        "spec": {"order": 1},
    }
    two = {
        "metadata": {"name": "a", "resourceVersion": "2", "generation": 1, "uid": "x"},
        "spec": {"order": 1},
        "status": {"a": 1},
    }
    first, second = (decode_object(TIERS, json.dumps(item).encode()) for item in (one, two))
    assert encode(first.fields) == encode(second.fields)
    assert (first.resource_version, second.resource_version) == ("1", "2")


@pytest.mark.parametrize("change", [{"generation": 2}, {"uid": "y"}])
def test_generation_and_uid_make_another_revision(change: dict[str, Any]) -> None:
    """Reports name a state of a policy by both, also where the new spec means the same."""
    before = {"name": "a", "resourceVersion": "1", "generation": 1, "uid": "x"}
    revisions = []
    for metadata in (before, {**before, **change}):
        decoded = decode_object(TIERS, json.dumps({"metadata": metadata, "spec": {"order": 1}}).encode())
        resource = parse(TIERS, decoded.name, decoded.fields).resource
        assert resource is not None
        revisions.append(resource.meta.revision)
    assert revisions == ["x/1", f"{change.get('uid', 'x')}/{change.get('generation', 1)}"]


def test_numbers_are_read_as_the_server_writes_them() -> None:
    """Section 3.7: ints and floats."""
    for text in ("1000000", "1e6", "1000000.0"):
        raw = b'{"metadata": {"name": "a", "resourceVersion": "1"}, "spec": {"order": %s}}' % text.encode()
        resource = parse(TIERS, Name("", "a"), decode_object(TIERS, raw).fields).resource
        assert resource.order == 1000000  # type: ignore[union-attr]


def test_bookmarks_are_read_by_themselves() -> None:
    """W2: of a built-in kind with empty members, and of a custom one with none."""
    lines = b"".join(chunk for _, chunk in recorded("watch-streaming-list", 1).chunks).splitlines()
    marks = [decode_bookmark(decode_event(line).raw) for line in lines if line]
    assert [mark.ends_list for mark in marks] == [True, False, False]
    assert [mark.resource_version for mark in marks] == ["276", "277", "277"]


@pytest.mark.parametrize(
    ("trace", "number", "reason", "text"),
    [
        ("overload-429", 0, "", "Too many requests"),
        ("startup-answers", 0, "Forbidden", "is forbidden"),
        ("watch-crd-deleted", 1, "", "404 page not found"),
        ("expired-410", 0, "Expired", "too old"),
    ],
)
def test_refusals_are_read_with_and_without_a_status(trace: str, number: int, reason: str, text: str) -> None:
    """JSON Status or plain text."""
    answer = recorded(trace, number)
    status = decode_status(answer.body(), answer.status)
    assert (status.code, status.reason) == (answer.status, reason)
    assert text in status.message


def test_continue_token_is_read() -> None:
    """L2: until it is absent."""
    pages = [decode_page(recorded("list-pods-paged", number).body()) for number in range(3)]
    assert [bool(page.more) for page in pages] == [True, True, False]
    assert len({page.resource_version for page in pages}) == 1
