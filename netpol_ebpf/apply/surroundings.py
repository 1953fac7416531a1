# SPDX-License-Identifier: Apache-2.0
"""Writes the maps that describe the node, besides policy: its addresses, its own interfaces, addresses of services.

The caller gives the whole state each time, and the writer writes only the difference.

Invariants: new rows are written before old rows are deleted, so no interface is ever without a row.  The result does
not depend on the earlier content of the maps.

This module must not decide which interfaces and addresses are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from netpol_ebpf.apply.applier import KernelMap, too_small
from netpol_ebpf.apply.encode import (
    NO_BITS,
    NO_SETS,
    Element,
    EndpointFlag,
    LocalFlag,
    Meaning,
    either,
    endpoint_element,
    local_element,
    local_net_element,
    resolver_element,
    tunnel_element,
    unlearned_element,
    vip_elements,
    vip_filter_elements,
)
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import IPAddress, IPNetwork, Vip
from netpol_loader import abi

MAPS = abi.maps_with_rows(abi.MapRole.NODE)
"""Maps that only this module writes. The module also writes VIP_FILTER, and rows of own interfaces in np_endpoint."""
VIP_FILTER = "np_vip_filter"
"""An array of bits. For each address in MAPS, the bit at the hash of the address is set."""
UPLINK = 0
"""The value of `OwnInterface.number` for an interface without a host endpoint of its own."""


@dataclass(frozen=True, slots=True)
class OwnInterface:
    """One of the node's own interfaces.

    ``number``: the number of its host endpoint, or UPLINK.
    ``flags``: further properties of the interface.
    """

    number: int = UPLINK
    flags: EndpointFlag = EndpointFlag.NONE


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The addresses and interfaces of the node at one time.

    ``addresses``: single addresses of this node or of other nodes.
    ``interfaces``: by ifindex, the node's own interfaces that have the programs.
    ``vips``: the destinations that nodes translate.
    ``nets``: prefixes in which all addresses are this node's own.
    ``tunnels``: encapsulations that nodes accept from any sender, as (protocol, UDP port or 0).
    ``resolvers``: the DNS servers whose answers the program believes, as (address, port).
    ``unlearned``, ``unlearned_addresses``: prefixes and addresses that the program never learns from DNS answers.
    """

    addresses: Mapping[IPAddress, Meaning] = field(default_factory=dict)
    interfaces: Mapping[int, OwnInterface] = field(default_factory=dict)
    vips: Iterable[Vip] = ()
    nets: frozenset[IPNetwork] = frozenset()
    tunnels: frozenset[tuple[int, int]] = frozenset()
    resolvers: frozenset[tuple[IPAddress, int]] = frozenset()
    unlearned: frozenset[IPNetwork] = frozenset()
    unlearned_addresses: frozenset[IPAddress] = frozenset()

    def is_own(self, address: IPAddress) -> bool:
        """Whether the address is one of this node's own addresses."""
        meaning = self.addresses.get(address)
        is_single = meaning is not None and bool(meaning.flags & LocalFlag.OWN)
        return is_single or address.is_loopback or any(address in net for net in self.nets)

    def elements(self) -> Iterator[Element]:
        """All map elements. Those of np_vip_filter come first."""
        vips = list(self.vips)
        yield from vip_filter_elements(
            [*self.addresses, *(vip.key.address for vip in vips if vip.key.address is not None)]
        )
        for address, meaning in self.addresses.items():
            yield local_element(address, meaning)
        for net in self.nets:
            yield local_net_element(net)
        for protocol, port in self.tunnels:
            yield tunnel_element(protocol, port)
        for address, port in self.resolvers:
            yield resolver_element(address, port)
        for net in self.unlearned:
            yield unlearned_element(net.network_address, net.prefixlen)
        for address in self.unlearned_addresses:
            yield unlearned_element(address, address.max_prefixlen)
        for ifindex, one in self.interfaces.items():
            flags = EndpointFlag.HOST if one.number else EndpointFlag.HOST | EndpointFlag.UPLINK
            yield endpoint_element(ifindex, one.number, NO_SETS, flags | one.flags)
        for vip in vips:
            yield from vip_elements(vip, self.is_own)


