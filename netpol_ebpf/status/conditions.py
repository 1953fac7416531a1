# SPDX-License-Identifier: Apache-2.0
"""The conditions `Programmed` and the Events of policies, which the leading agent writes from the reports of all nodes.

The leader writes a condition when its status, reason or generation changes, and a changed text at most every `TEXT_S`.
It writes at most `WRITES_PER_ROUND` objects in a round. A rejected policy gets one Event for each generation and
reason.

Invariants: a condition is True only if the report of each node that needs the policy proves it. A condition that the
server already has is not written again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.policy.types import Endpoint, EndpointKey, Policy, PolicyKey
from netpol_ebpf.status.kinds import POLICY_KINDS, PolicyKind, kind_at
from netpol_ebpf.status.needs import Needs
from netpol_ebpf.status.report import NodeReport, render_time
from netpol_ebpf.status.requests import Sender, apply, request
from netpol_ebpf.status.standing import Standing, evaluate, is_proven

ROUND_S = 2.0
"""Seconds between two rounds, in which the leader handles new reports and changed policies. The number is arbitrary."""
SWEEP_S = 60.0
"""Seconds between two rounds that handle all policies, including those that were in force on every node."""
TEXT_S = 30.0
MOST_MESSAGE, MOST_NOTE = 32_000, 1000
"""Longest texts of a condition and of an Event, in characters. The server's limits are a little higher."""
MOST_NAME = 200
"""Largest number of characters of a policy's name in the name of its Event, which may have 253 characters."""
WRITES_PER_ROUND = 20
PAGE_OBJECTS = 100
EVENTS_PER_MINUTE = 10
EVENTS = "/apis/events.k8s.io/v1/namespaces"
CONTROLLER = "netpol-ebpf.io/status"
PROGRAMMED = "Programmed"
REFUSED = frozenset({"MapFull", "LimitExceeded", "Invalid"})


