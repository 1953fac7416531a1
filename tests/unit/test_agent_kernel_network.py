# SPDX-License-Identifier: Apache-2.0
"""The node's handling of its interfaces, without a kernel: when it reads their other ends, and what counts as news."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from netpol_ebpf.agent import kernel_network as module
from netpol_ebpf.agent.kernel_network import GROUPS_S, PEERS_A_LOOK, PEERS_S, KernelNetwork
from netpol_ebpf.apply.encode import LocalFlag, Meaning
from netpol_loader.host.address import IPAddress
from netpol_loader.host.follow import LinkChange
from netpol_loader.host.links import Link
from netpol_loader.host.routes import IPNetwork, LocalRoute

UPLINK, WEB, DB = (
    Link(number, name, "veth", is_up=True, is_running=True, master=0, peer_ifindex=2, peer_nsid=nsid)
    for number, name, nsid in ((2, "eth0", 9), (5, "cali1", 0), (6, "cali2", 1))
)
WEB_ADDRESS, DB_ADDRESS = ip_address("10.0.0.1"), ip_address("10.0.0.2")
BEHIND = {(0, 2): (WEB_ADDRESS,), (1, 2): (DB_ADDRESS,)}


@dataclass
class MemoryFollower:
    links: dict[int, Link] = field(default_factory=lambda: {one.ifindex: one for one in (UPLINK, WEB, DB)})
    host_routes: dict[IPAddress, int] = field(default_factory=dict)
    addresses: dict[IPAddress, int] = field(default_factory=dict)
    local_routes: list[LocalRoute] = field(default_factory=list)
    uplinks: frozenset[int] = frozenset({2})
    next_hops: frozenset[int] = frozenset()
    subnets: dict[IPNetwork, frozenset[int]] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()
    version: tuple[int, int] = (0, 0)
    news: list[list[LinkChange] | None] = field(default_factory=list)

    def poll(self, *, is_brief: bool = False) -> list[LinkChange] | None:  # noqa: ARG002
        return self.news.pop(0) if self.news else []


@dataclass
class Bench:
    """A node with a follower in memory. ``asked``: the other ends that were read, by look."""

    node: KernelNetwork
    follower: MemoryFollower
    now_s: float = 1000.0
    asked: list[set[tuple[int, int]]] = field(default_factory=list)
    groups: frozenset[IPAddress] = frozenset()

    def look(self, *bound: int) -> set[int]:
        """The interfaces whose other ends a snapshot reads."""
        self.asked.clear()
        self.node.snapshot(set(bound))
        peers = {(one.peer_nsid, one.peer_ifindex): number for number, one in self.follower.links.items()}
        return {peers[one] for asked in self.asked for one in asked}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    follower = MemoryFollower()
    one = Bench(KernelNetwork(Path("/nowhere")), follower)

    def load(peers: Iterable[tuple[int, int]]) -> dict[tuple[int, int], tuple[IPAddress, ...]]:
        one.asked.append(set(peers))
        return {key: found for key, found in BEHIND.items() if key in one.asked[-1]}

    monkeypatch.setattr(one.node, "_follower", follower, raising=False)
    monkeypatch.setattr(module, "load_peer_addresses", load)
    monkeypatch.setattr(module, "joined_groups", lambda: one.groups)
    monkeypatch.setattr(module.time, "monotonic", lambda: one.now_s)
    return one


def test_only_what_is_nobody_s_yet_is_looked_behind_again(bench: Bench) -> None:
    """First all pods' interfaces, then now and then those that are not bound, and never the node's own."""
    assert bench.look() == {5, 6}
    assert bench.look() == set(), "news of others are none of theirs"
    bench.now_s += PEERS_S
    assert bench.look(5) == {6}
    bench.now_s += PEERS_S
    assert bench.look(5, 6) == set()
    assert bench.node.snapshot({5, 6}).peer_addresses == BEHIND, "what was found stays known"


def test_many_that_are_nobody_s_are_looked_behind_in_turn(bench: Bench) -> None:
    """Those whose last read is oldest come first. New interfaces do not wait for them."""
    crowd = {number: replace(WEB, ifindex=number, peer_nsid=number) for number in range(100, 100 + 2 * PEERS_A_LOOK)}
    bench.follower.links.update(crowd)
    assert crowd.keys() <= bench.look(5, 6)
    bench.now_s += PEERS_S
    bench.follower.links[5] = replace(WEB, is_running=False)
    first = bench.look(6)
    assert len(first) == PEERS_A_LOOK + 1
    assert 5 in first
    assert first | bench.look(5, 6) == {5, *crowd}


def test_something_new_about_an_interface_has_it_looked_behind(bench: Bench) -> None:
    """It is read at once, and no other. For a bound interface nothing is read, whatever happens at the other end."""
    bench.look()
    bench.follower.links[5] = replace(WEB, is_running=False)
    assert bench.look(6) == {5}
    assert bench.look(6) == set()
    for number in range(3):
        bench.follower.links[5] = replace(WEB, is_running=bool(number % 2), peer_nsid=number)
        bench.now_s += PEERS_S
        assert bench.look(5, 6) == set()
    assert bench.look(6) == {5}, "it is nobody's any more"


def test_a_host_route_that_goes_has_the_other_end_asked(bench: Bench) -> None:
    """A route is stronger than addresses at the other end, which count after its removal."""
    bench.follower.host_routes[WEB_ADDRESS] = 5
    assert bench.look() == {5, 6}
    del bench.follower.host_routes[WEB_ADDRESS]
    assert bench.look(6) == {5}
    assert bench.look(6) == set()


def test_interfaces_that_went_are_forgotten(bench: Bench) -> None:
    """Their addresses are forgotten, too. Another interface with the index is new."""
    bench.look()
    del bench.follower.links[5]
    assert bench.node.snapshot({6}).peer_addresses == {(1, 2): (DB_ADDRESS,)}
    bench.follower.links[5] = replace(WEB)
    assert bench.look(6) == {5}


def test_news(bench: Bench) -> None:
    """Added and removed interfaces are reported once. A change without effect is not reported."""
    node, follower = bench.node, bench.follower
    node.has_news()
    assert not node.has_news()
    follower.version = (1, 0)
    follower.news = [[LinkChange(WEB, is_gone=True), LinkChange(replace(WEB, name="other"), is_gone=False)]]
    assert [one.name for one in node.take_born()] == ["other"]
    assert node.has_news()
    assert (node.take_gone(), node.take_gone()) == ({5}, set())
    assert node.take_born() == []
    assert not node.has_news()


def test_lost_news(bench: Bench) -> None:
    """All interfaces may be new, and the removed ones are unknown."""
    node, follower = bench.node, bench.follower
    node.has_news()
    follower.version, follower.news = (1, 0), [None]
    assert node.has_news()
    assert {one.ifindex for one in node.take_born()} == {2, 5, 6}
    assert node.take_gone() is None


def test_groups(bench: Bench) -> None:
    """Groups of processes are read now and then. The groups of an IPv6 address are there with it, and are no news."""
    node, address, of_address = bench.node, ip_address("fe80::12:3456"), ip_address("ff02::1:ff12:3456")
    bench.groups = frozenset({ip_address("ff02::fb"), of_address})
    bench.follower.addresses = {address: 5, ip_address("10.0.0.9"): 5, ip_address("::1"): 1}
    node.has_news()
    assert set(node.snapshot().meanings) == {ip_address("ff02::fb"), of_address}
    bench.follower.addresses = {}
    assert set(node.snapshot().meanings) == {ip_address("ff02::fb")}
    bench.groups = frozenset({ip_address("ff02::fb")})
    bench.now_s += GROUPS_S
    assert not node.has_news()
    bench.groups = frozenset({ip_address("224.0.0.9")})
    assert not node.has_news(), "not before its time"
    bench.now_s += GROUPS_S
    assert node.has_news()
    assert set(node.snapshot().meanings) == bench.groups


def test_what_the_node_takes_for_its_own(bench: Bench) -> None:
    """Single addresses with their meaning, an own one before a group.

    And prefixes, except the loopback's, which the program knows.
    """
    own, group, both = ip_address("10.0.0.9"), ip_address("ff02::1"), ip_address("224.0.0.2")
    bench.groups = frozenset({group, both})
    bench.follower.local_routes = [
        LocalRoute(own, 32, is_many=False, ifindex=5),
        LocalRoute(both, 32, is_many=True, ifindex=6),
        LocalRoute(ip_address("127.0.0.0"), 8, is_many=False, ifindex=1),
        LocalRoute(ip_address("10.7.0.0"), 16, is_many=False, ifindex=1),
    ]
    wiring = bench.node.snapshot()
    assert wiring.meanings == {
        own: Meaning(LocalFlag.OWN, 5), group: Meaning(LocalFlag.GROUP), both: Meaning(LocalFlag.MANY, 6),
    }  # fmt: skip
    assert {str(net) for net in wiring.local_nets} == {"10.7.0.0/16"}


def test_each_snapshot_has_the_present_addresses_routes_and_groups(bench: Bench) -> None:
    """This holds whichever of them changed since the snapshot before."""

    def known() -> set[str]:
        bench.now_s += GROUPS_S
        bench.node.has_news()
        return {str(one) for one in bench.node.snapshot().meanings}

    local, anycast, joined, solicited = map(ip_address, ("fd00::1", "fd00::", "ff02::1:2", "ff02::1:ff00:2"))
    assert known() == set()
    bench.follower.local_routes.append(LocalRoute(local, 128, is_many=False, ifindex=2))
    assert known() == {"fd00::1"}
    bench.groups = frozenset({joined})
    assert known() == {"fd00::1", "ff02::1:2"}
    bench.groups = frozenset({joined, solicited})
    assert known() == {"fd00::1", "ff02::1:2", "ff02::1:ff00:2"}
    bench.follower.addresses[ip_address("fd00::2")] = 2
    bench.groups = frozenset({joined})
    assert known() == {"fd00::1", "ff02::1:2"}
    bench.follower.local_routes[:] = [LocalRoute(anycast, 128, is_many=False, ifindex=2)]
    assert known() == {"fd00::", "ff02::1:2"}
    bench.follower.local_routes[:] = [LocalRoute(anycast, 128, is_many=True, ifindex=5)]
    assert bench.node.snapshot().meanings[anycast].ifindex == 5


def test_group_of_an_address_that_is_reported_later_is_news_once(bench: Bench) -> None:
    """An interface joins the group of an IPv6 address before the kernel reports the address."""

    def is_news() -> bool:
        bench.now_s += GROUPS_S
        return bench.node.has_news()

    is_news()
    bench.groups = frozenset({ip_address("ff02::1:ff00:2")})
    assert (is_news(), is_news()) == (True, False)
    bench.follower.addresses[ip_address("fd00::2")] = 2
    assert not is_news()
    assert ip_address("ff02::1:ff00:2") in bench.node.snapshot().meanings
    bench.groups = frozenset()
    assert is_news()
    assert ip_address("ff02::1:ff00:2") not in bench.node.snapshot().meanings
    bench.groups = frozenset({ip_address("ff02::1:ff00:2")})
    assert is_news()
