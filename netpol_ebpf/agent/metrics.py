# SPDX-License-Identifier: Apache-2.0
"""The agent's metrics: computed from its state as plain values, and rendered in Prometheus' text format.

`netpolctl metrics` and the health endpoint print the same metrics: the agent answers the operation "metrics" with
`families`, and `render` makes text of the answer. The names of metrics and labels never change between versions. A
counter restarts at 0 with a new map or a new agent. Values have base units (seconds, bytes).

Invariant: the number of series is bounded, whatever the number of policies and pods. Each label has values from a fixed
set, or its metric has a limit (`RULES`, `OBJECTS`, `INTERFACES`, `KINDS`). `netpol_series_left_out` counts the series
beyond a limit.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Union

from netpol_ebpf.errors import PlatformError
from netpol_ebpf.terminal import escaped

EVENTS_LOST = "event-lost"
"""The slug of the only reason (`netpol_loader.abi`) whose counter counts events instead of packets."""
RULES = 1000
"""Largest number of rules with counters. The number is arbitrary. Rules that decided packets come before others, and
rules of each of these two groups are ordered by their numbers. The agent keeps a rule's number as long as the rule
exists, so a rule keeps its series."""
OBJECTS = 100
"""Largest number of objects of a rejected change that have a series. The number is arbitrary."""
INTERFACES = 100
"""Largest number of interfaces with a counter. The number is arbitrary."""
KINDS = 100
"""Largest number of kinds with a series, over all sources. The number is arbitrary; it is larger than the number of
kinds that a source has."""
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of the text that `render` returns."""
DRIFT_KINDS = ("pin", "program", "row", "configuration", "barrier")

