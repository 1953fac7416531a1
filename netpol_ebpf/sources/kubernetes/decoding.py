# SPDX-License-Identifier: Apache-2.0
"""Decodes JSON of the API server into mappings for the parsers of `resources`.

This module also declares which kinds and fields are read.

The decoder is typed. Of the cluster's own objects (a pod is mostly managedFields and volumes) only the declared fields
become Python objects: plain mappings that the kind's parser reads like a manifest. Policies are decoded whole, because
an unknown field of a policy must be reported.

Invariant: each kind has only one parser, in `resources`; this module drops fields and validates none. An object with a
structure that the declaration does not allow is decoded whole, so that its parser reports the error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Optional, TypedDict

import msgspec

from netpol_ebpf.errors import Problem
from netpol_ebpf.resources import calico_storage
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.resources.types import Resource

CALICO = "projectcalico.org/v3"
SIG_NETWORK = "policy.networking.k8s.io/"


class MalformedError(Exception):
    """The server's answer violates its API. Nothing of the answer may be used."""


@dataclass(frozen=True, slots=True)
class WatchedKind:
    """A kind as the server offers it.

    ``is_custom``: a CustomResourceDefinition defines the kind, so it may be absent or be deleted.
    """

    api_version: str
    kind: str
    plural: str
    is_custom: bool = False

    @property
    def path(self) -> str:
        """The API path of all objects of the kind, in all namespaces."""
        return f"/{'apis' if '/' in self.api_version else 'api'}/{self.api_version}/{self.plural}"

    @property
    def group_path(self) -> str:
        """The API path at which the server lists the kinds of this apiVersion."""
        return self.path.rpartition("/")[0]

    @property
    def definition(self) -> str:
        """The API path of the kind's CustomResourceDefinition."""
        group = self.api_version.partition("/")[0]
        return f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{self.plural}.{group}"

    def __str__(self) -> str:
        return f"{self.plural}.{self.api_version.partition('/')[0]}" if "/" in self.api_version else self.plural


def _custom(api_version: str, *kinds: str) -> tuple[WatchedKind, ...]:
    return tuple(WatchedKind(api_version, kind, _plural(kind), is_custom=True) for kind in kinds)


def _plural(kind: str) -> str:
    lower = kind.lower()
    return f"{lower[:-1]}ies" if lower.endswith("y") else f"{lower}s"


# WorkloadEndpoint and Profile are not watched: where pods are the workloads, Calico's API makes both up of pods, namespaces and
# service accounts, which are watched themselves.
_CALICO_KINDS = (
    "NetworkPolicy",
    "GlobalNetworkPolicy",
    "StagedNetworkPolicy",
    "StagedGlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy",
    "Tier",
    "NetworkSet",
    "GlobalNetworkSet",
    "HostEndpoint",
    "FelixConfiguration",
    "KubeControllersConfiguration",
)

