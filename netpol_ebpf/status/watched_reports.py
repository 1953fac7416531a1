# SPDX-License-Identifier: Apache-2.0
"""The reports of all nodes, as the leading agent watches them.

Invariant: a report that cannot be parsed counts as absent, and its error is kept in ``fault``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from netpol_ebpf.errors import InvalidInputError, Problem
from netpol_ebpf.resources import schema_status
from netpol_ebpf.sources.kubernetes.decoding import Decoded, Name, WatchedKind
from netpol_ebpf.status.report import NodeReport, parse_report

REPORTS = WatchedKind(schema_status.VERSION, schema_status.KIND, schema_status.PLURAL, is_custom=True)


class ReportStore:
    """The store (`watching.Store`) of the watcher of reports. Any thread may call `reports`."""

    def __init__(self) -> None:
        self.definition_uid = ""
        self.resource_version = ""
        self.problem: Problem | None = None
        self.fault = ""
        self.is_listed = False
        self._lock = threading.Lock()
        self._reports: dict[Name, NodeReport | None] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there is no report."""
        return not self._reports

    def reports(self) -> dict[str, NodeReport]:
        """The reports that could be parsed, by node, as a new mapping."""
        with self._lock:
            return {name.name: one for name, one in self._reports.items() if one is not None}

    def prepare(self, decoded: Decoded) -> NodeReport | None:
        """Parse the report in an object; None if an agent would not have written it."""
        try:
            return parse_report(decoded.fields)
        except InvalidInputError as error:
            self.fault = error.message
            return None

    def put(self, name: Name, entry: object) -> None:
        """Store a report."""
        with self._lock:
            self._reports[name] = entry if isinstance(entry, NodeReport) else None

    def remove(self, name: Name) -> None:
        """Remove a report."""
        with self._lock:
            self._reports.pop(name, None)

    def orphan(self, name: Name) -> None:
        """Remove a report that was deleted together with its definition.

        No policy is enforced by it, so it need not be kept.
        """
        self.remove(name)

    def missing(self, staged: Mapping[Name, object]) -> set[Name]:
        """The names of known reports that a complete list lacks."""
        return self._reports.keys() - staged.keys()

    def commit(self, staged: Mapping[Name, object], *, orphaned: set[Name]) -> None:  # noqa: ARG002 - the protocol's
        """Replace all reports by a complete list."""
        with self._lock:
            self._reports = {name: one if isinstance(one, NodeReport) else None for name, one in staged.items()}
        self.is_listed = True

    def commit_absent(self) -> None:
        """Record that the cluster does not have the kind NodeReport."""
        with self._lock:
            self._reports = {}
        self.is_listed = True

    def note(self, problem: Problem | None) -> None:
        """Set the problem that says why reports are not watched now; None if they are watched."""
        self.problem = problem
