# SPDX-License-Identifier: Apache-2.0
"""The follower's copy equals the node's state, after changes with notifications and after changes without them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bench.site import enter_namespace
from netpol_loader.host import netlink
from netpol_loader.host.follow import SETTLE_S, Follower, LinkChange

pytestmark = pytest.mark.netns

T = TypeVar("T")
DEADLINE_S = 30.0
"""Time limit in seconds for events that take milliseconds, or the two seconds of duplicate address detection."""
SEEDS, ROUNDS, CHANGES = 12, 8, 8
PODS = 50


@dataclass
class Node:
    """A namespace as a node, others as pods, and a follower of the node with a clock that the test sets."""

    name: str
    pods: tuple[str, ...]
    now_s: float = 0.0
    followers: list[Follower] = field(default_factory=list)

    def inside(self, work: Callable[[], T]) -> T:
        """Call a function in the node's namespace, on a thread of its own."""

        def body() -> T:
            enter_namespace(Path("/run/netns") / self.name)
            return work()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(body).result()

    def follower(self) -> Follower:
        self.followers.append(self.inside(lambda: Follower(lambda: self.now_s)))
        return self.followers[-1]

    def do(self, *lines: str, where: str = "", is_forced: bool = False) -> None:
        """Run lines of `ip`. ``is_forced``: ignore lines that the kernel rejects."""
        force = ["-force"] if is_forced else []
        command = ["ip", *force, "-n", where or self.name, "-batch", "-"]
        done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
        assert is_forced or done.returncode == 0, done.stderr

    def settle(self, follower: Follower) -> list[LinkChange]:
        """Read everything, and make the second dumps."""
        found = follower.poll() or []
        self.now_s += SETTLE_S
        return found + (follower.poll() or [])

    def agrees(self, follower: Follower) -> None:
        """Fail if the copy stays different from the state. Addresses become usable after a while without a change."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            self.settle(follower)
            with self.inside(Follower) as fresh:
                followed, found = view(follower), view(fresh)
            if followed == found:
                return
            if time.monotonic() > deadline:
                assert followed == found
            time.sleep(0.05)


def view(follower: Follower) -> dict[str, Any]:
    return {
        "links": dict(follower.links),
        "addresses": dict(follower.addresses),
        "host routes": dict(follower.host_routes),
        "subnets": dict(follower.subnets),
        "uplinks": set(follower.uplinks),
        "next hops": set(follower.next_hops),
        "shared": set(follower.shared),
        "local": set(follower.local_routes),
    }


@pytest.fixture
def node() -> Iterator[Node]:
    names = [f"npf{os.getpid()}{suffix}" for suffix in ("n", "a", "b")]
    one = Node(names[0], tuple(names[1:]))
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        one.do("link set lo up")
        yield one
    finally:
        for follower in one.followers:
            follower.close()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def wired(node: Node) -> Node:
    """Two pods' interfaces that are up at both ends."""
    for number, pod in enumerate(node.pods, 1):
        node.do(
            f"link add v{number} type veth peer name eth0 netns {pod}",
            f"link set v{number} addrgenmode none",  # its address would appear a second later
            f"link set v{number} up",
        )
        node.do("link set eth0 up", where=pod)
    deadline = time.monotonic() + DEADLINE_S
    while any(link["operstate"] != "UP" for link in links_of(node) if link["ifname"] != "lo"):
        assert time.monotonic() < deadline, "the pairs do not begin to run"
        time.sleep(0.02)
    return node


def links_of(node: Node) -> list[dict[str, Any]]:
    done = subprocess.run(["ip", "-n", node.name, "-json", "link"], check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout))


def index(follower: Follower, name: str) -> int:
    return next(one.ifindex for one in follower.links.values() if one.name == name)


# --- what the kernel tells ------------------------------------------------------------------------------------------


def test_pods_come_and_go_without_listing_anything_again(node: Node) -> None:
    """Fifty pods with addresses and routes of both families are followed, with only one dump, at the start."""
    follower, pod = node.follower(), node.pods[0]
    numbers = range(1, PODS + 1)
    for some in (range(1, 11), range(11, PODS + 1)):  # a few while others are read, then many at once
        for number in some:
            node.do(
                f"link add v{number} type veth peer name eth{number} netns {pod}",
                f"link set v{number} up",
                f"address add 169.254.1.1/32 dev v{number}",
                f"address add fe80::{number:x}:1/64 dev v{number} nodad",
                f"route add 10.1.0.{number}/32 dev v{number} src 169.254.1.1",
                f"route add fd00::{number:x}/128 dev v{number}",
            )
            node.do(f"link set eth{number} up", f"address add 10.1.0.{number}/32 dev eth{number}", where=pod)
            if number < 11:
                follower.poll()
    node.agrees(follower)
    assert {str(one) for one in follower.host_routes} >= {f"10.1.0.{number}" for number in numbers}
    for number in numbers:
        node.do(f"link del v{number}")
        if number < 11:
            follower.poll()
    node.agrees(follower)
    assert [one.name for one in follower.links.values()] == ["lo"]
    assert follower.listed_again == {}