class SurroundingsWriter:
    """Writes the surroundings to the maps.

    ``renew``: a function that begins a new generation.  It is called when the endpoint of an interface changed, because
    the program caches an interface's endpoint for a generation.
    """

    def __init__(self, maps: Mapping[str, KernelMap], renew: Callable[[], object]) -> None:
        self._maps = maps
        self._renew = renew
        self._rows: dict[tuple[str, bytes], bytes] = {}
        self._written: Surroundings | None = None

    @property
    def rows(self) -> Mapping[tuple[str, bytes], bytes]:
        """The rows that were written last, as a mapping of (map name, key) to value."""
        return self._rows

    def write(self, wanted: Surroundings, *, keep: Iterable[tuple[str, bytes]] = ()) -> None:
        """Write the difference between the rows in the kernel and those of ``wanted``.

        ``keep``: rows, as (map name, key), that now belong to another writer.  They are not deleted.

        Raises MapFullError if the rows do not fit.  Then no row has changed.
        """
        if wanted == self._written:
            return
        rows = {(name, key): value for name, key, value in wanted.elements()}
        before = self._rows
        changed = {place: value for place, value in rows.items() if before.get(place) != value}
        if not changed.keys() <= before.keys():
            self._require_room(rows.keys())
        lost = before.keys() - rows.keys()
        gone = lost - set(keep) if lost else lost
        bits = [key for name, key in (*changed, *lost) if name == VIP_FILTER]
        both = {key: either(*(of.get((VIP_FILTER, key), NO_BITS) for of in (before, rows))) for key in bits}
        # An address must have its bit while it has a row.
        for key, value in both.items():
            self._put_bits(key, before.get((VIP_FILTER, key), NO_BITS), value)
        done: list[tuple[str, bytes]] = []
        try:
            for (name, key), value in changed.items():
                if name != VIP_FILTER:
                    self._maps[name].put(key, value)
                    done.append((name, key))
        except PlatformError:
            self._put_back(done)
            for key, value in both.items():
                self._put_bits(key, value, before.get((VIP_FILTER, key), NO_BITS))
            raise
        for name, key in gone:
            if name != VIP_FILTER:
                self._maps[name].delete(key)
        for key, value in both.items():
            self._put_bits(key, value, rows.get((VIP_FILTER, key), NO_BITS))
        self._rows, self._written = rows, wanted
        if any(name == "np_endpoint" for name, _ in (*done, *gone)):
            self._renew()

    def require_room(self, wanted: Surroundings) -> None:
        """Raise MapFullError if `write` would raise it for ``wanted``."""
        self._require_room({(name, key) for name, key, _ in wanted.elements()})

    def _require_room(self, wanted: AbstractSet[tuple[str, bytes]]) -> None:
        keys = self._rows.keys() | wanted  # old rows count as well, because they are deleted last
        need = Counter(name for name, _ in keys if name in MAPS)
        interfaces = {key for name, key in keys if name == "np_endpoint"}
        if any(("np_endpoint", key) not in self._rows for key in interfaces):
            workloads = (key for key, _ in self._maps["np_endpoint"].items())
            need["np_endpoint"] = len(interfaces.union(workloads))
        for name, rows in need.items():
            if rows > self._maps[name].max_entries:
                raise too_small(name, self._maps[name].max_entries, rows)

    def _put_back(self, done: Iterable[tuple[str, bytes]]) -> None:
        """Restore the values that the rows ``done`` had before."""
        for name, key in done:
            value = self._rows.get((name, key))
            if value is None:
                self._maps[name].delete(key)
            else:
                self._maps[name].put(key, value)
        self._renew()

    def _put_bits(self, key: bytes, before: bytes, after: bytes) -> None:
        if before != after:
            self._maps[VIP_FILTER].put(key, after)
