# SPDX-License-Identifier: Apache-2.0
"""One commit: from changed objects to the rows of each phase.

The order matters and is this (make before break):

    1. objects change; which endpoints' programs that concerns
    2. programs of those endpoints; their terms and atoms come into use
    3. GROW    addresses and prefixes learn of new atoms: no set in force looks at them yet
    4. FLIP    addresses and prefixes whose owners or services changed
    5. policy sets of endpoints whose program or own identity changed
    6. SHRINK  programs, sets, predicates and atoms that are not needed any more go
    7. GROW    classes of new identities and columns of new atoms in the sets in force; then the new sets
    8. PREPARE, FLIP  endpoint rows

Invariant: everything goes through the journal, so a commit that fails anywhere leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from netpol_ebpf.compiler.addresses import Addresses, Claim, Relabelled
from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.entries import PortPair
from netpol_ebpf.compiler.identities import IdentityIndex
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE, SOURCE_BLOCK, AtomSpace
from netpol_ebpf.compiler.limits import Limits, exceeded
from netpol_ebpf.compiler.numbers import Numbers, Ranges
from netpol_ebpf.compiler.owners import OwnerIndex, OwnerKind
from netpol_ebpf.compiler.programs import Part, Program, Template, cut, is_of_stage, order_tiers, stages_of
from netpol_ebpf.compiler.registers import RowRegister
from netpol_ebpf.compiler.revocation import Revocation
from netpol_ebpf.compiler.sets import Fold, LiveSet, Stores
from netpol_ebpf.compiler.setstore import SetStore
from netpol_ebpf.compiler.subjects import Subjects
from netpol_ebpf.compiler.tables import ATOM_BLOCKS, EndpointRow, Tables
from netpol_ebpf.compiler.templates import ServiceKey, TemplateKey, Templates, service_ports
from netpol_ebpf.compiler.terms import Atom, NetsTerm, ServiceTerm
from netpol_ebpf.policy.types import (
    Cause,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    IPNetwork,
    NetworkSet,
    Node,
    Policy,
    PolicyKey,
    Profile,
    Service,
    Settings,
    Stage,
    Staged,
    Tier,
    World,
)

Slot = tuple[Direction, Stage]

_PAIRS = 64
"""Changes of one identity into another that are compared before a commit is taken to revoke something; arbitrary."""


@dataclass(frozen=True, slots=True)
class KnownNumbers:
    """Numbers that an earlier run left in force: identities by digest (table ``identities``), rules, endpoints."""

    identities: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[Cause, int] = field(default_factory=dict)
    endpoints: Mapping[EndpointKey, int] = field(default_factory=dict)


@dataclass(slots=True)
class LocalEndpoint:
    """A local endpoint as it is in force. ``row``: as it was last written."""

    endpoint: Endpoint
    number: int
    programs: dict[Slot, Program] = field(default_factory=dict)
    sets: dict[Slot, LiveSet] = field(default_factory=dict)
    row: EndpointRow | None = None


class State:
    """Everything the compiler keeps between commits."""

    def __init__(self, limits: Limits, known: KnownNumbers) -> None:
        self.limits = limits
        self.world = World()
        self.owners = OwnerIndex()
        self.identities = IdentityIndex(self.owners, limits, known.identities)
        self.addresses = Addresses(self.identities)
        self.subjects = Subjects()
        self.templates = Templates(self.world, self.owners, self.identities, limits)
        self.stores = Stores(
            identities=self.identities,
            atoms=AtomSpace(ANY_L4, 0, ATOM_BLOCKS, limits),
            sources=AtomSpace(ANY_SOURCE, SOURCE_BLOCK, 256, limits),
            causes=RowRegister("rules", limits.rules, known.rules),
            log_lists=RowRegister("log_lists", limits.log_lists),
            set_numbers=Numbers(1, 1 << 31),
            verdicts=Ranges(limits.verdicts),
            columns=Ranges(limits.column_blocks),
            limits=limits,
        )
        self.sets = SetStore(self.stores)
        self.numbers = Numbers(1, limits.endpoints)
        self.kept_numbers = dict(known.endpoints)  # of endpoints that did not appear yet
        for number in self.kept_numbers.values():
            self.numbers.reserve(number)
        self.local: dict[EndpointKey, LocalEndpoint] = {}
        self.endpoint_owners: dict[EndpointKey, int] = {}
        self.set_owners: dict[str, int] = {}
        self.node_owners: dict[str, int] = {}
        self.by_tier: dict[str, set[PolicyKey]] = {}
        self.replaced: dict[PolicyKey, int] = {}  # key -> how many staged policies stand for it
        self.with_profile: dict[str, set[EndpointKey]] = {}  # local endpoints

    def release_kept(self) -> None:
        """Numbers of an earlier run that nothing asked for are numbers like all others from now on."""
        journal = Journal()
        self.stores.causes.release_kept(journal)
        for key in list(self.kept_numbers):
            self.numbers.give_back(journal.pop(self.kept_numbers, key), journal)

    def begin(self, journal: Journal) -> None:
        """A commit starts."""
        self.stores.verdicts.begin(journal)
        self.stores.columns.begin(journal)

    def settle(self) -> None:
        """A commit is over, one way or the other: forget what was noted for it."""
        self.identities.settle()
        self.owners.changed_names.clear()
        self.addresses.forget_dirt()
        self.sets.settle()


class Commit:
    """The work of one commit. ``changes``: (type, key) -> new object, or None."""

    def __init__(
        self, state: State, changes: Mapping[tuple[type, Any], Any], local: Any, draft: Draft, journal: Journal
    ) -> None:
        self._state = state
        self._changes = changes
        self._local = local
        self._draft = draft
        self._journal = journal
        self._dirty: dict[EndpointKey, None] = {}  # local endpoints whose programs may change
        self._stale: dict[TemplateKey, None] = {}
        self._is_first = not state.local
        self._moves: list[tuple[Endpoint | None, int, Endpoint | None, int]] = []
        self._net_moves: list[tuple[Iterable[IPNetwork], int, Iterable[IPNetwork], int]] = []
        self._node_moves: list[tuple[Iterable[IPAddress], int, Iterable[IPAddress], int]] = []
        self._service_moves: list[tuple[Service | None, Service | None]] = []
        self._claims: list[tuple[IPAddress, Claim, bool]] = []
        self._disappeared: list[int] = []
        self._gone: list[LocalEndpoint] = []
        self._old_programs: list[Program] = []
        self._old_sets: list[LiveSet] = []
        self._replaced: dict[tuple[LiveSet | None, LiveSet | None], None] = {}
        self._relabelled = Relabelled()
        self._folds: dict[tuple[Template, tuple[int, ...]], int | None] = {}

    def run(self) -> None:
        """Do all of it; the draft then holds the rows. Raises LimitError."""
        self._take_objects()
        self._refresh_templates()
        for key in self._dirty:
            self._program(self._state.local[key])
        own_changed = self._label_addresses()
        touched = dict.fromkeys((*self._dirty, *own_changed))
        for key in touched:
            self._choose_sets(self._state.local[key])
        self._retire()
        self._write_sets()
        self._write_endpoints(touched)
        self._collect()

    # --- 1. objects -------------------------------------------------------------------------------------------------

    def _take_objects(self) -> None:
        takers = {
            Endpoint: self._take_endpoint,
            NetworkSet: self._take_network_set,
            Node: self._take_node,
            Policy: self._take_policy,
            Service: self._take_service,
        }
        world, journal = self._state.world, self._journal
        others: dict[type, dict[Any, Any]] = _containers(world)
        for (kind, key), new in self._changes.items():
            if kind is Settings:
                if new != world.settings:
                    self._take_settings(new)
                continue
            container = others[kind]
            old = container.get(key)
            if old == new:
                continue
            if new is None:
                journal.pop(container, key)
            else:
                journal.put(container, key, new)
            taker: Any = takers.get(kind)
            if taker is not None:
                taker(old, new)
            elif kind is Tier:
                for policy in self._state.by_tier.get(key, ()):
                    self._touch(self._state.subjects.endpoints_of(policy))
            else:
                self._stale.update(dict.fromkeys((key, direction) for direction in Direction))
                self._touch(self._state.with_profile.get(key, ()))

    def _touch(self, endpoints: Iterable[EndpointKey]) -> None:
        self._dirty.update(dict.fromkeys(endpoints))

    def _take_settings(self, settings: Settings) -> None:
        self._journal.assign(self._state.world, "settings", settings)
        for stage in (Stage.NORMAL, Stage.UNTRACKED):
            self._stale.update(dict.fromkeys((stage, direction) for direction in Direction))
        self._touch(key for key, local in self._state.local.items() if local.endpoint.kind is EndpointKind.HOST)

    def _own(self, registered: dict[Any, int], key: Any, kind: OwnerKind, old: Any, new: Any) -> tuple[int, int]:
        """Register an object's owner in place of its old one. Returns (old owner, new owner), 0 for none."""
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
            self._disappeared.append(before)
        return before, after

    def _take_endpoint(self, old: Endpoint | None, new: Endpoint | None) -> None:
        key = (new or old).key  # type: ignore[union-attr]  # one of them is there
        before, after = self._own(self._state.endpoint_owners, key, OwnerKind.ENDPOINT, old, new)
        if old is None or new is None or before != after or old.addresses != new.addresses:
            self._moves.append((old, before, new, after))
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
        claim = _claim(known)
        self._claims.extend((address, claim, True) for address in set(endpoint.addresses) - set(old_addresses))
        self._claims.extend((address, claim, False) for address in set(old_addresses) - set(endpoint.addresses))
        for profile in set(old_profiles) ^ set(endpoint.profiles):
            self._index_profile(profile, key, add=profile in endpoint.profiles)
        state.subjects.set_endpoint(key, endpoint.labels, journal)
        self._touch((key,))

    def _index_profile(self, profile: str, key: EndpointKey, *, add: bool) -> None:
        change = self._journal.add_to if add else self._journal.discard_from
        change(self._state.with_profile, profile, key)

    def _drop_local(self, known: LocalEndpoint) -> None:
        state, journal = self._state, self._journal
        key = known.endpoint.key
        claim = _claim(known)
        self._claims.extend((address, claim, False) for address in set(known.endpoint.addresses))
        for profile in set(known.endpoint.profiles):
            self._index_profile(profile, key, add=False)
        state.subjects.set_endpoint(key, None, journal)
        journal.pop(state.local, key)
        self._dirty.pop(key, None)
        self._gone.append(known)
        self._old_programs.extend(known.programs.values())
        self._old_sets.extend(known.sets.values())

    def _take_network_set(self, old: NetworkSet | None, new: NetworkSet | None) -> None:
        key = (new or old).key  # type: ignore[union-attr]  # one of them is there
        before, after = self._own(self._state.set_owners, key, OwnerKind.NETWORK_SET, old, new)
        self._net_moves.append((old.nets if old else (), before, new.nets if new else (), after))

    def _take_node(self, old: Node | None, new: Node | None) -> None:
        name = (new or old).name  # type: ignore[union-attr]  # one of them is there
        before, after = self._own(self._state.node_owners, name, OwnerKind.NODE, old, new)
        self._node_moves.append((old.addresses if old else (), before, new.addresses if new else (), after))

    def _take_service(self, old: Service | None, new: Service | None) -> None:
        self._service_moves.append((old, new))

    def _take_policy(self, old: Policy | None, new: Policy | None) -> None:
        state, journal = self._state, self._journal
        key = (new or old).key  # type: ignore[union-attr]  # one of them is there
        self._touch(state.subjects.endpoints_of(key))
        state.subjects.set_policy(key, None if new is None else new.subject, journal)
        self._touch(state.subjects.endpoints_of(key))
        self._stale.update(dict.fromkeys((key, direction) for direction in Direction))
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
                    self._touch(state.subjects.endpoints_of(twin))

    # --- 2. programs ------------------------------------------------------------------------------------------------

    def _refresh_templates(self) -> None:
        """Rebuild templates whose objects, names or services changed, and note the endpoints that have them."""
        state = self._state
        services: list[ServiceKey] = [
            _service_key(old, new) for old, new in self._service_moves if service_ports(old) != service_ports(new)
        ]
        asking = state.templates.asking_for(set(state.owners.changed_names), services)
        for key in dict.fromkeys((*self._stale, *asking)):
            if state.templates.refresh(key, self._journal):
                subject = key[0]
                if isinstance(subject, PolicyKey):
                    self._touch(state.subjects.endpoints_of(subject))
                elif isinstance(subject, str):
                    self._touch(state.with_profile.get(subject, ()))
        for endpoint in [each for each in self._dirty if each not in state.local]:
            del self._dirty[endpoint]

    def _program(self, local: LocalEndpoint) -> None:
        """Work out what applies to an endpoint now."""
        state, journal = self._state, self._journal
        endpoint = local.endpoint
        world = state.world
        policies = [world.policies[key] for key in state.subjects.policies_of(endpoint.key)]
        programs: dict[Slot, Program] = {}
        for stage in stages_of(endpoint):
            for direction in Direction:
                applying = [policy for policy in policies if direction in policy.types and is_of_stage(policy, stage)]
                templates = {
                    policy.key: state.templates.get((policy.key, direction), journal)
                    for policy in applying
                    if policy.staged is not Staged.DELETE
                }
                tiers, profiles = cut(
                    order_tiers(applying, world.tiers, state.replaced, stage, templates),
                    self._profiles(endpoint, direction, stage),
                )
                program = Program(direction, stage, self._failsafes(endpoint, direction, stage), tiers, profiles)
                if not program.is_idle:
                    programs[(direction, stage)] = program
        if programs == local.programs:
            return
        for program in programs.values():
            state.templates.acquire(program, journal)
        self._old_programs.extend(local.programs.values())
        journal.assign(local, "programs", programs)

    def _failsafes(self, endpoint: Endpoint, direction: Direction, stage: Stage) -> tuple[Part, ...]:
        if endpoint.kind is not EndpointKind.HOST or stage not in (Stage.NORMAL, Stage.UNTRACKED):
            return ()
        template = self._state.templates.get((stage, direction), self._journal)
        return (Part(template),) if template.entries else ()

    def _profiles(self, endpoint: Endpoint, direction: Direction, stage: Stage) -> tuple[Part, ...]:
        if stage is not Stage.NORMAL:
            return ()
        templates = [self._state.templates.get((name, direction), self._journal) for name in endpoint.profiles]
        return tuple(Part(template) for template in templates if template.entries)

    # --- 3. and 4. addresses ----------------------------------------------------------------------------------------

    def _label_addresses(self) -> list[EndpointKey]:
        """GROW, then FLIP. Returns local endpoints one of whose own addresses changed its identity."""
        state, draft, journal = self._state, self._draft, self._journal
        addresses, identities = state.addresses, state.identities
        added = set(identities.atoms_added)
        for atom_id in identities.atoms_added:
            if atom_id in identities.atoms:
                self._place_atom(atom_id, identities.atoms[atom_id].atom, add=True)
        addresses.settle(Phase.GROW, draft, journal)
        self._move_services(added)
        for old, before, new, after in self._moves:
            for address in set(new.addresses) if new else ():
                addresses.add_owner(address, after, journal)
            for address in set(old.addresses) if old else ():
                addresses.remove_owner(address, before, journal)
        for old_nets, before, new_nets, after in self._net_moves:
            for net in set(new_nets):
                addresses.add_prefix_owner(net, after, journal)
            for net in set(old_nets):
                addresses.remove_prefix_owner(net, before, journal)
        for old_addresses, before, new_addresses, after in self._node_moves:
            for address in set(new_addresses):
                addresses.add_owner(address, after, journal)
            for address in set(old_addresses):
                addresses.remove_owner(address, before, journal)
        for address, claim, add in self._claims:
            (addresses.claim if add else addresses.disclaim)(address, claim, journal)
        self._relabelled = addresses.settle(Phase.FLIP, draft, journal)
        claims = [claim[1] for entry, _, _ in self._relabelled.addresses for claim in entry.claims]
        return [key for key in claims if key in state.local]

    def _place_atom(self, atom_id: int, atom: Atom, *, add: bool) -> None:
        """Put a nets list's prefixes or a service's addresses into the address space, or take them out."""
        addresses, journal = self._state.addresses, self._journal
        if isinstance(atom, NetsTerm):
            change_net = addresses.add_prefix_atom if add else addresses.remove_prefix_atom
            for net in atom.nets:
                change_net(net, atom_id, journal)
        else:
            change = addresses.add_atom if add else addresses.remove_atom
            service = self._state.world.services.get((atom.namespace, atom.name))
            for address in _members(service, atom):
                change(address, atom_id, journal)

    def _move_services(self, added: set[int]) -> None:
        """Backends of services came and went; atoms that were added just now have the new ones already."""
        state, journal = self._state, self._journal
        for old, new in self._service_moves:
            namespace, name = _service_key(old, new)
            pairs: set[PortPair] = {(0, 0), *service_ports(old), *service_ports(new)}
            for protocol, port in pairs:
                atom = ServiceTerm(namespace, name, protocol, port)
                atom_id = state.identities.atom_id(atom)
                if atom_id is None or atom_id in added:
                    continue
                before, after = _members(old, atom), _members(new, atom)
                for address in after - before:
                    state.addresses.add_atom(address, atom_id, journal)
                for address in before - after:
                    state.addresses.remove_atom(address, atom_id, journal)

    # --- 5. sets ----------------------------------------------------------------------------------------------------

    def _choose_sets(self, local: LocalEndpoint) -> None:
        state, draft, journal = self._state, self._draft, self._journal
        sets: dict[Slot, LiveSet] = {}
        for slot, program in local.programs.items():
            what = f"{local.endpoint.key}, {slot[0].value}" + ("" if slot[1] is Stage.NORMAL else f", {slot[1].value}")
            sets[slot] = state.sets.acquire((program, self._fold(local.endpoint, program)), what, draft, journal)
        self._old_sets.extend(local.sets.values())
        if local.row is not None:
            pairs = ((local.sets.get(slot), sets.get(slot)) for slot in {*local.sets, *sets})
            self._replaced.update(dict.fromkeys(pairs))
        journal.assign(local, "sets", sets)

    def _fold(self, endpoint: Endpoint, program: Program) -> Fold | None:
        """What of the own side is constant; None: it has to be looked up for each packet."""
        constraining = [part.template for part in program.parts() if part.template.constrains_own]
        if not constraining:
            return ()
        if endpoint.kind is EndpointKind.HOST or endpoint.allowed_sources or not endpoint.addresses:
            return None
        identities = tuple(sorted({self._state.addresses.identity_of(address) for address in endpoint.addresses}))
        bits = [self._fold_template(template, identities) for template in constraining]
        return None if None in bits else tuple(bit for bit in bits if bit is not None)

    def _fold_template(self, template: Template, identities: tuple[int, ...]) -> int | None:
        """Bits of the entries that hold for all the identities, or None when that differs among them."""
        known = self._folds.get((template, identities), -1)
        if known != -1:
            return known
        kept = decided = 0
        for number in identities:
            family = self._state.identities.identities[number].family
            terms = self._state.identities.terms_of(number)
            applicable = holding = 0
            for index, (entry, own) in enumerate(zip(template.entries, template.owns, strict=True)):
                if entry.family in (0, family):
                    applicable |= 1 << index
                    if own.holds(family, terms):
                        holding |= 1 << index
            if (kept ^ holding) & decided & applicable:
                self._folds[(template, identities)] = None
                return None
            kept |= holding
            decided |= applicable
        self._folds[(template, identities)] = kept
        return kept

    # --- 6. what goes -----------------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Cut atoms for old and new predicates together; then let the old programs and predicates go."""
        state, draft, journal = self._state, self._draft, self._journal
        for live in self._old_sets:
            state.sets.release(live, journal)
        for space, source in ((state.stores.atoms, False), (state.stores.sources, True)):
            if space.is_stale:
                split = space.partition(journal)
                state.sets.split_atoms(split, source=source, draft=draft, journal=journal)
                draft.rows(Phase.GROW, "l4_atoms").update(split.blocks)
        for program in self._old_programs:
            state.templates.release(program, journal)
        state.templates.collect(journal)
        for atom_id, atom in state.identities.atoms_removed:
            self._place_atom(atom_id, atom, add=False)
        state.addresses.settle(Phase.SHRINK, draft, journal)

    # --- 7. sets ----------------------------------------------------------------------------------------------------

    def _write_sets(self) -> None:
        state, draft, journal = self._state, self._draft, self._journal
        identities = state.identities
        state.sets.extend(identities.created, draft, journal)
        state.sets.build_created(draft, journal)
        draft.revokes = self._revokes()
        state.sets.release_predicates(journal)
        for space in (state.stores.atoms, state.stores.sources):
            if space.is_stale:
                split = space.partition(journal)
                if split.parents:
                    raise AssertionError("removing predicates split an atom")
                draft.rows(Phase.SHRINK, "l4_atoms").update(split.blocks)

    def _revokes(self) -> bool:
        """Whether a packet that was allowed may not be any more. All sets of before and after are there to compare."""
        state = self._state
        if self._is_first or self._gone:
            return True  # what was in force before is not known, or not in force any more
        revocation = Revocation(state.identities)
        if any(revocation.by_replacement(old, new) for old, new in self._replaced):
            return True
        relabelled = self._relabelled
        if any(not before or not after for before, after in relabelled.prefixes):
            return True  # which prefix was around what is in it is not known any more
        pairs = set(relabelled.prefixes)
        for entry, old, new in relabelled.addresses:
            if old is not None and old.endpoint and (new is None or new.endpoint != old.endpoint):
                return True  # another endpoint's address from now on
            around = state.addresses.identity_around(entry.address)
            pairs.add((around if old is None else old.identity, around if new is None else new.identity))
            if len(pairs) > _PAIRS:
                return True
        sets = dict.fromkeys(live for local in state.local.values() for live in local.sets.values())
        return revocation.by_relabelling({(old, new) for old, new in pairs if old != new}, sets)

    # --- 8. endpoints -----------------------------------------------------------------------------------------------

    def _write_endpoints(self, touched: Iterable[EndpointKey]) -> None:
        state, draft, journal = self._state, self._draft, self._journal
        gone = {local.endpoint.key for local in self._gone}
        for key in gone - state.local.keys():
            draft.write(Phase.FLIP, "endpoints", key, DELETED)
        if state.sets.moved:
            for key, local in state.local.items():
                self._write_moved(key, local)
        for key in touched:
            local = state.local[key]
            row = EndpointRow(local.number, {slot: live.row for slot, live in local.sets.items()})
            if row != local.row:
                journal.assign(local, "row", row)
                draft.write(Phase.FLIP, "endpoints", key, row)

    def _write_moved(self, key: EndpointKey, local: LocalEndpoint) -> None:
        """Where a published row points at a set that moved, follow it before anything else is written."""
        if local.row is None:
            return
        numbers = {live.peer.number: live for live in self._state.sets.moved}
        sets = {slot: numbers[row.number].row if row.number in numbers else row for slot, row in local.row.sets.items()}
        row = EndpointRow(local.number, sets)
        if row != local.row:
            self._journal.assign(local, "row", row)
            self._draft.write(Phase.PREPARE, "endpoints", key, row)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Numbers, rows and owners that nothing needs any more."""
        state, draft, journal = self._state, self._draft, self._journal
        for number in state.identities.created:
            if number in state.identities.identities:
                draft.write(Phase.GROW, "identities", number, state.identities.identities[number].digest)
        gone, owners = state.identities.collect(journal)
        for number in gone:
            draft.write(Phase.SHRINK, "identities", number, DELETED)
        state.sets.remove_identities(gone, draft, journal)
        state.sets.bury(draft, journal)
        state.stores.causes.collect(draft, journal)
        state.stores.log_lists.collect(draft, journal)
        for owner in {*owners, *self._disappeared}:
            state.owners.collect(owner, journal)
        for local in self._gone:
            state.numbers.give_back(local.number, journal)

    def check_sizes(self, tables: Tables) -> None:
        """Raise LimitError when a table would not hold the rows it has during the change."""
        limits = self._state.limits
        what = ", ".join(str(key or kind.__name__) for kind, key in list(self._changes)[:3])
        if len(self._changes) > 3:  # noqa: PLR2004  # enough to find the culprit
            what += f" and {len(self._changes) - 3} more"
        for table in ("addresses", "cidrs", "peer_classes", "identities"):
            seen, most = self._draft.size_after(tables, table), getattr(limits, table)
            if seen > most:
                raise exceeded(what, table, most, seen)


def _containers(world: World) -> dict[type, dict[Any, Any]]:
    return {
        Endpoint: world.endpoints,
        NetworkSet: world.network_sets,
        Node: world.nodes,
        Policy: world.policies,
        Profile: world.profiles,
        Service: world.services,
        Tier: world.tiers,
    }


def _claim(local: LocalEndpoint) -> Claim:
    return (int(local.endpoint.kind is EndpointKind.HOST), local.endpoint.key, local.number)


def _service_key(old: Service | None, new: Service | None) -> ServiceKey:
    service = new or old
    if service is None:
        raise AssertionError("a change from nothing to nothing")
    return (service.namespace, service.name)


def _members(service: Service | None, atom: ServiceTerm) -> set[IPAddress]:
    """Addresses of a service that a term is about."""
    if service is None:
        return set()
    return {
        each.address
        for each in service.backends
        if not atom.protocol or (each.protocol, each.port) == (atom.protocol, atom.port)
    }