def test_a_new_interface_is_news_and_so_is_its_end(node: Node) -> None:
    """The changes are in order, with the data of the list of interfaces. A reused index was gone in between."""
    follower = node.follower()
    node.do(f"link add v1 index 77 type veth peer name eth0 netns {node.pods[0]}")
    (born,) = (one for one in node.settle(follower) if one.link.name == "v1")
    assert (born.is_gone, born.link) == (False, follower.links[77])
    assert born.link.kind == "veth"
    assert born.link.peer_nsid is not None
    node.do("link del v1", f"link add v2 index 77 type veth peer name eth0 netns {node.pods[0]}")
    told = [(one.link.name, one.is_gone) for one in node.settle(follower)]
    assert told[:2] == [("v1", True), ("v2", False)]
    node.agrees(follower)


def test_what_says_nothing_new_is_no_news(wired: Node) -> None:
    """A port that leaves a bridge is still an interface. An irrelevant change changes nothing."""
    follower = wired.follower()
    wired.do("link add br0 type bridge", "link set v1 master br0")
    wired.settle(follower)
    before = follower.version
    wired.do("link set v1 alias somebody", "route add 192.0.2.0/24 dev v2 table 9", "route del 192.0.2.0/24 table 9")
    assert wired.settle(follower) == []
    assert follower.version == before
    wired.do("link set v1 nomaster")
    assert not any(one.is_gone for one in wired.settle(follower))
    wired.agrees(follower)


# --- what it does not tell ------------------------------------------------------------------------------------------

UNTOLD = {
    "interface switched off": (["link set v1 down"], ["10.1.0.1", "10.1.0.2", "fd00::1"]),
    "interface removed": (["link del v1"], ["10.1.0.1", "10.1.0.2", "fd00::1"]),
    "last address removed": (["address del 10.0.0.1/24 dev v1"], ["10.1.0.1", "10.1.0.2"]),
    "address that a route sends from removed": (["address del 10.0.0.2/24 dev v2"], ["10.1.0.2"]),
    "put into a VRF": (["link set v1 master red"], ["10.1.0.1", "10.1.0.2", "fd00::1"]),
    "next hop object removed": (["nexthop del id 7"], ["10.1.0.7"]),
    "one of two replaced": (["route replace 10.1.0.8/32 dev v1 src 10.0.0.1"], []),
}
"""(commands, addresses whose routes vanish or lead elsewhere as a consequence)."""