KINDS = (
    WatchedKind("v1", "Namespace", "namespaces"),
    WatchedKind("v1", "ServiceAccount", "serviceaccounts"),
    WatchedKind("v1", "Node", "nodes"),
    WatchedKind("v1", "Pod", "pods"),
    WatchedKind("v1", "Service", "services"),
    WatchedKind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices"),
    WatchedKind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    *_custom(CALICO, *_CALICO_KINDS),
    *_custom(SIG_NETWORK + "v1alpha1", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy"),
    *_custom(SIG_NETWORK + "v1alpha2", "ClusterNetworkPolicy"),
    *_custom(calico_storage.VERSION, *_CALICO_KINDS),
)
"""All kinds that policy consists of or refers to."""


# --- the fields that are used ----------------------------------------------------------------------------------------------------
# Values are `Any`, because the parser validates them.


class _Metadata(TypedDict, total=False):
    name: Any
    namespace: Any
    labels: Any
    annotations: Any
    deletionTimestamp: Any
    resourceVersion: Any


class _WithMetadata(TypedDict, total=False):
    metadata: _Metadata


class _PodMetadata(_Metadata, total=False):
    uid: Any


class _Container(TypedDict, total=False):
    ports: Any


class _PodSpec(TypedDict, total=False):
    nodeName: Any
    serviceAccountName: Any
    serviceAccount: Any
    hostNetwork: Any
    initContainers: Optional[list[_Container]]
    containers: Optional[list[_Container]]


class _PodStatus(TypedDict, total=False):
    phase: Any
    podIP: Any
    podIPs: Any


class _Pod(TypedDict, total=False):
    metadata: _PodMetadata
    spec: _PodSpec
    status: _PodStatus


class _NodeStatus(TypedDict, total=False):
    addresses: Any


class _Node(TypedDict, total=False):
    metadata: _Metadata
    status: _NodeStatus


class _ServiceSpec(TypedDict, total=False):
    selector: Any
    clusterIP: Any
    clusterIPs: Any
    externalIPs: Any
    ports: Any


class _ServiceStatus(TypedDict, total=False):
    loadBalancer: Any


class _Service(TypedDict, total=False):
    metadata: _Metadata
    spec: _ServiceSpec
    status: _ServiceStatus


class _SliceEndpoint(TypedDict, total=False):
    addresses: Any


class _Slice(TypedDict, total=False):
    metadata: _Metadata
    addressType: Any
    endpoints: Optional[list[_SliceEndpoint]]
    ports: Any


_FIELDS: Mapping[str, Any] = {
    "Namespace": _WithMetadata,
    "ServiceAccount": _WithMetadata,
    "Pod": _Pod,
    "Node": _Node,
    "Service": _Service,
    "EndpointSlice": _Slice,
}
"""The fields to decode, by kind. A kind without an entry is decoded whole."""

_ANNOTATIONS_READ = ("projectcalico.org/", "vpc.amazonaws.com/", "kubernetes.io/config.mirror")
"""Annotations are decoded if their key contains one of these texts. Other annotations may contain a whole manifest."""

# `continue` is a keyword of Python, so a class cannot declare it.
_PageMetadata = TypedDict("_PageMetadata", {"resourceVersion": str, "continue": str}, total=False)


class _Page(TypedDict, total=False):
    metadata: _PageMetadata
    items: Optional[list[msgspec.Raw]]


# A struct and not a TypedDict, because msgspec 0.23 allows no Raw value in a TypedDict. It is made by a call, because a
# class statement would have a base class without types.
_Event: Any = msgspec.defstruct("_Event", [("type", str), ("object", msgspec.Raw)])


class _MarkMetadata(TypedDict, total=False):
    resourceVersion: str
    annotations: dict[str, str]


class _Mark(TypedDict, total=False):
    metadata: _MarkMetadata


class _StatusDetails(TypedDict, total=False):
    retryAfterSeconds: int


class _Status(TypedDict, total=False):
    kind: str
    message: str
    reason: str
    code: int
    details: _StatusDetails


class _OfferedResource(TypedDict, total=False):
    name: str


class _Offered(TypedDict):
    resources: list[_OfferedResource]


class _DefinitionMetadata(TypedDict, total=False):
    uid: str
    deletionTimestamp: str


class _Definition(TypedDict, total=False):
    metadata: _DefinitionMetadata


_WHOLE = dict[str, Any]

DEEPEST = 100
"""If a document is nested too deep to decode, so many levels of arrays and objects of it are kept.

The number is arbitrary, five times what any field that is read needs.
"""
_TOKENS = re.compile(rb'"[^"\\]*(?:\\(?:.|\Z)[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
"""Matches each string and each bracket of a JSON text."""


@lru_cache
def _decoder(of: Any) -> Any:
    return msgspec.json.Decoder(of)


def _decode_limited(raw: Any, of: Any) -> Any:
    """Decode JSON of any depth. Raises the errors of msgspec, except RecursionError.

    A server accepts thousands of levels in unknown fields of a custom kind. The decoder must not fail for one such
    object, because then all objects of the object's kind would be missing. So the object's levels below DEEPEST become
    null.
    """
    try:
        return _decoder(of).decode(raw)
    except RecursionError:
        return _decoder(of).decode(_without_deepest(bytes(raw)))


def _without_deepest(raw: bytes) -> bytes:
    """The JSON with null in place of each array and object below DEEPEST levels. Cost: linear."""
    parts: list[bytes] = []
    depth = begin = 0
    for token in _TOKENS.finditer(raw):
        if token[0] in b"[{":
            depth += 1
            if depth == DEEPEST + 1:
                parts += [raw[begin : token.start()], b"null"]
        elif token[0] in b"]}":
            if depth == DEEPEST + 1:
                begin = token.end()
            depth -= 1
    return b"".join([*parts, raw[begin:]] if depth <= DEEPEST else parts)


def _decode(raw: Any, of: Any, what: str) -> Any:
    try:
        return _decode_limited(raw, of)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedError(f"{what} is not as the API says: {error}") from error


# --- answers ---------------------------------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """One page of a LIST.

    ``items``: the JSON of each object. ``more``: the token of the next page, "" on the last page.
    """

    items: list[Any]
    resource_version: str
    more: str


def decode_page(body: bytes) -> Page:
    """Decode the answer to a LIST.

    Raises MalformedError, also for a list without resourceVersion, because such a list proves nothing.
    """
    page = _decode(body, _Page, "a list")
    metadata = page.get("metadata", {})
    if "items" not in page or not metadata.get("resourceVersion"):
        raise MalformedError("a list has no items or no resourceVersion")
    return Page(page["items"] or [], metadata["resourceVersion"], metadata.get("continue", ""))


class WatchEvent(NamedTuple):
    """One event of a WATCH. ``type``: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR. ``raw``: the JSON of its object."""

    type: str
    raw: Any


def decode_event(line: bytes) -> WatchEvent:
    """Decode one line of a WATCH. Raises MalformedError."""
    event = _decode(line, _Event, "an event")
    return WatchEvent(event.type, event.object)


INITIAL_EVENTS_END = "k8s.io/initial-events-end"


class Bookmark(NamedTuple):
    """A BOOKMARK event. ``ends_list``: the server has sent all objects that existed when the WATCH began."""

    resource_version: str
    ends_list: bool


def decode_bookmark(raw: Any) -> Bookmark:
    """Decode the object of a BOOKMARK, which has only metadata. Raises MalformedError."""
    metadata = _decode(raw, _Mark, "a bookmark").get("metadata", {})
    if not metadata.get("resourceVersion"):
        raise MalformedError("a bookmark has no resourceVersion")
    return Bookmark(metadata["resourceVersion"], metadata.get("annotations", {}).get(INITIAL_EVENTS_END) == "true")


class Status(NamedTuple):
    """An error that the server returned. ``retry_after_s``: None if the server gave no time."""

    code: int
    reason: str
    message: str
    retry_after_s: float | None = None


def decode_status(raw: Any, code: int = 0) -> Status:
    """Decode a Status, or the plain text that some answers have instead of a Status.

    ``code``: the HTTP code of the answer; 0: use the code in the Status.
    """
    try:
        status = _decode_limited(raw, _Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Status(code, "", bytes(raw[:200]).decode(errors="replace").strip())
    after = status.get("details", {}).get("retryAfterSeconds")
    return Status(code or status.get("code", 0), status.get("reason", ""), status.get("message", ""), after)


class Definition(NamedTuple):
    """The state of a CustomResourceDefinition. ``is_ending``: it is being deleted."""

    uid: str
    is_ending: bool


def decode_definition(raw: bytes) -> Definition:
    """Decode a CustomResourceDefinition. Raises MalformedError."""
    metadata = _decode(raw, _Definition, "a CustomResourceDefinition").get("metadata", {})
    if not metadata.get("uid"):
        raise MalformedError("a CustomResourceDefinition has no uid")
    return Definition(metadata["uid"], "deletionTimestamp" in metadata)


def decode_offered(raw: bytes) -> set[str]:
    """Decode the list of kinds of one apiVersion; returns their plural names. Raises MalformedError."""
    return {one.get("name", "") for one in _decode(raw, _Offered, "the list of kinds")["resources"]}


# --- objects ---------------------------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """The name of an object within its kind. ``namespace`` is "" for objects without a namespace."""

    namespace: str
    name: str


class Decoded(NamedTuple):
    """An object in its present state on the server.

    ``fields``: the fields that the parser reads. resourceVersion is not among them, so that two states can be compared.
    """

    name: Name
    resource_version: str
    fields: dict[str, Any]


def decode_object(kind: WatchedKind, raw: Any) -> Decoded:
    """Decode an item of a list, or the object of an event. Raises MalformedError if it has no name."""
    fields = _decode_fields(kind, raw)
    found = name_of(fields, f"an object of {kind}")
    metadata = fields["metadata"]
    version = metadata.pop("resourceVersion", "")
    if not isinstance(version, str):
        raise MalformedError(f"an object of {kind} has no resourceVersion")
    if kind.kind in _FIELDS:
        _drop_annotations(metadata)
    else:
        fields.pop("status", None)
        for key in ("managedFields", "creationTimestamp"):
            metadata.pop(key, None)
    # Items of built-in lists have no apiVersion and kind, so both come from the request.
    fields["apiVersion"], fields["kind"] = kind.api_version, kind.kind
    return Decoded(found, version, fields)


def name_of(fields: Mapping[str, Any], what: str) -> Name:
    """The name of an object. Raises MalformedError if the object has no name; ``what``: the object, for this error."""
    metadata = fields.get("metadata")
    if not isinstance(metadata, dict):
        raise MalformedError(f"{what} has no metadata")
    name, namespace = metadata.get("name"), metadata.get("namespace", "")
    if not (isinstance(name, str) and name and isinstance(namespace, str)):
        raise MalformedError(f"{what} has no name")
    return Name(namespace, name)


def _decode_fields(kind: WatchedKind, raw: Any) -> dict[str, Any]:
    of = _FIELDS.get(kind.kind, _WHOLE)
    try:
        fields: dict[str, Any] = _decode_limited(raw, of)
    except msgspec.ValidationError:  # a shape outside the declaration; the parser reports the fault
        fields = _decode(raw, _WHOLE, f"an object of {kind}")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedError(f"an object of {kind} is not JSON: {error}") from error
    return fields


def _drop_annotations(metadata: dict[str, Any]) -> None:
    annotations = metadata.get("annotations")
    if isinstance(annotations, dict):
        kept = {key: text for key, text in annotations.items() if any(domain in key for domain in _ANNOTATIONS_READ)}
        metadata["annotations"] = kept
        if not kept:
            del metadata["annotations"]


class Parsed(NamedTuple):
    """The result of parsing an object.

    ``resource``: None if the object is not valid. ``problems``: errors and warnings, located by the object's API path.
    """

    resource: Resource | None
    problems: tuple[Problem, ...]


def parse(kind: WatchedKind, name: Name, fields: Mapping[str, Any]) -> Parsed:
    """Parse an object of an API server. The locations in its problems give its API path."""
    result = parse_object(fields, object_path(kind, name))
    valid = bool(result.resources) and not result.errors
    return Parsed(result.resources[0] if valid else None, tuple(result.problems))


def object_path(kind: WatchedKind, name: Name) -> str:
    """The API path of one object, as ``kubectl get --raw`` takes it."""
    if not name.namespace:
        return f"{kind.path}/{name.name}"
    base, _, plural = kind.path.rpartition("/")
    return f"{base}/namespaces/{name.namespace}/{plural}/{name.name}"


def encode(fields: Mapping[str, Any]) -> bytes:
    """Encode the fields of an object as JSON."""
    raw: bytes = msgspec.json.encode(fields)
    return raw


def decode_fields(raw: Any) -> dict[str, Any]:
    """Decode the JSON that `encode` returned. Raises MalformedError."""
    fields: dict[str, Any] = _decode(raw, _WHOLE, "a saved object")
    return fields
