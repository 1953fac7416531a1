# SPDX-License-Identifier: Apache-2.0
"""One commit: from changed objects to the rows of each phase.

The order of the steps matters (make before break).  Capitals name the phase to which the step writes rows:

    1. apply the changes to the objects; mark the endpoints with affected rule lists (`netpol_ebpf.compiler.intake`)
    2. build the rule lists of these endpoints; acquire their terms and address groups
    3. GROW    give addresses and prefixes the identities with the new address groups; no published set uses these yet
    4. FLIP    give addresses and prefixes with changed owners or services their new identities
    5. choose the policy sets of endpoints with a changed rule list or a changed identity of an own address
    6. GROW    give new identities and new atoms their classes in the published sets; this needs the matches of these
               sets, which step 7 may release
    7. SHRINK  release the rule lists, sets, address groups and atoms that are no longer needed
    8. GROW    write the new sets; determine whether the change revokes anything; release predicates
    9. PREPARE, FLIP  write the endpoint rows

Invariant: every change of state goes through the journal, so a rollback after a failure at any step restores the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from netpol_ebpf.compiler.addresses import Relabelled
from netpol_ebpf.compiler.draft import DELETED, Draft, Phase
from netpol_ebpf.compiler.entries import PortPair
from netpol_ebpf.compiler.intake import Intake
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import exceeded
from netpol_ebpf.compiler.revocation import Revocation
from netpol_ebpf.compiler.rule_lists import (
    RuleList,
    Template,
    TemplateUse,
    TierTemplates,
    cut,
    exceptions_of,
    is_of_stage,
    order_tiers,
    stages_of,
)
from netpol_ebpf.compiler.sets import LiveSet, OwnEntries
from netpol_ebpf.compiler.state import CompilerState, LocalEndpoint, Slot
from netpol_ebpf.compiler.tables import CompiledTables, EndpointRow
from netpol_ebpf.compiler.templates import service_key, service_ports
from netpol_ebpf.compiler.terms import AddressGroup, NetsTerm, ServiceTerm
from netpol_ebpf.policy.types import (
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    PolicyKey,
    ServiceBackends,
    Stage,
    Staged,
)

_PAIRS = 64
"""Largest number of identity changes that a commit compares; arbitrary.

