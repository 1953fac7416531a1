# SPDX-License-Identifier: Apache-2.0
"""Owners of addresses (endpoints, network sets, nodes), and the terms that are true for each owner.

A *term* is a condition of a rule on an owner: a selector matches the owner's labels, or the owner declares a named
port.  Objects of one kind with the same labels and named ports share one owner.  The selector index finds the owners
that a selector matches, and the selectors that match an owner, without a test of every pair.

Invariants: an owner record has exactly the terms in use that are true for the owner; a term record has exactly the
owners for which the term is true.  An owner is kept while an object refers to it (``presence``); after that, until the
end of the commit, while an identity contains it.  Named ports are resolved only among owners to which an object refers,
so owners that this commit removes do not count.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from netpol_ebpf.compiler.entries import PortPair
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.terms import NamedPortTerm, NodeTerm, ObjectTerm, OwnerTerm, SelectorTerm
from netpol_ebpf.policy.types import NamedPort
from netpol_ebpf.selector import Selector, SelectorIndex


class OwnerKind(enum.Enum):
    """The kind of an owner, which determines the terms that can be true for the owner.

    Selector terms can be true for endpoints and network sets, named port terms for endpoints, node terms for nodes, the
    object term for endpoints and nodes.
    """

    ENDPOINT = "e"
    NETWORK_SET = "s"
    NODE = "n"


LabelItems = tuple[str, ...]
"""Labels as alternating names and values, sorted by name. A tuple needs much less memory than a set of pairs."""
OwnerValue = tuple[OwnerKind, LabelItems, tuple[NamedPort, ...]]


def pairs(labels: LabelItems) -> list[tuple[str, str]]:
    """The labels as pairs (name, value), sorted by name."""
    return list(zip(labels[::2], labels[1::2], strict=True))


@dataclass(slots=True)
class OwnerRecord:
    """One distinct owner.

    ``presence``: how many objects share the owner.
    ``identities``: the numbers of the identities that contain the owner.
    ``terms``: the ids of the terms that are true for the owner.
    """

    value: OwnerValue
    presence: int = 0
    identities: set[int] = field(default_factory=set)
    terms: set[int] = field(default_factory=set)


@dataclass(slots=True)
class TermRecord:
    """A term in use.

    ``references``: how many address matches and named ports use the term.
    ``owners``: the ids of the owners for which the term is true.
    """

    term: OwnerTerm
    references: int = 0
    owners: set[int] = field(default_factory=set)


class _Labels:
    """An index between the labels of owners and the selectors of terms.

    Endpoints and network sets share one index; nodes have another.
    """

    def __init__(self) -> None:
        self.index: SelectorIndex[int, int] = SelectorIndex()

    def add_owner(self, owner: int, labels: LabelItems, journal: Journal) -> set[int]:
        """Add an owner. Returns the ids of the terms with a selector that matches the owner's labels."""
        journal.on_rollback(lambda: self.index.remove_labels(owner))
        return self.index.add_labels(owner, dict(pairs(labels)))

    def remove_owner(self, owner: int, labels: LabelItems, journal: Journal) -> None:
        self.index.remove_labels(owner)
        journal.on_rollback(lambda: self.index.add_labels(owner, dict(pairs(labels))))

    def add_selector(self, term: int, selector: Selector, journal: Journal) -> set[int]:
        """Add the selector of a term. Returns the ids of the owners with labels that the selector matches."""
        journal.on_rollback(lambda: self.index.remove_selector(term))
        return self.index.add_selector(term, selector)

    def remove_selector(self, term: int, selector: Selector, journal: Journal) -> None:
        self.index.remove_selector(term)
        journal.on_rollback(lambda: self.index.add_selector(term, selector))


NameKey = tuple["Selector | None", str]
"""A named port as a rule uses it: (selector, name).

The named port stands for the ports that endpoints declare under this name.  If the selector is not None, only endpoints
that the selector matches count.
"""


