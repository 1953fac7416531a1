# SPDX-License-Identifier: Apache-2.0
"""Measure how time and memory grow when one number of the cluster grows at a time and all others stay as they are.

    sudo .venv/bin/python -m bench.scale [--rounds 7] [-o FILE]

Each point is a world that was compiled and written to maps as on a node. The loaded program is then run on packets
(BPF_PROG_TEST_RUN). In each round every point has one turn, and each round begins with another point. The nanoseconds
are those over an empty program in the same turn; each point is divided by the smallest point of its axis.

*Spread*: each packet has another client or flow and runs once; the figure is the median. All points exist at the same
time, each with its own program and maps.

*Hot*: one packet is repeated. All points are measured with one program on one set of maps, which gets the rows of one
point after the other; the rows of the largest point take half a second to write. With a program for each point, the
smallest figures would say nothing about the maps: the kernel places each loaded program at another address within a
cache line, by chance, and that alone changes a packet of an open connection by 5 to 9 ns (on the processor on which
this was examined). Here rules and pods also grow together, to the sizes that `bench/targets.py` compares.

Memory is given in bytes: those that the kernel accounts to each map (``memlock`` in fdinfo), and those of the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeVar

from bench import targets
from bench.end_to_end import ended_by
from bench.policies import FIRST_POD, LOAD_PORTS, MEASURED, NODE, make_world
from bench.progress import Progress
from bench.record import LESS, Case, Run, begin, case_id, save, this_command
from bench.site import BPFFS, EXIT, MEASURED_ADDRESS, MOV_MINUS_ONE, PEER_ADDRESS
from netpol_ebpf.apply.applier import Applier, Binding
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.tables import CompiledTables
from netpol_ebpf.errors import NetpolError, PlatformError
from netpol_ebpf.policy.types import (
    TCP,
    Action,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    LabelledNets,
    Policy,
    PolicyKey,
    Ports,
    Rule,
    World,
)
from netpol_ebpf.selector import equals
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.pins.dataplane import SKB_BYTES, SKB_IFINDEX, SKB_INGRESS_IFINDEX, Dataplane

SUITE = "scale"
CONTENDER = "netpol-ebpf"
HOT_CALLS, HOT_RUNS = 25, 10_000
"""HOT_CALLS: number of calls, of which the median is taken. HOT_RUNS: runs of each call. Many short calls are used,
because a call during which the processor ran something else gives no figure. The cost of the call itself, some
microseconds, is also in the call of the empty program."""
JUDGED_RUNS = 1_000
"""As HOT_RUNS, for packets that policy judges, which cost more. Each denied packet writes an event; the events of all
calls fit into the ring."""
SIZE_ROUNDS = 3
"""Factor of the number of rounds for the cases of targets. On a busy machine a packet of an open connection costs one
of two values, and sometimes the other."""
SPREAD_RUNS = 1_000
IFINDEX, ELSEWHERE = 1, 77
SYN, ACK = 2, 16
PASSED = (abi.NP_PASS, abi.NP_PASS_ALONE)
"""The verdicts with which a packet passes."""
DENIED_PORT = 9
FIRST_CIDR = int(IPv4Address("172.16.0.0"))
MAP_SIZES = {"np_event": 1 << 22, "np_addr4": 1 << 18, "np_cidr4": 1 << 18, "np_verdict": 1 << 20, "np_l4_col": 1 << 16}
STATE_MAPS = frozenset(
    {
        *abi.maps_of(abi.MapRole.CONNECTION, abi.MapRole.FLOW_CACHE, abi.MapRole.ENDPOINT_CACHE, abi.MapRole.EVENT),
        *abi.UNREPLIED_VIEWS.values(),
    }
)
"""Maps with state instead of policy. Their size is chosen once and does not grow with the cluster."""


@dataclass(frozen=True, slots=True)
class Point:
    """The numbers of things in a cluster. ``services``: the number of different ports in the rules."""

    rules: int = 100
    pods: int = 1000
    cidrs: int = 100
    sets: int = 1
    services: int = 48
    flows: int = 1


AXES: Mapping[str, Sequence[int]] = {
    "rules": (10, 100, 1000, 10_000),
    "pods": (10, 1000, 10_000, 100_000),
    "cidrs": (10, 100, 10_000, 100_000),
    "sets": (1, 100, 500),
    "services": (4, 48, 400),
    "flows": (1, 1024, 65_536),
}
SMOKE_AXES: Mapping[str, Sequence[int]] = {"rules": (10, 1000)}
SMOKE_SIZES: Sequence[targets.Size] = ((10, 10), (10, 1000))

Condition = tuple[tuple[str, int], ...]
"""A case's parameters: these numbers are as given, all others as in `Point`."""
Packets = tuple[Sequence[bytes], int, bool]
"""(packets, runs of each packet, whether they pass)."""
Samples = dict[tuple[Point, str], list[float]]
"""(point, name of the case) -> one figure for each round."""
T = TypeVar("T")


