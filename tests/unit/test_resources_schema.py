# SPDX-License-Identifier: Apache-2.0
"""The schemas of custom resources and the parsers know the same fields, at the same places."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from netpol_ebpf.resources import calico, calico_configuration, schema_calico, schema_signetwork, signetwork
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.resources.reader import Reader
from netpol_ebpf.resources.schema import CustomResource, Schema, definition, re2, struct
from tests.apiserver.api_objects import WRONG, Wrong

RESOURCES = (*schema_calico.RESOURCES, *schema_signetwork.RESOURCES)
PARSERS = {
    (kind.api_version, kind.kind): kind
    for module in (calico, calico_configuration, signetwork)
    for kind in module.KINDS
    if kind.kind != "WorkloadEndpoint"
}
"""A WorkloadEndpoint is made of a pod; nobody writes one to an API server."""

Steps = tuple[str, ...]
"""The way to a mapping: names of fields, and * for any entry of a list."""


def structs(schema: Schema, way: Steps = ()) -> Iterator[tuple[Steps, Schema]]:
    """Every mapping with declared fields, and the way to it."""
    if "properties" in schema:
        yield way, schema
        for name, below in schema["properties"].items():
            yield from structs(below, (*way, name))
    elif "items" in schema:
        yield from structs(schema["items"], (*way, "*"))


def example(schema: Schema) -> Any:
    """A value of the schema's type."""
    if "enum" in schema:
        return schema["enum"][0]
    if "properties" in schema or "additionalProperties" in schema:
        return {}
    if "items" in schema:
        return [example(schema["items"])]
    return {"integer": 1, "number": 1.0, "boolean": True}.get(schema.get("type", ""), "x")


def instance(resource: CustomResource, way: Steps, field: str, value: Any) -> dict[str, Any]:
    """An object that leads to one mapping, with one field in it."""
    inner: Any = {field: value}
    for step in reversed(way):
        inner = [inner] if step == "*" else {step: inner}
    name = "default" if resource.kind.endswith(("Configuration", "BaselineAdminNetworkPolicy")) else "x"
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": name}, "spec": inner}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[Steps, set[str]]:
    """The fields that parsers ask for, by the mapping they are in."""
    found: dict[Steps, set[str]] = defaultdict(set)

    def note(reader: Reader, *keys: str) -> None:
        if reader.path[:1] == ("spec",):
            found[tuple("*" if isinstance(step, int) else step for step in reader.path[1:])].update(keys)

    raw, ignore = Reader.raw, Reader.ignore

    def noted_raw(self: Reader, key: str) -> Any:
        note(self, key)
        return raw(self, key)

    def noted_ignore(self: Reader, *keys: str) -> None:
        note(self, *keys)
        ignore(self, *keys)

    monkeypatch.setattr(Reader, "raw", noted_raw)
    monkeypatch.setattr(Reader, "ignore", noted_ignore)
    return found


def test_every_kind_that_is_read_has_a_definition() -> None:
    """A kind of an API server that has a parser has a schema, with the same scope."""
    assert {(one.api_version, one.kind): one.namespaced for one in RESOURCES} == {
        key: kind.namespaced for key, kind in PARSERS.items()
    }


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one.kind)
def test_the_parser_and_the_schema_know_the_same_fields(resource: CustomResource, read: dict[Steps, set[str]]) -> None:
    """No parser asks for a field that the schema lacks, and none calls a field of the schema unknown."""
    declared = {way: set(schema["properties"]) for way, schema in structs(resource.spec)}
    unknown = []
    for way, schema in structs(resource.spec):
        for field, below in schema["properties"].items():
            result = parse_object(instance(resource, way, field, example(below)), "x.yaml")
            unknown += [
                (*way, field, problem.message)
                for problem in result.problems
                if problem.slug in ("unknown-field", "unknown-kind", "wrong-depth", "unknown-peer")
                and f"`{field}`" in problem.message
            ]
    assert unknown == []
    assert dict(read) == declared


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one.kind)
def test_words_are_those_of_the_parser(resource: CustomResource) -> None:
    """A text with a fixed set of values has the same set in both."""
    for way, schema in structs(resource.spec):
        for field, below in schema["properties"].items():
            one = below.get("items", below)
            if one.get("type") != "string" or "enum" not in one:
                continue
            wrong = ["Wrong"] if "items" in below else "Wrong"
            result = parse_object(instance(resource, way, field, wrong), "x.yaml")
            messages = [problem.message for problem in result.problems if problem.slug == "enum"]
            assert messages, (*way, field)
            assert all(value in messages[0] for value in one["enum"]), (messages, one["enum"])


def test_a_pattern_that_only_python_reads_is_refused() -> None:
    """RE2 has no look-ahead."""
    with pytest.raises(ValueError, match="not a pattern"):
        re2(re.compile(r"(?=x)x\Z"))


def test_unknown_fields_are_kept_everywhere_in_the_kinds_of_the_network_group() -> None:
    """What an API server drops from these, no agent could fail closed on."""
    for resource in schema_signetwork.RESOURCES:
        ways = [
            way
            for way, schema in structs(resource.spec)
            if schema.get("x-kubernetes-preserve-unknown-fields") is not True
        ]
        assert ways == []


def test_an_object_without_spec_gets_the_defaults() -> None:
    """Where every field of a spec is optional, the spec is too."""
    resource = next(one for one in RESOURCES if one.kind == "Tier")
    schema = definition(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert schema["properties"]["spec"]["default"] == {}


def test_a_mapping_with_one_field() -> None:
    """Exactly one of the fields."""
    schema = struct("x", {"a": {"type": "string"}}, one_field=True)
    assert (schema["minProperties"], schema["maxProperties"]) == (1, 1)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda one: f"{one.kind}-{one.about}".replace(" ", "_"))
def test_the_parser_refuses_what_an_api_server_must_refuse(wrong: Wrong) -> None:
    """Each of the wrong objects that tests/apiserver sends has an error here."""
    assert parse_object(wrong.object, "x.yaml").errors
