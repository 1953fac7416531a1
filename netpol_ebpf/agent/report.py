# SPDX-License-Identifier: Apache-2.0
"""The agent's state as plain values: the data of `netpolctl status` and `netpolctl get`.

Invariant: every value is a fact that the agent knows or reads from the maps in force. Field names never change between
versions, because scripts read them.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from netpol_ebpf import __version__
from netpol_ebpf.agent.assignments import Evidence
from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.metrics import families
from netpol_ebpf.agent.timeouts import STATES, read_timeouts
from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.apply.events import FlowEvent
from netpol_ebpf.errors import Problem
from netpol_ebpf.policy.provenance import trace
from netpol_ebpf.policy.types import Cause, CauseKind, Direction, EndpointKey, Question, Stage
from netpol_loader import abi

WAITING = 100
"""Largest number of objects of a rejected change that are reported. The number is arbitrary."""
CAUSES = 3
"""Largest number of causes that a failed readiness check names. The number is arbitrary."""
CONNECTIONS = 10_000
"""Most connections that are reported. The number is arbitrary: they make an answer of some megabytes."""
CONNECTION_TABLES = (
    *((name, "established") for name in abi.UNREPLIED_VIEWS),
    *((name, "unreplied") for name in abi.UNREPLIED_VIEWS.values()),
)
_COUNT = struct.Struct("=QQ")  # struct np_count: packets, bytes


def status(
    agent: Agent,
    maps: Mapping[str, KernelMap],
    place: Mapping[str, Any],
    others: Iterable[Problem] = (),
    listed_again: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The agent's whole state, for `netpolctl status`.

    ``place``: facts about the agent's process and directories, by field name, which are added to the result.
    ``others``: further problems. ``listed_again``: see `KernelNetwork.listed_again`.
    """
    world = agent.objects.world
    endpoints = local_endpoints(agent)
    problems = [problem(one) for one in (*agent.problems, *others)]
    return {
        "version": __version__,
        "node": agent.settings.node,
        **place,
        "in_force": not any(one["severity"] == "error" for one in problems),
        "generation": agent.enforcement.applier.generation,
        "changes_applied": agent.enforcement.changes_applied,
        "sources": sources(agent),
        "objects": {
            "policies": len(world.policies),
            "endpoints": len(world.endpoints) - len(agent.closed.keys),
            "local_endpoints": len(endpoints),
            "enforced_endpoints": sum(one["state"] == "enforced" for one in endpoints),
            "skipped": dict(agent.source.skipped),
            "learned_names": len(agent.domain_names.learned),
        },
        "endpoints": endpoints,
        "interfaces": interfaces(agent),
        "barrier": agent.barrier.report(),
        "problems": problems,
        "maps": {
            name: {"entries": count, "size": maps[name].max_entries}
            for name, count in agent.enforcement.applier.counts.items()
        },
        "timeouts": read_timeouts(abi.np_config.from_buffer_copy(maps["np_config"].get(bytes(4)) or b"")),
        "packets": reason_counts(maps["np_reason_count"]),
        "refused": {
            "changes": agent.rejected.count,
            "by_map": dict(agent.rejected.by_map),
            "map": agent.rejected.full,
            "waiting": list(agent.rejected.objects)[:WAITING],
        },
        "listed_again": dict(listed_again or {}),
        "drift": {
            "put_back": dict(agent.repair.drift.counts),
            "rounds": agent.repair.rounds,
            "recent": [{"kind": one.kind, "where": one.where, "was": one.was} for _, one in agent.repair.drift.recent],
        },
    }


def waiting(agent: Agent, place: Mapping[str, Any], others: Iterable[Problem] = ()) -> dict[str, Any]:
    """The state of an agent that has put no policy in force yet. The field ``waiting`` says why.

    The arguments are those of `status`.
    """
    return {
        "version": __version__,
        "node": agent.settings.node,
        **place,
        "in_force": False,
        "waiting": agent.problems[-1].message,
        "sources": sources(agent),
        "problems": [problem(one) for one in (*agent.problems, *others)],
    }


