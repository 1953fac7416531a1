# SPDX-License-Identifier: Apache-2.0
"""The identity of each known address and prefix: the tables ``addresses`` and ``cidrs``.

An address has its own owners and address groups, and those of all prefixes that contain the address.  A prefix has its
own owners and groups, and those of all shorter prefixes that contain it.  So a longest-prefix match gives the identity
of an address that has no row of its own.

Invariants: a prefix or address is stored exactly while it has an owner or group of its own.  After
`Addresses.apply_changes` each stored prefix and address has the identity of its owners and groups, and the draft has
the changed rows.
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

_LENGTH_BITS = 8  # the key of a prefix is network << 8 | length, so keys sort by network, then by length
_EMPTY: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class _Context:
    """The owners and address groups of the prefixes that contain an address. The address inherits them.

    Contexts are interned: equal contexts are the same object.
    """

    owners: frozenset[int]
    groups: frozenset[int]


@dataclass(slots=True, eq=False)
class PrefixEntry:
    """A stored prefix.

    ``owners``, ``groups``: those of the prefix itself, not inherited ones.  A value occurs once for each time it was
    added.
    ``context``: the owners and groups of this prefix and of the prefixes that contain it; None before `apply_changes`.
    """

    network: IPNetwork
    owners: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    context: _Context | None = None
    identity: int = 0


Claim = tuple[int, EndpointKey, int]
"""The claim of a local endpoint to an address: (0 for a workload, 1 for a host; key; number).

If several endpoints have the same address, the endpoint with the smallest claim gets the address.
"""


@dataclass(slots=True, eq=False)
class AddressEntry:
    """A stored address.

    ``owners``, ``groups``: those of the address itself, not inherited ones.  A value occurs once for each time it was
    added.
    ``claims``: the claims of the local endpoints that have the address.
    ``nodes``: the numbers of the nodes of its owners.  An owner on this node, or on an unknown node, has no item.
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
    """The addresses and prefixes that a commit changes.

    ``addresses``: (address, old row, new row); None stands for no row.
    ``prefixes``: (old identity, new identity); 0 stands for a prefix that is not stored.
    """

    addresses: list[tuple[AddressEntry, AddressRow | None, AddressRow | None]] = field(default_factory=list)
    prefixes: list[tuple[int, int]] = field(default_factory=list)


