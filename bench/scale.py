# SPDX-License-Identifier: Apache-2.0
"""How cost and memory grow: one thing made larger at a time, everything else as it was.

    sudo .venv/bin/python -m bench.scale [--rounds 7] [-o FILE]

Each point is a world that the compiler compiled and the applier wrote, into maps of its own, as on a node; then the loaded program
is run on packets (BPF_PROG_TEST_RUN).  All points exist side by side and take turns.  Nanoseconds are over an empty program in the same
turn; each point is divided by the smallest of its axis.  *Hot*: one packet again and again.  *Spread*: each packet another client
or flow, run once; the median.

Bytes are what the kernel accounts to each map (``memlock`` in fdinfo), and what the rows themselves hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bench.end_to_end import ended_by
from bench.policies import FIRST_POD, LOAD_PORTS, MEASURED, NODE, make_world
from bench.progress import Progress
from bench.record import LESS, Case, Run, begin, case_id, save, this_command
from bench.site import BPFFS, EXIT, MEASURED_ADDRESS, MOV_MINUS_ONE, PEER_ADDRESS
from netpol_ebpf.apply.applier import Applier, Binding
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.errors import NetpolError, PlatformError
from netpol_ebpf.policy.types import (
    TCP,
    Action,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    NetworkSet,
    Policy,
    PolicyKey,
    Ports,
    Rule,
    World,
)
from netpol_ebpf.selector import equals
from netpol_loader import syscall
from netpol_loader.dataplane import SKB_BYTES, SKB_IFINDEX, SKB_INGRESS_IFINDEX, Dataplane
from netpol_loader.hook import Hook

SUITE = "scale"
CONTENDER = "netpol-ebpf"
HOT_RUNS = 20_000
DENIED_RUNS = 4_000
"""Each denied packet is an event: fewer than the ring holds, since nobody reads."""
SPREAD_RUNS = 1_000
IFINDEX, ELSEWHERE = 1, 77
SYN, ACK = 2, 16
DENIED_PORT = 9
FIRST_CIDR = int(IPv4Address("172.16.0.0"))
MAP_SIZES = {"np_event": 1 << 20, "np_addr4": 1 << 18, "np_cidr4": 1 << 18, "np_verdict": 1 << 20, "np_l4_col": 1 << 16}
STATE_MAPS = ("np_conn", "np_young", "np_frag", "np_recent", "np_near", "np_event")
"""Maps that hold what happened, not policy: their size is chosen once and does not grow with the cluster."""


@dataclass(frozen=True, slots=True)
class Point:
    """How much there is of each thing. ``services``: different ports that the rules name."""

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


def points(axes: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Point]:
    """Axis and value to the point."""
    return {(axis, value): replace(Point(), **{axis: value}) for axis, values in axes.items() for value in values}


def world_of(point: Point) -> World:
    """The cluster of a point. Local endpoints beyond the measured one have a policy, and so a policy set, each."""
    world = make_world(
        point.rules, [MEASURED_ADDRESS], [PEER_ADDRESS], direction=Direction.INGRESS, pods=point.pods,
        services=point.services,
    )  # fmt: skip
    nets = tuple(IPv4Network((FIRST_CIDR + 16 * number, 28)) for number in range(point.cidrs))
    world.network_sets["partners"] = NetworkSet("partners", {"set": "partners"}, nets)
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


class Loaded:
    """One point in the kernel. A context manager."""

    def __init__(self, point: Point, number: int) -> None:
        self.point = point
        self._pins = BPFFS / f"netpol-scale-{os.getpid()}-{number}"
        self._stack = contextlib.ExitStack()
        self.rows_bytes = 0

    def __enter__(self) -> Loaded:  # noqa: PYI034 - typing.Self comes with Python 3.11
        with contextlib.ExitStack() as stack:
            self.dataplane = stack.enter_context(Dataplane.open(self._pins, sizes=MAP_SIZES))
            stack.callback(self.dataplane.remove)
            compiler = Compiler(lambda endpoint: endpoint.node == NODE)
            compiler.replace(world_of(self.point))
            compiler.commit()
            applier = Applier(self.dataplane.maps)
            applier.bind(MEASURED, Binding(IFINDEX))
            applier.fill(compiler.tables)
            self.rows_bytes = _rows_bytes(compiler, self.dataplane)
            for flow in range(self.point.flows):
                self._open(flow)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _peer_and_port(self, flow: int) -> tuple[int, int]:
        return int(PEER_ADDRESS), 1024 + flow % 64_000

    def _open(self, flow: int) -> None:
        """Make a connection open. Raises PlatformError when the program does not agree."""
        peer, port = self._peer_and_port(flow)
        service = LOAD_PORTS[0] + flow // 64_000
        syn = frame(peer, int(MEASURED_ADDRESS), port, service, SYN)
        answer = frame(int(MEASURED_ADDRESS), peer, service, port, SYN | ACK)
        for hook, packet in ((Hook.TC_EGRESS, syn), (Hook.TC_INGRESS, answer)):
            if not self.dataplane.test_run(hook, packet, ifindex=IFINDEX, ingress_ifindex=ELSEWHERE).passed:
                raise PlatformError(f"the program dropped a packet of the benchmark's own connection at {self.point}")

    def cases(self) -> dict[str, tuple[list[bytes], int, bool]]:
        """Name to (packets, runs of each, whether they pass)."""
        target, peer = int(MEASURED_ADDRESS), int(PEER_ADDRESS)
        pods = [FIRST_POD + 7919 * number % self.point.pods for number in range(SPREAD_RUNS)]
        flows = [7919 * number % self.point.flows for number in range(SPREAD_RUNS)]
        established = []
        for flow in flows:
            source, port = self._peer_and_port(flow)
            established.append(frame(source, target, port, LOAD_PORTS[0] + flow // 64_000, ACK))
        return {
            "established, hot": ([established[0]], HOT_RUNS, True),
            "new flow denied, hot": ([frame(peer, target, 999, DENIED_PORT, SYN)], DENIED_RUNS, False),
            "SYN allowed again, hot": ([frame(peer, target, 998, LOAD_PORTS[0], SYN)], HOT_RUNS, True),
            "established, spread": (established, 1, True),
            "new flow denied, spread": ([frame(pod, target, 997, DENIED_PORT, SYN) for pod in pods], 1, False),
        }

    def measure(self, packets: Sequence[bytes], runs: int, *, passes: bool) -> float:
        """Nanoseconds per run: the mean of many runs of one packet, or the median of single runs. Raises when a verdict is wrong."""
        seen = [
            self.dataplane.test_run(Hook.TC_EGRESS, packet, ifindex=IFINDEX, ingress_ifindex=ELSEWHERE, repeat=runs)
            for packet in packets
        ]
        if any(run.passed is not passes for run in seen):
            raise NetpolError(f"{self.point}: a packet that should {'pass' if passes else 'be denied'} did not")
        return statistics.median(run.duration_ns for run in seen)

    def memory_bytes(self) -> int:
        """What the kernel accounts to the maps that hold policy."""
        return sum(memlock(one.fd) for name, one in self.dataplane.maps.items() if not name.startswith(STATE_MAPS))

    def flow_bytes(self) -> int:
        """What the kernel accounts to the connection tables, filled or not."""
        return sum(
            memlock(one.fd) for name, one in self.dataplane.maps.items() if name.startswith(("np_conn4", "np_young4"))
        )


def memlock(fd: int) -> int:
    """Bytes of kernel memory of a map. Raises PlatformError where fdinfo does not tell."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    raise PlatformError("this kernel's fdinfo says nothing of a map's memory")


