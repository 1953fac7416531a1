# SPDX-License-Identifier: Apache-2.0
"""The connectivity matrix of a laboratory: real attempts, their rendering, and their comparison with a prediction.

Invariant: a cell covers every address family that source and destination have in common. If the families have different
outcomes, or an attempt has an outcome other than an echo or silence, the cell shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from netpol_ebpf.lab.attempt import Attempt, AttemptResult, Reachability
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import ICMP, ICMPV6, UDP, Plan
from netpol_ebpf.terminal import escaped

GREEN, RED, YELLOW, BOLD, DIM, RESET = "\033[32m", "\033[31m", "\033[33m", "\033[1m", "\033[2m", "\033[0m"
CELL_WIDTH = 4
GAP = "  "


@dataclass(frozen=True, slots=True)
class ProbedService:
    """One destination of the matrix: a port of a host, or ping.

    ``protocol``: TCP or UDP, with ``port``; or ICMP, which stands for an echo request of either address family.
    """

    host: str
    protocol: int
    port: int = 0

    @property
    def label(self) -> str:
        """The short name of the service in a table: ``8080`` for TCP, ``53/u`` for UDP, or ``ping``."""
        if self.protocol == ICMP:
            return "ping"
        return f"{self.port}/u" if self.protocol == UDP else str(self.port)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An attempt whose outcome differs from the prediction."""

    result: AttemptResult
    expected_reached: bool

    def __str__(self) -> str:
        attempt = self.result.attempt
        port = f" port {attempt.port}" if attempt.port else ""
        expected = "reached" if self.expected_reached else "silent"
        return (
            f"{attempt.source} to {attempt.destination} protocol {attempt.protocol}{port}: "
            f"{self.result.outcome.value}, expected {expected}"
        )


