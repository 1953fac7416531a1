# SPDX-License-Identifier: Apache-2.0
"""Requests to an API server with small answers, and what an answer means for a write.

Invariant: a write counts as done only if the answer says so. A write is repeated only if a second execution would
change nothing (server-side apply), or if the server says that it did not execute the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.sources.kubernetes.client import HttpAnswer

ANSWER_S = 15.0
"""Time limit in seconds for an answer. The number is arbitrary; a loaded server needs less for a write."""
FIELD_MANAGER = "netpol-ebpf"
"""The owner, in managedFields, of the fields that agents write. All agents have the same one, so that any agent may
lead."""
_APPLY = "application/apply-patch+yaml"


class Sender(Protocol):
    """Makes requests to one API server; `Client` implements it."""

    def get(self, target: str, *, head_s: float, idle_s: float) -> HttpAnswer:
        """Send a GET request."""

    def send(
        self, method: str, target: str, body: bytes, *, head_s: float, idle_s: float, content_type: str
    ) -> HttpAnswer:
        """Send a request that writes."""


@dataclass(frozen=True, slots=True)
class Response:
    """The whole answer of a server.

    ``body``: its JSON object, {} if there is none. ``server_time_s``: the server's time, None if the answer has none.
    ``retry_after_s``: seconds to wait before a repetition, None if the server gave no time.
    """

    status: int
    body: Mapping[str, Any]
    server_time_s: float | None = None
    retry_after_s: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether the server has executed the request."""
        return self.status in (HTTPStatus.OK, HTTPStatus.CREATED)

    @property
    def message(self) -> str:
        """The server's reason for an error."""
        return str(self.body.get("message") or f"HTTP {self.status}")


def request(sender: Sender, method: str, target: str, body: Any = None, *, content_type: str = "") -> Response:
    """Make a request and read the whole answer. Raises UnreachableError, also if a successful answer is not JSON."""
    if method == "GET":
        answer = sender.get(target, head_s=ANSWER_S, idle_s=ANSWER_S)
    else:
        data = json.dumps(body).encode()
        kind = content_type or "application/json"
        answer = sender.send(method, target, data, head_s=ANSWER_S, idle_s=ANSWER_S, content_type=kind)
    try:
        raw = answer.body()
    finally:
        answer.close()
    try:
        value = json.loads(raw) if raw else {}
    except ValueError as error:
        value = None
        if answer.status in (HTTPStatus.OK, HTTPStatus.CREATED):
            raise UnreachableError(f"the answer to {method} {target} is not JSON ({error})", hint="") from error
    return Response(answer.status, value if isinstance(value, dict) else {}, answer.server_time_s, answer.retry_after_s)


def apply(sender: Sender, target: str, obj: Mapping[str, Any]) -> Response:
    """Create an object, or change the fields that agents own, by server-side apply. Raises UnreachableError."""
    query = f"?fieldManager={FIELD_MANAGER}&force=true"
    return request(sender, "PATCH", target + query, obj, content_type=_APPLY)
