# SPDX-License-Identifier: Apache-2.0
"""A real API server accepts our definitions and all valid objects, and rejects what CEL and schemas can reject."""

from __future__ import annotations

from typing import Any

import pytest
from api_objects import ALPHA2, CALICO, CHART, WRONG, Wrong, documents, validation_cases, written
from server import Server, collection

from netpol_ebpf.resources.load import parse_object, parse_objects
from netpol_ebpf.resources.yamltree import Positions

CREATE = {"dryRun": "All", "fieldValidation": "Strict"}


def settled(server: Server, name: str) -> dict[str, Any]:
    """The conditions of a definition, after the server has set them."""
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
    server.wait_for(lambda: "conditions" in server.get(path).body.get("status", {}), name)
    conditions = server.get(path).body["status"]["conditions"]
    return {one["type"]: one for one in conditions}


@pytest.mark.parametrize("path", sorted((CHART / "crds").glob("*.*.yaml")), ids=lambda path: path.stem)
def test_a_definition_is_structural_and_its_names_are_free(server: Server, path: Any) -> None:
    """The definition is established, and no condition complains of its schema or its names."""
    (definition,) = documents(path)
    conditions = settled(server, definition["metadata"]["name"])
    assert conditions["Established"]["status"] == "True"
    assert conditions["NamesAccepted"]["status"] == "True"
    assert conditions.get("NonStructuralSchema", {}).get("status", "False") == "False"


def test_what_the_parsers_accept_is_accepted(server: Server) -> None:
    """The server accepts every object of examples and case files without an error, and drops none of its fields."""
    sent = 0
    for where, obj in written():
        namespace = obj["metadata"].get("namespace", "default")
        result = parse_objects([(obj, Positions(where))])
        if result.errors:
            continue
        ensure_namespace(server, namespace)
        answer = server.create(obj, **CREATE)
        assert answer.status == 201, f"{where}: {answer.message}"
        assert covers(answer.body.get("spec", {}), obj.get("spec") or {}), where
        sent += 1
    assert sent > 100


@pytest.mark.parametrize(
    ("about", "obj"), [pytest.param(*case, id=case[0].replace(" ", "_")) for case in validation_cases()]
)
def test_the_server_refuses_nothing_that_the_parsers_accept(server: Server, about: str, obj: dict[str, Any]) -> None:
    """For objects of upstream's own tests: if the server rejects an object, the parser reports an error, too."""
    ensure_namespace(server, obj["metadata"].get("namespace", "default"))
    answer = server.create(obj, dryRun="All")
    assert answer.status in (201, 422), answer.message
    if answer.status == 422:
        assert parse_objects([(obj, Positions(about))]).errors, answer.message


def ensure_namespace(server: Server, name: str) -> None:
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def covers(stored: Any, written_value: Any) -> bool:
    """Whether all written values are stored. Null counts as absent, and defaults may be added."""
    if isinstance(written_value, dict):
        return isinstance(stored, dict) and all(
            value is None or covers(stored.get(key), value) for key, value in written_value.items()
        )
    if isinstance(written_value, list):
        return len(stored) == len(written_value) and all(map(covers, stored, written_value))
    return bool(stored == written_value)


@pytest.mark.parametrize(
    "wrong", [one for one in WRONG if one.says], ids=lambda one: f"{one.kind}-{one.about}".replace(" ", "_")
)
def test_a_wrong_object_is_refused(server: Server, wrong: Wrong) -> None:
    """The object is rejected with a message that names the fault."""
    answer = server.create(wrong.object, dryRun="All")
    assert answer.status == 422, answer.body
    assert wrong.says in answer.message


@pytest.mark.parametrize("wrong", [one for one in WRONG if not one.says], ids=lambda one: one.about.replace(" ", "_"))
def test_what_only_check_can_refuse(server: Server, wrong: Wrong) -> None:
    """The server accepts the object, as the documentation says.

    If it ever rejects the object, the case must move to the others.
    """
    answer = server.create(wrong.object, dryRun="All")
    assert answer.status == 201, answer.message


def test_defaults(server: Server) -> None:
    """An object without spec, or with a null tier, is in the tier default; one with an empty tier is rejected."""
    obj: dict[str, Any] = {
        "apiVersion": CALICO,
        "kind": "NetworkPolicy",
        "metadata": {"name": "x", "namespace": "default"},
    }
    assert server.create(obj, dryRun="All").body["spec"] == {"tier": "default"}
    assert server.create({**obj, "spec": {"tier": None}}, dryRun="All").body["spec"]["tier"] == "default"
    assert server.create({**obj, "spec": {"tier": ""}}, dryRun="All").status == 422
    staged = {**obj, "kind": "StagedNetworkPolicy"}
    assert server.create(staged, dryRun="All").body["spec"] == {"tier": "default", "stagedAction": "Set"}
    tier = {"apiVersion": CALICO, "kind": "Tier", "metadata": {"name": "x"}}
    assert server.create(tier, dryRun="All").body["spec"] == {"defaultAction": "Deny"}