@dataclass(frozen=True, slots=True)
class View:
    """The cluster as the leader's agent knows it, copied for another thread.

    ``revisions``: the revision of each policy, see `Meta.revision`. ``faults``: why an object is not valid, by its API
    path.
    """

    policies: Mapping[PolicyKey, Policy] = field(default_factory=dict)
    endpoints: Mapping[EndpointKey, Endpoint] = field(default_factory=dict)
    revisions: Mapping[PolicyKey, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition `Programmed` as the server has it.

    ``revision``: the UID of the object and the observedGeneration of the condition. ``changed``: its
    lastTransitionTime. ``written_s``: when this agent wrote it; -inf if another agent did.
    """

    status: str
    revision: str
    reason: str
    message: str
    changed: str
    written_s: float = -math.inf

    @property
    def state(self) -> tuple[str, str, str]:
        """The fields whose change must be written at once."""
        return (self.status, self.revision, self.reason)


class WriteRefusedError(UnreachableError):
    """The server rejected a request about one kind. Objects of other kinds may still be written."""


class _Due(NamedTuple):
    """A policy whose condition must be compared with the server's. ``key``: None for an object that is not valid."""

    standing: Standing
    revision: str
    kind: PolicyKind
    path: str
    key: PolicyKey | None = None


@dataclass(slots=True)
class ConditionWriter:
    """Writes conditions and Events while this agent leads. Only one thread calls it.

    ``clock``: returns the time in seconds. ``wall``: returns the seconds since 1970.
    """

    sender: Sender
    node: str
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    _needs: Needs = field(default_factory=Needs)
    _view: View = field(default_factory=View)
    _settled: dict[PolicyKey, str] = field(default_factory=dict)  # revision that is in force wherever it is needed
    _conditions: dict[str, Condition] = field(default_factory=dict)  # by the path of the policy
    _has_status: dict[PolicyKind, bool] = field(default_factory=dict)
    _seen_faults: dict[str, str] = field(default_factory=dict)  # by path; since the last sweep
    _told: set[tuple[str, str]] = field(default_factory=set)  # revision and reason of Events
    _events_left: float = EVENTS_PER_MINUTE
    _events_s: float = -math.inf
    _swept_s: float = -math.inf

    def forget(self) -> None:
        """Forget the server's conditions, because another agent may have changed them as leader."""
        self._settled.clear()
        self._conditions.clear()
        self._has_status.clear()
        self._swept_s = -math.inf

    def round(self, view: View, reports: Mapping[str, NodeReport]) -> None:
        """Write what has changed, up to the limit.

        Raises UnreachableError after all other kinds were written; the next round then writes the rest.
        """
        if view is not self._view:
            self._take(view)
        is_sweep = self.clock() >= self._swept_s + SWEEP_S
        if is_sweep:
            self._seen_faults.clear()
        left, refused = WRITES_PER_ROUND, dict[PolicyKind, WriteRefusedError]()
        due = [*self._faulty(view, refused), *self._valid(view, reports, is_sweep=is_sweep)]
        for one in sorted(due, key=lambda one: one.standing.is_programmed):
            if left <= 0:
                break  # the next round writes the rest; a sweep starts again from the beginning
            if one.kind in refused:
                continue
            try:
                left -= self._write(one)
            except WriteRefusedError as error:
                refused[one.kind] = error
                continue
            if one.key is not None and one.standing.is_programmed:
                self._settled[one.key] = one.revision
            elif one.key is not None:
                self._settled.pop(one.key, None)
        if refused:
            raise next(iter(refused.values()))
        if is_sweep and left > 0:
            self._swept_s = self.clock()

    def _take(self, view: View) -> None:
        """From a new view of the cluster, update the index of the nodes that need each policy."""
        before, self._view = self._view, view
        for key in before.policies.keys() - view.policies.keys():
            self._needs.set_policy(key, None)
            self._settled.pop(key, None)
        for key, policy in view.policies.items():
            if before.policies.get(key) is not policy:
                self._needs.set_policy(key, policy)
                self._settled.pop(key, None)
        for gone in before.endpoints.keys() - view.endpoints.keys():
            self._needs.set_endpoint(gone, None)
        for name, endpoint in view.endpoints.items():
            if before.endpoints.get(name) is not endpoint:
                self._needs.set_endpoint(name, endpoint)

    def _valid(self, view: View, reports: Mapping[str, NodeReport], *, is_sweep: bool) -> Iterator[_Due]:
        """The valid policies that may not be in force on every node that needs them; in a sweep, all valid policies."""
        now_s = self.wall()
        for key, revision in view.revisions.items():
            is_settled = self._settled.get(key) == revision
            kind = POLICY_KINDS.get(key.kind)
            if (is_settled and not is_sweep) or kind is None or not revision or key not in view.policies:
                continue
            path = kind.path(key.namespace, key.name)
            if path in view.faults:
                continue
            nodes = self._needs.nodes(key)
            if not (is_settled and is_proven(revision, nodes, reports, now_s)):
                yield _Due(evaluate(str(key), revision, nodes, reports, now_s), revision, kind, path, key)

    def _faulty(self, view: View, refused: dict[PolicyKind, WriteRefusedError]) -> Iterator[_Due]:
        """The objects that are not valid. Their generation is read from the server.

        ``refused``: this method adds each kind of which an object cannot be read.
        """
        for path, fault in view.faults.items():
            kind = kind_at(path)
            if kind is None or self._seen_faults.get(path) == fault:
                continue
            answer = request(self.sender, "GET", path)
            if not answer.is_done and answer.status != HTTPStatus.NOT_FOUND:
                refused[kind] = WriteRefusedError(f"{path} cannot be read ({answer.message})", hint="")
                continue
            self._seen_faults[path] = fault
            metadata = answer.body.get("metadata", {}) if answer.is_done else {}
            if "uid" in metadata and "generation" in metadata:
                revision = f"{metadata['uid']}/{metadata['generation']}"
                yield _Due(evaluate(path, revision, (), {}, self.wall(), fault), revision, kind, path)

    # --- writes -----------------------------------------------------------------------------------------------------

    def _write(self, due: _Due) -> int:
        """Write the condition and the Event of a policy if they are due. Returns the number of writes."""
        return (self._write_condition(due) if self._takes_status(due.kind) else 0) + self._tell(due)

    def _write_condition(self, due: _Due) -> int:
        standing, known = due.standing, self._conditions.get(due.path)
        status = "True" if standing.is_programmed else "False"
        changed = known.changed if known is not None and known.status == status else render_time(self.wall())
        message = standing.message[:MOST_MESSAGE]
        wanted = Condition(status, due.revision, standing.reason, message, changed, self.clock())
        is_young = known is not None and (known.message == message or self.clock() < known.written_s + TEXT_S)
        if known is not None and known.state == wanted.state and is_young:
            return 0
        uid, _, generation = due.revision.rpartition("/")
        namespace, name = _names(due.path)
        condition = {
            "type": PROGRAMMED,
            "status": status,
            "observedGeneration": int(generation),
            "lastTransitionTime": changed,
            "reason": standing.reason,
            "message": message,
        }
        body = {
            "apiVersion": due.kind.api_version,
            "kind": due.kind.kind,
            "metadata": {"name": name, "uid": uid, **({"namespace": namespace} if namespace else {})},
            "status": {"conditions": [condition]},
        }
        answer = apply(self.sender, f"{due.path}/status", body)
        if answer.is_done:
            self._conditions[due.path] = wanted
        elif answer.status not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):  # deleted, or made anew, meanwhile
            raise WriteRefusedError(f"the condition of {due.path} was not written ({answer.message})", hint="")
        return 1

    def _takes_status(self, kind: PolicyKind) -> bool:
        """Whether objects of a kind have a status at the server. The first call also reads the present conditions."""
        if kind not in self._has_status:
            offered = request(self.sender, "GET", kind.group_path)
            # NOT_FOUND is no error: the cluster may have Calico's objects only in their stored form.
            if not offered.is_done and offered.status != HTTPStatus.NOT_FOUND:
                raise WriteRefusedError(f"{kind.group_path} cannot be read ({offered.message})", hint="")
            names = {one.get("name") for one in offered.body.get("resources", ())}
            if f"{kind.plural}/status" in names:
                self._read_conditions(kind)
            self._has_status[kind] = f"{kind.plural}/status" in names
        return self._has_status[kind]

    def _read_conditions(self, kind: PolicyKind) -> None:
        more = ""
        while True:
            query = f"?limit={PAGE_OBJECTS}" + (f"&continue={quote(more, safe='')}" if more else "")
            page = request(self.sender, "GET", f"{kind.group_path}/{kind.plural}{query}")
            if not page.is_done:
                raise WriteRefusedError(f"{kind.plural} of {kind.api_version} cannot be read ({page.message})", hint="")
            for item in page.body.get("items") or ():
                self._note(kind, item)
            more = page.body.get("metadata", {}).get("continue", "")
            if not more:
                return

    def _note(self, kind: PolicyKind, item: Mapping[str, Any]) -> None:
        metadata = item["metadata"]
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        for one in item.get("status", {}).get("conditions") or ():
            if one.get("type") == PROGRAMMED:
                revision = f"{metadata.get('uid')}/{one.get('observedGeneration')}"
                reason, message = one.get("reason", ""), one.get("message", "")
                self._conditions[path] = Condition(
                    one.get("status", ""), revision, reason, message, one.get("lastTransitionTime", "")
                )
                self._told.add((revision, reason))  # the previous leader has created the Event

    def _tell(self, due: _Due) -> int:
        """Create the Event of a rejected policy if there is none yet. Returns the number of writes."""
        standing, kind, mark = due.standing, due.kind, (due.revision, due.standing.reason)
        if standing.reason not in REFUSED or mark in self._told:
            return 0
        now_s = self.clock()
        self._events_left = min(
            EVENTS_PER_MINUTE, self._events_left + (now_s - self._events_s) * EVENTS_PER_MINUTE / 60
        )
        self._events_s = now_s
        if self._events_left < 1:
            return 0  # the Event is created in a later round
        namespace, name = _names(due.path)
        digest = sha256("/".join(mark).encode()).hexdigest()[:16]  # the same for each leader, so the Event is made once
        regarding = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "name": name,
            "uid": due.revision.rpartition("/")[0],
        }
        if namespace:
            regarding["namespace"] = namespace
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{name[:MOST_NAME]}.{digest}", "namespace": namespace or "default"},
            "eventTime": time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(self.wall())),
            "reportingController": CONTROLLER,
            "reportingInstance": self.node,
            "action": "Program",
            "reason": standing.reason,
            "type": "Warning",
            "note": standing.message[:MOST_NOTE],
            "regarding": regarding,
        }
        answer = request(self.sender, "POST", f"{EVENTS}/{namespace or 'default'}/events", body)
        self._events_left -= 1
        if not answer.is_done and answer.status != HTTPStatus.CONFLICT:
            raise WriteRefusedError(f"the Event of {due.path} was not made ({answer.message})", hint="")
        self._told.add(mark)
        return 1


def _names(path: str) -> tuple[str, str]:
    """The namespace ("" if there is none) and the name of the object at an API path."""
    parts = path.split("/")
    return (parts[parts.index("namespaces") + 1] if "namespaces" in parts else "", parts[-1])
