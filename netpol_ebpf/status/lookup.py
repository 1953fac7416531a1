# SPDX-License-Identifier: Apache-2.0
"""Reads the standing of one policy from an API server, with the rights of a user who may read the policy.

The nodes that need a namespaced policy are found from the pods of its namespace; for a policy of the whole cluster all
pods are needed. Invariant: the answer is derived from complete lists of objects; a list that cannot be read to its end
is an error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from netpol_ebpf.errors import InvalidInputError, PrivilegeError, UnreachableError
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.resources.load import LoadResult, parse_object
from netpol_ebpf.status.kinds import POLICY_KINDS
from netpol_ebpf.status.needs import nodes_needing
from netpol_ebpf.status.report import COLLECTION, NodeReport, parse_reports
from netpol_ebpf.status.requests import Response, Sender, request
from netpol_ebpf.status.standing import Standing, evaluate

PAGE_OBJECTS = 500
FEW_NODES = 20
"""Largest number of reports that are read one by one. Otherwise the list with the reports of all nodes is read. The
number is arbitrary."""
_CALICO = "/apis/projectcalico.org/v3"
_OF_CLUSTER = (
    ("/api/v1/namespaces", "v1", "Namespace"),
    ("/api/v1/serviceaccounts", "v1", "ServiceAccount"),
    ("/api/v1/pods", "v1", "Pod"),
    ("/api/v1/nodes", "v1", "Node"),
    (f"{_CALICO}/hostendpoints", "projectcalico.org/v3", "HostEndpoint"),
    (f"{_CALICO}/kubecontrollersconfigurations", "projectcalico.org/v3", "KubeControllersConfiguration"),
)
"""All objects from which endpoints and their labels are made: (API path, apiVersion, kind)."""


def look_up(sender: Sender, key: PolicyKey) -> Standing:
    """The present standing of a policy.

    Raises InvalidInputError if the policy does not exist, PrivilegeError if the user lacks a right, and
    UnreachableError.
    """
    kind = POLICY_KINDS[key.kind]
    path = kind.path(quote(key.namespace, safe=""), quote(key.name, safe=""))
    obj = _read(sender, path, str(key)).body
    metadata = obj.get("metadata", {})
    uid, generation = metadata.get("uid"), metadata.get("generation")
    if not uid or not generation:
        raise InvalidInputError(
            f"{key}: its API server counts no generations, so nobody can tell which state of it is in force where",
            hint="Ask the agent of a node (--local).",
        )
    policy = parse_object({**obj, "apiVersion": kind.api_version, "kind": kind.kind}, path)
    revision = f"{uid}/{generation}"
    if policy.errors or not policy.resources:
        fault = "; ".join(one.message for one in policy.problems if one.severity == "error")
        return evaluate(str(key), revision, (), {}, time.time(), fault)
    nodes = _nodes(sender, key, policy)
    return evaluate(str(key), revision, nodes, _reports(sender, nodes), time.time())


def _nodes(sender: Sender, key: PolicyKey, policy: LoadResult) -> set[str]:
    derivation = Derivation()
    derivation.upsert(policy.resources[0])
    for path, api_version, kind in _OF_CLUSTER:
        where = path
        if key.namespace:
            if kind not in ("Namespace", "ServiceAccount", "Pod"):
                continue
            namespace = quote(key.namespace, safe="")
            where = f"{path}/{namespace}" if kind == "Namespace" else f"/api/v1/namespaces/{namespace}/{kind.lower()}s"
        for item in _items(sender, where, is_single=bool(key.namespace) and kind == "Namespace"):
            for resource in parse_object({**item, "apiVersion": api_version, "kind": kind}, where).resources:
                derivation.upsert(resource)
    return nodes_needing(derivation.world.policies[key], derivation.world.endpoints.values())


def _items(sender: Sender, path: str, *, is_single: bool = False) -> Iterator[Mapping[str, Any]]:
    """The objects of a list, page by page. A kind of Calico that the cluster does not have gives none."""
    if is_single:
        yield _read(sender, path, path).body
        return
    more = ""
    while True:
        query = f"?limit={PAGE_OBJECTS}" + (f"&continue={quote(more, safe='')}" if more else "")
        page = request(sender, "GET", path + query)
        if page.status == HTTPStatus.NOT_FOUND and path.startswith(_CALICO):
            return
        body = _checked(page, path, path).body
        yield from body.get("items") or ()
        more = body.get("metadata", {}).get("continue", "")
        if not more:
            return


def _reports(sender: Sender, nodes: set[str]) -> dict[str, NodeReport]:
    """The reports of these nodes, by node. A report that cannot be parsed counts as absent."""
    if len(nodes) > FEW_NODES:
        return parse_reports(_items(sender, COLLECTION))
    answers = [request(sender, "GET", f"{COLLECTION}/{quote(node, safe='')}") for node in sorted(nodes)]
    found = [_checked(one, COLLECTION, COLLECTION).body for one in answers if one.status != HTTPStatus.NOT_FOUND]
    return parse_reports(found)


def _read(sender: Sender, path: str, what: str) -> Response:
    return _checked(request(sender, "GET", path), path, what)


def _checked(answer: Response, path: str, what: str) -> Response:
    """Return the answer if it is a success; otherwise raise the error that its status means."""
    if answer.is_done:
        return answer
    if answer.status == HTTPStatus.NOT_FOUND:
        raise InvalidInputError(f"the API server has no {what}", hint="See `kubectl get`, and deploy/chart/crds.")
    if answer.status in (HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED):
        raise PrivilegeError(f"the API server refused to read {path} ({answer.message})", hint="Ask for that right.")
    raise UnreachableError(f"the API server did not answer for {path} ({answer.message})", hint="Try again.")
