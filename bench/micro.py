# SPDX-License-Identifier: Apache-2.0
"""Measure what one packet costs: nanoseconds for each run of the loaded program, less those of an empty program.

The programs run by BPF_PROG_TEST_RUN on real maps. An empty program and one that only parses are measured in the same
rounds, interleaved with the cases, so that other load of the machine affects all of them alike. The figures are medians
over the rounds.

*Hot* cases repeat one packet. The caches are warm, so the figure is the program's own work. *Spread* cases run once on
each of many packets (another peer or port each time, with maps of the stated size). Most of the data is not in the
cache, and each new flow is really recorded. *Random* cases run a program (`bench/primitives.c`) that writes another
client and port into the frame and calls the product's program. The data is cold and the instructions are warm; the cost
of the same run with an empty program in place of the product is subtracted. *Bare* cases are one access to a map with
such keys, less the cost of making the key. Each scale fills the maps with rows of its own: a number of pods (addresses
of both families, with an identity and a class each), of rules (ports, L4 classes, verdicts, names) and of CIDRs.

Verdicts are checked: if a case has another verdict than expected, it measured something else, and that is an error.
After the table, the program prints the product's targets (`bench/targets.py`) and the number of instructions that the
verifier processed in each program.

    sudo .venv/bin/python bench/micro.py [-o json] [--rounds N] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "loader"), str(ROOT)]

from bench import targets  # noqa: E402
from netpol_ebpf.ending import ended_by_signals  # noqa: E402
from netpol_ebpf.errors import MapFullError  # noqa: E402
from netpol_loader import abi  # noqa: E402
from netpol_loader.kernel import syscall  # noqa: E402
from netpol_loader.kernel.hook import Hook  # noqa: E402
from netpol_loader.kernel.maps import Map  # noqa: E402
from netpol_loader.pins import build  # noqa: E402
from netpol_loader.pins.dataplane import SKB_BYTES, SKB_INGRESS_IFINDEX, Dataplane  # noqa: E402
from netpol_loader.tables.seal import seal_endpoint  # noqa: E402

MOV_MINUS_ONE = struct.pack("<BBhi", 0xB7, 0, 0, -1)
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)

HOT_REPEAT = 200_000
"""Runs in one call. There are so many that the cost of the call itself, some microseconds, does not count."""
DENY_REPEAT = 4_000  # each run writes an event, and the ring has room for more
SPREAD_RUNS = 1_000
OPEN_FLOWS = 8_192
"""More flows than np_flow_cache has slots, so that most packets need the connection table."""
RANDOM_FLOWS = 65_536
RANDOM_REPEAT = 50_000
RANDOM_DENY_REPEAT = 20_000
STEADY_REPEAT = 4 * RANDOM_FLOWS
RESTED_REPEAT = RANDOM_FLOWS // 8
REST_S = 1.1
"""Seconds after which the entries of np_flow_cache have expired."""
FLOW_HASH = 2_654_435_761
"""As in primitives.c: the client of a flow is (flow * FLOW_HASH) modulo 2**32, scaled to the number of clients."""
CLIENT_OFFSET, PORT_OFFSET = 30, 34
"""Offsets in an IPv4 frame: of the destination address, which is the client of packets that a pod sends, and of the
source port."""
LPM_SIZES = (10, 1000, 100_000)
SIZES = {"np_verdict": 1 << 18, "np_l4_col": 4096, "np_event": 1 << 23}
BARE = (
    "empty",
    "nothing",
    "lru",
    "lru_insert",
    "table_insert",
    "hash",
    "array",
    "percpu",
    "event",
    *(f"lpm_{n}" for n in LPM_SIZES),
)
PASS, DROP = abi.NP_PASS & 0xFFFF_FFFF, abi.NP_DROP

POD4, POD6 = IPv4Address("10.255.0.1"), IPv6Address("fd00:255::1")
FIRST4, FIRST6 = int(IPv4Address("10.0.0.1")), int(IPv6Address("fd00::1"))
ENDPOINT, OWN_IDENTITY, FIRST_IDENTITY = 7, 16, 17
INGRESS_SET, EGRESS_SET = 1, 2
ALLOWED_PORT, DENIED_PORT, NEW_PORT = 80, 81, 82
"""Destination ports. New flows have one of their own, because a SYN to an open connection would close that
connection."""
FIRST_CIDR = int(IPv4Address("172.16.0.0"))
PORT_CLASSES = 50
"""Number of L4 classes at the large scale. Further rules differ only in their peers. Arbitrary; large for one policy
set."""


@dataclass(frozen=True)
class Scale:
    """The numbers of rows in the tables that the program looks up."""

    pods: int
    rules: int
    cidrs: int


SCALES = (Scale(10, 10, 10), Scale(10, 10_000, 10), Scale(100_000, 10, 10), Scale(100_000, 10_000, 10_000))


def eth(kind: int, packet: bytes) -> bytes:
    """An Ethernet frame."""
    return bytes(12) + struct.pack("!H", kind) + packet


def tcp4(source: int, destination: int, sport: int, dport: int, flags: int) -> bytes:
    """An IPv4 TCP frame."""
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 40, 1, 0, 64, 6, 0, source, destination)
    return eth(0x0800, head + struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 1024, 0, 0))


def tcp6(source: int, destination: int, sport: int, dport: int, flags: int) -> bytes:
    """An IPv6 TCP frame."""
    head = struct.pack("!IHBB", 6 << 28, 20, 6, 64) + source.to_bytes(16, "big") + destination.to_bytes(16, "big")
    return eth(0x86DD, head + struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 1024, 0, 0))


TCP = 6
FIN, SYN, ACK = 1, 2, 16


def index(number: int) -> bytes:
    """The key of an array element."""
    return struct.pack("=I", number)


def write_scale(dataplane: Dataplane, scale: Scale) -> None:
    """Fill the maps for one scale.

    The first half of the ports and of the peers is allowed, the second half is denied.
    """
    maps = dataplane.maps
    for name in abi.maps_with_rows(abi.MapRole.TABLE):
        maps[name].delete_many([key for key, _ in maps[name].items()])
        maps[name].end_grace_period()
    pods = range(scale.pods)
    addr = [bytes(abi.np_addr(identity=FIRST_IDENTITY + pod)) for pod in pods]
    own = bytes(abi.np_addr(identity=OWN_IDENTITY, holder=ENDPOINT))
    maps["np_addr4"].put_many([(POD4.packed, own), *((struct.pack("!I", FIRST4 + pod), addr[pod]) for pod in pods)])
    maps["np_addr6"].put_many([(POD6.packed, own), *(((FIRST6 + pod).to_bytes(16, "big"), addr[pod]) for pod in pods)])

    maps["np_cidr4"].put_many(prefixes(scale.cidrs))

    l4_classes = min(scale.rules, PORT_CLASSES) + 1
    peer_classes = max(scale.rules // PORT_CLASSES, 1) + 1
    rows = [
        (struct.pack("=II", policy_set, FIRST_IDENTITY + pod), index(1 + pod % (peer_classes - 1)))
        for policy_set in (INGRESS_SET, EGRESS_SET) for pod in pods
    ]  # fmt: skip
    maps["np_peer_class"].put_many(rows)
    verdicts = []
    for number in range(2 * peer_classes * l4_classes):
        is_allowed = number % l4_classes in (1, 1 + NEW_PORT - ALLOWED_PORT)
        action = abi.NP_ACTION_ALLOW if is_allowed else abi.NP_ACTION_DENY
        rule = number % min(scale.rules, 65_000) + 1
        verdict = abi.np_verdict(rule=rule, staged_rule=rule, action=action, staged_action=action)
        verdicts.append((index(number), bytes(verdict)))
    maps["np_verdict"].put_many(verdicts)
    maps["np_rule"].put_many(
        [(index(rule), f"tier|policy-{rule}|egress|0|allow".encode().ljust(120, b"\0")) for rule in range(scale.rules)]
    )

    block = bytearray(512)
    for port in range(l4_classes - 1):  # class 0 is that of all other ports; port 80 has class 1
        struct.pack_into("=H", block, (ALLOWED_PORT + port) % 256 * 2, port + 1)
    maps["np_l4_atom"].put(index(abi.NP_SLOT_TCP * 256), bytes(block))
    column = struct.pack("=64H", *(atom if atom < l4_classes else 0 for atom in range(64)))
    sets = {}
    for policy_set in (INGRESS_SET, EGRESS_SET):
        maps["np_l4_col"].put(index(policy_set), column)
        sets[policy_set] = abi.np_set(
            number=policy_set, peer_classes=peer_classes, own_classes=1, l4_base=policy_set, l4_classes=l4_classes,
            source_classes=1, verdict_base=(policy_set - 1) * peer_classes * l4_classes,
        )  # fmt: skip
    row = abi.np_endpoint(number=ENDPOINT, ifindex=1, ingress=sets[INGRESS_SET], egress=sets[EGRESS_SET])
    maps["np_endpoint"].put(index(1), bytes(seal_endpoint(row)))
    dataplane.bump_generation()


def prefixes(count: int) -> list[tuple[bytes, bytes]]:
    """The rows of a trie: ``count`` adjacent prefixes of 28 bits."""
    value = bytes(abi.np_cidr(identity=FIRST_IDENTITY))
    return [(struct.pack("=I", 28) + struct.pack("!I", FIRST_CIDR + 16 * number), value) for number in range(count)]


@dataclass(frozen=True)
class Vary:
    """The input of a random case.

    ``flows``: the number of flows, a power of two. Each has one of ``clients`` addresses, which begin at ``first``.
    """

    flows: int
    clients: int
    first: int = FIRST4
    service: int = ALLOWED_PORT

    def row(self) -> bytes:
        """The row as ``struct np_vary``."""
        own = int.from_bytes(POD4.packed, sys.byteorder)
        return struct.pack(
            "=8I", self.flows - 1, self.clients, self.first, CLIENT_OFFSET, PORT_OFFSET, own, self.service, ENDPOINT
        )

    def client(self, flow: int) -> int:
        """The client's address of a flow, as primitives.c computes it."""
        return self.first + ((flow * FLOW_HASH & 0xFFFF_FFFF) * self.clients >> 32)


