# SPDX-License-Identifier: Apache-2.0
"""Measure what domain names in rules cost: questions, answers, verdicts, and round trips beside a DNS proxy.

    sudo .venv/bin/python -m bench.names [--rounds N] [--quick] [-o FILE]

The packet cases are test runs of the programs, less an empty program. An answer ends its question, so it cannot be
repeated: each run of an answer has a question before it. *Hot* cases repeat name and addresses; in *changing* cases both
are new each time, so each address is a new row. The kernel's clock measures one run; the figures are medians of runs,
one for each round, and all cases are measured in each round. Their base is parsing a packet, in the same rounds. After
each case the counter of learned addresses must have the expected value: if not, the case measured something else.

The round trips are those of a client that asks dnsmasq: directly, through these programs, and through a small proxy of
Python (`bench/dns_proxy.py`). The contenders take turns question by question.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from bench.end_to_end import ended_by
from bench.micro import (
    ACK,
    DENY_REPEAT,
    EXIT,
    HOT_REPEAT,
    MOV_MINUS_ONE,
    SYN,
    Bench,
    Vary,
    eth,
    index,
    tcp4,
)
from bench.record import LESS, ROOT, Case, Run, begin, case_id, save, this_command
from bench.site import (
    MEASURED_ADDRESS,
    MEASURED_HOST,
    MEASURED_LINK,
    NODE_ADDRESS,
    NODE_HOST,
    NOTHING,
    OURS,
    PEER_ADDRESS,
    PEER_HOST,
    Contender,
    Scenario,
    Site,
    wait_until,
)
from netpol_ebpf.apply.encode import learned_element, name_key, resolver_element
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import Direction
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.clock import read_jiffies
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.pins import build
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.tables.seal import seal_endpoint

SUITE = "names"
CONTENDER = "netpol-ebpf"
BASE = "parse only, v4"
LRU_INSERT, LRU_LOOKUP, RING = "bare: LRU insert", "bare: LRU lookup, hot", "bare: ring buffer, one event"
DIRECT, PROXY = "no policy", "proxy of Python"

POD, SERVER = IPv4Address("10.255.0.1"), IPv4Address("10.96.0.10")
KNOWN, UNKNOWN = IPv4Address("203.0.113.5"), IPv4Address("203.0.113.6")
"""An address of a name that a rule allows, and one that no answer taught."""
FIRST_TAUGHT = int(IPv4Address("100.64.0.0"))
ENDPOINT, POD_IDENTITY = 7, 100
INGRESS_SET, EGRESS_SET = 1, 2
BY_NAME_PORT, DENIED_PORT, OPEN_PORT, DOMAIN_PORT = 443, 81, 80, 53
LIST, EXACT, WILD, OTHER = 5, 7, 9, 11
"""A domain list, and the classes of the names of the cases."""
WATCHED = (120, 1_200, 24_000)
PASS, DROP = abi.NP_PASS, abi.NP_DROP
EXCHANGES = 100
"""Exchanges for one sample. So many events of 28 addresses fit into the ring, and the endpoint's tokens suffice."""
FLOWS = 300
TRIPS_PORT = 5205
"""Port of the DNS server of the round trips: one that the policies of `bench/policies.py` allow."""
TRIPS_RULES = 10
TRIPS_NAME = "www.example.com"
TIMEOUT_S = 2.0