def _rows_bytes(compiler: Compiler, dataplane: Dataplane) -> int:
    """Keys and values of all rows that were written."""
    kernel = {
        "verdicts": "np_verdict", "l4_columns": "np_l4_col", "l4_atoms": "np_l4_atom", "peer_classes": "np_peer_class",
        "addresses": "np_addr4", "cidrs": "np_cidr4", "rules": "np_rule",
    }  # fmt: skip
    total = 0
    for table in compiler.tables.all():
        if table.name in kernel:
            one = dataplane.maps[kernel[table.name]]
            total += len(table) * (one.key_size + one.value_size)
    return total


def empty_run(program: int, packets: Sequence[bytes], runs: int) -> float:
    """The same with an empty program."""
    context = bytearray(SKB_BYTES)
    struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, ELSEWHERE)
    struct.pack_into("=I", context, SKB_IFINDEX, IFINDEX)
    return statistics.median(syscall.prog_test_run(program, packet, bytes(context), runs)[1] for packet in packets)


def run_suite(run: Run, *, rounds: int, axes: Mapping[str, Sequence[int]] = AXES) -> None:
    """Measure, and add the cases to the run."""
    named = points(axes)
    distinct = list(dict.fromkeys(named.values()))
    samples: dict[tuple[Point, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        progress = Progress("loading", len(distinct))
        loaded = []
        for number, point in enumerate(distinct):
            progress.step(str(point))
            loaded.append(stack.enter_context(Loaded(point, number)))
        progress.end()
        program = syscall.prog_load(MOV_MINUS_ONE + EXIT)
        stack.callback(os.close, program)
        progress = Progress("measuring", rounds * len(distinct))
        for turn in range(rounds):
            shift = turn * len(loaded) // rounds
            for one in [*loaded[shift:], *loaded[:shift]]:
                progress.step(f"round {turn + 1}: {one.point}")
                for name, (packets, runs, passes) in one.cases().items():
                    cost = one.measure(packets, runs, passes=passes) - empty_run(program, packets, runs)
                    samples.setdefault((one.point, name), []).append(cost)
        progress.end()
        memory = {
            one.point: {
                "kernel memory": one.memory_bytes(),
                "rows": one.rows_bytes,
                "connection tables": one.flow_bytes(),
            }
            for one in loaded
        }
    _record(run, named, samples, memory)


def _record(
    run: Run, named: Mapping[tuple[str, int], Point], samples: Mapping[tuple[Point, str], Sequence[float]],
    memory: Mapping[Point, Mapping[str, int]],
) -> None:  # fmt: skip
    smallest: dict[str, int] = {}
    for axis, value in named:
        smallest[axis] = min(value, smallest.get(axis, value))
    names: list[str] = list(dict.fromkeys(name for _, name in samples))
    for (axis, value), point in named.items():
        parameters = {axis: value}

        def base_of(name: str, axis: str = axis, value: int = value) -> str:
            least = smallest[axis]
            return "" if value == least else case_id(SUITE, name, CONTENDER, {axis: least})

        for name in names:
            values = tuple(samples[(point, name)])
            run.cases.append(Case(SUITE, name, CONTENDER, "ns", LESS, values, parameters, base_of(name)))
        for name, figure in memory[point].items():
            run.cases.append(
                Case(SUITE, name, CONTENDER, "bytes", LESS, (float(figure),), parameters, base_of(name), exact=True)
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="two points on two axes")
    parser.add_argument("-o", "--output", type=Path, default=Path("scale.json"))
    options = parser.parse_args(argv)
    run = begin(this_command())
    began = time.monotonic()
    run_suite(run, rounds=options.rounds, axes=SMOKE_AXES if options.smoke else AXES)
    run.seconds = round(time.monotonic() - began, 1)
    save(run, options.output)
    print(f"{len(run.cases)} cases in {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