def points(axes: Mapping[str, Sequence[int]], sizes: Sequence[targets.Size] = ()) -> dict[Condition, Point]:
    """The points on the axes, followed by those with the given numbers of pods and rules."""
    found: list[Condition] = [((axis, value),) for axis, values in axes.items() for value in values]
    found += [(("pods", pods), ("rules", rules)) for pods, rules in sizes]
    return {condition: replace(Point(), **dict(condition)) for condition in found}


def world_of(point: Point) -> World:
    """The cluster of a point.

    Each local endpoint besides the measured one has a policy, and so a policy set, of its own.
    """
    world = make_world(
        point.rules, [MEASURED_ADDRESS], [PEER_ADDRESS], direction=Direction.INGRESS, pods=point.pods,
        services=point.services,
    )  # fmt: skip
    nets = tuple(IPv4Network((FIRST_CIDR + 16 * number, 28)) for number in range(point.cidrs))
    world.network_sets["partners"] = LabelledNets("partners", {"set": "partners"}, nets)
    source = Entity(selector=equals("set", "partners"))
    partners = Rule(Action.ALLOW, 0, protocol=TCP, source=source, destination=Entity(ports=Ports(ranges=((443, 443),))))
    _add_policy(world, "partners", "measured", partners)
    for number in range(1, point.sets):
        key = EndpointKey("Pod", "bench", f"neighbour-{number}")
        address = IPv4Address(int(IPv4Address("10.200.0.0")) + number)
        labels = {"role": f"role-{number}"}
        world.endpoints[key] = Endpoint(key, EndpointKind.WORKLOAD, labels, (address,), profiles=("open",), node=NODE)
        port = (8000 + number, 8000 + number)
        source = Entity(selector=equals("app", f"app-{number % 100}"))
        rule = Rule(Action.ALLOW, 0, protocol=TCP, source=source, destination=Entity(ports=Ports(ranges=(port,))))
        _add_policy(world, f"role-{number}", f"role-{number}", rule)
    return world


def _add_policy(world: World, name: str, role: str, rule: Rule) -> None:
    key = PolicyKey("KubernetesNetworkPolicy", "bench", name)
    types = frozenset((Direction.INGRESS,))
    world.policies[key] = Policy(key, "default", 1000.0, equals("role", role), types, ingress=(rule,))


def frame(source: int, destination: int, source_port: int, port: int, flags: int) -> bytes:
    """An Ethernet frame with an IPv4 TCP segment."""
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 40, 1, 0, 64, TCP, 0, source, destination)
    segment = struct.pack("!HHIIBBHHH", source_port, port, 1, 1, 0x50, flags, 1024, 0, 0)
    return bytes(12) + b"\x08\x00" + head + segment


def compile_point(point: Point) -> CompiledTables:
    """The rows that the agent on the measured endpoint's node would write."""
    compiler = Compiler(lambda endpoint: endpoint.node == NODE)
    compiler.replace(world_of(point))
    compiler.commit()
    return compiler.tables


