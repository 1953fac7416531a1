# SPDX-License-Identifier: Apache-2.0
"""Domain names in the tables: domain lists of verdicts, classes of names, and the patterns that give a name its class.

A *pattern set* is the set of patterns of one rule, or of the network sets that one rule selects.  A *domain list* has
the rules with pattern sets that may match before a verdict's own rule, in order.  A *name class* is the set of pattern
sets that match a name.  So the names that an endpoint learned for an address decide with one look-up for each class,
whatever the number of rules and patterns is (docs/adr/0023-domain-names.md).

Invariants: for each domain list and each name class that have a pattern set in common, the table ``domains`` has a row.
The row of a pattern in ``names`` has the class of all pattern sets that match at this pattern, so that the most specific
pattern alone decides.  A name class keeps its number until `DomainIndex.forget`, because endpoints may have learned it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations, islice

from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import Limits
from netpol_ebpf.compiler.registers import RowRegister
from netpol_ebpf.compiler.tables import NO_RANK, Candidate, DesiredTable, DomainList, DomainRow, PatternSet

NameClass = frozenset[PatternSet]
"""The content of a name class: the pattern sets that match its names."""

WILDCARD = "*."


def is_inner(pattern: str) -> bool:
    """Whether the ``*`` of a pattern is not its first label. No row of ``names`` can have such a pattern."""
    return "*" in pattern.split(".")[1:]


def inner_matches(pattern: str, name: str) -> bool:
    """Whether a pattern whose ``*`` is not its first label matches a name."""
    head, tail = pattern.split("*")
    return name.startswith(head) and name.endswith(tail) and len(name) > len(head) + len(tail)


def parents(name: str) -> Iterator[str]:
    """The wildcard patterns that match a name, the most specific one first."""
    labels = name.split(".")
    for first in range(1, len(labels)):
        yield WILDCARD + ".".join(labels[first:])


def most_specific(name: str, rows: DesiredTable[str, int]) -> int:
    """The class of a name: that of the most specific row that matches the name; 0 if there is none."""
    return next((class_ for pattern in (name, *parents(name)) if (class_ := rows.get(pattern)) is not None), 0)


@dataclass(slots=True)
class _Use:
    """How a pattern set is used.

    ``references``: how many domain lists have it.
    ``lists``, ``classes``: the numbers of the domain lists and of the name classes that have it.
    """

    references: int = 0
    lists: set[int] = field(default_factory=set)
    classes: set[int] = field(default_factory=set)


class DomainIndex:
    """All domain lists, name classes and patterns in use.

    ``kept``: the numbers of the name classes of an earlier run, by content.
    """

    def __init__(self, limits: Limits, kept: Mapping[NameClass, int] | None = None) -> None:
        self._lists: RowRegister[DomainList] = RowRegister("domain_lists", limits.domain_lists)
        self._kept = {content: number for content, number in (kept or {}).items() if content}
        self._classes: RowRegister[NameClass] = RowRegister("name_classes", limits.name_classes, self._kept)
        self._uses: dict[PatternSet, _Use] = {}
        self._by_pattern: dict[str, set[PatternSet]] = {}
        self._inner: set[str] = set()
        self._asked: frozenset[str] = frozenset()
        self._seen: dict[str, None] = {}  # the name that got its row first comes first
        self._most_seen = min(limits.seen_names, limits.names // 2)
        self._rows: dict[str, int] = {}  # pattern -> number of its name class; 0: no pattern set matches
        self._learned: set[int] = set()  # name classes with a reference for the endpoints that may have learned them
        self._created: dict[int, NameClass] = {}
        self._adopted: set[int] = set()
        self._having: dict[str, set[PatternSet]] = {}  # pattern -> the pattern sets of name classes that have it
        self._lists_of: dict[int, set[int]] = {}  # name class -> the domain lists with which it has a row
        self._classes_of: dict[int, set[int]] = {}  # domain list -> the name classes with which it has a row
        self._dirty: set[str] = set()
        self._new_lists: dict[int, DomainList] = {}

    # --- lists --------------------------------------------------------------------------------------------------------

    def acquire(self, value: DomainList, what: str, draft: Draft, journal: Journal) -> int:
        """Add a reference to a domain list, and return its number. Raises LimitError if all numbers are in use."""
        is_new = not self._lists.has(value)
        number = self._lists.acquire(value, what, draft, journal)
        if is_new:
            journal.put(self._new_lists, number, value)
            for patterns in value.pattern_sets:
                use = self._use(patterns, journal)
                if not use.references:
                    self._index(patterns, journal)
                journal.assign(use, "references", use.references + 1)
                journal.add(use.lists, number)
        return number

    def release(self, number: int, journal: Journal) -> None:
        """Drop a reference to a domain list."""
        self._lists.release(number, journal)

    def value_of(self, number: int) -> DomainList:
        """The content of a domain list."""
        return self._lists.value_of(number)

    def _use(self, patterns: PatternSet, journal: Journal) -> _Use:
        use = self._uses.get(patterns)
        if use is None:
            use = _Use()
            journal.put(self._uses, patterns, use)
        return use

    def _index(self, patterns: PatternSet, journal: Journal) -> None:
        for pattern in patterns:
            journal.add_to(self._by_pattern, pattern, patterns)
            if is_inner(pattern):
                journal.add(self._inner, pattern)
            journal.add(self._dirty, pattern)

    def _drop(self, patterns: PatternSet, number: int, journal: Journal) -> None:
        use = self._uses[patterns]
        journal.assign(use, "references", use.references - 1)
        journal.discard(use.lists, number)
        if use.references:
            return
        for pattern in patterns:
            journal.discard_from(self._by_pattern, pattern, patterns)
            if pattern in self._inner and pattern not in self._by_pattern:
                journal.discard(self._inner, pattern)
            journal.add(self._dirty, pattern)
        if not use.classes:
            journal.pop(self._uses, patterns)

    # --- names --------------------------------------------------------------------------------------------------------

    @property
    def unused(self) -> frozenset[int]:
        """The name classes that no pattern gives any more, but that endpoints may have learned."""
        return frozenset(self._learned - set(self._rows.values()))

    def forget(self, numbers: Iterable[int], journal: Journal) -> None:
        """Let name classes go that no endpoint has learned. Classes that a pattern still gives are kept."""
        for number in sorted(self.unused & set(numbers)):
            journal.discard(self._learned, number)
            self._classes.release(number, journal)

    def wants(self, name: str) -> bool:
        """Whether an inner wildcard matches the name, which has no row of its own yet."""
        return (
            name not in self._rows and "*" not in name and any(inner_matches(pattern, name) for pattern in self._inner)
        )

    def see(self, names: Iterable[str]) -> None:
        """Give rows of their own, in this commit, to names that endpoints asked for and that an inner wildcard matches.

        Endpoints choose the names, so only the latest `Limits.seen_names` of them keep their rows, and at most as many
        as half of the table has.
        """
        self._asked = frozenset(name for name in names if "*" not in name)  # a star would make it a pattern

    def content_of(self, name: str) -> NameClass:
        """The pattern sets that match a name, or that match all names of a wildcard that no longer wildcard matches."""
        is_wildcard = name.startswith(WILDCARD)
        found = set(self._by_pattern.get(name, ()))
        for pattern in parents(name.removeprefix(WILDCARD) if is_wildcard else name):
            found |= self._by_pattern.get(pattern, set())
        if not is_wildcard:
            for pattern in self._inner:
                if inner_matches(pattern, name):
                    found |= self._by_pattern[pattern]
        return frozenset(found)

    # --- the end of a commit ------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `end_commit` must be called. False in each commit that has nothing to do with names."""
        return bool(
            self._kept
            or self._new_lists
            or self._dirty
            or self._asked
            or self._lists.has_unreferenced
            or self._classes.has_unreferenced
        )

    def end_commit(self, what: str, draft: Draft, journal: Journal) -> None:
        """Write the rows of all lists, classes and patterns that changed. Must be called at the end of a commit.

        Raises LimitError. ``what``: the object that the error names.
        """
        self._adopt(draft, journal)
        dropped = self._lists.collect(draft, journal)
        for number, value in dropped.items():
            for patterns in value.pattern_sets:
                self._drop(patterns, number, journal)
        self._update_rows(what, draft, journal)
        self._write_rows(draft, journal)
        deletes = draft.rows(Phase.SHRINK, "domains")
        for number in dropped.keys() & self._classes_of.keys():
            for class_ in journal.pop(self._classes_of, number):
                journal.discard_from(self._lists_of, class_, number)
                deletes[(number, class_)] = DELETED
        for class_, content in self._classes.collect(draft, journal).items():
            for number in journal.pop(self._lists_of, class_) if class_ in self._lists_of else ():
                journal.discard_from(self._classes_of, number, class_)
                deletes[(number, class_)] = DELETED
            for patterns in content:
                self._drop_class(patterns, class_, journal)
        for number in list(self._new_lists):
            journal.pop(self._new_lists, number)
        for number in list(self._created):
            journal.pop(self._created, number)
        for pattern in list(self._dirty):
            journal.discard(self._dirty, pattern)

    def _adopt(self, draft: Draft, journal: Journal) -> None:
        """At the first commit, take over the name classes that endpoints may have learned in an earlier run."""
        for content in list(self._kept):
            journal.pop(self._kept, content)
            number = self._class_of(content, "", draft, journal)
            journal.add(self._learned, number)
            journal.add(self._adopted, number)

    def _class_of(self, content: NameClass, what: str, draft: Draft, journal: Journal) -> int:
        """Add a reference to a name class and return its number; 0 for the empty class."""
        if not content:
            return 0
        is_new = not self._classes.has(content)
        number = self._classes.acquire(content, what, draft, journal)
        if is_new:
            journal.put(self._created, number, content)
            for patterns in content:
                use = self._use(patterns, journal)
                if not use.classes:
                    for pattern in patterns:
                        journal.add_to(self._having, pattern, patterns)
                journal.add(use.classes, number)
        return number

    def _update_rows(self, what: str, draft: Draft, journal: Journal) -> None:
        """Give the changed patterns, and the patterns below them, their rows in ``names``."""
        flip, shrink = draft.rows(Phase.FLIP, "names"), draft.rows(Phase.SHRINK, "names")
        self._update_seen(journal)
        for pattern in self._affected():
            before = self._rows.get(pattern)
            if not self._is_row(pattern):
                if before is not None:
                    journal.pop(self._rows, pattern)
                    shrink[pattern] = DELETED
                    if before:
                        self._classes.release(before, journal)
                continue
            number = self._class_of(self.content_of(pattern), what, draft, journal)
            if number and number not in self._learned:
                journal.add(self._learned, number)
                self._classes.acquire(self._classes.value_of(number), what, draft, journal)
            if before:
                self._classes.release(before, journal)
            if before != number:
                journal.put(self._rows, pattern, number)
                flip[pattern] = number

    def _update_seen(self, journal: Journal) -> None:
        """Add the names that endpoints asked for; remove names that no inner wildcard matches, then the oldest ones."""
        inner_changed = any(is_inner(pattern) for pattern in self._dirty)
        for name in [*(self._seen if inner_changed else ()), *sorted(self._asked)]:
            is_matched = any(inner_matches(pattern, name) for pattern in self._inner)
            if is_matched == (name in self._seen):
                continue
            if is_matched:
                journal.put(self._seen, name, None)
            else:
                journal.pop(self._seen, name)
            journal.add(self._dirty, name)
        self._asked = frozenset()
        for name in list(islice(self._seen, max(0, len(self._seen) - self._most_seen))):
            journal.pop(self._seen, name)
            journal.add(self._dirty, name)

    def _is_row(self, pattern: str) -> bool:
        """Whether ``names`` has a row for the pattern, or for the name to which a wildcard is added.

        The latter row keeps ``*.example.com`` from matching ``example.com``.
        """
        if is_inner(pattern):
            return False
        return pattern in self._by_pattern or pattern in self._seen or WILDCARD + pattern in self._by_pattern

    def _affected(self) -> set[str]:
        """The patterns whose rows may change: those that changed, and those that a changed wildcard matches.

        Cost: linear in the rows for all changed wildcards ``*.x`` together, and for each changed inner wildcard.
        """
        inner = [pattern for pattern in self._dirty if is_inner(pattern)]
        found = self._dirty - set(inner)
        wildcards = {pattern for pattern in found if pattern.startswith(WILDCARD)}
        found |= {pattern.removeprefix(WILDCARD) for pattern in wildcards}
        rows = [*self._rows, *found] if wildcards or inner else []
        if wildcards:
            found.update(row for row in rows if not wildcards.isdisjoint(parents(row)))
        for pattern in inner:
            found.update(row for row in rows if not row.startswith(WILDCARD) and inner_matches(pattern, row))
        return found

    def _drop_class(self, patterns: PatternSet, number: int, journal: Journal) -> None:
        use = self._uses[patterns]
        journal.discard(use.classes, number)
        if use.classes:
            return
        for pattern in patterns:
            journal.discard_from(self._having, pattern, patterns)
        if not use.references:
            journal.pop(self._uses, patterns)

    def _write_rows(self, draft: Draft, journal: Journal) -> None:
        """Write the rows of new lists for all classes, and of new classes for all lists.

        A class that is made now has every pattern set that matches its names.  An older class lacks newer pattern sets,
        but matches those that contain one of its own.
        """
        pairs: dict[tuple[int, int], None] = {}
        has_older = bool(self._adopted) or len(self._classes) > len(self._created)
        for number, value in self._new_lists.items():
            if not self._lists.has(value):
                continue  # dropped in the same commit
            for patterns in value.pattern_sets:
                for one in self._within(patterns) if has_older else (patterns,):
                    pairs.update(dict.fromkeys((number, class_) for class_ in self._uses[one].classes))
        for class_, content in self._created.items():
            for patterns in content:
                pairs.update(dict.fromkeys((number, class_) for number in self._uses[patterns].lists))
        rows = draft.rows(Phase.GROW, "domains")
        for number, class_ in pairs:
            rows[(number, class_)] = domain_row(self._lists.value_of(number), self._classes.value_of(class_))
            journal.add_to(self._classes_of, number, class_)
            journal.add_to(self._lists_of, class_, number)
        for class_ in list(self._adopted):
            journal.discard(self._adopted, class_)

    def _within(self, patterns: PatternSet) -> set[PatternSet]:
        """The pattern sets of name classes that are part of ``patterns``, and ``patterns``."""
        having = [self._having.get(pattern, set()) for pattern in patterns]
        if sum(map(len, having)) <= 1 << len(patterns):
            return {one for sets in having for one in sets if one <= patterns} | {patterns}
        parts = chain.from_iterable(combinations(patterns, size) for size in range(1, len(patterns) + 1))
        return {one for one in map(frozenset, parts) if one in self._uses and self._uses[one].classes} | {patterns}


def domain_row(value: DomainList, content: NameClass) -> DomainRow:
    """The first rules of a domain list that match the names of a class."""
    rank, enforced = _first(value.enforced, content)
    staged_rank, pending = _first(value.pending, content)
    return DomainRow(rank, staged_rank, enforced.rule, pending.rule, enforced.log_list)


_NOBODY = Candidate(frozenset(), 0)


def _first(candidates: tuple[Candidate, ...], content: NameClass) -> tuple[int, Candidate]:
    """The first candidate that matches the names of a class, with its rank.

    A pattern set of the class that is part of the candidate's patterns matches these names, so the candidate does.
    """
    for rank, candidate in enumerate(candidates):
        if candidate.patterns in content or any(patterns <= candidate.patterns for patterns in content):
            return rank, candidate
    return NO_RANK, _NOBODY
