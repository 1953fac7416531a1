# SPDX-License-Identifier: Apache-2.0
"""A part of an API server that takes writes: objects by path, server-side apply, Leases with their versions, refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from apiserver_traces import Reply, failure
from fake_apiserver import Request, Wire


def ok(value: Any, status: int = 200) -> Reply:
    return Reply(status, chunks=[(0.0, json.dumps(value).encode())])


@dataclass
class WritableApi:
    """``objects``: by path; ``refusals``: what the next requests of a method get, those first; ``time_s``: its clock.

    ``writes``: method, path and body of each request that wrote, or tried to.
    """

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: dict[str, list[Reply]] = field(default_factory=dict)
    writes: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    time_s: float = 1_800_000_000.0
    version: int = 100

    def __call__(self, request: Request) -> Wire:
        path = request.target.partition("?")[0]
        if request.method == "GET":
            self.reads.append(path)
        else:
            self.writes.append((request.method, path, json.loads(request.body)))
        queued = self.refusals.get(request.method)
        reply = queued.pop(0) if queued else self._answer(request.method, path)
        return Wire(reply, length=True, headers={"Date": formatdate(self.time_s, usegmt=True)})

    def _answer(self, method: str, path: str) -> Reply:
        if method == "GET":
            return self._read(path)
        body = self.writes[-1][2]
        if method == "PATCH" and path.endswith("/status"):
            return self._patch_status(path.removesuffix("/status"), body)
        if method == "POST":
            name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{len(self.objects)}"
            path = f"{path}/{name}"
            if path in self.objects:
                return failure(409)
        if method == "PUT":
            known = self.objects.get(path, {}).get("metadata", {}).get("resourceVersion")
            if body["metadata"].get("resourceVersion") != known:
                return failure(409)
        is_new = path not in self.objects
        self.version += 1
        stored = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        self.objects[path] = stored
        return ok(stored, 201 if is_new else 200)

    def _read(self, path: str) -> Reply:
        if path in self.objects:
            return ok(self.objects[path])
        items = [one for where, one in self.objects.items() if where.rpartition("/")[0] == path]
        return ok({"items": items, "metadata": {"resourceVersion": "9"}}) if items else failure(404)

    def _patch_status(self, path: str, body: dict[str, Any]) -> Reply:
        known = self.objects.get(path)
        if known is None:
            return failure(404)
        if known["metadata"].get("uid") != body["metadata"].get("uid"):
            return failure(409)
        known["status"] = body["status"]
        return ok(known)

    def of(self, method: str, ending: str = "") -> list[dict[str, Any]]:
        """The bodies of writes."""
        return [body for one, path, body in self.writes if one == method and path.endswith(ending)]