class Node:
    """A loaded program and its maps, which have the rows of one point at a time. A context manager."""

    def __init__(self, number: int) -> None:
        self.point = Point()
        self._pins = BPFFS / f"netpol-scale-{os.getpid()}-{number}"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Node:  # noqa: PYI034 - typing.Self comes with Python 3.11
        with contextlib.ExitStack() as stack:
            self.dataplane = stack.enter_context(Dataplane.open(self._pins, sizes=MAP_SIZES))
            stack.callback(self.dataplane.remove)
            self._events = stack.enter_context(self.dataplane.events(lambda _event: None))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def hold(self, point: Point, tables: CompiledTables) -> None:
        """Replace all rows by those of a point."""
        self.point = point
        empty_maps(self.dataplane.maps)
        applier = Applier(self.dataplane.maps)
        applier.bind(MEASURED, Binding(IFINDEX))
        applier.fill(tables)
        applier.bump_generation()
        for flow in range(point.flows):
            self._open(flow)

    def _open(self, flow: int) -> None:
        """Make a connection established. Raises PlatformError if the program does not agree."""
        peer, port, service = _client(flow)
        syn = frame(peer, int(MEASURED_ADDRESS), port, service, SYN)
        answer = frame(int(MEASURED_ADDRESS), peer, service, port, SYN | ACK)
        for hook, packet in ((Hook.TC_EGRESS, syn), (Hook.TC_INGRESS, answer)):
            if not self.dataplane.test_run(hook, packet, ifindex=IFINDEX, ingress_ifindex=ELSEWHERE).passed:
                raise PlatformError(f"the program dropped a packet of the benchmark's own connection at {self.point}")

    def cost(self, empty: int, packets: Packets) -> float:
        """Nanoseconds for each run over an empty program: the median of the calls.

        Raises NetpolError if a verdict is wrong.
        """
        frames, runs, passes = packets
        program = self.dataplane.program_fd(Hook.TC_EGRESS)
        costs = []
        for one in frames:
            verdict, ns = timed_run(program, one, runs)
            if (verdict in PASSED) is not passes:
                raise NetpolError(f"{self.point}: a packet that should {'pass' if passes else 'be denied'} did not")
            costs.append(ns - timed_run(empty, one, runs)[1])
        self._events.consume()  # a full ring takes no event, and that would cost less
        return statistics.median(costs)

    def memory(self, tables: CompiledTables) -> dict[str, int]:
        """Memory in bytes: of the maps with policy (by the kernel's account), their rows, and the connection tables."""
        accounted = {name: memlock(one.fd) for name, one in self.dataplane.maps.items()}
        return {
            "kernel memory": sum(size for name, size in accounted.items() if name not in STATE_MAPS),
            "rows": _rows_bytes(tables, self.dataplane.maps),
            "connection tables": accounted["np_conn4"],
        }


def _client(flow: int) -> tuple[int, int, int]:
    """A flow's (peer, source port, destination port)."""
    return int(PEER_ADDRESS), 1024 + flow % 64_000, LOAD_PORTS[0] + flow // 64_000


def hot_cases() -> dict[str, Packets]:
    """The cases with one packet that is repeated."""
    target, peer = int(MEASURED_ADDRESS), int(PEER_ADDRESS)
    source, port, service = _client(0)
    established = frame(source, target, port, service, ACK)
    denied, allowed = (frame(peer, target, 999, port, SYN) for port in (DENIED_PORT, LOAD_PORTS[0]))
    return {
        targets.GROWN_ESTABLISHED: ([established] * HOT_CALLS, HOT_RUNS, True),
        targets.GROWN_DENIED: ([denied] * HOT_CALLS, JUDGED_RUNS, False),
        "SYN allowed again, hot": ([allowed] * HOT_CALLS, JUDGED_RUNS, True),
    }


def spread_cases(point: Point) -> dict[str, Packets]:
    """The cases in which each packet differs."""
    target = int(MEASURED_ADDRESS)
    pods = [FIRST_POD + 7919 * number % point.pods for number in range(SPREAD_RUNS)]
    flows = [_client(7919 * number % point.flows) for number in range(SPREAD_RUNS)]
    return {
        "established, spread": ([frame(peer, target, port, service, ACK) for peer, port, service in flows], 1, True),
        "new flow denied, spread": ([frame(pod, target, 997, DENIED_PORT, SYN) for pod in pods], 1, False),
    }


def empty_maps(maps: Mapping[str, Map]) -> None:
    """Remove all rows that can be removed, of policy and of connections. No packet may be in the program meanwhile."""
    beside = set(abi.OVERFLOW_MAPS.values())  # emptied together with their tables
    for name, one in maps.items():
        if name not in beside and one.type != "ringbuf" and not one.type.endswith("array"):
            one.delete_many([key for key, _ in one.items()])
            one.end_grace_period()


