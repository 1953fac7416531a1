# SPDX-License-Identifier: Apache-2.0
"""Building blocks for the schemas of custom resources, and the CustomResourceDefinition with a schema.

A schema is the OpenAPI mapping that an API server reads ("structural schema").  Names, patterns and limits come from
the parsers beside this module; `tests/unit/test_resources_schema.py` checks that parsers and schemas have the same
fields.  Every list and text that a CEL rule reads is bounded, because the API server estimates the cost of a rule from
the bounds and rejects a definition that is too expensive.

Nothing imports this module at run time.  `scripts/generate_crds.py` writes `deploy/chart/crds` from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netpol_ebpf.resources.syntax import MAX_LABEL, MAX_NAME, MAX_PORT

Schema = dict[str, Any]
"""An OpenAPI v3 schema, as JSON values."""

WIDE = 256
"""The bound of a list that the API does not bound; arbitrary. It limits the estimated cost of CEL rules."""

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DNS_LABEL = rf"^{LABEL}$"
DNS_SUBDOMAIN = rf"^{LABEL}(\.{LABEL})*$"
LABEL_VALUE = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
LABEL_KEY = rf"^({LABEL}(\.{LABEL})*/)?([A-Za-z0-9][-A-Za-z0-9_.]{{0,61}})?[A-Za-z0-9]$"
ONE_LINE = r"^[^\n]*$"
PORT_NAME = r"^([0-9]-?)*[a-z](-?[a-z0-9])*$"
"""The pattern of an IANA service name (RFC 6335): at least one letter, only single dashes, no dash at an end."""
MAX_PORT_NAME = 15
MAX_CIDR = 49
"""How many characters the longest CIDR has: an IPv6 address that ends in an IPv4 address, with a prefix length."""
DOMAIN_LABEL = r"[A-Za-z0-9_]([-A-Za-z0-9_]{0,61}[A-Za-z0-9_])?"


def re2(pattern: re.Pattern[str]) -> str:
    r"""A parser's pattern in RE2 syntax, for the API server. It must have no look-ahead, and end in ``\Z``."""
    text = pattern.pattern
    if not text.endswith(r"\Z") or "(?=" in text or "(?!" in text:
        raise ValueError(f"not a pattern of both Python and RE2: {text}")
    return f"^({text.removesuffix(chr(92) + 'Z')})$".replace("(?:", "(")


# --- scalars --------------------------------------------------------------------------------------------------------


def text(
    about: str,
    *,
    longest: int | None = None,
    pattern: str | None = None,
    form: str | None = None,
    default: str | None = None,
    required: bool = False,
) -> Schema:
    """The schema of a text field.

    ``longest``: the largest number of characters.
    ``form``: an OpenAPI format.
    ``required``: whether the text must not be empty.
    """
    optional = {
        "default": default,
        "minLength": 1 if required else None,
        "maxLength": longest,
        "pattern": pattern,
        "format": form,
    }
    return {
        "description": about,
        "type": "string",
        **{key: value for key, value in optional.items() if value is not None},
    }


def word(about: str, values: Sequence[str], *, default: str | None = None) -> Schema:
    """The schema of a text field with a fixed set of values."""
    return {"description": about, "type": "string", **({"default": default} if default else {}), "enum": list(values)}


def dns_label(about: str, *, default: str | None = None) -> Schema:
    """The schema of a namespace's or tier's name."""
    return text(about, longest=MAX_LABEL, pattern=DNS_LABEL, default=default)


def dns_name(about: str, *, required: bool = False) -> Schema:
    """The schema of an object's name. Without ``required``, the name may be empty."""
    pattern = DNS_SUBDOMAIN if required else rf"^({LABEL}(\.{LABEL})*)?$"
    return text(about, longest=MAX_NAME, pattern=pattern, required=required)


def integer(about: str, low: int, high: int) -> Schema:
    """The schema of a whole number between two bounds (inclusive)."""
    return {"description": about, "type": "integer", "format": "int64", "minimum": low, "maximum": high}