Figures = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of an answer. ``ending``: what follows the first label of the name that is asked for."""

    name: str
    ending: str
    addresses: int = 1
    cnames: int = 0
    is_watched: bool = True
    exact: str = ""
    """The name of the hot case, if it has to be the watched one."""

    def asked(self, number: int) -> str:
        """The name to ask for; number 0 is that of the hot cases."""
        return self.exact if self.exact else f"n{number:07d}.{self.ending}"


SHAPES = (
    Shape("1 A, watched by its name", "exact.example", exact="www.example.com"),
    Shape("1 A, watched by a wildcard", "wild.example"),
    Shape("1 A, not watched", "nobody.example", is_watched=False),
    Shape("2 CNAME and 2 A", "wild.example", addresses=2, cnames=2),
    Shape("28 A", "wild.example", addresses=28),
    Shape("128 A", "wild.example", addresses=128),
)


def encode(name: str) -> bytes:
    """A name as in a message, without compression."""
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def question(name: str) -> bytes:
    """The message that asks for the IPv4 addresses of a name."""
    return struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + encode(name) + struct.pack("!2H", 1, 1)


def answer(name: str, addresses: Sequence[int], cnames: int = 0) -> bytes:
    """The answer to `question`: a chain of CNAME records, then the addresses of its end."""
    asked = question(name)
    message = bytearray(struct.pack("!6H", 0x1234, 0x8180, 1, cnames + len(addresses), 0, 0) + asked[12:])
    owner = 12
    for number in range(cnames):
        target = encode(f"c{number}.chain.example")
        message += struct.pack("!3HIH", 0xC000 | owner, 5, 1, 60, len(target))
        owner = len(message)
        message += target
    for address in addresses:
        message += struct.pack("!3HIHI", 0xC000 | owner, 1, 1, 60, 4, address)
    return bytes(message)


def udp4(source: IPv4Address, destination: IPv4Address, sport: int, dport: int, data: bytes) -> bytes:
    """An IPv4 UDP frame."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(data), 1, 0, 64, 17, 0) + source.packed + destination.packed
    return eth(0x0800, head + struct.pack("!4H", sport, dport, 8 + len(data), 0) + data)


def case_names() -> list[str]:
    """The packet cases, without those that depend on the number of watched names."""
    exchanges = [
        f"{what}, {shape.name}, {how}" for shape in SHAPES for how in ways(shape) for what in ("question", "answer")
    ]
    flows = ["new flow allowed by a name", "new flow denied, with a domain list", "new flow denied, without a list"]
    return [BASE, LRU_INSERT, LRU_LOOKUP, RING, *exchanges, *flows, "established flow, hot"]


def ways(shape: Shape) -> tuple[str, ...]:
    """Whether the shape is measured with names that repeat, that change, or both."""
    return ("hot",) if shape.exact else ("hot", "changing")


# --- packets ----------------------------------------------------------------------------------------------------------