Histogram = Mapping[str, Any]
"""The value of a histogram: ``buckets`` as [upper bound, cumulative count], with "+Inf" as the last bound, and
``sum``."""
Sample = tuple[Mapping[str, object], Union[float, Histogram]]
"""One sample of a metric: (labels, value)."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with its samples.

    ``kind``: counter, gauge or histogram. ``left_out``: the number of samples beyond the metric's limit.
    """

    name: str
    kind: str
    meaning: str
    samples: tuple[Sample, ...]
    left_out: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The metric as plain values for JSON."""
        samples = [{"labels": dict(labels), "value": value} for labels, value in self.samples]
        return {"name": self.name, "kind": self.kind, "meaning": self.meaning, "samples": samples}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Family:
        """The metric from the plain values that `as_dict` returned."""
        samples = tuple((one["labels"], one["value"]) for one in plain["samples"])
        return cls(plain["name"], plain["kind"], plain["meaning"], samples)


def families(state: Mapping[str, Any], rules: Iterable[Mapping[str, Any]] = ()) -> list[Family]:
    """All metrics of an agent.

    ``state``: the result of `report.status` or `report.waiting`, with the fields that `report.metrics` adds. ``rules``:
    the result of `report.rules`.
    """
    found = list(_sources(state))
    if "waiting" not in state:  # a state is in force
        found += [*_enforcement(state), *_packets(state["packets"]), *_rules(list(rules))]
        found += [*_maps(state["maps"], state["connections"], state["refused"]), *_barrier(state["barrier"])]
        found += _repairs(state)
    left_out = tuple(({"metric": one.name}, one.left_out) for one in found if one.left_out)
    return [
        *found,
        Family("netpol_series_left_out", "gauge", "Series beyond the limit of their metric, by metric.", left_out),
    ]


# --- what holds before anything is in force ---------------------------------------------------------------------------


def _sources(state: Mapping[str, Any]) -> Iterator[Family]:
    labels = {"version": state["version"], "node": state["node"] or ""}
    yield Family("netpol_agent_info", "gauge", "The agent that answered.", ((labels, 1),))
    yield _one(
        "netpol_in_force", "gauge", "1 when everything that the sources say is in force.", int(state["in_force"])
    )
    yield Family(
        "netpol_ready", "gauge", "1 when a readiness check passes, by check: synced, programmed, fresh.",
        tuple(({"check": name}, int(not why)) for name, why in state["readiness"].items()),
    )  # fmt: skip
    problems = Counter((one["severity"], one["slug"]) for one in state["problems"])
    yield Family(
        "netpol_problems", "gauge", "Problems that keep the node from enforcing what the sources say, by kind.",
        tuple(({"severity": severity, "kind": slug}, count) for (severity, slug), count in sorted(problems.items())),
    )  # fmt: skip
    sources = state["sources"]
    yield Family(
        "netpol_source_synced", "gauge", "1 when the agent has all objects of a source.",
        tuple(({"type": one["type"], "source": one["source"]}, int(one["synced"])) for one in sources),
    )  # fmt: skip
    yield Family(
        "netpol_source_behind", "gauge", "Parts of a source whose changes do not arrive.",
        tuple(({"type": one["type"], "source": one["source"]}, len(one["behind"])) for one in sources),
    )  # fmt: skip
    yield from _clusters([one for one in sources if "cut_off" in one])


def _clusters(clusters: Sequence[Mapping[str, Any]]) -> Iterator[Family]:
    yield Family(
        "netpol_source_cut_off", "gauge", "1 when the API server of a cluster confirms nothing any more.",
        tuple(({"source": one["source"]}, int(one["cut_off"])) for one in clusters),
    )  # fmt: skip
    yield Family(
        "netpol_source_restored", "gauge", "1 while the saved state of a cluster is in force.",
        tuple(({"source": one["source"]}, int(one["restored"])) for one in clusters),
    )  # fmt: skip
    yield Family(
        "netpol_source_last_read_timestamp_seconds", "gauge", "Time of the last consistent read of the API server.",
        tuple(({"source": one["source"]}, _timestamp(one["confirmed"])) for one in clusters if one["confirmed"]),
    )  # fmt: skip
    yield Family(
        "netpol_source_went_back_total", "counter", "Times that the API server went back to an older state.",
        tuple(({"source": one["source"]}, one["went_back"]) for one in clusters),
    )  # fmt: skip
    kinds = [(one["source"], kind) for one in clusters for kind in one["kinds"]]
    for name, form, field, meaning in (
        ("netpol_source_kind_synced", "gauge", "is_synced", "1 when the agent has all objects of a kind."),
        ("netpol_source_objects", "gauge", "objects", "Objects of a kind that the agent has."),
        ("netpol_source_kept_objects", "gauge", "kept", "Objects that stay although their definition was deleted."),
        ("netpol_source_lists_total", "counter", "lists", "Requests that list a kind."),
        ("netpol_source_watches_total", "counter", "watches", "Requests that watch a kind; more than one: restarts."),
        (
            "netpol_source_gaps_total",
            "counter",
            "gaps",
            "Times that events of a kind were lost, so that it was listed again.",
        ),
    ):
        samples = (({"source": source, "kind": kind["kind"]}, int(kind[field])) for source, kind in kinds)
        yield _limited(name, form, meaning, samples, KINDS)
    heard = (
        ({"source": source, "kind": kind["kind"]}, _timestamp(kind["last_sync"])) for source, kind in kinds if kind["last_sync"]
    )  # fmt: skip
    yield _limited(
        "netpol_source_last_sync_timestamp_seconds", "gauge", "Time of the last list, event or bookmark of a kind.",
        heard, KINDS,
    )  # fmt: skip


# --- what is in force -------------------------------------------------------------------------------------------------


def _enforcement(state: Mapping[str, Any]) -> Iterator[Family]:
    yield _one(
        "netpol_generation",
        "gauge",
        "Generation of policy; a connection of an older generation takes the policy step again.",
        state["generation"],
    )
    yield _one("netpol_changes_applied_total", "counter", "Changes that this agent applied.", state["changes_applied"])
    yield Family(
        "netpol_change_duration_seconds", "histogram", "Time from taking up a change until it is in force.",
        (({}, state["change_seconds"]),),
    )  # fmt: skip
    yield _one("netpol_policies", "gauge", "Policies that the sources have.", state["objects"]["policies"])
    yield _one(
        "netpol_learned_names",
        "gauge",
        "Domain names that workloads of this node learned for an address and that have not expired.",
        state["objects"]["learned_names"],
    )
    states = {**dict.fromkeys(("enforced", "waiting"), 0), **Counter(one["state"] for one in state["endpoints"])}
    yield Family(
        "netpol_local_endpoints", "gauge", "Workloads of this node, by state: enforced, or waiting for their interface.",
        tuple(({"state": name}, count) for name, count in sorted(states.items())),
    )  # fmt: skip
    yield _one(
        "netpol_closed_interfaces",
        "gauge",
        "Workload interfaces without a known endpoint; all of their traffic is denied.",
        sum(one["state"] == "closed" for one in state["interfaces"]),
    )


def _packets(packets: Mapping[str, int]) -> Iterator[Family]:
    yield Family(
        "netpol_packets_total", "counter", "Packets by the reason of their verdict.",
        tuple(({"reason": slug}, count) for slug, count in sorted(packets.items()) if slug != EVENTS_LOST),
    )  # fmt: skip
    lost = packets.get(EVENTS_LOST, 0)
    yield _one("netpol_events_lost_total", "counter", "Flow events for which the ring buffer had no room.", lost)


def _rules(rules: list[Mapping[str, Any]]) -> Iterator[Family]:
    """The counters of rules, with the labels of `report.rule_labels`."""
    first = sorted(rules, key=lambda one: (not (one["packets"] or one["staged_packets"]), one["number"]))
    for name, field, meaning in (
        ("netpol_rule_packets_total", "packets", "Packets that each rule decided."),
        ("netpol_rule_bytes_total", "bytes", "Bytes of the packets that each rule decided."),
        (
            "netpol_rule_staged_packets_total",
            "staged_packets",
            "Packets that each rule would decide if staged policies were enforced.",
        ),
    ):
        yield _limited(name, "counter", meaning, ((one["labels"], one[field]) for one in first), RULES)


def _maps(
    maps: Mapping[str, Any], connections: Mapping[str, Mapping[str, int]], refused: Mapping[str, Any]
) -> Iterator[Family]:
    """The metrics of maps. ``connections``: the result of `report.connection_counts`, by connection table."""
    tables = {
        name: {"entries": one["established"] + one["unreplied"], "size": one["size"]}
        for name, one in connections.items()
    }
    for name, field, meaning in (
        ("netpol_map_entries", "entries", "Entries in each map of policy and each connection table, without expired ones."),
        ("netpol_map_max_entries", "size", "Size of each map of policy and each connection table, in entries."),
    ):  # fmt: skip
        samples = tuple(({"map": key}, one[field]) for key, one in sorted({**maps, **tables}.items()))
        yield Family(name, "gauge", meaning, samples)
    yield Family(
        "netpol_connections", "gauge", "Live connections, by table and state: established, or unreplied.",
        tuple(
            ({"map": name, "state": state}, one[state])
            for name, one in sorted(connections.items())
            for state in ("established", "unreplied")
        ),
    )  # fmt: skip
    yield _one(
        "netpol_refused_changes_total", "counter", "Changes rejected because a map had no room.", refused["changes"]
    )
    yield Family(
        "netpol_map_refusals_total", "counter", "Changes rejected because a map had no room, by map.",
        tuple(({"map": key}, count) for key, count in sorted(refused["by_map"].items())),
    )  # fmt: skip
    waiting = (({"object": one, "map": refused["map"]}, 1) for one in refused["waiting"])
    yield _limited(
        "netpol_refused_object", "gauge", "1 for each object that is NOT in force because a map has no room for it.",
        waiting, OBJECTS,
    )  # fmt: skip


def _barrier(barrier: Mapping[str, Any]) -> Iterator[Family]:
    labels = {"mode": barrier["mode"]}
    yield Family(
        "netpol_barrier_installed",
        "gauge",
        "1 when the tables of the second barrier are in force.",
        ((labels, int(barrier["installed"])),),
    )
    counts = [
        (name, family, packets)
        for name, one in sorted(barrier["packets"].items())
        for family, packets in sorted(one.items())
    ]
    yield Family(
        "netpol_barrier_packets_total", "counter", "Packets that the second barrier dropped, by reason and nftables family.",
        tuple(({"reason": name, "family": family}, packets) for name, family, packets in counts),
    )  # fmt: skip
    yield _limited(
        "netpol_barrier_unsigned_packets_total", "counter",
        "Packets that the second barrier dropped because they lack the program's sign, by interface.",
        (({"interface": name}, packets) for name, packets in sorted(barrier["unsigned"].items())), INTERFACES,
    )  # fmt: skip


def _repairs(state: Mapping[str, Any]) -> Iterator[Family]:
    drift = state["drift"]
    kinds = {**dict.fromkeys(DRIFT_KINDS, 0), **drift["put_back"]}
    yield Family(
        "netpol_drift_repairs_total", "counter", "Repairs of drift: objects that something else changed and the agent put back, by kind.",
        tuple(({"kind": kind}, count) for kind, count in sorted(kinds.items())),
    )  # fmt: skip
    yield _one(
        "netpol_audit_rounds_total",
        "counter",
        "Comparisons of all map entries with the desired state.",
        drift["rounds"],
    )
    yield _one(
        "netpol_listed_again_total",
        "counter",
        "Full listings of interfaces and routes, mostly after the kernel dropped netlink messages.",
        sum(state["listed_again"].values()),
    )


def _one(name: str, kind: str, meaning: str, value: float) -> Family:
    return Family(name, kind, meaning, (({}, value),))


def _limited(name: str, kind: str, meaning: str, samples: Iterable[Sample], most: int) -> Family:
    found = tuple(samples)
    return Family(name, kind, meaning, found[:most], max(0, len(found) - most))


def _timestamp(utc: str) -> float:
    """The seconds since 1970 of a time in UTC, ISO 8601, as a source reports it."""
    return datetime.fromisoformat(re.sub("Z$", "+00:00", utc)).timestamp()


# --- text -------------------------------------------------------------------------------------------------------------


def require_metrics_package() -> None:
    """Raise PlatformError if the package that renders metrics is missing."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise PlatformError(
            "the Python package prometheus-client is missing, without which no metrics can be rendered",
            hint="Install the extra: pip install 'netpol-ebpf[metrics]'.",
        )


def render(found: Iterable[Family]) -> bytes:
    """Render Prometheus' text format, version 0.0.4. Needs the package prometheus-client."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector

    forms = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}

    class Collected(Collector):
        def collect(self) -> Iterator[Any]:
            for family in found:
                names = list(family.samples[0][0]) if family.samples else []
                metric = forms[family.kind](family.name, family.meaning, labels=names)
                for labels, value in family.samples:
                    texts = [escaped(str(labels[name]), keep="\n") for name in names]
                    if isinstance(value, Mapping):
                        metric.add_metric(
                            texts, [(str(bound), count) for bound, count in value["buckets"]], value["sum"]
                        )
                    else:
                        metric.add_metric(texts, value)
                yield metric

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected())
    return bytes(generate_latest(registry))
