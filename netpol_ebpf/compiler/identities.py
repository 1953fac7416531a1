# SPDX-License-Identifier: Apache-2.0
"""Identities of addresses, and the index between identities and address matches.

An identity is (family, set of owners, set of address groups). The address groups are the lists of nets, and the
services, of rules in use that contain the address. To find the identities of a match, the index begins with the match's
most selective term.  To find the matches of a new identity, the index looks up the identity's terms.  So no operation
costs identities times matches.

Invariants: WORLD_V4 and WORLD_V6, the identities without owners and groups, always exist.  An identity without
references stays until `collect`, so that every identity in use during a change has its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import exceeded
from netpol_ebpf.compiler.numbers import NumberPool
from netpol_ebpf.compiler.owners import OwnerIndex, OwnerValue, pairs
from netpol_ebpf.compiler.tables import FIRST_IDENTITY, WORLD_V4, WORLD_V6
from netpol_ebpf.compiler.terms import AddressGroup, AddressMatch, NetsTerm, ServiceTerm, Term

_NUMBERS = 1 << 31
"""How many numbers identities can have.

`Limits.identities`, which the commit checks, limits how many are in use at once.
"""

IdentityKey = tuple[int, frozenset[int], frozenset[int]]
"""The content of an identity: (family 4 or 6, owner ids, address group ids)."""


@dataclass(slots=True)
class IdentityRecord:
    """One identity. ``references``: how many addresses and prefixes have the identity."""

    number: int
    family: int
    owners: frozenset[int]
    groups: frozenset[int]
    digest: str
    references: int = 0


@dataclass(slots=True)
class AddressGroupRecord:
    """An address group (a list of nets, or a service) in use.

    ``identities``: the numbers of the identities that contain the group.
    """

    group: AddressGroup
    references: int = 0
    identities: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class MatchRecord:
    """An address match in use.

    ``positive``, ``negative``: the ids of the match's terms.  Ids of owner terms are positive numbers, ids of address
    groups negative numbers.
    """

    number: int
    match: AddressMatch
    positive: frozenset[int]
    negative: frozenset[int]
    references: int = 0

    @property
    def is_floating(self) -> bool:
        """Whether the match has no positive terms.

        Such a match is true for each identity that no negative term excludes.
        """
        return not self.positive

    def holds(self, family: int, terms: set[int]) -> bool:
        """Whether the match is true for an identity.

        ``family``: 4 or 6.  ``terms``: the ids of the terms that are true for it.
        """
        return (
            self.match.family in (0, family)
            and self.positive <= terms
            and (not self.negative or self.negative.isdisjoint(terms))
        )


@dataclass(frozen=True, slots=True)
class IdentityContent:
    """The properties that all addresses of an identity have in common.

    ``owners``: the distinct (kind, labels, named ports) of the endpoints, network sets and nodes that have or contain
    these addresses.
    ``groups``: the lists of nets, and the services, of rules that contain these addresses.
    """

    family: int
    owners: tuple[OwnerValue, ...] = ()
    groups: tuple[AddressGroup, ...] = ()

    def digest(self) -> str:
        """A hash of the content, the same in every process: the first 32 hexadecimal digits of SHA-256."""
        lines = [
            f"{kind.value} {pairs(labels)} {[(port.name, port.protocol, port.port) for port in ports]}"
            for kind, labels, ports in self.owners
        ]
        for group in self.groups:
            if isinstance(group, NetsTerm):
                lines.append("nets " + " ".join(sorted(str(net) for net in group.nets)))
            else:
                lines.append(f"service {group.namespace}/{group.name} {group.protocol} {group.port}")
        return hashlib.sha256("\n".join([str(self.family), *sorted(lines)]).encode()).hexdigest()[:32]


class IdentityIndex:
    """All identities, address groups and matches in use.

    ``known``: maps the digest of an identity's content to the number that the identity must keep from an earlier run.
    """

    def __init__(self, owners: OwnerIndex, known: Mapping[str, int] | None = None) -> None:
        self._owners = owners
        self._numbers = NumberPool(FIRST_IDENTITY, _NUMBERS)
        self._known = self._numbers.keep(known or {})
        self.identities: dict[int, IdentityRecord] = {}
        self._keys: dict[IdentityKey, int] = {}
        for number, family in ((WORLD_V4, 4), (WORLD_V6, 6)):
            key: IdentityKey = (family, frozenset(), frozenset())
            self._keys[key] = number
            self.identities[number] = IdentityRecord(
                number, *key, digest=IdentityContent(family).digest(), references=1
            )
        self.v4: set[int] = {WORLD_V4}
        self.v6: set[int] = {WORLD_V6}
        self.groups: dict[int, AddressGroupRecord] = {}
        self._group_ids: dict[AddressGroup, int] = {}
        self._next_group = 1
        self._matches: dict[AddressMatch, MatchRecord] = {}
        self._next_match = 1
        # Of each match with positive terms: one of these terms -> matches.
        self._by_positive: dict[int, set[MatchRecord]] = {}
        # Of each match without positive terms: each negative term -> matches.
        self._by_negative: dict[int, set[MatchRecord]] = {}
        self.groups_added: list[int] = []
        self.groups_removed: list[tuple[int, AddressGroup]] = []
        """``groups_added``: the address groups that came into use since the last `end_commit`.

        ``groups_removed``: those that went out of use.
        """
        self.created: list[int] = []
        """Identities created since the last `end_commit`."""
        self._unreferenced: set[int] = set()
        self._found: dict[int, frozenset[int]] = {}  # cache: match number -> identities

    # --- identities -------------------------------------------------------------------------------------------------

    def acquire(self, family: int, owners: frozenset[int], groups: frozenset[int], journal: Journal) -> int:
        """Add a reference to the identity with these owners and address groups (ids). Returns the identity's number."""
        key = (family, owners, groups)
        number = self._keys.get(key)
        if number is None:
            number = self._new_identity(key, journal)
        record = self.identities[number]
        journal.assign(record, "references", record.references + 1)
        return number

    def release(self, number: int, journal: Journal) -> None:
        """Drop a reference to an identity. `collect` removes identities without references."""
        record = self.identities[number]
        journal.assign(record, "references", record.references - 1)
        if not record.references:
            journal.add(self._unreferenced, number)

    def collect(self, journal: Journal) -> tuple[list[int], set[int]]:
        """Remove identities without references. Returns their numbers, and the ids of their owners."""
        gone = [number for number in self._unreferenced if not self.identities[number].references]
        owners: set[int] = set()
        for number in gone:
            record = journal.pop(self.identities, number)
            journal.pop(self._keys, (record.family, record.owners, record.groups))
            journal.discard(self.v4 if record.family == 4 else self.v6, number)  # noqa: PLR2004  # the family
            for owner in record.owners:
                journal.discard(self._owners.owners[owner].identities, number)
            for group in record.groups:
                if group in self.groups:
                    journal.discard(self.groups[group].identities, number)
            owners |= record.owners
            self._numbers.give_back(number, journal)
        for number in list(self._unreferenced):
            journal.discard(self._unreferenced, number)
        if gone:
            self._found.clear()
        return gone, owners

    def family_members(self, family: int) -> set[int]:
        """The numbers of all identities of a family; read-only for callers."""
        return self.v4 if family == 4 else self.v6  # noqa: PLR2004  # the family

    def terms_of(self, number: int) -> set[int]:
        """The ids of the terms that are true for an identity.

        Ids of owner terms are positive, ids of address groups negative.
        """
        record = self.identities[number]
        terms = {-group for group in record.groups}
        for owner in record.owners:
            terms |= self._owners.owners[owner].terms
        return terms

    def content_of(self, number: int) -> IdentityContent:
        """The content of an identity in use. Raises KeyError if no identity in use has this number."""
        record = self.identities[number]
        return self._content((record.family, record.owners, record.groups))

    def _content(self, key: IdentityKey) -> IdentityContent:
        family, owners, groups = key
        return IdentityContent(
            family,
            tuple(self._owners.owners[owner].value for owner in owners),
            tuple(self.groups[group].group for group in groups),
        )

    def _new_identity(self, key: IdentityKey, journal: Journal) -> int:
        family, owners, groups = key
        text = self._content(key).digest()
        number = self._known.get(text)
        if number is not None and number not in self.identities:
            # The number is kept only until the identity first appears; later it gets a number like all others.
            journal.pop(self._known, text)
        else:
            number = self._numbers.take(journal)
        if number is None:
            raise exceeded(text, "identities", _NUMBERS, _NUMBERS + 1)
        journal.put(self._keys, key, number)
        journal.put(self.identities, number, IdentityRecord(number, family, owners, groups, text))
        journal.add(self.family_members(family), number)
        for owner in owners:
            journal.add(self._owners.owners[owner].identities, number)
        for group in groups:
            journal.add(self.groups[group].identities, number)
        self.created.append(number)
        self._found.clear()
        return number

    # --- groups ------------------------------------------------------------------------------------------------------

    def group_id(self, group: AddressGroup) -> int | None:
        """The id of an address group; None if the group is not in use."""
        return self._group_ids.get(group)

    def _acquire_group(self, group: AddressGroup, journal: Journal) -> int:
        group_id = self._group_ids.get(group)
        if group_id is None:
            group_id = self._next_group
            journal.assign(self, "_next_group", group_id + 1)
            journal.put(self._group_ids, group, group_id)
            journal.put(self.groups, group_id, AddressGroupRecord(group))
            self.groups_added.append(group_id)
        record = self.groups[group_id]
        journal.assign(record, "references", record.references + 1)
        return group_id

    def _release_group(self, group_id: int, journal: Journal) -> None:
        record = self.groups[group_id]
        journal.assign(record, "references", record.references - 1)
        if not record.references:
            journal.pop(self.groups, group_id)
            journal.pop(self._group_ids, record.group)
            self.groups_removed.append((group_id, record.group))

    # --- matches ----------------------------------------------------------------------------------------------------

    def acquire_match(self, match: AddressMatch, journal: Journal) -> MatchRecord:
        """Add a reference to a match. The first reference acquires the match's terms."""
        record = self._matches.get(match)
        if record is None:
            positive = frozenset(self._acquire_term(term, journal) for term in match.positive)
            negative = frozenset(self._acquire_term(term, journal) for term in match.negative)
            record = MatchRecord(self._next_match, match, positive, negative)
            journal.assign(self, "_next_match", self._next_match + 1)
            journal.put(self._matches, match, record)
            for index, term in self._places(record):
                journal.add_to(index, term, record)
        journal.assign(record, "references", record.references + 1)
        return record

    def release_match(self, record: MatchRecord, journal: Journal) -> None:
        """Drop a reference to a match. The last reference removes the match and releases its terms."""
        journal.assign(record, "references", record.references - 1)
        if record.references:
            return
        journal.pop(self._matches, record.match)
        self._found.pop(record.number, None)
        for index, term in self._places(record):
            journal.discard_from(index, term, record)
        for term in (*record.positive, *record.negative):
            if term > 0:
                self._owners.release(term, journal)
            else:
                self._release_group(-term, journal)

    def match(self, match: AddressMatch) -> MatchRecord:
        """The record of a match. Raises KeyError if the match is not in use."""
        return self._matches[match]

    def members(self, record: MatchRecord) -> frozenset[int]:
        """The identities for which a match with positive terms is true.

        Cost: linear in the identities of the most selective term.  The result is cached until an identity or term
        changes.
        """
        found = self._found.get(record.number)
        if found is None:
            sets = sorted((self._identities_of(term) for term in record.positive), key=len)
            result = set(sets[0]).intersection(*sets[1:])
            for term in record.negative:
                result -= self._identities_of(term)
            if record.match.family:
                result &= self.family_members(record.match.family)
            found = self._found[record.number] = frozenset(result)
        return found

    def excluded(self, record: MatchRecord) -> set[int]:
        """The identities that the negative terms of a match without positive terms exclude."""
        result: set[int] = set()
        for term in record.negative:
            result |= self._identities_of(term)
        return result

    def concerning(self, number: int) -> tuple[list[MatchRecord], list[MatchRecord]]:
        """The matches that depend on the identity ``number``.

        Returns two lists: the matches with positive terms that are true for the identity, and the matches without
        positive terms that are false for the identity. Every other match without positive terms is true for all
        identities of its family.
        """
        record = self.identities[number]
        terms = self.terms_of(number)
        holding: list[MatchRecord] = []
        excluded: set[MatchRecord] = set()
        for term in terms:
            waiting = self._by_positive.get(term, ())
            holding.extend(found for found in waiting if found.holds(record.family, terms))
            excluded |= self._by_negative.get(term, set())
        return holding, list(excluded)

    def _places(self, record: MatchRecord) -> list[tuple[dict[int, set[MatchRecord]], int]]:
        """The index entries of a match, as (index, term id).

        A match with positive terms has one entry, at one of these terms.  Another match has an entry at each negative
        term.
        """
        if record.positive:
            return [(self._by_positive, min(record.positive))]
        return [(self._by_negative, term) for term in record.negative]

    def _acquire_term(self, term: Term, journal: Journal) -> int:
        if isinstance(term, (NetsTerm, ServiceTerm)):
            return -self._acquire_group(term, journal)
        return self._owners.acquire(term, journal)

    def _identities_of(self, term: int) -> set[int]:
        if term < 0:
            return self.groups[-term].identities
        found: set[int] = set()
        for owner in self._owners.terms[term].owners:
            found |= self._owners.owners[owner].identities
        return found

    def end_commit(self) -> None:
        """Clear what was recorded for one commit. Must be called after every commit, also after a failed commit."""
        self._found.clear()
        self.created.clear()
        self.groups_added.clear()
        self.groups_removed.clear()