def conn_key(client: int, port: int, service: int) -> bytes:
    """The key of a connection that the pod opens."""
    return struct.pack("=I4s4sHHB3x", ENDPOINT, POD4.packed, client.to_bytes(4, "big"), port, service, TCP)


def _own(name: str, kind: str, key_size: int, value_size: int, rows: int, *flags: str) -> tuple[str, abi.MapSpec]:
    return name, abi.MapSpec(name, kind, None, None, key_size, value_size, rows, flags, abi.MapRole.SCRATCH)


_CONN_SIZES = (ctypes.sizeof(abi.np_conn4_key), ctypes.sizeof(abi.np_conn))
_CIDR_SIZES = (ctypes.sizeof(abi.np_cidr4_key), ctypes.sizeof(abi.np_cidr))
OWN_MAPS = dict(
    (
        _own("np_bench_target", "prog_array", 4, 4, 1),
        _own("np_bench_vary", "array", 4, 32, 1),
        _own("np_bench_hash", "hash", 4, ctypes.sizeof(abi.np_addr), 262_144, "BPF_F_NO_PREALLOC"),
        _own("np_bench_lru", "lru_hash", *_CONN_SIZES, 262_144),
        _own("np_bench_lru_new", "lru_hash", *_CONN_SIZES, 65_536),
        _own("np_bench_array", "array", 4, ctypes.sizeof(abi.np_verdict), 65_536),
        _own("np_bench_cpu", "percpu_array", 4, ctypes.sizeof(abi.np_count), 65_536),
        *(_own(f"np_bench_lpm_{rows}", "lpm_trie", *_CIDR_SIZES, rows, "BPF_F_NO_PREALLOC") for rows in LPM_SIZES),
    )
)
"""The maps that `bench/primitives.c` declares."""