def sources(agent: Agent) -> list[dict[str, Any]]:
    """The state of each source; see `Source.report`."""
    return [dict(one) for one in agent.source.report()]


def flow(agent: Agent, event: FlowEvent) -> dict[str, Any]:
    """A flow event as plain values, with the owners of both addresses, and file and line of the rule that decided."""
    plain = event.as_dict()
    question = None
    if event.packet is not None:
        plain["source_name"] = agent.objects.owner_of(event.packet.source)
        plain["destination_name"] = agent.objects.owner_of(event.packet.destination)
        if event.endpoint is not None and event.direction is Direction.EGRESS:
            names = agent.domain_names.learned.names_of(event.endpoint, event.packet.destination)
            plain["destination_domains"] = sorted(names)
            question = Question(event.endpoint, event.direction, Stage.NORMAL, event.packet, names)
    world = agent.objects.world_in_force
    plain["decided_by"] = None if event.cause is None else trace(world, event.cause, question).as_dict()
    return plain


def problem(one: Problem) -> dict[str, Any]:
    """A problem as plain values, with its file and line."""
    return {
        "severity": one.severity,
        "slug": one.slug,
        "file": one.location.file,
        "line": one.location.line,
        "object": one.obj,
        "path": one.path,
        "message": one.message,
    }


def local_endpoints(agent: Agent) -> list[dict[str, Any]]:
    """The local workloads and their interfaces. ``state``: "enforced", or "waiting" for an interface."""
    found = []
    closed = agent.closed.keys
    for endpoint in sorted(
        (one for key, one in agent.objects.local.items() if key not in closed), key=lambda one: one.key
    ):
        binding = agent.enforcement.applier.bindings.get(endpoint.key)
        row = agent.enforcement.tables.endpoints.get(endpoint.key)
        found.append({
            "endpoint": str(endpoint.key),
            "addresses": [str(address) for address in endpoint.addresses],
            "number": None if row is None else row.number,
            "ifindex": None if binding is None else binding.ifindex,
            "interface": None if binding is None else name_of(agent, binding.ifindex),
            "state": "enforced" if agent.enforcement.applier.is_enforced(endpoint.key) else "waiting",
            "evidence": evidence(agent, endpoint.key),
            "isolated_by": {
                way.value: [str(policy.key) for policy in policies]
                for way, policies in agent.enforcement.isolation(endpoint.key).items()
            },
        })  # fmt: skip
    return found


def evidence(agent: Agent, key: EndpointKey) -> str | None:
    """The name of the evidence for a workload's interface; None without an interface.

    "address (weak)" is evidence that the workload itself could have made.
    """
    found = agent.interfaces.evidence.get(key)
    if found is None:
        return None
    return f"{found.name.lower()} (weak)" if found is Evidence.ADDRESS else found.name.lower()


def interfaces(agent: Agent) -> list[dict[str, Any]]:
    """The interfaces with the programs.

    ``state``: "enforced" with a workload's row, "own" for the node's own interfaces, or "closed" for a workload's
    interface whose workload is not known.
    """
    closed = agent.closed.keys
    bindings = agent.enforcement.applier.bindings.items()
    owners = {binding.ifindex: str(key) for key, binding in bindings if key not in closed}
    found = []
    for ifindex in sorted(agent.attachments.interfaces):
        state = "enforced" if ifindex in owners else "own" if ifindex in agent.own_interfaces.interfaces else "closed"
        found.append(
            {"ifindex": ifindex, "interface": name_of(agent, ifindex), "endpoint": owners.get(ifindex), "state": state}
        )
    return found


def name_of(agent: Agent, ifindex: int) -> str | None:
    """The name of an interface; None if the interface no longer exists."""
    link = agent.interfaces.wiring.links.get(ifindex)
    return None if link is None else link.name


