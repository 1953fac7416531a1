# SPDX-License-Identifier: Apache-2.0
"""An unknown field of a SIG-network kind fails closed: the API server rejects it, and otherwise the parser denies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from api_objects import CHART, documents
from server import Server, collection

from netpol_ebpf.resources import schema_signetwork
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.resources.schema import CustomResource, Schema

FULL_SELECTOR: dict[str, Any] = {
    "matchLabels": {"a": "b"},
    "matchExpressions": [{"key": "c", "operator": "In", "values": ["d"]}],
}
SAMPLES = {
    "networks": ["10.0.0.0/8"],
    "domainNames": ["example.com"],
    "namedPort": "web",
    "destinationNamedPort": "web",
}


def sample(schema: Schema, name: str = "") -> Any:
    """A valid value with as many nested mappings as possible."""
    if name in SAMPLES:
        return SAMPLES[name]
    if "enum" in schema:
        return schema["enum"][0]
    if "matchLabels" in schema.get("properties", {}):
        return copy.deepcopy(FULL_SELECTOR)
    if "items" in schema:
        return [sample(schema["items"])]
    if "properties" in schema:
        return {key: sample(below, key) for key, below in schema["properties"].items()}
    return {"integer": 1}.get(schema["type"], "x")


Way = tuple[Any, ...]


def variants(resource: CustomResource) -> Iterator[tuple[Way, dict[str, Any]]]:
    """Each path to a mapping of the spec, and a valid spec that has a mapping at this path."""
    yield from _variants(resource.spec, (), base(resource))


def base(resource: CustomResource) -> dict[str, Any]:
    """A valid spec without rules."""
    spec: dict[str, Any] = {"subject": {"namespaces": copy.deepcopy(FULL_SELECTOR)}}
    if "priority" in resource.spec["properties"]:
        spec["priority"] = 1
    if "tier" in resource.spec["properties"]:
        spec["tier"] = "Admin"
    return spec


def _variants(schema: Schema, way: Way, spec: dict[str, Any]) -> Iterator[tuple[Way, dict[str, Any]]]:
    yield way, spec
    for name, below in schema["properties"].items():
        inner = below.get("items", below)
        if "properties" not in inner:
            continue
        here = (*way, name, 0) if "items" in below else (*way, name)
        changed = copy.deepcopy(spec)
        put(changed, (*way, name), [minimal(inner)] if "items" in below else minimal(inner), only=exclusive(schema))
        yield from _variants(inner, here, changed)


def exclusive(schema: Schema) -> bool:
    """Whether a mapping may have only one field, by a size limit or by a rule."""
    return schema.get("maxProperties") == 1 or set(schema["properties"]) == {"namespaces", "pods"}


def minimal(schema: Schema) -> Any:
    """The smallest valid mapping."""
    fields = schema["properties"]
    if "matchLabels" in fields:
        return copy.deepcopy(FULL_SELECTOR)
    if "operator" in fields:
        return dict(FULL_SELECTOR["matchExpressions"][0])
    names = list(schema.get("required", ())) or list(fields)[:1]
    if set(fields) >= {"namespaces", "podSelector"}:
        names = ["namespaceSelector", "podSelector"]
    return {name: _least(fields[name], name) for name in names}


def _least(schema: Schema, name: str) -> Any:
    if "items" in schema and "properties" in schema["items"]:
        return [minimal(schema["items"])]
    if "properties" in schema:
        return minimal(schema)
    if name in ("start", "end"):
        return 1 if name == "start" else 2
    return sample(schema, name)


def put(spec: dict[str, Any], way: Way, value: Any, *, only: bool) -> None:
    """Set the value at a path. ``only``: also remove all other fields there."""
    holder: Any = spec
    for step in way[:-1]:
        holder = holder[step]
    if only:
        holder.clear()
    if way[-1] == "namespaces" and "podSelector" in holder:  # the older form has only one of the two fields
        holder.pop("namespaceSelector", None)
    holder[way[-1]] = value


CASES = [
    pytest.param(resource, way, spec, id=f"{resource.kind}-{'.'.join(map(str, way)) or 'spec'}")
    for resource in schema_signetwork.RESOURCES
    for way, spec in variants(resource)
    if "namespaceSelector" not in way[:-1] or "namespaces" not in way  # this is an ordinary label selector
]


def object_of(resource: CustomResource, spec: dict[str, Any]) -> dict[str, Any]:
    name = "default" if resource.kind.startswith("Baseline") else "x"
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": name}, "spec": spec}


def with_unknown(spec: dict[str, Any], way: Way) -> dict[str, Any]:
    changed = copy.deepcopy(spec)
    holder: Any = changed
    for step in way:
        holder = holder[step]
    holder["newField"] = {"a": "b"}
    return changed


@pytest.mark.parametrize(("resource", "way", "spec"), CASES)
def test_without_the_admission_policy_the_parser_fails_closed(
    server: Server, resource: CustomResource, way: Way, spec: dict[str, Any]
) -> None:
    """The stored object keeps the field.

    So the object is an error, or its rule allows nothing and denies everything.
    """
    answer = server.create(object_of(resource, with_unknown(spec, way)), dryRun="All")
    if answer.status == 422:
        assert "at most 1" in answer.message
        return
    assert answer.status == 201, answer.message
    result = parse_object(answer.body, "x.yaml")
    assert result.errors or any(problem.slug == "unknown-peer" for problem in result.problems)


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[Server]:
    """A server with the admission policy in force."""
    objects = documents(CHART / "admission" / "unknown-fields.yaml")
    for obj in objects:
        answer = server.apply(obj, fieldValidation="Strict")
        assert answer.status in (200, 201), answer.message
    for resource in schema_signetwork.RESOURCES:
        probe = object_of(resource, with_unknown(base(resource), ()))
        server.wait_for(lambda probe=probe: server.create(probe, dryRun="All").status == 422, resource.kind)
    yield server
    for obj in reversed(objects):
        server.request("DELETE", f"{collection(obj)}/{obj['metadata']['name']}")
    for resource in schema_signetwork.RESOURCES:
        probe = object_of(resource, with_unknown(base(resource), ()))
        server.wait_for(lambda probe=probe: server.create(probe, dryRun="All").status == 201, resource.kind)


@pytest.mark.parametrize(("resource", "way", "spec"), CASES)
def test_the_admission_policy_refuses_it(
    guarded: Server, resource: CustomResource, way: Way, spec: dict[str, Any]
) -> None:
    """The object without the field is accepted."""
    answer = guarded.create(object_of(resource, spec), dryRun="All")
    assert answer.status == 201, answer.message
    answer = guarded.create(object_of(resource, with_unknown(spec, way)), dryRun="All")
    assert answer.status == 422, answer.body
    assert "unknown field" in answer.message or "at most 1" in answer.message


@pytest.mark.parametrize("resource", schema_signetwork.RESOURCES, ids=lambda one: one.kind)
def test_the_largest_object_is_within_the_limit_of_cost(guarded: Server, resource: CustomResource) -> None:
    """The object has as many rules and peers as the schema allows, and its CEL cost is below the API server's limit."""
    rules = resource.spec["properties"]["ingress"]
    one = minimal(rules["items"])
    peers = rules["items"]["properties"]["from"]["maxItems"]
    one["from"] = one["from"] * peers
    spec = base(resource) | {"ingress": [one] * rules["maxItems"]}
    answer = guarded.create(object_of(resource, spec), dryRun="All")
    assert answer.status == 201, answer.message
