# SPDX-License-Identifier: Apache-2.0
"""Policy in force: the compiled tables, the maps with their content, and the numbers that outlive both.

Invariants: the policy in force was compiled whole from one state of the objects. A change that does not fit raises an
error and leaves the previous state in force. A number is in the ledger before the kernel sees it. This module does not
assign interfaces to workloads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from netpol_ebpf.agent.barrier import Barrier
from netpol_ebpf.agent.change_record import ChangeRecord
from netpol_ebpf.agent.dns_servers import NO_DNS, OTHER_PORTS, DnsInputs, DnsServers
from netpol_ebpf.agent.learned_names import classes_in_use
from netpol_ebpf.agent.local_interfaces import LocalInterfaces
from netpol_ebpf.agent.name_learners import NameLearners, find_learners
from netpol_ebpf.agent.node_access import MapAccess, ProgramAccess
from netpol_ebpf.agent.objects import ClusterObjects
from netpol_ebpf.agent.own_interfaces import HostPolicyInputs, OwnInterfaces
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.apply.applier import Applier, require_room
from netpol_ebpf.apply.audit import Audit
from netpol_ebpf.apply.events import Names
from netpol_ebpf.apply.ledger import Ledger, with_lost_classes
from netpol_ebpf.apply.surroundings import SurroundingsWriter
from netpol_ebpf.compiler import Change, CompiledTables, Compiler, KnownNumbers, Limits
from netpol_ebpf.compiler.domains import most_specific
from netpol_ebpf.errors import LimitError, MapFullError, Problem
from netpol_ebpf.policy.types import (
    Action,
    Cause,
    Changes,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    IPAddress,
    LabelledNets,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    ProfileRules,
    ServiceBackends,
    Staged,
)
from netpol_loader import abi
from netpol_loader.pins.drift import Drift

HOST_ENDPOINT = "HostEndpoint"
"""The kind in the keys of host endpoints. The row of a host endpoint names no interface."""


UNREAD_DNS = {"pass": abi.NP_UNREAD_DNS_PASS, "drop": abi.NP_UNREAD_DNS_DROP}
"""By value of the option ``--unread-dns``: what happens to an answer that the program cannot read."""


@dataclass(slots=True)
class NumberNames:
    """The rules, log lists and endpoints for which the numbers in flow events stand.

    A number keeps its meaning after its row is removed, until the number is used again.
    """

    rules: dict[int, Cause] = field(default_factory=dict)
    log_lists: dict[int, tuple[int, ...]] = field(default_factory=dict)
    endpoints: dict[int, EndpointKey] = field(default_factory=dict)

    def learn(self, change: Change) -> None:
        """Record the meanings of the numbers in a change."""
        for _, batch in change.batches():
            if "rules" in batch:
                self.rules.update(batch["rules"].upserts)
            if "log_lists" in batch:
                self.log_lists.update(batch["log_lists"].upserts)
            if "endpoints" in batch:
                self.endpoints.update({row.number: key for key, row in batch["endpoints"].upserts.items()})


class Enforcement:
    """The policy in force. `install` makes a new set of maps; `apply` changes the maps in force.

    ``audit``: compares the maps in force with the tables; None before the first `install`.
    """

    def __init__(
        self,
        settings: AgentSettings,
        maps: MapAccess,
        programs: ProgramAccess,
        ledger: Ledger,
        objects: ClusterObjects,
        interfaces: LocalInterfaces,
        own: OwnInterfaces,
        barrier: Barrier,
        clock: Callable[[], float],
    ) -> None:
        """``clock``: returns the time in seconds."""
        self.audit: Audit | None = None
        self.changes_applied = 0
        self.last_change_s: float | None = None
        self.record = ChangeRecord(clock)
        self._settings = settings
        self._maps = maps
        self._programs = programs
        self._ledger = ledger
        self._objects = objects
        self._interfaces = interfaces
        self._own = own
        self._barrier = barrier
        self._clock = clock
        self._names = NumberNames()
        self._servers = DnsServers(settings.dns_servers, settings.unlearned_nets, objects.derivation.get)
        self._learners = NameLearners()
        self._compiler = Compiler()
        self._applier: Applier | None = None
        self._is_behind = False  # a change exceeded a limit: the compiler must compile the whole world again
        self._is_ahead = False  # the maps had no room for the compiled tables: new maps are needed

    @property
    def applier(self) -> Applier:
        """The writer of the maps in force."""
        if self._applier is None:
            raise AssertionError("no maps are in force")
        return self._applier

    @property
    def tables(self) -> CompiledTables:
        """The compiled tables; read-only for callers."""
        return self._compiler.tables

    @property
    def names(self) -> Names:
        """The meaning of numbers in events. Before the first `install`, endpoints are those of the earlier agent."""
        if self._applier is None:
            former = {number: key for key, number in self._ledger.numbers.endpoints.items()}
            return Names(self._names.rules, self._names.log_lists, former)
        return Names(self._names.rules, self._names.log_lists, self._names.endpoints)

    @property
    def bound(self) -> set[int]:
        """Indices of interfaces with the row of an endpoint; none before the first `install`."""
        return set() if self._applier is None else {one.ifindex for one in self._applier.bindings.values()}

    @property
    def is_pending(self) -> bool:
        """Whether a rejected change makes the tables or the maps lag behind the objects."""
        return self._is_behind or self._is_ahead

    @property
    def is_installed(self) -> bool:
        """Whether the content of the maps in force is that of the tables, so that an audit may compare them."""
        return not self._is_ahead and self.audit is not None

    def isolation(self, key: EndpointKey) -> dict[Direction, list[Policy]]:
        """The enforced policies that isolate a local workload, by direction.

        If a direction has none, everything is allowed there unless a profile denies it.
        """
        policies = [one for one in self._compiler.policies_of(key) if one.staged is Staged.NO]
        return {way: [one for one in policies if way in one.types] for way in Direction}

    def policies_of(self, key: EndpointKey) -> list[PolicyKey]:
        """The policies, staged ones included, that select a local endpoint, in order."""
        return [one.key for one in self._compiler.policies_of(key)]

    def selecting(self) -> set[PolicyKey]:
        """The policies, staged ones included, that select any local endpoint, as a new set."""
        return self._compiler.selecting()

    # --- domain names -----------------------------------------------------------------------------------------------

    def class_of_name(self, name: str) -> int:
        """The class that the patterns in force give a name; 0 if no pattern matches it."""
        return most_specific(name, self.tables.names)

    def see_names(self, names: Collection[str]) -> None:
        """Give rows of their own to those of ``names`` that only an inner wildcard matches.

        Raises LimitError or MapFullError, as `apply`.
        """
        wanted = [name for name in names if self._compiler.wants_name(name)]
        if wanted and not self.is_pending:
            self._compiler.see_names(wanted)
            self.apply(Changes())

    def _dns_inputs(self, tables: CompiledTables) -> DnsInputs:
        """The DNS servers; none while no verdict has a rule with domain names before it."""
        return self._servers.inputs(self._objects.world) if len(tables.domain_lists) else NO_DNS

    def _update_learners(self) -> None:
        """Let exactly those endpoints learn whose policies may match by domain names."""
        wanted = find_learners(self.tables, self._objects.world, self._compiler.policies_of)
        if wanted or self._learners.numbers or self._learners.full:
            self._learners.update(self._maps.maps, wanted)
        settings, dns = self._settings, self._own.inputs.dns
        self.applier.set_learning(
            floor_s=settings.name_ttl_floor_s,
            extra_s=settings.name_extra_ttl_s,
            unread_dns=UNREAD_DNS[settings.unread_dns],
            ports=dns.other_ports[:OTHER_PORTS],
            is_used=bool(self._learners.numbers),
        )

    @property
    def name_problems(self) -> list[Problem]:
        """What keeps endpoints from learning domain names."""
        is_used = bool(self._learners.numbers or self._learners.full)
        return [*self._servers.problems(self._own.inputs.dns, is_used=is_used), *self._learners.problems]

    def restore_learners(self) -> list[Drift]:
        """Restore which endpoints have room for DNS questions, if another program changed that."""
        return self._learners.restore(self._maps.maps)

    def is_never_learned(self, address: IPAddress) -> bool:
        """Whether no DNS answer can teach the address, by the options and objects in force."""
        return self._own.inputs.dns.is_refused(address)

    def unused_name_classes(self) -> frozenset[int]:
        """The name classes that no pattern gives any more. Endpoints may still have learned them."""
        return self._compiler.unused_name_classes()

    def forget_name_classes(self, numbers: Collection[int]) -> None:
        """Remove unused name classes that no learned address and no connection has."""
        if numbers and not self.is_pending:
            self._compiler.forget_name_classes(numbers)
            self.apply(Changes())

    # --- changes ----------------------------------------------------------------------------------------------------

    def apply(self, changes: Changes) -> None:
        """Compile changes and apply them to the maps in force.

        Raises LimitError or MapFullError if they do not fit. Then the previous state stays in force, and the next call
        applies all changes that are not in force.
        """
        try:
            if self._is_ahead:
                self._interfaces.locate()  # endpoints may have been removed since
                self.install()
            else:
                self._compile(changes)
        except LimitError:
            self._is_behind = True
            raise
        except MapFullError:
            self._is_ahead = True
            raise

    def _compile(self, changes: Changes) -> None:
        if self._is_behind:
            self._compiler.replace(self._objects.effective_world())
        else:
            for kind, key, new in _changed_objects(changes):
                if new is None:
                    self._compiler.remove(kind, key)
                else:
                    self._compiler.upsert(new)
        change = self._compiler.commit()
        self._is_behind = False
        after = HostPolicyInputs.of(
            self._objects.world, self.tables, self._settings.node, self._dns_inputs(self.tables)
        )
        own, wiring, workloads = self._own, self._interfaces.wiring, self._interfaces.wanted()
        own.require_room(after, wiring, workloads)
        self._record(change, self.applier)
        own.inputs = own.inputs.without_removed(after)
        own.place(wiring, workloads)
        self.applier.apply(change)
        own.inputs = after
        self._update_learners()
        self._forget(change)
        self._note_change()

    def install(self) -> None:
        """Compile all objects into new maps, and replace the maps in force by them.

        Raises LimitError or MapFullError.
        """
        numbers = self._ledger.numbers
        known = KnownNumbers(
            dict(numbers.identities),
            dict(numbers.rules),
            self._known_endpoints(),
            with_lost_classes(numbers.name_classes, classes_in_use(self._maps.maps)),
        )
        sizes, wiring = self._maps.renewal_sizes(), self._interfaces.wiring
        compiler = Compiler(self._objects.is_ours, limits=limits_of(sizes), known=known)
        compiler.replace(self._objects.effective_world())
        change = compiler.commit()
        dns = self._dns_inputs(compiler.tables)
        inputs = HostPolicyInputs.of(self._objects.world, compiler.tables, self._settings.node, dns)
        own = self._own.initial_state(inputs, wiring, self._interfaces.wanted(), self._programs.attached())
        bindings = {**self._interfaces.bindings(), **own.bindings}
        # Checked first, so that no maps and programs are made in vain.
        require_room(compiler.tables, sizes, bindings, own.complete.elements())
        with self._maps.renewal() as maps:
            rows = compiler.tables.endpoints
            self._learners.adopt(
                maps,
                {key: number for key, number in known.endpoints.items() if key in rows and rows[key].number == number},
            )
            applier = Applier(maps)
            for key, binding in bindings.items():
                applier.bind(key, binding)
            self._record(change, applier)
            applier.fill(compiler.tables)
            surroundings = SurroundingsWriter(maps, applier.bump_generation)
            surroundings.write(own.surroundings)
        self._compiler, self._applier = compiler, applier
        self._own.take_over(own, maps, applier, surroundings)
        self.audit = Audit(maps, compiler.tables, applier, surroundings)
        self._is_ahead = self._is_behind = False
        self._configure(applier)
        self._update_learners()
        applier.bump_generation()  # the new policy may allow less than what an earlier agent left
        self._forget_unused()
        self._note_change()

    def _configure(self, applier: Applier) -> None:
        """Write the agent's settings into new maps."""
        settings = self._settings
        keep = abi.NP_CONFIG_KEEP_REVOKED
        applier.set_flags(**({"on": keep} if settings.keep_revoked else {"off": keep}))
        to_host = {Action.DENY: abi.NP_CONFIG_TO_HOST_DENY, Action.PASS: abi.NP_CONFIG_TO_HOST_PASS}
        applier.set_flags(off=abi.NP_CONFIG_TO_HOST_DENY | abi.NP_CONFIG_TO_HOST_PASS)
        applier.set_flags(on=to_host.get(settings.workload_to_host, 0))
        hairpin = abi.NP_CONFIG_HAIRPIN
        applier.set_flags(**({"on": hairpin} if settings.hairpin else {"off": hairpin}))
        applier.set_sender_tag_bits(settings.mark_shift)
        self._barrier.sign(applier)

    def _note_change(self) -> None:
        self.record.note(self._objects.accept(), self.applier.generation)
        self.changes_applied += 1
        self.last_change_s = self._clock()

    def unbind(self, gone: Collection[int]) -> None:
        """Delete the rows of interfaces that no longer exist.

        Before the first `install`, these are an earlier agent's rows.
        """
        if self._applier is None:
            self._maps.drop_rows(gone)
            return
        for key in [key for key, binding in self._applier.bindings.items() if binding.ifindex in gone]:
            self._applier.unbind(key)

    # --- numbers ----------------------------------------------------------------------------------------------------

    def former_workloads(self) -> dict[EndpointKey, int]:
        """The interface in the row of each workload in force, for workloads in the ledger."""
        keys = {number: key for key, number in self._ledger.numbers.endpoints.items() if key.kind != HOST_ENDPOINT}
        return {keys[number]: ifindex for ifindex, number in self._former_numbers().items() if number in keys}

    def _known_endpoints(self) -> dict[EndpointKey, int]:
        """The number of each known endpoint: from the ledger, otherwise from the row of its interface.

        Rows are needed if the ledger was lost.
        """
        known = dict(self._ledger.numbers.endpoints)
        taken, former = set(known.values()), self._former_numbers()
        for key, ifindex in self._interfaces.located.items():
            number = former.get(ifindex)
            if key not in known and number is not None and number not in taken:
                known[key] = number
                taken.add(number)
        return known

    def _former_numbers(self) -> dict[int, int]:
        """The endpoint number in each interface's row in force. A number that several interfaces have is left out."""
        former = self._maps.former_numbers()
        users = Counter(former.values())
        return {ifindex: number for ifindex, number in former.items() if users[number] == 1}

    def _record(self, change: Change, applier: Applier) -> None:
        """Write the numbers of a change to the ledger, before the kernel sees them.

        If a rule's number had another meaning before, its counters are reset.
        """
        self._names.learn(change)
        for _, batch in change.batches():
            if "rules" in batch:
                rules = {cause: number for number, cause in batch["rules"].upserts.items()}
                known = self._ledger.numbers.rules
                applier.reset_counters(number for cause, number in rules.items() if known.get(cause) != number)
                self._ledger.record("rule", rules)
            if "identities" in batch:
                upserts = batch["identities"].upserts
                self._ledger.record("identity", {digest: number for number, digest in upserts.items()})
            if "name_classes" in batch:
                upserts = batch["name_classes"].upserts
                self._ledger.record("name_class", {content: number for number, content in upserts.items()})
            if "endpoints" in batch:
                upserts = batch["endpoints"].upserts
                self._ledger.record("endpoint", {key: row.number for key, row in upserts.items()})

    def _forget(self, change: Change) -> None:
        """Remove the deleted numbers of a change from the ledger, after the kernel no longer has them."""
        for _, batch in change.batches():
            for table, kind in (("rules", "rule"), ("identities", "identity"), ("name_classes", "name_class")):
                if table in batch:
                    self._ledger.release(kind, batch[table].deletes)
            if "endpoints" in batch:
                self._ledger.forget("endpoint", batch["endpoints"].deletes)

    def _forget_unused(self) -> None:
        """Remove numbers that the tables in force do not use from the ledger."""
        tables, numbers = self.tables, self._ledger.numbers
        self._ledger.forget("rule", set(numbers.rules) - {cause for _, cause in tables.rules.items()})
        self._ledger.forget("identity", set(numbers.identities) - {digest for _, digest in tables.identities.items()})
        classes = {content for _, content in tables.name_classes.items()}
        self._ledger.forget("name_class", set(numbers.name_classes) - classes)
        self._ledger.forget("endpoint", set(numbers.endpoints) - set(tables.endpoints))
        self._compiler.release_known()