class Matrix:
    """The connectivity matrix of one plan: a row for each source, a column for each service.

    ``names``: maps a host's name to a shorter name for display.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[str],
        services: Sequence[ProbedService],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.plan = plan
        self.sources = tuple(sources)
        self.services = tuple(services)
        self.names = dict(names or {})

    def attempts(self) -> list[Attempt]:
        """One attempt for each source, service and common address family. There is none from a host to itself."""
        return [
            attempt
            for source in self.sources
            for service in self.services
            for attempt in self.attempts_of(source, service)
        ]

    def attempts_of(self, source: str, service: ProbedService) -> list[Attempt]:
        """The attempts of one cell: one for each address family that source and service have in common."""
        if source == service.host:
            return []
        families = {address.version for address in self.plan.hosts[source].addresses}
        return [
            Attempt(source, address, _protocol(service.protocol, address.version), service.port)
            for address in self.plan.hosts[service.host].addresses
            if address.version in families
        ]

    def observe(self, lab: Lab) -> Observation:
        """Make all attempts of the matrix with real connections."""
        results = lab.attempt(self.attempts())
        return Observation(self, {result.attempt: result for result in results})


class Observation:
    """The outcomes of all attempts of a matrix, from one run of `Matrix.observe`."""

    def __init__(self, matrix: Matrix, results: Mapping[Attempt, AttemptResult]) -> None:
        self.matrix = matrix
        self.results = dict(results)

    @property
    def reached(self) -> int:
        """The number of attempts that were answered."""
        return sum(result.reached for result in self.results.values())

    def mismatches(self, predict: Callable[[Attempt], bool]) -> list[Mismatch]:
        """The attempts whose outcome differs from the prediction. ``predict``: whether the attempt should be answered.

        An outcome other than an echo or silence always differs.
        """
        found = []
        for attempt, result in self.results.items():
            expected = predict(attempt)
            if result.outcome is not (Reachability.REACHED if expected else Reachability.SILENT):
                found.append(Mismatch(result, expected))
        return found

    def cell(self, source: str, service: ProbedService) -> tuple[Reachability, ...]:
        """The outcomes of one cell, IPv4 before IPv6; () if the source is the service's host."""
        return tuple(self.results[attempt].outcome for attempt in self.matrix.attempts_of(source, service))

    def changed(self, earlier: Observation) -> list[tuple[str, ProbedService]]:
        """The cells, as (source, service), that differ from an earlier observation."""
        return [
            (source, service)
            for source in self.matrix.sources
            for service in self.matrix.services
            if self.cell(source, service) != earlier.cell(source, service)
        ]

    def as_rows(self) -> dict[str, dict[str, str]]:
        """The matrix for JSON: source -> "host:label" -> outcome.

        If the address families have different outcomes, the value is both, joined by a slash.
        """
        rows: dict[str, dict[str, str]] = {}
        for source in self.matrix.sources:
            row = rows[source] = {}
            for service in self.matrix.services:
                outcomes = self.cell(source, service)
                words = [outcome.value for outcome in outcomes if outcome is not None]
                if words:
                    row[f"{service.host}:{service.label}"] = words[0] if len(set(words)) == 1 else "/".join(words)
        return rows

    def render(self, *, colour: bool, earlier: Observation | None = None, ascii_only: bool = False) -> str:
        """Render the matrix as a table. An asterisk marks the cells that changed since ``earlier``."""
        changed = set(self.changed(earlier)) if earlier is not None else set()
        hosts = {*self.matrix.sources, *(service.host for service in self.matrix.services)}
        names = {host: escaped(self.matrix.names.get(host, host)) for host in hosts}
        groups = _groups(self.matrix.services)
        label_width = max(len(text) for text in ("from", *(names[source] for source in self.matrix.sources)))
        widths = [max(len(names[host]), (CELL_WIDTH + 1) * len(services) - 1) for host, services in groups]
        head = " " * label_width
        ports = "from".ljust(label_width)
        for (host, services), width in zip(groups, widths, strict=True):
            head += GAP + names[host].ljust(width)
            ports += GAP + " ".join(service.label.rjust(CELL_WIDTH) for service in services).ljust(width)
        lines = [_paint(head.rstrip(), BOLD, on=colour), _paint(ports.rstrip(), DIM, on=colour)]
        for source in self.matrix.sources:
            line = names[source].ljust(label_width)
            for (_, services), width in zip(groups, widths, strict=True):
                cells = []
                for service in services:
                    sign, paint = _sign(self.cell(source, service), ascii_only=ascii_only)
                    sign += "*" if (source, service) in changed else " "
                    cells.append(_paint(sign.rjust(CELL_WIDTH), paint, on=colour))
                padding = " " * (width - (CELL_WIDTH + 1) * len(services) + 1)
                line += GAP + " ".join(cells) + padding
            lines.append(line.rstrip())
        return "\n".join(lines)


def _protocol(protocol: int, version: int) -> int:
    return ICMPV6 if protocol == ICMP and version == 6 else protocol  # noqa: PLR2004 - the IP version


def _groups(services: Iterable[ProbedService]) -> list[tuple[str, list[ProbedService]]]:
    """Group consecutive services of the same host: (host, its services)."""
    groups: list[tuple[str, list[ProbedService]]] = []
    for service in services:
        if not groups or groups[-1][0] != service.host:
            groups.append((service.host, []))
        groups[-1][1].append(service)
    return groups


def _sign(outcomes: tuple[Reachability, ...], *, ascii_only: bool) -> tuple[str, str]:
    if not outcomes:
        return ("." if ascii_only else "·"), DIM
    if any(outcome not in {Reachability.REACHED, Reachability.SILENT} for outcome in outcomes):
        return "?", YELLOW
    if all(outcome is Reachability.REACHED for outcome in outcomes):
        return ("o" if ascii_only else "✓"), GREEN
    if all(outcome is Reachability.SILENT for outcome in outcomes):
        return ("x" if ascii_only else "✗"), RED
    return ("4" if outcomes[0] is Reachability.REACHED else "6"), YELLOW


def _paint(text: str, code: str, *, on: bool) -> str:
    return f"{code}{text}{RESET}" if on else text
