# SPDX-License-Identifier: Apache-2.0
"""Requests that write to an API server, with their answers sorted by what the writer must do next.

Invariant: an answer that does not say "done" is never taken for done; a write is repeated only where a repetition
changes nothing (server-side apply), or where the server says that nothing was done.
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
"""Time limit for an answer; arbitrary, more than a loaded server takes for a write."""
FIELD_MANAGER = "netpol-ebpf"
"""The owner of the fields that agents write, in managedFields; all agents have the same, so that any may lead."""
_APPLY = "application/apply-patch+yaml"


class Sender(Protocol):
    """Makes requests to one API server (`Client`)."""

    def get(self, target: str, *, head_s: float, idle_s: float) -> HttpAnswer:
        """Begin a GET."""

    def send(
        self, method: str, target: str, body: bytes, *, head_s: float, idle_s: float, content_type: str
    ) -> HttpAnswer:
        """Begin a request that writes."""


@dataclass(frozen=True, slots=True)
class Response:
    """The whole answer of a server. ``body``: its JSON, {} for none.

    ``server_time_s``: the server's clock, None if it did not tell; ``retry_after_s``: None if it did not ask to wait.
    """

    status: int
    body: Mapping[str, Any]
    server_time_s: float | None = None
    retry_after_s: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether the server did what was asked."""
        return self.status in (HTTPStatus.OK, HTTPStatus.CREATED)

    @property
    def message(self) -> str:
        """The server's reason for a refusal."""
        return str(self.body.get("message") or f"HTTP {self.status}")


def request(sender: Sender, method: str, target: str, body: Any = None, *, content_type: str = "") -> Response:
    """Make a request, and read the whole answer. Raises UnreachableError, also for an answer that is not JSON."""
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
    """Server-side apply: makes the object, or changes the fields that agents own. Raises UnreachableError."""
    query = f"?fieldManager={FIELD_MANAGER}&force=true"
    return request(sender, "PATCH", target + query, obj, content_type=_APPLY)