A commit with more changes counts as a revocation.
"""


class Commit:
    """The work of one commit. ``changes``: by type and key, the new object; None for a removed object."""

    def __init__(
        self, state: CompilerState, changes: Mapping[type, Mapping[Any, Any]], local: Callable[[Endpoint], bool],
        draft: Draft, journal: Journal,
    ) -> None:  # fmt: skip
        self._state = state
        self._changes = changes
        self._draft = draft
        self._journal = journal
        self._is_first = not state.local
        self._intake = Intake(state, local, journal)
        self._old_rule_lists: list[RuleList] = []
        self._old_sets: list[LiveSet] = []
        self._replaced: dict[tuple[LiveSet | None, LiveSet | None], None] = {}
        self._relabelled = Relabelled()
        self._extended = 0  # how many of the new identities have classes in the published sets
        self._ordered: dict[tuple[frozenset[PolicyKey], Direction, Stage], tuple[TierTemplates, ...]] = {}
        self._known_own_entries: dict[tuple[Template, tuple[int, ...]], int | None] = {}

    def run(self) -> None:
        """Run all steps. Afterwards the draft has the rows.

        Raises LimitError; the caller must then roll back.
        """
        intake = self._intake
        intake.take(self._changes)
        for local in intake.gone:
            self._old_rule_lists.extend(local.rule_lists.values())
            self._old_sets.extend(local.sets.values())
        self._refresh_templates()
        for key in intake.dirty:
            self._order(self._state.local[key])
        own_changed = self._label_addresses()
        touched = dict.fromkeys((*intake.dirty, *own_changed))
        for key in touched:
            self._choose_sets(self._state.local[key])
        self._ready_sets_in_force()
        self._retire()
        self._write_sets()
        self._write_endpoints(touched)
        self._collect()

    # --- 2. rule lists ------------------------------------------------------------------------------------------------

    def _refresh_templates(self) -> None:
        """Rebuild templates with changed policies, named ports or services.

        Marks the endpoints that use a template that changed.
        """
        state = self._state
        moves = self._intake.service_moves
        services = [service_key(old, new) for old, new in moves if service_ports(old) != service_ports(new)]
        asking = state.templates.depending_on(set(state.owners.changed_names), services)
        for key in dict.fromkeys((*self._intake.stale, *asking)):
            if state.templates.refresh(key, self._journal):
                subject = key[0]
                if isinstance(subject, PolicyKey):
                    self._intake.touch(state.subjects.endpoints_of(subject))
                elif isinstance(subject, str):
                    self._intake.touch(state.with_profile.get(subject, ()))
        self._intake.drop_unknown()

    def _order(self, local: LocalEndpoint) -> None:
        """Build the new rule lists of an endpoint, one for each direction and stage."""
        state, journal = self._state, self._journal
        endpoint = local.endpoint
        policies = frozenset(state.subjects.policies_of(endpoint.key))
        rule_lists: dict[Slot, RuleList] = {}
        for stage in stages_of(endpoint):
            for direction in Direction:
                tiers, profiles = cut(
                    self._tiers(policies, direction, stage), self._profiles(endpoint, direction, stage)
                )
                rule_list = RuleList(direction, stage, self._exceptions(endpoint, direction, stage), tiers, profiles)
                if not rule_list.is_idle:
                    rule_lists[(direction, stage)] = rule_list
        if rule_lists == local.rule_lists:
            return
        for rule_list in rule_lists.values():
            state.templates.acquire(rule_list, journal)
        self._old_rule_lists.extend(local.rule_lists.values())
        journal.assign(local, "rule_lists", rule_lists)

    def _tiers(self, keys: frozenset[PolicyKey], direction: Direction, stage: Stage) -> tuple[TierTemplates, ...]:
        """The ordered tiers of the policies ``keys``, computed once for all endpoints with the same policies."""
        known = self._ordered.get((keys, direction, stage))
        if known is None:
            state = self._state
            policies = [state.world.policies[key] for key in keys]
            applying = [policy for policy in policies if direction in policy.types and is_of_stage(policy, stage)]
            templates = {
                policy.key: state.templates.get((policy.key, direction), self._journal)
                for policy in applying
                if policy.staged is not Staged.DELETE
            }
            known = order_tiers(applying, state.world.tiers, state.replaced, stage, templates)
            self._ordered[(keys, direction, stage)] = known
        return known

    def _exceptions(self, endpoint: Endpoint, direction: Direction, stage: Stage) -> tuple[TemplateUse, ...]:
        if endpoint.kind is not EndpointKind.HOST or stage not in (Stage.NORMAL, Stage.UNTRACKED):
            return ()
        exceptions = exceptions_of(self._state.world.settings, endpoint.node, direction, stage)
        template = self._state.templates.get((exceptions, direction), self._journal)
        return (TemplateUse(template),) if template.entries else ()

    def _profiles(self, endpoint: Endpoint, direction: Direction, stage: Stage) -> tuple[TemplateUse, ...]:
        if stage is not Stage.NORMAL:
            return ()
        templates = [self._state.templates.get((name, direction), self._journal) for name in endpoint.profiles]
        return tuple(TemplateUse(template) for template in templates if template.entries)

    # --- 3. and 4. addresses ----------------------------------------------------------------------------------------

    def _label_addresses(self) -> list[EndpointKey]:
        """Write the address rows of phase GROW, then those of phase FLIP.

        Returns the local endpoints with an own address that has another identity than before.
        """
        state, draft, journal = self._state, self._draft, self._journal
        addresses, identities = state.addresses, state.identities
        added = set(identities.groups_added)
        for group_id in identities.groups_added:
            if group_id in identities.groups:
                self._place_group(group_id, identities.groups[group_id].group, add=True)
        addresses.apply_changes(Phase.GROW, draft, journal)
        self._move_services(added)
        for address, (owner, node), comes in self._intake.address_moves:
            (addresses.add_owner if comes else addresses.remove_owner)(address, owner, journal, node)
        # Free memory: on a first commit, the next step needs about as much as this list has.
        self._intake.address_moves.clear()
        for net, owner, comes in self._intake.net_moves:
            (addresses.add_prefix_owner if comes else addresses.remove_prefix_owner)(net, owner, journal)
        for address, claim, add in self._intake.claims:
            (addresses.claim if add else addresses.disclaim)(address, claim, journal)
        for name, number in self._intake.numbered.items():
            draft.write(Phase.FLIP, "nodes", name, number or DELETED)
        # The first commit has no earlier state to compare with, and all its local endpoints are new.
        addresses.apply_changes(Phase.FLIP, draft, journal, None if self._is_first else self._relabelled)
        claims = [claim[1] for entry, _, _ in self._relabelled.addresses for claim in entry.claims]
        return [key for key in claims if key in state.local]

    def _place_group(self, group_id: int, group: AddressGroup, *, add: bool) -> None:
        """Add an address group's nets or backend addresses to `Addresses`. ``add`` False removes them."""
        addresses, journal = self._state.addresses, self._journal
        if isinstance(group, NetsTerm):
            change_net = addresses.add_prefix_group if add else addresses.remove_prefix_group
            for net in group.nets:
                change_net(net, group_id, journal)
        else:
            change = addresses.add_group if add else addresses.remove_group
            service = self._state.world.services.get((group.namespace, group.name))
            for address in _members(service, group):
                change(address, group_id, journal)

    def _move_services(self, added: set[int]) -> None:
        """Apply changed backends of services to address groups.

        ``added``: the address groups that this commit added; they have the new backends already.
        """
        state, journal = self._state, self._journal
        for old, new in self._intake.service_moves:
            namespace, name = service_key(old, new)
            pairs: set[PortPair] = {(0, 0), *service_ports(old), *service_ports(new)}
            for protocol, port in pairs:
                group = ServiceTerm(namespace, name, protocol, port)
                group_id = state.identities.group_id(group)
                if group_id is None or group_id in added:
                    continue
                before, after = _members(old, group), _members(new, group)
                for address in after - before:
                    state.addresses.add_group(address, group_id, journal)
                for address in before - after:
                    state.addresses.remove_group(address, group_id, journal)

    # --- 5. sets ----------------------------------------------------------------------------------------------------

    def _choose_sets(self, local: LocalEndpoint) -> None:
        state, draft, journal = self._state, self._draft, self._journal
        sets: dict[Slot, LiveSet] = {}
        for slot, rule_list in local.rule_lists.items():
            what = f"{local.endpoint.key}, {slot[0].value}" + ("" if slot[1] is Stage.NORMAL else f", {slot[1].value}")
            sets[slot] = state.sets.acquire(
                (rule_list, self._own_entries(local.endpoint, rule_list)), what, draft, journal
            )
        self._old_sets.extend(local.sets.values())
        if local.row is not None:
            pairs = ((local.sets.get(slot), sets.get(slot)) for slot in {*local.sets, *sets})
            self._replaced.update(dict.fromkeys(pairs))
        journal.assign(local, "sets", sets)

    def _own_entries(self, endpoint: Endpoint, rule_list: RuleList) -> OwnEntries | None:
        """The own entries of an endpoint. None if its own addresses do not all match the same entries.

        If the result is None, the program must look up the own address of each packet.
        """
        if not rule_list.constraining:
            return ()
        if endpoint.kind is EndpointKind.HOST or endpoint.allowed_sources or not endpoint.addresses:
            return None
        if rule_list.direction is Direction.INGRESS and any(each.names_own_nets for each in rule_list.constraining):
            # A multicast destination is in other nets than the own address.
            return None
        identities = tuple(sorted({self._state.addresses.identity_of(address) for address in endpoint.addresses}))
        bits = [self._own_entries_of(template, identities) for template in rule_list.constraining]
        return None if None in bits else tuple(bit for bit in bits if bit is not None)

    def _own_entries_of(self, template: Template, identities: tuple[int, ...]) -> int | None:
        """The template's entries that match the own addresses, as bits.

        None if the addresses match different entries.
        ``identities``: the identities of the own addresses.
        """
        known = self._known_own_entries.get((template, identities), -1)
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
                self._known_own_entries[(template, identities)] = None
                return None
            kept |= holding
            decided |= applicable
        self._known_own_entries[(template, identities)] = kept
        return kept

    # --- 6. to 8. sets, and removal of what is unused ----------------------------------------------------------------

    def _ready_sets_in_force(self) -> None:
        """Give new identities and new atoms their classes in the published policy sets.

        Must run while the matches of these sets are still in use.
        """
        state, draft, journal = self._state, self._draft, self._journal
        for live in self._old_sets:
            state.sets.release(live, journal)
        for space, source in ((state.stores.atoms, False), (state.stores.sources, True)):
            if space.is_stale:
                split = space.partition(journal)
                state.sets.split_atoms(split, source=source, draft=draft, journal=journal)
                draft.rows(Phase.GROW, "l4_atoms").update(split.blocks)
        # Until the flip the old sets judge packets with the new identities, so the old sets need classes for them.
        state.sets.extend(state.identities.created, draft, journal)
        self._extended = len(state.identities.created)

    def _retire(self) -> None:
        """Release the old rule lists, unused templates and unused address groups."""
        state, draft, journal = self._state, self._draft, self._journal
        for rule_list in self._old_rule_lists:
            state.templates.release(rule_list, journal)
        state.templates.collect(journal)
        for group_id, group in state.identities.groups_removed:
            self._place_group(group_id, group, add=False)
        state.addresses.apply_changes(Phase.SHRINK, draft, journal)

    def _write_sets(self) -> None:
        state, draft, journal = self._state, self._draft, self._journal
        identities = state.identities
        state.sets.extend(identities.created[self._extended :], draft, journal)
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
        """Whether a packet that was allowed may be denied now.

        Must be called while both the old and the new policy sets exist.
        """
        state = self._state
        if self._is_first or self._intake.gone:
            return True  # the earlier policy is unknown, or an endpoint is gone
        revocation = Revocation(state.identities, state.identities.created[self._extended :])
        if any(revocation.by_replacement(old, new) for old, new in self._replaced):
            return True
        relabelled = self._relabelled
        if any(not before or not after for before, after in relabelled.prefixes):
            return True  # the earlier identities of the addresses inside the prefix are unknown
        pairs = set(relabelled.prefixes)
        for entry, old, new in relabelled.addresses:
            if old is not None and old.endpoint and (new is None or new.endpoint != old.endpoint):
                return True  # the address left its local endpoint
            around = state.addresses.identity_around(entry.address)
            pairs.add((around if old is None else old.identity, around if new is None else new.identity))
            if len(pairs) > _PAIRS:
                return True
        return revocation.by_relabelling({(old, new) for old, new in pairs if old != new}, state.sets)

    # --- 9. endpoints -----------------------------------------------------------------------------------------------

    def _write_endpoints(self, touched: Iterable[EndpointKey]) -> None:
        state, draft, journal = self._state, self._draft, self._journal
        gone = {local.endpoint.key for local in self._intake.gone}
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
        """Write the endpoint's row to phase PREPARE if some of its policy sets moved. The row has their new ranges."""
        if local.row is None:
            return
        now = {row: live.row for live, row in self._state.sets.moved.items()}
        sets = {slot: now.get(row, row) for slot, row in local.row.sets.items()}
        row = EndpointRow(local.number, sets)
        if row != local.row:
            self._journal.assign(local, "row", row)
            self._draft.write(Phase.PREPARE, "endpoints", key, row)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Release the numbers, rows and owners that nothing refers to any more.

        Must be called at the end of the commit.
        """
        state, draft, journal = self._state, self._draft, self._journal
        for number in state.identities.created:
            if number in state.identities.identities:
                draft.write(Phase.GROW, "identities", number, state.identities.identities[number].digest)
        gone, owners = state.identities.collect(journal)
        for number in gone:
            draft.write(Phase.SHRINK, "identities", number, DELETED)
        state.sets.remove_identities(gone, draft, journal)
        state.sets.bury(draft, journal)
        if state.stores.names.has_work:
            state.stores.names.end_commit(self._what(), draft, journal)
        state.stores.causes.collect(draft, journal)
        state.stores.log_lists.collect(draft, journal)
        for owner in {*owners, *self._intake.disappeared}:
            state.owners.collect(owner, journal)
        for local in self._intake.gone:
            state.numbers.give_back(local.number, journal)

    def check_sizes(self, tables: CompiledTables) -> None:
        """Raise LimitError if a table would exceed its limit at any time during the change."""
        limits = self._state.limits
        for table in ("addresses", "cidrs", "peer_classes", "identities", "domains", "names"):
            seen, most = self._draft.size_after(tables, table), getattr(limits, table)
            if seen > most:
                raise exceeded(self._what(), table, most, seen)

    def _what(self) -> str:
        """The changed objects, as errors name them."""
        names = [str(key or kind.__name__) for kind, objects in self._changes.items() for key in islice(objects, 3)]
        what = ", ".join(names[:3])
        if (count := sum(map(len, self._changes.values()))) > 3:  # noqa: PLR2004  # three names suffice to find the change
            what += f" and {count - 3} more"
        return what


def _members(service: ServiceBackends | None, group: ServiceTerm) -> set[IPAddress]:
    """The addresses of the service's backends that the term ``group`` contains."""
    if service is None:
        return set()
    return {
        each.address
        for each in service.backends
        if not group.protocol or (each.protocol, each.port) == (group.protocol, group.port)
    }