def rules(agent: Agent, maps: Mapping[str, KernelMap]) -> list[dict[str, Any]]:
    """The rules in force, with the packets and bytes that they decided since their counters were made.

    ``staged_packets``: the packets that the rule would decide if staged policies were enforced.
    """
    counted, staged = maps["np_rule_count"], maps["np_staged_count"]
    found = []
    for number, cause in sorted(agent.enforcement.tables.rules.items()):
        packets, size = _sum(counted.get(struct.pack("=I", number)))
        pending, _ = _sum(staged.get(struct.pack("=I", number)))
        found.append(
            {"number": number, "rule": str(cause), "packets": packets, "bytes": size, "staged_packets": pending}
        )
    return found


def readiness(agent: Agent) -> dict[str, str]:
    """The readiness checks of the agent: the reason of its failure for each check, "" if the check passes.

    ``synced``: the agent has all objects of all sources. ``programmed``: they are in force. ``fresh``: no source is
    behind. An error that only the author of an object can correct fails no check; otherwise a tenant could make every
    node unready.
    """
    reports = agent.source.report()
    missing = [f"{one['source']}: {', '.join(one['waiting_for'][:CAUSES])}" for one in reports if not one["synced"]]
    behind = [f"{one['source']}: {part}" for one in reports for part in one["behind"]]
    return {
        "synced": f"waiting for all objects of {'; '.join(missing)}" if missing else "",
        "programmed": _not_programmed(agent),
        "fresh": "; ".join(behind[:CAUSES]) + ("; ..." if behind[CAUSES:] else ""),
    }


def _not_programmed(agent: Agent) -> str:
    if not agent.is_started:
        return "what an earlier agent put in force stays" if agent.keeps_enforcement else "nothing is in force yet"
    if not agent.is_in_force:
        return "the workloads of this node are closed until the sources have synced"
    if agent.rejected.problem is not None:
        return agent.rejected.problem.message
    failed = list(agent.attachments.problems)
    return "; ".join(one.message for one in failed[:CAUSES])


def rule_labels(cause: Cause) -> dict[str, str]:
    """The labels of a rule in metrics. Different causes have different labels.

    ``rule``: the rule's index; or "end-of-tier" or "no-match"; or "failsafe" or "tunnel" with an index; or "missing" if
    a profile does not exist. ``kind``: the kind of the policy, "Profile" for a profile. ``policy``: the name of the
    policy or profile.
    """
    key, index = cause.policy, str(cause.index)
    rules = {
        CauseKind.RULE: index,
        CauseKind.TIER_END: "end-of-tier",
        CauseKind.PROFILE: index if cause.index >= 0 else "missing",
        CauseKind.NO_MATCH: "no-match",
        CauseKind.FAILSAFE: f"failsafe-{index}",
        CauseKind.TUNNEL: f"tunnel-{index}",
    }
    return {
        "tier": cause.tier,
        "kind": "" if key is None else key.kind,
        "namespace": "" if key is None else key.namespace,
        "policy": "" if key is None else key.name,
        **({"kind": "Profile", "policy": cause.profile} if cause.kind is CauseKind.PROFILE else {}),
        "direction": cause.direction.value,
        "rule": rules[cause.kind],
        "action": cause.action.value,
    }