class Primitives:
    """The programs of `bench/primitives.c`, and their maps."""

    def __init__(self, dataplane: Dataplane) -> None:
        names = ("np_vary", *(f"np_bare_{name}" for name in BARE))
        self.fds = build.load_entry(dataplane.pin_dir, ROOT / "bench" / "primitives.c", names, OWN_MAPS)
        self._target = Map(syscall.obj_get(dataplane.pin_dir / "np_bench_target"))
        self._vary = Map(syscall.obj_get(dataplane.pin_dir / "np_bench_vary"))
        self._hash = Map(syscall.obj_get(dataplane.pin_dir / "np_bench_hash"))
        self._flows = Map(syscall.obj_get(dataplane.pin_dir / "np_bench_lru"))
        for rows in LPM_SIZES:
            Map(syscall.obj_get(dataplane.pin_dir / f"np_bench_lpm_{rows}")).put_many(prefixes(rows))

    def fill(self, scale: Scale) -> None:
        """Fill an ordinary hash map with the addresses of all pods."""
        self._hash.delete_many([key for key, _ in self._hash.items()])
        row = bytes(abi.np_addr(identity=FIRST_IDENTITY))
        self._hash.put_many([(struct.pack("!I", FIRST4 + pod), row) for pod in range(scale.pods)])

    def remember(self, flows: Sequence[tuple[int, int]]) -> None:
        """Put flows, as (client, own port), into an LRU map of the kernel."""
        row = bytes(abi.np_conn(generation=1))
        self._flows.put_many([(conn_key(client, port, ALLOWED_PORT), row) for client, port in flows])

    def choose(self, vary: Vary, program: int) -> None:
        """Set the input that the following runs vary, and the program that `np_vary` calls."""
        self._vary.put(index(0), vary.row())
        self._target.put(index(0), struct.pack("=I", program))