def has_vrf(node: Node) -> bool:
    """Whether the kernel has VRF devices. If so, the node gets one with the name red."""
    command = ["ip", "-n", node.name, "link", "add", "red", "type", "vrf", "table", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "Unknown device type" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("case", UNTOLD)
def test_routes_that_go_without_a_word(wired: Node, case: str) -> None:
    """The follower notices that the routes are gone, without a dump of all routes unless there are next hop objects."""
    lines, expected = UNTOLD[case]
    if "VRF" in case and not has_vrf(wired):
        return  # the kernel has no such devices, so there is nothing to test
    wired.do(
        "address add 10.0.0.1/24 dev v1", "address add 10.0.0.2/24 dev v2",
        "route add 10.1.0.1/32 dev v1", "route add 10.1.0.2/32 dev v1 src 10.0.0.2", "route add fd00::1/128 dev v1",
        "nexthop add id 7 dev v1", "route add 10.1.0.7/32 nhid 7",
        "route add 10.1.0.8/32 dev v1", "route append 10.1.0.8/32 dev v2",
    )  # fmt: skip
    follower = wired.follower()
    before = dict(follower.host_routes)
    assert before[ip_address("10.1.0.1")] == index(follower, "v1")
    wired.do(*lines)
    wired.agrees(follower)
    changed = {str(one) for one in before if follower.host_routes.get(one) != before[one]}
    assert set(expected) <= changed
    assert set(follower.listed_again) <= {"a next hop object changed"}


def test_a_pair_whose_other_end_moves(node: Node) -> None:
    """The other end moves away and back.

    The kernel sends no notification about the remaining end, and the follower reports it.
    """
    follower = node.follower()
    node.do("link add v1 type veth peer name p1")
    node.settle(follower)
    assert follower.links[index(follower, "v1")].peer_nsid is None
    node.do(f"link set p1 netns {node.pods[0]}")
    moved = [one.link for one in follower.poll() or () if one.link.name == "v1"]
    assert moved, "at once: from now on the interface is a pod's"
    assert moved[-1].peer_nsid is not None
    node.agrees(follower)
    node.do(f"link set p1 netns {node.name}", where=node.pods[0])
    node.settle(follower)
    assert follower.links[index(follower, "v1")].peer_nsid is None
    node.agrees(follower)
    assert follower.listed_again == {}


def test_an_address_that_is_not_known_to_be_unique_yet(wired: Node) -> None:
    """The address is in the copy from the start, before the notification after duplicate address detection."""
    follower = wired.follower()
    wired.do("address add fd00:7::1/64 dev v1")
    wired.settle(follower)
    assert ip_address("fd00:7::1") in follower.addresses
    wired.agrees(follower)


def test_what_the_node_shares_with_others(wired: Node) -> None:
    """A lasting address with a prefix counts.

    One that expires without a router's announcement does not, nor a single one.
    """
    follower = wired.follower()
    wired.do("address add 10.0.0.1/32 dev v1", "address add fd00::1/64 dev v1 nodad valid_lft 900 preferred_lft 900")
    wired.settle(follower)
    assert follower.shared == frozenset()
    wired.do("address add fd00:1::1/64 dev v1 nodad", "address add 10.0.2.1/24 dev v2")
    wired.settle(follower)
    assert follower.shared == {index(follower, "v1"), index(follower, "v2")}
    wired.do("address del fd00:1::1/64 dev v1")
    wired.agrees(follower)
    assert follower.shared == {index(follower, "v2")}


def test_an_interface_that_flaps_is_asked_for_now_and_then(wired: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload can switch its end on and off at any rate. The state after the last change is known nevertheless."""
    wired.do("address add 10.0.0.1/24 dev v1", "address add fd00::1/64 dev v1 nodad", "nexthop add id 7 dev v1",
             "route add 10.1.0.7/32 nhid 7")  # fmt: skip
    follower = wired.follower()
    wired.settle(follower)
    asked: list[int] = []
    dump = netlink.RouteChannel.dump

    def counted(channel: netlink.RouteChannel, kind: int, body: bytes) -> list[bytes]:
        asked.append(kind)
        return dump(channel, kind, body)

    monkeypatch.setattr(netlink.RouteChannel, "dump", counted)
    wired.do("link set v1 down")
    wired.do("link add v9 type veth peer name p9")
    assert "v9" in {one.link.name for one in follower.poll(is_brief=True) or ()}
    assert asked == [], "a new interface does not wait for what the others are asked"
    follower.poll()
    once = len(asked)
    assert once, "at once"
    for _ in range(20):
        wired.do("link set v1 up", "link set v1 down")
        follower.poll()
    assert len(asked) <= once + 2, "by the next change of another kind at most"
    wired.settle(follower)
    assert len(asked) <= 3 * once + 2
    monkeypatch.undo()
    wired.agrees(follower)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_lost_messages(wired: Node) -> None:
    """There are more notifications than the socket holds.

    Everything is dumped again once, and the changes are unknown.
    """
    follower = wired.follower()
    follower._news._socket.setsockopt(socket.SOL_SOCKET, netlink._SO_RCVBUFFORCE, 4096)
    wired.do(*(f"route add 10.2.0.{number}/32 dev v1" for number in range(1, 200)))
    assert follower.poll() is None
    assert follower.listed_again == {"messages were lost": 1}
    wired.agrees(follower)
    assert len([one for one in follower.host_routes if str(one).startswith("10.2.0.")]) == 199
    wired.do("route add 10.3.0.1/32 dev v1")
    assert follower.poll() == []
    assert follower.listed_again == {"messages were lost": 1}
    wired.agrees(follower)


@pytest.mark.parametrize("raw", [b"\x20\0\0\0\x10\0\0\0" + bytes(24), b"\xff\0\0\0" + bytes(12), bytes(7) + bytes(9)])
def test_a_message_that_makes_no_sense(wired: Node, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is dumped again."""
    follower = wired.follower()
    wired.do("route add 10.2.0.1/32 dev v1")
    rest = [raw]
    take = follower._news.take
    monkeypatch.setattr(follower._news, "take", lambda: rest.pop() if rest else take())
    assert follower.poll() is None
    assert follower.listed_again == {"a message makes no sense": 1}
    wired.agrees(follower)


# --- anything -------------------------------------------------------------------------------------------------------


def change(random_: random.Random, pods: tuple[str, ...]) -> str:
    """A line for `ip` that changes something if the kernel accepts it."""
    number, other = random_.randint(1, 4), random_.randint(1, 4)
    link, pod = random_.choice((f"v{number}", f"v{number}", f"p{number}", "br0", "red")), random_.choice(pods)
    host, metric = f"10.1.0.{random_.randint(1, 5)}/32", random_.choice(("", "", " metric 7"))
    host6 = f"fd00::{random_.randint(1, 5)}/128"
    address = random_.choice((f"10.0.{number}.1/24", "10.0.9.1/24", "10.0.9.1/32", f"fd00:{number}::1/64 nodad",
                              "fd00:9::1/128 nodad", f"fd00:{number}::2/64"))  # fmt: skip
    source = random_.choice(("", "", f" src 10.0.{number}.1", " src 10.0.9.1"))
    table = random_.choice(("", "", " table 100"))
    verb = random_.choice(("add", "replace", "append", "replace", "del"))
    return random_.choice((
        f"link add v{number} type veth peer name p{number} netns {pod}",
        f"link add v{number} type veth peer name p{number}",
        f"link del {link}",
        f"link set {link} up", f"link set {link} up", f"link set {link} up", f"link set {link} down",
        f"link set p{number} netns {pod}",
        f"link set {link} master {random_.choice(('br0', 'red'))}", f"link set {link} nomaster",
        f"link set v{number} name v{other}",
        f"link set {link} mtu {random_.choice((1500, 1200, 60))}",
        "link add br0 type bridge", "link add red type vrf table 100", "link set red up",
        "link add tun0 type vxlan id 7 dstport 4790 external", "link del tun0",
        f"address add {address} dev {link}", f"address add {address} dev {link}",
        f"address del {address.removesuffix(' nodad')} dev {link}",
        f"route {verb} {host} dev {link}{metric}{source}{table}",
        f"route {verb} {host} dev {link}{metric}{source}{table}",
        f"route {verb} {host6} dev {link}{metric}{table}",
        f"route {verb} {host} via 10.0.{number}.9{metric}",
        f"route {verb} {host6} via fd00:{number}::9{metric}",
        f"route {verb} default via 10.0.{number}.9{metric}{table}",
        f"route {verb} 10.8.{number}.0/24 via 10.0.{other}.9{metric}", f"route {verb} 10.8.{number}.0/24 dev {link}{metric}",
        f"route {verb} 10.8.{number}.0/24 nexthop via 10.0.{number}.9 nexthop via 10.0.{other}.9",
        f"-6 route {verb} fd08:{number}::/64 via fd00:{other}::9", f"-6 route {verb} fd08:{number}::/64 dev {link}{metric}",
        f"-6 route {verb} fd08:{number}::/64 dev {link} proto ra", f"route {verb} {host} dev {link} proto redirect",
        f"route {verb} default nexthop via 10.0.{number}.9 nexthop via 10.0.{other}.9",
        f"-6 route {verb} default via fd00:{number}::9{metric}",
        f"-6 route {verb} default nexthop via fd00:{number}::9 nexthop via fd00:{other}::9",
        f"route {verb} local 10.7.0.0/24 dev lo table 100", f"route {verb} 10.7.0.0/24 dev {link} table 100",
        f"route {verb} blackhole {host}", f"route {verb} local {host} dev lo",
        f"route flush dev {link}",
        f"nexthop {random_.choice(('add', 'replace'))} id {number} dev {link}", f"nexthop del id {number}",
        f"route {verb} {host} nhid {number}",
    ))  # fmt: skip


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_what_is_followed_is_what_there_is(node: Node, seed: int) -> None:
    """After random changes, some of which the kernel rejects, the copy equals that of a new follower."""
    random_ = random.Random(seed)
    node.do("link add br0 type bridge", "link set br0 up")
    if has_vrf(node):
        node.do("link set red up")
    for number in range(1, 5):
        far = f" netns {node.pods[number % 2]}" if number > 2 else ""
        node.do(f"link add v{number} type veth peer name p{number}{far}", f"link set v{number} up")
        node.do(f"link set p{number} up", where=far.removeprefix(" netns ") or node.name)
        node.do(f"address add 10.0.{number}.1/24 dev v{number}", f"address add fd00:{number}::1/64 nodad dev v{number}")
    follower = node.follower()
    said: list[str] = []
    for _ in range(ROUNDS):
        for line in (change(random_, node.pods) for _ in range(CHANGES)):
            said.append(line)
            arguments = ["-6", *line.split()[1:]] if line.startswith("-6") else line.split()
            subprocess.run(["ip", "-n", node.name, *arguments], check=False, capture_output=True)
            if random_.random() < 0.3:
                follower.poll()
        try:
            node.agrees(follower)
        except AssertionError as error:
            raise AssertionError("after\n" + "\n".join(said)) from error
    assert set(follower.listed_again) <= {"a next hop object changed"}