def metrics(agent: Agent, maps: Mapping[str, KernelMap], state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All metrics of the agent as plain values, see `netpol_ebpf.agent.metrics`.

    ``state``: the result of `status` or `waiting`.
    """
    whole = {**state, "readiness": readiness(agent)}
    if not agent.is_started:
        return [one.as_dict() for one in families(whole)]
    whole |= {"change_seconds": agent.enforcement.record.histogram(), "connections": connection_counts(maps)}
    counted = (
        {**one, "labels": rule_labels(cause)}
        for one, (_, cause) in zip(rules(agent, maps), sorted(agent.enforcement.tables.rules.items()), strict=True)
    )
    return [one.as_dict() for one in families(whole, counted)]


def connection_counts(maps: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The connections in each connection table, without those whose time-out has passed; see `ConnectionMap`.

    ``established``, ``unreplied``: the number of connections in this state. ``size``: the number of slots.
    """
    found = {}
    for name in abi.UNREPLIED_VIEWS:
        established, unreplied = maps[name].count_live()
        found[name] = {"established": established, "unreplied": unreplied, "size": maps[name].slots}
    return found


def identities(agent: Agent) -> list[dict[str, Any]]:
    """The identities in force, with the addresses and prefixes that have each identity."""
    members: dict[int, list[str]] = {}
    for address, row in agent.enforcement.tables.addresses.items():
        members.setdefault(row.identity, []).append(str(address))
    for net, identity in agent.enforcement.tables.cidrs.items():
        members.setdefault(identity, []).append(str(net))
    return [
        {"number": number, "digest": digest, "members": sorted(members.get(number, ()))}
        for number, digest in sorted(agent.enforcement.tables.identities.items())
    ]


def connections(agent: Agent, maps: Mapping[str, KernelMap]) -> dict[str, Any]:
    """The rows of the connection tables, at most `CONNECTIONS`.

    A row whose time-out has passed is included until another connection takes its slot. ``more``: how many rows are
    left out. ``form``: "established", or "unreplied" if no reply was seen so far. ``rule`` is None if the connection is
    exempt or was judged elsewhere.
    """
    endpoints = {row.number: str(key) for key, row in agent.enforcement.tables.endpoints.items()}
    states = {number: state for state, number in STATES.items()}
    directions = {abi.NP_DIRECTION_INGRESS: "ingress", abi.NP_DIRECTION_EGRESS: "egress"}
    total = 0

    def rows() -> Iterator[tuple[int, bytes, bytes]]:
        nonlocal total
        for table, (name, _) in enumerate(CONNECTION_TABLES):
            for raw_key, raw_row in maps[name].items():
                total += 1
                yield table, raw_key, raw_row

    found: list[dict[str, Any]] = []
    # Sorted by key, because the order in the tables would reveal the secret of their hash.
    for table, raw_key, raw_row in heapq.nsmallest(CONNECTIONS, rows()):
        name, form = CONNECTION_TABLES[table]
        kind = abi.np_conn4_key if name.endswith("4") else abi.np_conn6_key
        key, row = kind.from_buffer_copy(raw_key), abi.np_conn.from_buffer_copy(raw_row)
        ends = [
            (str(ip_address(bytes(key.local))), key.local_port),
            (str(ip_address(bytes(key.remote))), key.remote_port),
        ]
        if row.direction == abi.NP_DIRECTION_INGRESS:
            ends.reverse()
        rule = agent.enforcement.tables.rules.get(row.rule)
        found.append({
            "endpoint": endpoints.get(key.endpoint, f"number {key.endpoint}"),
            "direction": directions[row.direction],
            "protocol": int(key.protocol),
            "source": ends[0][0], "source_port": ends[0][1],
            "destination": ends[1][0], "destination_port": ends[1][1],
            "form": form,
            "state": states[row.state],
            "generation": row.generation,
            "rule": None if rule is None else str(rule),
        })  # fmt: skip
    return {"connections": found, "more": total - len(found)}


def reason_counts(counted: KernelMap) -> dict[str, int]:
    """The number of packets for each reason, without reasons that never occurred."""
    found = {}
    for number, reason in abi.REASONS.items():
        packets, _ = _sum(counted.get(struct.pack("=I", number)))
        if packets:
            found[reason.slug] = packets
    return found


def _sum(cells: bytes | None) -> tuple[int, int]:
    pairs = list(_COUNT.iter_unpack(cells or b""))
    return sum(packets for packets, _ in pairs), sum(size for _, size in pairs)
