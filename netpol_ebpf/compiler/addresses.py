# SPDX-License-Identifier: Apache-2.0
"""The identity of each known address and prefix: the tables ``addresses`` and ``cidrs``.

An address has the owners at the address itself and everything that its containing prefixes have; a prefix has its own
owners and those of the prefixes around it.  So the longest match alone gives the identity of an address without a row
of its own.

Invariants: a prefix is stored exactly while an owner or a group is at it, an address likewise; after
`Addresses.apply_changes` each has the identity of its content, and the draft has the changed rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.identities import IdentityIndex
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.tables import WORLD_V4, WORLD_V6, AddressRow
from netpol_ebpf.policy.types import EndpointKey, IPAddress, IPNetwork
from netpol_ebpf.resources.sharing import REMEMBERED, share

_LENGTH_BITS = 8  # a prefix sorts by (network, length): network << 8 | length
_EMPTY: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class _Context:
    """The owners and groups that an address gets from the prefixes around it.

    Interned, so that equal ones are the same object.
    """

    owners: frozenset[int]
    groups: frozenset[int]


@dataclass(slots=True, eq=False)
class PrefixEntry:
    """A stored prefix. ``owners``, ``groups``: at exactly this prefix, with repetitions."""

    network: IPNetwork
    owners: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    context: _Context | None = None
    identity: int = 0


Claim = tuple[int, EndpointKey, int]
"""The claim of a local endpoint to an address: (0 for a workload, 1 for a host; key; number).

The smallest claim owns the address.
"""


@dataclass(slots=True, eq=False)
class AddressEntry:
    """A stored address. ``claims``: local endpoints that have it.

    ``nodes``: numbers of nodes that have it, with repetitions.
    """

    address: IPAddress
    owners: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    claims: tuple[Claim, ...] = ()
    nodes: tuple[int, ...] = ()
    identity: int = 0
    row: AddressRow | None = None


@dataclass(slots=True)
class Relabelled:
    """The changes of a commit: addresses with their old and new row, prefixes with their old and new identity (0.

    The prefix was not stored).
    """

    addresses: list[tuple[AddressEntry, AddressRow | None, AddressRow | None]] = field(default_factory=list)
    prefixes: list[tuple[int, int]] = field(default_factory=list)


class _SortedKeys:
    """Integers by range. Additions and removals are cheap, sorting is deferred until the next lookup of a range."""

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._sorted = True

    def add(self, key: int) -> None:
        """Add a key; a key that is added twice is returned twice."""
        if self._sorted and self._keys and key <= self._keys[-1]:
            self._sorted = False
        self._keys.append(key)

    def between(self, first: int, last: int) -> list[int]:
        """Keys in the inclusive range, ascending; keys removed since may be among them."""
        if not self._sorted:
            self._keys.sort()
            self._sorted = True
        begin = bisect_left(self._keys, first)
        return self._keys[begin : bisect_left(self._keys, last + 1, begin)]

    def tidy(self, live: Iterable[int], count: int) -> None:
        """Drop removed keys, when they have become many."""
        if len(self._keys) > 2 * count + 64:
            self._keys = sorted(live)
            self._sorted = True


class _Family:
    """The addresses and prefixes of one IP version."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.bits = 32 if version == 4 else 128  # noqa: PLR2004  # the family
        self.world = WORLD_V4 if version == 4 else WORLD_V6  # noqa: PLR2004  # the family
        self.addresses: dict[int, AddressEntry] = {}
        self.prefixes: dict[int, PrefixEntry] = {}
        self.lengths: dict[int, dict[int, PrefixEntry]] = {}  # length -> network >> (bits - length) -> entry
        self.address_keys = _SortedKeys()
        self.prefix_keys = _SortedKeys()
        self.nowhere = _Context(_EMPTY, _EMPTY)
        self.contexts: dict[tuple[frozenset[int], frozenset[int]], _Context] = {(_EMPTY, _EMPTY): self.nowhere}
        self.dirty_prefixes: set[int] = set()
        self.dirty_addresses: set[int] = set()

    @staticmethod
    def key(network: IPNetwork) -> int:
        return int(network.network_address) << _LENGTH_BITS | network.prefixlen

    def context_at(self, value: int, longest: int) -> _Context:
        """The context of the longest stored prefix around a network or address, with at most that length."""
        for length in self.ordered_lengths():
            if length <= longest:
                entry = self.lengths[length].get(value >> (self.bits - length))
                if entry is not None and entry.context is not None:
                    return entry.context
        return self.nowhere

    def tidy(self) -> None:
        """Drop unused contexts and removed keys, when they have become many."""
        self.prefix_keys.tidy(self.prefixes, len(self.prefixes))
        if len(self.contexts) > 2 * len(self.prefixes) + 64:
            live = [entry.context for entry in self.prefixes.values() if entry.context is not None]
            self.contexts = {(context.owners, context.groups): context for context in (self.nowhere, *live)}

    def ordered_lengths(self) -> list[int]:
        """Prefix lengths in use, the longest first."""
        return sorted(self.lengths, reverse=True)

    def context(self, owners: frozenset[int], groups: frozenset[int]) -> _Context:
        """The interned context with this content."""
        known = self.contexts.get((owners, groups))
        if known is None:
            known = self.contexts[(owners, groups)] = _Context(owners, groups)
        return known