def port_number(about: str) -> Schema:
    """The schema of a port number."""
    return integer(about, 1, MAX_PORT)


def number(about: str) -> Schema:
    """The schema of a floating point number of 64 bits."""
    return {"description": about, "type": "number"}


def boolean(about: str) -> Schema:
    """The schema of a boolean field."""
    return {"description": about, "type": "boolean"}


def integer_or_text(about: str, low: int, high: int, longest: int, pattern: str) -> Schema:
    """The schema of an integer from ``low`` to ``high``, or a text (``pattern``) of at most ``longest`` characters."""
    return {
        "description": about,
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "minimum": low,
        "maximum": high,
        "maxLength": longest,
        "pattern": pattern,
    }


# --- containers -----------------------------------------------------------------------------------------------------


def list_of(
    about: str, items: Schema, most: int | None = None, *, least: int | None = None, is_set: bool = False
) -> Schema:
    """The schema of a list of ``least`` to ``most`` items.

    ``is_set``: whether no item may occur twice; then the order has no meaning.
    """
    bounds = {"minItems": least, "maxItems": most}
    return {
        "description": about,
        "type": "array",
        "x-kubernetes-list-type": "set" if is_set else "atomic",
        **{key: value for key, value in bounds.items() if value is not None},
        "items": items,
    }


def text_map(about: str, values: Schema) -> Schema:
    """The schema of a mapping of names to texts."""
    return {"description": about, "type": "object", "additionalProperties": values}


def rule(expression: str, message: str) -> dict[str, str]:
    """A validation rule. ``expression``: CEL over ``self`` that must be true. ``message``: shown if it is false."""
    return {"rule": " ".join(expression.split()), "message": message}


def struct(
    about: str,
    fields: Mapping[str, Schema],
    *,
    required: Sequence[str] = (),
    rules: Sequence[Mapping[str, str]] = (),
    one_field: bool = False,
    more: Mapping[str, Any] | None = None,
) -> Schema:
    """The schema of a mapping with known fields.

    ``one_field``: whether exactly one of the fields must be present.
    ``more``: further OpenAPI keys of the schema.
    """
    schema: Schema = {"description": about, "type": "object", **(more or {})}
    if one_field:
        schema |= {"minProperties": 1, "maxProperties": 1}
    if required:
        schema["required"] = list(required)
    schema["properties"] = dict(fields)
    if rules:
        schema["x-kubernetes-validations"] = [dict(one) for one in rules]
    return schema


def keep_unknown_fields(schema: Schema) -> Schema:
    """A copy of ``schema`` whose mappings keep undeclared fields, so that readers of an object get these fields."""
    kept = dict(schema)
    if "properties" in kept:
        kept["properties"] = {name: keep_unknown_fields(below) for name, below in kept["properties"].items()}
        kept["x-kubernetes-preserve-unknown-fields"] = True
    if "items" in kept:
        kept["items"] = keep_unknown_fields(kept["items"])
    return kept


def given(field: str) -> str:
    """The CEL expression for "the list, mapping or text ``field`` is present and not empty"."""
    return f"(has(self.{field}) && size(self.{field}) > 0)"


def label_selector(about: str) -> Schema:
    """The schema of a Kubernetes label selector."""
    values = list_of("Values; none with Exists and DoesNotExist.", text("A value.", longest=63, pattern=LABEL_VALUE))
    # anyOf is used instead of CEL, because CEL would need bounds on lists that Kubernetes leaves unbounded
    expression = struct(
        "A requirement on one label.",
        {
            "key": text("The label's name.", longest=MAX_NAME + 1 + MAX_LABEL, pattern=LABEL_KEY),
            "operator": word("How the label is compared.", ("In", "NotIn", "Exists", "DoesNotExist")),
            "values": values,
        },
        required=("key", "operator"),
        more={
            "anyOf": [
                {
                    "properties": {"operator": {"enum": ["In", "NotIn"]}, "values": {"minItems": 1}},
                    "required": ["values"],
                },
                {"properties": {"operator": {"enum": ["Exists", "DoesNotExist"]}, "values": {"maxItems": 0}}},
            ]
        },
    )
    return struct(
        about,
        {
            "matchLabels": text_map(
                "Labels that must all be there.", text("A value.", longest=63, pattern=LABEL_VALUE)
            ),
            "matchExpressions": list_of("Requirements that must all hold.", expression),
        },
    )


