# SPDX-License-Identifier: Apache-2.0
"""The sites of the contenders: each has its own laboratory, a node with the measured pod and, on one machine, its peer.

All laboratories exist at the same time with the same addresses, and each contender is set up once. So a change of the
contender between two measurements costs nothing, and every contender is measured in every round.

With two machines the peer is the other machine. The given network card is moved into the node of the contender that is
being measured, and at the end back to its namespace (the kernel does that, too, if this process is killed).

Invariant: rules of nftables and iptables, sets and programs exist only inside namespaces of a laboratory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bench import netfilter
from bench.policies import MEASURED, NODE, PEER, FlatRule, flat_rules, make_world
from netpol_ebpf.agent.barrier import BarrierSettings
from netpol_ebpf.apply.applier import Applier, Binding
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.errors import PlatformError, UsageError
from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.probe import CLONE_NEWNET
from netpol_ebpf.lab.topology import Host, IPAddress
from netpol_ebpf.policy.types import Direction, World
from netpol_loader.host.barrier import BarrierSpec, BarrierTables
from netpol_loader.kernel import syscall
from netpol_loader.pins import attach
from netpol_loader.pins.attach import Mechanism
from netpol_loader.pins.dataplane import Dataplane

T = TypeVar("T")

NODE_HOST, MEASURED_HOST, PEER_HOST = "node", "measured", "peer"
MEASURED_LINK, PEER_LINK = "measured0", "peer0"
NODE_ADDRESS = IPv4Address("10.0.0.254")
MEASURED_ADDRESS, PEER_ADDRESS = IPv4Address("10.0.0.2"), IPv4Address("10.0.0.1")

NOTHING, EMPTY, OURS = "nothing attached", "empty tcx program", "netpol-ebpf"
OURS_CLSACT = "netpol-ebpf, clsact"
"""Our programs attached as on kernels before 6.6, whatever the kernel is."""
OURS_BARRIER = "netpol-ebpf, second barrier"
"""Our programs, and the tables that drop packets which did not pass the programs."""
NFT_RULES, NFT_MAP = "nftables, rules", "nftables, one map"
IPTABLES_RULES, IPTABLES_SET = "iptables, rules", "iptables, one ipset"

MOV_MINUS_ONE = struct.pack("<BBhi", 0xB7, 0, 0, -1)
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)
ANY_SOURCE = (ip_network("0.0.0.0/0"),)
BPFFS = Path("/sys/fs/bpf")
CARD_DEADLINE_S = 20.0
"""Seconds in which a card's link must be up again after the card was moved. Arbitrary; real cards take some seconds."""
REACH_PORT = 5210
"""A port that the policies allow, and on which no process listens: a server would take the probe for a client."""
SIZES = {"np_event": 1 << 20}
"""Size of the ring buffer in bytes.

Nobody reads the events here. Events without room are counted and dropped, as without an agent.
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """The way in which policy is enforced, and the number of rules; 0 rules if nothing is enforced."""

    kind: str
    rules: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, {self.rules} rules" if self.rules else self.kind


@dataclass(frozen=True, slots=True)
class Remote:
    """The other machine.

    ``device``: the card of this machine towards it. ``address``: the measured pod's address there.
    """

    peer: IPv4Address
    device: str
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class Scenario:
    """The same for all contenders: the direction of the traffic, and the addresses of the questions."""

    direction: Direction
    measured: IPv4Address
    peers: tuple[IPv4Address, ...]
    remote: Remote | None = None

    def world(self, rules: int) -> World:
        """The policies and the endpoints, for a number of rules."""
        here = self.remote is None
        # The peer object does not have the peer's other addresses, because each question has another host as its peer.
        return make_world(rules, [self.measured], self.peers[:1], direction=self.direction, is_peer_here=here)


class Site:
    """One contender that is set up. A context manager. Raises PlatformError if a tool rejects the contender's rules."""

    def __init__(self, contender: Contender, scenario: Scenario, world: World | None) -> None:
        self.contender = contender
        self.scenario = scenario
        self._world = world
        self._pins = BPFFS / f"netpol-bench-{os.getpid()}-{id(self):x}"
        hosts = [
            Host(NODE_HOST, None, (NODE_ADDRESS,)),
            Host(MEASURED_HOST, NODE_HOST, (scenario.measured,), interface=MEASURED_LINK),
        ]
        if scenario.remote is None:
            addresses: tuple[IPAddress, ...] = scenario.peers
            hosts.append(Host(PEER_HOST, NODE_HOST, addresses, interface=PEER_LINK))
        self.lab = Lab(hosts, directories=[self._pins])
        self._stack = contextlib.ExitStack()
        self._applier: Applier | None = None
        self.dataplane: Dataplane | None = None
        self._links: list[int] = []

    def __enter__(self) -> Site:  # noqa: PYI034 - typing.Self comes with Python 3.11
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lab)
            self._set_up(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _set_up(self, stack: contextlib.ExitStack) -> None:
        kind = self.contender.kind
        if kind == NOTHING:
            return
        if kind == EMPTY:
            self._attach_empty(stack)
            return
        if self._world is None:
            raise UsageError(f"{self.contender} needs policies")
        if kind in (OURS, OURS_CLSACT, OURS_BARRIER):
            self._enforce(stack, self._world, Mechanism.CLSACT if kind == OURS_CLSACT else None)
            if kind == OURS_BARRIER:
                self._raise_barrier(stack)
            return
        rules = flat_rules(self._world, MEASURED, self.scenario.direction)
        self._load_netfilter(kind, rules)

    @property
    def interfaces(self) -> list[str]:
        """The pods' interfaces on the node, to which programs are attached."""
        return [MEASURED_LINK] if self.scenario.remote else [MEASURED_LINK, PEER_LINK]

    def in_node(self, work: Callable[[], T]) -> T:
        """Run a function inside the node's network namespace, on a thread that then ends."""
        return call_inside(NETNS_DIR / self.lab.namespace_of[NODE_HOST], work)

    def ifindex(self, name: str) -> int:
        """The index of an interface of the node."""
        done = self.lab.run(NODE_HOST, ["ip", "-j", "link", "show", "dev", name])
        return int(json.loads(done.stdout)[0]["ifindex"])

    def _attach_empty(self, stack: contextlib.ExitStack) -> None:
        program = syscall.prog_load(MOV_MINUS_ONE + EXIT)
        stack.callback(os.close, program)

        def links() -> list[int]:
            numbers = [self.ifindex(name) for name in self.interfaces]
            kinds = (syscall.TCX_INGRESS, syscall.TCX_EGRESS)
            return [syscall.link_create(program, number, kind) for number in numbers for kind in kinds]

        for link in self.in_node(links):
            stack.callback(os.close, link)

    def _enforce(self, stack: contextlib.ExitStack, world: World, mechanism: Mechanism | None) -> None:
        dataplane = stack.enter_context(Dataplane.open(self._pins, sizes=SIZES))
        self.dataplane = dataplane
        compiler = Compiler(lambda endpoint: endpoint.node == NODE)
        compiler.replace(world)
        compiler.commit()
        self._applier = Applier(dataplane.maps)
        self._applier.fill(compiler.tables)
        self.borrow_addresses(allowed=True)
        for name in self.interfaces:
            number = self.ifindex(name)
            self.in_node(lambda number=number: attach.attach(number, dataplane, mechanism))  # type: ignore[misc]

    def _raise_barrier(self, stack: contextlib.ExitStack) -> None:
        tables = BarrierTables(f"benchmark {self._pins.name}")
        stack.callback(tables.close)
        marks = BarrierSettings().marks
        if self._applier is not None:
            self._applier.set_marks(marks)  # the table that requires the sign comes after the programs that set it
        self.in_node(lambda: tables.write(BarrierSpec(marks, workloads=frozenset(self.interfaces))))

    def borrow_addresses(self, *, allowed: bool) -> None:
        """Set whether the peer may send from other source addresses.

        The comparison of verdicts needs them. During measurements they are not allowed, as in the usual case.
        """
        if self._applier is not None:
            sources = ANY_SOURCE if allowed else ()
            self._applier.bind(MEASURED, Binding(self.ifindex(MEASURED_LINK)))
            if self.scenario.remote is None:
                self._applier.bind(PEER, Binding(self.ifindex(PEER_LINK), allowed_sources=sources))

    def _load_netfilter(self, kind: str, rules: Sequence[FlatRule]) -> None:
        own, direction = self.scenario.measured, self.scenario.direction
        if kind in (NFT_RULES, NFT_MAP):
            make = netfilter.nft_rules if kind == NFT_RULES else netfilter.nft_map
            self._feed(["nft", "-f", "-"], make(rules, own, direction))
            return
        make_both = netfilter.iptables_rules if kind == IPTABLES_RULES else netfilter.iptables_set
        sets, table = make_both(rules, own, direction)
        self._feed(["ipset", "restore"], sets)
        self._feed(["iptables-restore"], table)

    def _feed(self, argv: Sequence[str], text: str) -> None:
        command = self.lab.command(NODE_HOST, argv)
        done = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            message = (done.stderr or done.stdout).strip()[:400]
            raise PlatformError(f"{argv[0]} refuses the rules of {self.contender}: {message}")

    # --- two machines -------------------------------------------------------------------------------------------------

    def take_device(self, device: str, remote: Remote) -> None:
        """Set up the card that was just moved here, with the measured pod's address."""
        for command in (
            ["ip", "link", "set", "dev", device, "up"],
            ["ip", "route", "replace", f"{remote.peer}/32", "dev", device, "src", str(NODE_ADDRESS)],
        ):
            self.lab.run(NODE_HOST, command)
        self.lab.prober.write_settings(NODE_HOST, [(f"ipv4/conf/{device}/proxy_arp", "1")])
        wait_until(
            lambda: self._reaches(remote.peer), f"an answer from {remote.peer} through {device}", CARD_DEADLINE_S
        )

    def _reaches(self, address: IPv4Address) -> bool:
        """Whether a connection is accepted or refused.

        Then the link is up, and both ends know each other's hardware address.
        """
        with self.lab.prober.open_socket(MEASURED_HOST, socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(0.3)
            try:
                return sock.connect_ex((str(address), REACH_PORT)) in (0, errno.ECONNREFUSED)
            except TimeoutError:
                return False


class Card:
    """The network card towards the other machine.

    It is moved from namespace to namespace, and at the end back to its own.

    Raises UsageError for a card that this machine needs: a card with addresses, or the card of a default route.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._at: Site | None = None

    def __enter__(self) -> Card:  # noqa: PYI034 - typing.Self comes with Python 3.11
        device = self._remote.device
        done = subprocess.run(
            ["ip", "-j", "address", "show", "dev", device], check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise UsageError(f"there is no interface {device}: {done.stderr.strip()}")
        addresses = [one for one in json.loads(done.stdout)[0]["addr_info"] if one["scope"] == "global"]
        if addresses:
            raise UsageError(
                f"interface {device} has the address {addresses[0]['local']}: it seems to be in use",
                hint="Give a card that only this measurement uses, without addresses.",
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._at is not None:
            self._at.lab.run(NODE_HOST, ["ip", "link", "set", "dev", self._remote.device, "netns", str(os.getpid())])
            self._at = None

    def move_to(self, site: Site) -> None:
        """Move the card into a contender's node."""
        if self._at is site:
            return
        move = ["ip", "link", "set", "dev", self._remote.device, "netns", site.lab.namespace_of[NODE_HOST]]
        if self._at is None:
            subprocess.run(move, check=True)
        else:
            self._at.lab.run(NODE_HOST, move)
        self._at = site
        site.take_device(self._remote.device, self._remote)


def call_inside(namespace: Path, work: Callable[[], T]) -> T:
    """Run a function in a network namespace, on a thread that enters it, so that this process stays in its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def inside() -> None:
        try:
            enter_namespace(namespace)
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def enter_namespace(namespace: Path) -> None:
    """Move the calling thread into a network namespace, as os.setns of Python 3.12 does."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(handle, CLONE_NEWNET) != 0:
            raise PlatformError(f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(handle)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = 5.0, *, every_s: float = 0.02) -> None:
    """Poll until a condition is true. Raises PlatformError, with ``what``, if it is not true in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise PlatformError(f"{what} within {deadline_s:.0f} s: it did not happen")
        time.sleep(every_s)


@contextlib.contextmanager
def sites(
    contenders: Sequence[Contender], scenario: Scenario, each: Callable[[Contender], None]
) -> Iterator[dict[Contender, Site]]:
    """Set up all contenders.

    ``each`` is called before each of them. Worlds with the same number of rules are made once.
    """
    worlds = {number: scenario.world(number) for number in {one.rules for one in contenders} if number}
    with contextlib.ExitStack() as stack:
        made = {}
        for contender in contenders:
            each(contender)
            made[contender] = stack.enter_context(Site(contender, scenario, worlds.get(contender.rules)))
        yield made
