# SPDX-License-Identifier: Apache-2.0
"""The node under the agent: its interfaces, and the dataplane on them. All that the agent does to the kernel goes through here.

Invariant: enforcement outlives this object; only `netpolctl cleanup` ends it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv6Address, ip_network
from pathlib import Path
from typing import Protocol

from netpol_ebpf.agent.adoption import LiveConnections, look_at_connections
from netpol_ebpf.agent.barrier import BarrierAccess
from netpol_ebpf.agent.cni import DEFAULT_DIR, CniResultCache
from netpol_ebpf.agent.timeouts import set_timeouts
from netpol_ebpf.agent.wiring import NOWHERE, Interface, Wiring
from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.apply.encode import LocalFlag, Meaning, decode_endpoint
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import IPAddress, IPNetwork
from netpol_loader import abi
from netpol_loader.host.barrier import BarrierTables
from netpol_loader.host.follow import Follower
from netpol_loader.host.links import Link, find_link, interface_towards, joined_groups
from netpol_loader.host.peers import load_peer_addresses
from netpol_loader.host.routes import LocalRoute
from netpol_loader.pins import access, attach
from netpol_loader.pins.drift import Drift, PartlyMendedError, mend_attachments, mend_pins
from netpol_loader.pins.others import Other, OtherPrograms
from netpol_loader.pins.renewal import Renewal
from netpol_loader.pins.upgrade import Upgrade, open_dataplane

log = logging.getLogger(__name__)

POLICY_MAPS = frozenset(
    abi.maps_of(abi.MapRole.ENDPOINT, abi.MapRole.ENDPOINT_CACHE, abi.MapRole.NODE, abi.MapRole.TABLE)
)
"""Maps that say what policy is, or what was remembered of that. The others hold connections, counters and settings, and belong to no agent."""


PAIR_KINDS = frozenset({"veth", "netkit"})
STACKED_KINDS = frozenset({"vlan", "macvlan", "ipvlan"})
"""Devices that hand on what comes in by another one, as it is; a tunnel's underlay is no such thing."""
"""Kinds of devices that come in pairs, one end in a workload's namespace."""
GROUP = Meaning(LocalFlag.GROUP)
IPV6 = 6
SOLICITED = int(IPv6Address("ff02::1:ff00:0"))
LOOPBACK_NET = ip_network("127.0.0.0/8")
EVENTS_A_LOOK = 1000
"""Events taken at a time, so that a flood of them does not keep the agent from everything else; arbitrary."""
PEERS_A_LOOK = 50
"""Of these, the number that one look goes behind, so that many of them do not keep the agent from a new one; arbitrary."""
GROUPS_S = 1.0
"""How often to look for groups that the node has joined; arbitrary."""
PEERS_S = 0.25
"""How often to look again behind an interface that is nobody's, and of which there is no news; arbitrary."""
CLSACT_TURN = 10
"""Interfaces with clsact to be looked at in one audit; arbitrary."""


class NodeAccess(Protocol):
    """What the agent needs of a node; tests have another one."""

    @property
    def maps(self) -> Mapping[str, KernelMap]:
        """The maps in force."""

    @property
    def barrier(self) -> BarrierAccess:
        """The tables of the second barrier in this node's network namespace."""

    def snapshot(self, bound: Collection[int] = ()) -> Wiring:
        """Interfaces, routes and addresses as they are now.

        ``bound``: interfaces that are known to be whose they are. Addresses at their other ends are not looked for again.
        """

    def has_news(self) -> bool:
        """Whether interfaces, routes or addresses may have changed since the last call."""

    def take_born(self) -> list[Interface]:
        """Interfaces that the kernel told of since the last call, new ones among them; the rest of the news stays news."""

    def take_gone(self) -> set[int] | None:
        """Interfaces that went since the last call, though others may have their numbers now; None: it is not known which."""

    def renewal(self) -> contextlib.AbstractContextManager[Mapping[str, KernelMap]]:
        """Empty policy maps, to be filled; at the end of the block, if it raised nothing, they are in force everywhere."""

    def renewal_sizes(self) -> Mapping[str, int]:
        """How many rows the maps have room for that the next `renewal` gives."""

    def former_numbers(self) -> Mapping[int, int]:
        """Endpoint numbers by interface, as they are in force, be it by an agent of another version."""

    def attached(self) -> set[int]:
        """Interfaces with our programs on them."""

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> bool:
        """Put our programs on an interface; False when it is gone. ``is_newborn``: it has come just now."""

    def detach(self, ifindex: int) -> None:
        """Take our programs off an interface."""

    def prune(self) -> None:
        """Forget interfaces that are gone; programs come off those that went to another network namespace."""

    def mend(self, ifindexes: Collection[int]) -> list[Drift]:
        """Put back pins, and our programs on these interfaces, where something removed or changed them; what it was.

        Raises PlatformError, PartlyMendedError with what could be put back, when something could not.
        """

    def other_programs(self, attached: Collection[int]) -> list[Other]:
        """Programs of others where packets pass the node's interfaces. ``attached``: those with our programs."""

    def others(self, ifindex: int) -> list[str]:
        """Programs of others on the hook by which an interface's packets come in, for people."""

    def interface_towards(self, address: IPAddress) -> int | None:
        """The interface by which the node would send to an address, None where there is no way."""

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        """The connections of this node, and those that sockets in these network namespaces show."""

    def read_events(self, consume: Callable[[abi.np_event], None]) -> int:
        """Hand over the events there are, or the first of very many; how many there were."""