# --- definitions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CustomResource:
    """One custom resource: its names, its scope, the schema of its spec, and further properties of its definition.

    ``columns``: (title, type, JSON path) of each column of ``kubectl get``.
    ``selectable``: JSON paths of field selectors.
    ``rules``: CEL rules over the whole object, where ``metadata.name`` is readable.
    ``spec_default``: whether an object without a spec gets an empty spec.
    ``has_status``: whether agents report on the object in conditions of its status.
    """

    api_version: str
    kind: str
    plural: str
    short_names: tuple[str, ...]
    namespaced: bool
    spec: Schema
    columns: tuple[tuple[str, str, str], ...] = ()
    selectable: tuple[str, ...] = ()
    rules: tuple[Mapping[str, str], ...] = ()
    spec_default: bool = True
    has_status: bool = True
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of the definition. The file of the definition has the same name."""
        return f"{self.plural}.{self.api_version.partition('/')[0]}"


def definition(resource: CustomResource) -> dict[str, Any]:
    """The CustomResourceDefinition (apiextensions.k8s.io/v1) of a custom resource, as JSON values."""
    group, _, version = resource.api_version.partition("/")
    spec = dict(resource.spec)
    if resource.spec_default:
        spec = {"description": spec.pop("description"), "default": {}, **spec}
    schema = struct(
        spec["description"],
        {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            **({"status": _STATUS} if resource.has_status else {}),
        },
        required=("spec",),
        rules=resource.rules,
    )
    columns = [{"name": title, "type": kind, "jsonPath": path} for title, kind, path in (*resource.columns, _AGE)]
    served: dict[str, Any] = {
        "name": version,
        "served": True,
        "storage": True,
        **({"subresources": {"status": {}}} if resource.has_status else {}),
        "additionalPrinterColumns": columns,
    }
    if resource.selectable:
        served["selectableFields"] = [{"jsonPath": path} for path in resource.selectable]
    served["schema"] = {"openAPIV3Schema": schema}
    metadata: dict[str, Any] = {"name": resource.name}
    if resource.annotations:
        metadata["annotations"] = dict(resource.annotations)
    names: dict[str, Any] = {
        "kind": resource.kind,
        "listKind": f"{resource.kind}List",
        "plural": resource.plural,
        "singular": resource.kind.lower(),
    }
    if resource.short_names:
        names["shortNames"] = list(resource.short_names)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": {
            "group": group,
            "names": names,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "versions": [served],
        },
    }


_AGE = ("Age", "date", ".metadata.creationTimestamp")

_CONDITION = struct(
    "One statement about the object.",
    {
        "type": text("What it is about, such as Programmed.", longest=316, required=True),
        "status": word("Whether it holds.", ("True", "False", "Unknown")),
        "observedGeneration": {
            "description": "The metadata.generation it was made of.",
            "type": "integer",
            "format": "int64",
        },
        "lastTransitionTime": text("When the status last changed.", form="date-time"),
        "reason": text("Why, in one word.", longest=1024, required=True),
        "message": text("Why, for people.", longest=32768),
    },
    required=("type", "status", "lastTransitionTime", "reason", "message"),
)

_STATUS = struct(
    "What the agents report; writers of the spec cannot set it.",
    {
        "conditions": {
            "description": "One entry a type, each with its own writer.",
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
            "items": _CONDITION,
        }
    },
)
