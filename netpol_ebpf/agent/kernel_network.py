# SPDX-License-Identifier: Apache-2.0
"""The node's network as the kernel reports it.

A `Follower` keeps interfaces, addresses and routes up to date by netlink notifications. The kernel sends no
notifications about multicast groups or about addresses in other network namespaces, so the agent lists both at
intervals.

Invariant: the cost of one interface is bounded, whatever happens at its other end. This module changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv6Address, ip_network
from pathlib import Path

from netpol_ebpf.agent.cni import DEFAULT_DIR, CniResultCache
from netpol_ebpf.agent.wiring import NOWHERE, PAIR_KINDS, Interface, Wiring
from netpol_ebpf.apply.encode import LocalFlag, Meaning
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import IPAddress, IPNetwork
from netpol_loader.host.follow import Follower
from netpol_loader.host.links import Link, interface_towards, joined_groups
from netpol_loader.host.netlink import NetlinkError
from netpol_loader.host.peers import load_peer_addresses
from netpol_loader.host.routes import LocalRoute
from netpol_loader.host.sockets import bound_sockets

STACKED_KINDS = frozenset({"vlan", "macvlan", "ipvlan"})
"""Kinds of devices that are stacked on a lower device. Each IP packet of such a device also passes the lower device.

A tunnel is not stacked in this sense, because it encapsulates the packets."""
GROUP = Meaning(LocalFlag.GROUP)
IPV6 = 6
SOLICITED = int(IPv6Address("ff02::1:ff00:0"))
LOOPBACK_NET = ip_network("127.0.0.0/8")
PEERS_A_LOOK = 50
"""Largest number of interfaces whose other ends one pass lists. The limit keeps many of them from delaying a new
interface; the number is arbitrary."""
GROUPS_S = 1.0
"""Seconds between two lists of the joined multicast groups. The number is arbitrary."""
PEERS_S = 0.25
"""Seconds between two lists of the addresses at an interface's other end, if it has no workload and did not change. The
number is arbitrary."""


class KernelNetwork:
    """Implements `NetworkAccess` for the network namespace of this process. A context manager."""

    def __init__(self, plugin_results: Path | None = None) -> None:
        """``plugin_results``: the directory of libcni's cache; None: the default directory."""
        self._results = CniResultCache(plugin_results or DEFAULT_DIR)
        self._gone: set[int] | None = set()
        self._born: list[Interface] = []
        self._is_news = False  # whether notifications were read since the last `has_news`
        self._groups: frozenset[IPAddress] = frozenset()  # joined groups, without solicited-node groups
        self._not_joined: set[IPAddress] = set()  # solicited-node groups that were not joined
        # Most news changes neither addresses nor local routes, so these are derived only from other ones than before.
        self._group_inputs: tuple[list[IPAddress], list[LocalRoute]] = [], []
        self._of_addresses: set[IPAddress] = set()
        self._meaning_inputs: tuple[list[LocalRoute], Collection[IPAddress]] = [], frozenset()
        self._meanings: tuple[dict[IPAddress, Meaning], frozenset[IPNetwork]] = {}, frozenset()
        self._groups_s = -GROUPS_S
        self._version: tuple[int, int] | None = None  # the follower's version at the last read of notifications
        self._links: dict[int, tuple[Link, Interface]] = {}
        # By interface: the interface as it was at the last list of its other end, whether it had a host route, and the
        # time.
        self._asked: dict[int, tuple[Link, bool, float]] = {}
        self._peer_addresses: dict[tuple[int, int], tuple[IPAddress, ...]] = {}

    def __enter__(self) -> KernelNetwork:  # noqa: PYI034 - typing.Self comes with Python 3.11
        self._follower = Follower()
        return self

    def __exit__(self, *_: object) -> None:
        self._follower.close()

    def fileno(self) -> int:
        """The file descriptor of the netlink socket. It is readable when notifications are queued."""
        return self._follower.fileno()

    @property
    def listed_again(self) -> Mapping[str, int]:
        """How many times all interfaces and routes were listed again since the start, by reason."""
        return self._follower.listed_again

    @property
    def interfaces(self) -> Collection[int]:
        """Indices of all interfaces, as of the last notifications that were read."""
        return self._follower.links.keys()

    def has_news(self) -> bool:
        """See `NodeAccess`."""
        self._read_news()
        self._look_at_groups()
        is_news, self._is_news = self._is_news, False
        return is_news

    def take_born(self) -> list[Interface]:
        """See `NodeAccess`."""
        self._read_news(is_brief=True)
        born, self._born = self._born, []
        return born

    def _read_news(self, *, is_brief: bool = False) -> None:
        news = self._follower.poll(is_brief=is_brief)
        before, self._version = self._version, self._follower.version
        self._is_news = self._is_news or self._version != before
        if news is None:
            self._gone = None
            self._born = [link for _, link in self._known_links().values()]
            return
        self._born += [_link(one.link) for one in news if not one.is_gone]
        if self._gone is not None:
            self._gone |= {one.link.ifindex for one in news if one.is_gone}

    def _look_at_groups(self) -> None:
        """List the multicast groups that the node's processes have joined.

        The kernel sends no notification when a group is joined or left. To list the groups takes milliseconds, so the
        agent lists them at most once in GROUPS_S.
        """
        now_s = time.monotonic()
        if now_s - self._groups_s < GROUPS_S:
            return
        of_addresses = self._address_groups()
        before = self._groups | (of_addresses - self._not_joined)
        joined, self._groups_s = joined_groups(), now_s
        self._groups, self._not_joined = joined - of_addresses, of_addresses - joined
        self._is_news = self._is_news or joined != before

    def _address_groups(self) -> set[IPAddress]:
        """The multicast groups that interfaces join for neighbour discovery, one for each address.

        On links without neighbour discovery, interfaces do not join them.
        """
        addresses, routes = list(self._follower.addresses), list(self._follower.local_routes)
        if (addresses, routes) != self._group_inputs:
            anycast = (one.address for one in routes if one.is_single)
            self._group_inputs = addresses, routes
            self._of_addresses = {_solicited(one) for one in (*addresses, *anycast) if one.version == IPV6}
        return self._of_addresses

    def take_gone(self) -> set[int] | None:
        """See `NodeAccess`."""
        gone, self._gone = self._gone, set()
        return gone

    def snapshot(self, bound: Collection[int] = ()) -> Wiring:
        """See `NetworkAccess`.

        The snapshot has the state of the last notifications that were read, not of later ones.
        """
        if self._version is None:
            self._read_news()
            self._look_at_groups()
        follower, links = self._follower, self._known_links()
        self._look_behind(links, bound)
        routes, groups = list(follower.local_routes), self._groups | (self._address_groups() - self._not_joined)
        if (routes, groups) != self._meaning_inputs:
            self._meaning_inputs, self._meanings = (routes, groups), _meanings(routes, groups)
        meanings, nets = self._meanings
        return Wiring(
            links={ifindex: link for ifindex, (_, link) in links.items()},
            host_routes=dict(follower.host_routes),
            uplinks=follower.uplinks,
            peer_addresses=dict(self._peer_addresses),
            addresses=follower.addresses,
            meanings=meanings,
            local_nets=nets,
            subnets=dict(follower.subnets),
            next_hops=follower.next_hops,
            shared=follower.shared,
            results=tuple(self._results.look()),
            problems=self._results.problems,
        )

    def _known_links(self) -> dict[int, tuple[Link, Interface]]:
        """All interfaces by index, each as (the kernel's report, the agent's model)."""
        before = self._links
        self._links = {}
        for ifindex, one in self._follower.links.items():
            known = before.get(ifindex)
            self._links[ifindex] = known if known is not None and known[0] is one else (one, _link(one))
        return self._links

    def _look_behind(self, links: Mapping[int, tuple[Link, Interface]], bound: Collection[int]) -> None:
        """List the addresses at the other ends of veth and netkit pairs that are assigned to no workload.

        A pair that changed is listed at once, any other every PEERS_S. ``bound``: interfaces with a workload, which are
        left out. The cost of one interface is bounded, whatever happens at its other end.
        """
        now_s = time.monotonic()
        routed, uplinks = set(self._follower.host_routes.values()), self._follower.uplinks
        peers = {ifindex: link.peer for ifindex, (_, link) in links.items() if link.peer is not None}
        new, due = [], []
        for ifindex in peers.keys() - uplinks - set(bound):
            one, was_routed, asked_s = self._asked.get(ifindex, (None, False, 0.0))
            if one is not links[ifindex][0] or (was_routed and ifindex not in routed):
                new.append(ifindex)
            elif now_s - asked_s >= PEERS_S:
                due.append((asked_s, ifindex))
        turn = [*new, *(ifindex for _, ifindex in sorted(due)[:PEERS_A_LOOK])]
        asked = {ifindex: (links[ifindex][0], ifindex in routed, now_s) for ifindex in turn}
        concerned = {peers[ifindex] for ifindex in asked}
        found = load_peer_addresses(concerned) if concerned else {}
        known = set(peers.values()) - concerned
        self._peer_addresses = {key: one for key, one in self._peer_addresses.items() if key in known} | found
        self._asked = {ifindex: one for ifindex, one in self._asked.items() if ifindex in peers} | asked

    def bound_sockets(self) -> frozenset[tuple[int, IPAddress, int]]:
        """See `NetworkAccess`."""
        try:
            return bound_sockets()
        except NetlinkError as error:
            raise PlatformError(f"the kernel does not list this node's sockets: {os.strerror(error.code)}") from error

    def interface_towards(self, address: IPAddress) -> int | None:
        """See `NetworkAccess`."""
        return interface_towards(address)