class Bench:
    """The programs, and the context in which they run."""

    def __init__(self, dataplane: Dataplane, empty_fd: int, parse_fd: int) -> None:
        self.dataplane = dataplane
        self.primitives = Primitives(dataplane)
        self.empty_fd = empty_fd
        self.parse_fd = parse_fd
        self.reader = dataplane.events(lambda _event: None)
        context = bytearray(SKB_BYTES)
        struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, 77)
        self.context = bytes(context)

    def hot(self, fd: int, frame: bytes, repeat: int = HOT_REPEAT) -> Callable[[], float]:
        """Measure one frame that is repeated, in ns for each run.

        The kernel reports whole nanoseconds; for many runs, this process's clock gives fractions.
        """

        def measure() -> float:
            began = time.perf_counter_ns()
            duration = syscall.prog_test_run(fd, frame, self.context, repeat)[1]
            elapsed = time.perf_counter_ns() - began
            self.reader.consume()
            return elapsed / repeat if repeat >= HOT_REPEAT else float(duration)

        return measure

    def spread(self, fd: int, frames: Sequence[bytes], tidy: Callable[[], None] | None = None) -> Callable[[], float]:
        """Measure the runs of frames that each run once: their median in ns."""

        def measure() -> float:
            runs = [syscall.prog_test_run(fd, frame, self.context, 1)[1] for frame in frames]
            self.reader.consume()
            if tidy:
                tidy()
            return float(statistics.median(runs))

        return measure

    def varied(self, vary: Vary, frame: bytes, wanted: int, repeat: int = RANDOM_REPEAT) -> Callable[[], float]:
        """Measure the product on frames that vary, less the cost of varying them, in ns for each run."""
        return self._less(vary, frame, wanted, repeat, ("np_vary", "np_bare_empty"), ("np_vary", None))

    def steady(self, vary: Vary, frame: bytes, wanted: int) -> Callable[[], float]:
        """As `varied`, on flows that continue: each flow had several packets within the last second."""
        measure = self.varied(vary, frame, wanted, STEADY_REPEAT)

        def second() -> float:
            measure()
            return measure()

        return second

    def rested(self, vary: Vary, frame: bytes, wanted: int) -> Callable[[], float]:
        """As `varied`, on flows that had no packet for a second. The runs are few, so hardly any flow comes twice."""
        measure = self.varied(vary, frame, wanted, RESTED_REPEAT)

        def first() -> float:
            time.sleep(REST_S)
            return measure()

        return first

    def bare(self, vary: Vary, name: str, repeat: int = RANDOM_REPEAT) -> Callable[[], float]:
        """Measure one access with keys that vary, less the cost of making the keys, in ns for each run."""
        return self._less(
            vary, bytes(64), PASS, repeat, ("np_bare_nothing", "np_bare_empty"), (f"np_bare_{name}", "np_bare_empty")
        )

    def _less(
        self, vary: Vary, frame: bytes, wanted: int, repeat: int, base: tuple[str, str], case: tuple[str, str | None]
    ) -> Callable[[], float]:
        """Measure the difference between two runs.

        ``base``, ``case``: (program to run, program that it calls; None: the product).
        """
        primitives, product = self.primitives, self.dataplane.program_fd(Hook.TC_INGRESS)

        def run(name: str, called: str | None, wanted: int) -> int:
            primitives.choose(vary, product if called is None else primitives.fds[called])
            verdict, duration = syscall.prog_test_run(primitives.fds[name], frame, self.context, repeat)
            self.reader.consume()
            if verdict & 0xFFFF_FFFF != wanted:
                raise AssertionError(f"{name} calling {called}: verdict {verdict}, expected {wanted} ({vary})")
            return duration

        def measure() -> float:
            less = run(*base, PASS)
            return float(run(*case, wanted) - less)

        return measure

    def random_cases(self, scale: Scale) -> dict[str, tuple[str, Callable[[], float]]]:
        """Cases with data that is not in the caches, and the bare accesses that limit them. Opens the flows."""
        flows, anybody = Vary(RANDOM_FLOWS, scale.pods), Vary(1 << 32, scale.pods)
        frame = tcp4(int(POD4), FIRST4, 1, ALLOWED_PORT, ACK)
        denied = tcp4(int(POD4), FIRST4, 1, DENIED_PORT, SYN)
        new = tcp4(int(POD4), FIRST4, 1, NEW_PORT, SYN)
        recorded = Vary(1 << 32, scale.pods, service=NEW_PORT)
        hot = Vary(1, 1)
        for flow in range(RANDOM_FLOWS):
            client = flows.client(flow)
            self.establish(
                tcp4(int(POD4), client, flow, ALLOWED_PORT, ACK), tcp4(client, int(POD4), ALLOWED_PORT, flow, SYN | ACK)
            )
        self.primitives.remember([(flows.client(flow), flow) for flow in range(RANDOM_FLOWS)])
        cases = {
            targets.RANDOM_ESTABLISHED: self.steady(flows, frame, PASS),
            "random: established, 64k flows, the first packet in a second, v4": self.rested(flows, frame, PASS),
            targets.BARE_LOOKUP: self.bare(flows, "lru", STEADY_REPEAT),
            targets.RANDOM_DENIED: self.varied(anybody, denied, DROP, RANDOM_DENY_REPEAT),
            targets.RANDOM_RECORDED: self.varied(recorded, new, PASS),
            targets.BARE_INSERT: self.bare(recorded, "lru_insert"),
            "bare: insert into the table of connections": self.bare(recorded, "table_insert"),
            "bare: LRU lookup, hot": self.bare(hot, "lru"),
            "bare: hash lookup of an address, random": self.bare(anybody, "hash"),
            "bare: hash lookup of an address, hot": self.bare(hot, "hash"),
            "bare: array, 64k rows at random": self.bare(anybody, "array"),
            "bare: array, hot": self.bare(hot, "array"),
            "bare: per-CPU array, 64k rows at random": self.bare(anybody, "percpu"),
            "bare: per-CPU array, hot": self.bare(hot, "percpu"),
            "bare: ring buffer, one event": self.bare(hot, "event", RANDOM_DENY_REPEAT),
        }
        for rows in LPM_SIZES:
            clients = Vary(1 << 32, 16 * rows, FIRST_CIDR)
            cases[f"bare: LPM lookup, {rows} prefixes at random"] = self.bare(clients, f"lpm_{rows}")
        return {name: ("", measure) for name, measure in cases.items()}

    def life_cases(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Measure each packet of short connections that a workload opens, with a full table of open connections."""
        one = self.dataplane.maps["np_conn4"]
        closed = bytes(abi.np_conn(state=abi.NP_CONN_TCP_OPEN))
        with contextlib.suppress(MapFullError):  # some buckets have no room for more
            one.put_many([(conn_key(FIRST4 + n, 1, 9), closed) for n in range(3 * one.max_entries)])
        steps = {
            "SYN": SYN,
            "answer, SYN with ACK": SYN | ACK,
            "first ACK": ACK,
            "FIN": FIN | ACK,
            "answer, FIN": FIN | ACK,
        }
        found: dict[str, float] = {}

        def live() -> None:
            figures: dict[str, list[float]] = {step: [] for step in steps}
            for number in range(SPREAD_RUNS):
                tuple4 = (int(POD4), FIRST4 + number % 10, next(ports), ALLOWED_PORT)
                for step, flags in steps.items():
                    is_answer = step.startswith("answer")
                    hook = Hook.TC_EGRESS if is_answer else Hook.TC_INGRESS
                    source, destination, port, service = tuple4
                    frame = tcp4(destination, source, service, port, flags) if is_answer else tcp4(*tuple4, flags)
                    figures[step].append(
                        syscall.prog_test_run(self.dataplane.program_fd(hook), frame, self.context, 1)[1]
                    )
            found.update({step: statistics.median(values) for step, values in figures.items()})

        def measure(step: str) -> Callable[[], float]:
            def read() -> float:
                if step not in found:
                    live()
                return found.pop(step)

            return read

        ports = itertools.cycle(range(1024, 61_000))
        return {f"spread: short connection, {step}": ("empty, once", measure(step)) for step in steps}

    def forget(self, *names: str) -> Callable[[], None]:
        """A function that removes all connections from the maps ``names``."""

        def tidy() -> None:
            for name in names:
                one = self.dataplane.maps[name]
                one.delete_many([key for key, _ in one.items()])

        return tidy

    def cases(self, scale: Scale) -> dict[str, tuple[str, Callable[[], float]]]:
        """All cases of a scale: name -> (name of its base, measurement)."""
        out = self.dataplane.program_fd(Hook.TC_INGRESS)
        peers = [(997 * number) % scale.pods for number in range(SPREAD_RUNS)]
        ports = range(20_000, 20_000 + SPREAD_RUNS)

        def four(peer: int, port: int, dport: int, flags: int) -> bytes:
            return tcp4(int(POD4), FIRST4 + peer, port, dport, flags)

        def six(peer: int, port: int, dport: int, flags: int) -> bytes:
            return tcp6(int(POD6), FIRST6 + peer, port, dport, flags)

        open4, open6 = four(0, 40_000, ALLOWED_PORT, ACK), six(0, 40_000, ALLOWED_PORT, ACK)
        self.establish(open4, tcp4(FIRST4, int(POD4), ALLOWED_PORT, 40_000, SYN | ACK))
        self.establish(open6, tcp6(FIRST6, int(POD6), ALLOWED_PORT, 40_000, SYN | ACK))
        spread4 = [four(peer, port, ALLOWED_PORT, SYN) for peer, port in zip(peers, ports, strict=True)]
        spread6 = [six(peer, port, ALLOWED_PORT, SYN) for peer, port in zip(peers, ports, strict=True)]
        denied4 = [four(peer, port, DENIED_PORT, SYN) for peer, port in zip(peers, ports, strict=True)]
        many4 = [four(number % scale.pods, 1_024 + number, ALLOWED_PORT, ACK) for number in range(OPEN_FLOWS)]
        for number, packet in enumerate(many4):
            reply = tcp4(FIRST4 + number % scale.pods, int(POD4), ALLOWED_PORT, 1_024 + number, SYN | ACK)
            self.establish(packet, reply)
        return {
            "parse only, v4": ("empty", self.hot(self.parse_fd, open4)),
            "parse only, v6": ("empty", self.hot(self.parse_fd, open6)),
            "established, v4": ("empty", self.hot(out, open4)),
            "established, v6": ("empty", self.hot(out, open6)),
            "SYN allowed again, v4": ("empty", self.hot(out, four(0, 41_000, ALLOWED_PORT, SYN))),
            "SYN allowed again, v6": ("empty", self.hot(out, six(0, 41_000, ALLOWED_PORT, SYN))),
            "SYN denied, v4": ("empty", self.hot(out, four(0, 42_000, DENIED_PORT, SYN), DENY_REPEAT)),
            "SYN denied, v6": ("empty", self.hot(out, six(0, 42_000, DENIED_PORT, SYN), DENY_REPEAT)),
            "spread: established, v4": ("empty, once", self.spread(out, many4)),
            "spread: new allowed, v4": ("empty, once", self.spread(out, spread4, self.forget("np_unreplied4"))),
            "spread: new allowed, v6": ("empty, once", self.spread(out, spread6, self.forget("np_unreplied6"))),
            "spread: new denied, v4": ("empty, once", self.spread(out, denied4)),
        }

    def bases(self) -> dict[str, Callable[[], float]]:
        """The measurements that are subtracted from the cases."""
        frame = tcp4(int(POD4), FIRST4, 40_000, ALLOWED_PORT, ACK)
        return {
            "empty": self.hot(self.empty_fd, frame),
            "empty, once": self.spread(self.empty_fd, [frame] * SPREAD_RUNS),
        }

    def establish(self, packet: bytes, reply: bytes) -> None:
        """Make a connection established.

        Raises an error if the program does not agree, so that no case measures something else.
        """
        for hook, frame in ((Hook.TC_INGRESS, packet), (Hook.TC_EGRESS, reply)):
            run = self.dataplane.test_run(hook, frame, ingress_ifindex=77)
            if not run.passed:
                raise AssertionError(f"{hook.value} dropped a packet of the benchmark's own connection")


def measure_scale(bench: Bench, scale: Scale, rounds: int) -> dict[str, list[float]]:
    """Measure all rounds: the bases, and each case less its base. The lists have one figure for each round."""
    write_scale(bench.dataplane, scale)
    bench.primitives.fill(scale)
    bases, cases = bench.bases(), {**bench.cases(scale), **bench.random_cases(scale)}
    figures: dict[str, list[float]] = {name: [] for name in (*bases, *cases)}

    def measure_round(chosen: Mapping[str, tuple[str, Callable[[], float]]]) -> dict[str, float]:
        base = {name: measure() for name, measure in bases.items()}
        for name, (base_name, measure) in chosen.items():
            figures.setdefault(name, []).append(measure() - base.get(base_name, 0.0))
        return base

    for _ in range(rounds):
        for name, figure in measure_round(cases).items():
            figures[name].append(figure)
    lives = bench.life_cases()  # this call fills the table on which the other cases rely
    for _ in range(rounds):
        measure_round(lives)
    return figures


def verified_instructions(program: int) -> int | None:
    """The number of instructions that the verifier processed, over all paths.

    None before Linux 5.16, which does not report it.
    """
    for line in Path(f"/proc/self/fdinfo/{program}").read_text(encoding="ascii").splitlines():
        if line.startswith("verified_insns:"):
            return int(line.split()[1])
    return None


def main(argv: list[str] | None = None) -> int:
    """Measure all scales and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="smallest and largest scale only")
    options = parser.parse_args(argv)
    scales = (SCALES[0], SCALES[-1]) if options.quick else SCALES
    pin_root = Path(f"/sys/fs/bpf/netpol-bench-{os.getpid()}")
    with Dataplane.open(pin_root, sizes=SIZES) as dataplane:
        try:
            parse = build.load_entry(dataplane.pin_dir, ROOT / "bench" / "parse_only.c", ("np_parse_only",), {})
            bench = Bench(dataplane, syscall.prog_load(MOV_MINUS_ONE + EXIT), parse["np_parse_only"])
            results = {scale: measure_scale(bench, scale, options.rounds) for scale in scales}
            verified = {hook.value: verified_instructions(dataplane.program_fd(hook)) for hook in Hook}
        finally:
            dataplane.remove()
    if options.output == "json":
        found = [
            {
                "pods": s.pods,
                "rules": s.rules,
                "cidrs": s.cidrs,
                "ns": medians(result),
                "samples": result,
                "verified": verified,
            }
            for s, result in results.items()
        ]
        print(json.dumps(found, indent=2))
    else:
        print_tables(results, verified)
    return 0


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median over the rounds, by case."""
    return {name: statistics.median(values) for name, values in samples.items()}


def print_tables(results: Mapping[Scale, Mapping[str, Sequence[float]]], verified: Mapping[str, int | None]) -> None:
    """Print the costs by scale, the targets, and the verifier's numbers."""
    scales = list(results)
    heads = [f"{s.pods} pods {s.rules} rules" for s in scales]
    print(f"{'ns per packet, less an empty program':48s}" + "".join(f"{head:>26s}" for head in heads))
    for name in next(iter(results.values())):
        print(f"{name:48s}" + "".join(f"{statistics.median(results[scale][name]):26.0f}" for scale in scales))
    print("\ntargets")
    for row in targets.rows({(scale.pods, scale.rules): samples for scale, samples in results.items()}):
        figure = "-" if row.figure is None else f"{row.figure:.3g} {row.unit}"
        print(f"{row.name:72s}{figure:>10s}  at most {row.limit:g} {row.unit:3s} {row.verdict}")
    print("\ninstructions that the verifier went through, over all paths")
    for name, count in verified.items():
        print(f"{name:48s}{'not told by this kernel' if count is None else count:>26}")


if __name__ == "__main__":
    with ended_by_signals():
        sys.exit(main())