def memlock(fd: int) -> int:
    """Bytes of kernel memory of a map. Raises PlatformError if fdinfo does not report them."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    raise PlatformError("this kernel's fdinfo says nothing of a map's memory")


def _rows_bytes(tables: CompiledTables, maps: Mapping[str, Map]) -> int:
    """The bytes of the keys and values of all rows that were written."""
    kernel = {
        "verdicts": "np_verdict", "l4_columns": "np_l4_col", "l4_atoms": "np_l4_atom", "peer_classes": "np_peer_class",
        "addresses": "np_addr4", "cidrs": "np_cidr4", "rules": "np_rule",
    }  # fmt: skip
    total = 0
    for table in tables.all():
        if table.name in kernel:
            one = maps[kernel[table.name]]
            total += len(table) * (one.key_size + one.value_size)
    return total


def timed_run(program: int, packet: bytes, runs: int) -> tuple[int, float]:
    """(verdict, nanoseconds for each run).

    The kernel reports whole ones; for many runs, this process's clock gives fractions.
    """
    context = bytearray(SKB_BYTES)
    struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, ELSEWHERE)
    struct.pack_into("=I", context, SKB_IFINDEX, IFINDEX)
    given = bytes(context)
    began = time.perf_counter_ns()
    verdict, duration = syscall.prog_test_run(program, packet, given, runs)
    elapsed = time.perf_counter_ns() - began
    return verdict, elapsed / runs if runs > 1 else float(duration)


def turns(things: Sequence[T], rounds: int) -> Iterator[T]:
    """Each thing once in each round. Each round begins with another thing."""
    step = max(1, len(things) // rounds)
    for turn in range(rounds):
        shift = turn * step % len(things)
        yield from things[shift:]
        yield from things[:shift]


def run_suite(
    run: Run, *, rounds: int, axes: Mapping[str, Sequence[int]] = AXES, sizes: Sequence[targets.Size] = targets.SIZES
) -> None:
    """Measure, and add the cases to the run."""
    on_axes, of_sizes = points(axes), points({}, sizes)
    named = {**on_axes, **of_sizes}
    tables = {point: compile_point(point) for point in named.values()}
    samples: Samples = {}
    with contextlib.ExitStack() as stack:
        empty = syscall.prog_load(MOV_MINUS_ONE + EXIT)
        stack.callback(os.close, empty)
        alone = {point: tables[point] for point in on_axes.values()}
        together = {point: tables[point] for point in of_sizes.values()}
        _one_after_the_other(alone, empty, rounds, samples)
        _one_after_the_other(together, empty, SIZE_ROUNDS * rounds, samples)
        memory = _side_by_side(alone, empty, rounds, samples)
    _record(run, named, samples, memory)


def _one_after_the_other(tables: Mapping[Point, CompiledTables], empty: int, rounds: int, samples: Samples) -> None:
    """Measure the hot cases: all points on one node, so that program and maps have the same addresses for all."""
    with Node(0) as node:
        progress = Progress("measuring, hot", rounds * len(tables))
        for point in turns(list(tables), rounds):
            progress.step(str(point))
            node.hold(point, tables[point])
            _measure(node, hot_cases(), empty, samples)
        progress.end()


def _side_by_side(
    tables: Mapping[Point, CompiledTables], empty: int, rounds: int, samples: Samples
) -> dict[Point, dict[str, int]]:
    """Measure the spread cases, and the memory of each point: each point on a node of its own."""
    with contextlib.ExitStack() as stack:
        progress = Progress("loading", len(tables))
        nodes = []
        for number, (point, one) in enumerate(tables.items()):
            progress.step(str(point))
            node = stack.enter_context(Node(number))
            node.hold(point, one)
            nodes.append(node)
        progress.end()
        progress = Progress("measuring, spread", rounds * len(nodes))
        for node in turns(nodes, rounds):
            progress.step(str(node.point))
            _measure(node, spread_cases(node.point), empty, samples)
        progress.end()
        return {node.point: node.memory(tables[node.point]) for node in nodes}


def _measure(node: Node, cases: Mapping[str, Packets], empty: int, samples: Samples) -> None:
    for name, packets in cases.items():
        samples.setdefault((node.point, name), []).append(node.cost(empty, packets))


def _record(
    run: Run, named: Mapping[Condition, Point], samples: Samples, memory: Mapping[Point, Mapping[str, int]]
) -> None:
    for condition, point in named.items():
        parameters = dict(condition)
        smallest = min(one for one in named if dict(one).keys() == parameters.keys())

        def base_of(name: str, condition: Condition = condition, smallest: Condition = smallest) -> str:
            return "" if condition == smallest else case_id(SUITE, name, CONTENDER, dict(smallest))

        for name in dict.fromkeys(name for _, name in samples):
            if values := samples.get((point, name)):
                run.cases.append(Case(SUITE, name, CONTENDER, "ns", LESS, tuple(values), parameters, base_of(name)))
        for name, figure in memory.get(point, {}).items():
            run.cases.append(
                Case(SUITE, name, CONTENDER, "bytes", LESS, (float(figure),), parameters, base_of(name), exact=True)
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="few points")
    parser.add_argument("-o", "--output", type=Path, default=Path("scale.json"))
    options = parser.parse_args(argv)
    run = begin(this_command())
    began = time.monotonic()
    axes, sizes = (SMOKE_AXES, SMOKE_SIZES) if options.smoke else (AXES, targets.SIZES)
    run_suite(run, rounds=options.rounds, axes=axes, sizes=sizes)
    run.seconds = round(time.monotonic() - began, 1)
    save(run, options.output)
    print(f"{len(run.cases)} cases in {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