class Addresses:
    """All known addresses and prefixes, with the identity of each."""

    def __init__(self, identities: IdentityIndex) -> None:
        self._identities = identities
        self._families = {4: _Family(4), 6: _Family(6)}
        self.address_count = 0
        self.prefix_count = 0

    # --- content ----------------------------------------------------------------------------------------------------

    def add_owner(self, address: IPAddress, owner: int, journal: Journal, node: int = 0) -> None:
        """Add an owner to an address. ``node``: number of the owner's node, 0: this node, or not known."""
        entry = self._address(address, journal)
        journal.assign(entry, "owners", share((*entry.owners, owner)))
        if node:
            journal.assign(entry, "nodes", share((*entry.nodes, node)))

    def remove_owner(self, address: IPAddress, owner: int, journal: Journal, node: int = 0) -> None:
        """Remove an owner from an address. ``node``: as it was added."""
        entry = self._address(address, journal)
        journal.assign(entry, "owners", _without(entry.owners, owner))
        if node:
            journal.assign(entry, "nodes", _without(entry.nodes, node))

    def add_group(self, address: IPAddress, group: int, journal: Journal) -> None:
        """Add an address to a group (a service)."""
        entry = self._address(address, journal)
        journal.assign(entry, "groups", (*entry.groups, group))

    def remove_group(self, address: IPAddress, group: int, journal: Journal) -> None:
        """Remove an address from a group."""
        entry = self._address(address, journal)
        journal.assign(entry, "groups", _without(entry.groups, group))

    def add_prefix_owner(self, network: IPNetwork, owner: int, journal: Journal) -> None:
        """Add an owner (a network set) to a prefix."""
        entry = self._prefix(network, journal)
        journal.assign(entry, "owners", (*entry.owners, owner))

    def remove_prefix_owner(self, network: IPNetwork, owner: int, journal: Journal) -> None:
        """Remove an owner from a prefix."""
        entry = self._prefix(network, journal)
        journal.assign(entry, "owners", _without(entry.owners, owner))

    def add_prefix_group(self, network: IPNetwork, group: int, journal: Journal) -> None:
        """Add a prefix to a group (a list of nets)."""
        entry = self._prefix(network, journal)
        journal.assign(entry, "groups", (*entry.groups, group))

    def remove_prefix_group(self, network: IPNetwork, group: int, journal: Journal) -> None:
        """Remove a prefix from a group."""
        entry = self._prefix(network, journal)
        journal.assign(entry, "groups", _without(entry.groups, group))

    def claim(self, address: IPAddress, claim: Claim, journal: Journal) -> None:
        """Record that a local endpoint has the address. The address also needs the endpoint as an owner."""
        entry = self._address(address, journal)
        journal.assign(entry, "claims", tuple(sorted((*entry.claims, claim))))

    def disclaim(self, address: IPAddress, claim: Claim, journal: Journal) -> None:
        """Remove the claim of a local endpoint to the address."""
        entry = self._address(address, journal)
        journal.assign(entry, "claims", tuple(each for each in entry.claims if each != claim))

    def identity_of(self, address: IPAddress) -> int:
        """The identity of any address, known or not."""
        entry = self._families[address.version].addresses.get(int(address))
        return self.identity_around(address) if entry is None else entry.identity

    def identity_around(self, address: IPAddress) -> int:
        """The identity that an address has, or would have, without a row of its own."""
        family = self._families[address.version]
        value = int(address)
        for length in family.ordered_lengths():
            prefix = family.lengths[length].get(value >> (family.bits - length))
            if prefix is not None:
                return prefix.identity
        return family.world

    # --- identities -------------------------------------------------------------------------------------------------

    def apply_changes(self, phase: Phase, draft: Draft, journal: Journal, changed: Relabelled | None = None) -> None:
        """Give every touched prefix and address its identity. ``changed``: receives the changes.

        Cost: linear in the touched entries and in the addresses inside touched prefixes.
        """
        for family in self._families.values():
            if family.dirty_prefixes:
                self._settle_prefixes(family, phase, draft, journal, changed)
            if family.dirty_addresses:
                self._settle_addresses(family, phase, draft, journal, changed)

    def forget_dirt(self) -> None:
        """Forget the touched entries after a rollback."""
        for family in self._families.values():
            family.dirty_prefixes.clear()
            family.dirty_addresses.clear()

    def _settle_prefixes(
        self, family: _Family, phase: Phase, draft: Draft, journal: Journal, changed: Relabelled | None
    ) -> None:
        rows = draft.rows(phase, "cidrs")
        for first, last in _ranges(family, family.dirty_prefixes):
            stack: list[tuple[int, _Context]] = []  # (last address, context) of the prefixes around the current one
            for key in dict.fromkeys(family.prefix_keys.between(first << _LENGTH_BITS, last << _LENGTH_BITS | 255)):
                entry = family.prefixes.get(key)
                if entry is None:
                    continue
                start, length = key >> _LENGTH_BITS, key & 255
                while stack and stack[-1][0] < start:
                    stack.pop()
                if not entry.owners and not entry.groups:
                    self._drop_prefix(family, key, entry, journal)
                    rows[entry.network] = DELETED
                    if changed is not None:
                        changed.prefixes.append((entry.identity, 0))
                    continue
                around = stack[-1][1] if stack else family.context_at(start, length - 1)
                context = family.context(_with(around.owners, entry.owners), _with(around.groups, entry.groups))
                stack.append((start + (1 << (family.bits - length)) - 1, context))
                if context is not entry.context:
                    journal.assign(entry, "context", context)
                    identity = self._identities.acquire(family.version, context.owners, context.groups, journal)
                    if entry.identity:
                        self._identities.release(entry.identity, journal)
                    if identity != entry.identity:
                        if changed is not None:
                            changed.prefixes.append((entry.identity, identity))
                        journal.assign(entry, "identity", identity)
                        rows[entry.network] = identity
            family.dirty_addresses.update(family.address_keys.between(first, last))
        family.dirty_prefixes.clear()
        family.tidy()

    def _drop_prefix(self, family: _Family, key: int, entry: PrefixEntry, journal: Journal) -> None:
        journal.pop(family.prefixes, key)
        # A reused key may be in the list twice after a rollback; `between` is read through a set of keys.
        journal.on_rollback(lambda: family.prefix_keys.add(key))
        start, length = key >> _LENGTH_BITS, key & 255
        table = family.lengths[length]
        journal.pop(table, start >> (family.bits - length))
        if not table:
            journal.pop(family.lengths, length)
        if entry.identity:
            self._identities.release(entry.identity, journal)
        journal.assign(self, "prefix_count", self.prefix_count - 1)

    def _settle_addresses(
        self, family: _Family, phase: Phase, draft: Draft, journal: Journal, changed: Relabelled | None
    ) -> None:
        rows = draft.rows(phase, "addresses")
        acquire, release = self._identities.acquire, self._identities.release
        lengths = [(family.bits - length, family.lengths[length]) for length in family.ordered_lengths()]
        for value in sorted(family.dirty_addresses):
            entry = family.addresses.get(value)
            if entry is None:
                continue
            before = entry.identity
            if not entry.owners and not entry.groups:
                journal.pop(family.addresses, value)
                journal.on_rollback(lambda value=value: family.address_keys.add(value))  # type: ignore[misc]
                journal.assign(self, "address_count", self.address_count - 1)
                if before:
                    release(before, journal)
                    rows[entry.address] = DELETED
                    if changed is not None:
                        changed.addresses.append((entry, entry.row, None))
                continue
            context = family.nowhere
            for shift, table in lengths:
                prefix = table.get(value >> shift)
                if prefix is not None and prefix.context is not None:
                    context = prefix.context
                    break
            identity = acquire(
                family.version, _with(context.owners, entry.owners), _with(context.groups, entry.groups), journal
            )
            if before:
                release(before, journal)
            node = 0 if entry.claims else _only(entry.nodes)
            endpoint = entry.claims[0][2] if entry.claims else 0
            row = AddressRow(identity, 0, node) if node else _row(identity, endpoint)
            if row != entry.row:
                if changed is not None:
                    changed.addresses.append((entry, entry.row, row))
                journal.assign(entry, "identity", identity)
                journal.assign(entry, "row", row)
                rows[entry.address] = row
        family.dirty_addresses.clear()
        family.address_keys.tidy(family.addresses, len(family.addresses))

    # --- entries ----------------------------------------------------------------------------------------------------

    def _address(self, address: IPAddress, journal: Journal) -> AddressEntry:
        family = self._families[address.version]
        value = int(address)
        family.dirty_addresses.add(value)
        entry = family.addresses.get(value)
        if entry is None:
            entry = AddressEntry(address)
            journal.put(family.addresses, value, entry)
            journal.assign(self, "address_count", self.address_count + 1)
            family.address_keys.add(value)
        return entry

    def _prefix(self, network: IPNetwork, journal: Journal) -> PrefixEntry:
        family = self._families[network.version]
        key = family.key(network)
        family.dirty_prefixes.add(key)
        entry = family.prefixes.get(key)
        if entry is None:
            entry = PrefixEntry(network)
            journal.put(family.prefixes, key, entry)
            journal.assign(self, "prefix_count", self.prefix_count + 1)
            table = family.lengths.get(network.prefixlen)
            if table is None:
                table = {}
                journal.put(family.lengths, network.prefixlen, table)
            journal.put(table, int(network.network_address) >> (family.bits - network.prefixlen), entry)
            family.prefix_keys.add(key)
        return entry