class Names:
    """A dataplane with one endpoint that may ask DNS, and otherwise send to names and to one open port."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.dataplane = dataplane
        parse = build.load_entry(dataplane.pin_dir, ROOT / "bench" / "parse_only.c", ("np_parse_only",), {})
        self.bench = Bench(dataplane, syscall.prog_load(MOV_MINUS_ONE + EXIT), parse["np_parse_only"])
        self.reports = dataplane.dns_events(lambda _event: None)
        self._serial = 0
        self._empty_ns = 0.0
        self._write()

    def _write(self) -> None:
        maps = self.dataplane.maps
        own = bytes(abi.np_addr(identity=POD_IDENTITY, holder=ENDPOINT))
        maps["np_addr4"].put(POD.packed, own)
        for slot, ports in ((abi.NP_SLOT_UDP, {DOMAIN_PORT: 1}), (abi.NP_SLOT_TCP, {OPEN_PORT: 2, DENIED_PORT: 3})):
            block = bytearray(512)
            for port, atom in ports.items():
                struct.pack_into("=H", block, port * 2, atom)
            maps["np_l4_atom"].put(index(slot * 256), bytes(block))
        maps["np_l4_col"].put(index(INGRESS_SET), bytes(128))
        maps["np_l4_col"].put(index(EGRESS_SET), struct.pack("=64H", 0, 1, 2, 3, *[0] * 60))
        allow, deny = abi.NP_ACTION_ALLOW, abi.NP_ACTION_DENY
        verdicts = [(allow, 11, 0), (deny, 13, LIST), (allow, 12, 0), (allow, 12, 0), (deny, 13, 0)]
        for number, (action, rule, domains) in enumerate(verdicts):
            row = abi.np_verdict(
                rule=rule, staged_rule=rule, action=action, staged_action=action,
                flags=domains << abi.NP_VERDICT_DOMAIN_SHIFT,
            )  # fmt: skip
            maps["np_verdict"].put(index(number), bytes(row))
        sets = [
            abi.np_set(number=number, peer_classes=1, own_classes=1, l4_base=number, l4_classes=classes,
                       source_classes=1, verdict_base=base)
            for number, classes, base in ((INGRESS_SET, 1, 0), (EGRESS_SET, 4, 1))
        ]  # fmt: skip
        endpoint = abi.np_endpoint(number=ENDPOINT, ifindex=1, ingress=sets[0], egress=sets[1])
        maps["np_endpoint"].put(index(1), bytes(seal_endpoint(endpoint)))
        maps["np_domain"].put(
            bytes(abi.np_domain_key(list=LIST, name_class=EXACT)), bytes(abi.np_domain(rank=0, rule=30, staged_rule=30))
        )
        learn_from(self.dataplane, ENDPOINT, SERVER, DOMAIN_PORT)
        self.watch(2)
        self.dataplane.bump_generation()

    def watch(self, count: int) -> None:
        """Watch ``count`` patterns: those of the cases, and names that nobody asks for."""
        others = [(f"service-{number}.team-{number % 97}.example.net", OTHER) for number in range(count - 2)]
        watched = [("www.example.com", EXACT), ("*.wild.example", WILD), *others]
        rows = {name_key(pattern): index(name_class) for pattern, name_class in watched}
        names = self.dataplane.maps["np_name"]
        names.delete_many([key for key, _ in names.items() if key not in rows])
        names.put_many(list(rows.items()))

    def learned(self) -> int:
        """How many addresses were learned since the maps were made."""
        row = self.dataplane.maps["np_reason_count"].get(index(abi.NP_REASON_DNS_LEARNED)) or b""
        return sum(packets for packets, _ in struct.iter_unpack("=QQ", row))

    def once(self, hook: Hook, frame: bytes, wanted: int) -> float:
        """Nanoseconds of one run. Raises PlatformError for another verdict."""
        verdict, duration = syscall.prog_test_run(self.dataplane.program_fd(hook), frame, self.bench.context, 1)
        if verdict & 0xFFFF_FFFF != wanted & 0xFFFF_FFFF:
            raise PlatformError(f"a packet of the benchmark has the verdict {verdict}, expected {wanted}")
        return float(duration)

    def exchange(self, shape: Shape, *, is_hot: bool, exchanges: int = EXCHANGES) -> tuple[float, float]:
        """The medians of question and answer, less an empty program."""
        exchanges = min(exchanges, 2_800 // shape.addresses)
        self.dataplane.maps["np_asked"].put(index(ENDPOINT), bytes(abi.np_asked()))
        before = self.learned()
        asked, answered = [], []
        for _ in range(exchanges):
            self._serial += not is_hot
            number = 0 if is_hot else self._serial
            first = FIRST_TAUGHT + number * shape.addresses
            name = shape.asked(number)
            message = answer(name, range(first, first + shape.addresses), shape.cnames)
            asked.append(self.once(Hook.TC_INGRESS, udp4(POD, SERVER, 40_000, DOMAIN_PORT, question(name)), PASS))
            answered.append(self.once(Hook.TC_EGRESS, udp4(SERVER, POD, DOMAIN_PORT, 40_000, message), PASS))
        self.reports.consume()
        wanted = exchanges * shape.addresses if shape.is_watched else 0
        if self.learned() - before != wanted:
            raise PlatformError(f"{shape.name}: {self.learned() - before} addresses were learned, expected {wanted}")
        return statistics.median(asked) - self._empty_ns, statistics.median(answered) - self._empty_ns

    def flow(self, address: IPv4Address, port: int, wanted: int) -> float:
        """The median of new flows, each from another port, less an empty program."""
        runs = []
        for _ in range(FLOWS):
            self._serial += 1
            frame = tcp4(int(POD), int(address), 1_024 + self._serial % 60_000, port, SYN)
            runs.append(self.once(Hook.TC_INGRESS, frame, wanted))
        self.bench.reader.consume()
        return statistics.median(runs) - self._empty_ns

    def round(self, sizes: Sequence[int], figures: Figures, *, repeat: int = HOT_REPEAT) -> None:
        """Measure every case once."""

        def add(name: str, figure: float) -> None:
            figures.setdefault(name, []).append(figure)

        bench, frame = self.bench, tcp4(int(POD), int(KNOWN), 40_000, OPEN_PORT, ACK)
        empty = bench.hot(bench.empty_fd, frame, repeat)()
        self._empty_ns = bench.spread(bench.empty_fd, [frame] * FLOWS)()
        add(BASE, bench.hot(bench.parse_fd, frame, repeat)() - empty)
        for name, key, runs in ((LRU_INSERT, "lru_insert", repeat), (RING, "event", DENY_REPEAT)):
            add(name, bench.bare(Vary(1 << 32 if key == "lru_insert" else 1, 10), key, runs)())
        bench.primitives.remember([(Vary(1, 1).client(0), 0)])
        add(LRU_LOOKUP, bench.bare(Vary(1, 1), "lru", repeat)())
        self.watch(sizes[0])
        for shape in SHAPES:
            for how in ways(shape):
                asked, answered = self.exchange(shape, is_hot=how == "hot")
                add(f"question, {shape.name}, {how}", asked)
                add(f"answer, {shape.name}, {how}", answered)
        self._flows(add, empty, repeat)
        for size in sizes:
            self.watch(size)
            for how in ("hot", "changing"):
                add(watched_case(size, how), self.exchange(SHAPES[1], is_hot=how == "hot")[1])

    def _flows(self, add: Callable[[str, float], None], empty: float, repeat: int) -> None:
        later = read_jiffies() // abi.NP_LEARNED_JIFFIES + 100_000
        name, key, row = learned_element(ENDPOINT, KNOWN, {EXACT: later})
        self.dataplane.maps[name].put(key, row)
        add("new flow allowed by a name", self.flow(KNOWN, BY_NAME_PORT, PASS))
        add("new flow denied, with a domain list", self.flow(UNKNOWN, BY_NAME_PORT, DROP))
        add("new flow denied, without a list", self.flow(UNKNOWN, DENIED_PORT, DROP))
        sent = tcp4(int(POD), int(KNOWN), 40_001, OPEN_PORT, ACK)
        self.bench.establish(sent, tcp4(int(KNOWN), int(POD), OPEN_PORT, 40_001, SYN | ACK))
        out = self.dataplane.program_fd(Hook.TC_INGRESS)
        add("established flow, hot", self.bench.hot(out, sent, repeat)() - empty)


def watched_case(size: int, how: str) -> str:
    """The name of the case with a number of watched names."""
    return f"answer, {size} watched names, {how}"


def learn_from(dataplane: Dataplane, endpoint: int, server: IPv4Address, port: int) -> None:
    """Let an endpoint learn from the answers of a server."""
    name, key, row = resolver_element(server, port)
    dataplane.maps[name].put(key, row)
    dataplane.maps["np_asked"].put(index(endpoint), bytes(abi.np_asked()))
    config = dataplane.config()
    config.flags |= abi.NP_CONFIG_NAMES
    config.name_floor_s = 30
    config.dns_ports = 0 if port == DOMAIN_PORT else port
    dataplane.set_config(config)


def measure_packets(rounds: int, sizes: Sequence[int], *, repeat: int = HOT_REPEAT) -> Figures:
    """All packet cases: one figure in ns for each round."""
    with Dataplane.open(Path(f"/sys/fs/bpf/netpol-bench-names-{os.getpid()}")) as dataplane:
        try:
            names = Names(dataplane)
            figures: Figures = {}
            for _ in range(rounds):
                names.round(sizes, figures, repeat=repeat)
        finally:
            dataplane.remove()
    return figures


# --- round trips ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(site: Site, host: str, argv: Sequence[str]) -> Iterator[None]:
    """Run a server inside a host."""
    server = subprocess.Popen(site.lab.command(host, argv), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def dns_server(site: Site) -> Iterator[None]:
    """Run dnsmasq at the peer. It answers each name of example.com with one address."""
    argv = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=",
            "--user=root", f"--port={TRIPS_PORT}", f"--listen-address={PEER_ADDRESS}", "--bind-interfaces",
            f"--address=/example.com/{KNOWN}"]  # fmt: skip
    with running(site, PEER_HOST, argv):
        yield


def trip(client: socket.socket, message: bytes) -> float:
    """Nanoseconds from the question to its answer."""
    began = time.perf_counter_ns()
    client.send(message)
    found = client.recv(4096)
    elapsed = time.perf_counter_ns() - began
    if found[:2] != message[:2] or KNOWN.packed not in found:
        raise PlatformError("a DNS answer of the benchmark is another one")
    return float(elapsed)


def measure_trips(rounds: int, trips: int) -> Figures:
    """The medians in ns of the round trips of each contender, one for each round."""
    given = Scenario(Direction.EGRESS, MEASURED_ADDRESS, (PEER_ADDRESS,))
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(Site(Contender(NOTHING), given, None))
        ours = stack.enter_context(Site(Contender(OURS, TRIPS_RULES), given, given.world(TRIPS_RULES)))
        if ours.dataplane is None:
            raise PlatformError("the site has no programs")
        table: Map = ours.dataplane.maps["np_endpoint"]
        row = abi.np_endpoint.from_buffer_copy(table.get(index(ours.ifindex(MEASURED_LINK))) or b"")
        learn_from(ours.dataplane, int(row.number), PEER_ADDRESS, TRIPS_PORT)
        ours.dataplane.maps["np_name"].put(name_key(TRIPS_NAME), index(EXACT))
        proxy = [sys.executable, str(ROOT / "bench" / "dns_proxy.py")]
        proxy += [str(NODE_ADDRESS), str(PEER_ADDRESS), str(TRIPS_PORT)]
        stack.enter_context(dns_server(bare))
        stack.enter_context(dns_server(ours))
        stack.enter_context(running(bare, NODE_HOST, proxy))
        clients = {}
        for name, site, server in ((DIRECT, bare, PEER_ADDRESS), (CONTENDER, ours, PEER_ADDRESS), (PROXY, bare, NODE_ADDRESS)):  # fmt: skip
            client = site.lab.prober.open_socket(MEASURED_HOST, socket.AF_INET, socket.SOCK_DGRAM)
            clients[name] = stack.enter_context(client)
            client.settimeout(TIMEOUT_S)
            client.connect((str(server), TRIPS_PORT))
            wait_until(lambda client=client: answers(client), f"an answer to {name}", 10.0)  # type: ignore[misc]
        figures: Figures = {name: [] for name in clients}
        for number in range(rounds):
            runs: Figures = {name: [] for name in clients}
            for one in range(trips):
                message = struct.pack("!H", number * trips + one & 0xFFFF) + question(TRIPS_NAME)[2:]
                for name, client in clients.items():
                    runs[name].append(trip(client, message))
            for name, samples in runs.items():
                figures[name].append(statistics.median(samples))
        if not list(ours.dataplane.maps["np_learned4"].items()):
            raise PlatformError("the programs learned nothing from the round trips")
    return figures


def answers(client: socket.socket) -> bool:
    """Whether the server answers."""
    try:
        trip(client, question(TRIPS_NAME))
    except OSError:
        return False
    return True


# --- the suite --------------------------------------------------------------------------------------------------------


def run_suite(run: Run, *, rounds: int, sizes: Sequence[int] = WATCHED, trips: int = 300, repeat: int = HOT_REPEAT) -> None:  # fmt: skip
    """Measure, and add the cases to the run."""
    add_packets(run, measure_packets(rounds, sizes, repeat=repeat))
    if shutil.which("dnsmasq") is None:
        run.notes.append("dnsmasq is not installed: no DNS round trips")
        return
    add_trips(run, measure_trips(rounds, trips))


def add_packets(run: Run, figures: Figures) -> None:
    """Add the packet cases. All are divided by BASE."""
    base = case_id(SUITE, BASE, CONTENDER)
    for name, samples in figures.items():
        run.cases.append(
            Case(SUITE, name, CONTENDER, "ns", LESS, tuple(samples), base="" if name == BASE else base)
        )  # fmt: skip


def add_trips(run: Run, figures: Figures) -> None:
    """Add the round trips. They are divided by those without policy."""
    name = "DNS round trip, p50"
    base = case_id(SUITE, name, DIRECT)
    for contender, samples in figures.items():
        run.cases.append(
            Case(SUITE, name, contender, "ns", LESS, tuple(samples), base="" if contender == DIRECT else base)
        )  # fmt: skip


def show(run: Run) -> None:
    """Print the cases: the median, and the median of the ratios to the base."""
    for case in run.cases:
        base = run.case(case.base) if case.base else None
        over = (
            ""
            if base is None
            else f"{statistics.median(a / b for a, b in zip(case.samples, base.samples, strict=False)):10.2f} x"
        )
        print(f"{case.name:46}{case.contender:18}{case.median:12.0f} ns{over}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(argv)
    run = begin(this_command())
    if options.quick:
        run_suite(run, rounds=options.rounds, sizes=WATCHED[:1], trips=20, repeat=10_000)
    else:
        run_suite(run, rounds=options.rounds)
    show(run)
    if options.output:
        save(run, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
