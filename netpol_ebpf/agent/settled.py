# SPDX-License-Identifier: Apache-2.0
"""Settled assignments, which the search for workloads' interfaces need not decide again.

An assignment *settles* when a search leaves it as it was before (`InterfaceAssignments` decides that). It stays settled
until something changes on which the decision depends: the endpoint, its interface, the interface's record, the routes
to the endpoint's addresses, the results of CNI plugins for the endpoint, or an interface to which stronger evidence may
lead. A search without settled assignments decides everything.

Invariant: a search has the same result with settled assignments and without. In doubt an assignment is not settled.
This module makes no system call and decides no assignment.
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
"""The other end of a veth or netkit pair: (namespace id, interface index there)."""


class LookInputs(NamedTuple):
    """The inputs of a search for workloads' interfaces.

    ``endpoints``: by key. ``stated``: interfaces with an address that is in this node's Node object. ``results``: names
    of the interfaces that CNI plugins made for each pod.
    """

    wiring: Wiring
    endpoints: Mapping[EndpointKey, Endpoint]
    stated: frozenset[int]
    results: Mapping[EndpointKey, Collection[str]]


class Settled(NamedTuple):
    """A settled assignment: the endpoint, the evidence for its interface, and the interface's stored record."""

    endpoint: Endpoint
    evidence: Evidence
    record: InterfaceRecord


def can_settle(endpoint: Endpoint, ifindex: int, now: LookInputs) -> bool:
    """Whether `still_settled` notices every change that concerns an endpoint's assignment to an interface.

    It does not notice changes of an interface to which another host route of the endpoint leads, or of the interface
    that the endpoint's object names.
    """
    routes = now.wiring.host_routes
    return endpoint.interface is None and {routes.get(one, ifindex) for one in endpoint.addresses} <= {ifindex}


def still_settled(
    settled: Mapping[int, Settled], before: LookInputs, now: LookInputs, records: Mapping[int, InterfaceRecord]
) -> dict[int, Settled]:
    """The assignments in ``settled``, by interface index, that are still settled.

    ``before``: the inputs of the search that returned ``settled``. ``now``: the present inputs. ``records``: the
    present records of interfaces. Cost: linear, with a few comparisons by identity for each endpoint and link.
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
    """The other ends of pairs whose addresses differ from those before."""
    if before == now:
        return set()
    return {peer for peer in before.keys() | now.keys() if before.get(peer) != now.get(peer)}


def _changed_links(before: Wiring, now: Wiring) -> dict[int, set[str]]:
    """The indices of interfaces that appeared, vanished or changed, each with its old and new name."""
    found: dict[int, set[str]] = {}
    for ifindex, link in now.links.items():
        known = before.links.get(ifindex)
        if known is not link and known != link:
            found[ifindex] = {link.name} if known is None else {link.name, known.name}
    for ifindex in before.links.keys() - now.links.keys():
        found[ifindex] = {before.links[ifindex].name}
    return found


def _moved_addresses(before: Mapping[IPAddress, int], now: Mapping[IPAddress, int]) -> set[IPAddress]:
    """The addresses whose host route appeared, vanished, or leads to another interface."""
    if before == now:
        return set()
    found = {one for one, ifindex in now.items() if before.get(one) != ifindex}
    if len(before) + len(found) != len(now):  # not only new ones
        found |= before.keys() - now.keys()
    return found


def _concerned_by_name(
    names: Collection[str], settled: Mapping[int, Settled], before: LookInputs, now: LookInputs
) -> set[EndpointKey]:
    """The endpoints for which the evidence by an interface's name may have changed.

    ``names``: the names of interfaces that appeared, vanished or changed.
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