@lru_cache(maxsize=REMEMBERED)
def _row(identity: int, endpoint: int) -> AddressRow:
    """The row of addresses with this identity and endpoint that are on no known node; equal rows are shared."""
    return AddressRow(identity, endpoint)


def _only(nodes: tuple[int, ...]) -> int:
    """The only node of an address; 0 when there is none, or there are several."""
    return nodes[0] if nodes and nodes.count(nodes[0]) == len(nodes) else 0


def _with(around: frozenset[int], own: tuple[int, ...]) -> frozenset[int]:
    """The union of the context's members and the own ones; the context's own set object when there are no others."""
    return around.union(own) if own else around


def _without(members: tuple[int, ...], member: int) -> tuple[int, ...]:
    """A collection with one occurrence less; ValueError when there is none."""
    at = members.index(member)
    return members[:at] + members[at + 1 :]


def _ranges(family: _Family, keys: Iterable[int]) -> list[tuple[int, int]]:
    """The address ranges of prefixes, without prefixes inside others."""
    merged: list[tuple[int, int]] = []
    for key in sorted(keys):
        start = key >> _LENGTH_BITS
        last = start + (1 << (family.bits - (key & 255))) - 1
        if not merged or start > merged[-1][1]:
            merged.append((start, last))
    return merged