def test_defaults_change_nothing_for_the_parser(server: Server) -> None:
    """The stored object with its defaults has the same meaning as the written object."""
    for where, obj in written():
        before = parse_objects([(obj, Positions(where))])
        if before.errors:
            continue
        ensure_namespace(server, obj["metadata"].get("namespace", "default"))
        after = parse_object(server.create(obj, **CREATE).body, where)
        assert [unplaced(one) for one in after.resources] == [unplaced(one) for one in before.resources], where


def unplaced(value: Any) -> Any:
    """A resource without the positions in its source."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: unplaced(getattr(value, name)) for name in value.__dataclass_fields__ if name != "location"}
    return [unplaced(one) for one in value] if isinstance(value, tuple) else value


def test_an_unknown_field_of_a_calico_kind(server: Server) -> None:
    """If the writer requests strict validation, as kubectl does, the field is rejected.

    Otherwise it is dropped with a warning.
    """
    obj = {
        "apiVersion": CALICO,
        "kind": "NetworkPolicy",
        "metadata": {"name": "x", "namespace": "default"},
        "spec": {"selectors": "all()"},
    }
    assert server.create(obj, **CREATE).status == 400
    answer = server.create(obj, dryRun="All")
    assert answer.status == 201
    assert any("selectors" in warning for warning in answer.warnings)


def test_columns(server: Server) -> None:
    """The columns of a policy, as kubectl shows them."""
    path = f"/apis/{CALICO}/globalnetworkpolicies"
    made = server.create(
        {"apiVersion": CALICO, "kind": "GlobalNetworkPolicy", "metadata": {"name": "columns"}, "spec": {"order": 7}}
    )
    assert made.status == 201, made.message
    table = server.request("GET", path, accept="application/json;as=Table;v=v1;g=meta.k8s.io").body
    assert [one["name"] for one in table["columnDefinitions"]] == ["Name", "Tier", "Order", "Age"]
    assert next(row["cells"][:3] for row in table["rows"] if row["cells"][0] == "columns") == ["columns", "default", 7]
    server.request("DELETE", f"{path}/columns")


def test_field_selectors(server: Server) -> None:
    """Field selectors find policies by tier, host endpoints by node, and SIG-network policies by tier."""
    objects = [
        {"apiVersion": CALICO, "kind": "GlobalNetworkPolicy", "metadata": {"name": name}, "spec": {"tier": name}}
        for name in ("one", "two")
    ]
    for obj in objects:
        assert server.create(obj).status == 201
    found = server.get(f"/apis/{CALICO}/globalnetworkpolicies", fieldSelector="spec.tier=two").body["items"]
    assert [one["metadata"]["name"] for one in found] == ["two"]
    for path, selector in (("hostendpoints", "spec.node=a"), ("stagednetworkpolicies", "spec.tier=a")):
        assert server.get(f"/apis/{CALICO}/{path}", fieldSelector=selector).status == 200
    assert server.get(f"/apis/{ALPHA2}/clusternetworkpolicies", fieldSelector="spec.tier=Admin").status == 200
    for obj in objects:
        server.request("DELETE", f"{collection(obj)}/{obj['metadata']['name']}")


def test_status_is_a_subresource_with_an_entry_a_writer(server: Server) -> None:
    """A write of the object ignores the status, and two writers of the status keep one entry each."""
    obj = {"apiVersion": CALICO, "kind": "Tier", "metadata": {"name": "status"}, "spec": {"order": 3}}
    condition = {"status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "Done", "message": ""}
    one = {**condition, "type": "example.org/one"}
    assert "status" not in server.create({**obj, "status": {"conditions": [one]}}).body
    path = f"{collection(obj)}/status"  # the object is named "status"
    for writer in ("one", "two"):
        body = {key: obj[key] for key in ("apiVersion", "kind", "metadata")}
        body["status"] = {"conditions": [{**condition, "type": f"example.org/{writer}"}]}
        answer = server.request(
            "PATCH",
            f"{path}/status",
            body,
            content_type="application/apply-patch+yaml",
            fieldManager=writer,
        )
        assert answer.status == 200, answer.message
    types = [entry["type"] for entry in server.get(path).body["status"]["conditions"]]
    assert types == ["example.org/one", "example.org/two"]
    server.request("DELETE", path)