class _SortedKeys:
    """Integers that can be looked up by range.

    Adding an integer costs constant time; the next range lookup sorts the integers.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._sorted = True

    def add(self, key: int) -> None:
        """Add a key. A key that was added twice is twice in the result of `between`."""
        if self._sorted and self._keys and key <= self._keys[-1]:
            self._sorted = False
        self._keys.append(key)

    def between(self, first: int, last: int) -> list[int]:
        """The keys from ``first`` to ``last``, both included, ascending.

        The result may contain keys that are no longer in use, until `tidy` drops them.
        """
        if not self._sorted:
            self._keys.sort()
            self._sorted = True
        begin = bisect_left(self._keys, first)
        return self._keys[begin : bisect_left(self._keys, last + 1, begin)]

    def tidy(self, live: Iterable[int], count: int) -> None:
        """Drop the keys that are not in ``live``, if more than about half of the stored keys are not.

        ``count``: the number of keys in ``live``.
        """
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
        """The context of the longest stored prefix that contains ``value`` and has at most ``longest`` bits.

        ``value``: an address, or the first address of a network, as an integer.
        """
        for length in self.ordered_lengths():
            if length <= longest:
                entry = self.lengths[length].get(value >> (self.bits - length))
                if entry is not None and entry.context is not None:
                    return entry.context
        return self.nowhere

    def tidy(self) -> None:
        """Drop contexts and keys that are not in use, if there are many."""
        self.prefix_keys.tidy(self.prefixes, len(self.prefixes))
        if len(self.contexts) > 2 * len(self.prefixes) + 64:
            live = [entry.context for entry in self.prefixes.values() if entry.context is not None]
            self.contexts = {(context.owners, context.groups): context for context in (self.nowhere, *live)}

    def ordered_lengths(self) -> list[int]:
        return sorted(self.lengths, reverse=True)

    def context(self, owners: frozenset[int], groups: frozenset[int]) -> _Context:
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
        """Add an owner to an address.

        ``node``: the number of the owner's node; 0 for this node and for an unknown node.
        """
        entry = self._address(address, journal)
        journal.assign(entry, "owners", share((*entry.owners, owner)))
        if node:
            journal.assign(entry, "nodes", share((*entry.nodes, node)))

    def remove_owner(self, address: IPAddress, owner: int, journal: Journal, node: int = 0) -> None:
        """Remove an owner from an address. ``node``: the same number as in the call of `add_owner`."""
        entry = self._address(address, journal)
        journal.assign(entry, "owners", _without(entry.owners, owner))
        if node:
            journal.assign(entry, "nodes", _without(entry.nodes, node))

    def add_group(self, address: IPAddress, group: int, journal: Journal) -> None:
        """Add an address to an address group (the backends of a service)."""
        entry = self._address(address, journal)
        journal.assign(entry, "groups", (*entry.groups, group))

    def remove_group(self, address: IPAddress, group: int, journal: Journal) -> None:
        """Remove an address from an address group."""
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
        """Add a prefix to an address group (the nets of a rule)."""
        entry = self._prefix(network, journal)
        journal.assign(entry, "groups", (*entry.groups, group))

    def remove_prefix_group(self, network: IPNetwork, group: int, journal: Journal) -> None:
        """Remove a prefix from an address group."""
        entry = self._prefix(network, journal)
        journal.assign(entry, "groups", _without(entry.groups, group))

    def claim(self, address: IPAddress, claim: Claim, journal: Journal) -> None:
        """Record that a local endpoint has the address. The caller must also add the endpoint with `add_owner`."""
        entry = self._address(address, journal)
        journal.assign(entry, "claims", tuple(sorted((*entry.claims, claim))))

    def disclaim(self, address: IPAddress, claim: Claim, journal: Journal) -> None:
        """Remove a claim that was recorded with `claim`."""
        entry = self._address(address, journal)
        journal.assign(entry, "claims", tuple(each for each in entry.claims if each != claim))

    def identity_of(self, address: IPAddress) -> int:
        """The identity of an address.

        If the address is not stored, this is the identity of the longest stored prefix that contains it, else WORLD_V4
        or WORLD_V6.
        """
        entry = self._families[address.version].addresses.get(int(address))
        return self.identity_around(address) if entry is None else entry.identity

    def identity_around(self, address: IPAddress) -> int:
        """The identity of the longest stored prefix that contains the address, whether or not the address is stored."""
        family = self._families[address.version]
        value = int(address)
        for length in family.ordered_lengths():
            prefix = family.lengths[length].get(value >> (family.bits - length))
            if prefix is not None:
                return prefix.identity
        return family.world

    # --- identities -------------------------------------------------------------------------------------------------

    def apply_changes(self, phase: Phase, draft: Draft, journal: Journal, changed: Relabelled | None = None) -> None:
        """Compute the identities of changed prefixes and addresses, and of addresses inside changed prefixes.

        The rows are written to phase ``phase`` of the draft.  Cost: linear in the changed entries and in the addresses
        inside changed prefixes.
        ``changed``: if not None, the method adds the changes to it.
        """
        for family in self._families.values():
            if family.dirty_prefixes:
                self._settle_prefixes(family, phase, draft, journal, changed)
            if family.dirty_addresses:
                self._settle_addresses(family, phase, draft, journal, changed)

    def forget_dirt(self) -> None:
        """Forget which entries were changed. Must be called after a rollback."""
        for family in self._families.values():
            family.dirty_prefixes.clear()
            family.dirty_addresses.clear()

    def _settle_prefixes(
        self, family: _Family, phase: Phase, draft: Draft, journal: Journal, changed: Relabelled | None
    ) -> None:
        rows = draft.rows(phase, "cidrs")
        for first, last in _ranges(family, family.dirty_prefixes):
            stack: list[tuple[int, _Context]] = []  # (last address, context) of each prefix around the current one
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
        # After a rollback the list may have a reused key twice; callers of `between` drop duplicates.
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
    """The row of an address with this identity and endpoint and without a node. Equal rows are the same object."""
    return AddressRow(identity, endpoint)


def _only(nodes: tuple[int, ...]) -> int:
    """The node of an address if all its owners have the same node; 0 if there is no node, or if they have several."""
    return nodes[0] if nodes and nodes.count(nodes[0]) == len(nodes) else 0


def _with(around: frozenset[int], own: tuple[int, ...]) -> frozenset[int]:
    """The union of ``around`` and ``own``.

    If ``own`` is empty, the result is the object ``around``, which saves memory.
    """
    return around.union(own) if own else around


def _without(members: tuple[int, ...], member: int) -> tuple[int, ...]:
    """``members`` without one occurrence of ``member``. Raises ValueError if there is none."""
    at = members.index(member)
    return members[:at] + members[at + 1 :]


def _ranges(family: _Family, keys: Iterable[int]) -> list[tuple[int, int]]:
    """The address ranges (first, last) of the prefixes ``keys``, ascending. Prefixes inside others are left out."""
    merged: list[tuple[int, int]] = []
    for key in sorted(keys):
        start = key >> _LENGTH_BITS
        last = start + (1 << (family.bits - (key & 255))) - 1
        if not merged or start > merged[-1][1]:
            merged.append((start, last))
    return merged
