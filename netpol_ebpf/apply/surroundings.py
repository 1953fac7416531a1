# SPDX-License-Identifier: Apache-2.0
"""The node as the program must know it, besides policy: its addresses, its own interfaces, the addresses of services.

The caller gives the whole state each time, the writer writes the difference.  Invariants: rows are written before
others go, so no interface is without a row in between; the result does not depend on the earlier content.

Must not decide which interfaces and addresses those are.
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
    tunnel_element,
    vip_elements,
    vip_filter_elements,
)
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import IPAddress, IPNetwork, Vip
from netpol_loader import abi

MAPS = abi.maps_with_rows(abi.MapRole.NODE)
"""Maps that this module alone writes, besides VIP_FILTER; in np_endpoint it writes only the rows of the node's own
interfaces.
"""
VIP_FILTER = "np_vip_filter"
"""An array of bits by hash of the addresses in MAPS."""
UPLINK = 0
"""In place of a host endpoint's number: the interface has no policy of its own."""


@dataclass(frozen=True, slots=True)
class OwnInterface:
    """One of the node's own interfaces.

    ``number``: of its host endpoint, or UPLINK; ``flags``: further properties of the interface.
    """

    number: int = UPLINK
    flags: EndpointFlag = EndpointFlag.NONE


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The addresses and interfaces of the node at one time.

    ``addresses``: single addresses that mean this node or another one; ``nets``: prefixes that are this node's own.
    ``interfaces``: the node's own interfaces with the programs.  ``tunnels``: encapsulations that nodes take from
    anyone, as protocol and, for UDP, port.
    """

    addresses: Mapping[IPAddress, Meaning] = field(default_factory=dict)
    interfaces: Mapping[int, OwnInterface] = field(default_factory=dict)
    vips: Iterable[Vip] = ()
    nets: frozenset[IPNetwork] = frozenset()
    tunnels: frozenset[tuple[int, int]] = frozenset()

    def is_own(self, address: IPAddress) -> bool:
        """Whether processes of the node have an address."""
        meaning = self.addresses.get(address)
        is_single = meaning is not None and bool(meaning.flags & LocalFlag.OWN)
        return is_single or address.is_loopback or any(address in net for net in self.nets)

    def elements(self) -> Iterator[Element]:
        """All map elements, those of the bit filter first."""
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
        for ifindex, one in self.interfaces.items():
            flags = EndpointFlag.HOST if one.number else EndpointFlag.HOST | EndpointFlag.UPLINK
            yield endpoint_element(ifindex, one.number, NO_SETS, flags | one.flags)
        for vip in vips:
            yield from vip_elements(vip, self.is_own)


class SurroundingsWriter:
    """Keeps the maps equal to the surroundings. ``renew``: begins a new generation, since the program caches which endpoint has an interface."""

    def __init__(self, maps: Mapping[str, KernelMap], renew: Callable[[], object]) -> None:
        self._maps = maps
        self._renew = renew
        self._rows: dict[tuple[str, bytes], bytes] = {}
        self._written: Surroundings | None = None

    @property
    def rows(self) -> Mapping[tuple[str, bytes], bytes]:
        """The rows in the kernel: (map, key) to value."""
        return self._rows

    def write(self, wanted: Surroundings, *, keep: Iterable[tuple[str, bytes]] = ()) -> None:
        """Write the difference between the kernel's rows and these surroundings.

        ``keep``: rows that belong to another writer by now. Raises MapFullError; then nothing has changed.
        """
        if wanted == self._written:
            return
        rows = {(name, key): value for name, key, value in wanted.elements()}
        self._require_room(rows.keys())
        before = self._rows
        gone = before.keys() - rows.keys() - set(keep)
        bits = [key for name, key in {**before, **rows} if name == VIP_FILTER]
        both = {key: either(*(of.get((VIP_FILTER, key), NO_BITS) for of in (before, rows))) for key in bits}
        # An address has its bit as long as it has a row.
        for key, value in both.items():
            self._put_bits(key, before.get((VIP_FILTER, key), NO_BITS), value)
        done: list[tuple[str, bytes]] = []
        try:
            for (name, key), value in rows.items():
                if name != VIP_FILTER and before.get((name, key)) != value:
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
        """Raise MapFullError where `write` would raise it."""
        self._require_room({(name, key) for name, key, _ in wanted.elements()})

    def _require_room(self, wanted: AbstractSet[tuple[str, bytes]]) -> None:
        keys = self._rows.keys() | wanted  # what is to go as well: it goes last
        need = Counter(name for name, _ in keys if name in MAPS)
        interfaces = {key for name, key in keys if name == "np_endpoint"}
        if any(("np_endpoint", key) not in self._rows for key in interfaces):
            workloads = (key for key, _ in self._maps["np_endpoint"].items())
            need["np_endpoint"] = len(interfaces.union(workloads))
        for name, rows in need.items():
            if rows > self._maps[name].max_entries:
                raise too_small(name, self._maps[name].max_entries, rows)

    def _put_back(self, done: Iterable[tuple[str, bytes]]) -> None:
        """Restore earlier values of rows."""
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