class OwnerIndex:
    """All owners of addresses, and all terms in use about owners."""

    def __init__(self) -> None:
        self.owners: dict[int, OwnerRecord] = {}
        self.terms: dict[int, TermRecord] = {}
        self._owner_ids: dict[OwnerValue, int] = {}
        self._term_ids: dict[OwnerTerm, int] = {}
        self._labelled = _Labels()
        self._nodes = _Labels()
        self._declaring: dict[str, set[int]] = {}  # port name -> owners that declare it
        self._named_terms: dict[str, set[int]] = {}  # port name -> NamedPortTerm ids
        # named port -> (id of the selector's term, {(protocol, port): how many owners in use declare it})
        self._names: dict[NameKey, tuple[int | None, dict[PortPair, int]]] = {}
        self._names_by_name: dict[str, set[NameKey]] = {}
        self._name_references: dict[NameKey, int] = {}
        self._next_owner = 1
        self._next_term = 1
        self.changed_names: set[NameKey] = set()
        """Named ports for which the set of declared ports changed in this commit. The compiler clears the set at the
        end of each commit.
        """

    # --- owners -----------------------------------------------------------------------------------------------------

    def appear(self, kind: OwnerKind, labels: Mapping[str, str], ports: Iterable[NamedPort], journal: Journal) -> int:
        """Add a reference to the owner of objects with this kind, these labels and ports. Returns the owner's id."""
        value: OwnerValue = (kind, tuple(chain.from_iterable(sorted(labels.items()))), tuple(sorted(set(ports))))
        owner = self._owner_ids.get(value)
        if owner is None:
            owner = self._new_owner(value, journal)
        record = self.owners[owner]
        if not record.presence:
            self._count_ports(owner, 1, journal)
        journal.assign(record, "presence", record.presence + 1)
        return owner

    def disappear(self, owner: int, journal: Journal) -> None:
        """Drop the reference of one object to its owner."""
        record = self.owners[owner]
        journal.assign(record, "presence", record.presence - 1)
        if not record.presence:
            self._count_ports(owner, -1, journal)

    def collect(self, owner: int, journal: Journal) -> None:
        """Remove the owner if no object refers to it and no identity contains it."""
        record = self.owners.get(owner)
        if record is None or record.presence or record.identities:
            return
        kind, labels, ports = record.value
        (self._nodes if kind is OwnerKind.NODE else self._labelled).remove_owner(owner, labels, journal)
        for term in record.terms:
            journal.discard(self.terms[term].owners, owner)
        for port in ports:
            if owner in self._declaring.get(port.name, ()):
                journal.discard_from(self._declaring, port.name, owner)
        journal.pop(self._owner_ids, record.value)
        journal.pop(self.owners, owner)

    def _new_owner(self, value: OwnerValue, journal: Journal) -> int:
        kind, labels, ports = value
        owner = self._next_owner
        journal.assign(self, "_next_owner", owner + 1)
        record = OwnerRecord(value)
        journal.put(self._owner_ids, value, owner)
        journal.put(self.owners, owner, record)
        terms = (self._nodes if kind is OwnerKind.NODE else self._labelled).add_owner(owner, labels, journal)
        for port in ports if kind is OwnerKind.ENDPOINT else ():
            journal.add_to(self._declaring, port.name, owner)
            for term in self._named_terms.get(port.name, ()):
                named = self.terms[term].term
                if isinstance(named, NamedPortTerm) and self._declares(named, value):
                    terms.add(term)
        any_object = self._term_ids.get(ObjectTerm())
        if any_object is not None and kind is not OwnerKind.NETWORK_SET:
            terms.add(any_object)
        for term in terms:
            journal.add(self.terms[term].owners, owner)
        record.terms = terms
        return owner

    @staticmethod
    def _declares(term: NamedPortTerm, value: OwnerValue) -> bool:
        _, labels, ports = value
        return NamedPort(term.name, term.protocol, term.port) in ports and (
            term.selector is None or term.selector.matches(dict(pairs(labels)))
        )

    # --- terms ------------------------------------------------------------------------------------------------------

    def term_id(self, term: OwnerTerm) -> int:
        """The id of a term. Raises KeyError if the term is not in use."""
        return self._term_ids[term]

    def acquire(self, term: OwnerTerm, journal: Journal) -> int:
        """Add a reference to a term. Returns the term's id."""
        term_id = self._term_ids.get(term)
        if term_id is None:
            term_id = self._next_term
            journal.assign(self, "_next_term", term_id + 1)
            record = TermRecord(term)
            journal.put(self._term_ids, term, term_id)
            journal.put(self.terms, term_id, record)
            record.owners = self._owners_of(term, term_id, journal)
            for owner in record.owners:
                journal.add(self.owners[owner].terms, term_id)
        record = self.terms[term_id]
        journal.assign(record, "references", record.references + 1)
        return term_id

    def release(self, term_id: int, journal: Journal) -> None:
        """Drop a reference to a term, and remove the term with its last reference."""
        record = self.terms[term_id]
        journal.assign(record, "references", record.references - 1)
        if record.references:
            return
        for owner in record.owners:
            journal.discard(self.owners[owner].terms, term_id)
        term = record.term
        if isinstance(term, NamedPortTerm):
            journal.discard_from(self._named_terms, term.name, term_id)
        elif not isinstance(term, ObjectTerm):
            labels = self._nodes if isinstance(term, NodeTerm) else self._labelled
            labels.remove_selector(term_id, term.selector, journal)
        journal.pop(self.terms, term_id)
        journal.pop(self._term_ids, term)

    def _owners_of(self, term: OwnerTerm, term_id: int, journal: Journal) -> set[int]:
        if isinstance(term, SelectorTerm):
            return self._labelled.add_selector(term_id, term.selector, journal)
        if isinstance(term, NodeTerm):
            return self._nodes.add_selector(term_id, term.selector, journal)
        if isinstance(term, ObjectTerm):
            return {owner for owner, record in self.owners.items() if record.value[0] is not OwnerKind.NETWORK_SET}
        journal.add_to(self._named_terms, term.name, term_id)
        declaring = self._declaring.get(term.name, ())
        return {owner for owner in declaring if self._declares(term, self.owners[owner].value)}

    # --- names ------------------------------------------------------------------------------------------------------

    def named(self, key: NameKey) -> frozenset[PortPair]:
        """The ports for which a named port stands. Raises KeyError if the name is not in use (see `acquire_name`)."""
        return frozenset(self._names[key][1])

    def acquire_name(self, key: NameKey, journal: Journal) -> None:
        """Add a reference to a named port.

        While a named port is in use, ``changed_names`` reports changes of its ports.
        """
        references = self._name_references.get(key, 0)
        journal.put(self._name_references, key, references + 1)
        if references:
            return
        selector, name = key
        term = None if selector is None else self.acquire(SelectorTerm(selector), journal)
        pairs: dict[PortPair, int] = {}
        for owner in self._declaring.get(name, ()):
            record = self.owners[owner]
            if record.presence and (term is None or term in record.terms):
                for port in record.value[2]:
                    if port.name == name:
                        pair = (port.protocol, port.port)
                        pairs[pair] = pairs.get(pair, 0) + 1
        journal.put(self._names, key, (term, pairs))
        journal.add_to(self._names_by_name, name, key)

    def release_name(self, key: NameKey, journal: Journal) -> None:
        """Drop a reference to a named port."""
        references = self._name_references[key]
        if references > 1:
            journal.put(self._name_references, key, references - 1)
            return
        journal.pop(self._name_references, key)
        term, _ = journal.pop(self._names, key)
        if term is not None:
            self.release(term, journal)
        journal.discard_from(self._names_by_name, key[1], key)

    def _count_ports(self, owner: int, step: int, journal: Journal) -> None:
        """Update the ports of named ports for an owner that appeared (``step`` 1) or disappeared (``step`` -1)."""
        record = self.owners[owner]
        if record.value[0] is not OwnerKind.ENDPOINT:
            return
        for port in record.value[2]:
            for key in self._names_by_name.get(port.name, ()):
                term, pairs = self._names[key]
                if term is not None and term not in record.terms:
                    continue
                pair = (port.protocol, port.port)
                count = pairs.get(pair, 0) + step
                if count:
                    journal.put(pairs, pair, count)
                else:
                    journal.pop(pairs, pair)
                if count == 0 or (count == 1 and step == 1):
                    self.changed_names.add(key)
