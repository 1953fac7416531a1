# SPDX-License-Identifier: Apache-2.0
"""A canonical form of compiled tables, for comparison: their content without the numbers that depend on history.

Two compilers with the same objects have equal canonical forms, whatever the order in which objects were added and
removed.  The form is read from the tables alone.  So two forms also differ if one of the tables has rows to which
nothing refers (a leak).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import product

from netpol_ebpf.compiler.reader import AddressClass, PolicySetReader, TableReader
from netpol_ebpf.compiler.tables import WORLD_V4, WORLD_V6, CompiledTables, DomainList, DomainRow, SetRow

_WORLDS = {WORLD_V4: "world 4", WORLD_V6: "world 6"}


def _set(policy: PolicySetReader, names: Mapping[int, str]) -> Hashable:
    """A policy set as a value for comparison: its verdicts and named rules by peer, own side, port and source port.

    Peers with equal verdicts are one group.
    ``names``: maps an identity's number to the digest of its content.
    """

    def members(addresses: AddressClass) -> frozenset[str]:
        return frozenset(names[identity] for identity in addresses.identities)

    alike: dict[Hashable, set[str]] = {}
    for peer, peers in policy.peers.items():
        verdicts = frozenset(
            (
                members(owns),
                l4,
                source_ports,
                policy.verdict(peer, own, l4_class, source_class),
                policy.named(peer, own, l4_class, source_class),
            )
            for (own, owns), (l4_class, l4), (source_class, source_ports) in product(
                policy.owns.items(), policy.l4.items(), policy.source_ports.items()
            )
        )
        alike.setdefault(verdicts, set()).update(members(peers))
    return frozenset((frozenset(found), verdicts) for verdicts, found in alike.items())


def canonical(tables: CompiledTables) -> dict[str, Hashable]:
    """The canonical form of ``tables``, to be compared with ``==``.

    Cost: linear in all rows and in the cells of all policy sets in use.
    """
    reader = TableReader(tables)
    names = {**dict(tables.identities.items()), **_WORLDS}
    lists = {number: _domain_list(tables, value) for number, value in tables.domain_lists.items()}
    classes = dict(tables.name_classes.items())
    sets = {row: _set(reader.policy_set(row), names) for row in _sets_in_use(tables)}
    keys = {row.number: key for key, row in tables.endpoints.items()}
    nodes = {number: name for name, number in tables.nodes.items()}
    return {
        "endpoints": frozenset(
            (key, slot, sets[set_row]) for key, row in tables.endpoints.items() for slot, set_row in row.sets.items()
        ),
        "addresses": frozenset(
            (
                address,
                names[row.identity],
                keys[row.endpoint] if row.endpoint else None,
                nodes[row.node] if row.node else None,
            )
            for address, row in tables.addresses.items()
        ),  # fmt: skip
        "nodes": frozenset(nodes.values()),
        "cidrs": frozenset((network, names[identity]) for network, identity in tables.cidrs.items()),
        "identities": frozenset(digest for _, digest in tables.identities.items()),
        "atoms": (frozenset(reader.atoms.values()), frozenset(reader.source_atoms.values())),
        "rules": frozenset(cause for _, cause in tables.rules.items()),
        "names": frozenset((pattern, classes.get(number)) for pattern, number in tables.names.items()),
        "name classes": frozenset(classes.values()),
        "domains": frozenset(
            (lists[number], classes[class_], _domain_row(tables, row))
            for (number, class_), row in tables.domains.items()
        ),
        "domain lists": frozenset(lists.values()),
        "rows of no set": len({number for number, _ in tables.peer_classes} - _numbers_in_use(tables)),
    }


def _domain_list(tables: CompiledTables, value: DomainList) -> Hashable:
    """A domain list with causes in place of rule numbers."""
    return tuple(
        tuple((one.patterns, tables.rules[one.rule], _logs(tables, one.log_list)) for one in candidates)
        for candidates in (value.enforced, value.pending)
    )


def _domain_row(tables: CompiledTables, row: DomainRow) -> Hashable:
    causes = tuple(tables.rules[rule] if rule else None for rule in (row.rule, row.staged_rule))
    return (row.rank, row.staged_rank, *causes, _logs(tables, row.log_list))


def _logs(tables: CompiledTables, log_list: int) -> Hashable:
    return tuple(tables.rules[rule] for rule in tables.log_lists[log_list]) if log_list else ()


def _sets_in_use(tables: CompiledTables) -> set[SetRow]:
    return {set_row for _, row in tables.endpoints.items() for set_row in row.sets.values()}


def _numbers_in_use(tables: CompiledTables) -> set[int]:
    """The numbers of the class tables to which policy sets in use refer, for the peer's or the own side."""
    rows = _sets_in_use(tables)
    return {row.number for row in rows} | {row.own_set for row in rows}
