# SPDX-License-Identifier: Apache-2.0
"""Admission policies that reject undeclared fields, for definitions whose schema keeps these fields.

A definition that keeps unknown fields cannot reject them itself, because CEL in a schema does not see unknown fields.
An admission policy sees the whole object, so it compares the field names with those of the schema, mapping by mapping.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from netpol_ebpf.resources.schema import CustomResource, Schema

_API = "admissionregistration.k8s.io/v1"


def unknown_field_policy(resource: CustomResource) -> list[dict[str, Any]]:
    """A ValidatingAdmissionPolicy and its binding that reject unknown fields in the spec of ``resource``."""
    name = f"unknown-fields.{resource.name}"
    group, _, _ = resource.api_version.partition("/")
    return [
        {
            "apiVersion": _API,
            "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": name},
            "spec": {
                "failurePolicy": "Fail",
                "matchConstraints": {
                    "matchPolicy": "Equivalent",
                    "resourceRules": [
                        {
                            "apiGroups": [group],
                            "apiVersions": ["*"],
                            "operations": ["CREATE", "UPDATE"],
                            "resources": [resource.plural],
                        }
                    ],
                },
                "validations": [
                    {"expression": expression, "message": message, "reason": "Invalid"}
                    for expression, message in _validations(resource.spec, "object.spec", "spec", 0)
                ],
            },
        },
        {
            "apiVersion": _API,
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": name},
            "spec": {"policyName": name, "validationActions": ["Deny"]},
        },
    ]


def _validations(schema: Schema, value: str, place: str, depth: int) -> Iterator[tuple[str, str]]:
    """A CEL expression and a message for a mapping, and for each mapping inside it.

    ``schema``: the schema of the mapping.
    ``value``: the CEL expression for the mapping.
    ``place``: the name of the mapping in messages.
    ``depth``: how many lists contain the mapping.
    """
    fields = schema["properties"]
    names = ", ".join(f"'{name}'" for name in fields)
    yield f"{value}.all(k, k in [{names}])", f"{place} has an unknown field; known here are {', '.join(fields)}"
    for name, below in fields.items():
        inner, inside = f"{value}.{name}", f"{place}.{name}"
        if "properties" in below:
            found = _validations(below, inner, inside, depth)
            form = "{}"
        elif "properties" in below.get("items", {}):
            each = f"e{depth}"
            found = _validations(below["items"], each, f"{inside}[*]", depth + 1)
            form = f"{inner}.all({each}, {{}})"
        else:
            continue
        for expression, message in found:
            yield f"!has({inner}) || {form.format(expression)}", message