class KernelNode:
    """The real one: the network namespace of this process. A context manager."""

    def __init__(
        self,
        pin_root: Path,
        sizes: Mapping[str, int] | None = None,
        *,
        group: int | None = None,
        timeouts_s: Mapping[str, int] | None = None,
        plugin_results: Path | None = None,
    ) -> None:
        """``group``: the number of one that may read the maps. ``timeouts_s``: those that are not the default (`timeouts`).

        ``plugin_results``: the directory of `cni.PluginResults`.
        """
        self._results = CniResultCache(plugin_results or DEFAULT_DIR)
        self._pin_root = pin_root
        self._group = group
        self._timeouts_s = dict(timeouts_s or {})
        self._sizes = dict(sizes or {})
        self._stack = contextlib.ExitStack()
        self._consume: Callable[[abi.np_event], None] = lambda _event: None
        self._gone: set[int] | None = set()
        self._born: list[Interface] = []
        self._is_news = False  # what was read and not looked at yet
        self._groups: frozenset[IPAddress] = frozenset()  # but for those of addresses
        self._not_joined: set[IPAddress] = set()  # of those of addresses
        self._groups_s = -GROUPS_S
        self._version: tuple[int, int] | None = None  # of the follower, when its news were read
        self._links: dict[int, tuple[Link, Interface]] = {}
        self._asked: dict[int, tuple[Link, bool, float]] = {}  # behind an interface: had it a host route, and when
        self._peer_addresses: dict[tuple[int, int], tuple[IPAddress, ...]] = {}
        self._others = OtherPrograms()
        self._mended = 0  # of clsact interfaces: whose turn it is
        self._upgrade: Upgrade | None = None  # until it has taken over
        self.upgraded = ""  # what an upgrade of the pins did, for people; empty: there was none
        self._barrier = BarrierTables(str(pin_root.absolute()))

    def __enter__(self) -> KernelNode:  # noqa: PYI034 - typing.Self comes with Python 3.11
        with contextlib.ExitStack() as stack:
            self._follower = stack.enter_context(Follower())
            self._dataplane, self._upgrade = open_dataplane(self._pin_root, self._sizes)
            stack.enter_context(self._dataplane)
            if self._upgrade is not None:
                self.upgraded = self._upgrade.summary
                stack.callback(self._upgrade.discard)
            self._reader = stack.enter_context(self._dataplane.events(lambda event: self._consume(event)))
            self._mechanism = attach.preferred_mechanism(self._dataplane)
            access.grant(self._dataplane, self._group)
            stack.callback(self._barrier.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pin_dir(self) -> Path:
        """Where the maps are pinned."""
        return self._dataplane.pin_dir

    @property
    def maps(self) -> Mapping[str, KernelMap]:
        """See `NodeAccess`."""
        return self._dataplane.maps

    @property
    def barrier(self) -> BarrierTables:
        """See `NodeAccess`."""
        return self._barrier

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._follower.fileno()

    @property
    def listed_again(self) -> Mapping[str, int]:
        """How often all interfaces and routes were listed again since the start, by why."""
        return self._follower.listed_again

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
        """Multicast groups that processes of the node join or leave are news that nobody tells. It takes milliseconds to list them."""
        now_s = time.monotonic()
        if now_s - self._groups_s < GROUPS_S:
            return
        before, of_addresses = self._groups, self._address_groups()
        joined, self._groups_s = joined_groups(), now_s
        self._groups, self._not_joined = joined - of_addresses, of_addresses - joined
        self._is_news = self._is_news or self._groups != before

    def _address_groups(self) -> set[IPAddress]:
        """Groups that interfaces join for each of their addresses, so that neighbours find them; not where there are no neighbours."""
        anycast = (one.address for one in self._follower.local_routes if one.is_single)
        return {_solicited(one) for one in (*self._follower.addresses, *anycast) if one.version == IPV6}

    def take_gone(self) -> set[int] | None:
        """See `NodeAccess`."""
        gone, self._gone = self._gone, set()
        return gone

    def snapshot(self, bound: Collection[int] = ()) -> Wiring:
        """See `NodeAccess`. As of the last news that were read: what comes after those is news of the next time."""
        if self._version is None:
            self._read_news()
            self._look_at_groups()
        follower, links = self._follower, self._known_links()
        self._look_behind(links, bound)
        meanings, nets = _meanings(follower.local_routes, self._groups | (self._address_groups() - self._not_joined))
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
        """The interfaces, as the kernel tells of them and as the agent sees them."""
        before = self._links
        self._links = {}
        for ifindex, one in self._follower.links.items():
            known = before.get(ifindex)
            self._links[ifindex] = known if known is not None and known[0] is one else (one, _link(one))
        return self._links

    def _look_behind(self, links: Mapping[int, tuple[Link, Interface]], bound: Collection[int]) -> None:
        """Addresses at the other ends of pairs that are nobody's yet: of each when anything about it is new, else now and then.

        Behind a bound interface nothing counts any more. What one interface costs is bounded, whatever is done at its other end.
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

    @contextlib.contextmanager
    def renewal(self) -> Iterator[Mapping[str, KernelMap]]:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            yield self._dataplane.maps
            self._set_timeouts()  # before: an upgrade is no moment at which connections are given up earlier than asked
            self._upgrade.take_over()
            self._upgrade = None
            access.grant(self._dataplane, self._group)
            return
        if self._is_new():
            yield self._dataplane.maps
        else:
            with Renewal(self._dataplane, POLICY_MAPS, self._sizes) as renewal:
                yield renewal.maps
                renewal.take_over()
            access.grant(self._dataplane, self._group)
        self._set_timeouts()

    def renewal_sizes(self) -> Mapping[str, int]:
        """See `NodeAccess`."""
        sizes = {name: one.max_entries for name, one in self._dataplane.pinned.items()}
        if self._upgrade is None and not self._is_new():
            sizes |= {name: size for name, size in self._sizes.items() if name in POLICY_MAPS}
        return sizes

    def _set_timeouts(self) -> None:
        config = self._dataplane.config()
        set_timeouts(config, self._timeouts_s)
        self._dataplane.set_config(config)

    def _is_new(self) -> bool:
        """Whether nobody has written policy to these maps yet, and nothing is attached: then there is nothing to take over."""
        return next(iter(self._dataplane.maps["np_rule"].items()), None) is None and not self.attached()

    def former_numbers(self) -> Mapping[int, int]:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            return self._upgrade.numbers()
        rows = (decode_endpoint(value) for _, value in self._dataplane.maps["np_endpoint"].items())
        return {row.ifindex: row.number for row in rows}

    def attached(self) -> set[int]:
        """See `NodeAccess`."""
        if self._upgrade is not None:
            return self._upgrade.attached()
        return {one.ifindex for one in attach.attachments(self._dataplane)}

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> bool:
        """See `NodeAccess`."""
        try:
            attach.attach(ifindex, self._dataplane, is_newborn=is_newborn)
        except PlatformError:
            if find_link(ifindex) is None:
                return False
            raise
        return True

    def detach(self, ifindex: int) -> None:
        """See `NodeAccess`."""
        attach.detach(ifindex, self._dataplane)
        self.prune()

    def prune(self) -> None:
        """See `NodeAccess`."""
        attach.prune(self._dataplane, self._follower.links.keys())

    def mend(self, ifindexes: Collection[int]) -> list[Drift]:
        """See `NodeAccess`. Of interfaces with clsact, CLSACT_TURN at a time are looked at: it takes long."""
        found = mend_pins(self._dataplane)
        restored = {one.where for one in found}
        try:
            opened = access.grant(self._dataplane, self._group)
        except PlatformError as error:
            raise PartlyMendedError(error.message, found) from error
        found += [Drift("pin", str(path), "changed") for path in opened if str(path) not in restored]
        turn = sorted(ifindexes)
        if self._mechanism is attach.Mechanism.CLSACT and turn:
            first = self._mended % len(turn)
            turn = (turn + turn)[first : first + min(CLSACT_TURN, len(turn))]
            self._mended = first + len(turn)
        try:
            return found + mend_attachments(self._dataplane, turn)
        except PartlyMendedError as error:
            raise PartlyMendedError(error.message, [*found, *error.found]) from error

    def other_programs(self, attached: Collection[int]) -> list[Other]:
        """See `NodeAccess`."""
        return self._others.look(self._follower.links.keys(), attached, self._dataplane)

    def others(self, ifindex: int) -> list[str]:
        """See `NodeAccess`."""
        return attach.others(ifindex, self._dataplane)

    def interface_towards(self, address: IPAddress) -> int | None:
        """See `NodeAccess`."""
        return interface_towards(address)

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        """See `NodeAccess`."""
        return look_at_connections(namespaces)

    def read_events(self, consume: Callable[[abi.np_event], None]) -> int:
        """See `NodeAccess`."""
        self._consume = consume
        return self._reader.consume(EVENTS_A_LOOK)


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
    """Single addresses that mean the node, and prefixes that are its own; the program knows 127.0.0.0/8 by itself."""
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
    """The solicited-node group of an address (RFC 4291, 2.7.1)."""
    return IPv6Address(SOLICITED | (int(address) & 0xFF_FFFF))


@lru_cache(maxsize=4096)
def _meaning(is_many: bool, ifindex: int) -> Meaning:  # noqa: FBT001  # private
    return Meaning(LocalFlag.MANY if is_many else LocalFlag.OWN, ifindex)
