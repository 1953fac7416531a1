# SPDX-License-Identifier: Apache-2.0
"""`netpolctl metrics`: print the agent's counters in Prometheus' text format, or as plain values.

The agent listens on no network socket, so the output is for the textfile collector of the node exporter.  Names of
metrics are stable.  A counter restarts at 0 with a new map.  This module computes nothing: `netpolctl status` and
`netpolctl get rules` have the same values.

Exit codes: 0, 4 no agent answers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent
from netpol_ebpf.cli.output import print_value
from netpol_ebpf.terminal import escaped

EVENTS_LOST = "event-lost"
"""The slug of the only reason (`netpol_loader.abi`) whose counter counts events instead of packets."""

Sample = tuple[Mapping[str, object], float]
"""(labels, value) of a metric."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with its samples. ``kind``: counter or gauge."""

    name: str
    kind: str
    meaning: str
    samples: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """The metric as plain values for JSON."""
        samples = [{"labels": dict(labels), "value": value} for labels, value in self.samples]
        return {"name": self.name, "kind": self.kind, "meaning": self.meaning, "samples": samples}


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "metrics",
        help="print the agent's counters for Prometheus",
        description="Print the counters of the agent of this node in Prometheus' text format, for the textfile collector "
        "of the node exporter.",
        epilog="exit codes: 0 done, 4 no agent answers",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "json", "yaml"),
        default="text",
        help="output format; text: Prometheus' text format (default: text)",
    )
    add_agent_options(parser, "--state-dir")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    (state,) = ask_agent(arguments, "status")
    if "waiting" in state:  # the agent has put no policy in force yet
        found = list(_sources(state))
    else:
        (rules,) = ask_agent(arguments, "rules")
        found = list(families(state, rules))
    if not print_value(arguments.output, [one.as_dict() for one in found]):
        print(render(found), end="")
    return 0


def families(state: Mapping[str, Any], rules: Iterable[Mapping[str, Any]]) -> Iterator[Family]:
    """Yield every metric. ``state``, ``rules``: the agent's answers to ``status`` and ``rules``."""
    yield from _sources(state)
    yield from _enforcement(state)
    yield from _packets(state["packets"], list(rules))
    yield from _maps(state["maps"], state["refused"])
    yield from _barrier(state["barrier"])
    drift = state["drift"]
    kinds = {**dict.fromkeys(("pin", "program", "row", "configuration", "barrier"), 0), **drift["put_back"]}
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


def _sources(state: Mapping[str, Any]) -> Iterator[Family]:
    labels = {"version": state["version"], "node": state["node"] or ""}
    yield Family("netpol_agent_info", "gauge", "The agent that answered.", ((labels, 1),))
    yield _one(
        "netpol_in_force", "gauge", "1 when everything that the sources say is in force.", int(state["in_force"])
    )
    sources = state.get("sources", ())
    yield Family(
        "netpol_source_synced", "gauge", "1 when the agent has all objects of a source.",
        tuple(({"type": one["type"], "source": one["source"]}, int(one["synced"])) for one in sources),
    )  # fmt: skip
    yield Family(
        "netpol_source_cut_off", "gauge", "1 when the API server of a cluster confirms nothing any more.",
        tuple(({"source": one["source"]}, int(one["cut_off"])) for one in sources if "cut_off" in one),
    )  # fmt: skip
    problems = Counter((one["severity"], one["slug"]) for one in state["problems"])
    yield Family(
        "netpol_problems", "gauge", "Problems that keep the node from enforcing what the sources say, by kind.",
        tuple(({"severity": severity, "kind": slug}, count) for (severity, slug), count in sorted(problems.items())),
    )  # fmt: skip


def _enforcement(state: Mapping[str, Any]) -> Iterator[Family]:
    objects = state["objects"]
    yield _one(
        "netpol_generation",
        "gauge",
        "Generation of policy; a connection of an older generation takes the policy step again.",
        state["generation"],
    )
    yield _one("netpol_changes_applied_total", "counter", "Changes that this agent applied.", state["changes_applied"])
    yield _one("netpol_policies", "gauge", "Policies that the sources have.", objects["policies"])
    yield Family(
        "netpol_local_endpoints", "gauge", "Workloads of this node, by state: enforced, or waiting for their interface.",
        tuple(
            ({"state": name}, count) for name, count in sorted({
                **dict.fromkeys(("enforced", "waiting"), 0), **Counter(one["state"] for one in state["endpoints"]),
            }.items())
        ),
    )  # fmt: skip
    closed = sum(one["state"] == "closed" for one in state["interfaces"])
    yield _one(
        "netpol_closed_interfaces",
        "gauge",
        "Workload interfaces without a known endpoint; all of their traffic is denied.",
        closed,
    )