def limits_of(size: Mapping[str, int]) -> Limits:
    """The compiler's limits for maps of these sizes, by map name."""
    return Limits(
        peer_classes=size["np_peer_class"],
        addresses=size["np_addr4"] + size["np_addr6"],
        cidrs=size["np_cidr4"] + size["np_cidr6"],
        column_blocks=size["np_l4_col"],
        verdicts=size["np_verdict"],
        rules=min(size["np_rule"], size["np_rule_count"] - 1),  # rule 0 counts exempt traffic
        domains=size["np_domain"],
        names=size["np_name"],
    )


def _changed_objects(changes: Changes) -> Iterable[tuple[Any, Any, Any]]:
    """Each changed object as (type, key, new object). The new object is None if the object was removed."""
    kinds: tuple[tuple[type, Mapping[Any, Any]], ...] = (
        (PolicyTier, changes.tiers),
        (Policy, changes.policies),
        (ProfileRules, changes.profiles),
        (Endpoint, changes.endpoints),
        (LabelledNets, changes.network_sets),
        (ClusterNode, changes.nodes),
        (ServiceBackends, changes.services),
    )
    for kind, table in kinds:
        for key, new in table.items():
            yield kind, key, new
    if changes.settings is not None:
        yield PolicySettings, None, changes.settings
