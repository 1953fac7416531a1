# SPDX-License-Identifier: Apache-2.0
"""crd.projectcalico.org/v1: the form in which Calico stores its objects in a Kubernetes cluster.

A stored object has the spec of the same object as projectcalico.org/v3 (the *v3 object*), and different metadata.  The
name of a stored policy begins with its tier's name and a dot, even in the tier ``default``.  The name of the v3 object
may lack this prefix ``default.``.  Other metadata of the v3 object is JSON in the annotation
``projectcalico.org/metadata``.  If the annotation has a name, it is the v3 object's name.  If not, the v3 object's name
is the stored name, for policies without ``default.``.  These rules are those of libcalico-go
(`ConvertK8sResourceToCalicoResource`) and of Calico's API server since 3.29.4.  Older API servers kept ``default.`` in
the name of the v3 object, and wrote no name into the annotation.

Invariant: an object that this module reads has the name, labels and spec of the v3 object.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from netpol_ebpf.resources import calico, calico_configuration
from netpol_ebpf.resources.reader import Reader, describe
from netpol_ebpf.resources.types import Resource

VERSION = "crd.projectcalico.org/v1"
METADATA = "projectcalico.org/metadata"

_TIERED = ("NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy")
_NOT_STORED = ("WorkloadEndpoint", "Profile")
"""Kinds that Calico derives from pods, namespaces and service accounts, and does not store."""
_DEFAULT_PREFIX = f"{calico.DEFAULT_TIER}."

KINDS = tuple(
    replace(kind, api_version=VERSION, is_stored=True)
    for kind in (*calico.KINDS, *calico_configuration.KINDS)
    if kind.kind not in _NOT_STORED
)


def kept_metadata(metadata: Reader) -> Mapping[str, Any]:
    """The ``name`` and ``labels`` that the object has as projectcalico.org/v3, as far as the annotation has them.

    Empty without the annotation.
    """
    annotations = metadata.peek("annotations")
    text = annotations.get(METADATA) if isinstance(annotations, Mapping) else None
    if not isinstance(text, str):
        return {}
    try:
        kept = json.loads(text)
    except (ValueError, RecursionError):
        kept = None
    if isinstance(kept, Mapping):
        kept = {key: value for key, value in kept.items() if value is not None}
        if isinstance(kept.get("name", ""), str) and _are_labels(kept.get("labels", {})):
            return kept
    path = (*metadata.path, "annotations", METADATA)
    metadata.report.error(path, f"must be the JSON of an object's metadata; is {describe(text)}", slug="annotation")
    return {}


def _are_labels(labels: object) -> bool:
    return isinstance(labels, Mapping) and all(isinstance(text, str) for text in labels.values())


def restored_name(kind: str, name: str, kept: Mapping[str, Any]) -> str:
    """The name that the stored object ``name`` has as projectcalico.org/v3. ``kept``: the result of `kept_metadata`."""
    return kept.get("name") or (name.removeprefix(_DEFAULT_PREFIX) if kind in _TIERED else name)


def restored_labels(labels: Mapping[str, str], kept: Mapping[str, Any]) -> dict[str, str]:
    """The labels that a stored object has as projectcalico.org/v3.

    ``labels``: the labels of the stored object.
    ``kept``: the result of `kept_metadata`.

    Older versions of Calico stored the labels only in the annotation from which ``kept`` was read, newer versions store
    them only on the object. So the result has both. If both have a label, the object's value counts.
    """
    return {**kept.get("labels", {}), **labels}


def without_stored_copies(resources: Iterable[Resource]) -> list[Resource]:
    """The resources without each stored object that is also given in the form of projectcalico.org/v3."""
    given = list(resources)
    if not any(one.meta.is_stored for one in given):
        return given
    current = {(type(one), one.meta.namespace, one.meta.name) for one in given if not one.meta.is_stored}

    def is_copy(one: Resource) -> bool:
        names = (one.meta.name, one.meta.stored_name)
        return one.meta.is_stored and any((type(one), one.meta.namespace, name) in current for name in names if name)

    return [one for one in given if not is_copy(one)]


def unprefixed(name: str) -> str:
    """The v3 name of a policy stored as ``name`` without an annotation: without ``default.``; "" without this prefix."""
    return name.removeprefix(_DEFAULT_PREFIX) if name.startswith(_DEFAULT_PREFIX) else ""