def _link(link: Link) -> Interface:
    is_pair = link.kind in PAIR_KINDS and link.peer_nsid is not None
    peer = (link.peer_nsid, link.peer_ifindex) if is_pair and link.peer_nsid is not None else None
    lower = link.peer_ifindex if link.kind in STACKED_KINDS and link.peer_nsid is None else NOWHERE
    return Interface(
        link.ifindex, link.name, link.kind, peer, link.master, link.hardware, link.takes, link.is_external, lower
    )  # fmt: skip


def _meanings(
    routes: Iterable[LocalRoute], groups: Iterable[IPAddress]
) -> tuple[dict[IPAddress, Meaning], frozenset[IPNetwork]]:
    """Derive from local routes and multicast groups: the role of each single address, and prefixes of the node's own.

    127.0.0.0/8 is left out, because the program treats it as the node's own without a row.
    """
    found = dict.fromkeys(groups, GROUP)
    nets = set()
    for route in routes:
        if route.is_single:
            found[route.address] = _meaning(route.is_many, route.ifindex)
        elif not route.is_many and route.net != LOOPBACK_NET:
            nets.add(route.net)
    return found, frozenset(nets)


@lru_cache(maxsize=1 << 14)
def _solicited(address: IPv6Address) -> IPv6Address:
    """The solicited-node multicast group of an address (RFC 4291, 2.7.1)."""
    return IPv6Address(SOLICITED | (int(address) & 0xFF_FFFF))


@lru_cache(maxsize=4096)
def _meaning(is_many: bool, ifindex: int) -> Meaning:  # noqa: FBT001  # private
    return Meaning(LocalFlag.MANY if is_many else LocalFlag.OWN, ifindex)
