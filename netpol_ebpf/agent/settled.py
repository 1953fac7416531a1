# SPDX-License-Identifier: Apache-2.0
"""Assignments that a look at the node's interfaces need not decide again, since nothing that they depend on changed.

An assignment *settles* when a look finds it as the look before left it (`InterfaceAssignments` decides that).  It stays
settled until something changes that the decision depends on: the endpoint, its interface, the interface's record, the
routes to the endpoint's addresses, the results of CNI plugins for it, or an interface to which stronger evidence may
lead.  A look without settled assignments decides everything.

Invariant: a look decides the same with settled assignments and without.  In doubt an assignment is not settled.  Makes
no system call and decides no assignment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from netpol_ebpf.agent.derived_names import derived_hash, hash_in
from netpol_ebpf.agent.wiring import Wiring
from netpol_ebpf.policy.types import Endpoint, EndpointKey, IPAddress

if TYPE_CHECKING:
    from netpol_ebpf.agent.assignments import Evidence, InterfaceRecord


Peer = tuple[int, int]
"""The other end of a pair: namespace id, and interface index there."""


class LookInputs(NamedTuple):
    """The inputs of a look.

    ``stated``: interfaces with an address that this node's Node object states.  ``results``: by pod, names of
    interfaces that CNI plugins made.
    """

    wiring: Wiring
    endpoints: Mapping[EndpointKey, Endpoint]
    stated: frozenset[int]
    results: Mapping[EndpointKey, Collection[str]]


class Settled(NamedTuple):
    """A settled assignment: the endpoint, the evidence, and the record of the interface."""

    endpoint: Endpoint
    evidence: Evidence
    record: InterfaceRecord


def can_settle(endpoint: Endpoint, ifindex: int, now: LookInputs) -> bool:
    """Whether `still_settled` notices all changes that concern the assignment of an endpoint to an interface.

    It does not notice changes of an interface that another host route of the endpoint leads to, nor of the name in the
    endpoint's object.
    """
    routes = now.wiring.host_routes
    return endpoint.interface is None and {routes.get(one, ifindex) for one in endpoint.addresses} <= {ifindex}


def still_settled(
    settled: Mapping[int, Settled], before: LookInputs, now: LookInputs, records: Mapping[int, InterfaceRecord]
) -> dict[int, Settled]:
    """The assignments of ``settled``, by interface, that stay settled.

    ``before``: the inputs of the look that returned ``settled``.  ``records``: the present records of interfaces.
    Cost: linear, with a few comparisons by identity for each endpoint and link.
    """
    old, new = before.wiring, now.wiring
    changed = _changed_links(old, new)
    if (old.uplinks | before.stated, old.subnets) != (new.uplinks | now.stated, new.subnets):
        return {}
    if changed and any(not changed.keys().isdisjoint(interfaces) for interfaces in new.subnets.values()):
        return {}
    behind = _changed_peers(old.peer_addresses, new.peer_addresses)
    moved = _moved_addresses(old.host_routes, new.host_routes)
    concerned = _concerned_by_name({name for names in changed.values() for name in names}, settled, before, now)
    found = {}
    for ifindex, one in settled.items():
        endpoint, record = one.endpoint, one.record
        if (
            now.endpoints.get(endpoint.key) is endpoint
            and records.get(ifindex) is record
            and ifindex not in changed
            and endpoint.key not in concerned
            and (not moved or moved.isdisjoint(endpoint.addresses))
            and (record.first or not behind or new.links[ifindex].peer not in behind)
        ):
            found[ifindex] = one
    return found


def _changed_peers(before: Mapping[Peer, object], now: Mapping[Peer, object]) -> set[Peer]:
    """Other ends of pairs with other addresses than before."""
    if before == now:
        return set()
    return {peer for peer in before.keys() | now.keys() if before.get(peer) != now.get(peer)}


def _changed_links(before: Wiring, now: Wiring) -> dict[int, set[str]]:
    """Interfaces that came, went or changed, each with its names before and now."""
    found: dict[int, set[str]] = {}
    for ifindex, link in now.links.items():
        known = before.links.get(ifindex)
        if known is not link and known != link:
            found[ifindex] = {link.name} if known is None else {link.name, known.name}
    for ifindex in before.links.keys() - now.links.keys():
        found[ifindex] = {before.links[ifindex].name}
    return found


def _moved_addresses(before: Mapping[IPAddress, int], now: Mapping[IPAddress, int]) -> set[IPAddress]:
    """Addresses with a host route that came, went, or leads to another interface."""
    if before == now:
        return set()
    found = {one for one, ifindex in now.items() if before.get(one) != ifindex}
    if len(before) + len(found) != len(now):  # not only new ones
        found |= before.keys() - now.keys()
    return found


def _concerned_by_name(
    names: Collection[str], settled: Mapping[int, Settled], before: LookInputs, now: LookInputs
) -> set[EndpointKey]:
    """Endpoints whose evidence by name may have changed.

    ``names``: of interfaces that came, went or changed.
    """
    found: set[EndpointKey] = set()
    hashes = {hash_in(name) for name in names} - {None}
    if hashes:
        found |= {one.endpoint.key for one in settled.values() if derived_hash(one.endpoint.key) in hashes}
    if before.results or now.results:
        for one in settled.values():
            made, made_before = now.results.get(one.endpoint.key), before.results.get(one.endpoint.key)
            if made != made_before or not set(names).isdisjoint(made or ()):
                found.add(one.endpoint.key)
    return found