def _packets(packets: Mapping[str, int], rules: list[Mapping[str, Any]]) -> Iterator[Family]:
    yield Family(
        "netpol_packets_total", "counter", "Packets by the reason of their verdict.",
        tuple(({"reason": slug}, count) for slug, count in sorted(packets.items()) if slug != EVENTS_LOST),
    )  # fmt: skip
    lost = packets.get(EVENTS_LOST, 0)
    yield _one("netpol_events_lost_total", "counter", "Flow events for which the ring buffer had no room.", lost)
    for name, field, meaning in (
        ("netpol_rule_packets_total", "packets", "Packets that each rule decided."),
        ("netpol_rule_bytes_total", "bytes", "Bytes of the packets that each rule decided."),
        (
            "netpol_rule_staged_packets_total",
            "staged_packets",
            "Packets that each rule would decide if staged policies were enforced.",
        ),
    ):
        samples = tuple(({"rule": one["rule"], "number": one["number"]}, one[field]) for one in rules)
        yield Family(name, "counter", meaning, samples)


def _maps(maps: Mapping[str, Any], refused: Mapping[str, Any]) -> Iterator[Family]:
    for name, field, meaning in (
        ("netpol_map_entries", "entries", "Entries in each map that policy fills."),
        ("netpol_map_max_entries", "size", "Size of each map that policy fills, in entries."),
    ):
        yield Family(name, "gauge", meaning, tuple(({"map": key}, one[field]) for key, one in sorted(maps.items())))
    yield _one(
        "netpol_refused_changes_total", "counter", "Changes rejected because a map had no room.", refused["changes"]
    )
    yield Family(
        "netpol_map_refusals_total", "counter", "Changes rejected because a map had no room, by map.",
        tuple(({"map": key}, count) for key, count in sorted(refused["by_map"].items())),
    )  # fmt: skip
    yield Family(
        "netpol_refused_object", "gauge", "1 for each object that is NOT in force because a map has no room for it.",
        tuple(({"object": one, "map": refused["map"]}, 1) for one in refused["waiting"]),
    )  # fmt: skip


def _barrier(barrier: Mapping[str, Any]) -> Iterator[Family]:
    labels = {"mode": barrier["mode"]}
    installed = Family(
        "netpol_barrier_installed",
        "gauge",
        "1 when the tables of the second barrier are in force.",
        ((labels, int(barrier["installed"])),),
    )
    yield installed
    counts = [
        (name, family, packets)
        for name, one in sorted(barrier["packets"].items())
        for family, packets in sorted(one.items())
    ]
    yield Family(
        "netpol_barrier_packets_total", "counter", "Packets that the second barrier dropped, by reason and nftables family.",
        tuple(({"reason": name, "family": family}, packets) for name, family, packets in counts),
    )  # fmt: skip
    yield Family(
        "netpol_barrier_unsigned_packets_total", "counter", "Packets that the second barrier dropped because they lack the program's sign, by interface.",
        tuple(({"interface": name}, packets) for name, packets in barrier["unsigned"].items()),
    )  # fmt: skip


def _one(name: str, kind: str, meaning: str, value: float) -> Family:
    return Family(name, kind, meaning, (({}, value),))


def render(found: Iterable[Family]) -> str:
    """Render the text exposition format, version 0.0.4."""
    lines: list[str] = []
    for family in found:
        lines += [f"# HELP {family.name} {family.meaning}", f"# TYPE {family.name} {family.kind}"]
        for labels, value in family.samples:
            pairs = ",".join(f'{name}="{_escaped(str(text))}"' for name, text in labels.items())
            lines.append(f"{family.name}{{{pairs}}} {value}" if pairs else f"{family.name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Escape a label's value: unprintable characters, then the characters that the exposition format requires."""
    return escaped(text, keep="\n").replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
