# SPDX-License-Identifier: Apache-2.0
"""The agent, one step at a time: manifests and interfaces in, enforcement out.

Invariants: what is in force was compiled whole from one state of the manifests; a step that fails leaves the state before in
force and tells so in `Agent.problems`; an interface that is a workload's is never open without policy: until it is known
whose it is, the program on it denies everything.

Runs no loop and opens no files or sockets: `netpol_ebpf.agent.main` does, and tests do without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from netpol_ebpf.agent.adoption import Adoption, Place, Workload
from netpol_ebpf.agent.attachments import Attachments
from netpol_ebpf.agent.barrier import Barrier, BarrierSettings
from netpol_ebpf.agent.claims import Claims
from netpol_ebpf.agent.node import Node
from netpol_ebpf.agent.own_interfaces import Grounds, OwnInterfaces
from netpol_ebpf.agent.trouble import DriftLog, Refusals
from netpol_ebpf.agent.wiring import NOWHERE, Located, Wiring, device_flags, is_candidate, locate
from netpol_ebpf.apply.applier import Applier, Binding, require_room
from netpol_ebpf.apply.audit import Audit
from netpol_ebpf.apply.encode import EndpointFlag
from netpol_ebpf.apply.events import FlowEvent, Names, decode_event
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.apply.surroundings import SurroundingsWriter
from netpol_ebpf.compiler import Change, Compiler, KnownNumbers, Limits, Tables
from netpol_ebpf.errors import InvalidInputError, LimitError, Location, MapFullError, PlatformError, Problem
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import (
    Action,
    Cause,
    Changes,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    NetworkSet,
    Policy,
    Profile,
    Service,
    Tier,
)
from netpol_ebpf.policy.types import Node as ClusterNode
from netpol_ebpf.policy.types import Settings as PolicySettings
from netpol_ebpf.sources.files import Batch, ManifestDirectory, Upsert
from netpol_loader import abi
from netpol_loader.drift import Drift, PartlyMendedError

log = logging.getLogger(__name__)

SEARCH_S = 0.5
"""How often to look for interfaces that nothing announces (an address inside a pod's namespace); arbitrary."""

AUDIT_S = 1.0
"""How often to look whether programs, pins and the next rows are as they were left; arbitrary."""
ROUND_S = 5.0
"""Least time between the beginnings of two rounds through all rows; arbitrary."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the agent is asked to do.

    ``node``: name of this node, None: every workload that is found here is local.  ``interfaces``: patterns of workload
    interfaces, () for the built-in rule (`wiring.is_candidate`).  ``borrow_sources``: honour a pod's allowed source prefixes.
    ``keep_revoked``: connections that policy no longer allows live on until they end.  ``workload_to_host``: what becomes of
    packets of workloads to their own node, PASS: a wildcard host endpoint's policy decides.  ``mark_shift``: lowest of 16
    bits of the packets' mark that are ours, 0: none.  ``tunnels``: encapsulation, as IP protocol and UDP port, that nodes take
    from anyone, besides that of this node's devices.  ``routers``: patterns of ``NAMESPACE/NAME`` of workloads that others
    route through.  ``hairpin``: what comes from outside may have the source of a workload of this node.  ``barrier``: what
    stands behind the programs.
    """

    node: str | None = None
    interfaces: Sequence[str] = ()
    borrow_sources: bool = False
    keep_revoked: bool = False
    workload_to_host: Action = Action.ALLOW
    mark_shift: int = 0
    tunnels: frozenset[tuple[int, int]] = frozenset()
    routers: Sequence[str] = ()
    hairpin: bool = False
    barrier: BarrierSettings = BarrierSettings()

    def is_router(self, key: EndpointKey) -> bool:
        """Whether others route through a workload."""
        return any(fnmatchcase(f"{key.namespace}/{key.name}", pattern) for pattern in self.routers)


@dataclass(slots=True)
class NumberNames:
    """What numbers in events stand for, also for a while after they went: a name is replaced when its number is given away again."""

    rules: dict[int, Cause] = field(default_factory=dict)
    log_lists: dict[int, tuple[int, ...]] = field(default_factory=dict)
    endpoints: dict[int, EndpointKey] = field(default_factory=dict)

    def learn(self, change: Change) -> None:
        """Take note of the numbers that a change brings."""
        for _, batch in change.batches():
            if "rules" in batch:
                self.rules.update(batch["rules"].upserts)
            if "log_lists" in batch:
                self.log_lists.update(batch["log_lists"].upserts)
            if "endpoints" in batch:
                self.endpoints.update({row.number: key for key, row in batch["endpoints"].upserts.items()})


class Agent:
    """Keeps a node's enforcement in step with its manifests and interfaces. `start` once, then `step` again and again."""

    def __init__(
        self, settings: Settings, node: Node, source: ManifestDirectory, ledger: Ledger, clock: Callable[[], float]
    ) -> None:
        self.settings = settings
        self._node = node
        self._source = source
        self._ledger = ledger
        self._clock = clock
        self._derivation = Derivation(PolicySettings(workload_to_host=settings.workload_to_host))
        self._claims = Claims(self._derivation.world)
        self._local: dict[EndpointKey, Endpoint] = {}  # with the addresses that count as theirs
        self._names = NumberNames()
        self._compiler = Compiler()
        self._applier: Applier | None = None
        self._attachments = Attachments(node)
        self._own = OwnInterfaces(settings.node, self._attachments, settings.tunnels)
        self._audit: Audit | None = None
        self._wiring = Wiring()
        self._located = Located({}, {})
        self._homes: dict[EndpointKey, int] = {}  # the interface each was last bound to
        self._adoption = Adoption()
        self._manifest_problems: tuple[Problem, ...] = ()
        self._no_room: dict[EndpointKey, Problem] = {}  # endpoints whose row did not fit
        self._unmended: Problem | None = None
        self._overtaken: Problem | None = None
        self._is_behind = False  # the compiler dropped changes: hand it the whole world
        self._is_ahead = False  # the kernel refused what the compiler holds: start over with new maps
        self._looked_at_s = self._audited_s = self._round_s = clock()
        self._others: dict[IPAddress, str] | None = None
        self.refusals = Refusals()
        self.drift = DriftLog()
        self.barrier = Barrier(settings.barrier, node.barrier, clock, node.others)
        self.changes_applied = 0
        self.last_change_s: float | None = None

    # --- what is to be told -----------------------------------------------------------------------------------------

    @property
    def problems(self) -> list[Problem]:
        """Everything that keeps the node from being as the manifests say."""
        found = [*self._manifest_problems, *self._own.problems(self._derivation.world.endpoints, self._location)]
        found += [*self._disputes(), *self._no_room.values(), *self._attachments.problems]
        found += self._adoption.warnings.values()
        found += self.barrier.problems
        others = (self.refusals.problem, self._unmended, self._own.no_room, self._overtaken)
        found += [one for one in others if one is not None]
        for key, message in sorted(self._located.problems.items()):
            found.append(Problem(self._location(key), "", f"interface: {message}", obj=str(key), slug="interface"))
        return found

    @property
    def names(self) -> Names:
        """What numbers in events stand for."""
        return Names(self._names.rules, self._names.log_lists, self._names.endpoints)

    @property
    def derivation(self) -> Derivation:
        """The objects of the manifests, translated; for reading."""
        return self._derivation

    @property
    def tables(self) -> Tables:
        """The compiled tables in force; for reading."""
        return self._compiler.tables

    @property
    def wiring(self) -> Wiring:
        """The interfaces as last seen."""
        return self._wiring

    @property
    def attached(self) -> frozenset[int]:
        """Interfaces with programs on them."""
        return frozenset(self._attachments.interfaces)

    @property
    def audited_rounds(self) -> int:
        """How often every row in force has been looked at."""
        return 0 if self._audit is None else self._audit.rounds

    @property
    def applier(self) -> Applier:
        """The writer of the maps in force."""
        if self._applier is None:
            raise AssertionError("the agent has not been started")
        return self._applier

    def owner_of(self, address: IPAddress) -> str | None:
        """The workload, or else the host endpoint or the node, that has an address; by name the first of several."""
        holder = self._claims.holder(address)
        if holder is not None:
            return str(holder)
        if self._others is None:
            world = self._derivation.world
            hosts = [(key, one) for key, one in world.endpoints.items() if one.kind is EndpointKind.HOST]
            named = [(node.addresses, f"Node/{name}") for name, node in sorted(world.nodes.items())]
            named += [(one.addresses, str(key)) for key, one in sorted(hosts, reverse=True)]
            self._others = {each: name for addresses, name in named for each in addresses}
        return self._others.get(address)

    def local_endpoints(self) -> list[Endpoint]:
        """The workloads that are, or would be, on this node, with the addresses that count as theirs."""
        return list(self._local.values())

    def is_local(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint is a workload of this node."""
        return endpoint.kind is EndpointKind.WORKLOAD and self.settings.node in (None, endpoint.node)

    def _is_ours(self, endpoint: Endpoint) -> bool:
        """Whether policy is to be compiled for an endpoint: a workload of this node, or a host endpoint of it.

        Without a node's name, every host endpoint may be one: its addresses tell, when it is given its interfaces.
        """
        return self.settings.node in (None, endpoint.node)

    # --- what is to be done -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the manifests as they are now in force, in one exchange with what an earlier agent left.

        Raises LimitError or MapFullError when they do not fit, InvalidInputError when their directory cannot be read: that is
        not the same as an empty one. Then everything is as it was.
        """
        self._ledger.open()
        self._look_at_manifests()
        if not self._source.was_read:
            reasons = "; ".join(f"{one.location} {one.message}" for one in self._source.problems)
            raise InvalidInputError(f"the manifests are not known: {reasons}")
        self._take_changes(older=set(self._ledger.numbers.endpoints))
        self._homes = self._former_homes()
        self._look_at_interfaces()
        self._attachments.find()  # by an earlier agent
        self._adoption.expect(self._wanted_interfaces() - self.attached)
        self._install()
        self._adoption.go_ahead(self._node, *self._adoptable())
        for ifindex in self._wanted_interfaces():
            self._attach(ifindex)
        self._attachments.find()
        self._close_and_open()

    def step(self) -> list[FlowEvent]:
        """Do whatever there is to do now; returns the flows that were reported since the last step."""
        self.close_newborn()
        if self._node.has_news() or self._is_searching():
            gone = self._node.take_gone()
            self._look_at_interfaces()
            self._let_go(gone)
            self._close_and_open()
        if self._look_at_manifests():
            self._bring_into_force(self._take_changes())
        elif self.refusals.retry_at_s is not None and self._clock() >= self.refusals.retry_at_s:
            self._bring_into_force(Changes())
        self.drift.note(self.barrier.follow(), self._clock())
        self._look_for_drift()
        return self.read_flows()

    def close_newborn(self) -> None:
        """Put programs on interfaces that have come just now, before anything else is found out about them. Takes no time.

        They deny everything until a step finds whose they are, or takes them off what is the node's own after all.
        """
        for link in self._node.take_born():
            is_known = link.ifindex in self._wiring.links or link.ifindex in self.attached
            if not is_known and is_candidate(link, self._wiring, self.settings.interfaces):
                self._attachments.attach(link.ifindex, link.name, is_newborn=True)

    def read_flows(self) -> list[FlowEvent]:
        """The flows that the program reported since the last call."""
        raw: list[abi.np_event] = []
        self._node.read_events(raw.append)
        return [decode_event(event, self.names) for event in raw]

    # --- manifests --------------------------------------------------------------------------------------------------

    def _look_at_manifests(self) -> bool:
        """Take up what changed; whether anything did. Nothing of the batch is kept: of a cluster it is large."""
        batch = self._source.step()
        if batch is not None:
            self._take(batch)
        return batch is not None

    def _take(self, batch: Batch) -> None:
        for problem in batch.problems:
            if problem not in self._manifest_problems:
                log.log(logging.ERROR if problem.severity == "error" else logging.WARNING, "%s", problem)
        self._manifest_problems = batch.problems
        for event in batch.events:
            if isinstance(event, Upsert):
                self._derivation.upsert(event.resource, event.key)
            else:
                self._derivation.remove(*event.key)

    def _take_changes(self, older: Collection[EndpointKey] = ()) -> Changes:
        """What the manifests changed, addresses going to those who had them first. ``older``: see `Claims.settle`."""
        changes = self._derivation.take_changes()
        before = set(self._claims.disputes())
        self._claims.settle(changes, older)
        for dispute in self._claims.disputes():
            if dispute not in before:
                log.warning("%s", _dispute(*dispute))
        for key, endpoint in changes.endpoints.items():
            if endpoint is not None and self.is_local(endpoint):
                self._local[key] = endpoint
            else:
                self._local.pop(key, None)
                self._homes.pop(key, None)
            if endpoint is None or endpoint.kind is EndpointKind.HOST:
                self._others = None
        if changes.nodes:
            self._others = None
        return changes

    def _bring_into_force(self, changes: Changes) -> None:
        """Compile and apply; when it does not fit, say so and try again with the next change, or when memory may be back."""
        if not changes and not self._is_behind and not self._is_ahead:
            return
        self.refusals.expect(changes, self._location_of)
        before = self._own.grounds
        try:
            if self._is_ahead:
                self._locate()  # endpoints may have gone since
                self._install()
            else:
                self._compile(changes)
        except (LimitError, MapFullError) as error:
            self.refusals.refuse(error, self._clock())
            self._is_behind = self._is_behind or isinstance(error, LimitError)
            self._is_ahead = self._is_ahead or isinstance(error, MapFullError)
            if self._own.grounds is not before:  # what was to go has to come back
                self._own.grounds = before
                self._close_and_open()
            return
        self.refusals.accept()
        if self._is_waiting():
            self._look_at_interfaces()  # an address inside a pod's namespace is not announced
        else:
            self._locate()
        self._close_and_open()

    def _compile(self, changes: Changes) -> None:
        if self._is_behind:
            self._compiler.replace(self._claims.effective_world())
        else:
            for kind, key, new in _objects(changes):
                if new is None:
                    self._compiler.remove(kind, key)
                else:
                    self._compiler.upsert(new)
        change = self._compiler.commit()
        self._is_behind = False
        after, own, workloads = (
            Grounds.of(self._derivation.world, self.tables, self.settings.node),
            self._own,
            self._wanted_interfaces(),
        )
        own.require_room(after, self._wiring, workloads)
        self._record(change, self.applier)
        own.grounds = own.grounds.on_the_way_to(after)
        own.place(self._wiring, workloads)
        self.applier.apply(change)
        own.grounds = after
        self._forget(change)
        self._note_change()

    def _install(self) -> None:
        """Compile everything into maps of its own, and let it take the place of whatever is in force."""
        numbers = self._ledger.numbers
        known = KnownNumbers(dict(numbers.identities), dict(numbers.rules), self._known_endpoints())
        sizes = self._node.renewal_sizes()
        compiler = Compiler(self._is_ours, limits=limits_of(sizes), known=known)
        compiler.replace(self._claims.effective_world())
        change = compiler.commit()
        grounds = Grounds.of(self._derivation.world, compiler.tables, self.settings.node)
        own = self._own.beginning(grounds, self._wiring, self._wanted_interfaces(), self._node.attached())
        bindings = {**self._bindings(), **own.bindings}
        # Before maps and programs are made in vain.
        require_room(compiler.tables, sizes, bindings, own.in_the_end.elements())
        with self._node.renewal() as maps:
            applier = Applier(maps)
            for key, binding in bindings.items():
                applier.bind(key, binding)
            self._record(change, applier)
            applier.fill(compiler.tables)
            surroundings = SurroundingsWriter(maps, applier.bump_generation)
            surroundings.write(own.surroundings)
        self._compiler, self._applier = compiler, applier
        self._own.take_over(own, maps, applier, surroundings)
        self._audit = Audit(maps, compiler.tables, applier, surroundings)
        self._is_ahead = self._is_behind = False
        keep = abi.NP_CONFIG_KEEP_REVOKED
        applier.set_flags(**({"on": keep} if self.settings.keep_revoked else {"off": keep}))
        to_host = {Action.DENY: abi.NP_CONFIG_TO_HOST_DENY, Action.PASS: abi.NP_CONFIG_TO_HOST_PASS}
        applier.set_flags(off=abi.NP_CONFIG_TO_HOST_DENY | abi.NP_CONFIG_TO_HOST_PASS)
        applier.set_flags(on=to_host.get(self.settings.workload_to_host, 0))
        hairpin = abi.NP_CONFIG_HAIRPIN
        applier.set_flags(**({"on": hairpin} if self.settings.hairpin else {"off": hairpin}))
        applier.set_carrier(self.settings.mark_shift)
        self.barrier.sign(applier)
        applier.bump_generation()  # the new policy may allow less than what an earlier agent left
        self._forget_unused()
        self._note_change()

    def _known_endpoints(self) -> dict[EndpointKey, int]:
        """Numbers of the ledger and, should that have been lost, of the rows that the interfaces of our endpoints have now."""
        known = dict(self._ledger.numbers.endpoints)
        taken, former = set(known.values()), self._node.former_numbers()
        for key, ifindex in self._located.interfaces.items():
            number = former.get(ifindex)
            if key not in known and number is not None and number not in taken:
                known[key] = number
                taken.add(number)
        return known

    def _record(self, change: Change, applier: Applier) -> None:
        """Numbers to the ledger, before the kernel sees them; what a number counted for something else is forgotten."""
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
            if "endpoints" in batch:
                upserts = batch["endpoints"].upserts
                self._ledger.record("endpoint", {key: row.number for key, row in upserts.items()})

    def _forget(self, change: Change) -> None:
        """Numbers out of the ledger, after the kernel has forgotten them."""
        for _, batch in change.batches():
            for table, kind in (("rules", "rule"), ("identities", "identity")):
                if table in batch:
                    self._ledger.release(kind, batch[table].deletes)
            if "endpoints" in batch:
                self._ledger.forget("endpoint", batch["endpoints"].deletes)

    def _forget_unused(self) -> None:
        """Numbers of the ledger that the tables in force do not use are free again."""
        tables, numbers = self.tables, self._ledger.numbers
        self._ledger.forget("rule", set(numbers.rules) - {cause for _, cause in tables.rules.items()})
        self._ledger.forget("identity", set(numbers.identities) - {digest for _, digest in tables.identities.items()})
        self._ledger.forget("endpoint", set(numbers.endpoints) - set(tables.endpoints))
        self._compiler.release_known()

    def _note_change(self) -> None:
        self.changes_applied += 1
        self.last_change_s = self._clock()

    # --- interfaces -------------------------------------------------------------------------------------------------

    def _is_searching(self) -> bool:
        """Whether it is time to look for what nobody announces, or to try again what failed."""
        return self._clock() - self._looked_at_s >= SEARCH_S and (
            bool(self._attachments.problems) or self._is_waiting()
        )

    def _is_waiting(self) -> bool:
        """Whether there are both workloads without an interface and interfaces without a workload."""
        bound = self.applier.bindings
        return not self._local.keys() <= bound.keys() and bool(
            self.attached - {binding.ifindex for binding in bound.values()} - set(self._own.interfaces)
        )

    def _look_at_interfaces(self) -> None:
        self._looked_at_s = self._clock()
        bound = {} if self._applier is None else self._applier.bindings
        self._wiring = self._node.snapshot({binding.ifindex for binding in bound.values()})
        self._locate()

    def _locate(self) -> None:
        """Find the local workloads' interfaces in what was last seen of the node.

        A workload whose address another one claims keeps the interface that it has and gets no other: that may be the other
        workload's, which would get the policy of this one.
        """
        before, found = self._located, locate(self._wiring, self._local.values())
        interfaces, problems = dict(found.interfaces), dict(found.problems)
        for key, ifindex in found.interfaces.items():
            home = self._homes.get(key, ifindex)
            if home != ifindex and self._claims.is_contested(key):
                del interfaces[key]
                problems[key] = f"{self._wiring.name_of(ifindex)} has an address that others claim as well"
                if home in self._wiring.links and home not in found.interfaces.values():
                    interfaces[key] = home
        self._located = Located(interfaces, problems)
        for key, message in self._located.problems.items() - before.problems.items():
            log.warning("%s: interface: %s", key, message)

    def _former_homes(self) -> dict[EndpointKey, int]:
        """Interfaces on which an earlier agent put the endpoints, as far as they are the same interfaces still."""
        keys = {number: key for key, number in self._ledger.numbers.endpoints.items()}
        attached, homes = self._node.attached(), {}
        for ifindex, number in self._node.former_numbers().items():
            if number in keys:
                homes[keys[number]] = ifindex if ifindex in attached else NOWHERE
        return homes

    def _let_go(self, gone: set[int] | None) -> None:
        """Forget interfaces that went, before another one with such a number is taken for the same. None: unknown which."""
        if gone is None:
            gone = set(self.attached - self._node.attached())
        if not gone:
            return
        self._attachments.forget(gone)
        self._adoption.forget(gone)
        self._homes = {key: NOWHERE if ifindex in gone else ifindex for key, ifindex in self._homes.items()}
        for key in [key for key, binding in self.applier.bindings.items() if binding.ifindex in gone]:
            self.applier.unbind(key)
        self._node.prune()

    def _bindings(self) -> dict[EndpointKey, Binding]:
        """Which interface each local endpoint is on."""
        return {
            key: Binding(
                ifindex,
                allowed_sources=self._local[key].allowed_sources if self.settings.borrow_sources else (),
                link=self._wiring.link_of(ifindex),
                flags=device_flags(self._wiring.links.get(ifindex))
                | (EndpointFlag.ROUTES if self.settings.is_router(key) else EndpointFlag.NONE),
            )
            for key, ifindex in self._located.interfaces.items()
        }

    def _wanted_interfaces(self) -> set[int]:
        """Workloads' interfaces, which are to have programs on them."""
        candidates = {
            link.ifindex
            for link in self._wiring.links.values()
            if is_candidate(link, self._wiring, self.settings.interfaces)
        }
        return candidates | set(self._located.interfaces.values())

    def _close_and_open(self) -> None:
        """Programs on new interfaces first, then rows for endpoints that were found; rows of those that went."""
        self._attachments.begin_round(self._wiring.links.keys())
        wanted = self._wanted_interfaces()
        for ifindex in wanted - self.attached:
            self._attach(ifindex)
        self.barrier.settle(self._wiring, wanted, self.attached)  # before programs are taken off what is no workload's
        bindings = self._bindings()
        for key, binding in list(self.applier.bindings.items()):
            if binding.kind is EndpointKind.WORKLOAD and key not in bindings:
                self.applier.unbind(key)
        self._no_room.clear()
        self._adoption.go_ahead(self._node, *self._adoptable())
        for key, binding in bindings.items():
            try:
                self.applier.bind(key, binding)
                self._homes[key] = binding.ifindex
            except MapFullError as error:  # noqa: PERF203 - one endpoint's misfortune is not another's
                message = f"its interface {self._wiring.name_of(binding.ifindex)} stays as it is: {error.message}"
                self._no_room[key] = Problem(self._location(key), "", message, obj=str(key), slug=error.slug)
        self._own.settle(self._wiring, wanted)
        self.barrier.settle(self._wiring, wanted, self.attached)
        self._adoption.go_behind(self._node, *self._adoptable())

    def _adoptable(self) -> tuple[dict[int, Workload], Place]:
        """The workloads whose old connections are looked for, as far as policy for them is in force, and what those depend on."""
        workloads, concerned = {}, self._adoption.concerned
        for key, ifindex in self._located.interfaces.items():
            if ifindex in concerned and key in self.tables.endpoints:
                peer = self._wiring.links[ifindex].peer
                number, addresses = self.tables.endpoints[key].number, self._local[key].addresses
                workloads[ifindex] = Workload(number, addresses, None if peer is None else peer[0])
        return workloads, Place(self._wiring.addresses, self._own.grounds.vips)

    def _attach(self, ifindex: int) -> None:
        self._attachments.attach(ifindex, self._wiring.name_of(ifindex))

    # --- drift ------------------------------------------------------------------------------------------------------

    def _look_for_drift(self) -> None:
        """Put back what something else changed; of the rows, the next ones."""
        now_s = self._clock()
        if now_s - self._audited_s < AUDIT_S:
            return
        self._audited_s = now_s
        self._look_for_overtaking()
        self.drift.note(self.barrier.look(), now_s)
        self._unmended = None
        try:
            try:
                self._note_mended(self._node.mend(self.attached), now_s)
            except PartlyMendedError as error:
                self._note_mended(error.found, now_s)
                raise
            if self._is_ahead or self._audit is None:  # the tables are not what is in force
                return
            if self._audit.is_between_rounds:
                if now_s - self._round_s < ROUND_S:
                    return
                self._round_s = now_s
            self.drift.note(self._audit.step(), now_s)
        except PlatformError as error:
            message = f"what something else changed cannot be put back: {error.message}"
            log.error("%s", message)  # noqa: TRY400 - the machine's state, not this code, is to be looked at
            self._unmended = Problem(Location(""), "", message, slug="drift")

    def _look_for_overtaking(self) -> None:
        """Tell of programs before ours. They stay: of two that both want to be first, neither would rest."""
        before, self._overtaken = self._overtaken, None
        names = sorted(self._wiring.name_of(ifindex) for ifindex in self._node.overtaken(self.attached))
        if names:
            message = (
                f"programs of others run before policy at {', '.join(names)}: what they let pass, policy does not see"
            )
            self._overtaken = Problem(Location(""), "", message, severity="warning", slug="overtaken")
            if self._overtaken != before:
                log.warning("%s", message)

    def _note_mended(self, found: Collection[Drift], now_s: float) -> None:
        self.drift.note(found, now_s)
        if any(one.kind == "program" for one in found):
            self.applier.bump_generation()  # of what passed meanwhile, nothing is known

    # --- problems ---------------------------------------------------------------------------------------------------

    def _disputes(self) -> Iterable[Problem]:
        for address, holder, other in self._claims.disputes():
            message = _dispute(address, holder, other)
            yield Problem(
                self._location(other), "", message, obj=str(other), severity="warning", slug="address-claimed"
            )

    def _location_of(self, key: object) -> Location:
        return self._location(key) if isinstance(key, EndpointKey) else Location("")

    def _location(self, key: EndpointKey) -> Location:
        resource = self._derivation.get(key_of_endpoint(key))
        return Location("") if resource is None else resource.meta.location


def key_of_endpoint(key: EndpointKey) -> Any:
    """The key of the resource behind an endpoint."""
    from netpol_ebpf.policy.translate import ResourceKey

    return ResourceKey(key.kind, key.namespace, key.name)


def limits_of(size: Mapping[str, int]) -> Limits:
    """The compiler's limits that follow from the sizes of the maps, by their names."""
    return Limits(
        peer_classes=size["np_peer_class"],
        addresses=size["np_addr4"] + size["np_addr6"],
        cidrs=size["np_cidr4"] + size["np_cidr6"],
        column_blocks=size["np_l4_col"],
        verdicts=size["np_verdict"],
        rules=min(size["np_rule"], size["np_rule_count"] - 1),  # rule 0 is exempt traffic
    )


def _dispute(address: IPAddress, holder: EndpointKey, other: EndpointKey) -> str:
    return f"{address} is claimed by {holder} and by {other}; {holder} had it first, and {other} is closed for it"


def _objects(changes: Changes) -> Iterable[tuple[Any, Any, Any]]:
    """(type, key, new object or None) of everything that changed."""
    kinds: tuple[tuple[type, Mapping[Any, Any]], ...] = (
        (Tier, changes.tiers),
        (Policy, changes.policies),
        (Profile, changes.profiles),
        (Endpoint, changes.endpoints),
        (NetworkSet, changes.network_sets),
        (ClusterNode, changes.nodes),
        (Service, changes.services),
    )
    for kind, table in kinds:
        for key, new in table.items():
            yield kind, key, new
