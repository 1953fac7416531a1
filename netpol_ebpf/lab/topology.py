# SPDX-License-Identifier: Apache-2.0
"""The plan of a laboratory network: a tree of network namespaces with routed links, for IPv4 and IPv6.

The root represents everything outside the cluster. Nodes and outside hosts are children of the root; pods are children
of nodes. A veth pair connects a child with its parent. The child's end is its only interface, ``eth0``, with /32 and
/128 addresses and a default route through the parent's end. The parent has one host route for each address of the child
and its descendants. There is no bridge, as in clusters that route packets to pods.

Invariant: a plan is pure data, and this module executes nothing; `netpol_ebpf.lab.laboratory` executes the commands.
The commands name only namespaces and interfaces of the plan, never those of the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Union

from netpol_ebpf.errors import UsageError

IPAddress = Union[IPv4Address, IPv6Address]

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
PARENT_MAC = "ee:ee:ee:ee:ee:ee"  # every gateway has the same hardware address, as with Calico
GATEWAY6 = "fe80::1"


@dataclass(frozen=True, slots=True, order=True)
class Listen:
    """A port on which a host runs an echo server. ``protocol``: TCP or UDP, by IANA number."""

    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace of the plan.

    ``parent``: the name of the parent host; None only for the root. ``interface``: the name of the parent's end of the
    veth pair, at most 15 characters; None: derived from the host's name as Calico derives it.
    """

    name: str
    parent: str | None
    addresses: tuple[IPAddress, ...]
    listens: tuple[Listen, ...] = ()
    interface: str | None = None

    @property
    def parent_interface(self) -> str:
        """The name of the parent's end of the veth pair.

        If the plan gives none: ``cali`` and the first eleven hexadecimal digits of SHA-1("namespace.pod").
        """
        if self.interface is not None:
            return self.interface
        digest = hashlib.sha1(self.name.replace("/", ".").encode(), usedforsecurity=False).hexdigest()
        return f"cali{digest[:11]}"


@dataclass(frozen=True, slots=True)
class IpBatch:
    """Lines for ``ip -batch``. ``host``: the host in whose namespace the command must run."""

    host: str
    lines: tuple[str, ...]


class Plan:
    """A validated tree of hosts.

    Raises UsageError if two hosts have the same name or address, a parent is unknown, hosts form a cycle, or the number
    of roots is not one.
    """

    def __init__(self, hosts: Iterable[Host]) -> None:
        self.hosts: dict[str, Host] = {}
        owners: dict[IPAddress, str] = {}
        for host in hosts:
            if host.name in self.hosts:
                raise UsageError(f"lab: host {host.name} is given twice")
            self.hosts[host.name] = host
            for address in host.addresses:
                if address in owners:
                    raise UsageError(f"lab: address {address} is given to {owners[address]} and to {host.name}")
                owners[address] = host.name
        roots = [host.name for host in self.hosts.values() if host.parent is None]
        if len(roots) != 1:
            raise UsageError(f"lab: a plan has exactly one root, this one has {len(roots)}: {', '.join(roots)}")
        self.root = roots[0]
        self._children: dict[str, list[Host]] = {name: [] for name in self.hosts}
        for host in self.hosts.values():
            if host.parent is None:
                continue
            if host.parent not in self.hosts:
                raise UsageError(f"lab: host {host.name} hangs off {host.parent}, which is not in the plan")
            self._children[host.parent].append(host)
        unreached = self.hosts.keys() - {host.name for host in self.below(self.root)}
        if unreached:
            raise UsageError(f"lab: hosts hang off each other in a circle: {', '.join(sorted(unreached))}")
        self._owners = owners

    def children(self, name: str) -> tuple[Host, ...]:
        """The children of a host, in the order of the plan."""
        return tuple(self._children[name])

    def below(self, name: str) -> Iterator[Host]:
        """A host and all its descendants. A parent comes before its children."""
        yield self.hosts[name]
        for child in self._children[name]:
            yield from self.below(child.name)

    def interfaces(self, name: str) -> set[str]:
        """Names of the interfaces that the plan creates in a host, without the loopback interface."""
        own = set() if name == self.root else {"eth0"}
        return own | {child.parent_interface for child in self._children[name]}

    def owner(self, address: IPAddress) -> str | None:
        """The name of the host that has this address, None if no host has it."""
        return self._owners.get(address)

    def _gateway4(self, name: str) -> str:
        """A router's own link-local IPv4 address on the links to its children.

        Each level of the tree has its own address. With one address for all levels, a router would be its own gateway.
        """
        level = 0
        parent = self.hosts[name].parent
        while parent is not None:
            level += 1
            parent = self.hosts[parent].parent
        return f"169.254.{level}.1"

    def render_batches(self, namespace_of: dict[str, str]) -> list[IpBatch]:
        """The lines for ``ip -batch`` of each host, in the order in which they must run.

        ``namespace_of``: maps a host's name to the name of its network namespace.
        """
        batches = []
        for host in self.below(self.root):
            lines = ["link set lo up"]
            lines += self._render_own_side(host)
            for child in self._children[host.name]:
                lines += self._render_link(host, child, namespace_of[child.name])
            batches.append(IpBatch(host.name, tuple(lines)))
        return batches

    def _render_own_side(self, host: Host) -> Iterator[str]:
        device = "lo" if host.parent is None else "eth0"
        if host.parent is not None:
            yield f"link set {device} up"
        for address in host.addresses:
            nodad = " nodad" if address.version == 6 else ""  # noqa: PLR2004 - the IP version
            yield f"address add {address}/{address.max_prefixlen} dev {device}{nodad}"
        if host.parent is None:
            return
        for source in self._sources(host):
            gateway = self._gateway4(host.parent) if isinstance(source, IPv4Address) else GATEWAY6
            yield f"-{source.version} route add default via {gateway} dev {device} onlink src {source}"

    def _render_link(self, parent: Host, child: Host, child_namespace: str) -> Iterator[str]:
        device = child.parent_interface
        yield f"link add {device} address {PARENT_MAC} type veth peer name eth0 netns {child_namespace}"
        # An automatic link-local address, made from the shared hardware address, would be a second gateway address.
        yield f"link set {device} addrgenmode none"
        yield f"link set {device} up"
        yield f"address add {self._gateway4(parent.name)}/32 dev {device} scope link"
        yield f"address add {GATEWAY6}/64 dev {device} scope link nodad"
        # Without src, the parent's own packets would have the gateway address of the link as their source.
        sources = {source.version: f" src {source}" for source in self._sources(parent)}
        for host in self.below(child.name):
            for address in host.addresses:
                source = sources.get(address.version, "")
                hop = self._first_address(child, address.version)
                via = f"via {hop} onlink " if hop is not None and address not in child.addresses else ""
                yield (f"-{address.version} route add {address}/{address.max_prefixlen} {via}dev {device}{source}")

    @staticmethod
    def _sources(host: Host) -> list[IPAddress]:
        """The first address of each family, which is the source address of the host's own packets."""
        first: dict[int, IPAddress] = {}
        for address in host.addresses:
            first.setdefault(address.version, address)
        return list(first.values())

    @staticmethod
    def _first_address(host: Host, version: int) -> IPAddress | None:
        return next((address for address in host.addresses if address.version == version), None)
