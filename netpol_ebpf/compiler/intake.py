# SPDX-License-Identifier: Apache-2.0
"""The first step of a commit: apply the changed objects to the world, and record what the next steps must recompute.

Invariant: after this step the world, the owners, the subjects and the indexes of the state are up to date.  Addresses,
templates and rule lists are unchanged; the next steps update them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from netpol_ebpf.compiler.addresses import Claim
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import exceeded
from netpol_ebpf.compiler.owners import OwnerKind
from netpol_ebpf.compiler.state import CompilerState, LocalEndpoint
from netpol_ebpf.compiler.templates import TemplateKey
from netpol_ebpf.policy.types import (
    Action,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    IPNetwork,
    LabelledNets,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    ProfileRules,
    Rule,
    ServiceBackends,
    Staged,
    World,
)

T = TypeVar("T")
U = TypeVar("U")


class Intake:
    """Applies changed objects to the world, and records what the next steps must recompute.

    ``dirty``: local endpoints with rule lists that may change.
    ``stale``: keys of the templates of changed policies and profiles.
    ``address_moves``: (address, (owner, number of the owner's node), added). The node's number is 0 for this node and
    for an unknown node.
    ``net_moves``: (net, owner, added).
    ``numbered``: new numbers of nodes, by name; 0 for a node that lost its number.
    ``service_moves``: (service before, service after); None if the service does not exist at that time.
    ``claims``: (address, claim of a local endpoint, added).
    ``disappeared``: owners (records that several objects can share) that lost one of their objects.
    ``gone``: local endpoints that no longer exist.

    In moves and claims, ``added`` is False if the owner or the endpoint lost the address or net.
    """

    def __init__(self, state: CompilerState, local: Callable[[Endpoint], bool], journal: Journal) -> None:
        self._state = state
        self._local = local
        self._journal = journal
        self.dirty: dict[EndpointKey, None] = {}
        self.stale: dict[TemplateKey, None] = {}
        self.address_moves: list[tuple[IPAddress, tuple[int, int], bool]] = []
        self.net_moves: list[tuple[IPNetwork, int, bool]] = []
        self.numbered: dict[str, int] = {}
        self.service_moves: list[tuple[ServiceBackends | None, ServiceBackends | None]] = []
        self.claims: list[tuple[IPAddress, Claim, bool]] = []
        self.disappeared: list[int] = []
        self.gone: list[LocalEndpoint] = []

    def take(self, changes: Mapping[type, Mapping[Any, Any]]) -> None:
        """Apply ``changes`` to the world.

        ``changes``: by type and key, the new object; None for a removed object.  An object equal to the present object
        is not a change.
        """
        takers = {
            Endpoint: self._take_endpoint,
            LabelledNets: self._take_network_set,
            ClusterNode: self._take_node,
            Policy: self._take_policy,
            ProfileRules: self._take_profile,
            ServiceBackends: self._take_service,
            PolicySettings: self._take_settings,
            PolicyTier: self._take_tier,
        }
        world, journal = self._state.world, self._journal
        others: dict[type, dict[Any, Any]] = _containers(world)
        if ClusterNode in changes:  # must come first: the changes of endpoints below use the new node numbers
            self._number_nodes(changes[ClusterNode])
        for kind, objects in changes.items():
            taker: Any = takers[kind]
            if kind is PolicySettings:
                taker(objects[None])
                continue
            container = others[kind]
            for key, new in objects.items():
                old = container.get(key)
                if old == new:
                    continue
                if new is None:
                    journal.pop(container, key)
                else:
                    journal.put(container, key, new)
                taker(old, new)

    def touch(self, endpoints: Iterable[EndpointKey]) -> None:
        """Mark endpoints with rule lists that may change. `drop_unknown` later unmarks those that are not local."""
        self.dirty.update(dict.fromkeys(endpoints))

    def drop_unknown(self) -> None:
        """Unmark endpoints that are not local, or are no longer local."""
        for key in self.dirty.keys() - self._state.local.keys():
            del self.dirty[key]

    def _take_tier(self, old: PolicyTier | None, new: PolicyTier | None) -> None:
        name = (new or old).name  # type: ignore[union-attr]  # old or new is not None
        for policy in self._state.by_tier.get(name, ()):
            self.touch(self._state.subjects.endpoints_of(policy))

    def _take_profile(self, old: ProfileRules | None, new: ProfileRules | None) -> None:
        name = (new or old).name  # type: ignore[union-attr]  # old or new is not None
        self.stale.update(dict.fromkeys((name, direction) for direction in Direction))
        self.touch(self._state.with_profile.get(name, ()))

    def _take_settings(self, settings: PolicySettings) -> None:
        if settings == self._state.world.settings:
            return
        self._journal.assign(self._state.world, "settings", settings)
        self.touch(key for key, local in self._state.local.items() if local.endpoint.kind is EndpointKind.HOST)

    def _own(self, registered: dict[Any, int], key: Any, kind: OwnerKind, old: Any, new: Any) -> tuple[int, int]:
        """Register the owner of a changed object in place of the object's old owner.

        ``registered``: maps the key of each object of this kind to the id of its owner.
        ``old``, ``new``: the object before and after the change; None if the object does not exist at that time.

        Returns the ids (old owner, new owner); 0 if there is none.
        """
        owners, journal = self._state.owners, self._journal
        before = registered.get(key, 0)
        after = 0
        if new is not None:
            after = owners.appear(kind, new.labels, new.ports if kind is OwnerKind.ENDPOINT else (), journal)
            journal.put(registered, key, after)
        else:
            journal.pop(registered, key)
        if old is not None:
            owners.disappear(before, journal)
            self.disappeared.append(before)
        return before, after

    def _take_endpoint(self, old: Endpoint | None, new: Endpoint | None) -> None:
        key = (new or old).key  # type: ignore[union-attr]  # old or new is not None
        before, after = self._own(self._state.endpoint_owners, key, OwnerKind.ENDPOINT, old, new)
        was, now = (before, self._node_of(old)), (after, self._node_of(new))
        if old is None or new is None or was != now or old.addresses != new.addresses:
            had, has = old.addresses if old else (), new.addresses if new else ()
            self.address_moves.extend(_moves(had, was, has, now))
        known = self._state.local.get(key)
        is_local = new is not None and self._local(new)
        if known is not None and (new is None or not is_local or known.endpoint.kind is not new.kind):
            self._drop_local(known)
            known = None
        if new is not None and is_local:
            self._take_local(known, new)

    def _take_local(self, known: LocalEndpoint | None, endpoint: Endpoint) -> None:
        state, journal = self._state, self._journal
        key = endpoint.key
        if known is None:
            is_kept = key in state.kept_numbers
            number = journal.pop(state.kept_numbers, key) if is_kept else state.numbers.take(journal)
            if number is None:
                raise exceeded(str(key), "endpoints", state.limits.endpoints, len(state.local) + 1)
            known = LocalEndpoint(endpoint, number)
            journal.put(state.local, key, known)
            old_addresses: tuple[IPAddress, ...] = ()
            old_profiles: tuple[str, ...] = ()
        else:
            old_addresses, old_profiles = known.endpoint.addresses, known.endpoint.profiles
            journal.assign(known, "endpoint", endpoint)
        claim = known.claim
        self.claims.extend((address, claim, True) for address in set(endpoint.addresses) - set(old_addresses))
        self.claims.extend((address, claim, False) for address in set(old_addresses) - set(endpoint.addresses))
        for profile in set(old_profiles) ^ set(endpoint.profiles):
            self._index_profile(profile, key, add=profile in endpoint.profiles)
        state.subjects.set_endpoint(key, endpoint.labels, journal)
        self.touch((key,))

    def _index_profile(self, profile: str, key: EndpointKey, *, add: bool) -> None:
        change = self._journal.add_to if add else self._journal.discard_from
        change(self._state.with_profile, profile, key)

    def _drop_local(self, known: LocalEndpoint) -> None:
        state, journal = self._state, self._journal
        key = known.endpoint.key
        claim = known.claim
        self.claims.extend((address, claim, False) for address in set(known.endpoint.addresses))
        for profile in set(known.endpoint.profiles):
            self._index_profile(profile, key, add=False)
        state.subjects.set_endpoint(key, None, journal)
        journal.pop(state.local, key)
        self.dirty.pop(key, None)
        self.gone.append(known)

    def _take_network_set(self, old: LabelledNets | None, new: LabelledNets | None) -> None:
        key = (new or old).key  # type: ignore[union-attr]  # old or new is not None
        before, after = self._own(self._state.set_owners, key, OwnerKind.NETWORK_SET, old, new)
        self.net_moves.extend(_moves(old.nets if old else (), before, new.nets if new else (), after))
        self._take_domains(key, old, new)

    def _take_domains(self, key: str, old: LabelledNets | None, new: LabelledNets | None) -> None:
        """Mark the templates of rules that match by the domain names of a changed network set.

        Cost: linear in the egress rules of the world, if the set has domain names.
        """
        changed = [held for held in (old, new) if held is not None and held.domains]
        if not changed or (old and new and (old.domains, old.labels) == (new.domains, new.labels)):
            return
        world, journal, named_sets = self._state.world, self._journal, self._state.templates.named_sets
        if new is not None and new.domains:
            journal.put(named_sets, key, new)
        elif key in named_sets:
            journal.pop(named_sets, key)
        subjects: list[tuple[PolicyKey | str, tuple[Rule, ...]]] = [
            *((policy.key, policy.egress) for policy in world.policies.values()),
            *((profile.name, profile.egress) for profile in world.profiles.values()),
        ]
        for subject, rules in subjects:
            selectors = (rule.destination.selector for rule in rules if rule.action is Action.ALLOW)
            if any(selector and selector.matches(held.labels) for selector in selectors for held in changed):
                self.stale[(subject, Direction.EGRESS)] = None

    def _take_node(self, old: ClusterNode | None, new: ClusterNode | None) -> None:
        name = (new or old).name  # type: ignore[union-attr]  # old or new is not None
        before, after = self._own(self._state.node_owners, name, OwnerKind.NODE, old, new)
        number = self._state.nodes.numbers.get(name, 0)
        self.address_moves.extend(_moves(_addresses(old), (before, number), _addresses(new), (after, number)))

    def _number_nodes(self, changes: Mapping[str, ClusterNode | None]) -> None:
        """Renumber nodes with changed addresses, and record the new numbers for the addresses of all objects on them.

        Must run before other changes are applied, because they use the new node numbers both for old and for new
        objects.
        """
        state, before = self._state, self._state.world.nodes
        moved = {name: new for name, new in changes.items() if _addresses(before.get(name)) != _addresses(new)}
        if not moved:
            return
        after = {name: node for name, node in {**before, **moved}.items() if node is not None}
        renumbered = state.nodes.renumber(after, self._journal)
        if not renumbered:
            return
        self.numbered = {name: new for name, (_, new) in renumbered.items()}
        for name in renumbered.keys() & before.keys():
            self._move_node(before[name].addresses, state.node_owners[name], renumbered[name])
        for key, endpoint in state.world.endpoints.items():
            if endpoint.node in renumbered and not self._local(endpoint):
                self._move_node(endpoint.addresses, state.endpoint_owners[key], renumbered[endpoint.node])

    def _move_node(self, addresses: Iterable[IPAddress], owner: int, numbers: tuple[int, int]) -> None:
        """Record that the number of an owner's node changed, for all ``addresses``.

        ``numbers``: (old number, new number).
        """
        old, new = numbers
        self.address_moves.extend(_moves(addresses, (owner, old), addresses, (owner, new)))

    def _node_of(self, endpoint: Endpoint | None) -> int:
        """The number of a remote endpoint's node; 0 for a local endpoint and for an unknown node."""
        numbers = self._state.nodes.numbers
        if not numbers or endpoint is None or endpoint.node not in numbers or self._local(endpoint):
            return 0
        return numbers[endpoint.node]

    def _take_service(self, old: ServiceBackends | None, new: ServiceBackends | None) -> None:
        self.service_moves.append((old, new))

    def _take_policy(self, old: Policy | None, new: Policy | None) -> None:
        state, journal = self._state, self._journal
        key = (new or old).key  # type: ignore[union-attr]  # old or new is not None
        self.touch(state.subjects.endpoints_of(key))
        state.subjects.set_policy(key, None if new is None else new.subject, journal)
        self.touch(state.subjects.endpoints_of(key))
        self.stale.update(dict.fromkeys((key, direction) for direction in Direction))
        if old is not None and (new is None or new.tier != old.tier):
            journal.discard_from(state.by_tier, old.tier, key)
        if new is not None and (old is None or new.tier != old.tier):
            journal.add_to(state.by_tier, new.tier, key)
        before = None if old is None or old.staged is Staged.NO else old.replaces
        after = None if new is None or new.staged is Staged.NO else new.replaces
        if before != after:
            for twin, step in ((before, -1), (after, 1)):
                if twin is not None:
                    count = state.replaced.get(twin, 0) + step
                    if count:
                        journal.put(state.replaced, twin, count)
                    else:
                        journal.pop(state.replaced, twin)
                    self.touch(state.subjects.endpoints_of(twin))


def _addresses(node: ClusterNode | None) -> tuple[IPAddress, ...]:
    return () if node is None else node.addresses


def _containers(world: World) -> dict[type, dict[Any, Any]]:
    return {
        Endpoint: world.endpoints,
        LabelledNets: world.network_sets,
        ClusterNode: world.nodes,
        Policy: world.policies,
        ProfileRules: world.profiles,
        ServiceBackends: world.services,
        PolicyTier: world.tiers,
    }


def _moves(had: Iterable[T], before: U, has: Iterable[T], after: U) -> Iterator[tuple[T, U, bool]]:
    """The changes that replace ``had`` by ``has``, as (item, owner, added).

    Additions come before removals.
    ``had``, ``before``: the items before the change, and their owner.
    ``has``, ``after``: the items after the change, and their owner.

    If both owners are the same, items that are in ``had`` and in ``has`` are left out.
    """
    old, new = set(had), set(has)
    same = old & new if before == after else set()
    for each in new - same:
        yield each, after, True
    for each in old - same:
        yield each, before, False
